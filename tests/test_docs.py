"""The documents: their commands and Python blocks run as they stand, and their lists are complete.

`tests/docs.py` lists what is not typed, and types everything else in a clone after `make demo`.
"""

import importlib
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from eval import probe
from tests.docs import LANGUAGES, LONG, NOT_TYPED, PAGES, ROOT, fenced, run_python, typed
from training.demo_data import streams
from training.demo_data.__main__ import main as make_data
from training.train import main as train
from training.train_decoder import main as train_decoder

EVERYTHING = [each for page in PAGES for each in typed(page)]
SHORT = [each for each in EVERYTHING if not each.reason(NOT_TYPED) and not each.reason(LONG)]
RECIPES = "training/recipes"


@pytest.mark.parametrize("page", PAGES)
def test_blocks_of_the_documents_name_their_language(page):
    assert {language for language, _ in fenced(page)} <= LANGUAGES


@pytest.mark.parametrize("pattern", [*NOT_TYPED, *LONG])
def test_patterns_of_untyped_commands_match_one(pattern):
    """A pattern that matches nothing would hide nothing, or hides it under a wrong name."""
    assert any(each.reason({pattern: "found"}) for each in EVERYTHING)


def test_most_commands_of_the_documents_are_typed():
    """The positive control: the reader finds the blocks, and the lists do not grow over them."""
    assert len([each for each in SHORT if each.kind == "sh"]) >= 12
    assert len([each for each in SHORT if each.kind == "python"]) >= 8


def test_the_example_of_the_readme_is_the_file():
    blocks = [block for language, block in fenced("README.md") if language == "python"]
    assert blocks[0] == (ROOT / "examples" / "ask.py").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that looks like a clone after `make demo`, with less data and two steps a stage."""
    folder = tmp_path_factory.mktemp("clone")
    for path in ROOT.iterdir():
        if path.name not in {"data", "runs", ".venv", ".git"}:
            (folder / path.name).symlink_to(path)
    here = os.getcwd()
    os.chdir(folder)
    try:
        make_data(["--output", "data/demo", "--episodes", "300", "--eval-clips", "20"])
        demo, two = "runs/demo-seed0", "training.max_steps=2"
        train([f"{RECIPES}/babyai_pretrain.yaml", two, f"training.output_dir={demo}/pretrain"])
        sft = [f"model.checkpoint={demo}/pretrain", f"training.output_dir={demo}/sft"]
        train([f"{RECIPES}/babyai_sft.yaml", two, *sft])
        rows = "data.sources=[{rows: data/demo/babyai/val_captions.jsonl}]"
        quick = [two, rows, "data.validation=[]", "training.eval_strategy='no'"]
        train_decoder([f"{RECIPES}/babyai_decoder.yaml", *quick])
        streams.STREAMS |= {"val": 1, "test": 1}
        streams.main(["--output", "data/streams", "--train", "1"])
    finally:
        os.chdir(here)
    return folder


@pytest.mark.slow
def test_short_commands_and_python_blocks_run_as_they_stand(clone, monkeypatch):
    """In the order of the documents: what one makes, the next one reads."""
    monkeypatch.chdir(clone)
    monkeypatch.setattr(probe, "LEAST_ROWS", 2)
    page, namespace = None, {}
    for each in SHORT:
        if each.page != page:
            page, namespace = each.page, {"__name__": "__main__"}
        if each.kind == "python":
            run_python(each.text, page, namespace)
            continue
        words = shlex.split(each.text)
        if words[:2] == ["python", "-m"]:  # in this process: the imports are most of a short run
            importlib.import_module(words[2]).main(words[3:])
        else:
            command = each.text.replace("python ", f"{sys.executable} ", 1)
            environment = os.environ | {"PYTHONPATH": str(ROOT)}
            subprocess.run(["bash", "-c", command], check=True, env=environment)
