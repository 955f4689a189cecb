"""Examples for the model card: one clip that is published with the model, and a picture of six."""

import textwrap
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from eval.results import evenly_spaced, portable
from modeling_vljepa import VLJEPAForConditionalGeneration, VLJEPAModel
from modeling_vljepa.pipelines.pipeline_vljepa import (
    VLJEPARetrievalPipeline,
    VLJEPAVisualQuestionAnsweringPipeline,
)
from processing import Excerpt, VLJEPAProcessor, read_clip, read_image, read_rows
from processing.rows import media_of
from training.arguments import RecipeError

MAX_BYTES = 1_000_000  # of the published clip: a reader downloads it to try the model
CANDIDATES = 5
ROWS = 6  # in the picture
FRAMES = 4  # of each clip in the picture
PICTURE = "examples.png"
COLOURS = {True: "#16a34a", False: "#94a3b8"}  # of the true answer's bar, and of the others'


@dataclass(frozen=True)
class Answered:
    """A row with the model's answers.

    Attributes:
        row (`dict`): as `read_rows` returns it.
        query (`str`): the row's question, or the model's retrieval prompt if it has none.
        candidates (`list[str]`): the answers to choose from, in alphabetical order.
        answers (`list[tuple[str, float]]`): the candidates with their cosines, best first.
    """

    row: dict
    query: str
    candidates: list[str]
    answers: list[tuple[str, float]]

    @property
    def kind(self) -> str:
        """The kind of the clip, "video" or "image"."""
        return "video" if "video" in self.row else "image"

    @property
    def asks(self) -> bool:
        """True if the row has a question; otherwise its texts are ranked as captions."""
        return bool(self.row["query"])

    @property
    def truth(self) -> str:
        """The row's own answer."""
        return self.row["target"]


@dataclass(frozen=True)
class Examples:
    """The examples of a model card.

    Attributes:
        rows_file (`str`): the file of the rows, without the folders of an absolute path.
        first (`Answered`): the row whose clip is published.
        shown (`list[Answered]`): the rows of the picture.
    """

    rows_file: str
    first: Answered
    shown: list[Answered]

    @property
    def file(self) -> str:
        """The name of the published clip, such as "example.mp4"."""
        return f"example{Path(media_of(self.first.row)).suffix.lower()}"


def read_examples(path: str) -> list[dict]:
    """Return the rows of a JSONL file.

    Raises:
        RecipeError: the file cannot be read, or has no usable row.
    """
    try:
        rows, bad = read_rows(path)
    except (OSError, ValueError) as error:
        raise RecipeError(f"--example: cannot read {path}: {error}") from error
    if not rows:
        raise RecipeError(f"--example: {path} has no usable row: {bad[0]}")
    return rows


def is_publishable(row: dict) -> bool:
    """Return True if the row's clip is a whole file of at most `MAX_BYTES`."""
    media = media_of(row)
    if isinstance(media, Excerpt) or not Path(media).is_file():  # a folder of frames
        return False
    return Path(media).stat().st_size <= MAX_BYTES


def example_row(rows: list[dict], path: str) -> dict:
    """Return the row to publish: the first with a small clip, if possible a question on a video.

    Raises:
        RecipeError: no clip is small enough.
    """
    small = [row for row in rows if is_publishable(row)]
    if not small:
        raise RecipeError(
            f"--example: no row of {path} has a clip that is a whole file of at most "
            f"{MAX_BYTES:,} bytes; give rows with a smaller clip."
        )
    return min(small, key=lambda row: (not row["query"], "video" not in row))


def candidates_of(row: dict, rows: list[dict]) -> list[str]:
    """Return the row's own `candidates`, or its target and up to four others, sorted.

    The others are targets of rows with the same query, evenly spaced in alphabetical order. A query
    with one target only gets targets of all rows.

    Raises:
        RecipeError: the row's candidates are not distinct texts that contain its target.
    """
    if (given := row.get("candidates")) is not None:
        texts = isinstance(given, list) and all(isinstance(each, str) for each in given)
        if not texts or row["target"] not in given or len(set(given)) != len(given):
            raise RecipeError(
                f"--example: line {row['line']}: candidates must be different texts, one of them "
                f"the target {row['target']!r}; they are {given}."
            )
        return sorted(given)
    others = {each["target"] for each in rows if each["query"] == row["query"]}
    if len(others) < 2:
        others = {each["target"] for each in rows}
    names = sorted(others - {row["target"]})
    chosen = evenly_spaced(list(range(len(names))), CANDIDATES - 1)
    return sorted([row["target"], *(names[index] for index in chosen)])


def answer(
    model: VLJEPAModel | VLJEPAForConditionalGeneration,
    processor: VLJEPAProcessor,
    row: dict,
    rows: list[dict],
) -> Answered:
    """Rank the candidates of one row with the published model's own pipelines.

    Raises:
        RecipeError: the clip cannot be decoded.
    """
    candidates, media = candidates_of(row, rows), media_of(row)
    parts = {"model": model, "processor": processor}
    try:
        if isinstance(media, Excerpt):
            num_frames = processor.video_processor.num_frames
            media = read_clip(media.video, num_frames, start=media.start, end=media.end).frames
        medium = {"video" if "video" in row else "image": media}
        if row["query"]:
            ask = VLJEPAVisualQuestionAnsweringPipeline(**parts)
            found = ask(**medium, question=row["query"], candidates=candidates)
            answers = [(each["answer"], each["score"]) for each in found]
        else:
            found = VLJEPARetrievalPipeline(**parts)(**medium, texts=candidates)
            answers = [(each["text"], each["score"]) for each in found]
    except ValueError as error:
        raise RecipeError(f"--example: line {row['line']}: {error}") from error
    return Answered(row, row["query"] or model.config.prompts["retrieval"], candidates, answers)


def answer_examples(
    model: VLJEPAModel | VLJEPAForConditionalGeneration, processor: VLJEPAProcessor, path: str
) -> Examples:
    """Answer the row to publish, and `ROWS` rows that are evenly spaced in the file.

    Raises:
        RecipeError: see `read_examples`, `example_row` and `answer`.
    """
    rows = read_examples(path)
    indices = evenly_spaced(list(range(len(rows))), ROWS)
    return Examples(
        rows_file=portable(Path(path)),
        first=answer(model, processor, example_row(rows, path), rows),
        shown=[answer(model, processor, rows[index], rows) for index in indices],
    )


def frames_of(row: dict) -> np.ndarray:
    """Return frames of a row's clip side by side, or its image: uint8 `(H, W, 3)`."""
    media = media_of(row)
    if isinstance(media, Excerpt):
        frames = read_clip(media.video, FRAMES, start=media.start, end=media.end).frames
    elif "video" in row:
        frames = read_clip(media, FRAMES).frames
    else:
        frames = read_image(media)
    return np.concatenate(list(frames), axis=1)


def picture(answered: list[Answered]) -> Figure:
    """Draw each row: frames, question, and a bar for the cosine of each answer.

    The true answer's bar is green.
    """
    figure = Figure(figsize=(9, 1.7 * len(answered)), layout="constrained")
    grid = figure.subplots(len(answered), 2, width_ratios=(3, 2), squeeze=False)
    scores = [score for each in answered for _, score in each.answers]
    low, high = min(0.0, *scores), max(0.0, *scores)
    for (left, right), each in zip(grid, answered, strict=True):
        left.imshow(frames_of(each.row), interpolation="nearest")
        left.axis("off")
        title = textwrap.shorten(each.query, 80, placeholder="...") or "(no question)"
        if "accuracy" in each.row:  # of space/make_examples.py
            title += f"\n{each.row['accuracy']:.0%} of such test questions are answered right"
        left.set_title(title, fontsize=9, loc="left", parse_math=False)
        answers, values = zip(*each.answers, strict=True)
        colours = [COLOURS[answer == each.truth] for answer in answers]
        names = [textwrap.shorten(answer, 50, placeholder="...") for answer in answers]
        right.barh(range(len(names)), values, 0.7, color=colours)
        right.set_yticks(range(len(names)), names, fontsize=8, parse_math=False)
        # The best on top, bars of one height in all rows
        right.set_ylim(max(CANDIDATES, len(names)) - 0.5, -0.5)
        right.set_xlim(low, high)
        right.tick_params(axis="x", labelsize=7)
        right.spines[["top", "right"]].set_visible(False)
    grid[-1, 1].set_xlabel("cosine", fontsize=8)
    return figure


__all__ = ["PICTURE", "Answered", "Examples", "answer_examples", "picture"]
