"""The comparison of two evaluations, item by item."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from eval.compare import main
from eval.evaluate import write_results
from eval.intervals import difference_interval
from eval.items import FILE, Items, write_items
from eval.results import Score, TaskResult

CLIPS, K = 40, 5  # every clip has five questions, three of them about a colour
CLUSTERS = np.repeat(np.arange(CLIPS), K)
TYPES = ["colour", "colour", "place", "colour", "place"] * CLIPS
RIGHT = (np.random.default_rng(0).random(CLIPS * K) < 0.5).astype(float)


def evaluation(
    folder: Path,
    values: np.ndarray = RIGHT,
    *,
    items: slice | np.ndarray = slice(None),
    candidates: str = "c",
    name: str = "questions",
) -> Path:
    """Write the files of an evaluation whose items have these values."""
    clusters, values = CLUSTERS[items], values[items]
    numbers = np.arange(CLIPS * K)[items]
    found = Items(
        clips=[[{"image": b"clip %d" % cluster}] for cluster in clusters],
        texts=[[f"question {number}", "answer"] for number in numbers],
        clusters=clusters,
        scores={"accuracy": values},
        predictions=["yes"] * len(values),
        types=[TYPES[number] for number in numbers],
    )
    result = TaskResult(
        name,
        "vqa",
        "",
        {"candidates": len(candidates), "candidates_sha256": candidates, "prompt": "p"},
        {"accuracy": Score.of(values, clusters, {})},
        items=[found],
    )
    folder.mkdir(parents=True)
    write_items(folder / FILE, name, [found], append=False)
    write_results(folder / "results.json", folder.name, [result])
    return folder


def flipped(clips: int) -> np.ndarray:
    """Return the values with one wrong question of each of the first clips answered."""
    better = RIGHT.copy()
    for clip in range(clips):
        wrong = np.flatnonzero((clip == CLUSTERS) & (better == 0))
        better[wrong[:1]] = 1
    return better


# -- comparing -----------------------------------------------------------------------------


def test_compare_of_an_evaluation_with_itself_is_zero(tmp_path, capsys):
    a = str(evaluation(tmp_path / "a"))
    for found in main([a, a]):
        assert (found.difference, found.low, found.high, found.p) == (0, 0, 0, 1)
        assert found.a == found.b
    assert "+0.0 to +0.0  1.0000    200        40" in capsys.readouterr().out


def test_compare_finds_a_planted_difference_and_writes_it(tmp_path, capsys):
    better = flipped(20)
    a, b = evaluation(tmp_path / "a"), evaluation(tmp_path / "b", better)
    whole, colour, place = main([str(a), str(b), "--json", str(tmp_path / "out" / "c.json")])
    gained = int(better.sum() - RIGHT.sum())
    assert gained >= 18  # two of twenty clips may have had no wrong answer
    assert (whole.a, whole.b) == pytest.approx((RIGHT.mean(), better.mean()))
    assert whole.difference == pytest.approx(gained / 200)
    expected = difference_interval(better - RIGHT, CLUSTERS, 1.0)
    assert (whole.low, whole.high) == pytest.approx((expected.low, expected.high))
    assert 0 < whole.low < whole.difference < whole.high
    assert whole.p == 1e-4  # 18 or more clips, all in one direction
    assert (whole.items, whole.clusters, whole.type) == (200, 40, None)
    assert (colour.type, colour.items, place.type, place.items) == ("colour", 120, "place", 80)
    assert 120 * colour.difference + 80 * place.difference == pytest.approx(gained)

    [first, *_] = json.loads((tmp_path / "out" / "c.json").read_text())["comparisons"]
    assert first["difference"] == whole.difference and first["metric"] == "accuracy"
    line = next(line for line in capsys.readouterr().out.splitlines() if "accuracy" in line)
    assert f"{100 * whole.difference:+.1f}" in line
    back = main([str(b), str(a)])[0]
    assert back.difference == -whole.difference and back.p == whole.p


def test_compare_averages_each_item_over_seeds(tmp_path):
    first, second = flipped(10), flipped(30)
    a = [str(evaluation(tmp_path / "a0")), str(evaluation(tmp_path / "a1"))]
    b = [str(evaluation(tmp_path / f"b{i}", each)) for i, each in enumerate((first, second))]
    found = main(["--a", *a, "--b", *b])[0]
    assert found.b_seeds == pytest.approx([first.mean(), second.mean()])
    assert found.difference == pytest.approx((first.mean() + second.mean()) / 2 - RIGHT.mean())
    expected = difference_interval((first + second) / 2 - RIGHT, CLUSTERS, 1.0)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))


def test_compare_pairs_items_in_any_order_and_at_any_path(tmp_path):
    """Lines, not paths: a copied folder of another machine has the same items."""
    a, b = evaluation(tmp_path / "a"), evaluation(tmp_path / "x" / "b", flipped(20))
    expected = main([str(a), str(b)])[0]
    lines = (b / FILE).read_text().splitlines()
    (b / FILE).write_text("\n".join(reversed(lines)) + "\n")
    shutil.move(b, tmp_path / "b" / "eval")
    found = main([str(a / "results.json"), str(tmp_path / "b")])[0]  # a file, a model's folder
    assert found.difference == pytest.approx(expected.difference)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))


# -- refusing ------------------------------------------------------------------------------


def test_compare_rejects_other_items_unless_the_common_ones_are_asked_for(tmp_path, capsys):
    better = flipped(20)
    a = evaluation(tmp_path / "a", items=slice(0, 150))
    b = evaluation(tmp_path / "b", better, items=slice(100, 200))
    message = r"questions, accuracy: different items. 100 of the 150 in .*a are missing in .*b, "
    with pytest.raises(ValueError, match=message + "and 50 of its 100 are new"):
        main([str(a), str(b)])
    found = main([str(a), str(b), "--common"])[0]
    shared = slice(100, 150)
    assert (found.items, found.clusters) == (50, 10)
    assert found.difference == pytest.approx((better - RIGHT)[shared].mean(), abs=1e-9)
    assert "shared items only" in capsys.readouterr().out
    c = evaluation(tmp_path / "c", items=slice(150, 200))
    with pytest.raises(ValueError, match="questions, accuracy: no item is in all of"):
        main([str(a), str(c), "--common"])


def test_compare_rejects_other_candidates(tmp_path, capsys):
    a, b = evaluation(tmp_path / "a"), evaluation(tmp_path / "b", candidates="other")
    with pytest.raises(ValueError, match="questions: different candidate answers, 1, 5 of them"):
        main([str(a), str(b)])
    main([str(a), str(b), "--common"])
    assert "questions: other candidates: 1 | 5" in capsys.readouterr().out


def test_compare_names_what_it_cannot_read(tmp_path):
    a = evaluation(tmp_path / "a")
    other = evaluation(tmp_path / "other", name="answers")
    with pytest.raises(ValueError, match="no score is in all evaluations.*questions.*answers"):
        main([str(a), str(other)])
    with pytest.raises(ValueError, match="--tasks: not in all evaluations: x"):
        main([str(a), str(a), "--tasks", "x"])
    assert len(main([str(a), str(a), "--tasks", "questions"])) == 3
    with pytest.raises(FileNotFoundError, match="nothing: no results.json. Run eval.evaluate"):
        main([str(a), str(tmp_path / "nothing")])
    stale = evaluation(tmp_path / "stale")
    evaluation(tmp_path / "new", flipped(20))
    shutil.copy(tmp_path / "new" / "results.json", stale)
    with pytest.raises(ValueError, match=f"{FILE} and results.json are of two evaluations"):
        main([str(a), str(stale)])
    (stale / FILE).write_text('{"benchmark": "questions", "item": "x"}\n')
    with pytest.raises(ValueError, match=rf"{FILE}:1: not an item \(KeyError\('cluster'\)\)"):
        main([str(a), str(stale)])
    (stale / FILE).unlink()  # as of an evaluation before items were written
    with pytest.raises(FileNotFoundError, match=f"stale: no {FILE}. Run eval.evaluate"):
        main([str(a), str(stale)])


@pytest.mark.parametrize("arguments", [["a"], ["a", "b", "c"], ["--a", "a"], ["a", "--b", "b"]])
def test_compare_asks_for_two_evaluations(arguments, capsys):
    with pytest.raises(SystemExit):
        main(arguments)
    assert "give two folders, A and B, or the seeds of each" in capsys.readouterr().err


# -- names of items ------------------------------------------------------------------------


def names(rows: list[dict], texts: list[str]) -> list[str]:
    count = len(rows)
    clips = [[row] for row in rows]
    return Items(clips, [[text] for text in texts], np.zeros(count, int), {}, []).names()


def test_item_names_depend_on_contents_and_texts_only(tmp_path):
    for name, content in (("a.png", b"one"), ("moved.png", b"one"), ("b.png", b"two")):
        (tmp_path / name).write_bytes(content)
    rows = [{"image": str(tmp_path / name)} for name in ("a.png", "moved.png", "b.png")]
    [a], [moved], [other] = (names([row], ["what?"]) for row in rows)
    assert a == moved != other
    [asked] = names(rows[:1], ["where?"])
    [part] = names([{"video": rows[0]["image"], "start": 1.0}], ["what?"])
    assert len({a, other, asked, part}) == 4
    assert names(rows, ["what?"] * 3) == [a, f"{a}#2", other]  # copies are counted


def test_item_names_of_several_clips_do_not_depend_on_their_order():
    one, two = {"image": b"one"}, {"image": b"two"}
    [forward], [backward] = (
        Items([rows], [["t"]], np.zeros(1, int), {}, []).names()
        for rows in ([one, two], [two, one])
    )
    assert forward == backward


def test_write_items_writes_one_line_per_item(tmp_path):
    scores = {"CIDEr": np.array([1.0, 0.123456789])}
    items = Items([[{"image": b"x"}]] * 2, [["a"], ["ä"]], np.array([0, 0]), scores, ["é", "b"])
    write_items(tmp_path / FILE, "first", [items], append=False)
    write_items(tmp_path / FILE, "second", [items], append=True)
    lines = (tmp_path / FILE).read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["benchmark"] for line in lines] == ["first"] * 2 + ["second"] * 2
    assert lines[0].endswith('"cluster": 0, "prediction": "é", "scores": {"CIDEr": 1}}')
    assert json.loads(lines[1])["scores"] == {"CIDEr": 0.12345679}
