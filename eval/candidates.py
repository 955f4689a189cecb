"""Candidate texts, such as class labels and answers: where they come from, and their embeddings.

A template is a text with `{}`, once, in the position of the label: "a video of {}." With several
templates a label has several texts. Its embedding is their mean on the sphere: the unit vector of
the sum of their unit vectors (prompt ensembling; Radford et al., 2021).

Each text is encoded once: `target_embeds` caches 20,000 texts of a model by their tokens, more than
any benchmark of the paper has candidates. 80 templates for 1,000 labels exceed it. Then an
[`EmbeddingStore`] saves a second benchmark with these labels from encoding them again.

Shapes: R rows, C candidates, D embedding size.
"""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from eval.embed import Predictions
from eval.metrics import cosines
from eval.sources import Source
from eval.task import Benchmark, Task, texts_sha256, usable_rows

NAMED = 20  # names in a message


@dataclass(frozen=True, kw_only=True)
class CandidatesBenchmark(Benchmark):
    """A benchmark whose rows choose among texts.

    Attributes:
        candidates (`list[str]`, *optional*): the texts to choose from.
        candidates_file (`Path`, *optional*): a file with them in place of the list; see
            [`read_candidates`].
        candidates_source (`Source`, *optional*): published annotations in place of the list; their
            distinct targets are the texts. Unlike those of the rows, they do not depend on which
            videos are there: fewer candidates are easier.
        templates (`list[str]`, *optional*): the texts that are embedded for a candidate, with `{}`
            once. A name of `config.target_prompts`, such as `image`, means the model's own.
    """

    candidates: list | None = None
    candidates_file: Path | None = None
    candidates_source: Source | None = None
    templates: list | None = None

    def __post_init__(self) -> None:
        keys = ("candidates", "candidates_file", "candidates_source")
        given = [key for key in keys if getattr(self, key) is not None]
        if len(given) > 1:
            raise ValueError(f"{self.name}: {' and '.join(given)} exclude each other")
        if self.candidates is not None:
            check_texts(f"{self.name}: candidates", self.candidates)
        if self.templates is not None:
            check_texts(f"{self.name}: templates", self.templates)

    def given_candidates(self) -> list[str] | None:
        """Return the texts that the entry gives; `None` if it gives none.

        Raises: `ValueError`, see [`read_candidates`].
        """
        if self.candidates_file is not None:
            return read_candidates(self.candidates_file)
        if self.candidates_source is not None:
            rows, _ = usable_rows(self.candidates_source)
            return sorted({row["target"] for row in rows})
        return self.candidates


def named(texts: list[str]) -> str:
    """Return the texts in one line, at most `NAMED` of them."""
    rest = f" and {len(texts) - NAMED} more" if len(texts) > NAMED else ""
    return ", ".join(texts[:NAMED]) + rest


def check_texts(name: str, texts: list) -> None:
    """Raise `ValueError` if a list is empty, or an element is empty, repeated or of another type.

    A repeated candidate would tie with itself, which counts as wrong.
    """
    if not texts:
        raise ValueError(f"{name} is empty: give texts or leave it out")
    for text in texts:
        if not isinstance(text, str):
            raise ValueError(f"{name} holds {text!r}, which is not a text: put it in quotes")
        if not text.strip():
            raise ValueError(f"{name} holds an empty text")
    if repeated := [text for text, count in Counter(texts).items() if count > 1]:
        raise ValueError(f"{name} holds a text twice: {named(repeated)}")


def read_candidates(path: Path) -> list[str]:
    """Read candidate texts from a UTF-8 file, in its order.

    A `.json` file holds a list of texts, or an object whose keys are the texts, as Something-
    Something V2's `labels.json`. Any other file holds one text per line.

    Raises: `ValueError` for a file of another form, and for what [`check_texts`] refuses.
    """
    is_json = path.suffix.lower() == ".json"
    try:
        content = path.read_text(encoding="utf-8-sig")
        texts = json.loads(content) if is_json else content.splitlines()
    except ValueError as error:
        raise ValueError(f"{path}: not a UTF-8 file of candidates: {error}") from error
    if not isinstance(texts, list | dict):
        raise ValueError(f"{path}: must hold a list of texts, found {type(texts).__name__}")
    texts = [text.strip() if isinstance(text, str) else text for text in texts]
    texts = texts if is_json else [text for text in texts if text]
    check_texts(str(path), texts)
    return texts


def templates_of(task: Task, default: str) -> list[str]:
    """Return the templates of a benchmark: its own, or `default`.

    Raises: `ValueError` for a template that does not contain `{}` once.
    """
    benchmark, prompts = task.benchmark, task.model.config.target_prompts
    templates = [prompts.get(text, text) for text in benchmark.templates or [default]]
    for template in templates:
        if template.count("{}") != 1:
            raise ValueError(
                f"{benchmark.name}: templates holds {template!r}: write {{}} once, in the position "
                f"of the candidate, or a name of {', '.join(prompts)}"
            )
    return templates


def embed_candidates(task: Task, candidates: list[str], templates: list[str]) -> torch.Tensor:
    """Return unit vectors `(C, D)`; with several templates, means on the sphere.

    Raises: `ValueError` for a mean of length 0.
    """
    total = torch.zeros(())
    for template in templates:
        # Not `str.format`: a template may hold other braces.
        texts = [template.replace("{}", candidate) for candidate in candidates]
        total = total + task.embed_texts(texts)
    if len(templates) == 1:
        return total
    lengths = total.norm(dim=-1)
    if (lengths < 1e-6).any():
        text = candidates[int(lengths.argmin())]
        raise ValueError(f"{task.benchmark.name}: the templates of {text!r} cancel each other out")
    return F.normalize(total, dim=-1)


def compare(
    task: Task, rows: list[dict], candidates: list[str], templates: list[str]
) -> tuple[Predictions, torch.Tensor]:
    """Return the rows whose clip was read, and the similarity `(R, C)` of each to each candidate.

    It is the cosine of the embeddings. Of a model that predicts tokens, it is the log-likelihood
    of the candidate, with several templates the mean of theirs.
    """
    if task.scoring is None:
        predictions = task.predict(rows)
        embeds = embed_candidates(task, candidates, templates)
        return predictions, cosines(predictions.embeds, embeds)
    texts = [
        template.replace("{}", candidate) for template in templates for candidate in candidates
    ]
    predictions, scores = task.likelihoods(rows, texts)
    return predictions, scores.unflatten(1, (len(templates), -1)).mean(dim=1)


def candidate_facts(
    task: Task, candidates: list[str], templates: list[str]
) -> dict[str, str | int]:
    """Return the facts about candidates and their scores for the protocol."""
    facts: dict[str, str | int] = {
        "candidates": len(candidates),
        "candidates_sha256": texts_sha256(candidates),
    }
    if task.scoring is not None:
        facts["likelihood"] = task.scoring
        reason = "the default, the paper's" if task.likelihood is None else "--likelihood"
        facts["likelihood_from"] = task.likelihood_from or reason
    if len(templates) == 1:
        return facts | {"template": templates[0]}
    return facts | {"templates": len(templates), "templates_sha256": texts_sha256(templates)}


def chosen(
    similarity: torch.Tensor, relevant: torch.Tensor, ranks: torch.Tensor, candidates: list[str]
) -> list[str]:
    """Return the candidate that each row chooses, in agreement with its rank.

    A tie is decided against the model: among the nearest candidates it chooses the first wrong one.

    Args:
        similarity (`torch.FloatTensor` of shape `(R, C)`)
        relevant (`torch.BoolTensor` of shape `(R, C)`)
        ranks (`torch.LongTensor` of shape `(R,)`): see [`first_relevant_ranks`].
    """
    tied = relevant & (ranks > 1).unsqueeze(1)
    best = similarity.masked_fill(tied, -torch.inf).argmax(dim=1)  # the first of equal ones
    return [candidates[index] for index in best.tolist()]


__all__ = [
    "CandidatesBenchmark",
    "candidate_facts",
    "check_texts",
    "chosen",
    "compare",
    "embed_candidates",
    "named",
    "read_candidates",
    "templates_of",
]
