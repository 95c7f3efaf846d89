"""The picture of removals: every order by name, in both kinds of file, the same bytes for the same numbers."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

from whence.errors import ConfigError, StorageError
from whence.evaluate.removal import Counterfactual
from whence.report.counterfactual import counterfactual_picture

pytest.importorskip("matplotlib")


def result(*, mode="each", queries=6, tokens=None) -> Counterfactual:
    generator = torch.Generator().manual_seed(0)
    base = -1 - torch.rand(3, queries, generator=generator).double()
    after = base[:2] + torch.rand(3, 2, 2, queries, generator=generator).double() * 4
    return Counterfactual(
        mode=mode,
        methods=("ekfac", "bm25, signed & $x$", "random"),
        removed=(20, 60),
        queries=tuple(range(queries)),
        left_out=(9,),
        base=base,
        after=after,
        helpful=torch.full((3, queries if mode == "each" else 1), 100),
        tokens=tokens,
        resamples=50,
        settings={"seed": 0},
    )


def texts(path) -> str:
    return " ".join(re.findall(r"<text[^>]*>([^<]*)</text>", path.read_text(encoding="utf-8")))


@pytest.mark.parametrize(
    ("drawn", "shown", "hidden"),
    [
        (result(), ["queries flipped", "mean rise of the measurement", "100%"], ["perplexity"]),
        (result(mode="sum"), ["mean rise of the measurement"], ["flipped", "perplexity"]),
        (result(mode="sum", tokens=torch.full((6,), 5.0).double()), ["perplexity of the queries"], ["flipped", "mean rise"]),
        (result(queries=1), ["queries flipped"], []),
    ],
)
def test_every_order_is_there_with_the_right_panels(tmp_path, drawn, shown, hidden):
    path = tmp_path / "picture.svg"
    counterfactual_picture(path, drawn, title="RTE, 100 queries")
    text = texts(path)
    for wanted in ["ekfac", "bm25, signed &amp; $x$", "random", "training rows removed", "RTE, 100 queries", "20", "60", *shown]:
        assert wanted in text
    assert not [name for name in hidden if name in text]
    first = path.read_bytes()
    counterfactual_picture(path, drawn, title="RTE, 100 queries")
    assert path.read_bytes() == first


def test_a_png_and_many_orders(tmp_path):
    few = result()
    names = tuple(f"order {number} 字" for number in range(10))
    many = replace(few, methods=(*names, "random"), after=few.after[:1].expand(11, -1, -1, -1), helpful=few.helpful[:1].expand(11, -1))
    path = tmp_path / "picture.png"
    counterfactual_picture(path, many)
    assert path.read_bytes().startswith(b"\x89PNG\r\n")
    assert [file.name for file in tmp_path.iterdir()] == ["picture.png"]


def test_files_that_cannot_be_written(tmp_path):
    with pytest.raises(ConfigError, match=r"'picture.pdf' is no picture that can be drawn; give a name that ends in .png or .svg"):
        counterfactual_picture(tmp_path / "picture.pdf", result())
    with pytest.raises(StorageError, match="cannot write"):
        counterfactual_picture(tmp_path / "nowhere" / "picture.svg", result())
