"""Agreement of two score matrices: against scipy, by hand where scores are tied, and what is left out."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from scipy import stats

from whence.errors import ConfigError, DataError
from whence.evaluate.agreement import agreement


def test_correlations_are_those_of_scipy_with_and_without_ties():
    torch.manual_seed(1)
    first = torch.randn(6, 40)
    second = first + torch.randn(6, 40)
    first[2:4], second[3:5] = (first[2:4] * 2).round(), second[3:5].round()  # ties on one side, on both, on the other
    found = agreement(first, second)
    for query in range(6):
        assert float(found.spearman[query]) == pytest.approx(stats.spearmanr(first[query], second[query]).statistic, abs=1e-12)
        x, y = first[query].double(), second[query].double()
        assert float(found.pearson[query]) == pytest.approx(stats.pearsonr(x, y).statistic, abs=1e-12)
    assert found.mean_spearman == pytest.approx(float(found.spearman.mean()))
    assert found.mean_pearson == pytest.approx(float(found.pearson.mean()))
    assert found.mean_overlap == pytest.approx(float(found.overlap.mean()))
    assert (found.k, found.left_out) == (10, 0)


def test_scale_and_offset_are_of_no_account():
    torch.manual_seed(0)
    first, second = torch.randn(3, 30, dtype=torch.float64), torch.randn(3, 30, dtype=torch.float64)
    found, moved = agreement(first, second), agreement(1e-20 * first, 1e6 + 3 * second)
    torch.testing.assert_close(moved.spearman, found.spearman)
    torch.testing.assert_close(moved.pearson, found.pearson, rtol=0, atol=1e-7)
    torch.testing.assert_close(moved.overlap, found.overlap)


def test_the_same_scores_agree_and_turned_ones_do_not():
    scores = torch.arange(60.0).view(2, 30).sin()
    same, turned = agreement(scores, 2 * scores), agreement(scores, -scores)
    assert same.spearman.tolist() == pytest.approx([1, 1])
    assert same.pearson.tolist() == pytest.approx([1, 1])
    assert same.overlap.tolist() == [1, 1]
    assert turned.mean_spearman == pytest.approx(-1)
    assert turned.mean_overlap == 0


def test_overlap_by_hand():
    # The first three: rows 0, 1, 2 and rows 5, 1, 0.
    first = torch.tensor([[9.0, 8.0, 7.0, 1.0, 2.0, 3.0]])
    second = torch.tensor([[5.0, 6.0, 1.0, 0.0, 2.0, 7.0]])
    assert agreement(first, second, k=3).overlap.tolist() == pytest.approx([2 / 3])
    assert agreement(first, second, k=1).overlap.tolist() == [0]
    assert agreement(second, first, k=2).overlap.tolist() == [0.5]


def test_overlap_of_tied_rows_is_the_mean_over_orders():
    # Row 0 is first; one of rows 1, 2, 3 is second. The others' first two are rows 1 and 0.
    first = torch.tensor([[9.0, 4.0, 4.0, 4.0, 0.0]])
    second = torch.tensor([[5.0, 6.0, 1.0, 0.0, 2.0]])
    assert agreement(first, second, k=2).overlap.tolist() == pytest.approx([(1 + 1 / 3) / 2])
    shuffle = torch.tensor([3, 1, 4, 0, 2])
    assert agreement(first[:, shuffle], second[:, shuffle], k=2).overlap.tolist() == pytest.approx([(1 + 1 / 3) / 2])
    # Ties on both sides are broken independently: rows 1, 2, 3 share one place in each.
    assert agreement(first, first + 1, k=2).overlap.tolist() == pytest.approx([(1 + 3 / 9) / 2])


def test_random_scores_overlap_by_chance():
    torch.manual_seed(0)
    found = agreement(torch.randn(500, 50), torch.randn(500, 50))
    # Of 10 of 50 rows, 2 are common; the share's standard deviation is 0.11 a query, 0.0051 over 500; four of those.
    assert found.mean_overlap == pytest.approx(0.2, abs=0.0204)
    low, high = found.overlap_interval
    assert low < 0.2 < high


def test_fewer_rows_than_k_are_all_looked_at():
    found = agreement(torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[1.0, 5.0, 2.0]]))
    assert found.k == 3
    assert found.overlap.tolist() == pytest.approx([1])


def test_constant_rows_are_left_out_and_counted():
    torch.manual_seed(0)
    first, second = torch.randn(5, 20), torch.randn(5, 20)
    without = agreement(first[[0, 2, 4]], second[[0, 2, 4]])
    first[1], second[3] = 0.1, -7.3
    found = agreement(first, second)
    assert found.left_out == 2
    for name in ("spearman", "pearson", "overlap"):
        assert getattr(found, name).isnan().tolist() == [False, True, False, True, False]
        assert getattr(found, f"mean_{name}") == pytest.approx(getattr(without, f"mean_{name}"))
        assert getattr(found, f"{name}_interval") == pytest.approx(getattr(without, f"{name}_interval"))


def test_intervals_are_bootstrap_intervals_over_queries():
    torch.manual_seed(0)
    first = torch.randn(30, 15)
    second = first + torch.rand(30, 1) * 3 * torch.randn(30, 15)
    found = agreement(first, second, resamples=5000)
    for name in ("spearman", "pearson", "overlap"):
        values = getattr(found, name).numpy()
        expected = stats.bootstrap((values,), np.mean, n_resamples=5000, method="percentile", rng=np.random.default_rng(0))
        # An end's sampling error with 5000 resamples is about 2% of the interval; four of those.
        width = expected.confidence_interval.high - expected.confidence_interval.low
        assert getattr(found, f"{name}_interval") == pytest.approx(tuple(expected.confidence_interval), abs=0.08 * width)
    again, other = agreement(first, second, resamples=50, seed=4), agreement(first, second, resamples=50, seed=5)
    assert again.spearman_interval == agreement(first, second, resamples=50, seed=4).spearman_interval != other.spearman_interval


def test_one_query_has_no_interval():
    found = agreement(torch.tensor([[1.0, 2.0, 3.0], [1.0, 1.0, 1.0]]), torch.tensor([[1.0, 3.0, 2.0], [1.0, 2.0, 3.0]]))
    assert found.mean_spearman == pytest.approx(0.5)
    assert all(math.isnan(end) for end in (*found.spearman_interval, *found.pearson_interval, *found.overlap_interval))
    written = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert written["pearson"] == {"mean": pytest.approx(0.5), "interval": None}
    assert (written["k"], written["queries"], written["left_out"]) == (3, 2, 1)


def test_json_holds_means_and_intervals():
    torch.manual_seed(0)
    found = agreement(torch.randn(4, 9), torch.randn(4, 9), k=4)
    written = json.loads(json.dumps(found.to_json()))
    assert written["overlap"] == {"mean": found.mean_overlap, "interval": list(found.overlap_interval)}
    assert written["spearman"]["mean"] == found.mean_spearman


def test_scores_are_left_as_they_are_and_random_state_too():
    first, second = torch.randn(3, 8, dtype=torch.bfloat16).requires_grad_(), torch.randn(3, 8)
    kept, state = first.detach().clone(), torch.get_rng_state()
    found = agreement(first, second)
    assert torch.equal(first.detach(), kept)
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(found.pearson, agreement(kept.double(), second.double()).pearson)


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ([[1.0, 2.0]], [[1.0, 2.0, 3.0]], r"shapes \(1, 2\) and \(1, 3\)\. Give two matrices \[query, train\]"),
        ([1.0, 2.0], [1.0, 2.0], r"shapes \(2,\) and \(2,\)"),
        ([[1.0]], [[1.0]], r"two at least"),
        ([[1.0, 2.0], [1.0, math.nan]], [[1.0, 2.0], [3.0, 4.0]], r"first scores have 1 values .* query 1 and training row 1"),
        ([[1.0, 2.0]], [[math.inf, 2.0]], r"second scores have 1 values .* query 0 and training row 0"),
        ([[1.0, 1.0], [1.0, 2.0]], [[1.0, 2.0], [0.0, 0.0]], r"none of 2 queries has scores that vary"),
    ],
)
def test_scores_that_cannot_be_compared(first, second, message):
    with pytest.raises(DataError, match=message):
        agreement(torch.tensor(first), torch.tensor(second))


def test_no_queries_are_an_error():
    with pytest.raises(DataError, match=r"shapes \(0, 4\)"):
        agreement(torch.zeros(0, 4), torch.zeros(0, 4))


@pytest.mark.parametrize(
    ("options", "message"), [({"k": 0}, r"k=0 rows cannot overlap"), ({"resamples": 1}, r"resamples=1 gives no interval")]
)
def test_options_that_cannot_be_used(options, message):
    with pytest.raises(ConfigError, match=message):
        agreement(torch.eye(3), torch.eye(3), **options)
