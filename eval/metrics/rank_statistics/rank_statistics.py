"""Median and mean rank for evaluate: `evaluate.load("eval/metrics/rank_statistics")`."""

import datasets
import evaluate

DESCRIPTION = """
Median and mean rank, from 1, of the best relevant candidate of each query. Ties are pessimistic: a
candidate that scores as high as the relevant one is ranked before it. A query without a relevant
candidate has rank C + 1.
"""
INPUTS = """
Args:
    predictions: R lists of C floats, the similarity of each query and each candidate.
    references: R lists of indices of the relevant candidates. An empty list marks a query without
        one.
Returns: `{"median_rank": ..., "mean_rank": ...}`.
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


class RankStatistics(evaluate.Metric):
    """Median and mean of the ranks of `eval.metrics.first_relevant_ranks`."""

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
        self, predictions: list[list[float]], references: list[list[int]]
    ) -> dict[str, float]:
        # At the top of the file, evaluate would answer a missing clone with "pip install eval".
        from eval.metrics import first_relevant_ranks
        from eval.metrics.lists import as_matrices

        ranks = first_relevant_ranks(*as_matrices(predictions, references)).double()  # (R,)
        return {"median_rank": ranks.quantile(0.5).item(), "mean_rank": ranks.mean().item()}
