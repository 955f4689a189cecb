"""The entries of eval/paper: one for each benchmark of the paper, with what a reader of its scores
must know."""

from pathlib import Path

import pytest
import yaml

from eval.benchmarks import PROMPT_NAMES
from eval.tasks import TASKS

FOLDER = Path(__file__).parents[2] / "eval/paper"
ENTRIES = {
    name: entry
    for path in sorted(FOLDER.glob("*.yaml"))
    for name, entry in yaml.safe_load(path.read_text(encoding="utf-8")).items()
}
# Names in the paper's tables, figures and text, and of the two sets of images.
BENCHMARKS = {
    *("SSv2", "EK100", "EgoExo4D", "K400", "COIN SR", "COIN TR", "CrossTask SR", "CrossTask TR"),
    *("ImageNet", "MSR-VTT", "ActivityNet", "DiDeMo", "MSVD", "YouCook2", "PVD-Bench", "Dream-1k"),
    *("VDC-1k", "Flickr30k 1K", "COCO 5K", "GQA", "TallyQA", "POPE", "POPEv2", "CLEVR"),
    *("WorldPrediction-WM", "EK100 action anticipation", "COIN next step", "SugarCrepe++", "VISLA"),
    *("MSR-VTT captioning", "YouCook2 captioning", "PVD-Bench captioning"),
    "EgoExo4D selective decoding",
}


def test_paper_entries_have_every_benchmark_of_the_paper():
    assert {entry["paper"]["name"] for entry in ENTRIES.values()} == BENCHMARKS


@pytest.mark.parametrize("name", ENTRIES)
def test_paper_entry_states_its_protocol(name):
    entry, paper = ENTRIES[name], ENTRIES[name]["paper"]
    assert entry["description"].endswith(".")
    for key in ("metric", "open", "choice", "terms"):
        assert paper[key].strip(), key
    # A number can be compared only if its place is stated.
    assert paper.get("table") or not paper.get("scores")
    # Videos are measured with a stated number of frames and a prompt that the model names.
    source = str(entry.get("source", "rows"))
    if "video" in source or "rows" in entry:
        assert entry["num_frames"] > 0
    if TASKS[entry["task"]].benchmark.prompt is not None:
        assert entry["prompt"] in PROMPT_NAMES
        assert "query" not in entry


@pytest.mark.parametrize("name", [name for name in ENTRIES if name.endswith("_mteb")])
def test_paper_entry_of_a_subset_expects_the_pool_of_the_whole(name):
    whole = ENTRIES[name.removesuffix("_mteb")]["paper"]
    assert ENTRIES[name]["paper"]["pool"] == whole["pool"]
    assert ENTRIES[name]["source"]["revision"]
