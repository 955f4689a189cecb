"""The examples of a model card: the row whose clip is published, its candidates, the picture."""

import io

import numpy as np
import pytest
from matplotlib.colors import to_rgba
from PIL import Image

from modeling_vljepa.pipelines.pipeline_vljepa import (
    VLJEPARetrievalPipeline,
    VLJEPAVisualQuestionAnsweringPipeline,
)
from tests.tiny import noise, tiny_model, tiny_processor, tiny_rows, write_clip, write_rows
from training.arguments import RecipeError
from training.hub import examples
from training.hub.examples import (
    Answered,
    answer,
    answer_examples,
    candidates_of,
    example_row,
    picture,
)


def row(query: str, target: str, **others: object) -> dict:
    return {"query": query, "target": target, "line": 1, **others}


def test_example_row_prefers_a_question_on_a_small_whole_video(tmp_path, monkeypatch):
    for name, size in (("a.mp4", 10), ("b.mp4", 20), ("c.png", 10), ("large.mp4", 21)):
        (tmp_path / name).write_bytes(b"x" * size)
    (tmp_path / "frames").mkdir()
    monkeypatch.setattr(examples, "MAX_BYTES", 20)
    rows = [
        row("what ?", "a", video=str(tmp_path / "large.mp4")),
        row("what ?", "b", video=str(tmp_path / "frames")),
        row("what ?", "c", video=str(tmp_path / "a.mp4"), start=1.0),
        row("", "d", video=str(tmp_path / "a.mp4")),
        row("what ?", "e", image=str(tmp_path / "c.png")),
        row("what ?", "f", video=str(tmp_path / "b.mp4")),
    ]
    assert example_row(rows, "rows.jsonl")["target"] == "f"
    assert example_row(rows[:5], "rows.jsonl")["target"] == "e"
    assert example_row(rows[:4], "rows.jsonl")["target"] == "d"
    with pytest.raises(RecipeError, match="no row of rows.jsonl has a clip .* at most 20 bytes"):
        example_row(rows[:3], "rows.jsonl")


def test_candidates_of_are_answers_to_the_same_question():
    names = ("red", "green", "blue", "pink", "grey", "white", "black")
    colours = [row("colour ?", name) for name in names]
    rows = [*colours, row("kind ?", "ball"), *colours]
    found = candidates_of(rows[0], rows)
    assert len(found) == 5 and found == sorted(found) and "red" in found
    assert set(found) < {each["target"] for each in colours}
    # A question that is asked once: answers to the others.
    assert len(found := candidates_of(rows[7], rows)) == 5 and "ball" in found
    assert candidates_of(rows[7], rows[7:8]) == ["ball"]


def test_candidates_of_a_row_are_its_own():
    rows = [row("colour ?", "red", candidates=["red", "green"]), row("colour ?", "blue")]
    assert candidates_of(rows[0], rows) == ["green", "red"]
    assert candidates_of(rows[1], rows) == ["blue", "red"]


@pytest.mark.parametrize("given", [["green", "blue"], ["red", "red"], ["red", 1], "red", []])
def test_candidates_of_refuses_a_row_whose_candidates_cannot_be_ranked(given):
    with pytest.raises(RecipeError, match="line 1: candidates must be .* the target 'red'"):
        candidates_of(row("colour ?", "red", candidates=given), [])


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    rows = tiny_rows(folder).read_text() + '{"video": "wide.mp4", "start": 0.2, "target": "x"}\n'
    (folder / "rows.jsonl").write_text(rows)
    return answer_examples(tiny_model(), tiny_processor(), str(folder / "rows.jsonl"))


def test_answer_examples_are_the_pipelines_answers(found):
    assert found.file == "example.mp4" and found.rows_file == "rows.jsonl"
    assert found.first.query == "what does the man do ?" and found.first.kind == "video"
    ask = VLJEPAVisualQuestionAnsweringPipeline(model=tiny_model(), processor=tiny_processor())
    again = ask(
        video=found.first.row["video"],
        question=found.first.query,
        candidates=found.first.candidates,
    )
    assert [text for text, _ in found.first.answers] == [each["answer"] for each in again]
    scores = [score for _, score in found.first.answers]
    assert scores == pytest.approx([each["score"] for each in again], abs=1e-5)
    # All five rows, one of them without a query and one a part of a video.
    assert [each.truth for each in found.shown] == [
        *("a cat", "red", "he rides a bike", "the door opens", "x")
    ]


def test_answer_examples_rank_rows_without_a_question_as_captions(found):
    shown = found.shown[3]
    assert not shown.asks and shown.query == tiny_model().config.prompts["retrieval"]
    rank = VLJEPARetrievalPipeline(model=tiny_model(), processor=tiny_processor())
    again = rank(video=shown.row["video"], texts=shown.candidates)
    assert [text for text, _ in shown.answers] == [each["text"] for each in again]
    # A model that was trained without a query has an empty prompt.
    model = tiny_model(prompts={"caption": ""})
    rows = [shown.row]
    assert answer(model, tiny_processor(), shown.row, rows).answers[0][0] == "the door opens"


def test_picture_draws_a_bar_for_each_answer_and_the_true_one_in_green(tmp_path):
    Image.fromarray(noise(20, 30, 3)).save(tmp_path / "a.png")
    write_clip(tmp_path / "b.mp4", noise(6, 32, 48, 3))
    media = ({"image": str(tmp_path / "a.png")}, {"video": str(tmp_path / "b.mp4")})
    rows = [row("", target, **each) for target, each in zip("xy", media, strict=True)]
    answers = [("$x_1$ " * 20, 0.5), ("y", -0.25)]
    figure = picture([Answered(each, "a $question$?" * 20, ["x"], answers) for each in rows])
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    assert np.asarray(Image.open(buffer)).std() > 0
    first, clip, last, bars = [figure.axes[index] for index in (0, 2, 1, 3)]
    assert first.images[0].get_array().shape == (20, 30, 3)
    assert clip.images[0].get_array().shape == (32, 4 * 48, 3)  # four frames side by side
    assert [bar.get_width() for bar in bars.patches] == [0.5, -0.25]
    green, grey = to_rgba("#16a34a"), to_rgba("#94a3b8")
    assert [bar.get_facecolor() for bar in bars.patches] == [grey, green]
    assert [bar.get_facecolor() for bar in last.patches] == [grey, grey]
    assert max(len(label.get_text()) for label in bars.get_yticklabels()) <= 50


@pytest.mark.parametrize(("facts", "lines"), [({}, 1), ({"accuracy": 0.423}, 2)])
def test_picture_states_the_accuracy_of_a_chosen_row(tmp_path, facts, lines):
    write_clip(tmp_path / "a.mp4", noise(4, 32, 48, 3))
    asked = row("colour ?", "red", video=str(tmp_path / "a.mp4"), **facts)
    figure = picture([Answered(asked, "colour ?", ["red"], [("red", 0.5)])])
    title = figure.axes[0].get_title(loc="left").splitlines()
    assert title[0] == "colour ?" and len(title) == lines
    assert title[1:] == ["42% of such test questions are answered right"][: lines - 1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "--example: cannot read .*no such JSONL file"),
        ("", "--example: cannot read .*holds no row"),
        ("{}", "--example: .* has no usable row: .*:1: "),
        ('{"video": "broken.mp4", "target": "a"}', "--example: line 1: .*broken.mp4"),
    ],
)
def test_answer_examples_names_rows_that_cannot_be_used(tmp_path, content, message):
    (tmp_path / "broken.mp4").write_bytes(b"not a video")
    if content is not None:
        write_rows(tmp_path / "rows.jsonl", []).write_text(content)
    with pytest.raises(RecipeError, match=message):
        answer_examples(tiny_model(), tiny_processor(), str(tmp_path / "rows.jsonl"))
