"""What a case is: a model that is watched, a task, rows and how they are collated, and the layers that must be tracked."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import default_collate

from case_data import QUERIES, TRAIN, labelled
from whence.tasks import Classification, Task

STRATEGIES = ("identity", "diagonal", "kfac", "ekfac")

# Every model built here, with what it was like: the fixture of conftest.py compares at the end of the test.
WATCHED: list[tuple[nn.Module, dict[str, Any]]] = []


def state_of(model: nn.Module) -> dict[str, Any]:
    """Return all that the engine must leave as it was: hooks, attributes, flags, parameters, buffers and gradients."""
    state: dict[str, Any] = {}
    for name, module in model.named_modules():
        state[f"{name}: type"] = type(module)
        state[f"{name}: training"] = module.training
        state[f"{name}: attributes"] = sorted(vars(module))
        for key, value in vars(module).items():
            if "hooks" in key:
                state[f"{name}: {key}"] = dict(value) if isinstance(value, dict) else value
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        state[f"{name}: identity"] = (id(tensor), tensor.data_ptr(), type(tensor), tensor.dtype)
        state[f"{name}: requires_grad"] = tensor.requires_grad
        state[f"{name}: attributes"] = sorted(vars(tensor))
        state[f"{name}: hooks"] = dict(tensor._backward_hooks or {})
        state[f"{name}: gradient"] = digest(tensor.grad)
        state[f"{name}: values"] = digest(tensor)
    return state


def digest(tensor: Tensor | None) -> str | None:
    """Return a short hash of the bytes: NaN equals NaN here."""
    return None if tensor is None else hashlib.sha256(tensor.detach().reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()[:12]


def watch(model: nn.Module) -> nn.Module:
    """Remember the model as it is now; a test that leaves it otherwise fails. Call again after a change made on purpose."""
    WATCHED[:] = [entry for entry in WATCHED if entry[0] is not model]
    WATCHED.append((model, state_of(model)))
    return model


def build(factory: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """Return the factory's model in float64 and eval mode, watched, without touching the global random state."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return watch(factory().double().eval())


def differences() -> list[str]:
    """Say how the watched models differ from what they were."""
    found = []
    for model, before in WATCHED:
        after = state_of(model)
        found += [
            f"{type(model).__name__} {key}: {before.get(key)} -> {after.get(key)}"
            for key in before | after
            if before.get(key) != after.get(key)
        ]
    return found


@dataclass(frozen=True, kw_only=True, eq=False)
class Case:
    """One situation the engine must get right."""

    name: str
    factory: Callable[[], nn.Module]
    rows: Callable[[torch.Generator, int], list]
    tracked: tuple[str, ...]
    task: Callable[[], Task] = field(default=partial(Classification, measurement="margin"))
    collate: Callable[[list], Any] = default_collate
    layers: Any = None
    fallback: bool = False
    sampled: bool = True
    needs: str | None = None

    def model(self) -> nn.Module:
        if self.needs:
            pytest.importorskip(self.needs)
        return build(self.factory, seed=zlib.crc32(self.name.encode()))

    def data(self) -> tuple[list, list]:
        """Return training rows and queries."""
        generator = torch.Generator().manual_seed(zlib.crc32(self.name.encode()) + 1)
        return self.rows(generator, TRAIN), self.rows(generator, QUERIES)

    def attributor(self, model: nn.Module, **options: Any) -> Any:
        import whence

        settings = {"layers": self.layers, "collate": self.collate, "device": "cpu", "progress": False, **options}
        if self.fallback:
            settings.setdefault("fallback", True)
        return whence.Attributor(model, settings.pop("task", None) or self.task(), **settings)


vectors = partial(labelled, shape=(4,))


def simple(name: str, factory: Callable[[], nn.Module], tracked: str, **options: Any) -> Case:
    """A case on plain vectors; `tracked` names layers separated by blanks."""
    return Case(**{"name": name, "factory": factory, "rows": vectors, "tracked": tuple(tracked.split()), **options})
