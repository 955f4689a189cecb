"""A linear classifier on stored tokens finds what is in them, and nothing that is not."""

import shutil

import numpy as np
import pytest

from eval import probe as probing
from eval.probe import main, probe
from tests.processing.test_feature_store import read_dataset, write_store
from tests.tiny import tiny_model, tiny_processor, tiny_rows, write_rows


def test_what_a_line_separates_is_found_and_noise_is_not():
    random = np.random.default_rng(0)
    tokens = random.normal(size=(400, 32)).astype(np.float32)
    clips = [f"clip {row}" for row in range(400)]
    told = random.choice(["left", "right"], 400).tolist()
    tokens[:, 0] += np.where(np.equal(told, "left"), 3, -3)
    found = probe(tokens, told, clips)
    assert found.rows == 80
    assert found.right >= 72
    noise = probe(tokens, list(random.permutation(told)), clips)
    assert 25 <= noise.right <= 55


def test_rows_of_one_clip_are_not_on_both_sides():
    """Ten rows of each clip say one thing, drawn by lot: who has seen the clip knows it."""
    random = np.random.default_rng(1)
    tokens = np.repeat(random.normal(size=(40, 64)).astype(np.float32), 10, axis=0)
    answers = np.repeat(random.choice(["a", "b"], 40), 10).tolist()
    names = [f"clip {row // 10}" for row in range(400)]
    assert probe(tokens, answers, names).right <= 64
    leaked = probe(tokens, answers, [f"row {row}" for row in range(400)])
    assert leaked.right == leaked.rows == 80


def test_the_usual_answer_is_that_of_the_learnt_rows():
    tokens = np.zeros((100, 2), dtype=np.float32)
    found = probe(tokens, ["a"] * 90 + ["b"] * 10, [str(row) for row in range(100)])
    assert found.right == found.usual >= 15
    assert probe(tokens, ["a"] * 100, [str(row) for row in range(100)]).right == 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, its store of two images and two videos, and questions about them."""
    folder = tmp_path_factory.mktemp("probe")
    model, processor = tiny_model(), tiny_processor()
    dataset = read_dataset(tiny_rows(folder), processor)
    write_store(folder / "store", dataset, model, processor)
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    media = [
        {name: row[name] for name in ("image", "video") if name in row} for row in dataset.rows
    ]
    asked = [
        {**row, "query": "which?", "target": answer} for row in media * 3 for answer in ("a", "b")
    ]
    few = [{**media[0], "query": "rare?", "target": "a"}]
    write_rows(folder / "asked.jsonl", [*asked, *few, {"query": "no media", "target": "a"}])
    shutil.copy(media[2]["video"], folder / "strange.mp4")
    write_rows(folder / "one_clip.jsonl", asked[4:6] * 2)
    strange = [{**row, "video": "strange.mp4"} for row in asked[4:6]]
    write_rows(folder / "strange.jsonl", [*asked[4:6], *strange])
    return folder


def options(folder, rows="asked.jsonl", *more):
    return [
        *("--model", str(folder / "model"), "--features", str(folder / "store")),
        *("--rows", str(folder / rows), *more),
    ]


def test_the_command_asks_images_and_videos_apart(folder, monkeypatch, capsys):
    monkeypatch.setattr(probing, "LEAST_ROWS", 4)
    total = main(options(folder))
    printed = capsys.readouterr().out
    assert total.rows == 12  # one clip of two, of each kind, with six rows
    assert total.usual == total.right == 6  # a clip's rows say both answers
    assert "images: which?" in printed and "videos: which?" in printed
    assert "all 2 questions, 12 rows held out" in printed
    assert "or with one answer: 1 questions" in printed and "images: rare?" in printed
    assert "left out, which cannot be used: 1 rows" in printed and "asked.jsonl:26" in printed
    assert main(options(folder, "asked.jsonl", "--tokens", "1")).rows == 12


def test_bad_input_is_named(folder, monkeypatch):
    with pytest.raises(ValueError, match="no query that holds '' has 100 rows and two answers"):
        main(options(folder))
    monkeypatch.setattr(probing, "LEAST_ROWS", 4)
    with pytest.raises(ValueError, match="no query that holds 'who' has 4 rows"):
        main(options(folder, "asked.jsonl", "--match", "who"))
    with pytest.raises(ValueError, match="no query that holds '' has 4 rows.* of two clips"):
        main(options(folder, "one_clip.jsonl"))
    with pytest.raises(ValueError, match="1 of 2 clips are not in it: .*strange.mp4"):
        main(options(folder, "strange.jsonl"))
