"""The gradient index against the scores it stands for, on every kind of layer, and what happens to it on disk."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import whence
from cases import EMPIRICAL, STRATEGIES, case_named, watch
from whence import indexing, workbench
from whence.errors import ConfigError, DataError, MismatchError, StorageError
from whence.index import writer
from whence.index.cut import Cut
from whence.index.factors import FactorBatch, FactorRows, Triplets
from whence.index.index import Index
from whence.index.projection import RowSettings

MLP = case_named("mlp")
ROWS, QUERIES = MLP.data()


def close(found: Tensor, expected: Tensor, tolerance: float = 2e-6) -> None:
    """Rows are kept in float32: rounding, relative to the largest score."""
    assert found.shape == expected.shape
    assert (found.double() - expected.double()).abs().max() <= tolerance * expected.abs().max()


def fitted(run_dir: Path | None = None, strategy: str = "ekfac", model: nn.Module | None = None) -> whence.Attributor:
    attributor = MLP.attributor(MLP.model() if model is None else model, run_dir=run_dir)
    return attributor.fit(ROWS, strategy=strategy, empirical=True)


@pytest.mark.parametrize("projection", ["none", "factors"])
@pytest.mark.parametrize("case", EMPIRICAL, ids=lambda case: case.name)
def test_whole_rows_give_the_scores(case: Any, projection: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # All triplets of a small layer cost more than its numbers do.
    monkeypatch.setattr(FactorRows, "budget", property(lambda self: 10**6))
    attributor = case.attributor(case.model())
    train, queries = case.data()
    attributor.fit(train, empirical=True, batch_size=5)
    index = attributor.index(train, projection=projection, keep=1, dtype="float32", batch_size=5)
    close(index.scores(queries), attributor.scores(queries, train, batch_size=5).values)
    close(index.self_influence, attributor.self_influence(train, batch_size=5))


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("response", ["inverse", whence.Unrolled(time=0.3)])
def test_whole_rows_give_the_scores_of_every_strategy(strategy: str, response: Any) -> None:
    attributor = fitted(strategy=strategy)
    index = attributor.index(ROWS, projection="none", keep=1, dtype="float32", response=response)
    close(index.scores(QUERIES), attributor.scores(QUERIES, ROWS, response=response).values)


@pytest.mark.parametrize("projection", ["pca", "kronecker", "sjlt"])
def test_embeddings_are_sketched(projection: str) -> None:
    case = case_named("embedding")
    train, queries = case.data()
    attributor = case.attributor(case.model()).fit(train, empirical=True)
    exact = attributor.scores(queries, train).values
    found = torch.zeros_like(exact)
    for attributor.seed in range(24):  # one sketch into a few numbers is mostly noise; their mean is not
        found += attributor.index(train, projection=projection, keep=0.9, dtype="float32").scores(queries)
    correlation = torch.corrcoef(torch.stack([found.flatten(), exact.flatten()]))[0, 1]
    assert float(correlation) > 0.95


@pytest.mark.parametrize("projection", ["none", "factors"])
def test_queries_that_reach_no_layer_score_zero(projection: str) -> None:
    index = fitted().index(ROWS, projection=projection, keep=1)
    reached, _ = index._bench.index_queries(QUERIES, None, index.settings)
    scores = torch.cat([scores for _, scores in index._stored.blocks(reached, reached.hold(3))])
    assert torch.equal(scores, torch.zeros(len(ROWS), 3))


def test_shards_are_as_large_as_rows_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "BLOCK", 4)
    attributor = fitted()
    numbers = sum(layer.parameters for layer in attributor._layers)
    monkeypatch.setattr(writer, "SHARD_BYTES", 8 * numbers * 4)
    index = attributor.index(ROWS, projection="none", dtype="float32")  # whatever `keep` says
    assert sum("rows-" in name for name in index._stored.store.names) == 4


def test_the_curvature_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    attributor, calls = fitted(), []
    real = indexing.stored_curvature
    for module in (indexing, workbench):
        monkeypatch.setattr(module, "stored_curvature", lambda *arguments: calls.append(1) or real(*arguments))
    attributor.index(ROWS, keep=0.5)
    assert len(calls) == 1


def test_batches_change_nothing() -> None:
    attributor = fitted()
    one, other = (attributor.index(ROWS, keep=0.3, dtype="float32", batch_size=size, name=str(size)) for size in (13, 4))
    close(one.scores(QUERIES), other.scores(QUERIES), 1e-6)


@pytest.mark.parametrize("projection", ["factors", "pca", "kronecker", "sjlt"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "int4"])
def test_rows_keep_to_their_bytes(projection: str, dtype: str) -> None:
    attributor = fitted()
    keep = 0.25
    index = attributor.index(ROWS, projection=projection, keep=keep, dtype=dtype)
    kept = sum(
        tensor.numel() * tensor.element_size()
        for name in index._stored.store.names
        if "rows-" in name
        for key, tensor in index._stored.store.read(name).items()
        if key != "norm"
    )
    numbers = sum(layer.parameters for layer in attributor._layers)
    assert 0.3 * keep * 4 * numbers * len(ROWS) < kept <= keep * 4 * numbers * len(ROWS)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 2e-6), ("bfloat16", 2e-2), ("int8", 2e-2), ("int4", 0.15)])
def test_rounding_is_as_small_as_the_type_allows(dtype: str, tolerance: float) -> None:
    attributor = fitted()
    exact = attributor.scores(QUERIES, ROWS).values
    index = attributor.index(ROWS, projection="none", keep=1, dtype=dtype)
    close(index.scores(QUERIES), exact, tolerance)
    if dtype != "float32":
        assert (index.scores(QUERIES).double() - exact).abs().max() > 1e-6 * exact.abs().max()


def test_triplets_are_the_best_of_their_number() -> None:
    """With one position a gradient has one triplet a layer, so two of three layers are kept where the bytes suffice for two."""
    attributor = fitted(strategy="identity")
    scores = attributor.scores(QUERIES, ROWS, per_layer=True)
    shapes = {layer.name: layer.shape for layer in attributor._layers}
    bytes_of = {name: 4 * (outputs + inputs) + 8 for name, (_, outputs, inputs) in shapes.items()}
    whole = 4 * sum(map(math.prod, shapes.values()))
    index = attributor.index(ROWS, keep=(sum(bytes_of.values()) - 1) / whole, dtype="float32")
    found = index.scores(QUERIES).double()
    candidates = torch.stack([scores.values.double() - scores.per_layer[name].double() for name in shapes])
    distance = (candidates - found).abs().amax(1)
    assert float(distance.min(0).values.max()) < 1e-5 * float(scores.values.abs().max())


def test_triplets_that_do_not_fit_leave_room_for_cheaper_ones() -> None:
    shapes = {"large": (1, 100, 100), "small": (1, 4, 4)}
    settings = RowSettings(keep=1000 / (4 * 10016), dtype="float32")  # one large triplet takes 808 bytes, one small 40
    cuts = {name: Cut(sizes=shape[1:]) for name, shape in shapes.items()}
    rows = FactorRows(balances={}, shapes=shapes, cuts=cuts, settings=settings)
    nothing, values = torch.zeros(1), {"large": [3.0, 2.9], "small": [0.1, 0.05]}
    found = {name: Triplets(left=nothing, right=nothing, values=torch.tensor([own])) for name, own in values.items()}
    chosen = FactorBatch(projection=rows, examples=1, found=found)._chosen()
    assert {name: kept.tolist() for name, kept in chosen.items()} == {"large": [[True, False]], "small": [[True, True]]}


def test_query_names_the_rows_that_scores_name() -> None:
    attributor = fitted()
    exact = attributor.scores(QUERIES, ROWS)
    answer = attributor.index(ROWS, projection="none", keep=1, dtype="float32").query(QUERIES, k=3, rescore=0)
    for query in range(len(QUERIES)):
        for found, expected in ((answer.top(query), exact.top(query, 3)), (answer.bottom(query), exact.bottom(query, 3))):
            assert [row for row, _ in found] == [row for row, _ in expected]
            assert [score for _, score in found] == pytest.approx([score for _, score in expected], rel=1e-4)
    assert not answer.exact


def test_rescoring_makes_the_best_exact() -> None:
    attributor = fitted()
    exact = attributor.scores(QUERIES, ROWS)
    answer = attributor.index(ROWS, projection="sjlt", keep=0.1).query(QUERIES, k=2, rescore=1.0)
    assert answer.exact
    assert [answer.top(query) for query in range(len(QUERIES))] == [
        [(row, pytest.approx(score, rel=1e-6)) for row, score in exact.top(query, 2)] for query in range(len(QUERIES))
    ]


def test_rows_are_found_by_their_ids() -> None:
    attributor = fitted()
    ids = [100 + 7 * row for row in range(len(ROWS))]
    answer = attributor.index(ROWS, ids=ids, projection="none", keep=1, dtype="float32").query(QUERIES, k=4)
    assert [row for row, _ in answer.top(0)] == [ids[row] for row, _ in attributor.scores(QUERIES, ROWS).top(0, 4)]


def test_appended_rows_are_found_and_deleted_ones_are_not(tmp_path: Path) -> None:
    attributor = fitted(tmp_path)
    exact = attributor.scores(QUERIES, ROWS).values
    index = attributor.index(ROWS[:8], projection="none", keep=1, dtype="float32")
    index.append(ROWS[8:], ids=range(8, len(ROWS)))
    assert index.ids.tolist() == list(range(len(ROWS)))
    close(index.scores(QUERIES), exact)
    assert index.query(QUERIES, k=len(ROWS), rescore=1.0).exact
    index.delete([3, 9])
    kept = [row for row in range(len(ROWS)) if row not in (3, 9)]
    assert index.ids.tolist() == kept
    assert len(index.self_influence) == len(index) == len(kept)
    close(index.scores(QUERIES), exact[:, kept])
    again = Index(attributor, index.folder, train=ROWS)
    close(again.scores(QUERIES), exact[:, kept])
    with pytest.raises(ConfigError, match="id 3 is not in the index"):
        index.delete([3])
    with pytest.raises(ConfigError, match="id 4 and 0 more are in the index already"):
        index.append(ROWS[4:5], ids=[4])
    with pytest.raises(ConfigError, match="id 3 was deleted"):
        index.append(ROWS[3:4], ids=[3])


def test_an_index_of_another_model_is_refused(tmp_path: Path) -> None:
    index = fitted(tmp_path / "one").index(ROWS, keep=0.5)
    other = MLP.model()
    with torch.no_grad():
        next(other.parameters()).add_(0.1)
    with pytest.raises(MismatchError, match="model"):
        Index(fitted(tmp_path / "two", model=watch(other)), index.folder).scores(QUERIES)


def test_other_rows_and_other_settings_are_refused(tmp_path: Path) -> None:
    attributor = fitted(tmp_path)
    attributor.index(ROWS, keep=0.5)
    with pytest.raises(MismatchError, match="indexes other rows"):
        attributor.index(ROWS[:5], keep=0.5)
    with pytest.raises(MismatchError, match="keep"):
        attributor.index(ROWS, keep=0.6)
    assert len(attributor.index(ROWS[:5], keep=0.5, overwrite=True)) == 5


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"projection": "best"}, "projection='best'"),
        ({"keep": 0}, "keep=0"),
        ({"keep": 1.5}, "keep=1.5"),
        ({"dtype": "int3"}, "dtype='int3'"),
        ({"ids": [0] * 13}, "ids repeat"),
        ({"ids": [0, 1]}, "ids has 2 entries for 13 rows"),
        ({"keep": 1e-4}, "keep=0.0001 leaves a row 0 bytes, and one triplet"),
        ({"keep": 1e-2, "projection": "sjlt"}, "keep=0.01 leaves a row .* bytes, and one number of each layer, with its scale, takes 15"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        fitted().index(ROWS, **{"keep": 0.5, **options})


@pytest.mark.parametrize("options", [{"k": 0}, {"rescore": -0.1}, {"rescore": 2}])
def test_bad_questions_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="give k"):
        fitted().index(ROWS, keep=0.5).query(QUERIES, **options)


def test_nan_is_refused_with_its_row() -> None:
    rows = [*ROWS[:4], (torch.full_like(ROWS[4][0], float("inf")), ROWS[4][1]), *ROWS[5:]]
    with pytest.raises((DataError, whence.errors.NumericalError), match="4"):
        fitted().index(rows, keep=0.5)


@pytest.mark.parametrize("broken", range(5))
def test_a_run_broken_off_at_any_write_ends_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: int) -> None:
    monkeypatch.setattr(writer, "BLOCK", 4)
    monkeypatch.setattr(writer, "SHARD_BYTES", 1)
    whole = fitted(tmp_path / "whole").index(ROWS, keep=0.3)
    attributor = fitted(tmp_path / "broken")
    from whence.storage import shards

    calls = {"made": 0}
    real = shards.write_bytes_atomic

    def breaking(path: Path, data: bytes) -> None:
        if path.parent.parent.name == "index":
            calls["made"] += 1
            if calls["made"] > broken:
                raise KeyboardInterrupt
        real(path, data)

    monkeypatch.setattr(shards, "write_bytes_atomic", breaking)
    with pytest.raises(KeyboardInterrupt):
        attributor.index(ROWS, keep=0.3)
    monkeypatch.setattr(shards, "write_bytes_atomic", real)
    if broken:
        with pytest.raises(StorageError):
            Index(attributor, tmp_path / "broken" / "index" / "ekfac")
    again = attributor.index(ROWS, keep=0.3)
    files = [{path.name: path.read_bytes() for path in index.folder.iterdir() if path.suffix} for index in (whole, again)]
    assert files[0] == files[1]


def test_altered_shards_are_noticed(tmp_path: Path) -> None:
    index = fitted(tmp_path).index(ROWS, keep=0.5)
    index.verify()
    file = max(index.folder.glob("*rows*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(StorageError, match="altered"):
        index.verify()
    file.write_bytes(data[:-1])
    with pytest.raises(StorageError, match="damaged"):
        index.scores(QUERIES)
