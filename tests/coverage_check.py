"""Is the account of what is attributed true? Counted from the model's own parameters."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import oracle


def parts_of(layer: oracle.Layer) -> list[Tensor]:
    """Mark the numbers of each parameter that lie in the layer's matrix: of a packed parameter, its own rows."""
    values = [torch.zeros_like(p, requires_grad=True) for p in layer.parameters]
    return [slope.flatten() > 0 for slope in torch.autograd.grad(layer.arrange(values).sum(), values)]


def assert_coverage_is_true(model: nn.Module, coverage: Any, tracked: Iterable[str]) -> None:
    """Check the names, the counts, the share, and that every trained parameter that is not tracked is under a name left out."""
    assert set(coverage.tracked) == set(tracked), "the tracked layers are not those expected"
    trained = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    sizes = {id(p): p.numel() for p in model.parameters() if p.requires_grad}
    covered = {key: torch.zeros(size, dtype=torch.bool) for key, size in sizes.items()}
    for name, count in coverage.tracked.items():
        layer = oracle.layer_of(model, name)
        shape = oracle.as_trained_matrix(layer, [None] * len(oracle.trained(layer))).shape
        assert count == shape.numel(), f"{name}: {count} parameters, not {shape.numel()}"
        for p, part in zip(layer.parameters, parts_of(layer), strict=True):
            if p.requires_grad:
                assert not (covered[id(p)] & part).any(), f"{name}: counted twice"
                covered[id(p)] |= part
    assert coverage.trainable == sum(sizes.values())
    assert coverage.share == pytest.approx(sum(coverage.tracked.values()) / sum(sizes.values()))
    reasons = dict(coverage.left_out)
    assert all(reasons.values()), "a reason is missing"
    assert not set(reasons) & set(coverage.tracked), "a layer is tracked and left out"
    for key, name in trained.items():
        if not covered[key].all():
            owner = name.rpartition(".")[0]
            named = any(left in {name, owner} or left.startswith(f"{owner}.") for left in reasons)
            assert named, f"{name} is not tracked and not among what is left out: {sorted(reasons)}"
    assert f"{len(coverage.tracked)} layers" in str(coverage)
