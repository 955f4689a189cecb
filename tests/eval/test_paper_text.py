"""SugarCrepe++ and VISLA on tiny files in the published layouts; the rule against a table."""

import json
import math
from pathlib import Path

import pytest
import torch

from eval.benchmarks import load_benchmarks
from eval.report import write_report
from eval.results import TaskResult
from eval.task import Task
from eval.tasks import hard_negatives
from eval.tasks.hard_negatives import overlap_is_right, triplet_cosines
from processing import VLJEPAProcessor
from tests.colour_model import HandModel
from tests.tiny import tiny_processor, write_rows

FILE = Path(__file__).parents[2] / "eval/paper/text.yaml"
PARTS = ("replace_att", "replace_obj", "replace_rel", "swap_att", "swap_obj")
# Angle of each text, in degrees: a cosine is that of the difference of two angles.
RIGHT, NEAR_FIRST, NEAR_SECOND, TIE = (0, 10, 40), (0, 30, -10), (0, 30, 40), (0, 10, -10)


@pytest.fixture(scope="module")
def processor() -> VLJEPAProcessor:
    return tiny_processor(num_frames=2)


class Texts(dict):
    """Vectors of texts that end in their angle, such as "a dog 40"."""

    def __missing__(self, text: str) -> list[float]:
        angle = math.radians(float(text.split()[-1]))
        return [math.cos(angle), math.sin(angle)]


def measure(data: Path, processor: VLJEPAProcessor, name: str, file: Path = FILE) -> TaskResult:
    [benchmark] = load_benchmarks(file, [name], data)
    return hard_negatives.evaluate(Task(HandModel(processor, Texts()), processor, benchmark))


# -- the rule ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("angles", "right"),
    [
        # Angles of the first and second positive and of the negative; a row is right if the first
        # two are nearer to each other than either is to the third.
        ((0, 10, 40), True),
        ((0, 10, -40), True),
        ((0, 30, 40), False),  # the second positive is nearer to the negative
        ((0, 30, -10), False),  # so is the first
        ((0, 60, 30), False),  # so are both
        ((0, 0, 0), False),  # a tie is wrong: three equal texts
        ((0, 30, 30), False),  # the negative equals the second positive
        ((0, 10, -10), False),  # a tie of the first positive: 10 and 10 degrees
        ((10, 0, -10), False),  # a tie of the second
        ((0, 0, 30), True),
        ((0, 170, -95), False),  # 170 between the positives, 95 and 95 to the negative
    ],
)
def test_hard_negatives_rule_is_strict_for_both_positives(tmp_path, processor, angles, right):
    first, second, negative = (
        torch.tensor([[math.cos(math.radians(angle)), math.sin(math.radians(angle))]])
        for angle in angles
    )
    own, *others = triplet_cosines(first, second, negative)
    assert own.item() == pytest.approx(math.cos(math.radians(angles[1] - angles[0])), abs=1e-6)
    row = dict(zip(("target", "positive", "negative"), (f"x {a}" for a in angles), strict=True))
    write_rows(tmp_path / "rows.jsonl", [row])
    (tmp_path / "b.yaml").write_text(
        f"t: {{task: hard_negatives, rows: {tmp_path}/rows.jsonl, description: d}}"
    )
    result = measure(tmp_path, processor, "t", tmp_path / "b.yaml")
    assert result.scores["accuracy"].value == right
    assert result.scores["accuracy"].baselines["chance"] == 1 / 3


@pytest.mark.parametrize(
    ("texts", "right"),
    [
        (("a red dog", "a dog, red", "a cat"), True),
        (("a red dog", "one crimson hound", "a red cat"), False),
        (("a dog", "a dog", "a dog"), False),
    ],
)
def test_word_overlap_solves_rows_whose_negative_has_other_words(texts, right):
    row = dict(zip(("target", "positive", "negative"), texts, strict=True))
    assert overlap_is_right(row) == right


# -- the paper's sets ----------------------------------------------------------------------


def texts_of(name: str, angles: tuple[int, int, int]) -> list[str]:
    words = ("a {} sits", "there sits a {}", "a {} stands")
    return [f"{word.format(name)} {angle}" for word, angle in zip(words, angles, strict=True)]


def sugarcrepe_pp(data: Path, **parts: list[tuple]) -> None:
    """Write the five files, by default with one right and one wrong row each."""
    folder = data / "Aman-J/SugarCrepe_pp/data"
    folder.mkdir(parents=True)
    for part in PARTS:
        rows = []
        for number, angles in enumerate(parts.get(part, [RIGHT, TIE])):
            caption, caption2, negative = texts_of(f"{part}{number}", angles)
            rows.append(
                {
                    "id": number,
                    "filename": "000000085329.jpg",
                    "caption": caption,
                    "caption2": caption2,
                    "negative_caption": negative,
                }
            )
        (folder / f"{part}.json").write_text(json.dumps(rows))


GENERIC = ("filename", "caption", "second positive", "negative_caption")
SPATIAL = (
    *("image", "sent1", "sent2", "Best reference (Semantically close)"),
    "Reference-2 (Completely irrelevant)",
)


def visla(data: Path) -> None:
    """Write both files: generic rows of which 2 of 3 are right, and spatial ones, 1 of 4."""
    folder = data / "visla_benchmark/data"
    folder.mkdir(parents=True)
    generic = [
        ["000000460347.jpg", *texts_of(f"bus{number}", angles)]
        for number, angles in enumerate((RIGHT, RIGHT, NEAR_FIRST))
    ]
    # The irrelevant reference is far from both: it would make every row right.
    spatial = [
        [f"{number:012d}.jpg", *texts_of(f"cat{number}", angles), "The oven contains 180"]
        for number, angles in enumerate((RIGHT, NEAR_FIRST, NEAR_SECOND, TIE))
    ]
    for name, rows in (("Generic", [GENERIC, *generic]), ("Spatial", [SPATIAL, *spatial])):
        lines = ["\t".join(row) for row in rows]
        (folder / f"{name}_VISLA.tsv").write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize("reverse", [False, True])
def test_sugarcrepe_pp_scores_parts_their_mean_and_all_samples(tmp_path, processor, reverse):
    rows = {"swap_obj": [RIGHT], "swap_att": [NEAR_FIRST, RIGHT, NEAR_SECOND, TIE]}
    if reverse:
        rows = {part: found[::-1] for part, found in rows.items()}
    sugarcrepe_pp(tmp_path, **rows)
    result = measure(tmp_path, processor, "sugarcrepe_pp")
    # Three parts have 1 of 2, swap_att 1 of 4, swap_obj 1 of 1.
    parts = {name: score.value for name, score in result.by_type.items()}
    assert parts == {**dict.fromkeys(PARTS, 1 / 2), "swap_att": 1 / 4, "swap_obj": 1}
    assert {name: score.value for name, score in result.scores.items()} == pytest.approx(
        {"accuracy": 5 / 11, "mean accuracy of parts": (3 / 2 + 1 / 4 + 1) / 5}
    )
    assert result.title.startswith("SugarCrepe++ (11 of 4,757")
    assert result.protocol["clusters"] == "1"  # all texts are about one image
    assert (result.protocol["rows"], result.protocol["texts"]) == (11, 33)
    assert "frames" not in result.protocol


def test_visla_takes_the_close_reference_of_a_spatial_row_as_the_negative(tmp_path, processor):
    visla(tmp_path)
    result = measure(tmp_path, processor, "visla")
    assert {name: score.value for name, score in result.by_type.items()} == pytest.approx(
        {"generic": 2 / 3, "spatial": 1 / 4}
    )
    assert {name: score.value for name, score in result.scores.items()} == pytest.approx(
        {"accuracy": 3 / 7, "mean accuracy of parts": (2 / 3 + 1 / 4) / 2}
    )
    assert result.title.startswith("VISLA (7 of 1,623")
    assert result.items[0].predictions[:3] == ["positives"] * 2 + ["target and negative"]
    # The report shows right rows first, each text with its cosine: 10 degrees, and 30 of 40 and 30.
    first, last = result.examples[0], result.examples[-1]
    assert [text for text, _ in first.ranked] == ["there sits a bus0 10", "a bus0 stands 40"]
    assert [cosine for _, cosine in first.ranked] == pytest.approx([0.984808, 0.866025])
    assert (first.rank, last.rank, first.truth) == (1, 2, ["there sits a bus0 10"])
    write_report(tmp_path / "report.html", "model", [result], tmp_path / "none.json")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Texts of one meaning and hard negatives" in page and "a bus0 stands 40" in page


@pytest.mark.parametrize("make", [sugarcrepe_pp, visla])
def test_averages_of_the_papers_table_are_those_over_parts(tmp_path, make):
    """Its text states a micro average over samples, which differs by up to 6 points."""
    make(tmp_path)
    [benchmark] = load_benchmarks(FILE, [make.__name__], tmp_path)
    for model, average in benchmark.paper.scores.items():
        parts = [scores[model] for scores in benchmark.paper.parts.values()]
        assert sum(parts) / len(parts) == pytest.approx(average, abs=0.051)


# -- faults --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("caption2", "caption_2", "sugarcrepe_pp: .*'caption2'.*'caption_2'"),
        ('"id": 1', '"id": 0', "sugarcrepe_pp: ids that occur more than once: .*swap_obj 0"),
        ("10", "nan", "the text 'there sits a .* nan': its embedding holds NaN"),
    ],
)
def test_sugarcrepe_pp_names_what_is_wrong(tmp_path, processor, old, new, message):
    sugarcrepe_pp(tmp_path)
    for path in (tmp_path / "Aman-J/SugarCrepe_pp/data").iterdir():
        path.write_text(path.read_text().replace(old, new))
    with pytest.raises(ValueError, match=message):
        measure(tmp_path, processor, "sugarcrepe_pp")


def test_sugarcrepe_pp_counts_and_names_an_unusable_row(tmp_path, processor):
    sugarcrepe_pp(tmp_path)
    path = tmp_path / "Aman-J/SugarCrepe_pp/data/swap_att.json"
    rows = json.loads(path.read_text())
    rows[0]["negative_caption"] = " "
    path.write_text(json.dumps(rows))
    result = measure(tmp_path, processor, "sugarcrepe_pp")
    assert result.title.startswith("SugarCrepe++ (9 of 4,757")
    [skipped] = result.skipped
    assert "negative is not a text but ''" in skipped
