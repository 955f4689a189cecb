"""docs/evaluation.md: its examples run, and its tables are those of the entries and of the code."""

import pytest
import yaml

from eval import paper_table
from eval.benchmarks import load_benchmarks
from eval.task import Task
from eval.tasks import TASKS
from processing import VLJEPAProcessor
from tests.colour_model import COLOURS, HandModel, write_colour
from tests.docs import ROOT, fenced
from tests.tiny import noise, tiny_processor, write_clip, write_rows

DOCUMENT = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
BLOCKS = fenced("docs/evaluation.md")
QUERY = "What is the action shown?"  # the model's action prompt


def block(language: str, part: str) -> str:
    """Return the block of this language that contains a text."""
    [found] = [text for name, text in BLOCKS if name == language and part in text]
    return found


@pytest.fixture(scope="module")
def processor() -> VLJEPAProcessor:
    return tiny_processor(num_frames=2)


def test_evaluation_document_has_the_table_of_the_papers_entries():
    """After a change of an entry: python -m eval.paper_table"""
    assert paper_table.table() in DOCUMENT


def test_paper_table_has_every_entry_with_its_files_and_terms():
    table = paper_table.table()
    entries = {}
    for file in (ROOT / "eval" / "paper").glob("*.yaml"):
        entries |= yaml.safe_load(file.read_text(encoding="utf-8"))
    assert len(entries) > 30
    for name, entry in entries.items():
        [line] = [line for line in table.splitlines() if line.startswith(f"| `{name}` |")]
        assert line.endswith(f"| {entry['paper']['terms']} |")
        assert len(entry["paper"]["terms"]) > 20
        assert line.count("|") == 7  # no cell holds a bar
    assert "`coin/COIN.json`, `coin/videos`" in table
    assert "https://huggingface.co/datasets/lmms-lab/POPE" in table


@pytest.mark.parametrize("name", TASKS)
def test_evaluation_document_explains_the_scores_of_every_kind(name):
    assert f"| `{name}` |" in DOCUMENT


@pytest.mark.parametrize(
    "name", sorted(path.parent.name for path in (ROOT / "eval" / "metrics").glob("*/*.py"))
)
def test_evaluation_document_lists_every_metric_of_the_evaluate_library(name):
    part = DOCUMENT.split("## Metrics for the evaluate library")[1]
    assert f"`{name}`" in part


def test_entry_of_the_evaluation_document_is_measured(tmp_path, processor):
    """Its files as the document describes them; the model takes green for closing."""
    data = tmp_path / "data"
    clips = data / "rooms" / "clips"
    clips.mkdir(parents=True)
    (data / "rooms" / "val.csv").write_text(block("text", "id,action"))
    file = tmp_path / "rooms.yaml"
    file.write_text(block("yaml", "rooms:"))
    for name, colour in (("0001", "red"), ("0002", "green"), ("0003", "green")):
        frames = noise(4, 40, 40, 3)
        frames[:] = COLOURS[colour]
        write_clip(clips / f"{name}.mp4", frames)
    [benchmark] = load_benchmarks(file, ["rooms"], data)
    labels = ["open the door", "close the door", "lock the door"]
    model = HandModel(
        processor,
        {text: [float(text == label) for label in labels] for text in labels},
        {("red", QUERY): labels[0], ("green", QUERY): labels[1]},
    )
    result = TASKS[benchmark.task].evaluate(Task(model, processor, benchmark))
    assert result.scores["top-1"].value == pytest.approx(2 / 3)
    assert result.scores["top-1"].baselines["chance"] == pytest.approx(1 / 3)
    assert result.protocol["prompt"] == QUERY
    assert result.title == "rooms"


def test_kind_of_the_evaluation_document_is_measured(tmp_path, processor):
    namespace = {"__name__": "__main__"}
    exec(compile(block("python", "class ChoiceBenchmark"), "docs/evaluation.md", "exec"), namespace)
    kind = namespace["KIND"]
    for colour in ("red", "green"):
        write_colour(tmp_path / f"{colour}.png", colour)
    asked = {"query": "which ?", "candidates": ["a cat", "a dog"]}
    rows = [
        {"image": "red.png", "target": "a cat", **asked},
        {"image": "green.png", "target": "a cat", **asked},
        {"image": "green.png", "target": "red", "query": "which ?", "candidates": ["red", "blue"]},
        {"image": "green.png", "target": "red", "query": "which ?"},
    ]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    benchmark = kind.benchmark("mine", task="choice", rows=path, description="Colours.")
    texts = {"a cat": [1, 0, 0.0], "a dog": [0, 1, 0.0], "red": [0, 0, 1.0], "blue": [0, 0, 1.0]}
    model = HandModel(
        processor, texts, {("red", "which ?"): "a cat", ("green", "which ?"): "a dog"}
    )
    result = kind.evaluate(Task(model, processor, benchmark))
    # Right, wrong, a tie; the fourth row has no candidates.
    assert result.scores["accuracy"].value == pytest.approx(1 / 3)
    assert result.scores["accuracy"].baselines == {"chance": pytest.approx(1 / 2)}
    assert result.skipped == ["rows.jsonl:4: candidates is missing"]
