"""The tab in which a video is watched: what it shows, and what its buttons do."""

import json
import time
from collections.abc import Iterator
from typing import NamedTuple

import gradio as gr

from .ask import EXAMPLES, bars
from .search import Library
from .timeline import clock, counts, draw, rows
from .uploads import MAX_MEGABYTES, MAX_SECONDS, examine, uploads_only
from .watch import FRAMES_PER_SECOND, Watched, Watcher, picture

LONG = EXAMPLES / "watch"
MAX_FRAMES_PER_SECOND = 10
SECONDS_BETWEEN = 0.25  # two pictures of a run; the end of a segment is shown at once
SECONDS_KEPT = 3600  # what was seen, as uploads


def page(seen: Watched) -> tuple[str, str, str]:
    """Counts, timeline and rows, as HTML."""
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
        rows(seen.segments, seen.open_since),
    )


class Inputs(NamedTuple):
    """What a run is made of, in the order of its arguments."""

    clip: gr.File
    picked: gr.Dropdown
    query: gr.Textbox
    texts: gr.Textbox
    fps: gr.Slider


class Questions(NamedTuple):
    """The parts that ask about what was seen."""

    question: gr.Textbox
    candidates: gr.Textbox
    button: gr.Button
    answers: gr.HTML


def video_column(clips: dict[str, str]) -> tuple[gr.File, gr.Dropdown, gr.Video]:
    """An upload, or a clip of the library, and what it looks like."""
    with gr.Column():
        clip = gr.File(
            label=f"Video (≤ {MAX_MEGABYTES} MB, {MAX_SECONDS} s)",
            file_types=["video"],
            height=140,
            elem_id="watch-clip",
        )
        uploads_only(clip)
        picked = gr.Dropdown(
            list(clips), value=None, label="or a clip of the library", elem_id="watch-picked"
        )
        video = gr.Video(
            show_label=False, interactive=False, visible=False, height=240, buttons=[],
            elem_id="watch-video",
        )  # fmt: skip
    return clip, picked, video


def settings_column(watcher: Watcher) -> tuple[gr.Textbox, gr.Textbox, gr.Slider]:
    """What is asked, which texts there are, and how closely is looked."""
    query = gr.Textbox(
        label="Question to every moment (optional)",
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
        label=f"Frames per second ({watcher.size} to a window)",
        elem_id="watch-fps",
    )
    return query, texts, fps


def examples(inputs: Inputs) -> None:
    found = [json.loads(line) for line in (LONG / "examples.jsonl").open(encoding="utf-8")]
    gr.Examples(
        [[str(LONG / row["file"]), row["query"], "\n".join(row["candidates"])] for row in found],
        [inputs.clip, inputs.query, inputs.texts],
        example_labels=[row["label"] for row in found],
        label="Examples",
        elem_id="watch-examples",
    )


def question_row() -> Questions:
    gr.Markdown("### Ask about what was seen")
    with gr.Row():
        with gr.Column():
            question = gr.Textbox(
                label="Question (with none, the one above)", elem_id="seen-question"
            )
            candidates = gr.Textbox(
                label="Candidate answers, one per line", lines=4, max_lines=10,
                elem_id="seen-candidates",
            )  # fmt: skip
            button = gr.Button("Ask", elem_id="seen-ask")
        answers = gr.HTML(elem_id="seen-answers")
    return Questions(question, candidates, button, answers)


def watch_tab(watcher: Watcher, library: Library) -> None:
    """A video in; its timeline and its segments out, as they come; then questions."""
    pictures = (".png", ".jpg", ".jpeg")
    clips = {path.name: str(path) for path in library.paths if path.suffix not in pictures}
    with gr.Row():
        clip, picked, video = video_column(clips)
        with gr.Column():
            inputs = Inputs(clip, picked, *settings_column(watcher))
            with gr.Row():
                start = gr.Button("Watch", variant="primary", elem_id="watch")
                end = gr.Button("Stop", elem_id="watch-stop")
    examples(inputs)
    done = gr.HTML(elem_id="watch-counts")
    timeline = gr.HTML(apply_default_css=False, elem_id="watch-timeline")
    segments = gr.HTML(apply_default_css=False, elem_id="watch-segments")
    questions = question_row()
    seen = gr.State(time_to_live=SECONDS_KEPT, delete_callback=lambda seen: seen and seen.forget())

    def show(path: str | None, name: str | None) -> tuple[dict, str | None]:
        """Check an upload and show it; it takes the place of the library's clip."""
        if path:
            if examine(path) == "images":
                raise picture(path)
            return gr.update(value=path, visible=True), None
        return gr.update(value=clips.get(name), visible=name in clips), name

    def run(
        path: str | None, name: str | None, query: str, texts: str, fps: float
    ) -> Iterator[tuple]:
        shown, closed = 0.0, 0
        for seen in watcher.watch(path or clips.get(name), query, texts, fps):
            now = time.monotonic()
            goes_on = seen.status == "watching" and closed == len(seen.segments)
            if goes_on and now - shown < SECONDS_BETWEEN:
                continue
            shown, closed = now, len(seen.segments)
            yield seen, *page(seen)

    def stop(seen: Watched | None) -> tuple[str, str, str]:
        if seen is None:
            return "", "", ""
        seen.stop()
        return page(seen)

    def ask(seen: Watched | None, question: str, candidates: str) -> tuple[str, str]:
        return bars(watcher.ask(seen, question, candidates)), page(seen)[1]

    results, quiet = [done, timeline, segments], {"show_progress": "hidden"}
    running = start.click(run, inputs, [seen, *results], api_name="watch", show_progress_on=[done])
    start.click(lambda: "", None, questions.answers, **quiet)
    end.click(stop, seen, results, cancels=[running], **quiet)
    # Another video ends the work on the one before, and clears it away.
    cleared = [seen, *results, questions.answers]
    for change in (clip.change, picked.input):
        change(lambda: (None, "", "", "", ""), None, cleared, cancels=[running], **quiet)
    shown = clip.change(show, [clip, picked], [video, picked], **quiet)
    shown.failure(lambda: None, None, clip)
    picked.input(lambda name: (None, show(None, name)[0]), picked, [clip, video], **quiet)
    gr.on(
        [questions.button.click, questions.question.submit],
        ask,
        [seen, questions.question, questions.candidates],
        [questions.answers, timeline],
        api_name="ask_seen",
        show_progress_on=[questions.answers],
    )
