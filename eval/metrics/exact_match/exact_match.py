"""Exact match of words for the evaluate library: `evaluate.load("eval/metrics/exact_match")`."""

import datasets
import evaluate

DESCRIPTION = """
Share of texts with the same words in the same order as one of their references. Case and
punctuation do not count; articles do, unlike in SQuAD.
"""
INPUTS = """
Args:
    predictions: R texts.
    references: R lists of reference texts.
Returns: `{"exact_match": ...}`, from 0 to 1.
"""
CITATION = """
@inproceedings{rajpurkar2016squad,
  title={SQuAD: 100,000+ Questions for Machine Comprehension of Text},
  author={Rajpurkar, Pranav and Zhang, Jian and Lopyrev, Konstantin and Liang, Percy},
  booktitle={Proceedings of EMNLP},
  year={2016}
}
"""


class ExactMatch(evaluate.Metric):
    """Mean of `eval.metrics.exact_match`."""

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
        from eval.metrics import exact_match
        from eval.metrics.lists import check_references

        check_references(references)
        scores = [
            any(exact_match(text, reference) for reference in texts)
            for text, texts in zip(predictions, references, strict=True)
        ]
        return {"exact_match": sum(scores) / len(scores)}
