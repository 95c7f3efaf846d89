"""What holds for every test: one thread, known seeds, and models that are left as they were found."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from torch.nn.modules import module as module_registry

import cases

torch.set_num_threads(1)


def pytest_configure(config: pytest.Config) -> None:
    # Even kernels with padding="same" are a case here; torch remarks that they cost a copy.
    config.addinivalue_line("filterwarnings", "ignore:Using padding='same'")


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test pulls the plug, and thousands of small shards would wait for the disk most of the time."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture(autouse=True)
def seeds() -> None:
    """Start every test from the same global random state."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def models_are_left_as_found() -> Iterator[None]:
    """Fail a test that leaves a hook, an attribute, a flag or a changed number on a model made by `cases.build`."""
    cases.WATCHED.clear()
    hooks = global_hooks()
    yield
    left = cases.differences()
    cases.WATCHED.clear()
    assert not left, "the test left its model changed:\n" + "\n".join(left)
    assert global_hooks() == hooks, "the test left a global module hook"
    assert torch.is_grad_enabled(), "the test left gradients switched off"


def global_hooks() -> dict[str, int]:
    """Count the hooks that torch calls for every module of the process."""
    return {key: len(value) for key, value in vars(module_registry).items() if key.startswith("_global") and isinstance(value, dict)}
