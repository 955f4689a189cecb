"""Class-mean recall for evaluate: `evaluate.load("eval/metrics/class_mean_recall")`."""

import datasets
import evaluate

DESCRIPTION = """
Class-mean recall at k, as in the action anticipation of EPIC-KITCHENS-100 (k = 5): for each class
the share of its rows whose class is among the k most similar candidates, averaged over the classes
that have a row. Rare classes count the same as frequent ones. Ties are pessimistic: a candidate
that scores as high as the true one is ranked before it.
"""
INPUTS = """
Args:
    predictions: R lists of C floats, the similarity of each prediction and each class.
    references: R indices of the true class, from 0.
    k (`int` or list of `int`): defaults to 5.
Returns: `{"class_mean_recall_at_5": ...}`, from 0 to 1, for each k.
"""
CITATION = """
@article{damen2022rescaling,
  title={Rescaling Egocentric Vision: Collection, Pipeline and Challenges for EPIC-KITCHENS-100},
  author={Damen, Dima and Doughty, Hazel and Farinella, Giovanni Maria and Furnari, Antonino and
    Ma, Jian and Kazakos, Evangelos and Moltisanti, Davide and Munro, Jonathan and Perrett, Toby and
    Price, Will and Wray, Michael},
  journal={International Journal of Computer Vision},
  year={2022}
}
"""


class ClassMeanRecall(evaluate.Metric):
    """Mean of `eval.parts.equal_parts` over hits of `eval.metrics.first_relevant_ranks`."""

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
        self, predictions: list[list[float]], references: list[int], k: int | list[int] = 5
    ) -> dict[str, float]:
        # At the top of the file, evaluate would answer a missing clone with "pip install eval".
        from eval.metrics import first_relevant_ranks
        from eval.metrics.lists import as_cutoffs, as_matrices
        from eval.parts import equal_parts

        cutoffs = as_cutoffs(k)
        true = [[index] for index in references]
        ranks = first_relevant_ranks(*as_matrices(predictions, true)).numpy()  # (R,)
        classes = [str(index) for index in references]
        return {
            f"class_mean_recall_at_{k}": float(equal_parts(1.0 * (ranks <= k), classes).mean())
            for k in cutoffs
        }
