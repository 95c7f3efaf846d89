"""A few numbers of each row that say which rows are worth a look: a query reads them all, and of the rows only the most promising.

Some rows are drawn as landmarks. What a row has in common with each of them, put into an orthonormal basis of the landmarks' own
space, is a short vector whose products with a query's are the scores of what the landmarks span of both (the Nystrom method,
Williams and Seeger, 2001). That says far more of a row than as many random directions: see docs/results/index.md. It only names
candidates; those are scored with the rows as they are stored.

Beside the rows of an index of triplets that has `LEAST_ROWS` of them lie a shard `coarse`, the landmarks' strongest triplets as
`whence.index.factors` stores them and the basis `[landmark, number]`, and for each shard of rows `part-0000/coarse-000000000`, its
rows' vectors, int8 `[row, number]` and their scales `[row]`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from whence.index.encoding import decode, encode
from whence.index.factors import FactorRows, HeldMatrices
from whence.index.meeting import StoredTriplets, rows_together
from whence.index.names import COARSE, NORM, coarse_name, done, row_shards
from whence.index.projection import Projection, Tensors
from whence.index.stored import StoredIndex, by_shard
from whence.runtime.progress import Stages
from whence.storage.shards import ShardStore

LEAST_ROWS = 4096
"""Fewer rows are all read: it takes no longer."""
LANDMARKS, NUMBERS = 1024, 256
SHARE, LEAST = 100, 1536
"""One row of so many, and so many rows at least, are looked at for each end of each query."""
_MOST_TRIPLETS = 256
"""Of each layer of each row, so many triplets at most are compared with landmarks'."""
_BASIS, _VALUES, _SCALES = "basis", "values", "scales"
_CHUNK_ROWS = 64
_TOGETHER_BYTES = 2**26


def write_coarse(store: ShardStore, projection: Projection, part: int, seed: int, stages: Stages) -> None:
    """Write the coarse vectors of a part's rows that are not there yet; nothing for a small index, or one that is not of triplets.

    With the first part, those of all that were appended: an index may be older than its landmarks.
    """
    if not isinstance(projection, FactorRows):
        return
    shards = {name: len(store.view(name)[NORM]) for name in sorted(row_shards(store, part))}
    if part == 0 and COARSE not in store.names and sum(shards.values()) >= LEAST_ROWS:
        drawn = _drawn(store, shards, projection, seed)
        store.write(COARSE, landmarks(projection, drawn, min(LANDMARKS, sum(shards.values()))))
    if COARSE not in store.names:
        return
    shared = store.read(COARSE)
    for other in itertools.takewhile(lambda number: done(number) in store.names, itertools.count(1)) if part == 0 else ():
        shards |= {name: len(store.view(name)[NORM]) for name in sorted(row_shards(store, other))}
    with stages.stage("Coarse rows"), stages.track(sum(shards.values()), "Coarse rows") as advance:
        for name, rows in shards.items():
            if coarse_name(name) not in store.names:
                store.write(coarse_name(name), coarse_vectors(projection, store.view(name), rows, shared))
            advance(rows)


def promising(stored: StoredIndex, projection: Projection, held: object, several: int) -> Tensor | None:
    """Return the places, ascending, of rows among which the `several` at either end of every query likely are.

    None where all rows are to be read: not all of them have coarse vectors, or they are too few for that to pay.
    """
    shards = {COARSE, *(coarse_name(name) for name, _ in stored.shards())}
    if not shards <= set(stored.store.names) or not isinstance(projection, FactorRows) or not isinstance(held, HeldMatrices):
        return None
    rows, alive = sum(len(part.ids) for part in stored.parts), stored.alive
    wanted = max(4 * several, LEAST, rows // SHARE)
    if 4 * wanted * held.queries > len(alive):
        return None
    shared = stored.store.view(COARSE)
    queries = projection.scores(shared, held, len(shared[_BASIS])).T @ shared[_BASIS]
    scores = torch.cat([products(stored.store.view(coarse_name(name)), queries) for name, _ in stored.shards()])[alive].T
    ends = [scores.topk(wanted, dim=1, largest=largest).indices for largest in (True, False)]
    return alive[torch.cat(ends, dim=1).unique()]


def blocks_at(stored: StoredIndex, projection: Projection, held: object, places: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield ids and scores of the rows at some places, ascending, as `StoredIndex.blocks` does of all."""
    # Rows of many shards at once: a few of each would be many small products.
    together: list[tuple[Tensor, dict[str, Tensor]]] = []
    several = max(1, _TOGETHER_BYTES // max(1, projection.row_bytes))

    def block() -> tuple[Tensor, Tensor]:
        ids = torch.cat([own for own, _ in together])
        rows = projection.join([rows for _, rows in together], [len(own) for own, _ in together])
        together.clear()
        return ids, projection.scores(rows, held, len(ids))

    of_shards = dict(stored.shards())
    for name, _, here in by_shard([(name, len(ids)) for name, ids in of_shards.items()], places):
        for some in here.split(several):
            together.append((of_shards[name][some], projection.at(stored.store.view(name), some)))
            if sum(len(own) for own, _ in together) >= several:
                yield block()
    if together:
        yield block()


def _drawn(store: ShardStore, shards: Mapping[str, int], projection: FactorRows, seed: int) -> dict[str, Tensor]:
    """Return some rows, drawn from all, as stored rows of their own."""
    drawn = torch.randperm(sum(shards.values()), generator=torch.Generator().manual_seed(seed))[:LANDMARKS].sort().values
    found = [(projection.at(store.view(name), here), len(here)) for name, _, here in by_shard(shards.items(), drawn)]
    return projection.join([rows for rows, _ in found], [count for _, count in found])


def landmarks(projection: FactorRows, rows: Tensors, count: int) -> dict[str, Tensor]:
    """Return the shard of the landmarks that so many stored rows are."""
    rows = _strongest(projection, rows)
    values, vectors = torch.linalg.eigh(_in_common(projection, rows, count, rows, count).double())
    values, vectors = values[-NUMBERS:], vectors[:, -NUMBERS:]
    # Directions in which the landmarks have next to nothing would only be noise.
    scales = torch.where(values > 1e-6 * values[-1].clamp(min=0), values.clamp(min=1e-300).rsqrt(), 0.0)
    return {**rows, _BASIS: (vectors * scales).float()}


def coarse_vectors(projection: FactorRows, rows: Tensors, count: int, shared: Tensors) -> dict[str, Tensor]:
    """Return the coarse vectors of so many stored rows; `shared`: the landmarks."""
    found = []
    for start in range(0, count, _CHUNK_ROWS):
        places = torch.arange(start, min(start + _CHUNK_ROWS, count))
        some = _strongest(projection, projection.at(rows, places))
        found.append(_in_common(projection, some, len(places), shared, len(shared[_BASIS])) @ shared[_BASIS])
    values, scales = encode(torch.cat(found), "int8")
    return {_VALUES: values, _SCALES: scales}


def products(vectors: Tensors, queries: Tensor) -> Tensor:
    """Return products `[row, query]`, a few rows at a time, so that they stay in the processor's cache."""
    parts = [decode(some, "int8", some.shape[1]) @ queries.T for some in vectors[_VALUES].split(2048)]
    return torch.cat(parts) * vectors[_SCALES][:, None]


def _strongest(projection: FactorRows, rows: Tensors) -> dict[str, Tensor]:
    """Return the tensors of rows with the first `_MOST_TRIPLETS` triplets of each row and layer, which are its strongest."""
    kept: dict[str, Tensor] = {}
    for number in range(len(projection.shapes)):
        own = rows[f"{number}/row"]
        place = torch.arange(len(own)) - torch.searchsorted(own, own)
        chosen = place < _MOST_TRIPLETS
        kept |= {f"{number}/{key}": rows[f"{number}/{key}"][chosen] for key in ("left", "right", "scale", "row")}
    return kept


def _in_common(projection: FactorRows, rows: Tensors, count: int, others: Tensors, other_count: int) -> Tensor:
    """Return products `[row, other row]` of rows that are both triplets."""
    result = torch.zeros(count, other_count)
    for number, cut in enumerate(projection.cuts.values()):
        one, two = (StoredTriplets.of(side, number, projection.settings.number_type) for side in (rows, others))
        rows_together(one, two, cut.sizes, result)
    return result
