"""F1 of words for the evaluate library: `evaluate.load("eval/metrics/token_f1")`."""

import datasets
import evaluate

DESCRIPTION = """
Harmonic mean of precision and recall of the words of a text and its reference, repetitions
counted, averaged over rows. Of several references the best counts. Case and punctuation do not
count; articles do, unlike in SQuAD.
"""
INPUTS = """
Args:
    predictions: R texts.
    references: R lists of reference texts.
Returns: `{"token_f1": ...}`, from 0 to 1.
"""
CITATION = """
@inproceedings{rajpurkar2016squad,
  title={SQuAD: 100,000+ Questions for Machine Comprehension of Text},
  author={Rajpurkar, Pranav and Zhang, Jian and Lopyrev, Konstantin and Liang, Percy},
  booktitle={Proceedings of EMNLP},
  year={2016}
}
"""


class TokenF1(evaluate.Metric):
    """Mean of `eval.metrics.token_f1`."""

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

    def _compute(self, predictions: list[str], references: list[list[str]]) -> dict[str, float]:
        # At the top of the file, evaluate would answer a missing clone with "pip install eval".
        from eval.metrics import token_f1
        from eval.metrics.lists import check_references

        check_references(references)
        scores = [
            max(token_f1(text, reference) for reference in texts)
            for text, texts in zip(predictions, references, strict=True)
        ]
        return {"token_f1": sum(scores) / len(scores)}
