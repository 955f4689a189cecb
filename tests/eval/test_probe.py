"""The probe finds what is linear in stored tokens, and nothing in noise."""

import numpy as np
import pytest

from eval import probe as probing
from eval.metrics import wilson
from eval.probe import Probed, main, probe
from tests.processing.test_feature_store import read_dataset, write_store
from tests.tiny import noise, tiny_model, tiny_processor, tiny_rows, write_clip, write_rows


def test_probe_finds_a_linear_answer_and_none_in_noise():
    random = np.random.default_rng(0)
    tokens = random.normal(size=(400, 32)).astype(np.float32)
    clips = [f"clip {row}" for row in range(400)]
    answers = random.choice(["left", "right"], 400).tolist()
    tokens[:, 0] += np.where(np.equal(answers, "left"), 3, -3)
    found = probe(tokens, answers, clips)
    assert found.rows == 80
    assert found.right >= 72
    noise = probe(tokens, list(random.permutation(answers)), clips)
    assert 25 <= noise.right <= 55


def test_probe_does_not_learn_and_test_on_rows_of_one_clip():
    """The ten rows of a clip have one random answer, which only rows of the same clip reveal."""
    random = np.random.default_rng(1)
    tokens = np.repeat(random.normal(size=(40, 64)).astype(np.float32), 10, axis=0)
    answers = np.repeat(random.choice(["a", "b"], 40), 10).tolist()
    names = [f"clip {row // 10}" for row in range(400)]
    assert probe(tokens, answers, names).right <= 64
    leaked = probe(tokens, answers, [f"row {row}" for row in range(400)])
    assert leaked.right == leaked.rows == 80


def test_probe_counts_the_most_common_answer_of_the_learnt_rows():
    tokens = np.zeros((100, 2), dtype=np.float32)
    found = probe(tokens, ["a"] * 90 + ["b"] * 10, [str(row) for row in range(100)])
    assert found.right == found.usual >= 15
    assert probe(tokens, ["a"] * 100, [str(row) for row in range(100)]).right == 20


def test_probed_resamples_clips_and_not_rows():
    """Ten clips with six equal rows: Wilson's interval for 10 of 10, not for 60 of 60."""
    one = Probed([True] * 30, 30, [f"clip {row // 3}" for row in range(30)])
    low, high = wilson(10, 10)
    assert str(one + one) == f"1.000 ({low:.3f} to {high:.3f}), most common answer 1.000"
    single = Probed([True, False] * 10, 10, [str(row) for row in range(20)])
    low, high = wilson(10, 20)
    assert f"({low:.3f} to {high:.3f})" in str(single)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Write a model, its store of two images and two videos, and questions about them."""
    folder = tmp_path_factory.mktemp("probe")
    model, processor = tiny_model(), tiny_processor()
    dataset = read_dataset(tiny_rows(folder), processor)
    write_store(folder / "store", dataset, model, processor)
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    media = [
        {name: row[name] for name in ("image", "video") if name in row} for row in dataset.rows
    ]
    # Two of three rows have the answer "a". The tokens of a clip are equal, so a classifier chooses
    # "a"; with equal counts, rounding would choose.
    asked = [
        {**row, "query": "which?", "target": answer}
        for row in media * 2
        for answer in ("a", "a", "b")
    ]
    few = [{**media[0], "query": "rare?", "target": "a"}]
    write_rows(folder / "asked.jsonl", [*asked, *few, {"query": "no media", "target": "a"}])
    write_clip(folder / "strange.mp4", noise(5, 48, 48, 3))
    write_rows(folder / "one_clip.jsonl", asked[7:9] * 2)
    strange = [{**row, "video": "strange.mp4"} for row in asked[7:9]]
    write_rows(folder / "strange.jsonl", [*asked[7:9], *strange])
    return folder


def options(folder, rows="asked.jsonl", *more):
    return [
        *("--model", str(folder / "model"), "--features", str(folder / "store")),
        *("--rows", str(folder / rows), *more),
    ]


def test_probe_command_learns_images_and_videos_separately(folder, monkeypatch, capsys):
    monkeypatch.setattr(probing, "LEAST_ROWS", 4)
    total = main(options(folder))
    printed = capsys.readouterr().out
    assert total.rows == 12  # one clip of two, of each kind, with six rows
    assert total.usual == total.right == 8
    assert "images: which?" in printed and "videos: which?" in printed
    assert "all 2 questions, 12 rows held out" in printed
    assert "one clip or one answer: 1 questions" in printed and "images: rare?" in printed
    assert "left out, unusable: 1 rows" in printed and "asked.jsonl:26" in printed
    assert main(options(folder, "asked.jsonl", "--tokens", "1")).rows == 12


def test_probe_command_names_bad_input(folder, monkeypatch):
    with pytest.raises(ValueError, match="no query that contains '' has 100 rows and two answers"):
        main(options(folder))
    monkeypatch.setattr(probing, "LEAST_ROWS", 4)
    with pytest.raises(ValueError, match="no query that contains 'who' has 4 rows"):
        main(options(folder, "asked.jsonl", "--match", "who"))
    with pytest.raises(ValueError, match="no query that contains '' has 4 rows.* of two clips"):
        main(options(folder, "one_clip.jsonl"))
    with pytest.raises(ValueError, match="1 of 2 clips are not in it: .*strange.mp4"):
        main(options(folder, "strange.jsonl"))
