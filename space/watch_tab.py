"""The Watch tab: its layout, and the functions behind its buttons."""

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import gradio as gr

from .ask import EXAMPLES, bars
from .search import IMAGES, Library
from .timeline import clock, counts, draw, rows
from .uploads import MAX_MEGABYTES, MAX_SECONDS, examine, uploads_only
from .watch import FRAMES_PER_SECOND, Watched, Watcher, image_error

WATCH_EXAMPLES = EXAMPLES / "watch"
MAX_FRAMES_PER_SECOND = 10
SECONDS_BETWEEN = 0.25  # two updates of the page; the end of a segment is shown at once
SECONDS_IN_MEMORY = 3600  # a watched video is forgotten when its upload is deleted


def page(seen: Watched) -> tuple[str, str, str]:
    """Return the counts, the timeline and the rows of segments as HTML."""
    status = {
        "watching": f"{clock(seen.last_time)} of {clock(seen.seconds)}",
        "stopped": f"stopped at {clock(seen.last_time)}",
        "seen": f"all of {clock(seen.seconds)}",
    }[seen.status]
    return (
        counts(len(seen.curve.times), len(seen.segments), status, seen.notes()),
        draw(
            seen.curve,
            seen.segments,
            seen.seconds,
            open_since=seen.open_since,
            marked=seen.marked,
        ),
        rows(seen.segments, seen.open_since, seen.events),
    )


def example_rows() -> list[dict]:
    lines = (WATCH_EXAMPLES / "examples.jsonl").open(encoding="utf-8")
    return [json.loads(line) for line in lines]


@dataclass(frozen=True)
class Handlers:
    """The functions behind the tab's buttons.

    Attributes:
        watcher ([`Watcher`])
        clips (`dict[str, str]`): paths of the library's clips by file name. A name from the
            browser is looked up here, so a request cannot name another file of the server.
    """

    watcher: Watcher
    clips: dict[str, str]

    def show(self, path: str | None, name: str | None) -> tuple[dict, str | None]:
        """Check an upload and show it instead of the library's clip."""
        if path:
            if examine(path) == "images":
                raise image_error(path)
            return gr.update(value=path, visible=True), None
        return gr.update(value=self.clips.get(name), visible=name in self.clips), name

    def pick(self, name: str) -> tuple[None, dict]:
        """Show a clip of the library instead of the upload."""
        return None, self.show(None, name)[0]

    def run(
        self, path: str | None, name: str | None, query: str, texts: str, fps: float
    ) -> Iterator[tuple]:
        """Yield the watched part, and the page that shows it."""
        shown, closed = 0.0, 0
        # An upload has a folder of its own, so only an example has the path of an example.
        known = {str(WATCH_EXAMPLES / row["file"]): row["events"] for row in example_rows()}
        for seen in self.watcher.watch(path or self.clips.get(name), query, texts, fps):
            seen.events = known.get(path)
            now = time.monotonic()
            nothing_new = seen.status == "watching" and closed == len(seen.segments)
            if nothing_new and now - shown < SECONDS_BETWEEN:
                continue
            shown, closed = now, len(seen.segments)
            yield seen, *page(seen)

    def stop(self, seen: Watched | None) -> tuple[str, str, str]:
        """Stop the run and show its last state."""
        if seen is None:
            return "", "", ""
        seen.stop()
        return page(seen)

    def ask(self, seen: Watched | None, question: str, candidates: str) -> tuple[str, str]:
        """Return the ranked answers and the timeline, which marks the best one's segment."""
        return bars(self.watcher.ask(seen, question, candidates)), page(seen)[1]


class Video(NamedTuple):
    """The fields that choose a video, and its preview."""

    clip: gr.File
    picked: gr.Dropdown
    preview: gr.Video


class Settings(NamedTuple):
    """The settings of a run, in the order of the arguments of `Handlers.run`."""

    query: gr.Textbox
    texts: gr.Textbox
    fps: gr.Slider


class Results(NamedTuple):
    """The parts of the page that a run updates, in the order of `page`."""

    counts: gr.HTML
    timeline: gr.HTML
    segments: gr.HTML


class Questions(NamedTuple):
    """The fields for a question about the watched part."""

    question: gr.Textbox
    candidates: gr.Textbox
    button: gr.Button
    answers: gr.HTML


def video_column(clips: dict[str, str]) -> Video:
    """Lay out an upload, the clips of the library, and the preview."""
    with gr.Column():
        clip = gr.File(
            label=f"Video (≤ {MAX_MEGABYTES} MB, {MAX_SECONDS} s)",
            file_types=["video"],
            height=140,
            elem_id="watch-clip",
        )
        uploads_only(clip)
        picked = gr.Dropdown(
            list(clips), value=None, label="or a clip from the library", elem_id="watch-picked"
        )
        preview = gr.Video(
            show_label=False, interactive=False, visible=False, height=240, buttons=[],
            elem_id="watch-video",
        )  # fmt: skip
    return Video(clip, picked, preview)


def settings_column(watcher: Watcher) -> Settings:
    """Lay out the question, the candidate texts, and the frame rate."""
    query = gr.Textbox(
        label="Question about every window (optional)",
        placeholder="What happens?",
        elem_id="watch-query",
    )
    texts = gr.Textbox(
        label=f"Candidate texts, one per line{watcher.hint}",
        lines=4,
        max_lines=10,
        elem_id="watch-texts",
    )
    fps = gr.Slider(
        1,
        MAX_FRAMES_PER_SECOND,
        value=FRAMES_PER_SECOND,
        step=1,
        label=f"Frames per second ({watcher.window} frames per window)",
        elem_id="watch-fps",
    )
    return Settings(query, texts, fps)


def examples(video: Video, settings: Settings) -> None:
    """Lay out the examples, each of which fills in a video, a question and texts."""
    found = example_rows()
    gr.Examples(
        [
            [str(WATCH_EXAMPLES / row["file"]), row["query"], "\n".join(row["candidates"])]
            for row in found
        ],
        [video.clip, settings.query, settings.texts],
        example_labels=[row["label"] for row in found],
        label="Examples",
        elem_id="watch-examples",
    )


def question_row() -> Questions:
    """Lay out a question about the watched part, and its answers."""
    gr.Markdown("### Ask about the watched part")
    with gr.Row():
        with gr.Column():
            question = gr.Textbox(
                label="Question (if empty, the one above)", elem_id="seen-question"
            )
            candidates = gr.Textbox(
                label="Candidate answers, one per line", lines=4, max_lines=10,
                elem_id="seen-candidates",
            )  # fmt: skip
            button = gr.Button("Ask", elem_id="seen-ask")
        answers = gr.HTML(elem_id="seen-answers")
    return Questions(question, candidates, button, answers)


def watch_tab(watcher: Watcher, library: Library) -> None:
    """Build the tab: a video in, its timeline and segments out as they come, then questions."""
    clips = {path.name: str(path) for path in library.paths if path.suffix.lower() not in IMAGES}
    with gr.Row():
        video = video_column(clips)
        with gr.Column():
            settings = settings_column(watcher)
            with gr.Row():
                start = gr.Button("Watch", variant="primary", elem_id="watch")
                end = gr.Button("Stop", elem_id="watch-stop")
    examples(video, settings)
    results = Results(
        gr.HTML(elem_id="watch-counts"),
        gr.HTML(apply_default_css=False, elem_id="watch-timeline"),
        gr.HTML(apply_default_css=False, elem_id="watch-segments"),
    )
    questions = question_row()

    handlers, quiet = Handlers(watcher, clips), {"show_progress": "hidden"}
    seen = gr.State(
        time_to_live=SECONDS_IN_MEMORY, delete_callback=lambda seen: seen and seen.forget()
    )
    running = start.click(
        handlers.run,
        [video.clip, video.picked, *settings],
        [seen, *results],
        api_name="watch",
        show_progress_on=[results.counts],
    )
    start.click(lambda: "", None, questions.answers, **quiet)
    end.click(handlers.stop, seen, [*results], cancels=[running], **quiet)
    # Another video ends the run of the previous one and clears its results.
    cleared = [seen, *results, questions.answers]
    for change in (video.clip.change, video.picked.input):
        change(lambda: (None, "", "", "", ""), None, cleared, cancels=[running], **quiet)
    shown = video.clip.change(
        handlers.show, [video.clip, video.picked], [video.preview, video.picked], **quiet
    )
    shown.failure(lambda: None, None, video.clip)  # a refused file is removed
    video.picked.input(handlers.pick, video.picked, [video.clip, video.preview], **quiet)
    gr.on(
        [questions.button.click, questions.question.submit],
        handlers.ask,
        [seen, questions.question, questions.candidates],
        [questions.answers, results.timeline],
        api_name="ask_seen",
        show_progress_on=[questions.answers],
    )
