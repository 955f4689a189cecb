"""nDCG at k for the evaluate library: `evaluate.load("eval/metrics/ndcg")`."""

import datasets
import evaluate

DESCRIPTION = """
Normalised discounted cumulative gain of the k most similar candidates (nDCG), with binary
relevance: a relevant candidate of rank r counts 1 / log2(1 + r), divided by the sum of the best
order. Ties are pessimistic: a candidate that scores as high as a relevant one is ranked before it.
"""
INPUTS = """
Args:
    predictions: R lists of C floats, the similarity of each query and each candidate.
    references: R lists of indices of the relevant candidates. An empty list marks a query without
        one, which scores 0.
    k (`int` or list of `int`): defaults to 10.
Returns: `{"ndcg_at_10": ...}`, from 0 to 1, for each k.
"""
CITATION = """
@article{jarvelin2002cumulated,
  title={Cumulated gain-based evaluation of IR techniques},
  author={J{\\"a}rvelin, Kalervo and Kek{\\"a}l{\\"a}inen, Jaana},
  journal={ACM Transactions on Information Systems},
  volume={20},
  year={2002}
}
"""


class NDCG(evaluate.Metric):
    """Mean of `eval.metrics.ndcg`."""

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
        k: int | list[int] = 10,
    ) -> dict[str, float]:
        # At the top of the file, evaluate would answer a missing clone with "pip install eval".
        from eval.metrics import ndcg
        from eval.metrics.lists import as_cutoffs, as_matrices

        cutoffs = as_cutoffs(k)
        similarity, relevant = as_matrices(predictions, references)
        return {f"ndcg_at_{k}": ndcg(similarity, relevant, k).mean().item() for k in cutoffs}
