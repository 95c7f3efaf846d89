"""Comparison of tensors that says where and by how much they differ."""

from __future__ import annotations

import torch
from torch import Tensor


def assert_close(actual: Tensor, expected: Tensor, what: str, *, rtol: float = 1e-6, atol_of_largest: float = 1e-9) -> None:
    """Fail, saying where and by how much, unless `|actual - expected| <= rtol |expected| + atol_of_largest max |expected|`."""
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    actual, expected = actual.detach().double(), expected.detach().double()
    largest = expected.abs().max() if expected.numel() else torch.tensor(0.0)
    wrong = ~((actual - expected).abs() <= rtol * expected.abs() + atol_of_largest * largest)
    if wrong.any():
        raise AssertionError(allclose_report(actual, expected, wrong, what))


def allclose_report(actual: Tensor, expected: Tensor, wrong: Tensor, what: str, show: int = 5) -> str:
    """Say how many entries differ, by how much in all, and list the worst."""
    error = (actual - expected).abs()
    order = torch.where(error.isnan(), torch.inf, error).flatten().argsort(descending=True)[:show]
    overall = (error.norm() / expected.norm()).item()
    slope = ((actual * expected).sum() / expected.square().sum()).item()
    lines = [
        f"{what}: {int(wrong.sum())} of {wrong.numel()} entries differ; relative error of the whole {overall:.2e}, "
        f"least-squares factor actual/expected {slope:.8f}"
    ]
    for flat in order.tolist():
        place = tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), actual.shape))
        have, want = actual.flatten()[flat].item(), expected.flatten()[flat].item()
        lines.append(f"  at {place}: {have:.9g}, expected {want:.9g}, difference {have - want:.2e}")
    return "\n".join(lines)
