"""The baselines that look at no text and no model: random numbers, losses, and signs by class."""

from __future__ import annotations

from math import nan

import pytest
import torch

from whence.errors import ConfigError, DataError
from whence.evaluate.baselines import BASELINES, loss_scores, random_scores, signed_by_class


def test_random_scores_are_those_of_their_seed_and_of_no_other():
    state = torch.get_rng_state()
    scores = random_scores(30, 400, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert scores.shape == (30, 400)
    assert scores.dtype == torch.float32
    assert torch.equal(scores, random_scores(30, 400, seed=3))
    assert not torch.equal(scores, random_scores(30, 400, seed=4))
    # 12,000 numbers: the standard deviation of their mean is 0.009; four of those.
    assert abs(float(scores.mean())) < 0.037
    # Queries have orders of their own: 400 pairs correlate by 0.05 at random.
    assert torch.corrcoef(scores).fill_diagonal_(0).abs().max() < 0.25


@pytest.mark.parametrize(("queries", "train", "message"), [(0, 3, r"queries=0 rows"), (3, -1, r"train=-1 rows")])
def test_random_scores_of_nothing_are_refused(queries, train, message):
    with pytest.raises(ConfigError, match=message):
        random_scores(queries, train)


def test_loss_scores_are_the_losses_for_every_query():
    losses = torch.tensor([0.5, 2.0, 0.0], dtype=torch.float64, requires_grad=True)
    scores = loss_scores(losses, 2)
    assert scores.tolist() == [[0.5, 2.0, 0.0]] * 2
    assert scores.dtype == torch.float32
    assert not scores.requires_grad
    scores[0, 0] = 7
    assert scores[1, 0] == 0.5, "each query has its own row"


@pytest.mark.parametrize(
    ("losses", "message"),
    [([[1.0]], r"losses have shape \(1, 1\), 0 of them not finite"), ([1.0, nan], r"\(2,\), 1 of them not finite")],
)
def test_losses_that_are_no_scores(losses, message):
    with pytest.raises(DataError, match=message):
        loss_scores(torch.tensor(losses), 2)
    with pytest.raises(ConfigError, match=r"queries=0 rows"):
        loss_scores(torch.ones(2), 0)


def test_the_sign_is_that_of_the_class():
    scores = torch.tensor([[1.0, 2.0, 0.0], [3.0, -4.0, 5.0]])
    signed = signed_by_class(scores, torch.tensor([0, 1]), torch.tensor([0, 1, 1]))
    assert signed.tolist() == [[1, -2, 0], [-3, -4, 5]]
    assert scores.tolist() == [[1, 2, 0], [3, -4, 5]]


@pytest.mark.parametrize(("queries", "train"), [(3, 3), (2, 2), (1, 3)])
def test_classes_of_other_rows_are_refused(queries, train):
    with pytest.raises(DataError, match=rf"query_classes \({queries},\) and classes \({train},\)"):
        signed_by_class(torch.zeros(2, 3), torch.zeros(queries), torch.zeros(train))


def test_names_are_in_the_order_of_tables():
    assert BASELINES == ("random", "bm25", "bm25 signed", "embedding", "embedding signed", "gradient cosine", "loss")
