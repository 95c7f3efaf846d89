"""A run folder full of text that means mischief, and a reader of the page about it."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections import OrderedDict
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

import whence

HOSTILE = "</script><img src=x onerror=\"document.title='hit'\"><!--<script>]]>&lt;\u2028\u2029'\"{{ 7*7 }}\ud800"
VOID = {"meta", "img", "br", "link", "input"}


class Elements(HTMLParser):
    """Collects every tag with its attributes, and the text within each kind of tag."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.inside: dict[str, list[str]] = {}
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
            self.inside.setdefault(tag, []).append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag, tag

    def handle_data(self, data: str) -> None:
        if self.open:
            self.inside[self.open[-1]][-1] += data

    def with_class(self, tag: str, name: str) -> list[dict[str, str | None]]:
        return [attributes for found, attributes in self.tags if found == tag and name in (attributes.get("class") or "").split()]


def network(layer: str = "first") -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(OrderedDict([(layer, nn.Linear(4, 6)), ("middle", nn.Tanh()), ("last", nn.Linear(6, 2))]))


def rows(count: int, seed: int, text: str) -> list[tuple[torch.Tensor, int, str]]:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, 4, generator=generator)
    return [(x, int(x[0] > 0), f"{text} number {place}") for place, x in enumerate(inputs)]


def collate(batch: list[Any]) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.stack([row[0] for row in batch]), torch.tensor([row[1] for row in batch])


def recipe(text: str = "sample", *, train: int = 30, queries: int = 4, names: dict[int, str] | None = None) -> whence.Recipe:
    """Return a recipe whose rows, labels and layers carry `text`."""
    # torch takes no dots in the name of a layer, and files take no lone surrogates there.
    model = network("first" if text == "sample" else text.replace(".", " ").encode("utf-8", "replace").decode())
    model.config = SimpleNamespace(id2label=names or {0: f"no {text}", 1: f"yes {text}"})  # type: ignore[assignment]
    data, asked = rows(train, 1, text), rows(queries, 2, text)
    return whence.Recipe(
        name="mine",
        model=model,
        task=whence.tasks.Classification(),
        train=data,
        queries=asked,
        collate=collate,
        describe=lambda row: row[2],
        classes=torch.tensor([row[1] for row in data]),
        query_classes=torch.tensor([row[1] for row in asked]),
        flipped=torch.tensor([place == 3 for place in range(train)]),
    )


def run_of(found: whence.Recipe, folder: Path, **options: Any) -> Path:
    """Fit and score a recipe into a run folder."""
    attributor = whence.Attributor(found.model, found.task, run_dir=folder, collate=found.collate, progress=False, device="cpu")
    attributor.fit(found.train, strategy="kfac")
    attributor.scores(found.queries, found.train, **{"per_layer": True, **options})
    attributor.self_influence(found.train)
    return folder


def data_of(page: str) -> dict[str, Any]:
    """Return what is embedded for the script."""
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, flags=re.DOTALL)
    assert found
    return json.loads(found[1])


def hash_of(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
