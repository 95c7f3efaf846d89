"""The digits: flips, split, network and training are the same every time."""

from __future__ import annotations

import pytest
import torch

from whence.errors import ConfigError
from whence.recipes import digits as d
from whence.recipes.base import load_recipe
from whence.recipes.labels import flip_labels


def flip(labels: torch.Tensor, seed: int = 0, **options) -> torch.Tensor:
    return flip_labels(labels, **{"share": 0.1, "classes": 10} | options, generator=torch.Generator().manual_seed(seed))


def test_flips_are_exact_in_number_never_to_the_same_class_and_keyed_by_the_seed():
    labels = torch.arange(1000) % 10
    flipped = flip(labels)
    changed = flipped != labels
    assert changed.sum() == 100
    assert flipped.min() >= 0
    assert flipped.max() <= 9
    assert torch.equal(flipped, flip(labels))
    assert not torch.equal(flipped, flip(labels, seed=1))
    assert torch.equal(labels, torch.arange(1000) % 10), "the labels given must not change"


def test_flips_reach_every_other_class_equally():
    flipped = flip(torch.zeros(90_000, dtype=torch.int64), share=1.0)
    counts = torch.bincount(flipped, minlength=10)
    assert counts[0] == 0
    # Binomial with mean 10,000 and standard deviation 94: five of those.
    assert (counts[1:] - 10_000).abs().max() < 470


@pytest.mark.parametrize(
    ("options", "message"), [({"share": 1.5}, "share=1.5"), ({"share": -0.1}, "0 to 1"), ({"classes": 1}, "classes=1")]
)
def test_flips_that_cannot_be(options, message):
    with pytest.raises(ConfigError, match=message):
        flip(torch.zeros(10, dtype=torch.int64), **options)


def test_the_split_has_every_image_once_and_wrong_labels_in_training_only():
    data = d.load_data()
    assert (len(data.train), len(data.test)) == (1200, 597)
    assert data.flipped.sum() == 120
    assert all(row.label == row.truth for row in data.test)
    assert data.train[0].image.shape == (1, 8, 8)
    pixels, _ = d.stack(data.train)
    assert (pixels.min(), pixels.max()) == (0, 1)
    again, other = d.load_data(), d.load_data(d.DigitsSettings(seed=1))
    assert [row.label for row in again.train] == [row.label for row in data.train]
    assert [row.label for row in other.train] != [row.label for row in data.train]


def test_training_is_deterministic_and_leaves_the_random_state_alone():
    settings = d.DigitsSettings(epochs=1)
    rows = d.load_data(settings).train[:200]
    state = torch.get_rng_state()
    weights = []
    for _ in range(2):
        network = d.build_network(3)
        d.train_network(network, rows, settings)
        weights.append(torch.cat([p.flatten() for p in network.parameters()]))
        assert not network.training
        assert all(p.grad is None for p in network.parameters())
    assert torch.equal(*weights)
    assert torch.equal(torch.get_rng_state(), state)


def test_threads_change_nothing_and_are_as_they_were():
    rows, before = d.load_data().train[:128], torch.get_num_threads()
    weights = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            network = d.build_network()
            d.train_network(network, rows, d.DigitsSettings(epochs=1))
            assert torch.get_num_threads() == threads
            weights.append(torch.cat([p.flatten() for p in network.parameters()]))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*weights)


def test_the_built_in_recipe_asks_about_misread_digits():
    recipe = load_recipe("digits")
    readings, losses = d.predict(recipe.model, recipe.queries)
    assert recipe.name == "digits"
    assert 0 < len(recipe.queries) < 60
    assert all(reading != row.label for reading, row in zip(readings.tolist(), recipe.queries, strict=True))
    assert losses.shape == (len(recipe.queries),)


def test_rows_are_described_in_one_line():
    image = torch.zeros(1, 8, 8)
    assert d.describe(d.Digit(image, 3, 3)) == "labelled 3"
    assert d.describe(d.Digit(image, 3, 8)) == "labelled 3, shows an 8 (flipped)"
