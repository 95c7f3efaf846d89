from __future__ import annotations

import json
import math

import pytest
import torch
from scipy.stats import spearmanr

from whence.errors import DataError
from whence.refit.trust import trust


def test_numbers_are_those_written_out() -> None:
    truth = torch.tensor([2.0, 3.0, 5.0, 4.0, 2.5])
    predicted = torch.tensor([2.2, 2.9, 4.5, 4.6, 2.4])
    found = trust(predicted, truth, constant=4.0, mean=3.5)
    p, t = predicted.tolist(), truth.tolist()
    assert found.error is not None
    assert found.constant_error is not None
    assert found.mean_error is not None
    assert found.error.value == pytest.approx(sum(abs(a - b) / b for a, b in zip(p, t, strict=True)) / 5, rel=1e-6)
    assert found.constant_error.value == pytest.approx(sum(abs(4 - b) / b for b in t) / 5, rel=1e-6)
    assert found.mean_error.value == pytest.approx(sum(abs(3.5 - b) / b for b in t) / 5, rel=1e-6)
    assert found.spearman.value == pytest.approx(spearmanr(p, t).statistic)
    sse, reference = sum((a - b) ** 2 for a, b in zip(p, t, strict=True)), sum((3.5 - b) ** 2 for b in t)
    assert found.r2.value == pytest.approx(1 - sse / reference, rel=1e-6)
    assert found.rmse == pytest.approx((sse / 5) ** 0.5, rel=1e-6)
    assert math.isnan(found.allowed_r2)
    assert math.isnan(found.relative_r2)
    assert "unknown: one repeat" in found.lines()[-1]
    assert json.loads(json.dumps(found.to_json()))["allowed_r2"] is None


def test_without_a_mean_every_subset_has_that_of_the_others() -> None:
    truth = torch.tensor([1.0, 2.0, 6.0])
    assert trust(truth, truth, constant=1.0).mean_rmse == pytest.approx(math.sqrt((3**2 + 1.5**2 + 4.5**2) / 3))


def test_good_estimates_beat_both_and_are_told_with_their_error() -> None:
    truth = 3 + torch.randn(40, dtype=torch.float64)
    found = trust(truth + 0.1 * torch.randn(40), truth, constant=2.0, mean=3.0)
    assert found.beats
    assert found.verdict.startswith("The estimates are better than both trivial predictors on 40 held-out subsets")
    assert found.tell(3.14159) == f"3.142 ± {found.rmse:.2g}"


def test_estimates_that_only_rank_are_no_numbers() -> None:
    truth = 3 + 0.1 * torch.randn(40, dtype=torch.float64)
    found = trust(truth + 2, truth, constant=3.5)
    assert not found.beats
    assert found.tell(3.0) == found.verdict
    assert found.verdict.startswith("Do not use the estimates as numbers")
    assert "Their order can be used: rank correlation 1" in found.verdict
    assert "the mean of other fine-tunes" in found.verdict
    assert found._repr_html_().startswith("<p>Do not use")


def test_noise_is_no_estimate() -> None:
    truth = 3 + 0.1 * torch.randn(40, dtype=torch.float64)
    found = trust(3 + 0.1 * torch.randn(40), truth, constant=3.0)
    assert found.verdict.startswith("Do not use the estimates: on 40")
    assert "the constant predictor" in found.verdict
    assert "3.1" not in found.tell(3.1)


def test_the_share_of_what_noise_allows() -> None:
    # Effects of variance 1 and noise of variance 1 in each of 4 repeats: perfect estimates reach R^2 = 1 / (1 + 1/4).
    effects = torch.randn(4000, dtype=torch.float64)
    measured = 10 + effects[:, None] + torch.randn(4000, 4)
    found = trust(10 + effects, measured, constant=0.0, resamples=20)
    assert found.repeats == 4
    assert found.allowed_r2 == pytest.approx(0.8, abs=0.02)
    assert found.relative_r2 == pytest.approx(1, abs=0.03)
    assert found.relative_spearman == pytest.approx(1, abs=0.03)


def test_a_metric_that_is_0_somewhere_has_the_rest_of_the_report() -> None:
    truth = torch.rand(20, dtype=torch.float64).round(decimals=1)
    truth[:2] = torch.tensor([0.0, 0.5])
    found = trust(truth + 0.01, truth, constant=0.0, mean=0.5)
    assert (found.error, found.constant_error, found.mean_error) == (None, None, None)
    assert found.beats
    assert found.rmse == pytest.approx(0.01)
    assert found.lines()[1] == "no relative error: the metric is 0 in a fine-tune"
    assert json.loads(json.dumps(found.to_json()))["error"] is None


def test_what_cannot_be_compared() -> None:
    with pytest.raises(DataError, match="3 subsets or more"):
        trust(torch.ones(2), torch.ones(2), constant=0.0)
    with pytest.raises(DataError, match="measured to be the same"):
        trust(torch.ones(3), torch.ones(3), constant=0.0)
    with pytest.raises(DataError, match="measured to be the same"):
        trust(torch.ones(4), torch.tensor([[0.1, 0.2, 0.3], [0.3, 0.2, 0.1], [0.2, 0.1, 0.3], [0.3, 0.1, 0.2]]), constant=0.0)
    with pytest.raises(DataError, match="not finite"):
        trust(torch.tensor([1.0, math.nan, 2.0]), torch.tensor([1.0, 3.0, 2.0]), constant=0.0)


def test_of_a_few_subsets_nothing_is_claimed() -> None:
    truth = torch.tensor([1.0, 2.0, 3.0, 4.0])
    found = trust(truth + 0.01, truth, constant=1.0, mean=2.0)
    assert found.spearman.value == pytest.approx(1)
    assert not found.beats
    assert found.verdict.startswith("Do not use the estimates: 4 held-out subsets are too few to tell whether they are better than")
    assert found.verdict.endswith("give 5 or more.")


def test_the_interval_of_the_rank_correlation_is_that_of_resampled_subsets() -> None:
    truth = torch.randn(12, dtype=torch.float64) + 4
    predicted = (truth + torch.randn(12)).round(decimals=1)
    found = trust(predicted, truth, constant=3.0, resamples=2000).spearman
    generator = torch.Generator().manual_seed(5)
    drawn = [torch.randint(12, (12,), generator=generator) for _ in range(2000)]
    samples = torch.tensor([float(spearmanr(predicted[places], truth[places]).statistic) for places in drawn], dtype=torch.float64)
    low, high = samples.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    assert (found.low, found.high) == (pytest.approx(low, abs=0.08), pytest.approx(high, abs=0.08))
