"""Running out of memory and of float16's range: what gives way, what is computed again, and what is said."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import whence
from cases import build
from compare import assert_close
from whence import ConjugateGradients, Exact
from whence.capture.passes import BLOCK
from whence.errors import ConfigError
from whence.runtime.progress import Stages
from whence.tasks import Classification, Regression

STRATEGIES = ("diagonal", "kfac", "ekfac")
CUDA = "CUDA out of memory. Tried to allocate 2.00 GiB."


class Small(nn.Module):
    """A network for which more than `fits` rows are too many; it counts the rows that it has run."""

    def __init__(self, error: Callable[[], BaseException] = lambda: torch.OutOfMemoryError(CUDA)) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(3, 4), nn.Linear(4, 3)
        self.fits, self.error, self.ran = 10**9, error, []

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > self.fits:
            raise self.error()
        self.ran.append(len(x))
        return self.head(torch.tanh(self.inner(x)))


def rows(seed: int, count: int) -> list:
    generator = torch.Generator().manual_seed(seed)
    return list(zip(torch.randn(count, 3, generator=generator, dtype=torch.float64), torch.arange(count) % 3, strict=True))


TRAIN, QUERIES = rows(1, 70), rows(2, 40)


def engine(fits: int = 10**9, **options: Any) -> whence.Attributor:
    model = build(Small)
    model.fits = fits
    return whence.Attributor(model, Classification(measurement="margin"), device="cpu", progress=False, **options)


def work(attributor: whence.Attributor, strategy: Any, **sizes: Any) -> list[Tensor]:
    """Fit, score with parts, and rank."""
    own = {key: value for key, value in sizes.items() if key == "batch_size"}
    attributor.fit(TRAIN, strategy=strategy, **own)
    scores = attributor.scores(QUERIES, TRAIN, per_layer=True, **sizes)
    loud = attributor.scores(QUERIES, TRAIN, normalize="cosine", name="loud", **sizes)
    summed = attributor.scores(QUERIES, TRAIN, aggregate="both", name="summed", **sizes)
    own_scores = [attributor.self_influence(TRAIN, on=on, overwrite=True, **own) for on in ("loss", "measurement")]
    return [scores.values, *scores.per_layer.values(), loud.values, summed.values, *own_scores]


# ---------------------------------------------------------------------------------------------- automatic sizes


@pytest.mark.parametrize("fits", [31, 9, 2])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_an_automatic_size_gives_way(strategy: str, fits: int) -> None:
    expected = work(engine(), strategy, batch_size=7, query_batch_size=7)
    small = engine(fits)
    for found, wanted in zip(work(small, strategy), expected, strict=True):
        assert_close(found, wanted, f"{fits} rows fit", rtol=1e-12, atol_of_largest=1e-12)
    assert max(small.model.ran) <= fits  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "error",
    [
        lambda: torch.OutOfMemoryError(CUDA),
        lambda: MemoryError("no more"),
        lambda: RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8."),
        lambda: RuntimeError("CUDA error: out of memory"),
    ],
    ids=["torch", "python", "cpu", "cuda"],
)
def test_every_way_of_saying_it(error: Callable[[], BaseException]) -> None:
    expected = engine().self_influence(TRAIN, strategy="identity", batch_size=4)
    small = engine(5)
    small.model.error = error  # type: ignore[assignment]
    assert_close(small.self_influence(TRAIN, strategy="identity"), expected, "self-influence", rtol=1e-12)


def test_other_errors_are_no_lack_of_memory() -> None:
    small = engine(5)
    small.model.error = lambda: RuntimeError("mat1 and mat2 shapes cannot be multiplied")  # type: ignore[assignment]
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        small.self_influence(TRAIN, strategy="identity")


@pytest.mark.parametrize("solver", ["exact", "cg", ConjugateGradients(iterations=3, draws=2), Exact(max_examples=20)], ids=str)
def test_solvers_give_way_too(solver: Any) -> None:
    expected = engine().scores(QUERIES, TRAIN, strategy="identity", solver=solver, batch_size=4, query_batch_size=4).values
    found = engine(9).scores(QUERIES, TRAIN, strategy="identity", solver=solver).values
    assert_close(found, expected, "scores", rtol=1e-9, atol_of_largest=1e-11)


def test_segments_give_way_too() -> None:
    def unrolled(fits: int, **sizes: Any) -> Tensor:
        model = build(Small)
        model.fits = fits
        state = {name: 2 * value for name, value in model.state_dict().items()}
        made = whence.Checkpoints(model, Classification(), [state], device="cpu", progress=False).fit(TRAIN, strategy="diagonal")
        return made.unrolled_scores(QUERIES, TRAIN, [1.0], **sizes).values

    assert_close(unrolled(9), unrolled(10**9, batch_size=4, query_batch_size=4), "scores", rtol=1e-12, atol_of_largest=1e-12)


def test_the_queries_size_is_a_size_of_its_own() -> None:
    """Training rows that fit are not run in smaller batches because queries did not fit, nor the other way round."""
    attributor = engine()
    model = attributor.model
    inner = model.forward

    def forward(x: Tensor) -> Tensor:
        # Queries are told by their first number.
        if len(x) > 3 and any(torch.equal(x[0], query) for query, _ in QUERIES):
            raise torch.OutOfMemoryError(CUDA)
        return inner(x)

    model.forward = forward  # type: ignore[method-assign]
    try:
        found = attributor.scores(QUERIES, TRAIN, strategy="identity").values
    finally:
        del model.forward
    assert max(model.ran) == 32  # type: ignore[arg-type]
    assert_close(found, engine().scores(QUERIES, TRAIN, strategy="identity").values, "scores", rtol=1e-12, atol_of_largest=1e-12)


# ---------------------------------------------------------------------------------------------- blocks


def test_finished_blocks_are_not_computed_again() -> None:
    """Memory runs out once, late in the second block: only that block starts again, and what comes after keeps the size."""
    many = rows(3, 2 * BLOCK + 30)
    attributor = engine()
    model = attributor.model
    attributor.self_influence(many, strategy="identity")
    look = sum(model.ran) - len(many)  # type: ignore[arg-type]  # the look at two rows before long work starts
    expected = attributor.self_influence(many, strategy="identity", batch_size=8, overwrite=True)
    before = BLOCK + 160
    for where, done in ((before, 160), (BLOCK, 0), (0, 0)):
        again = engine()
        model, inner = again.model, again.model.forward
        seen: list[int] = []

        def forward(x: Tensor, inner: Any = inner, seen: list[int] = seen, where: int = where) -> Tensor:
            if len(x) == 32 and sum(n for n in seen if n == 32) >= where:
                raise torch.OutOfMemoryError(CUDA)
            seen.append(len(x))
            return inner(x)

        model.forward = forward  # type: ignore[method-assign]
        try:
            found = again.self_influence(many, strategy="identity")
        finally:
            del model.forward
        assert_close(found, expected, "self-influence", rtol=1e-12)
        assert sum(model.ran) == look + len(many) + done  # type: ignore[arg-type]
        assert max(seen[-5:]) <= 16


def test_blocks_of_a_fit_and_of_scores_are_not_computed_again() -> None:
    many = rows(3, BLOCK + 40)
    for call in (
        lambda a: a.fit(many, strategy="diagonal", empirical=True),
        lambda a: a.scores(QUERIES[:2], many, strategy="identity"),
    ):
        quiet = engine()
        call(quiet)
        whole = sum(quiet.model.ran)  # type: ignore[arg-type]
        again = engine()
        inner, seen = again.model.forward, []

        def forward(x: Tensor, inner: Any = inner, seen: list[int] = seen) -> Tensor:
            if len(x) == 32 and seen.count(32) >= BLOCK // 32 + 1:
                raise torch.OutOfMemoryError(CUDA)
            seen.append(len(x))
            return inner(x)

        again.model.forward = forward  # type: ignore[method-assign]
        try:
            call(again)
        finally:
            del again.model.forward
        # 32 rows of the second block were run before the last 8 asked for less, if they did: they are one batch of 8.
        assert sum(again.model.ran) - whole in (0, 32)  # type: ignore[arg-type]


class Refuses(torch.autograd.Function):
    """The identity, whose backward pass has no memory when it is told so."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, now: bool) -> Tensor:
        ctx.now = now
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        if ctx.now:
            raise torch.OutOfMemoryError(CUDA)
        return g, None


class OnceShort(nn.Module):
    """Memory runs out once, in the forward or backward pass of call number `short`."""

    def __init__(self, *, backward: bool = False) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(3, 4), nn.Linear(4, 3)
        self.calls, self.short, self.backward = 0, -1, backward

    def forward(self, x: Tensor) -> Tensor:
        short = self.calls == self.short and len(x) > 2
        self.calls += 1
        if short and not self.backward:
            raise torch.OutOfMemoryError(CUDA)
        hidden = torch.tanh(self.inner(x))
        return self.head(Refuses.apply(hidden, short and torch.is_grad_enabled()) if self.backward else hidden)


CALLS: dict[str, Callable[[whence.Attributor], Tensor]] = {
    "ekfac": lambda a: a.fit(TRAIN, strategy="ekfac").scores(QUERIES, TRAIN).values,
    "kfac": lambda a: a.fit(TRAIN, strategy="kfac", max_examples=50).self_influence(TRAIN, on="measurement"),
    "exact": lambda a: a.scores(QUERIES, TRAIN, strategy="identity", solver="exact").values,
    "cg": lambda a: a.scores(QUERIES, TRAIN, strategy="identity", solver=ConjugateGradients(iterations=2)).values,
    "draws": lambda a: a.scores(QUERIES, TRAIN, strategy="identity", solver=ConjugateGradients(iterations=2, draws=2)).values,
    "norms": lambda a: a.scores(QUERIES, TRAIN, strategy="identity", normalize="cosine", aggregate=None).values,
    "sums": lambda a: a.scores(QUERIES, TRAIN, strategy="identity", aggregate="both").values,
}


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("name", CALLS)
def test_memory_may_run_out_at_any_moment(name: str, backward: bool) -> None:
    """No sum is counted twice and none is lost, wherever it happens after the look at the data."""

    def found(short: int) -> tuple[Tensor, int]:
        model = build(lambda: OnceShort(backward=backward))
        model.short = short
        return CALLS[name](whence.Attributor(model, Classification(), device="cpu", progress=False)), model.calls  # type: ignore[return-value]

    expected, calls = found(-1)
    step = max(1, calls // 12)
    for short in range(5, calls, step):
        values, _ = found(short)
        assert_close(values, expected, f"short of memory at call {short} of {calls}", rtol=1e-9, atol_of_largest=1e-11)


def test_progress_never_runs_past_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that are run again are taken back, so that no bar runs past its end."""
    counts: list[tuple[str, int, list[int]]] = []

    @contextmanager
    def track(self: Stages, total: int, description: str, *_: Any, **__: Any) -> Iterator[Callable[[int], None]]:
        steps: list[int] = []
        counts.append((description, total, steps))
        yield steps.append

    monkeypatch.setattr(Stages, "track", track)
    for name in ("ekfac", "kfac", "norms", "exact", "cg"):
        for short in range(6, 30, 3):
            model = build(OnceShort)
            model.short = short
            CALLS[name](whence.Attributor(model, Classification(), device="cpu", progress=False))
    assert counts
    wrong = [(description, sum(steps), total) for description, total, steps in counts if max(accumulate(steps), default=0) > total]
    assert not wrong


# ---------------------------------------------------------------------------------------------- what is said


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda a: a.fit(TRAIN, batch_size=20), r"out of memory with batch_size=20: CUDA out of memory.*smaller one or 'auto'"),
        (lambda a: a.self_influence(TRAIN, strategy="identity", batch_size=20), r"out of memory with batch_size=20: .*or 'auto'"),
        (
            lambda a: a.scores(QUERIES, TRAIN, strategy="identity", query_batch_size=20),
            r"out of memory with query_batch_size=20: .*or 'auto'",
        ),
        (
            lambda a: a.scores(QUERIES, TRAIN, strategy="identity", batch_size=20, query_batch_size=5),
            r"out of memory with batch_size=20: .*or 'auto'",
        ),
        (
            lambda a: a.scores(QUERIES, TRAIN, strategy="identity", solver="exact", batch_size=20, query_batch_size=5),
            r"out of memory with batch_size=20: .*or 'auto'",
        ),
    ],
    ids=["fit", "self", "queries", "train", "exact"],
)
def test_a_given_size_is_kept_and_named(call: Callable[[whence.Attributor], Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        call(engine(9))
    assert isinstance(caught.value.__cause__, torch.OutOfMemoryError)


def test_one_row_that_does_not_fit() -> None:
    """The look at the data goes well; the passes do not, at any size."""
    quiet = engine()
    quiet.self_influence(TRAIN, strategy="identity", batch_size=len(TRAIN))
    look = len(quiet.model.ran) - 1  # type: ignore[arg-type]
    attributor = engine()
    model, inner, tried = attributor.model, attributor.model.forward, []

    def forward(x: Tensor) -> Tensor:
        if len(model.ran) >= look:  # type: ignore[arg-type]
            tried.append(len(x))
            raise torch.OutOfMemoryError(CUDA)
        return inner(x)

    model.forward = forward  # type: ignore[method-assign]
    try:
        with pytest.raises(ConfigError, match=r"out of memory with batch_size=1: CUDA out of memory.*Free memory, shorten the rows"):
            attributor.self_influence(TRAIN, strategy="identity")
    finally:
        del model.forward
    assert tried == [32, 16, 8, 4, 2, 1]


@pytest.mark.parametrize("fits", [0, 1])
def test_a_model_for_which_two_rows_are_too_many(fits: int) -> None:
    """The look at two rows before long work either gives way, or says what the matter is."""
    try:
        found = engine(fits).fit(TRAIN, strategy="ekfac").scores(QUERIES, TRAIN).values
    except ConfigError as error:
        assert "out of memory" in str(error)  # noqa: PT017
    else:
        expected = engine().fit(TRAIN, strategy="ekfac").scores(QUERIES, TRAIN, batch_size=1, query_batch_size=1).values
        assert_close(found, expected, "one row at a time", rtol=1e-12, atol_of_largest=1e-12)


@pytest.mark.parametrize("size", [0, -3, 1.5, True, "all", None])
def test_sizes_that_are_none(size: Any) -> None:
    for call in (
        lambda a: a.fit(TRAIN, batch_size=size),
        lambda a: a.self_influence(TRAIN, strategy="identity", batch_size=size),
        lambda a: a.scores(QUERIES, TRAIN, strategy="identity", batch_size=size),
    ):
        with pytest.raises(ConfigError, match=r"^batch_size=.* cannot be used; give a number of rows, 1 or more, or 'auto'"):
            call(engine())
    with pytest.raises(ConfigError, match=r"query_batch_size=.* cannot be used"):
        engine().scores(QUERIES, TRAIN, strategy="identity", query_batch_size=size)


# ---------------------------------------------------------------------------------------------- the range of float16


class Scaled(nn.Module):
    """A regression whose gradients are as large or small as wanted: the output is scaled, within the graph."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.inner, self.head, self.scale = nn.Linear(3, 4), nn.Linear(4, 2), scale

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.inner(x))) * self.scale


def targeted(count: int, seed: int) -> list:
    generator = torch.Generator().manual_seed(seed)
    return list(zip(torch.randn(count, 3, generator=generator), torch.randn(count, 2, generator=generator), strict=True))


def scaled(scale: float, **options: Any) -> whence.Attributor:
    torch.manual_seed(0)
    return whence.Attributor(Scaled(scale), Regression(), device="cpu", progress=False, **options)


@pytest.mark.parametrize("scale", [1e-9, 1e-6, 1.0, 300.0, 3e4], ids=lambda scale: f"{scale:g}")
def test_float16_neither_underflows_nor_overflows(scale: float) -> None:
    """Gradients from 1e-9 (half precision ends at 6e-8) to 1e9 (it ends at 65504) come out within its rounding.

    Targets far larger than the output keep the residuals near one for small scales.
    """
    train, queries = targeted(40, 1), targeted(5, 2)
    full, half = scaled(scale), scaled(scale, precision="float16")
    wanted = [full.scores(queries, train, strategy="identity").values, full.self_influence(train, strategy="identity")]
    found = [half.scores(queries, train, strategy="identity").values, half.self_influence(train, strategy="identity")]
    for one, other in zip(found, wanted, strict=True):
        assert torch.isfinite(one).all()
        assert_close(one, other, f"scale {scale:g}", rtol=0.02, atol_of_largest=0.01)
    assert half.coverage.share == 1.0


@pytest.mark.parametrize("scale", [1e-9, 3e4], ids=lambda scale: f"{scale:g}")
@pytest.mark.parametrize("solver", ["exact", "cg"])
def test_float16_of_solvers(scale: float, solver: Any) -> None:
    train, queries = targeted(40, 1), targeted(5, 2)
    wanted = scaled(scale).scores(queries, train, strategy="identity", solver=solver).values
    found = scaled(scale, precision="float16").scores(queries, train, strategy="identity", solver=solver).values
    assert torch.isfinite(found).all()
    assert (found - wanted).norm() < 0.03 * wanted.norm()


@pytest.mark.parametrize("solver", ["exact", "cg", ConjugateGradients(draws=1)], ids=str)
def test_float16_of_a_matrix_whose_columns_are_larger_than_the_queries(solver: Any) -> None:
    """What the queries' passes bore, the columns' do not: a well fitted query has a small gradient, the output's own is one."""
    train = targeted(40, 1)
    net = scaled(1.0).model
    queries = [(x, net(x).detach() + 1e-3) for x, _ in targeted(5, 2)]
    wanted = scaled(1.0).scores(queries, train, strategy="identity", solver=solver).values
    found = scaled(1.0, precision="float16").scores(queries, train, strategy="identity", solver=solver).values
    assert torch.isfinite(found).all()
    assert (found - wanted).norm() < 0.03 * wanted.norm()


@pytest.mark.parametrize("scale", [1e-9, 3e4], ids=lambda scale: f"{scale:g}")
@pytest.mark.parametrize("strategy", ["diagonal", "ekfac"])
def test_float16_of_a_fit(scale: float, strategy: Any) -> None:
    """Only directions that half precision resolves are compared: those of the largest scores, with strong damping."""
    train, queries = targeted(60, 1), targeted(5, 2)
    damping = whence.Damping(relative=3.0)
    wanted = scaled(scale).fit(train, strategy=strategy, empirical=True).scores(queries, train, damping=damping).values
    found = scaled(scale, precision="float16").fit(train, strategy=strategy, empirical=True).scores(queries, train, damping=damping).values
    assert torch.isfinite(found).all()
    assert (found - wanted).norm() < 0.03 * wanted.norm()
