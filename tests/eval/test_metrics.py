"""Every expected value here was computed by hand."""

import math

import pytest
import torch

from eval.metrics import (
    chance_recall,
    cider,
    exact_match,
    first_relevant_ranks,
    mean_interval,
    relevant_index,
    token_f1,
    wilson,
    words,
)

NAN = float("nan")


def test_rank_counts_the_better_candidates():
    similarity = torch.tensor([[0.9, 0.1, 0.5], [0.9, 0.1, 0.5], [0.9, 0.1, 0.5]])
    assert first_relevant_ranks(similarity, torch.eye(3).bool()).tolist() == [1, 3, 2]


def test_only_the_best_of_several_relevant_candidates_counts():
    similarity = torch.tensor([[0.9, 0.8, 0.7, 0.6]])
    assert first_relevant_ranks(similarity, torch.tensor([[False, True, True, False]])) == 2
    assert first_relevant_ranks(similarity, torch.tensor([[True, True, False, False]])) == 1
    # A relevant candidate never stands in the way of another one, not even in a tie.
    assert first_relevant_ranks(torch.ones(1, 3), torch.tensor([[True, True, False]])) == 2
    assert first_relevant_ranks(torch.ones(1, 3), torch.ones(1, 3).bool()) == 1


@pytest.mark.parametrize("score", [0.0, 1.0, NAN])
def test_a_collapsed_model_is_last_not_first(score):
    ranks = first_relevant_ranks(torch.full((4, 4), score), torch.eye(4).bool())
    assert ranks.tolist() == [4, 4, 4, 4]


def test_a_single_nan_does_not_win():
    similarity = torch.tensor([[NAN, 0.2, 0.1]])
    assert first_relevant_ranks(similarity, torch.tensor([[True, False, False]])) == 3
    assert first_relevant_ranks(similarity, torch.tensor([[False, True, False]])) == 2


def test_a_row_without_a_relevant_candidate_is_never_right():
    relevant = relevant_index(torch.tensor([-1, 1]), candidates=3)
    assert relevant.tolist() == [[False] * 3, [False, True, False]]
    assert first_relevant_ranks(torch.tensor([[1.0, 2.0, 3.0]] * 2), relevant).tolist() == [4, 2]


def test_chance_is_k_of_the_pool_for_one_relevant_candidate():
    assert chance_recall(torch.eye(20).bool(), 1) == pytest.approx(1 / 20)
    assert chance_recall(torch.eye(20).bool(), 5) == pytest.approx(5 / 20)
    assert chance_recall(torch.eye(4).bool(), 10) == 1


def test_chance_with_several_or_no_relevant_candidates():
    # Two right of four, one draw: 2/4. Two draws: 1 - (2/4)(1/3) = 5/6.
    relevant = torch.tensor([[True, True, False, False]])
    assert chance_recall(relevant, 1) == pytest.approx(1 / 2)
    assert chance_recall(relevant, 2) == pytest.approx(5 / 6)
    # The mean over rows of 1/4, 2/4 and 0.
    relevant = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0]]).bool()
    assert chance_recall(relevant, 1) == pytest.approx(1 / 4)


def test_chance_is_what_random_scores_get():
    torch.manual_seed(0)
    relevant = (torch.rand(1, 12) < 0.3).repeat(20000, 1)
    ranks = first_relevant_ranks(torch.rand(20000, 12), relevant)
    measured = (ranks <= 2).float().mean().item()
    assert chance_recall(relevant, 2) == pytest.approx(measured, abs=0.01)


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
def test_wilson(hits, total, low, high):
    assert wilson(hits, total) == pytest.approx((low, high), abs=1e-5)


# -- captions --------------------------------------------------------------------------------

# The three rows on which pycocoevalcap 1.2 was run, with Java's tokenizer: it gave 1.8727.
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


def test_cider_is_that_of_the_coco_evaluation():
    assert cider(CAPTIONS, REFERENCES).mean().item() == pytest.approx(1.8727, abs=5e-5)


def test_cider_by_hand():
    """Two rows, so a run in one of them weighs ln 2, and one in both nothing."""
    scores = cider(["a b", "a d"], [["a b"], ["a c"]])
    # First: b and "a b" match; runs of three and four words there are none, which count as 0.
    assert scores[0].item() == pytest.approx(10 * (1 + 1) / 4)
    assert scores[1].item() == 0  # "a" is in both rows' references
    # Twice the length: 2 more runs of two words, exp(-2^2 / (2 * 6^2)); b's weight is clipped.
    long = cider(["a b a b", "a d"], [["a b"], ["a c"]])[0].item()
    by_length = math.exp(-(2**2) / 72)
    # One word: b b beside b, clipped to b: 1 * 1 / (2 * 1). Two: "a b" twice and "b a" once, which
    # no reference has; it weighs ln 2 as what one row has: 1 * 1 / (sqrt(2^2 + 1) * 1).
    assert long == pytest.approx(10 * by_length * (1 / 2 + 1 / math.sqrt(5)) / 4)


def test_the_order_of_rows_and_case_do_not_matter():
    forward = cider(CAPTIONS, REFERENCES)
    backward = cider(CAPTIONS[::-1], REFERENCES[::-1]).flip(0)
    assert torch.allclose(forward, backward)
    loud = cider([text.upper() + " !" for text in CAPTIONS], REFERENCES)
    assert torch.allclose(forward, loud)
    assert cider([""], [["a b"]]).tolist() == [0]


def test_words_as_the_coco_tokenizer_splits_them():
    assert words("A woman's hat, isn't it?") == ["a", "woman", "'s", "hat", "is", "n't", "it"]
    assert words("a well-kept ball ...") == ["a", "well-kept", "ball"]


def test_token_f1_and_exact_match():
    assert token_f1("the red ball", "the blue ball") == pytest.approx(2 / 3)
    assert token_f1("red red", "red ball") == pytest.approx(2 * 1 / 4)  # counted once
    assert token_f1("", "red") == token_f1("blue", "red") == 0
    assert exact_match("The red ball.", "the red ball")
    assert not exact_match("red the ball", "the red ball")


def test_the_interval_of_a_mean():
    values = torch.tensor([0.0, 1.0, 1.0, 0.0] * 25, dtype=torch.float64)
    low, high = mean_interval(values)
    assert ((low + high) / 2, high - low) == pytest.approx((0.5, 2 * 1.959964 * 0.05))
