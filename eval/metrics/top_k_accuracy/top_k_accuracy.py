"""Accuracy against candidates for the evaluate library:
`evaluate.load("eval/metrics/top_k_accuracy")`."""

import datasets
import evaluate

DESCRIPTION = """
Accuracy of open-vocabulary classification and discriminative VQA: the share of rows whose true
label or answer is among the k candidate texts nearest to the prediction. Ties are pessimistic: a
candidate that scores as high as the true one is ranked before it.
"""
INPUTS = """
Args:
    predictions: R lists of C floats, the similarity of each prediction and each candidate.
    references: R indices of the true candidate. -1 marks an answer that is not among the
        candidates; such a row is wrong.
    k (`int` or list of `int`): defaults to 1.
Returns: `{"top_1_accuracy": ...}`, from 0 to 1, for each k.
"""
CITATION = """
@misc{chen2025vljepa,
  title={VL-JEPA: Joint Embedding Predictive Architecture for Vision-language},
  author={Chen, Delong and Shukor, Mustafa and Moutakanni, Th{\\'e}o and Chung, Willy and
    Yu, Jade and Kasarla, Tejaswi and Bolourchi, Allen and LeCun, Yann and Fung, Pascale},
  eprint={2512.10942},
  archivePrefix={arXiv},
  year={2025}
}
"""


class TopKAccuracy(evaluate.Metric):
    """Shares of the ranks of `eval.metrics.first_relevant_ranks`."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation=CITATION,
            inputs_description=INPUTS,
            features=datasets.Features(
                {
                    "predictions": datasets.List(datasets.Value("float64")),
                    "references": datasets.Value("int64"),
                }
            ),
        )

    def _compute(
        self, predictions: list[list[float]], references: list[int], k: int | list[int] = 1
    ) -> dict[str, float]:
        # At the top of the file, evaluate would answer a missing clone with "pip install eval".
        from eval.metrics import first_relevant_ranks
        from eval.metrics.lists import as_cutoffs, as_matrices

        cutoffs = as_cutoffs(k)
        true = [[] if index == -1 else [index] for index in references]
        similarity, relevant = as_matrices(predictions, true)  # (R, C)
        ranks = first_relevant_ranks(similarity, relevant)  # (R,)
        found = relevant.any(dim=1)  # the rank of a row without a right one, C + 1, can be below k
        return {f"top_{k}_accuracy": ((ranks <= k) & found).double().mean().item() for k in cutoffs}
