"""Scatter pictures: sound files of both kinds, the same for the same numbers, whatever the labels say."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

from whence.errors import ConfigError, DataError, StorageError
from whence.report.scatter import scatter_picture

LABELS = {"x_label": "gradient cosine", "y_label": "EK-FAC score", "title": "digits, 4 queries"}
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(autouse=True)
def _needs_matplotlib() -> None:
    pytest.importorskip("matplotlib")


def points(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, generator=generator)
    return x, x + torch.randn(count, generator=generator)


def drawn(path: Path, count: int, **labels: str) -> bytes:
    scatter_picture(path, *points(count), **(LABELS | labels))
    return path.read_bytes()


def test_few_points_are_dots_and_many_are_hexagons(tmp_path):
    few, many = drawn(tmp_path / "few.svg", 300), drawn(tmp_path / "many.svg", 5000)
    dots = next(group for group in ElementTree.fromstring(few).iter(f"{SVG}g") if "PathCollection" in group.get("id", ""))
    assert len(list(dots.iter(f"{SVG}use"))) == 300
    shapes = ElementTree.fromstring(many)
    assert not any("PathCollection" in group.get("id", "") for group in shapes.iter(f"{SVG}g"))
    assert any("PolyCollection" in group.get("id", "") for group in shapes.iter(f"{SVG}g"))
    texts = {text.text for text in shapes.iter(f"{SVG}text")}
    assert {"points", "1", "10"} <= texts, "the colours are explained"
    assert not any("$" in text for text in texts if text)
    assert len(many) < 1_000_000


def test_texts_are_in_the_picture(tmp_path):
    texts = "".join(ElementTree.fromstring(drawn(tmp_path / "p.svg", 20)).itertext())
    assert all(text in texts for text in LABELS.values())


def test_pictures_are_png_when_asked(tmp_path):
    for count in (1, 30, 5000):
        assert drawn(tmp_path / "p.png", count).startswith(b"\x89PNG\r\n\x1a\n")
    assert [path.name for path in tmp_path.iterdir()] == ["p.png"], "no temporary file stays"


@pytest.mark.parametrize("name", ["p.png", "p.svg"])
@pytest.mark.parametrize("count", [50, 3000])
def test_the_same_numbers_give_the_same_bytes(tmp_path, name, count):
    assert drawn(tmp_path / name, count) == drawn(tmp_path / f"again-{name}", count)


def test_hostile_labels_are_drawn_as_text(tmp_path):
    hostile = "</text><script>alert(1)</script> $\\frac \x00 \ud800 \u4e2d &amp;"
    svg = drawn(tmp_path / "p.svg", 5, x_label=hostile, y_label=hostile, title=hostile)
    root = ElementTree.fromstring(svg)
    assert not any(element.tag.endswith("script") for element in root.iter())
    assert "<script>alert(1)" in "".join(root.itertext())
    assert drawn(tmp_path / "p.png", 5, x_label=hostile, y_label=hostile, title=hostile)


def test_long_labels_are_cut(tmp_path):
    texts = "".join(ElementTree.fromstring(drawn(tmp_path / "p.svg", 5, title="word " * 100)).itertext())
    assert "…" in texts
    assert texts.count("word") < 20


def test_constant_numbers_can_be_drawn(tmp_path):
    for count in (4, 3000):
        scatter_picture(tmp_path / "p.png", torch.zeros(count), torch.ones(count), **LABELS)


def test_axes_are_not_stretched_to_a_zero_that_is_far_away(tmp_path):
    scatter_picture(tmp_path / "p.svg", torch.tensor([1000.0, 1001.0]), torch.tensor([-1.0, 1.0]), **LABELS)
    ticks = {text.text for text in ElementTree.fromstring((tmp_path / "p.svg").read_bytes()).iter(f"{SVG}text")}
    assert "1000.0" in ticks
    assert "0" not in ticks


def test_numbers_that_require_gradients_or_are_half_can_be_drawn(tmp_path):
    scatter_picture(tmp_path / "p.svg", torch.rand(4).requires_grad_(), torch.rand(4).bfloat16(), **LABELS)


def test_drawing_changes_nothing_of_matplotlib(tmp_path):
    import matplotlib

    def found() -> tuple[dict[str, Any], bool]:
        # To look at "backend" would choose one, and load pyplot.
        return {key: matplotlib.rcParams[key] for key in matplotlib.rcParams if key != "backend"}, "matplotlib.pyplot" in sys.modules

    before = found()
    drawn(tmp_path / "p.svg", 3000)
    assert found() == before


@pytest.mark.parametrize("name", ["p.pdf", "p", "p.PNG"])
def test_other_kinds_of_files_are_refused(tmp_path, name):
    with pytest.raises(ConfigError, match=rf"'{re.escape(name)}' is no picture .* ends in \.png or \.svg"):
        scatter_picture(tmp_path / name, *points(3), **LABELS)


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ([1.0], [1.0, 2.0], r"\(1,\) and \(2,\) numbers make no points"),
        ([], [], r"not empty"),
        ([[1.0]], [[1.0]], r"give two vectors"),
        ([1.0, 2.0], [0.0, float("nan")], r"point 1 is \(2\.0, nan\) and cannot be drawn"),
    ],
)
def test_numbers_that_cannot_be_drawn(tmp_path, first, second, message):
    with pytest.raises(DataError, match=message):
        scatter_picture(tmp_path / "p.svg", torch.tensor(first), torch.tensor(second), **LABELS)
    assert not list(tmp_path.iterdir())


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(StorageError, match=r"missing.p\.svg"):
        drawn(tmp_path / "missing" / "p.svg", 3)


def test_without_matplotlib_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match=r'needs matplotlib, .*pip install "whence\[report\]"'):
        drawn(tmp_path / "p.svg", 3)
