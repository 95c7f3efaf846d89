"""Influence of groups of training rows, worked out by hand and over all possible draws."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import torch
from sklearn.cluster import KMeans

import whence
from case_run import HOSTILE, Elements
from compare import assert_close
from whence.errors import ConfigError
from whence.evaluate import clusters
from whence.evaluate.clusters import cluster_rows
from whence.scores.groups import Agreement, Together, group_scores

VALUES = torch.tensor([[1.0, 2.0, -3.0, 4.0, 0.5], [0.0, 1.0, 5.0, -1.0, 2.0]], dtype=torch.float64)
SOURCES = ["web", "book", "web", "book", "web"]


def test_sums_and_means_are_those_of_the_groups() -> None:
    found = group_scores(VALUES, SOURCES)
    assert found.names == ("web", "book")
    assert found.counts.tolist() == [3, 2]
    assert found.sums.tolist() == [[-1.5, 6.0], [7.0, 0.0]]
    assert_close(found.means, torch.tensor([[-0.5, 3.0], [7 / 3, 0.0]]), "means")
    assert [entry["group"] for entry in found.top(0)] == ["book", "web"]
    assert found.bottom(1, k=1)[0]["group"] == "book"
    assert_close(found.sums.sum(1), VALUES.sum(1), "nothing is lost")


def test_the_noise_is_that_of_all_possible_draws() -> None:
    found = group_scores(VALUES, SOURCES)
    for group, size in ((0, 3), (1, 2)):
        draws = torch.stack([VALUES[:, list(rows)].sum(1) for rows in combinations(range(5), size)])
        assert_close(found.noise[:, group], draws.std(0, correction=0), "noise", rtol=1e-12)
        assert_close(found.expected[:, group], draws.mean(0), "expected", rtol=1e-12)
    assert_close(found.z, (found.sums - found.expected) / found.noise, "z", rtol=1e-12)


def test_a_group_that_is_only_big_has_the_largest_sum_and_no_large_z() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(1, 1000, generator=generator) + 1
    values[0, 900:905] += 8
    found = group_scores(values, ["big"] * 900 + ["cause"] * 5 + ["other"] * 95).top(0)
    assert found[0]["group"] == "big"
    z = {entry["group"]: entry["z"] for entry in found}
    assert z["cause"] > 8
    assert z["big"] < 0


@pytest.mark.parametrize(("values", "groups"), [(VALUES, ["one"] * 5), (torch.full((2, 5), 0.1), SOURCES)])
def test_where_there_is_no_noise_nothing_stands_out(values: torch.Tensor, groups: list[str]) -> None:
    assert not group_scores(values, groups).z.any()


def test_groups_of_the_data_set_are_taken_for_the_rows_that_were_scored() -> None:
    scores = whence.Scores(values=VALUES[:, :3], train_rows=[4, 0, 3], trained_rows=5, query_rows=[7, 2])
    for groups in (torch.tensor([5, 6, 7, 5, 9]), [9, 5, 5]):
        found = scores.by_group(groups)
        assert found.names == ("9", "5")
        assert found.sums.tolist() == [[1.0, -1.0], [0.0, 6.0]]
        assert found.query_rows == [7, 2]


@pytest.mark.parametrize(
    ("groups", "message"),
    [(["a"], "1 entries for 5 training rows"), ([["a"]] * 5, "unhashable")],
)
def test_groups_that_cannot_be_used(groups: list, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        group_scores(VALUES, groups)


def test_groups_that_read_the_same_are_one() -> None:
    nan = float("nan")
    assert group_scores(VALUES, [1.0, nan, float("nan"), 1.0, nan]).names == ("1.0", "nan")
    assert group_scores(VALUES, torch.tensor([1.0, nan, nan, 1.0, 2.0])).names == ("1.0", "nan", "2.0")
    found = group_scores(VALUES, [1, "1", 2, "1", None])
    assert found.names == ("1", "2", "None")
    assert found.sums[0].tolist() == [7.0, -3.0, 0.5]


def test_scores_are_not_copied_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    real, copied = torch.Tensor.double, list[int]()
    monkeypatch.setattr(torch.Tensor, "double", lambda tensor: copied.append(tensor.dim()) or real(tensor))
    group_scores(VALUES.float(), SOURCES)
    assert set(copied) == {1}


def test_what_has_no_rows_has_no_groups() -> None:
    with pytest.raises(ConfigError, match="2 rows or more"):
        group_scores(VALUES[:, :1], ["a"])
    with pytest.raises(ConfigError, match="aggregate='rows'"):
        whence.Scores(values=VALUES[:, :1], settings={"aggregate": "rows"}).by_group(["a"])
    with pytest.raises(ConfigError, match="2 queries"):
        group_scores(VALUES, SOURCES).top(2)


def test_groups_are_written_and_shown(tmp_path: Path) -> None:
    found = group_scores(VALUES, [HOSTILE, "plain", HOSTILE, "plain", "plain"], query_rows=[7, 2])
    table = found._repr_html_()
    Elements(table).close()
    assert "<img" not in table
    assert "&lt;img" in table
    group_scores(VALUES, SOURCES, query_rows=[7, 2]).to_parquet(tmp_path / "groups.parquet")
    rows = pyarrow.parquet.read_table(tmp_path / "groups.parquet").to_pylist()
    assert [row["query"] for row in rows] == [7, 7, 2, 2]
    assert [(row["group"], row["sum"], row["rows"]) for row in rows[:3]] == [("book", 6.0, 2), ("web", -1.5, 3), ("web", 7.0, 3)]


def agreed(values: torch.Tensor, ids: torch.Tensor, k: int) -> Agreement:
    found = Together(ids, k)
    for part in values.split(3):
        found.add(part)
    assert_close(found.mean, values.double().mean(0, keepdim=True), "mean")
    return found.agreement()


def test_queries_agree_as_far_as_their_scores_correlate() -> None:
    values = torch.cat([VALUES, VALUES[:1] * 3 + 1, torch.zeros(1, 5)])
    ids = torch.tensor([10, 11, 12, 13, 14])
    found = agreed(values, ids, 2)
    pairs = torch.corrcoef(values[:3])[torch.triu_indices(3, 3, 1).unbind()]
    assert found.correlation == pytest.approx(float(pairs.mean()), abs=1e-12)
    assert found.queries == 4
    assert dict(found.common) == {13: 0.5, 11: 0.75}
    assert [row for row, _ in found.common] == [11, 13]
    alone = agreed(values[:1], ids, 2)
    assert alone.correlation is None
    assert alone.common == [(11, 1.0), (13, 1.0)]


def test_of_rows_that_score_the_same_the_first_are_strongest() -> None:
    ids = torch.arange(5)
    assert agreed(torch.tensor([[1.0, 2.0, 2.0, 2.0, 0.0]]), ids, 2).common == [(1, 1.0), (2, 1.0)]
    assert agreed(torch.tensor([[1.0, 2.0, 2.0, 3.0, 0.0]]), ids, 2).common == [(1, 1.0), (3, 1.0)]


def test_clusters_are_those_that_are_there() -> None:
    generator = torch.Generator().manual_seed(0)
    centres = torch.eye(3).repeat_interleave(torch.tensor([5, 9, 7]), dim=0)
    found = cluster_rows(centres + 0.01 * torch.randn(21, 3, generator=generator), 3)
    assert found.numbers.tolist() == [2] * 5 + [0] * 9 + [1] * 7
    assert [int(found.numbers[row]) for row in found.central] == [0, 1, 2]
    with pytest.raises(ConfigError, match="4 clusters of 3 different embeddings cannot be made; give 3 at most"):
        cluster_rows(centres, 4)
    with pytest.raises(ConfigError, match="give 2 to 21"):
        cluster_rows(centres, 22)


def test_the_row_nearest_to_a_centre_is_the_first_of_equally_near_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    points = torch.tensor([[0.0, 1.0], [5.0, 5.0], [0.0, -1.0], [0.0, 0.5], [5.0, 5.0], [0.0, -0.5]])
    right = cluster_rows(points, 2)
    assert right.central == (3, 1)
    monkeypatch.setattr(clusters, "_ROWS", 2)
    assert cluster_rows(points, 2).central == right.central


def test_clusters_make_no_second_copy_in_double_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[Any] = []
    real = KMeans.fit
    monkeypatch.setattr(KMeans, "fit", lambda own, points: taken.append(points) or real(own, points))
    points = torch.randn(30, 4, generator=torch.Generator().manual_seed(0))
    cluster_rows(points, 2)
    assert taken[0].ctypes.data == points.data_ptr()
