"""Layers that read the same input rotate it once, and get what they would alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import whence
from compare import assert_close
from whence.capture.pair import Pair
from whence.tasks import Classification


class Three(nn.Module):
    """Query, key and value projections of one input."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.query, self.key, self.value = nn.Linear(8, 7), nn.Linear(8, 7), nn.Linear(8, 6)
        self.plain, self.head = nn.Linear(8, 6, bias=False), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(x)
        weights = (self.query(x) @ self.key(x).mT).softmax(-1)
        return self.head((weights @ self.value(x) + self.plain(x)).mean(1))


ROWS = [(torch.randn(3, 8, generator=torch.Generator().manual_seed(i), dtype=torch.float64), i % 2) for i in range(40)]


def scores(layers: list[str]) -> dict[str, Tensor]:
    attributor = whence.Attributor(Three().double(), Classification(), layers=layers, progress=False)
    attributor.fit(ROWS, empirical=True, batch_size=6)
    return {**attributor.scores(ROWS[:3], ROWS, per_layer=True, batch_size=6).per_layer, "self": attributor.self_influence(ROWS)}


def test_together_is_as_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["query", "key", "value", "plain"]
    computed = []
    original = Pair._rotated_inputs
    monkeypatch.setattr(Pair, "_rotated_inputs", lambda self, q: computed.append(1) or original(self, q))
    together = scores(names)
    shared = len(computed)
    computed.clear()
    alone = {name: scores([name]) for name in names}
    assert 0 < shared < len(computed), "the three with a bias are rotated once"
    for name in names:
        assert_close(together[name], alone[name][name], name, rtol=0.0, atol_of_largest=1e-12)
    assert_close(together["self"], sum(part["self"] for part in alone.values()), "self", rtol=0.0, atol_of_largest=1e-12)
