"""Ask a clip a question, and search a library of clips by text: `python app.py --model MODEL`.

One model folder or Hub id answers both, through `AutoModel`, `AutoProcessor` and their methods
alone, so that this file runs as a Space without the repository that it comes from. Each tab is one
function; another one joins in `build`.

Shapes: N visual tokens, C candidates, F files of a library, D embedding size.
"""

import argparse
import json
import os
from dataclasses import dataclass
from functools import lru_cache
from html import escape
from pathlib import Path
from tempfile import mkdtemp

import av
import gradio as gr
import torch
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm
from transformers import AutoModel, AutoProcessor, PreTrainedModel, ProcessorMixin

EXAMPLES = Path(__file__).resolve().parent / "examples"
CAPTION = "Describe this video in detail."  # the query under which a library is embedded

# What an upload may cost. All of it is known before a frame is decoded.
MAX_MEGABYTES = 50
MAX_SECONDS = 120
MAX_FRAMES = 60 * MAX_SECONDS
MAX_VIDEO_PIXELS = 4096 * 2304  # of one frame
MAX_IMAGE_PIXELS = 50_000_000
MAX_ANSWERS = 200

# FFmpeg also opens playlists, which name other files and addresses, and plays text as terminal art.
IMAGE_FORMATS = ("BMP", "JPEG", "PNG", "WEBP")
VIDEO_FORMATS = "mov,matroska,avi,gif,mpegts,ogg"

CLIPS_KEPT = 8  # visual tokens kept for further questions
ANSWER_LISTS_KEPT = 32
SHOWN = 6  # of a library


# What is read.


def examine(path: str | Path) -> str:
    """Which argument of the processor a file is, `"images"` or `"videos"`, decoding nothing.

    Raises: `gr.Error` for a file that is none of them, or above a bound.
    """
    path = Path(path)
    name = escape(path.name)
    megabytes = path.stat().st_size / 1e6
    if megabytes > MAX_MEGABYTES:
        raise sorry(
            f"{name} has {megabytes:.0f} MB, and this app takes up to {MAX_MEGABYTES}. "
            "Cut it, or save it smaller."
        )
    try:
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            check_pixels(name, image.size, MAX_IMAGE_PIXELS)
        return "images"
    except UnidentifiedImageError:
        pass  # then it has to be a video
    except (OSError, Image.DecompressionBombError) as error:
        raise unreadable(name) from error
    try:
        with av.open(path, options={"format_whitelist": VIDEO_FORMATS}) as container:
            if not container.streams.video:
                raise unreadable(name)
            stream = container.streams.video[0]
            check_pixels(name, (stream.width, stream.height), MAX_VIDEO_PIXELS)
            frames, seconds = measure(container)
    except av.FFmpegError as error:
        raise unreadable(name) from error
    if seconds > MAX_SECONDS:
        raise sorry(
            f"{name} lasts {seconds:.0f} seconds, and this app takes up to {MAX_SECONDS}. "
            "Cut out the part that you want to ask about."
        )
    if frames > MAX_FRAMES:
        raise sorry(
            f"{name} has {frames} frames, and this app takes up to {MAX_FRAMES}. "
            "Save it with fewer frames per second."
        )
    return "videos"


def measure(container: "av.container.InputContainer") -> tuple[int, float]:
    """Frames and seconds by the packets that are there: a header may be absent or wrong."""
    stream = container.streams.video[0]
    frames, first, last = 0, float("inf"), float("-inf")
    for packet in container.demux(stream):
        if packet.size:
            frames += 1
            time = packet.dts if packet.pts is None else packet.pts
            first, last = min(first, time or 0), max(last, (time or 0) + (packet.duration or 0))
    return frames, float((last - first) * stream.time_base) if frames else 0.0


def check_pixels(name: str, size: tuple[int, int], limit: int) -> None:
    """Refuse pictures of more pixels than `limit`."""
    if size[0] * size[1] > limit:
        raise sorry(
            f"{name} is {size[0]} x {size[1]} pixels large, and this app takes up to "
            f"{limit / 1e6:.0f} million pixels. Save it smaller."
        )


def sorry(sentence: str) -> gr.Error:
    """An error for people: shown in the browser, and not logged as a fault of the app."""
    return gr.Error(sentence, print_exception=False)


def unreadable(name: str) -> gr.Error:
    return sorry(
        f"{name} cannot be read: it is no video or image, or it is damaged. "
        "Save it again, for example as MP4 or PNG, and upload that."
    )


# What is answered.


class Asker:
    """Ranks answers to questions; the visual tokens of the last clips are kept for more of them.

    Args:
        model ([`VLJEPAModel`]), processor ([`VLJEPAProcessor`]): one pair.
    """

    def __init__(self, model: PreTrainedModel, processor: ProcessorMixin) -> None:
        self.model, self.processor = model, processor
        self.answers = tuple(model.config.to_dict().get("answers") or ())  # the model's own
        self._see = lru_cache(CLIPS_KEPT)(self._see)
        self._embed = lru_cache(ANSWER_LISTS_KEPT)(self._embed)

    def look(self, path: str | Path) -> torch.Tensor:
        """The visual tokens `(1, N, Dx)` of a video or image. Raises: `gr.Error`, see `examine`."""
        if not Path(path).is_file():
            raise sorry("This file is gone: uploads are kept for an hour. Upload it again.")
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
        lines = (line.strip() for line in (candidates or "").splitlines())
        answers = tuple(dict.fromkeys(line for line in lines if line))
        if not path:
            raise sorry("Choose a clip or an image first, or take one of the examples.")
        if not (question or "").strip():
            raise sorry("Type a question about the clip.")
        if len(answers) > MAX_ANSWERS:
            raise sorry(f"Give up to {MAX_ANSWERS} candidate answers; these are {len(answers)}.")
        if not answers and not self.answers:
            raise sorry("Give the candidate answers, one per line: the model picks among them.")
        answers = answers or self.answers
        visual_embeds = self.look(path)  # (1, N, Dx)
        asked = self.processor(text=question.strip()).to(self.model.device)
        predicted = self.model.predict(visual_embeds=visual_embeds, **asked)  # (1, D)
        similarities = (predicted @ self._embed(answers).T)[0].float()  # (C,)
        shares = (similarities * self.model.logit_scale()).softmax(0)  # (C,)
        ranked = zip(answers, similarities.tolist(), shares.tolist(), strict=True)
        return sorted(ranked, key=lambda answer: -answer[1])

    @torch.inference_mode()
    def _see(self, path: str, changed: int) -> torch.Tensor:
        pixels = read(self.processor, path)["pixel_values_videos"]  # (1, T, 3, h, w)
        return self.model.encode_video(pixels.to(self.model.device))  # (1, N, Dx)

    @torch.inference_mode()
    def _embed(self, answers: tuple[str, ...]) -> torch.Tensor:
        """`(C, D)`, a hundred at a time."""
        parts = [answers[start : start + 100] for start in range(0, len(answers), 100)]
        batches = [self.processor(targets=part).to(self.model.device) for part in parts]
        return torch.cat([self.model.encode_target(**batch) for batch in batches])


def read(processor: ProcessorMixin, path: str | Path, **texts: str) -> dict:
    """The processor's batch of one file. Raises: `gr.Error`, also for damage inside of it."""
    kind = examine(path)
    try:
        return processor(**{kind: str(path)}, **texts)
    except ValueError as error:  # the processor's MediaError is one
        raise unreadable(escape(Path(path).name)) from error


@dataclass(frozen=True)
class Library:
    """A folder of clips and what the model predicts for each.

    Attributes:
        folder (`Path`): all that may be shown.
        paths (`list[Path]`): F files of it.
        embeds (`torch.Tensor` of shape `(F, D)`): Ŝ_Y under the query `CAPTION`, unit vectors.
    """

    folder: Path
    paths: list[Path]
    embeds: torch.Tensor

    @classmethod
    @torch.inference_mode()
    def of(
        cls,
        model: PreTrainedModel,
        processor: ProcessorMixin,
        folder: str | Path,
        limit: int | None = None,
    ) -> "Library":
        """Embed the clips and images of a folder, in the order of their names.

        Files that cannot be used are named and left out.
        Raises: `FileNotFoundError` for a folder that has none.
        """
        folder = Path(folder).resolve()
        media = ("*.mp4", "*.webm", "*.mkv", "*.mov", "*.avi", "*.gif", "*.png", "*.jpg", "*.jpeg")
        found = sorted(path for pattern in media for path in folder.glob(pattern))[:limit]
        paths, embeds = [], []
        for path in tqdm(found, "embedding the library", disable=None):
            try:
                batch = read(processor, path, text=CAPTION).to(model.device)
            except gr.Error as error:
                print(f"left out of the library: {error.message}")
                continue
            paths.append(path)
            embeds.append(model.predict(**batch))  # (1, D)
        if not paths:
            raise FileNotFoundError(
                f"{folder}: no clip or image that can be read. Give another folder as --library."
            )
        return cls(folder, paths, torch.cat(embeds))


@torch.inference_mode()
def search(
    model: PreTrainedModel, processor: ProcessorMixin, library: Library, sentence: str
) -> list[tuple[Path, float]]:
    """The best clips for a sentence and their similarities. Raises: `gr.Error` without one."""
    if not (sentence or "").strip():
        raise sorry("Type a sentence that describes the clip.")
    wanted = processor(targets=sentence.strip()).to(model.device)
    similarities = (library.embeds @ model.encode_target(**wanted).T)[:, 0]  # (F,)
    best = similarities.float().topk(min(SHOWN, len(library.paths)))
    return [
        (library.paths[index], similarity)
        for index, similarity in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]


# What is shown.


def bars(ranked: list[tuple[str, float, float]]) -> str:
    """Ranked answers as HTML: a bar is as long as the answer's share."""
    rows = (
        f"<li><div><b>{escape(answer)}</b><span>{share:.1%}</span></div>"
        f'<div class="bar"><i style="width:{share:.1%}"></i></div>'
        f"<small>similarity {similarity:.3f}</small></li>"
        for answer, similarity, share in ranked[:10]
    )
    return f'<ol class="answers">{"".join(rows)}</ol>'


def uploads_only(file: gr.File) -> None:
    """gradio would also fetch an address that stands for a file, of any size: refuse it."""
    move = file.async_move_resource_to_block_cache

    async def move_file(path: str | Path | None) -> str | None:
        if str(path).startswith(("http:", "https:")):
            raise sorry("Upload a file: this app fetches no addresses.")
        return await move(path)

    file.async_move_resource_to_block_cache = move_file


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
        return bars(asker.rank(path, question, candidates))

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


def search_tab(model: PreTrainedModel, processor: ProcessorMixin, library: Library) -> None:
    """A sentence in; the clips of the library that come nearest to it out."""

    def find(sentence: str) -> list[tuple[str, str]]:
        return [
            (str(path), f"{similarity:.3f} · {path.stem}")
            for path, similarity in search(model, processor, library, sentence)
        ]

    sentence = gr.Textbox(
        label=f"Search {len(library.paths)} clips",
        placeholder="pick up the blue key",
        elem_id="sentence",
    )
    button = gr.Button("Search", variant="primary", elem_id="search")
    found = gr.Gallery(
        show_label=False, columns=3, height="auto", interactive=False, buttons=[], elem_id="found"
    )
    gr.on([button.click, sentence.submit], find, sentence, found, api_name="search")


def build(model: PreTrainedModel, processor: ProcessorMixin, library: Library) -> gr.Blocks:
    """The app, one tab per use of the model; nothing is sent to anybody about its use."""
    # Uploads are deleted after an hour; as copies among them, the examples would be too.
    gr.set_static_paths([EXAMPLES])
    with gr.Blocks(title="VL-JEPA", analytics_enabled=False, delete_cache=(3600, 3600)) as app:
        gr.Markdown(
            "# VL-JEPA\nThe model predicts the embedding of the answer, and the nearest text wins.",
            elem_id="title",
        )
        with gr.Tab("Ask a clip", id="ask"):
            ask_tab(model, processor)
        with gr.Tab("Search a library", id="search"):
            search_tab(model, processor, library)
    return app


CSS = """
.gradio-container { width: 100%; max-width: 1080px !important; margin: 0 auto !important; }
#image img { width: 100%; height: 100%; object-fit: contain; }
.answers { list-style: none; margin: 0; padding: 0; }
.answers li { margin: 0 0 14px; padding: 0; }
.answers li > div:first-child { display: flex; justify-content: space-between; gap: 12px; }
.answers b { overflow-wrap: anywhere; }
.answers span { font-variant-numeric: tabular-nums; }
.answers small { color: var(--body-text-color-subdued); }
.answers .bar { height: 8px; margin: 4px 0 2px; border-radius: 4px;
  background: var(--border-color-primary); overflow: hidden; }
.answers .bar i { display: block; height: 100%; background: var(--color-accent); }
.answers li:not(:first-child) .bar i { opacity: 0.45; }
#found .grid-wrap { max-height: none !important; height: auto !important; overflow: visible; }
@media (max-width: 640px) {
  #found .grid-container { grid-template-columns: repeat(2, minmax(0, 1fr)) !important; }
}
"""


# Enlarged, a clip of 64 pixels shows its pixels; a real one stays smooth.
HEAD = """<script>
for (const ready of ["load", "loadeddata"]) document.addEventListener(ready, ({target}) => {
  const width = target.videoWidth || target.naturalWidth;
  if (width && width < 200) target.style.imageRendering = "pixelated";
}, true);
</script>"""


def serve(app: gr.Blocks, library: Library, **options: object) -> tuple:
    """Start the app on loopback, or where `GRADIO_SERVER_NAME` says; `options` as for `launch`.

    Beside uploads, only the library and the examples can be read through it.
    """
    fonts = ["system-ui", "sans-serif"]  # a named web font would be fetched from elsewhere
    return app.queue(max_size=32).launch(
        allowed_paths=[str(library.folder), str(EXAMPLES)],
        max_file_size=MAX_MEGABYTES * 10**6,
        theme=gr.themes.Soft(font=fonts, font_mono=["ui-monospace", "monospace"]),
        css=CSS,
        head=HEAD,
        footer_links=[],
        share=False,
        ssr_mode=False,
        **options,
    )


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=os.environ.get("VLJEPA_MODEL"), help="or VLJEPA_MODEL")
    parser.add_argument("--library", type=Path, default=EXAMPLES, help="a folder of clips")
    parser.add_argument("--limit", type=int, help="take the library's first files only")
    parser.add_argument("--port", type=int, help="the first free one from 7860 on by default")
    args = parser.parse_args(arguments)
    if not args.model:
        parser.error("no model: give a folder or Hub id as --model, or set VLJEPA_MODEL")
    return args


def main() -> None:
    args = parse_args()
    # A folder of its own: two apps at once would delete each other's uploads.
    os.environ.setdefault("GRADIO_TEMP_DIR", mkdtemp(prefix="vljepa-space-"))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModel.from_pretrained(args.model, trust_remote_code=True).to(device).eval()
    processor = AutoProcessor.from_pretrained(args.model, trust_remote_code=True)
    library = Library.of(model, processor, args.library, args.limit)
    serve(build(model, processor, library), library, server_port=args.port)


if __name__ == "__main__":
    main()
