"""What dropping rows bought, with procedures whose answer is known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from whence.errors import ConfigError
from whence.evaluate.clean import decide
from whence.evaluate.clean_effect import ALL, CLEANED, RANDOM, CleaningEffect, retrain_cleaned

BAD = {3, 4}


@dataclass(frozen=True, kw_only=True)
class CountsBadRows:
    """Every bad row in the training set raises every query's measurement by 1; query q starts at q - 2, the seed adds noise."""

    key: str = "counts"

    def __call__(self, rows: Sequence[int], seed: int) -> Tensor:
        noise = torch.randn(4, generator=torch.Generator().manual_seed(seed))
        return torch.arange(4) - 2.5 + len(BAD & set(rows)) + 1e-3 * noise


def effect(**options) -> CleaningEffect:
    decision = decide(torch.tensor([0.0, 1.0, 2.0, 9.0, 8.0, 3.0, 1.0, 0.0]), count=2)
    return retrain_cleaned(CountsBadRows(), decision, **options)


def test_dropping_the_bad_rows_is_worth_what_they_cost():
    found = effect(repeats=3, margin=True)
    change = found.measurement(CLEANED)
    assert change.change == pytest.approx(-2, abs=1e-6), "the same seeds, so the noise is gone"
    assert change.low == pytest.approx(-2, abs=1e-6)
    assert change.high == pytest.approx(-2, abs=1e-6)
    # With both bad rows the four queries stand at -0.5, 0.5, 1.5, 2.5; without at two less.
    accuracy = found.accuracy(CLEANED)
    assert accuracy is not None
    assert (accuracy.mean, accuracy.change) == (0.75, 0.5)
    assert accuracy.low < 0.5 < accuracy.high
    assert found.accuracy(ALL).change == 0


def test_random_rows_are_as_many_of_every_class_and_new_for_every_repeat():
    asked = []

    class Watches(CountsBadRows):
        def __call__(self, rows, seed):
            asked.append((tuple(rows), seed))
            return super().__call__(rows, seed)

    classes = torch.tensor([0, 0, 1, 1, 1, 1, 1, 0])
    decision = decide(torch.arange(8.0), threshold=5.0, classes=classes)
    retrain_cleaned(Watches(key="watches"), decision, repeats=4, backend="threading")
    assert len(decision.dropped) == 3
    lost = sorted(classes[list(decision.dropped)].tolist())
    drawn = [set(range(8)) - set(rows) for rows, _ in asked if len(rows) == 5 and rows != decision.kept]
    assert all(sorted(classes[list(gone)].tolist()) == lost for gone in drawn)
    assert len({frozenset(gone) for gone in drawn}) > 1
    assert len({seed for _, seed in asked}) == 4, "the same seeds for all kinds"


def test_the_table_for_people_and_the_figures():
    found = effect(repeats=2, margin=True)
    lines = found.lines()
    assert lines[0] == "trained again 2 times on each, 4 queries; change against all rows with its 95% interval"
    assert [line.split("  ")[1] for line in lines[2:5]] == [ALL, CLEANED, RANDOM]
    assert "accuracy (higher is better)" in lines
    assert found.to_json()[CLEANED]["accuracy"]["mean"] == 0.75
    plain = CleaningEffect(measurements=found.measurements)
    assert plain.accuracy(CLEANED) is None
    assert not any("accuracy" in line for line in plain.lines())
    assert plain.to_json()[CLEANED]["accuracy"] is None


def test_one_query_has_no_interval():
    found = CleaningEffect(measurements={kind: torch.full((2, 1), value) for kind, value in ((ALL, 1.0), (CLEANED, 0.5))})
    assert found.to_json()[CLEANED]["measurement"] == {"mean": 0.5, "change": -0.5, "low": None, "high": None}
    assert found.lines()[-1] == "  cleaned                  0.5000  -0.5000"


def test_finished_trainings_are_not_repeated(tmp_path):
    first = effect(repeats=2, folder=tmp_path)
    again = effect(repeats=2, folder=tmp_path)
    assert all(torch.equal(first.measurements[kind], again.measurements[kind]) for kind in first.measurements)


def test_nothing_to_compare_is_an_error():
    with pytest.raises(ConfigError, match=r"2 rows are dropped and repeats=0"):
        effect(repeats=0)
    nothing = decide(torch.arange(4.0), count=1, floor=9.0)
    with pytest.raises(ConfigError, match=r"0 rows are dropped and repeats=3"):
        retrain_cleaned(CountsBadRows(), nothing)
