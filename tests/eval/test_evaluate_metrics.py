"""Metrics of the evaluate library: equal to the plain functions and to independent computations."""

import random
import sys
from pathlib import Path

import evaluate
import numpy as np
import pytest
import torch
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator
from sklearn.metrics import accuracy_score, precision_recall_fscore_support, top_k_accuracy_score

from eval import metrics
from tests.test_layout import imports, tracked

ROOT = Path(__file__).parents[2]
NAMES = sorted(path.parent.name for path in (ROOT / "eval" / "metrics").glob("*/*.py"))
# Without ties, which scikit-learn and sentence-transformers order as the sort does
SIMILARITY = np.random.default_rng(0).permutation(20 * 12).reshape(20, 12) / 240
RELEVANT = [sorted({row % 12, (5 * row + 1) % 12}) for row in range(20)]
POSITIVE = [row % 3 == 0 for row in range(20)]
FOUND = [row % 4 == 0 for row in range(20)]


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Load a metric by the path that the documents give, in the root of a clone."""
    monkeypatch.chdir(ROOT)
    return lambda name: evaluate.load(f"eval/metrics/{name}", cache_dir=str(tmp_path))


WORDS = "a the man woman dog red blue ball box rides opens kicks to in on street room"


def sentences(count: int, seed: int) -> list[str]:
    words = WORDS.split()
    rng = random.Random(seed)
    return [" ".join(rng.choices(words, k=rng.randint(1, 12))) for _ in range(count)]


CAPTIONS = sentences(20, seed=0)
REFERENCES = [sentences(3, seed) for seed in range(1, 21)]
REFERENCES[0] = [CAPTIONS[0]]
REFERENCES[1].append(CAPTIONS[1])
# pycocoevalcap 1.2 (`Cider().compute_score`) gave these captions this mean; its package is not a
# dependency of the tests: 104 MB, and it installs pycocotools.
PYCOCOEVALCAP = 0.9823010581203002


def by_sentence_transformers() -> dict[str, dict[int, float]]:
    evaluator = InformationRetrievalEvaluator(
        {str(row): "" for row in range(20)},
        {str(column): "" for column in range(12)},
        {str(row): set(map(str, indices)) for row, indices in enumerate(RELEVANT)},
        accuracy_at_k=[1, 5, 10],
        ndcg_at_k=[5, 10],
    )
    return evaluator.compute_metrics(
        [
            [{"corpus_id": str(column), "score": value} for column, value in enumerate(row)]
            for row in SIMILARITY
        ]
    )


def ranks_in_a_loop() -> list[int]:
    orders = [sorted(range(12), key=lambda index: -row[index]) for row in SIMILARITY]
    pairs = zip(orders, RELEVANT, strict=True)
    return [1 + min(map(order.index, indices)) for order, indices in pairs]


def expected_ranking() -> dict[str, dict[str, float]]:
    """Results on SIMILARITY by other libraries and by loops."""
    found, ranks = by_sentence_transformers(), ranks_in_a_loop()
    return {
        "recall_at_k": {f"recall_at_{k}": value for k, value in found["accuracy@k"].items()},
        "ndcg": {f"ndcg_at_{k}": value for k, value in found["ndcg@k"].items()},
        "rank_statistics": {"median_rank": np.median(ranks), "mean_rank": np.mean(ranks)},
    }


@pytest.mark.parametrize(
    ("name", "options"), [("recall_at_k", {}), ("ndcg", {"k": [5, 10]}), ("rank_statistics", {})]
)
def test_evaluate_metrics_of_ranking_equal_other_libraries(load, name, options):
    found = load(name).compute(predictions=SIMILARITY, references=RELEVANT, **options)
    assert found == pytest.approx(expected_ranking()[name])


def test_evaluate_metric_of_accuracy_equals_that_of_scikit_learn(load):
    truth = [indices[0] for indices in RELEVANT]
    found = load("top_k_accuracy").compute(predictions=SIMILARITY, references=truth, k=[1, 5])
    expected = {
        f"top_{k}_accuracy": top_k_accuracy_score(truth, SIMILARITY, k=k, labels=range(12))
        for k in (1, 5)
    }
    assert found == pytest.approx(expected)


def test_evaluate_metric_of_accuracy_counts_a_missing_candidate_as_wrong(load):
    given = {"predictions": SIMILARITY[:2], "references": [-1, 0]}
    found = load("top_k_accuracy").compute(**given, k=[12, 13])  # 12 candidates
    assert found == {"top_12_accuracy": 1 / 2, "top_13_accuracy": 1 / 2}


def test_evaluate_metric_of_recall_counts_a_query_without_a_candidate_as_missed(load):
    found = load("recall_at_k").compute(
        predictions=SIMILARITY[:2], references=[[], [0]], k=[12, 13]
    )
    assert found == {"recall_at_12": 1 / 2, "recall_at_13": 1 / 2}


def test_evaluate_metric_class_mean_recall_equals_a_loop(load):
    truth = [row * row % 5 for row in range(20)]  # 4, 8 and 8 rows of three classes
    found = load("class_mean_recall").compute(predictions=SIMILARITY, references=truth, k=[3, 5])
    for k in (3, 5):
        shares = []
        for each in sorted(set(truth)):
            rows = [row for row, label in enumerate(truth) if label == each]
            hits = [each in np.argsort(-SIMILARITY[row])[:k] for row in rows]
            shares.append(sum(hits) / len(hits))
        assert found[f"class_mean_recall_at_{k}"] == pytest.approx(sum(shares) / 3)
        assert len(set(shares)) > 1  # the mean over rows is another number


def test_evaluate_metric_hard_negatives_by_hand(load):
    triplets = {
        (0.9, 0.5, 0.5): True,
        (0.9, 0.95, 0.5): False,
        (0.9, 0.5, 0.95): False,
        (0.9, 0.9, 0.5): False,  # a tie
        (0.9, 0.5, float("nan")): False,
    }
    parts = ["swap", "swap", "replace", "replace", "replace"]
    found = load("hard_negatives").compute(predictions=[*triplets], references=parts)
    expected = {"accuracy": 1 / 5, "mean_accuracy_of_parts": (1 / 2 + 0) / 2}
    assert found == pytest.approx(expected)
    hits = metrics.hard_negative_hits(*torch.tensor([*triplets]).T)
    assert hits.tolist() == [*triplets.values()]


def test_evaluate_metric_of_f1_equals_that_of_scikit_learn(load):
    found = load("precision_recall_f1").compute(predictions=FOUND, references=POSITIVE)
    precision, recall, f1, _ = precision_recall_fscore_support(POSITIVE, FOUND, average="binary")
    expected = {"precision": precision, "recall": recall, "f1": f1}
    assert found == pytest.approx(expected | {"accuracy": accuracy_score(POSITIVE, FOUND)})


def test_evaluate_metric_cider_equals_that_of_pycocoevalcap(load):
    found = load("cider").compute(predictions=CAPTIONS, references=REFERENCES, per_row=True)
    assert found["cider"] == pytest.approx(PYCOCOEVALCAP)
    assert found["per_row"] == pytest.approx(metrics.cider(CAPTIONS, REFERENCES).tolist())


def test_cider_of_each_row_equals_that_of_pycocoevalcap():
    module = pytest.importorskip("pycocoevalcap.cider.cider", reason="needs pycocoevalcap")
    mean, rows = module.Cider().compute_score(
        dict(enumerate(REFERENCES)), {row: [text] for row, text in enumerate(CAPTIONS)}
    )
    assert metrics.cider(CAPTIONS, REFERENCES).tolist() == pytest.approx(list(rows))
    assert mean == pytest.approx(PYCOCOEVALCAP)


def test_evaluate_metrics_of_texts_take_the_best_reference(load):
    given = {
        "predictions": ["The red ball.", "blue box"],
        "references": [["a door", "the red ball"], ["blue door"]],
    }
    assert load("exact_match").compute(**given) == {"exact_match": 1 / 2}
    assert load("token_f1").compute(**given) == pytest.approx({"token_f1": (1 + 1 / 2) / 2})


def test_evaluate_metric_collects_batches(load):
    metric = load("recall_at_k")
    for start in (0, 7, 14):
        part = slice(start, start + 7)
        metric.add_batch(predictions=SIMILARITY[part], references=RELEVANT[part])
    found = metric.compute()
    whole = load("recall_at_k").compute(predictions=SIMILARITY, references=RELEVANT)
    assert found == pytest.approx(whole)


@pytest.mark.parametrize(
    ("name", "predictions", "references", "options", "words"),
    [
        ("recall_at_k", [], [], {}, "no row was given"),
        ("cider", [], [], {}, "no row was given"),
        ("precision_recall_f1", [], [], {}, "no row was given"),
        ("recall_at_k", [[0.1, 0.2], [0.3]], [[0], [0]], {}, "rows have 1 to 2 similarities"),
        ("ndcg", [[0.1, 0.2]], [[2]], {}, "row 0 has candidate 2; indices are 0 to 1"),
        ("top_k_accuracy", [[0.1, 0.2]], [-2], {}, "row 0 has candidate -2"),
        ("class_mean_recall", [[0.1, 0.2]], [-1], {}, "row 0 has candidate -1"),
        ("hard_negatives", [[0.1, 0.2]], ["all"], {}, "don't match the expected format"),
        ("recall_at_k", [[0.1, 0.2]], [[0]], {"k": 0}, "k is 0"),
        ("recall_at_k", [[0.1, 0.2]], [[0]], {"k": 1.5}, "k is 1.5; give whole numbers from 1"),
        ("recall_at_k", [[0.1, 0.2]], [[0]], {"k": True}, "k is True; give whole numbers from 1"),
        ("recall_at_k", [[0.1, 0.2]], [[0]], {"k": []}, "k is empty"),
        # Every text would be true.
        ("precision_recall_f1", ["yes", "no"], ["yes", "yes"], {}, "'yes'"),
        ("precision_recall_f1", [1, 2], [1, 0], {}, "an answer is 2; give True"),
        ("token_f1", ["a", "b"], [["a"], []], {}, "row 1 has none"),
        ("exact_match", ["a"], [["a"], ["b"]], {}, "Mismatch in the number"),
    ],
)
def test_evaluate_metric_names_wrong_input(load, name, predictions, references, options, words):
    with pytest.raises(ValueError, match=words):
        load(name).compute(predictions=predictions, references=references, **options)


@pytest.mark.parametrize("name", NAMES)
def test_evaluate_metric_describes_itself(load, name, monkeypatch):
    # Outside of a clone: the metric loads, and evaluate does not advise `pip install eval`, which
    # is a package of somebody else.
    monkeypatch.setitem(sys.modules, "eval", None)
    metric = load(name)
    assert metric.name == name
    assert metric.description.strip().endswith(".")
    assert metric.citation.strip().startswith("@")
    for part in ("predictions:", "references:", "Returns:"):
        assert part in metric.inputs_description
    features = {"predictions", "references"}
    assert set(metric.features) == features


def test_the_evaluate_library_is_imported_by_its_metrics_only():
    codes = {
        path: path.read_text(encoding="utf-8")
        for path in tracked()
        if path.suffix == ".py" and ROOT / "tests" not in path.parents
    }
    found = {
        path.parent.name
        for path, code in codes.items()
        # The first test is quick, and most files end there.
        if "import evaluate" in code and "evaluate" in {name for name, _ in imports(code)}
    }
    assert found == set(NAMES)
