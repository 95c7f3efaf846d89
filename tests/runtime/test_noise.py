"""Keyed noise depends on the example alone and is uniform."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from whence.errors import ConfigError
from whence.runtime.noise import KeyedNoise


def noise(ids: Sequence[int], *, seed: int = 3, stream: int = 0, **options: Any) -> KeyedNoise:
    return KeyedNoise(seed=seed, stream=stream, ids=ids, device="cpu", **options)


def test_batch_order_and_padding_change_nothing() -> None:
    whole = noise([5, 0, 7, 2**40]).uniform(6)
    assert whole.shape == (4, 6)
    assert whole.dtype == torch.float64
    assert torch.equal(noise([2**40, 7, 0, 5]).uniform(6), whole.flip(0))
    assert torch.equal(noise([7]).uniform(6), whole[2:3])
    assert torch.equal(noise([5, 0, 7, 2**40]).uniform(9)[:, :6], whole)
    assert torch.equal(noise([5]).uniform(), whole[0, :1])
    assert torch.equal(noise([5]).uniform(3, 2), whole[:1].reshape(1, 3, 2))
    assert torch.equal(noise([5]).uniform(7, 2)[:, :3], whole[:1].reshape(1, 3, 2))


def test_calls_are_fresh_and_depend_on_their_number_alone() -> None:
    one, other = noise([4, 9]), noise([9])
    first, second = one.uniform(4), one.uniform(4)
    assert torch.equal(other.uniform(100)[:, :4], first[1:])  # a first call of another length
    assert torch.equal(other.uniform(4), second[1:])
    assert not (first == second).any()


def test_every_part_of_the_key_matters() -> None:
    draws = [noise([i], seed=s, stream=t).uniform(4) for i in (0, 1, 2) for s in (0, 1, 2**64 - 1) for t in (0, 1, 2)]
    assert len(torch.stack(draws).unique()) == 4 * len(draws)


def test_the_numbers_are_those_of_philox_for_ever() -> None:
    words = np.random.Philox(key=np.array([3, 1], np.uint64), counter=np.array([0, 1, 8, 0], np.uint64)).random_raw(2)
    generator = noise([8], stream=1)
    generator.uniform()
    assert generator.uniform(2).tolist() == [[((int(word) >> 12) + 0.5) / 2**52 for word in words]]


def test_the_numbers_are_uniform_and_independent() -> None:
    # 400 000 numbers; each bound is beyond five standard deviations.
    numbers = noise(range(1000)).uniform(400).numpy()
    assert stats.kstest(numbers.ravel(), "uniform").pvalue > 1e-6
    assert stats.kstest(numbers[:, 0], "uniform").pvalue > 1e-6
    centred = (numbers - 0.5) * 12**0.5
    for left, right in ((centred[:-1], centred[1:]), (centred[:, :-1], centred[:, 1:])):
        assert abs((left * right).mean()) < 5 / left.size**0.5


@pytest.mark.parametrize("word", [0, 2**64 - 1])
def test_extreme_words_stay_strictly_inside(monkeypatch: pytest.MonkeyPatch, word: int) -> None:
    class Stub:
        def __init__(self, **_: Any) -> None:
            pass

        def random_raw(self, count: int) -> Any:
            return np.full(count, word, dtype=np.uint64)

    monkeypatch.setattr(np.random, "Philox", Stub)
    for dtype in (torch.float64, torch.float32):
        value = noise([1], dtype=dtype).uniform(1)
        assert value.dtype == dtype
        for converted in (value, value.float()):
            assert 0 < converted.item() < 1


def test_float32_is_float64_rounded() -> None:
    assert torch.equal(noise([1, 2], dtype=torch.float32).uniform(5), noise([1, 2]).uniform(5).float())


def test_empty_batches_and_shapes() -> None:
    assert noise([]).uniform(3).shape == (0, 3)
    assert noise([1, 2]).uniform(0).shape == (2, 0)
    assert noise([1, 2]).uniform(0, 4).shape == (2, 0, 4)


def test_other_types_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"torch\.float16 is not possible; choose torch\.float64 or torch\.float32"):
        noise([1], dtype=torch.float16)
