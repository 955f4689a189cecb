"""CIDEr-D for the evaluate library: `evaluate.load("eval/metrics/cider")`."""

import datasets
import evaluate

DESCRIPTION = """
CIDEr-D of captions with their references: the mean over rows, from 0 to 10 (tables often show it
times 100). N-grams of 1 to 4 words are compared by cosine. An n-gram weighs less the more rows have
it in their references, so a score depends on the other rows, and a single row scores 0. The scores
equal those of pycocoevalcap for plain English, without Java.
"""
INPUTS = """
Args:
    predictions: R captions.
    references: R lists of reference captions.
Returns: `{"cider": ...}`, and with `per_row=True` also `"per_row"`, a list of R scores.
"""
CITATION = """
@inproceedings{vedantam2015cider,
  title={CIDEr: Consensus-based Image Description Evaluation},
  author={Vedantam, Ramakrishna and Zitnick, C. Lawrence and Parikh, Devi},
  booktitle={Proceedings of the IEEE Conference on Computer Vision and Pattern Recognition},
  year={2015}
}
"""


class Cider(evaluate.Metric):
    """Mean of `eval.metrics.cider`."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation=CITATION,
            inputs_description=INPUTS,
            features=datasets.Features(
                {
                    "predictions": datasets.Value("string"),
                    "references": datasets.List(datasets.Value("string")),
                }
            ),
        )

    def _compute(
        self,
        predictions: list[str],
        references: list[list[str]],
        per_row: bool = False,
    ) -> dict[str, float | list[float]]:
        # At the top of the file, evaluate would answer a missing clone with "pip install eval".
        from eval.metrics import cider
        from eval.metrics.lists import check_references

        check_references(references)
        scores = cider(predictions, references)  # (R,)
        rows = {"per_row": scores.tolist()} if per_row else {}
        return {"cider": scores.mean().item(), **rows}
