"""Accuracy on hard negatives for evaluate: `evaluate.load("eval/metrics/hard_negatives")`."""

import datasets
import evaluate
import torch

DESCRIPTION = """
Accuracy on triplets of two texts of one meaning and a hard negative, as in the text-only task of
SugarCrepe++ and VISLA: a row is right if both positive texts are more similar to each other than
either is to the negative one. A tie is wrong.
"""
INPUTS = """
Args:
    predictions: R lists of three floats: the similarity of the two positive texts, that of the
        first and the negative one, that of the second and the negative one.
    references: R names of parts, such as "swap_att"; equal ones if there are no parts.
Returns: `{"accuracy": ..., "mean_accuracy_of_parts": ...}`, from 0 to 1. In the mean each part
    counts the same, whatever its number of rows.
"""
CITATION = """
@inproceedings{dumpala2024sugarcrepepp,
  title={SUGARCREPE++ Dataset: Vision-Language Model Sensitivity to Semantic and Lexical
    Alterations},
  author={Dumpala, Sri Harsha and Jaiswal, Aman and Sastry, Chandramouli and Milios, Evangelos and
    Oore, Sageev and Sajjad, Hassan},
  booktitle={Advances in Neural Information Processing Systems},
  year={2024}
}
"""


class HardNegatives(evaluate.Metric):
    """Mean of `eval.metrics.hard_negative_hits`, over rows and over parts."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation=CITATION,
            inputs_description=INPUTS,
            features=datasets.Features(
                {
                    "predictions": datasets.List(datasets.Value("float64"), length=3),
                    "references": datasets.Value("string"),
                }
            ),
        )

    def _compute(self, predictions: list[list[float]], references: list[str]) -> dict[str, float]:
        # At the top of the file, evaluate would answer a missing clone with "pip install eval".
        from eval.metrics import hard_negative_hits
        from eval.metrics.lists import check_rows
        from eval.parts import equal_parts

        check_rows(predictions)
        columns = torch.tensor(predictions, dtype=torch.float64).unbind(dim=1)  # three of (R,)
        hits = hard_negative_hits(*columns).double().numpy()
        parts = equal_parts(hits, references)
        return {"accuracy": float(hits.mean()), "mean_accuracy_of_parts": float(parts.mean())}
