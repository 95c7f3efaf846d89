"""Handwritten digits with some wrong labels: a real data set that needs no download.

Data: 1,797 images of 8 x 8 pixels that scikit-learn ships, https://archive.ics.uci.edu/dataset/80 (test part; E. Alpaydin
and C. Kaynak, "Optical Recognition of Handwritten Digits", UCI, 1998). A row: `Digit(image=[1, 8, 8], label=3, truth=8)`.
Run it: `whence self digits`, or `whence demo` for the whole story as a page.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from whence.recipes.base import Recipe
from whence.recipes.labels import flip_labels
from whence.runtime.device import one_thread
from whence.storage.fingerprints import fingerprint_source
from whence.tasks import Classification

CLASSES = 10


class Digit(NamedTuple):
    """One image `[1, 8, 8]` from 0 (paper) to 1 (ink), the label it is given, and the digit it shows."""

    image: Tensor
    label: int
    truth: int


@dataclass(frozen=True, kw_only=True)
class DigitsSettings:
    """Everything that makes the data and the network what they are."""

    seed: int = 0
    """Seed of the split, the wrong labels, the first weights and the order of training."""

    test_rows: int = 597
    """Images held out; the others, 1,200, are for training."""

    flipped_share: float = 0.1
    """Share of the training labels replaced by another class, drawn uniformly."""

    epochs: int = 16
    """Passes over the training images. Past 25 or so the network starts to memorise the wrong labels."""

    batch_size: int = 64
    """Images per step."""

    learning_rate: float = 4e-3
    """Highest learning rate of the one-cycle schedule."""

    weight_decay: float = 0.01
    """Decoupled weight decay of AdamW."""


@dataclass(frozen=True, kw_only=True)
class DigitsData:
    """Training rows, some of them with a wrong label, and test rows, all with the right one."""

    train: list[Digit]
    test: list[Digit]

    @property
    def flipped(self) -> Tensor:
        """Which training labels were flipped, bool `[train]`."""
        return torch.tensor([row.label != row.truth for row in self.train])


def load_data(settings: DigitsSettings = DigitsSettings()) -> DigitsData:
    """Load the images, split them and flip some training labels, all by the seed."""
    from sklearn.datasets import load_digits

    source = load_digits()
    images = torch.tensor(source.images, dtype=torch.float32).div_(16).unsqueeze(1)
    truths = torch.tensor(source.target, dtype=torch.int64)
    generator = torch.Generator().manual_seed(settings.seed)
    order = torch.randperm(len(truths), generator=generator)
    test, train = order[: settings.test_rows], order[settings.test_rows :]
    labels = flip_labels(truths[train], share=settings.flipped_share, classes=CLASSES, generator=generator)
    return DigitsData(
        train=[Digit(images[i], label, int(truths[i])) for i, label in zip(train.tolist(), labels.tolist(), strict=True)],
        test=[Digit(images[i], int(truths[i]), int(truths[i])) for i in test.tolist()],
    )


def build_network(seed: int = 0) -> nn.Sequential:
    """Return an untrained network of two convolutions and two linear layers, 38,282 parameters."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(32 * 4 * 4, 64),
            nn.ReLU(),
            nn.Linear(64, CLASSES),
        )


def train_network(network: nn.Module, rows: list[Digit], settings: DigitsSettings = DigitsSettings()) -> None:
    """Train in place, with AdamW and a one-cycle schedule; the network is left in eval mode.

    On one thread, so that the weights are the same whatever the number of cores.
    """
    with one_thread():
        _train(network, rows, settings)


def _train(network: nn.Module, rows: list[Digit], settings: DigitsSettings) -> None:
    images, labels = stack(rows)
    steps = settings.epochs * -(-len(rows) // settings.batch_size)
    optimizer = torch.optim.AdamW(network.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=settings.learning_rate, total_steps=steps)
    generator = torch.Generator().manual_seed(settings.seed)
    network.train()
    for _ in range(settings.epochs):
        for batch in torch.randperm(len(rows), generator=generator).split(settings.batch_size):
            optimizer.zero_grad()
            F.cross_entropy(network(images[batch]), labels[batch]).backward()
            optimizer.step()
            schedule.step()
    network.eval().zero_grad()


@torch.no_grad()
def predict(network: nn.Module, rows: list[Digit]) -> tuple[Tensor, Tensor]:
    """Return the network's reading `[row]`, and the loss `[row]` of each row's given label."""
    images, labels = stack(rows)
    logits = network(images)
    return logits.argmax(1), F.cross_entropy(logits, labels, reduction="none")


def stack(rows: list[Digit]) -> tuple[Tensor, Tensor]:
    """Return the rows' images `[row, 1, 8, 8]` and given labels `[row]`."""
    return torch.stack([row.image for row in rows]), torch.tensor([row.label for row in rows])


def describe(row: Digit) -> str:
    """Return one line about a row."""
    return f"labelled {row.label}" + ("" if row.label == row.truth else f", shows {with_article(row.truth)} (flipped)")


def with_article(digit: int) -> str:
    """Return `a 3`, but `an 8`."""
    return f"{'an' if digit == 8 else 'a'} {digit}"


def digits() -> Recipe:
    """Train the network and ask why it misreads the test digits it misreads."""
    settings = DigitsSettings()
    data = load_data(settings)
    network = build_network(settings.seed)
    train_network(network, data.train, settings)
    return make_recipe(network, data, settings)


def make_recipe(network: nn.Module, data: DigitsData, settings: DigitsSettings = DigitsSettings()) -> Recipe:
    """Return the recipe of a trained network; its queries are the test digits that it misreads, with their true labels."""
    readings, _ = predict(network, data.test)
    misread = [number for number, (row, reading) in enumerate(zip(data.test, readings.tolist(), strict=True)) if reading != row.label]
    return Recipe(
        name="digits",
        model=network,
        task=Classification(),
        train=data.train,
        queries=[data.test[number] for number in misread],
        describe=describe,
        picture=lambda row: row.image,
        raw=[{"image": row.image.flatten().tolist(), "label": row.label} for row in data.train],
        classes=torch.tensor([row.label for row in data.train]),
        query_classes=torch.tensor([data.test[number].label for number in misread]),
        flipped=data.flipped,
        retraining=DigitsRetraining(settings=settings, rows=tuple(misread)),
    )


@dataclass(frozen=True, kw_only=True)
class DigitsRetraining:
    """The digits as a procedure for `whence.evaluate.retrain`: train on some of the training rows, measure test rows."""

    settings: DigitsSettings = DigitsSettings()
    """Of the data, and of the training but for its seed."""

    queries: int = 200
    """How many test rows, from the first, are measured."""

    rows: tuple[int, ...] | None = None
    """Which test rows are measured instead."""

    measurement: Literal["loss", "margin"] = "loss"
    """As of `whence.tasks.Classification`."""

    @property
    def key(self) -> str:
        """Everything the numbers depend on, the source of data, network and training included."""
        code = [fingerprint_source(function)[:16] for function in (load_data, build_network, _train)]
        fields = {name: value for name, value in asdict(self).items() if name != "rows" or value is not None}
        return json.dumps({"recipe": "digits", **fields, "code": code})

    def __call__(self, rows: Sequence[int], seed: int) -> Tensor:
        """Train a network from fresh weights on these training rows; return the measurements `[query]`."""
        data = _data(self.settings)
        network = build_network(seed)
        train_network(network, [data.train[row] for row in rows], replace(self.settings, seed=seed))
        with torch.no_grad(), one_thread():
            return Classification(measurement=self.measurement).measurement(network, stack(self._measured(data)))

    def _measured(self, data: DigitsData) -> list[Digit]:
        return data.test[: self.queries] if self.rows is None else [data.test[row] for row in self.rows]


@cache
def _data(settings: DigitsSettings) -> DigitsData:
    # A worker reads the files once, not for every job.
    return load_data(settings)
