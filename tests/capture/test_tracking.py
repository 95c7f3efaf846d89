"""What is tracked, and whether the coverage line tells the truth."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import whence
from whence.capture.tracking import track
from whence.errors import LayerError
from whence.tasks import Classification

ROWS = [(torch.randn(4, 3, generator=torch.Generator().manual_seed(i)), i % 2) for i in range(9)]


class Positions(nn.Module):
    """Adds a projection of position features that are shared by the batch; has a layer that is never called."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.shared = nn.Linear(2, 5)
        self.inner = nn.Linear(3, 5)
        self.idle = nn.Linear(2, 2)
        self.head = nn.Linear(5, 2)
        self.norm = nn.LayerNorm(5)
        self.register_buffer("features", torch.arange(8.0).view(1, 4, 2))

    def forward(self, x: Tensor) -> Tensor:
        """Pool over four positions."""
        return self.head(self.norm(self.inner(x) + self.shared(self.features)).tanh().mean(1))


def test_layers_off_the_batch_or_unreached_are_left_out_and_named() -> None:
    attributor = whence.Attributor(Positions(), Classification(), progress=False).fit(ROWS, empirical=True, strategy="ekfac")
    scores = attributor.scores(ROWS[:2], ROWS, per_layer=True, batch_size=1)
    assert set(attributor.coverage.tracked) == {"inner", "head", "norm"}
    reasons = dict(attributor.coverage.left_out)
    assert "batch's axis" in reasons["shared"]
    assert "reached by no gradient" in reasons["idle"]
    assert attributor.coverage.share == (3 * 5 + 5 + 5 * 2 + 2 + 10) / (20 + 15 + 10 + 6 + 12)
    assert not scores.per_layer.get("idle", torch.zeros(1)).any()
    named = whence.Attributor(Positions(), Classification(), layers=["inner", "head", "norm"], progress=False).fit(ROWS, empirical=True)
    torch.testing.assert_close(named.scores(ROWS[:2], ROWS).values, scores.values)


def test_only_a_trained_bias_is_tracked() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Flatten(), nn.Linear(16, 2)).double()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith("bias"))
    rows = [(x.double(), y) for x, y in ROWS]
    attributor = whence.Attributor(model, Classification(), progress=False).fit(rows, strategy="identity")
    assert attributor.coverage.share == 1.0
    assert attributor.coverage.tracked == {"0": 4, "3": 2}

    def gradient(row: tuple[Tensor, int]) -> Tensor:
        loss = nn.functional.cross_entropy(model(row[0][None]), torch.tensor([row[1]]))
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, [model[0].bias, model[3].bias])])

    expected = torch.stack([gradient(row) for row in rows])
    torch.testing.assert_close(attributor.scores(rows[:2], rows).values, expected[:2] @ expected.T)


def test_output_heads_as_wide_as_the_vocabulary_are_left_out_unless_asked_for() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=20, n_positions=8, tie_word_embeddings=False)
    model = transformers.GPT2LMHeadModel(config)
    layers, coverage = track(model)
    assert "lm_head" not in [layer.name for layer in layers]
    assert "vocabulary" in dict(coverage.left_out)["lm_head"]
    assert "lm_head" in [layer.name for layer in track(model, "all")[0]]


def test_a_weight_shared_with_another_kind_of_layer_is_left_out() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm((3, 3)), nn.Linear(3, 5))
    model[1].weight = model[0].weight
    layers, coverage = track(model, "all")
    assert [layer.name for layer in layers] == ["2"]
    assert "shared" in dict(coverage.left_out)["0"]
    assert "shared" in dict(coverage.left_out)["1"]
    assert coverage.share == 20 / (9 + 3 + 9 + 20)


def test_a_tied_head_is_part_of_its_embedding() -> None:
    model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 3), nn.Linear(3, 5))
    model[2].weight = model[0].weight
    layers, coverage = track(model, "all")
    assert [layer.name for layer in layers] == ["0", "1", "2"]
    assert coverage.tracked == {"0": 15, "1": 12, "2": 5}
    assert coverage.share == 1.0
    assert list(track(model)[1].tracked) == ["1"]


def test_a_model_without_a_layer_to_track_says_why() -> None:
    with pytest.raises(LayerError, match=r"'0': no handler for Bilinear.*fallback=True"):
        track(nn.Sequential(nn.Bilinear(5, 3, 2)))
    with pytest.raises(LayerError, match=r"'0': .*layers='all'"):
        track(nn.Sequential(nn.Embedding(5, 3)))
    frozen = nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(LayerError, match="frozen"):
        track(nn.Sequential(frozen))


def test_a_subclass_that_computes_something_else_is_left_out() -> None:
    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    model = nn.Sequential(Doubled(3, 4), nn.Flatten(), nn.Linear(16, 2))
    attributor = whence.Attributor(model, Classification(), progress=False).fit(ROWS)
    assert "Doubled that does not compute what Linear does" in dict(attributor.coverage.left_out)["0"]
    with pytest.raises(LayerError, match=r"'0'.*Doubled"):
        whence.Attributor(model, Classification(), layers=["0"], progress=False).fit(ROWS)
