"""Candidate texts: normal forms, files, templates, the cache and ties; values by hand."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score as sklearn_f1

from eval.answers import ANSWERS
from eval.candidates import chosen, embed_candidates, read_candidates, templates_of
from eval.metrics import first_relevant_ranks, precision_recall_f1, relevant_index
from eval.parts import f1_score, mean_of_parts
from eval.results import Score
from eval.task import Task
from eval.tasks import classification
from eval.tasks.classification import ClassificationBenchmark
from processing import VLJEPAProcessor
from tests.colour_model import HandModel, write_colour
from tests.tiny import tiny_processor, write_rows


@pytest.fixture(scope="module")
def processor() -> VLJEPAProcessor:
    return tiny_processor(num_frames=2)


# -- normal forms --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("form", "answer", "normal"),
    [
        ("exact", "A Dog.", "A Dog."),
        ("yes_no", "Yes", "yes"),
        ("yes_no", " no. ", "no"),
        ("yes_no", "True", "yes"),
        ("yes_no", "0", "no"),
        ("yes_no", "maybe", None),
        ("number", "03", "3"),
        ("number", "3.0", "3"),
        ("number", "Twelve", "12"),
        ("number", "3.5", None),
        ("number", "²", None),
        ("number", "many", None),
        # Expected values by the official evaluation of VQA (vqaEval.py)
        ("vqa", "The two Dogs", "2 dogs"),
        ("vqa", "none", "0"),
        ("vqa", "eleven", "eleven"),
        ("vqa", "an apple, a pear", "apple pear"),
        ("vqa", "hot-dog", "hot dog"),  # joined: a space in place of the mark
        ("vqa", "hot- dog", "hot dog"),
        ("vqa", "1,000", "1000"),
        ("vqa", "3.5 p.m.", "3.5 pm"),
        ("vqa", "dont", "don't"),
        ("vqa", "couldnt've", "couldn't've"),
        ("vqa", "its\n\twere", "its were"),
    ],
)
def test_normal_form_of_an_answer_is_the_one_of_its_benchmark(form, answer, normal):
    if normal is not None:
        assert ANSWERS[form](answer) == normal
        return
    with pytest.raises(ValueError, match=f"'{answer}' is not "):
        ANSWERS[form](answer)


# -- files and entries ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "found"),
    [
        ("a.txt", "red\n\n  dark blue \n", ["red", "dark blue"]),
        ("a.json", '["red", "dark blue"]', ["red", "dark blue"]),
        ("A.JSON", '["red", "dark blue"]', ["red", "dark blue"]),
        ("a.json", '{"Pushing something": "0", "Pulling": "1"}', ["Pushing something", "Pulling"]),
        ("a.txt", "", "a.txt is empty"),
        ("a.txt", "red\nred\n", "a.txt holds a text twice: red"),
        ("a.json", "[1]", "a.json holds 1, which is not a text"),
        ("a.json", '["red", " "]', "a.json holds an empty text"),
        ("a.json", '"red"', "a.json: must hold a list of texts, found str"),
        ("a.json", "[", "a.json: not a UTF-8 file of candidates"),
    ],
)
def test_read_candidates_reads_lines_lists_and_keys_and_names_faults(
    tmp_path, name, content, found
):
    path = tmp_path / name
    path.write_text(content)
    if isinstance(found, list):
        assert read_candidates(path) == found
        return
    with pytest.raises(ValueError, match=found):
        read_candidates(path)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"candidates": [True, False]}, "labels: candidates holds True, .* put it in quotes"),
        ({"candidates": []}, "labels: candidates is empty"),
        ({"candidates": ["red", "red"]}, "labels: candidates holds a text twice: red"),
        ({"candidates": ["red"], "candidates_file": Path("a")}, "exclude each other"),
        ({"templates": [3]}, "labels: templates holds 3"),
        ({"templates": ["a {} {}"]}, r"labels: templates holds 'a {} {}': write {} once"),
        ({"templates": ["photo"]}, "or a name of action, image"),
        ({"candidates": ["red"]}, "labels: not among the candidates: blue, green"),
    ],
)
def test_benchmark_names_wrong_candidates_and_templates(data, processor, keys, message):
    with pytest.raises(ValueError, match=message):
        evaluate(data, processor, TEXTS, **keys)


# -- templates and the cache ---------------------------------------------------------------

TEXTS = {"red": [1.0, 0], "green": [0.6, 0.8], "blue": [0, 1.0]}
# "it is blue" is nearer to the red image than "red" is.
TEMPLATED = TEXTS | {"it is red": [0.6, -0.8], "it is green": [0.6, 0.8], "it is blue": [0.8, 0.6]}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rows = [
        {"image": write_colour(tmp_path / f"{colour}.png", colour).name, "target": colour}
        for colour in ("red", "green", "blue")
    ]
    return write_rows(tmp_path / "labels.jsonl", rows)


def evaluate(data: Path, processor: VLJEPAProcessor, texts: dict, **keys: object):
    model = HandModel(processor, texts, {(name, ""): TEXTS[name] for name in TEXTS})
    benchmark = ClassificationBenchmark("labels", "classification", data, "", query="", **keys)
    return classification.evaluate(Task(model, processor, benchmark))


def task_of(model: HandModel, **keys: object) -> Task:
    benchmark = ClassificationBenchmark("labels", "classification", Path("x"), "", **keys)
    return Task(model, model.processor, benchmark)


@pytest.mark.parametrize(
    ("templates", "expected"),
    [
        (["{}"], [[1, 0], [0.6, 0.8], [0, 1]]),
        (["it is {}"], [[0.6, -0.8], [0.6, 0.8], [0.8, 0.6]]),
        # Sums (1.6, -0.8), (1.2, 1.6), (0.8, 1.6), of lengths 1.789, 2 and 1.789
        (["{}", "it is {}"], [[0.8944, -0.4472], [0.6, 0.8], [0.4472, 0.8944]]),
    ],
)
def test_embed_candidates_averages_templates_on_the_sphere(processor, templates, expected):
    task = task_of(HandModel(processor, TEMPLATED))
    found = embed_candidates(task, ["red", "green", "blue"], templates)
    torch.testing.assert_close(found, torch.tensor(expected), atol=1e-4, rtol=0)
    torch.testing.assert_close(found.norm(dim=-1), torch.ones(3))


@pytest.mark.parametrize(
    ("keys", "top", "facts"),
    [
        ({}, 1.0, {"template": "{}", "candidates": 3}),
        # The red image is nearest to "it is blue", the blue one to "it is green".
        ({"templates": ["it is {}"]}, 1 / 3, {"template": "it is {}"}),
        # The mean of "red" and "it is red" is nearest to red again: 0.894 against 0.6 and 0.447.
        ({"templates": ["{}", "it is {}"]}, 1.0, {"templates": 2}),
        (
            {"candidates": ["blue", "green", "red", "cyan", "grey"]},
            2 / 3,  # "cyan" ties with "blue", a tie is wrong
            {"candidates": 5, "candidates_without_rows": "2: cyan, grey"},
        ),
    ],
)
def test_classification_scores_follow_templates_and_candidates(data, processor, keys, top, facts):
    texts = TEMPLATED | {"cyan": [0, 1.0], "grey": [-1.0, 0]}
    result = evaluate(data, processor, texts, **keys)
    assert result.scores["top-1"].value == pytest.approx(top)
    assert facts.items() <= result.protocol.items()


def test_classification_takes_the_template_of_the_model_for_actions_and_others_by_name(processor):
    texts = {text: [1.0] for text in ("do red", "This is a photo of red.")}
    model = HandModel(processor, texts)
    model.config.target_prompts["action"] = "do {}"
    assert templates_of(task_of(model), "do {}") == ["do {}"]
    assert templates_of(task_of(model, templates=["image"]), "") == ["This is a photo of {}."]


def test_embed_candidates_encodes_each_text_once_for_a_model(processor):
    labels = [f"label {number}" for number in range(1000)]
    texts = {label: [math.cos(n), math.sin(n)] for n, label in enumerate(labels)}
    model = HandModel(processor, texts)
    first = embed_candidates(task_of(model), labels, ["{}"])
    again = embed_candidates(task_of(model), labels[::-1], ["{}"])
    assert sorted(model.encoded) == sorted(labels)
    assert torch.equal(first, again.flip(0))
    assert sorted(HandModel(processor, texts).encoded) == []
    other = HandModel(processor, texts)  # another model has a cache of its own
    embed_candidates(task_of(other), labels[:2], ["{}"])
    assert sorted(other.encoded) == labels[:2]


@pytest.mark.parametrize(
    ("vectors", "message"),
    [
        ({"red": [math.nan, 0]}, "the text 'red': its embedding holds NaN"),
        ({"it is red": [-1.0, 0]}, "labels: the templates of 'red' cancel each other out"),
    ],
)
def test_embed_candidates_names_a_text_without_an_embedding(processor, vectors, message):
    task = task_of(HandModel(processor, TEMPLATED | vectors))
    with pytest.raises(ValueError, match=message):
        embed_candidates(task, ["red", "green"], ["{}", "it is {}"])


# -- ties ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cosines", "truth", "answer"),
    [
        ([0.9, 0.5, 0.1], 0, "a"),
        ([0.5, 0.9, 0.1], 0, "b"),
        ([0.9, 0.9, 0.1], 0, "b"),  # a tie with the truth: the wrong one
        ([0.9, 0.9, 0.9], 2, "a"),  # the first of the wrong ones
        ([0.1, 0.9, 0.9], 0, "b"),
        ([0.9, 0.1, 0.1], -1, "a"),  # the truth is not among the candidates
    ],
)
def test_chosen_decides_a_tie_against_the_model_as_its_rank_does(cosines, truth, answer):
    similarity, relevant = torch.tensor([cosines]), relevant_index(torch.tensor([truth]), 3)
    ranks = first_relevant_ranks(similarity, relevant)
    assert chosen(similarity, relevant, ranks, ["a", "b", "c"]) == [answer]
    assert (ranks == 1).item() == (truth >= 0 and answer == "abc"[truth])


# -- means of parts, and F1 ----------------------------------------------------------------


def test_f1_equals_that_of_scikit_learn_and_its_interval_contains_it():
    random = np.random.default_rng(0)
    wanted, found = random.random(300) < 0.5, random.random(300) < 0.6
    parts = [name for name in ("random", "popular", "adversarial") for _ in range(100)]
    expected = [sklearn_f1(wanted[a : a + 100], found[a : a + 100]) for a in (0, 100, 200)]
    score = f1_score(found, wanted, parts, np.arange(300), {"yes": np.full(300, True)})
    assert score.value == pytest.approx(np.mean(expected), abs=1e-12)
    assert score.low < score.value < score.high < score.low + 0.2
    constant = [sklearn_f1(wanted[a : a + 100], np.full(100, True)) for a in (0, 100, 200)]
    assert score.baselines["yes"] == pytest.approx(np.mean(constant))
    whole = f1_score(found, wanted, ["all"] * 300, np.arange(300), {"chance": 0.5})
    assert whole.value == pytest.approx(sklearn_f1(wanted, found), abs=1e-12)
    share = wanted.mean()
    assert whole.baselines["chance"] == pytest.approx(2 * share * 0.5 / (share + 0.5))


@pytest.mark.parametrize(
    ("found", "wanted", "expected"),
    [
        ([1, 1, 0, 0], [1, 0, 1, 0], (1 / 2, 1 / 2, 1 / 2)),
        ([1, 1, 1, 0], [1, 0, 0, 0], (1 / 3, 1, 1 / 2)),
        ([0, 0], [1, 0], (0, 0, 0)),
        ([0, 0], [0, 0], (0, 0, 0)),
    ],
)
def test_precision_recall_f1_by_hand(found, wanted, expected):
    assert precision_recall_f1(found, wanted) == pytest.approx(expected)
    score = f1_score(
        np.array(found) == 1, np.array(wanted) == 1, ["a"] * len(found), np.arange(len(found)), {}
    )
    assert score.value == pytest.approx(expected[2])
    assert 0 <= score.low <= score.value <= score.high <= 1


def test_mean_of_parts_counts_each_part_the_same():
    values, parts = np.array([1.0, 0, 0, 0, 1]), ["a", "a", "a", "a", "b"]
    clusters = np.arange(5)
    by_part = {
        "a": Score.of(values[:4], clusters[:4], {"chance": 0.5}),
        "b": Score.of(values[4:], clusters[4:], {"chance": 0.1}),
    }
    score = mean_of_parts(by_part, values, parts, clusters)
    assert score.value == pytest.approx((1 / 4 + 1) / 2)
    assert score.baselines["chance"] == pytest.approx(0.3)
    assert score.n == 5 and 0 <= score.low < score.value <= score.high <= 1
    whole = mean_of_parts({"a": by_part["b"]}, values[4:], ["a"], clusters[4:])
    assert (whole.value, whole.high) == (1, 1)
