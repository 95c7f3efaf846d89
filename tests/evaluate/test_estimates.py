"""Means and shares with intervals: against the formulas, and that an interval holds what it should as often as it should."""

from __future__ import annotations

import math

import pytest
import torch

from whence.errors import ConfigError
from whence.evaluate.estimates import bootstrap_weights, mean_estimate, share_estimate


def test_weights_are_means_over_draws():
    weights = bootstrap_weights(7, resamples=50, seed=1)
    assert weights.shape == (50, 7)
    torch.testing.assert_close(weights.sum(1), torch.ones(50).double())
    torch.testing.assert_close((weights * 7).round() / 7, weights)
    assert torch.equal(weights, bootstrap_weights(7, resamples=50, seed=1))
    assert not torch.equal(weights, bootstrap_weights(7, resamples=50, seed=2))
    with pytest.raises(ConfigError, match="resamples=1 gives no interval"):
        bootstrap_weights(7, resamples=1, seed=0)


def test_an_interval_is_as_wide_as_the_error_of_the_mean():
    values = torch.randn(400, generator=torch.Generator().manual_seed(0))
    found = mean_estimate(values)
    assert found.value == pytest.approx(float(values.mean()))
    # 1.96 standard errors to both sides; 1000 samples know their 2.5% quantile to about 5% of that.
    wanted = 2 * 1.96 * float(values.std()) / 20
    assert found.high - found.low == pytest.approx(wanted, rel=0.15)
    assert str(mean_estimate(torch.tensor([0.5, 0.5]))) == "0.5 [0.5, 0.5]"


def test_one_query_has_no_interval():
    found = mean_estimate(torch.tensor([2.0]))
    assert (found.value, math.isnan(found.low), math.isnan(found.high)) == (2.0, True, True)
    assert str(found) == "2"
    assert found.to_json() == {"value": 2.0, "interval": None}


@pytest.mark.parametrize(("successes", "trials"), [(0, 20), (3, 20), (20, 20), (1, 3)])
def test_shares_have_wilsons_interval(successes, trials):
    found = share_estimate(successes, trials)
    z, p = 1.959964, successes / trials
    middle = (p + z**2 / (2 * trials)) / (1 + z**2 / trials)
    half = z / (1 + z**2 / trials) * math.sqrt(p * (1 - p) / trials + z**2 / (4 * trials**2))
    assert (found.value, found.low, found.high) == pytest.approx((p, middle - half, middle + half), abs=1e-6)
    assert 0 <= found.low <= found.value <= found.high <= 1
