"""Metrics: expected values were computed by hand, or by pycocoevalcap where a test names it."""

import math

import pytest
import torch
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator

from eval import metrics
from eval.metrics import (
    chance_ndcg,
    chance_recall,
    cider,
    cosines,
    exact_match,
    first_relevant_ranks,
    ndcg,
    relevant_index,
    relevant_ranks,
    token_f1,
    wilson,
    words,
)

NAN = float("nan")


def test_cosines_of_equal_vectors_are_equal_in_every_position():
    vectors = torch.nn.functional.normalize(
        torch.randn(4, 24, generator=torch.Generator().manual_seed(0)), dim=1
    )
    embeds, others = vectors[[0, 1, 0, 1, 0, 1, 0]], vectors[[2, 3, 2, 3, 2, 3, 2, 3, 2]]
    found = cosines(embeds, others)
    assert torch.allclose(found, embeds @ others.T, atol=1e-6)
    assert all(len(found[row::2, column::2].unique()) == 1 for row in (0, 1) for column in (0, 1))
    assert torch.equal(cosines(vectors, vectors), vectors @ vectors.T)  # none equal


def test_cosines_under_autocast_tell_apart_what_bf16_does_not():
    embeds = torch.nn.functional.normalize(torch.tensor([[1.0, 1.0], [1.0, 1.002]]), dim=1)
    other = embeds[1:]
    with torch.autocast("cpu", torch.bfloat16):
        rounded = embeds @ other.T
        found = cosines(embeds, other)
    assert rounded.dtype == torch.bfloat16 and rounded[0] == rounded[1]  # what it must not do
    assert found.dtype == torch.float32 and found[0] < found[1]


def test_ranks_count_the_better_candidates():
    similarity = torch.tensor([[0.9, 0.1, 0.5], [0.9, 0.1, 0.5], [0.9, 0.1, 0.5]])
    assert first_relevant_ranks(similarity, torch.eye(3).bool()).tolist() == [1, 3, 2]


def test_ranks_use_the_best_of_several_relevant_candidates():
    similarity = torch.tensor([[0.9, 0.8, 0.7, 0.6]])
    assert first_relevant_ranks(similarity, torch.tensor([[False, True, True, False]])) == 2
    assert first_relevant_ranks(similarity, torch.tensor([[True, True, False, False]])) == 1
    # A relevant candidate never lowers the rank of another one, not even in a tie.
    assert first_relevant_ranks(torch.ones(1, 3), torch.tensor([[True, True, False]])) == 2
    assert first_relevant_ranks(torch.ones(1, 3), torch.ones(1, 3).bool()) == 1


@pytest.mark.parametrize("score", [0.0, 1.0, NAN])
def test_ranks_of_a_collapsed_model_are_last(score):
    ranks = first_relevant_ranks(torch.full((4, 4), score), torch.eye(4).bool())
    assert ranks.tolist() == [4, 4, 4, 4]


def test_ranks_treat_nan_as_the_worst_score():
    similarity = torch.tensor([[NAN, 0.2, 0.1]])
    assert first_relevant_ranks(similarity, torch.tensor([[True, False, False]])) == 3
    assert first_relevant_ranks(similarity, torch.tensor([[False, True, False]])) == 2


def test_ranks_of_a_row_without_a_relevant_candidate_are_last():
    relevant = relevant_index(torch.tensor([-1, 1]), candidates=3)
    assert relevant.tolist() == [[False] * 3, [False, True, False]]
    assert first_relevant_ranks(torch.tensor([[1.0, 2.0, 3.0]] * 2), relevant).tolist() == [4, 2]


def test_chance_recall_is_k_of_the_pool_for_one_relevant_candidate():
    assert chance_recall(torch.eye(20).bool(), 1) == pytest.approx(1 / 20)
    assert chance_recall(torch.eye(20).bool(), 5) == pytest.approx(5 / 20)
    assert chance_recall(torch.eye(4).bool(), 10) == 1


def test_chance_recall_of_several_or_no_relevant_candidates():
    # Two relevant of four, one draw: 2/4. Two draws: 1 - (2/4)(1/3) = 5/6.
    relevant = torch.tensor([[True, True, False, False]])
    assert chance_recall(relevant, 1) == pytest.approx(1 / 2)
    assert chance_recall(relevant, 2) == pytest.approx(5 / 6)
    # The mean over rows of 1/4, 2/4 and 0.
    relevant = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0]]).bool()
    assert chance_recall(relevant, 1) == pytest.approx(1 / 4)


def test_chance_recall_is_that_of_random_scores():
    generator = torch.Generator().manual_seed(0)
    relevant = (torch.rand(1, 12, generator=generator) < 0.3).repeat(20000, 1)
    ranks = first_relevant_ranks(torch.rand(20000, 12, generator=generator), relevant)
    measured = (ranks <= 2).float().mean().item()
    assert chance_recall(relevant, 2) == pytest.approx(measured, abs=0.01)


def test_relevant_ranks_and_ndcg_by_hand():
    similarity = torch.tensor([[0.9, 0.8, 0.8, 0.1], [0.9, 0.8, 0.7, 0.6], [0.5] * 4, [0.5] * 4])
    relevant = torch.tensor([[0, 1, 0, 1], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]]).bool()
    # First row: candidate 2 is wrong and ties with candidate 1, so it is ahead of it.
    assert relevant_ranks(similarity, relevant, 2).tolist() == [[3, 4], [1, 2], [4, 5], [5, 5]]
    best = 1 + 1 / math.log2(3)
    expected = [(1 / 2 + 1 / math.log2(5)) / best, 1.0, 1 / math.log2(5), 0.0]
    assert ndcg(similarity, relevant).tolist() == pytest.approx(expected)
    assert ndcg(similarity, relevant, 3).tolist() == pytest.approx([1 / 2 / best, 1.0, 0.0, 0.0])


@pytest.mark.parametrize("at_once", [metrics.AT_ONCE, 100], ids=["all rows", "three rows"])
def test_ndcg_and_recall_equal_those_of_sentence_transformers(monkeypatch, at_once):
    """Without ties, which its evaluator orders by the candidates' names."""
    monkeypatch.setattr(metrics, "AT_ONCE", at_once)
    generator = torch.Generator().manual_seed(0)
    similarity = torch.rand(40, 30, generator=generator)
    relevant = torch.rand(40, 30, generator=generator) < 0.2
    relevant[:, 0] |= ~relevant.any(dim=1)
    evaluator = InformationRetrievalEvaluator(
        queries={str(row): "" for row in range(40)},
        corpus={str(column): "" for column in range(30)},
        relevant_docs={
            str(row): {str(column) for column in marks.nonzero().flatten().tolist()}
            for row, marks in enumerate(relevant)
        },
        accuracy_at_k=[1, 5, 10],
        ndcg_at_k=[3, 10],
    )
    found = evaluator.compute_metrics(
        [
            [{"corpus_id": str(column), "score": value} for column, value in enumerate(row)]
            for row in similarity.tolist()
        ]
    )
    ranks = first_relevant_ranks(similarity, relevant)
    for k, value in found["accuracy@k"].items():
        assert (ranks <= k).double().mean().item() == pytest.approx(value)
    for k, value in found["ndcg@k"].items():
        assert ndcg(similarity, relevant, k).mean().item() == pytest.approx(value)


def test_chance_ndcg_is_that_of_random_scores():
    generator = torch.Generator().manual_seed(0)
    relevant = torch.rand(4, 12, generator=generator) < 0.3
    measured = ndcg(torch.rand(20000, 12, generator=generator), relevant.repeat(5000, 1), 5)
    assert chance_ndcg(relevant, 5) == pytest.approx(measured.mean().item(), abs=0.01)
    assert chance_ndcg(torch.eye(3).bool(), 10) == pytest.approx((1 + 1 / math.log2(3) + 1 / 2) / 3)


@pytest.mark.parametrize(
    ("hits", "total", "low", "high"),
    [
        # 1 of 10, z^2 = 3.8415: (0.1 + 0.19207 -/+ 1.96 sqrt(0.009 + 0.009604)) / 1.38415
        (1, 10, 0.017876, 0.404150),
        (5, 10, 0.236593, 0.763407),
        (0, 10, 0.0, 0.277533),  # z^2 / (n + z^2)
        (10, 10, 0.722467, 1.0),
    ],
)
def test_wilson_interval(hits, total, low, high):
    assert wilson(hits, total) == pytest.approx((low, high), abs=1e-5)


# -- captions --------------------------------------------------------------------------------

# pycocoevalcap 1.2, with its tokenizer in Java, gave these three rows the mean 1.8727.
REFERENCES = [
    ["A man rides a bike down the street.", "A man is riding a bicycle."],
    ["Two dogs play with a ball.", "The dogs are playing in the grass!"],
    ["A woman's cooking pasta in the kitchen."],
]
CAPTIONS = [
    "A man rides a bicycle on the street.",
    "Two dogs are playing.",
    "A man is riding a horse.",
]


def test_cider_equals_that_of_the_coco_evaluation():
    scores = cider(CAPTIONS, REFERENCES)
    assert scores.mean().item() == pytest.approx(1.8727, abs=5e-5)
    # Each row's score by pycocoevalcap's `CiderScorer`
    assert scores.tolist() == pytest.approx([3.05950064, 2.55860092, 0.0], abs=1e-7)


def test_cider_by_hand():
    """With two rows, an n-gram of one of them weighs ln 2, and one of both weighs 0."""
    scores = cider(["a b", "a d"], [["a b"], ["a c"]])
    # First row: "b" and "a b" match; it has no n-grams of three and four words, which count as 0.
    assert scores[0].item() == pytest.approx(10 * (1 + 1) / 4)
    assert scores[1].item() == 0  # "a" is in both rows' references
    # Twice the length: 2 more runs of two words, exp(-2^2 / (2 * 6^2)); b's weight is clipped.
    long = cider(["a b a b", "a d"], [["a b"], ["a c"]])[0].item()
    by_length = math.exp(-(2**2) / 72)
    # One word: "b" twice against once, clipped to once: 1 * 1 / (2 * 1). Two words: "a b" twice and
    # "b a" once, which no reference has, so that it weighs ln 2 too: 1 * 1 / (sqrt(2^2 + 1) * 1).
    assert long == pytest.approx(10 * by_length * (1 / 2 + 1 / math.sqrt(5)) / 4)


def test_cider_does_not_depend_on_order_or_case():
    forward = cider(CAPTIONS, REFERENCES)
    backward = cider(CAPTIONS[::-1], REFERENCES[::-1]).flip(0)
    assert torch.allclose(forward, backward)
    loud = cider([text.upper() + " !" for text in CAPTIONS], REFERENCES)
    assert torch.allclose(forward, loud)
    assert cider([""], [["a b"]]).tolist() == [0]


def test_words_are_split_as_by_the_coco_tokenizer():
    assert words("A woman's hat, isn't it?") == ["a", "woman", "'s", "hat", "is", "n't", "it"]
    assert words("a well-kept ball ...") == ["a", "well-kept", "ball"]


def test_token_f1_and_exact_match_compare_words():
    assert token_f1("the red ball", "the blue ball") == pytest.approx(2 / 3)
    assert token_f1("red red", "red ball") == pytest.approx(2 * 1 / 4)  # counted once
    assert token_f1("", "red") == token_f1("blue", "red") == 0
    assert exact_match("The red ball.", "the red ball")
    assert not exact_match("red the ball", "the red ball")
