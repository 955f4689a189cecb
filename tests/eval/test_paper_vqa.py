"""The paper's VQA benchmarks on tiny sets in the published layouts; scores computed by hand."""

import json
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pytest
from sklearn.metrics import accuracy_score, f1_score

from eval.benchmarks import load_benchmarks
from eval.results import TaskResult
from eval.task import Task
from eval.tasks import vqa
from processing import VLJEPAProcessor
from tests.colour_model import HandModel, colour_bytes, write_colour
from tests.tiny import tiny_processor, write_rows

FILE = Path(__file__).parents[2] / "eval/paper/vqa.yaml"
IMAGE = datasets.Image()


@pytest.fixture(scope="module")
def processor() -> VLJEPAProcessor:
    return tiny_processor(num_frames=2)


@pytest.fixture(autouse=True)
def no_shared_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def write_parquet(
    repository: Path, config: str, split: str, columns: dict[str, list], **features: object
) -> None:
    """Write a split as the Hub stores it, and name it in the card of the repository."""
    kinds = datasets.Dataset.from_dict({k: v for k, v in columns.items() if k not in features})
    table = datasets.Dataset.from_dict(
        columns, features=datasets.Features(kinds.features | features)
    )
    folder = "data" if config == "default" else config
    path = repository / folder / f"{split}-00000-of-00001.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    table.to_parquet(path)
    card = repository / "README.md"
    files = f"{{split: {split}, path: {folder}/{split}-*}}"
    entry = f"- config_name: {config}\n  data_files:\n  - {files}\n"
    known = card.read_text().removesuffix("---\n") if card.exists() else "---\nconfigs:\n"
    card.write_text(f"{known}{entry}---\n")


# -- the sets: each writes its files and returns the model's answer to each question -----------

Answers = dict[tuple[str, str], str]


def gqa(data: Path) -> Answers:
    asked = [
        ("q1", "n1", "what colour is it ?", "red"),
        ("q2", "n1", "is it round ?", "yes"),
        ("q3", "n2", "what colour is it ?", "blue"),
        ("q4", "n2", "who is it ?", "teddy bear"),  # no training question has this answer
        ("q5", "n9", "who is it ?", "red"),  # no image has this id
    ]
    repository = data / "lmms-lab/GQA"
    names = ("id", "imageId", "question", "answer")
    columns = dict(zip(names, map(list, zip(*asked, strict=True)), strict=True))
    extra = {"isBalanced": [True] * 5, "fullAnswer": ["It is so."] * 5}
    write_parquet(repository, "testdev_balanced_instructions", "testdev", columns | extra)
    images = {"id": ["n1", "n2"], "image": [colour_bytes("red"), colour_bytes("blue")]}
    write_parquet(repository, "testdev_balanced_images", "testdev", images, image=IMAGE)
    train = {
        "id": ["t1", "t2", "t3", "t4", "t5"],
        "imageId": ["m1"] * 5,
        "question": [
            "what colour is it ?",
            "what colour is it ?",
            "is it round ?",
            "and ?",
            "or ?",
        ],
        "answer": ["blue", "blue", "yes", "no", "red"],
    }
    write_parquet(repository, "train_balanced_instructions", "train", train)
    return {
        ("red", "what colour is it ?"): "red",
        ("red", "is it round ?"): "no",
        ("blue", "what colour is it ?"): "blue",
        ("blue", "who is it ?"): "red",
    }


def tallyqa(data: Path) -> Answers:
    def qa(question: str, answer: int, is_simple: bool) -> dict:
        return {"question": question, "answer": answer, "is_simple": is_simple}

    columns = {
        "image": [colour_bytes("red"), colour_bytes("blue")],
        "qa": [
            [qa("how many dogs ?", 2, True), qa("how many dogs sit ?", 1, False)],
            [qa("how many cats ?", 12, True)],
        ],
    }
    write_parquet(data / "vikhyatk/tallyqa-test", "default", "test", columns, image=IMAGE)
    return {
        ("red", "how many dogs ?"): "2",
        ("red", "how many dogs sit ?"): "3",
        ("blue", "how many cats ?"): "12",
    }


# Category, colour of the image, truth and the model's answer
POPE = [
    ("random", "red", "yes", "yes"),
    ("random", "green", "yes", "no"),
    ("random", "blue", "no", "no"),
    ("random", "black", "no", "no"),
    ("popular", "red", "yes", "no"),
    ("popular", "green", "no", "yes"),
    ("adversarial", "red", "yes", "yes"),
    ("adversarial", "green", "no", "no"),
]


def pope(data: Path) -> Answers:
    categories, colours, truths, answers = zip(*POPE, strict=True)
    questions = [f"is there a {category} dog in the image?" for category in categories]
    columns = {
        "id": [str(number) for number in range(8)],
        "question_id": ["1", "2", "3", "4", "1", "2", "1", "2"],
        "question": questions,
        "answer": list(truths),
        "image_source": [f"COCO_val2014_{number:012d}" for number in range(8)],
        "image": [colour_bytes(colour) for colour in colours],
        "category": list(categories),
    }
    write_parquet(data / "lmms-lab/POPE", "default", "test", columns, image=IMAGE)
    return dict(zip(zip(colours, questions, strict=True), answers, strict=True))


def popev2(data: Path, labels: tuple = ("yes", "no")) -> Answers:
    columns = {
        "example_id": [0, 1],
        "image_id": [139, 285],
        "normal_image": [colour_bytes("red"), colour_bytes("green")],
        "counterfactual_image": [colour_bytes("blue"), colour_bytes("black")],
        "target_object": ["dog", "cat"],
        "question": ["is there a dog ?", "is there a cat ?"],
        "normal_label": [labels[0]] * 2,
        "counterfactual_label": [labels[1]] * 2,
    }
    images = dict.fromkeys(("normal_image", "counterfactual_image"), IMAGE)
    write_parquet(data / "Monosail/POPEv2", "default", "test", columns, **images)
    return {
        ("red", "is there a dog ?"): "yes",
        ("blue", "is there a dog ?"): "yes",  # wrong
        ("green", "is there a cat ?"): "yes",
        ("black", "is there a cat ?"): "no",
    }


def clevr(data: Path) -> Answers:
    def question(number: int, text: str, answer: str) -> dict:
        return {
            "image_index": number,
            "program": [{"inputs": [], "function": "scene", "value_inputs": []}],
            "question_index": number,
            "image_filename": f"CLEVR_val_{number:06d}.png",
            "question_family_index": 2,
            "split": "val",
            "answer": answer,
            "question": text,
        }

    root = data / "CLEVR_v1.0"
    write_colour(root / "images/val/CLEVR_val_000000.png", "red")
    write_colour(root / "images/val/CLEVR_val_000001.png", "blue")
    asked = [
        question(0, "What number of cubes are there?", "2"),
        question(1, "Is there a cube?", "no"),
        question(1, "What color is the cube?", "gray"),
        question(7, "Is there a cube?", "no"),  # its image is missing
    ]
    (root / "questions").mkdir()
    content = json.dumps({"info": {"split": "val", "license": "CC BY 4.0"}, "questions": asked})
    (root / "questions/CLEVR_val_questions.json").write_text(content)
    return {
        ("red", "What number of cubes are there?"): "2",
        ("blue", "Is there a cube?"): "yes",
        ("blue", "What color is the cube?"): "gray",
    }


def measure(
    name: str, data: Path, processor: VLJEPAProcessor, answers: Answers, **vectors: list[float]
) -> TaskResult:
    """Measure an entry of the paper with a model that gives these answers."""
    [benchmark] = load_benchmarks(FILE, [name], data)
    texts = benchmark.given_candidates() or sorted({"yes", "no", "red", "blue"})
    table = {text: np.eye(len(texts))[index].tolist() for index, text in enumerate(texts)}
    return vqa.evaluate(Task(HandModel(processor, table | vectors, answers), processor, benchmark))


# -- scores --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "title", "scores", "by_type", "facts", "skipped"),
    [
        (
            gqa,
            "GQA (4 of 12,578",
            {"accuracy": 2 / 4},
            {},
            {"candidates": 4, "answers_not_among_candidates": 1, "answers": "exact"},
            ["no example whose id is 'n9'"],
        ),
        (
            tallyqa,
            "TallyQA (3 of 38,589",
            {"accuracy": 2 / 3},  # the mean of 2 simple and 1 complex question, weighted
            {"simple": 1.0, "complex": 0.0},
            {"candidates": 16, "answers": "number", "answers_not_among_candidates": 0},
            [],
        ),
        (
            pope,
            "POPE (8 of 9,000",
            {
                "accuracy": 5 / 8,
                "mean accuracy of types": (3 / 4 + 0 + 1) / 3,
                # Hits 1, 0 and 1; found and true positives together 3, 2 and 2
                "F1": 2 * 2 / (3 + 2 + 2),
                "mean F1 of types": (2 / 3 + 0 + 1) / 3,
            },
            {"random": 3 / 4, "popular": 0.0, "adversarial": 1.0},
            {"candidates": 2, "answers": "yes_no"},
            [],
        ),
        (
            popev2,
            "POPEv2 (4 of 1,000",
            {"accuracy": 3 / 4, "pairs": 1 / 2, "F1": 2 * 2 / (3 + 2)},
            {"normal": 1.0, "counterfactual": 1 / 2},
            {"cluster": "pair of questions", "clusters": "2"},
            [],
        ),
        (
            clevr,
            "CLEVR (3",
            {"accuracy": 2 / 3},
            {},
            {"candidates": 28},
            ["CLEVR_val_000007.png"],
        ),
    ],
)
def test_vqa_entry_of_the_paper_scores_its_published_layout(
    tmp_path, processor, make, title, scores, by_type, facts, skipped
):
    answers = make(tmp_path)
    result = measure(make.__name__, tmp_path, processor, answers)
    assert result.title.startswith(title)
    assert {name: score.value for name, score in result.scores.items()} == pytest.approx(scores)
    found = {name: score.value for name, score in result.by_type.items() if name != "untyped"}
    assert found == pytest.approx(by_type)
    assert facts.items() <= result.protocol.items()
    assert len(result.skipped) == len(skipped)
    assert all(text in line for text, line in zip(skipped, result.skipped, strict=True))
    assert result.paper["metric"] in result.scores


def test_vqa_baselines_learn_from_the_training_split_or_the_rows(tmp_path, processor):
    learned = measure("gqa", tmp_path, processor, gqa(tmp_path)).scores["accuracy"].baselines
    # Three of four answers are among four candidates. "blue", the most common training answer, is
    # right once; the questions' own give "blue", "yes", "blue", and "blue" again for a new one.
    expected = {"chance": 3 / 16, "majority": 1 / 4, "question only": 2 / 4}
    assert learned == pytest.approx(expected)
    result = measure("popev2", tmp_path, processor, popev2(tmp_path))
    assert result.scores["accuracy"].baselines == pytest.approx({"chance": 0.5, "majority": 0.5})
    # Half of a random model's pairs are half right: a quarter has both.
    assert result.scores["pairs"].baselines == pytest.approx({"chance": 0.25, "majority": 0})
    assert result.comparisons == {}


def test_popev2_reads_labels_that_are_numbers(tmp_path, processor):
    result = measure("popev2", tmp_path, processor, popev2(tmp_path, labels=(1, 0)))
    assert (result.scores["accuracy"].value, result.skipped) == (3 / 4, [])


def test_pope_scores_equal_those_of_scikit_learn(tmp_path, processor):
    result = measure("pope", tmp_path, processor, pope(tmp_path))
    _, _, truths, answers = zip(*POPE, strict=True)
    assert result.scores["accuracy"].value == pytest.approx(accuracy_score(truths, answers))
    assert result.scores["F1"].value == pytest.approx(f1_score(truths, answers, pos_label="yes"))
    for category in ("random", "popular", "adversarial"):
        rows = [row for row in POPE if row[0] == category]
        truth, answer = [row[2] for row in rows], [row[3] for row in rows]
        assert result.numbers[f"{category} F1"] == pytest.approx(
            f1_score(truth, answer, pos_label="yes"), abs=1e-4
        )
        share = answer.count("yes") / len(answer)
        assert result.numbers[f"{category} share of yes"] == pytest.approx(share, abs=1e-4)
    assert result.items[0].predictions == list(answers)


# -- faults --------------------------------------------------------------------------------


def edit(path: Path, change: Callable[[dict], dict]) -> None:
    """Change the columns of a table."""
    table = datasets.Dataset.from_parquet(str(path), cache_dir=str(path.parent / "edit"))
    plain = change(table.cast_column("image", datasets.Image(decode=False)).to_dict())
    kinds = {name: table.features.get(name, datasets.Value("string")) for name in plain}
    datasets.Dataset.from_dict(plain, features=datasets.Features(kinds)).to_parquet(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda columns: {("reply" if k == "answer" else k): v for k, v in columns.items()},
            "pope: .*'answer'.*'reply'",
        ),
        (
            lambda columns: columns | {"answer": ["maybe", *columns["answer"][1:]]},
            "pope: row 1: 'maybe' is not yes or no",
        ),
        (
            lambda columns: columns | {"question_id": ["1"] * 8},
            "pope: ids that occur more than once: random 1, popular 1, adversarial 1",
        ),
        (lambda columns: {name: [] for name in columns}, "pope: lmms-lab/POPE: .* no data"),
    ],
)
def test_vqa_entry_of_the_paper_names_what_is_wrong(tmp_path, processor, change, message):
    answers = pope(tmp_path)
    edit(tmp_path / "lmms-lab/POPE/data/test-00000-of-00001.parquet", change)
    with pytest.raises(ValueError, match=message):
        measure("pope", tmp_path, processor, answers)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda root: next((root / "questions").iterdir()).write_text('{"questions": []}'),
            "clevr: no row can be measured: .*: there is no example",
        ),
        (
            lambda root: [path.unlink() for path in (root / "images/val").iterdir()],
            "clevr: no row can be measured: .*: 4 of 4 are unusable.*CLEVR_val_000000.png",
        ),
    ],
)
def test_vqa_entry_of_the_paper_rejects_an_empty_pool(tmp_path, processor, change, message):
    answers = clevr(tmp_path)
    change(tmp_path / "CLEVR_v1.0")
    with pytest.raises(ValueError, match=message):
        measure("clevr", tmp_path, processor, answers)


def test_vqa_leaves_a_pair_out_of_which_one_image_is_missing(tmp_path, processor):
    colours = {"red": "a", "blue": "a", "green": "b", "black": "b"}
    rows = [
        {
            "image": write_colour(tmp_path / f"{colour}.png", colour).name,
            "query": "is it ?",
            "target": "yes",
            "pair": pair,
        }
        for colour, pair in colours.items()
    ]
    (tmp_path / "black.png").unlink()
    path = write_rows(tmp_path / "rows.jsonl", rows)
    benchmark = vqa.VQABenchmark("v", "vqa", path, "", candidates=["yes", "no"])
    answers = {(colour, "is it ?"): "yes" for colour in colours}
    model = HandModel(processor, {"yes": [1.0, 0], "no": [0, 1.0]}, answers)
    result = vqa.evaluate(Task(model, processor, benchmark))
    assert (result.scores["accuracy"].n, result.scores["pairs"].n) == (3, 1)
    assert [len(items.clips) for items in result.items] == [3, 1]
    (tmp_path / "blue.png").unlink()
    assert "pairs" not in vqa.evaluate(Task(model, processor, benchmark)).scores


def test_vqa_names_a_clip_whose_prediction_is_not_a_number(tmp_path, processor):
    answers = popev2(tmp_path) | {("blue", "is there a dog ?"): [float("nan"), 0.0]}
    with pytest.raises(ValueError, match="NaN"):
        measure("popev2", tmp_path, processor, answers)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({}, "v: a vqa benchmark needs train_rows, train_source, candidates or candidates_file"),
        (
            {"candidates": ["1", "one"], "answers": "number"},
            "v: candidates, as number, .* twice: 1",
        ),
        ({"candidates": ["1", "few"], "answers": "number"}, "v: candidates: 'few' is not a whole"),
        ({"candidates": ["1"], "answers": "best"}, "v: answers is 'best', must be one of exact"),
        ({"candidates": ["1"], "positive": "yes"}, "v: positive is 'yes', .* candidates: 1"),
    ],
)
def test_vqa_benchmark_names_wrong_answers(tmp_path, processor, keys, message):
    write_colour(tmp_path / "red.png", "red")
    rows = [{"image": "red.png", "query": "how many ?", "target": "1"}]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    with pytest.raises(ValueError, match=message):
        benchmark = vqa.VQABenchmark("v", "vqa", path, "", **keys)
        vqa.evaluate(Task(HandModel(processor, {"1": [1.0]}), processor, benchmark))
