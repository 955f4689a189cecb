"""The Ask tab: rank candidate answers by their similarity to the predicted embedding.

Shapes: N visual tokens, C candidates, Dx vision width, D embedding size.
"""

import json
from functools import lru_cache
from html import escape
from pathlib import Path

import gradio as gr
import torch
from transformers import PreTrainedModel, ProcessorMixin

from .texts import TextEmbedder, read_lines
from .uploads import MAX_MEGABYTES, MAX_SECONDS, examine, read, uploads_only, user_error

EXAMPLES = Path(__file__).resolve().parent / "examples"
CACHED_CLIPS = 8  # clips whose visual tokens stay in memory for further questions
SHOWN = 10  # answers


class Asker:
    """Ranks answers to questions; the visual tokens of the last clips are cached.

    Args:
        model ([`VLJEPAModel`]), processor ([`VLJEPAProcessor`]): one pair.
    """

    def __init__(self, model: PreTrainedModel, processor: ProcessorMixin) -> None:
        self.model, self.processor = model, processor
        self.answers = tuple(model.config.answers)  # ranked if the user gives no candidates
        self._encode = lru_cache(CACHED_CLIPS)(self._encode)
        self.embedder = TextEmbedder(model, processor)

    def encode(self, path: str | Path) -> torch.Tensor:
        """Return the visual tokens `(1, N, Dx)` of a video or image.

        Raises: `gr.Error`, see `examine`.
        """
        examine(path)
        return self._encode(str(path), Path(path).stat().st_mtime_ns)

    @torch.inference_mode()
    def rank(
        self, path: str | None, question: str, candidates: str
    ) -> list[tuple[str, float, float]]:
        """Return the answers, best first, with their similarity and their share of the softmax.

        Args:
            path (`str`, *optional*): path of a video or image.
            question (`str`)
            candidates (`str`): one answer per line; if empty, the model's own list is ranked.

        Raises: `gr.Error` that names the missing or unusable input.
        """
        answers = read_lines(candidates)
        if not path:
            raise user_error("Upload a clip or an image first, or choose an example.")
        if not (question or "").strip():
            raise user_error("Type a question about the clip.")
        answers = answers or self.answers
        if not answers:
            raise user_error("Give candidate answers, one per line: the model ranks them.")
        visual_embeds = self.encode(path)  # (1, N, Dx)
        query = self.model.config.prompts["question"].replace("{}", question.strip())
        tokens = self.processor(text=query).to(self.model.device)
        predicted = self.model.predict(visual_embeds=visual_embeds, **tokens)  # (1, D)
        similarities = (predicted @ self.embedder.embed(answers).T)[0].float()  # (C,)
        shares = (similarities * self.model.logit_scale()).softmax(0)  # (C,)
        ranked = zip(answers, similarities.tolist(), shares.tolist(), strict=True)
        return sorted(ranked, key=lambda answer: -answer[1])

    @torch.inference_mode()
    def _encode(self, path: str, modified: int) -> torch.Tensor:
        """Encode a file; `modified`, its mtime in ns, is part of the cache's key."""
        pixels = read(self.processor, path)["pixel_values_videos"]  # (1, T, 3, h, w)
        return self.model.encode_video(pixels.to(self.model.device))  # (1, N, Dx)


LEGEND = (
    "The bar is an answer's share among the candidates, a softmax of the similarities. Similarity "
    "is a cosine, from −1 to 1."
)


def bars(ranked: list[tuple[str, float, str]], truth: str | None = None, below: str = "") -> str:
    """Return the first `SHOWN` answers as HTML: text, share as the length of a bar, and a note.

    Args:
        truth (`str`, *optional*): the true answer, if it is known. It is marked, or follows.
        below (`str`): a sentence after the answers.
    """
    shown, mark = ranked[:SHOWN], '<em class="right">✓ true answer</em>'
    rows = (
        f"<li><div><b>{escape(answer)}</b><span>{share:.1%}</span></div>"
        f'<div class="bar"><i style="width:{share:.1%}"></i></div>'
        f"<small>{escape(note)}{mark if answer == truth else ''}</small></li>"
        for answer, share, note in shown
    )
    other = truth is not None and all(answer != truth for answer, *_ in shown)
    return (
        f'<ol class="answers">{"".join(rows)}</ol>'
        + (f'<p class="legend">The true answer is: {escape(truth)}</p>' if other else "")
        + (f'<p class="legend">{escape(below)}</p>' if below else "")
        + f'<p class="legend">{LEGEND}</p>'
    )


def tested(example: dict) -> str:
    """Return a sentence about the test questions of an example's type."""
    return (
        f"The clip was chosen because {example['models']} models of the demonstration answer it "
        f"right. They answer {example['accuracy']:.0%} of the test questions of its type "
        f"({example['question_type']}) right, among all answers of training."
    )


def clip_column() -> tuple[gr.File, gr.Video, gr.Image]:
    """Lay out the upload and its preview, of which one is visible at a time."""
    with gr.Column():
        clip = gr.File(
            label=f"Clip or image (≤ {MAX_MEGABYTES} MB, {MAX_SECONDS} s)",
            file_types=["video", "image"],
            height=180,
            elem_id="clip",
        )
        uploads_only(clip)
        video = gr.Video(
            show_label=False, interactive=False, visible=False, autoplay=True, loop=True,
            height=260, buttons=[], elem_id="video",
        )  # fmt: skip
        image = gr.Image(
            show_label=False, interactive=False, visible=False, height=260, buttons=[],
            elem_id="image",
        )  # fmt: skip
    return clip, video, image


def question_column(own_answers: int) -> tuple[gr.Textbox, gr.Textbox, gr.Button, gr.HTML]:
    """Lay out the question, the candidates, the button and the answers."""
    hint = "one per line"
    if own_answers:
        hint += f"; if empty, the model's own {own_answers} answers are ranked"
    with gr.Column():
        question = gr.Textbox(
            label="Question", placeholder="What did the agent pick up?", elem_id="question"
        )
        candidates = gr.Textbox(
            label=f"Candidate answers, {hint}", lines=4, max_lines=10, elem_id="candidates"
        )
        button = gr.Button("Ask", variant="primary", elem_id="ask")
        answers = gr.HTML(elem_id="answers")
    return question, candidates, button, answers


def ask_tab(model: PreTrainedModel, processor: ProcessorMixin) -> None:
    """Build the tab: a clip, a question and candidate answers in, ranked answers out."""
    asker = Asker(model, processor)
    with gr.Row():
        clip, video, image = clip_column()
        question, candidates, button, answers = question_column(len(asker.answers))
    rows = [json.loads(line) for line in (EXAMPLES / "examples.jsonl").open(encoding="utf-8")]
    # An upload has a folder of its own, so only an example has the path of an example.
    paths = [str(EXAMPLES / (row.get("video") or row["image"])) for row in rows]
    known = {(path, row["query"]): row for path, row in zip(paths, rows, strict=True)}
    gr.Examples(
        [
            [path, row["query"], "\n".join(row["candidates"])]
            for path, row in zip(paths, rows, strict=True)
        ],
        [clip, question, candidates],
        example_labels=[row["query"] for row in rows],
        label="Examples",
        elem_id="examples",
    )

    def preview(path: str | None) -> tuple[dict, dict]:
        """Check an upload, encode it for the questions to come, and show it."""
        kind = None
        if path:
            asker.encode(path)
            kind = examine(path)
        return (
            gr.update(value=path if kind == "videos" else None, visible=kind == "videos"),
            gr.update(value=path if kind == "images" else None, visible=kind == "images"),
        )

    def answer(path: str | None, question: str, candidates: str) -> str:
        ranked = asker.rank(path, question, candidates)
        notes = [(text, share, f"similarity {near:.3f}") for text, near, share in ranked]
        example = known.get((path, question.strip()))
        return bars(notes, example["target"], tested(example)) if example else bars(notes)

    # A refused file is removed; that is a change as well, so the old preview is cleared.
    shown = clip.change(preview, clip, [video, image], show_progress="hidden")
    shown.failure(lambda: None, None, clip)
    clip.change(lambda: "", None, answers, show_progress="hidden")
    inputs = [clip, question, candidates]
    gr.on([button.click, question.submit], answer, inputs, answers, api_name="ask")
