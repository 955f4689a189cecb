"""Ask a clip a question: candidate answers, ranked by their similarity to the prediction.

Shapes: N visual tokens, C candidates, Dx vision width, D embedding size.
"""

import json
from functools import lru_cache
from html import escape
from pathlib import Path

import gradio as gr
import torch
from transformers import PreTrainedModel, ProcessorMixin

from .texts import TextEmbeds, read_lines
from .uploads import MAX_MEGABYTES, MAX_SECONDS, examine, read, sorry, uploads_only

EXAMPLES = Path(__file__).resolve().parent / "examples"
CLIPS_KEPT = 8  # visual tokens kept for further questions


class Asker:
    """Ranks answers to questions; the visual tokens of the last clips are kept for more of them.

    Args:
        model ([`VLJEPAModel`]), processor ([`VLJEPAProcessor`]): one pair.
    """

    def __init__(self, model: PreTrainedModel, processor: ProcessorMixin) -> None:
        self.model, self.processor = model, processor
        self.answers = tuple(model.config.to_dict().get("answers") or ())  # the model's own
        self._see = lru_cache(CLIPS_KEPT)(self._see)
        self.embeds = TextEmbeds(model, processor)

    def look(self, path: str | Path) -> torch.Tensor:
        """The visual tokens `(1, N, Dx)` of a video or image. Raises: `gr.Error`, see `examine`."""
        examine(path)
        return self._see(str(path), Path(path).stat().st_mtime_ns)

    @torch.inference_mode()
    def rank(
        self, path: str | None, question: str, candidates: str
    ) -> list[tuple[str, float, float]]:
        """Answers, best first, with their similarity and their share of the softmax over all.

        Args:
            path (`str`, *optional*): of a video or image.
            question (`str`)
            candidates (`str`): one answer per line; with none, the model's own list.

        Raises: `gr.Error` naming what is missing or cannot be used.
        """
        answers = read_lines(candidates)
        if not path:
            raise sorry("Choose a clip or an image first, or take one of the examples.")
        if not (question or "").strip():
            raise sorry("Type a question about the clip.")
        if not answers and not self.answers:
            raise sorry("Give the candidate answers, one per line: the model picks among them.")
        answers = answers or self.answers
        visual_embeds = self.look(path)  # (1, N, Dx)
        asked = self.processor(text=question.strip()).to(self.model.device)
        predicted = self.model.predict(visual_embeds=visual_embeds, **asked)  # (1, D)
        similarities = (predicted @ self.embeds.of(answers).T)[0].float()  # (C,)
        shares = (similarities * self.model.logit_scale()).softmax(0)  # (C,)
        ranked = zip(answers, similarities.tolist(), shares.tolist(), strict=True)
        return sorted(ranked, key=lambda answer: -answer[1])

    @torch.inference_mode()
    def _see(self, path: str, changed: int) -> torch.Tensor:
        pixels = read(self.processor, path)["pixel_values_videos"]  # (1, T, 3, h, w)
        return self.model.encode_video(pixels.to(self.model.device))  # (1, N, Dx)


def bars(ranked: list[tuple[str, float, str]]) -> str:
    """The first ten of ranked answers as HTML, each with its share, as the length of a bar, and a
    note."""
    rows = (
        f"<li><div><b>{escape(answer)}</b><span>{share:.1%}</span></div>"
        f'<div class="bar"><i style="width:{share:.1%}"></i></div>'
        f"<small>{escape(note)}</small></li>"
        for answer, share, note in ranked[:10]
    )
    return f'<ol class="answers">{"".join(rows)}</ol>'


def ask_tab(model: PreTrainedModel, processor: ProcessorMixin) -> None:
    """A clip, a question and candidate answers in; ranked answers out."""
    asker = Asker(model, processor)
    hint = "one per line"
    if asker.answers:
        hint += f"; with none, the model's own {len(asker.answers)} answers compete"

    def preview(path: str | None) -> tuple[dict, dict]:
        """Check an upload, read it for the questions to come, and show it."""
        kind = None
        if path:
            asker.look(path)
            kind = examine(path)
        return (
            gr.update(value=path if kind == "videos" else None, visible=kind == "videos"),
            gr.update(value=path if kind == "images" else None, visible=kind == "images"),
        )

    def answer(path: str | None, question: str, candidates: str) -> str:
        ranked = asker.rank(path, question, candidates)
        return bars([(text, share, f"similarity {near:.3f}") for text, near, share in ranked])

    with gr.Row():
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
        with gr.Column():
            question = gr.Textbox(
                label="Question", placeholder="What did the agent pick up?", elem_id="question"
            )
            candidates = gr.Textbox(
                label=f"Candidate answers, {hint}", lines=4, max_lines=10, elem_id="candidates"
            )
            button = gr.Button("Ask", variant="primary", elem_id="ask")
            answers = gr.HTML(elem_id="answers")
    rows = [json.loads(line) for line in (EXAMPLES / "examples.jsonl").open(encoding="utf-8")]
    gr.Examples(
        [[str(EXAMPLES / row["file"]), row["query"], "\n".join(row["candidates"])] for row in rows],
        [clip, question, candidates],
        example_labels=[row["query"] for row in rows],
        label="Examples",
        elem_id="examples",
    )
    # A file that fails is put away, and what was shown of the one before it.
    shown = clip.change(preview, clip, [video, image], show_progress="hidden")
    shown.failure(lambda: None, None, clip)
    clip.change(lambda: "", None, answers, show_progress="hidden")
    inputs = [clip, question, candidates]
    gr.on([button.click, question.submit], answer, inputs, answers, api_name="ask")
