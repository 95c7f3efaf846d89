"""The linear datamodeling score against plain formulas, and where the answer is known."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace

import pytest
import torch
from scipy.stats import rankdata, spearmanr

from whence.errors import ConfigError, DataError
from whence.evaluate.lds import calibrate, lds, mean_lds, predictions, removal_scale
from whence.evaluate.retrain import RetrainBank, draw_masks
from whence.evaluate.statistics import dense_ranks, mid_ranks, rank_correlations, reliability
from whence.scores.matrix import Scores

TRAIN, QUERIES, SUBSETS = 30, 8, 25


def linear_bank(values: torch.Tensor, *, repeats: int = 2, noise: float = 0.0, factor: float = 1.0, seed: int = 0) -> RetrainBank:
    """Return a bank where each row left out raises a measurement by `factor * values / N`."""
    generator = torch.Generator().manual_seed(seed)
    masks = draw_masks(values.shape[1], SUBSETS, seed=seed)
    exact = 3.0 + factor * (values @ (~masks).double().T) / values.shape[1]
    errors = noise * torch.randn(SUBSETS, repeats, len(values), generator=generator, dtype=torch.float64)
    return RetrainBank(masks=masks, measurements=exact.T[:, None] + errors)


def drawn(queries: int = QUERIES) -> torch.Tensor:
    return torch.randn(queries, TRAIN, dtype=torch.float64)


def listed(predicted: torch.Tensor, measured: torch.Tensor) -> RetrainBank:
    """Return a bank with one row per subset: minus the scores are the predictions. Both are `[query, subset]`."""
    return RetrainBank(masks=torch.eye(predicted.shape[1], dtype=torch.bool), measurements=measured.T[:, None].double())


def test_where_the_world_is_linear_the_score_is_one_and_its_sign_is_the_right_one():
    values = drawn()
    bank = linear_bank(values)
    result = lds(values, bank, resamples=50)
    assert result.mean == pytest.approx(1)
    assert result.low == pytest.approx(1)
    assert result.per_query.tolist() == pytest.approx([1] * QUERIES)
    assert (result.reliability, result.ceiling) == pytest.approx((1, 1))
    assert lds(-values, bank, resamples=50).mean == pytest.approx(-1)
    # Rank correlation knows no units, and a constant of each query is none of its business.
    assert lds(5 * values + torch.arange(QUERIES)[:, None], bank, resamples=50).mean == pytest.approx(1)


def test_predictions_by_hand():
    values = torch.tensor([[1.0, 2.0, -4.0]])
    masks = torch.tensor([[True, True, False], [False, False, True]])
    assert predictions(values, masks).tolist() == [[-3.0, 4.0]]


def test_the_score_is_the_mean_of_scipys_spearman():
    values = drawn()
    bank = linear_bank(values + drawn(), noise=0.5)
    wanted = []
    for query in range(QUERIES):
        predicted = [-sum(values[query, t].item() for t in range(TRAIN) if mask[t]) for mask in bank.masks]
        wanted.append(spearmanr(predicted, bank.measurements[:, :, query].mean(1).numpy()).statistic)
    result = lds(values, bank, resamples=50)
    assert result.per_query.tolist() == pytest.approx(wanted, abs=1e-12)
    assert result.mean == pytest.approx(sum(wanted) / QUERIES)
    assert mean_lds(values, bank) == pytest.approx(result.mean)
    assert result.low < result.mean < result.high


def test_ties_and_repeated_items_are_as_if_written_out():
    x, y = torch.randint(0, 6, (5, 20)).double(), torch.randint(0, 6, (5, 20)).double()
    counts = torch.randint(0, 4, (20,))
    found = rank_correlations(dense_ranks(x), dense_ranks(y), counts.double())
    written_out = [side.repeat_interleave(counts, dim=1) for side in (x, y)]
    wanted = [spearmanr(a, b).statistic for a, b in zip(*(side.numpy() for side in written_out), strict=True)]
    assert found.tolist() == pytest.approx(wanted, abs=1e-12)
    ranks = mid_ranks(dense_ranks(x), torch.ones(20, dtype=torch.float64)) + 0.5
    assert torch.equal(ranks, torch.from_numpy(rankdata(x.numpy(), axis=1)))


def test_queries_that_do_not_vary_are_left_out_and_predictions_that_do_not_score_zero():
    measured = torch.tensor([[1.0, 2, 3, 4], [5, 5, 5, 5], [1, 2, 3, 4]])
    predicted = torch.tensor([[1.0, 2, 3, 4], [1, 2, 3, 4], [7, 7, 7, 7]])
    result = lds(-predicted, listed(predicted, measured), resamples=50)
    assert math.isnan(result.per_query[1])
    assert result.per_query[[0, 2]].tolist() == pytest.approx([1, 0])
    assert result.mean == pytest.approx(0.5)
    assert not torch.isnan(result.samples).any()
    assert math.isnan(result.reliability), "one repeat says nothing of noise"
    assert math.isnan(result.ceiling)


def test_constant_predictions_warn_of_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert lds(torch.zeros(QUERIES, TRAIN), linear_bank(drawn()), resamples=10).mean == 0


def correlated(queries: int, subsets: int, r: float, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Return predictions and measurements, Gaussian with correlation `r` over subsets; half of the variance is shared by queries."""
    x, e = (
        (torch.randn(1, subsets, generator=generator) + torch.randn(queries, subsets, generator=generator)).double() / math.sqrt(2)
        for _ in range(2)
    )
    return x, r * x + math.sqrt(1 - r * r) * e


def test_the_interval_covers_the_true_value():
    """Spearman's correlation of Gaussians is 6 / pi * asin(r / 2); 80 banks, so the share has a standard error of 0.024."""
    r, generator = 0.5, torch.Generator().manual_seed(3)
    truth, hits, widths = 6 / math.pi * math.asin(r / 2), 0, []
    for _ in range(80):
        predicted, measured = correlated(15, 40, r, generator)
        result = lds(-predicted, listed(predicted, measured), resamples=100)
        hits += result.low <= truth <= result.high
        widths.append(result.high - result.low)
    assert 0.87 <= hits / 80 < 1
    # Twice the standard error of one correlation over 40 subsets is 0.25, and the queries share half of it.
    assert 0.2 < sum(widths) / 80 < 0.5


def test_two_methods_are_compared_in_the_same_samples():
    values = drawn(20)
    bank = linear_bank(values, noise=0.1)
    good, worse = lds(values, bank), lds(values + 0.5 * drawn(20), bank)
    difference, low, high = good.minus(worse)
    assert difference == pytest.approx(good.mean - worse.mean)
    assert low < difference < high
    assert high - low < good.high - good.low + worse.high - worse.low
    assert low > 0, "the better one is better for sure, though"
    assert good.low < worse.high, "their intervals overlap"
    with pytest.raises(ConfigError, match="same `resamples`"):
        good.minus(lds(values, bank, resamples=10))


@pytest.mark.parametrize("repeats", [2, 5, 6])
def test_reliability_is_the_correlation_with_new_repeats(repeats):
    """Gaussian truth of variance 1 and noise of variance 4 per repeat: Pearson's is R / (R + 4), Spearman's a bit less."""
    generator = torch.Generator().manual_seed(0)
    measured = torch.randn(300, 1, 40, generator=generator) + 2 * torch.randn(300, repeats, 40, generator=generator)
    pearson = repeats / (repeats + 4)
    wanted = 6 / math.pi * math.asin(pearson / 2)
    found = reliability(measured)
    # 40 queries over 300 subsets: the standard error of a mean is under 0.01.
    assert found.mean() == pytest.approx(wanted, abs=0.04)
    assert found.shape == (40,)
    assert ((found >= 0) & (found <= 1)).all()


def test_the_ceiling_is_what_the_truth_would_score():
    values = drawn(60)
    bank = linear_bank(values, repeats=4, noise=0.1)
    result = lds(values, bank, resamples=10)
    assert 0.5 < result.reliability < 0.9
    assert result.ceiling == pytest.approx(result.mean, abs=0.05)


def test_pure_noise_is_not_reliable():
    bank = linear_bank(drawn(40), repeats=4, noise=50.0)
    # Correlations below zero are cut at zero query by query, so the mean is a bit above it.
    assert lds(drawn(40), bank, resamples=10).reliability < 0.3


def test_the_scale_brings_removal_effects_to_what_was_measured():
    values = drawn()
    assert removal_scale(values, linear_bank(values, factor=0.37)) == pytest.approx(0.37)
    assert removal_scale(2 * values, linear_bank(values, factor=0.37)) == pytest.approx(0.37 / 2)
    assert removal_scale(torch.zeros_like(values), linear_bank(values)) == 0
    bank = linear_bank(values, factor=0.37)
    scale = removal_scale(values, bank)
    # In units: what leaving out the rows of subset 1 rather than those of subset 0 does.
    effect = scale * Scores(values=values).removal_effect()
    change = ((~bank.masks[1]).double() - (~bank.masks[0]).double()) @ effect.T
    torch.testing.assert_close(change, bank.mean[1] - bank.mean[0])


def test_the_damping_that_predicts_best_is_chosen_on_calibration_subsets_alone():
    values, errors = drawn(), drawn()
    bank = linear_bank(values, factor=2.0)
    calibration, reported = bank.split(calibration=10)
    asked = []

    def scores(damping: float) -> torch.Tensor:
        asked.append(damping)
        return values + abs(math.log10(damping)) * errors

    result = calibrate(scores, [0.01, 1.0, 10.0], calibration)
    assert asked == [0.01, 1.0, 10.0]
    assert result.damping == 1.0
    assert result.scale == pytest.approx(2)
    assert [damping for damping, _ in result.table] == [0.01, 1.0, 10.0]
    assert [score for _, score in result.table] == pytest.approx([mean_lds(scores(d), calibration) for d in (0.01, 1.0, 10.0)])
    spoilt = replace(reported, measurements=torch.zeros_like(reported.measurements))
    rejoined = replace(
        bank, masks=torch.cat([calibration.masks, spoilt.masks]), measurements=torch.cat([calibration.measurements, spoilt.measurements])
    )
    assert calibrate(scores, [0.01, 1.0, 10.0], rejoined.split(calibration=10)[0]) == result
    with pytest.raises(ConfigError, match="are to be reported"):
        calibrate(scores, [1.0], reported)
    with pytest.raises(ConfigError, match="no damping to choose from"):
        calibrate(scores, [], calibration)
    with pytest.raises(DataError, match="no query varies"):
        calibrate(scores, [1.0], replace(calibration, measurements=torch.zeros_like(calibration.measurements)))


def test_of_equal_dampings_the_first_is_chosen():
    values = drawn()
    assert calibrate(lambda _: values, [0.1, 1.0], linear_bank(values)).damping == 0.1


def test_scores_that_do_not_fit_are_errors():
    values = drawn()
    bank = linear_bank(values)
    with pytest.raises(DataError, match=r"shape \(8, 29\), the subsets are of 30 rows"):
        lds(values[:, 1:], bank)
    with pytest.raises(DataError, match=r"of 7 queries, measurements of 8"):
        lds(values[1:], bank)
    values[3, 4] = math.inf
    with pytest.raises(DataError, match=r"query 3 and row 4 is inf"):
        lds(values, bank)
    with pytest.raises(DataError, match=r"2 subsets \(3 are needed\), 8 queries"):
        lds(drawn(), replace(bank, masks=bank.masks[:2], measurements=bank.measurements[:2]))
    with pytest.raises(DataError, match=r"25 subsets \(3 are needed\), 0 queries that vary"):
        lds(drawn(), replace(bank, measurements=torch.ones_like(bank.measurements)))
    with pytest.raises(ConfigError, match="resamples=1 gives no interval"):
        lds(drawn(), bank, resamples=1)
