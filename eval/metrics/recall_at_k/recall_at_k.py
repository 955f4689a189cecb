"""Recall at k for the evaluate library: `evaluate.load("eval/metrics/recall_at_k")`."""

import datasets
import evaluate

DESCRIPTION = """
Recall at k of retrieval: the share of queries with a relevant candidate among the k most similar
ones. Ties are pessimistic: a candidate that scores as high as the relevant one is ranked before it.
"""
INPUTS = """
Args:
    predictions: R lists of C floats, the similarity of each query and each candidate.
    references: R lists of indices of the relevant candidates. An empty list marks a query without
        one, which is never a hit.
    k (`int` or list of `int`): defaults to (1, 5, 10).
Returns: `{"recall_at_1": ...}`, from 0 to 1, for each k.
"""
CITATION = """
@inproceedings{frome2013devise,
  title={DeViSE: A Deep Visual-Semantic Embedding Model},
  author={Frome, Andrea and Corrado, Greg S. and Shlens, Jon and Bengio, Samy and Dean, Jeff and
    Ranzato, Marc'Aurelio and Mikolov, Tomas},
  booktitle={Advances in Neural Information Processing Systems},
  year={2013}
}
"""


class RecallAtK(evaluate.Metric):
    """Shares of the ranks of `eval.metrics.first_relevant_ranks`."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation=CITATION,
            inputs_description=INPUTS,
            features=datasets.Features(
                {
                    "predictions": datasets.List(datasets.Value("float64")),
                    "references": datasets.List(datasets.Value("int64")),
                }
            ),
        )

    def _compute(
        self,
        predictions: list[list[float]],
        references: list[list[int]],
        k: int | list[int] = (1, 5, 10),
    ) -> dict[str, float]:
        # At the top of the file, evaluate would answer a missing clone with "pip install eval".
        from eval.metrics import first_relevant_ranks
        from eval.metrics.lists import as_cutoffs, as_matrices

        cutoffs = as_cutoffs(k)
        similarity, relevant = as_matrices(predictions, references)  # (R, C)
        ranks = first_relevant_ranks(similarity, relevant)  # (R,)
        found = relevant.any(dim=1)  # the rank of a row without a right one, C + 1, can be below k
        return {f"recall_at_{k}": ((ranks <= k) & found).double().mean().item() for k in cutoffs}
