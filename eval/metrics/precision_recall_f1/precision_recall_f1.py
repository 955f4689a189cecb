"""F1 of yes-or-no answers for evaluate: `evaluate.load("eval/metrics/precision_recall_f1")`."""

import datasets
import evaluate

DESCRIPTION = """
Precision, recall and F1 of the positive answer, as POPE reports them for "yes", and the accuracy of
both answers. A ratio of 0 to 0 is 0.
"""
INPUTS = """
Args:
    predictions: R answers, `True` for the positive one.
    references: R true answers.
Returns: `{"precision": ..., "recall": ..., "f1": ..., "accuracy": ...}`, from 0 to 1.
"""
CITATION = """
@inproceedings{li2023pope,
  title={Evaluating Object Hallucination in Large Vision-Language Models},
  author={Li, Yifan and Du, Yifan and Zhou, Kun and Wang, Jinpeng and Zhao, Wayne Xin and
    Wen, Ji-Rong},
  booktitle={Proceedings of EMNLP},
  year={2023}
}
"""


class PrecisionRecallF1(evaluate.Metric):
    """Wrapper of `eval.metrics.precision_recall_f1`."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation=CITATION,
            inputs_description=INPUTS,
            # Not of booleans: that feature reads every text as true, "no" as well.
            features=datasets.Features(
                {"predictions": datasets.Value("int8"), "references": datasets.Value("int8")}
            ),
        )

    def _compute(self, predictions: list[int], references: list[int]) -> dict[str, float]:
        # At the top of the file, evaluate would answer a missing clone with "pip install eval".
        from eval.metrics import precision_recall_f1
        from eval.metrics.lists import check_rows

        check_rows(predictions)
        if strange := {*predictions, *references} - {0, 1}:
            raise ValueError(
                f"an answer is {min(strange)}; give True for the positive one, or False."
            )
        precision, recall, f1 = precision_recall_f1(predictions, references)
        right = sum(map(int.__eq__, predictions, references))
        return {
            "precision": precision,
            "recall": recall,
            "f1": f1,
            "accuracy": right / len(predictions),
        }
