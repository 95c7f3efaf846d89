"""Solvers against the Gauss-Newton matrix written out: Jacobians by autograd, a row at a time, and a dense solve."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import whence
from cases import build, watch
from compare import assert_close
from whence import ConjugateGradients, Damping, Exact
from whence.curvature import refine
from whence.errors import ConfigError, NumericalError
from whence.runtime.noise import KeyedNoise
from whence.tasks import Classification, Regression, Task

TRAIN, QUERIES, SEED = 11, 4, 5
STRATEGIES = ("identity", "diagonal", "kfac", "ekfac")

# ---------------------------------------------------------------------------------------------- situations


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.again, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.again.weight, self.again.bias = self.first.weight, self.first.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.again(torch.tanh(self.first(x)))))


class Positions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.norm, self.head = nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        mixed = x + 0.3 * x.mean(1, keepdim=True)
        return self.head(self.norm(torch.tanh(self.inner(mixed))))


def several_groups() -> nn.Module:
    """A grouped convolution and norms, whose gradients have several groups."""
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, groups=2), nn.GroupNorm(2, 4), nn.Tanh(), nn.Flatten(), nn.LayerNorm(4 * 2 * 2), nn.Linear(16, 3)
    )


def mlp(last: int = 3) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, last))


def some(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def labels(seed: int, *shape: int) -> Tensor:
    return torch.randint(3, shape, generator=torch.Generator().manual_seed(seed))


def classes(*shape: int) -> Callable[[int, int], list]:
    return lambda seed, count: list(zip(some(seed, count, *shape), labels(seed, count), strict=True))


def targets(seed: int, count: int) -> list:
    return list(zip(some(seed, count, 4), some(seed + 99, count, 2), strict=True))


def tagged(seed: int, count: int) -> list:
    """Six positions a row, each with a label; some count for nothing."""
    tags = labels(seed, count, 6)
    tags[:, 2][::2] = -100
    tags[1, :] = -100
    return list(zip(some(seed, count, 6, 4), tags, strict=True))


@dataclass(frozen=True)
class Situation:
    factory: Callable[[], nn.Module]
    rows: Callable[[int, int], list]
    task: Task
    regression: bool = False

    def model(self) -> nn.Module:
        model = build(self.factory)
        # Weights far from their start, so that layers hang together and norms have scales that differ.
        with torch.no_grad():
            for number, parameter in enumerate(model.parameters()):
                parameter += 0.4 * some(number, *parameter.shape)

        return watch(model)

    def data(self) -> tuple[list, list]:
        return self.rows(1, TRAIN), self.rows(2, QUERIES)


SITUATIONS = {
    "classification": Situation(mlp, classes(4), Classification(measurement="margin")),
    "regression": Situation(lambda: mlp(2), targets, Regression(), regression=True),
    "positions": Situation(Positions, tagged, Classification()),
    "groups": Situation(several_groups, classes(2, 4, 4), Classification(measurement="margin")),
    "tied": Situation(Tied, classes(4), Classification()),
}


def engine(situation: Situation, model: nn.Module, **options: Any) -> whence.Attributor:
    return whence.Attributor(model, situation.task, device="cpu", progress=False, seed=SEED, **options)


# ---------------------------------------------------------------------------------------------- the dense matrix


def batch_of(row: tuple) -> list[Tensor]:
    return [torch.as_tensor(part)[None] for part in row]


def flat_gradient(model: nn.Module, value: Tensor) -> Tensor:
    parameters = list(model.parameters())
    found = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
    parts = [torch.zeros_like(p) if g is None else g for g, p in zip(found, parameters, strict=True)]
    return torch.cat([part.flatten() for part in parts])


def gradients(model: nn.Module, rows: list, objective: Callable[[nn.Module, Any], Tensor]) -> Tensor:
    return torch.stack([flat_gradient(model, objective(model, batch_of(row)).sum()) for row in rows])


def gauss_newton(situation: Situation, model: nn.Module, rows: list) -> Tensor:
    """Return `mean over rows of J^T (Hessian of the loss in the outputs) J`."""
    total: Tensor | float = 0.0
    for row in rows:
        x, y = batch_of(row)
        outputs = model(x).reshape(-1, model(x).shape[-1])
        for place, output in enumerate(outputs):
            if not situation.regression and y.flatten()[place] == -100:
                continue
            jacobian = torch.stack([flat_gradient(model, value) for value in output])
            p = output.detach().softmax(0)
            middle = torch.eye(len(p), dtype=torch.float64) if situation.regression else p.diag() - torch.outer(p, p)
            total = total + jacobian.T @ middle @ jacobian
    assert isinstance(total, Tensor)
    return total / len(rows)


def owners(model: nn.Module) -> Tensor:
    """Number every parameter's layer, `[parameter]`."""
    modules = {id(p): name.rpartition(".")[0] for name, p in reversed(list(model.named_parameters()))}
    order = list(dict.fromkeys(modules.values()))
    return torch.cat([torch.full((p.numel(),), order.index(modules[id(p)])) for p in model.parameters()])


def dense_damping(model: nn.Module, matrix: Tensor, damping: Any) -> Tensor:
    """Return the damping of every parameter."""
    diagonal, layer = matrix.diagonal(), owners(model)
    if damping == "auto":
        return 30.0 * diagonal.mean().expand_as(diagonal)
    if isinstance(damping, float):
        return torch.full_like(diagonal, damping)
    if damping.scope == "model":
        return damping.relative * diagonal.mean().expand_as(diagonal)
    means = torch.stack([diagonal[layer == number].mean() for number in range(int(layer.max()) + 1)])
    return damping.relative * means[layer]


def dense_scores(situation: Situation, model: nn.Module, train: list, queries: list, matrix: Tensor, damping: Any) -> Tensor:
    left = gradients(model, queries, situation.task.measurement)
    right = gradients(model, train, situation.task.loss)
    return left @ torch.linalg.solve(matrix + dense_damping(model, matrix, damping).diag(), right.T)


DAMPINGS = ["auto", 0.03, Damping(relative=0.3), Damping(relative=0.3, scope="model")]
names = lambda value: str(value).replace("Damping", "")  # noqa: E731


@pytest.fixture(params=SITUATIONS)
def situation(request: pytest.FixtureRequest) -> Situation:
    return SITUATIONS[request.param]


# ---------------------------------------------------------------------------------------------- exact


@pytest.mark.parametrize("damping", DAMPINGS, ids=names)
def test_exact_is_the_dense_inverse(situation: Situation, damping: Any) -> None:
    model, (train, queries) = situation.model(), situation.data()
    expected = dense_scores(situation, model, train, queries, gauss_newton(situation, model, train), damping)
    found = engine(situation, model).scores(queries, train, solver="exact", damping=damping, batch_size=4, query_batch_size=3)
    assert_close(found.values, expected, "exact", rtol=1e-8, atol_of_largest=1e-10)


def test_the_matrix_is_of_all_rows_whichever_are_scored(situation: Situation) -> None:
    model, (train, queries) = situation.model(), situation.data()
    expected = dense_scores(situation, model, train, queries, gauss_newton(situation, model, train), "auto")
    chosen, asked = [7, 2, 9], [3, 0]
    for solver in ("exact", ConjugateGradients(iterations=400, tolerance=1e-13, max_examples=None)):
        found = engine(situation, model).scores(queries, train, strategy="identity", solver=solver, train_rows=chosen, query_rows=asked)
        assert_close(found.values, expected[asked][:, chosen], str(solver), rtol=1e-8, atol_of_largest=1e-10)
        assert found.top(0, 1)[0][0] in chosen


def test_max_examples_takes_a_drawn_part_of_the_rows() -> None:
    """The same rows for the same seed, not simply the first, and the mean is over them alone."""
    situation = SITUATIONS["classification"]
    model, (train, queries) = situation.model(), situation.data()
    from itertools import combinations

    kwargs: dict[str, Any] = {"damping": 0.05}
    found = engine(situation, model).scores(queries, train, solver=Exact(max_examples=9), **kwargs).values
    again = engine(situation, model).scores(queries, train, solver=Exact(max_examples=9), batch_size=2, **kwargs).values
    assert_close(again, found, "again", rtol=1e-10)
    fits = []
    for kept in combinations(range(TRAIN), 9):
        matrix = gauss_newton(situation, model, [train[i] for i in kept])
        expected = dense_scores(situation, model, train, queries, matrix, 0.05)
        if torch.allclose(found, expected, rtol=1e-8):
            fits.append(kept)
    assert len(fits) == 1
    assert fits[0] != tuple(range(9))
    whole = engine(situation, model).scores(queries, train, solver=Exact(max_examples=5000), **kwargs).values
    assert_close(whole, dense_scores(situation, model, train, queries, gauss_newton(situation, model, train), 0.05), "all", rtol=1e-8)


def test_exact_on_chosen_layers_knows_these_alone() -> None:
    """The matrix of a subset of the layers is the block of the whole one, with its off-diagonal blocks."""
    situation = SITUATIONS["groups"]
    model, (train, queries) = situation.model(), situation.data()
    kept = torch.isin(owners(model), torch.tensor([0, 3]))
    matrix = gauss_newton(situation, model, train)[kept][:, kept]
    left = gradients(model, queries, situation.task.measurement)[:, kept]
    right = gradients(model, train, situation.task.loss)[:, kept]
    expected = left @ torch.linalg.solve(matrix + 0.2 * torch.eye(len(matrix), dtype=torch.float64), right.T)
    found = engine(situation, model, layers=["0", "5"]).scores(queries, train, solver="exact", damping=0.2, per_layer=True)
    assert_close(found.values, expected, "two layers", rtol=1e-8)
    assert set(found.per_layer) == {"0", "5"}
    assert_close(sum(found.per_layer.values()), found.values, "parts", rtol=1e-10)


def test_exact_takes_fallback_parameters_and_adams_moments() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.scale, self.head = nn.Linear(4, 5), nn.Parameter(torch.ones(5)), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.tanh(self.inner(x)) * self.scale)

    situation = Situation(Scaled, classes(4), Classification())
    model, (train, queries) = situation.model(), situation.data()
    moments = {name: some(number, *p.shape).square() + 0.01 for number, (name, p) in enumerate(model.named_parameters())}
    stretch = torch.cat([(moments[name].sqrt() + 1e-8).rsqrt().flatten() for name, _ in model.named_parameters()])
    matrix = stretch[:, None] * gauss_newton(situation, model, train) * stretch
    left = gradients(model, queries, situation.task.measurement) * stretch
    right = gradients(model, train, situation.task.loss) * stretch
    for damping in (0.1, "auto"):
        amount = 30 * matrix.diagonal().mean() if damping == "auto" else 0.1
        expected = left @ torch.linalg.solve(matrix + amount * torch.eye(len(matrix), dtype=torch.float64), right.T)
        attributor = engine(situation, model, fallback=True, second_moments=moments)
        found = attributor.scores(queries, train, solver="exact", damping=damping).values
        assert_close(found, expected, f"damping {damping}", rtol=1e-8)


# ---------------------------------------------------------------------------------------------- conjugate gradients


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_conjugate_gradients_reach_the_dense_inverse(situation: Situation, strategy: Any) -> None:
    model, (train, queries) = situation.model(), situation.data()
    expected = dense_scores(situation, model, train, queries, gauss_newton(situation, model, train), "auto")
    attributor = engine(situation, model).fit(train, strategy=strategy, empirical=True)
    solver = ConjugateGradients(iterations=300, tolerance=1e-13, max_examples=None)
    found = attributor.scores(queries, train, strategy=strategy, solver=solver, batch_size=4)
    assert_close(found.values, expected, strategy, rtol=1e-8, atol_of_largest=1e-10)


@pytest.mark.parametrize("damping", [0.03, Damping(relative=0.3), Damping(relative=0.3, scope="model")], ids=names)
def test_conjugate_gradients_take_every_damping(situation: Situation, damping: Any) -> None:
    model, (train, queries) = situation.model(), situation.data()
    expected = dense_scores(situation, model, train, queries, gauss_newton(situation, model, train), damping)
    solver = ConjugateGradients(iterations=600, tolerance=1e-13, max_examples=None)
    found = engine(situation, model).fit(train, strategy="ekfac").scores(queries, train, solver=solver, damping=damping)
    assert_close(found.values, expected, "cg", rtol=1e-8, atol_of_largest=1e-10)


def sampled_matrix(situation: Situation, model: nn.Module, train: list, kept: list[int], draws: int) -> Tensor:
    """Return the mean over rows and draws of outer products of gradients with labels drawn by the keyed noise."""
    found = []
    for index in kept:
        for stream in range(16, 16 + draws):
            noise = KeyedNoise(seed=SEED, stream=stream, ids=[index], device="cpu")
            value = situation.task.sampled_loss(model, batch_of(train[index]), noise)
            found.append(flat_gradient(model, value.sum()))
    stacked = torch.stack(found)
    return stacked.T @ stacked / len(found)


@pytest.mark.parametrize("draws", [1, 3])
def test_draws_make_the_matrix_of_sampled_gradients(situation: Situation, draws: int) -> None:
    model, (train, queries) = situation.model(), situation.data()
    matrix = sampled_matrix(situation, model, train, list(range(TRAIN)), draws)
    attributor = engine(situation, model).fit(train, strategy="kfac")
    for damping in ("auto", Damping(relative=0.5)):
        expected = dense_scores(situation, model, train, queries, matrix, damping)
        solver = ConjugateGradients(iterations=400, tolerance=1e-13, max_examples=None, draws=draws)
        found = attributor.scores(queries, train, solver=solver, damping=damping, batch_size=3)
        assert_close(found.values, expected, f"{draws} draws, {damping}", rtol=1e-8, atol_of_largest=1e-10)


def test_every_step_comes_closer() -> None:
    """On loss queries `g^T x_k` rises to `g^T A^-1 g`: what is missing is the squared error in A's norm, which steps shrink."""
    situation = SITUATIONS["tied"]
    model, (train, _) = situation.model(), situation.data()
    end = dense_scores(situation, model, train, train, gauss_newton(situation, model, train), 0.02).diagonal()
    attributor = engine(situation, model).fit(train, strategy="ekfac")
    missing = []
    for steps in range(1, 9):
        solver = ConjugateGradients(iterations=steps, tolerance=0.0, max_examples=None)
        missing.append(end - attributor.scores(train, train, solver=solver, damping=0.02, overwrite=True).values.diagonal())
    table = torch.stack(missing)
    assert (table[0] > 0).all()
    assert (table[1:] <= table[:-1] + 1e-12 * end).all()
    assert (table[-1] < 0.05 * table[0]).all()


def test_steps_beyond_the_end_do_no_harm() -> None:
    situation = SITUATIONS["classification"]
    model, (train, queries) = situation.model(), situation.data()
    expected = dense_scores(situation, model, train, queries, gauss_newton(situation, model, train), "auto")
    solver = ConjugateGradients(iterations=300, tolerance=0.0, max_examples=None)
    found = engine(situation, model).fit(train, strategy="diagonal").scores(queries, train, solver=solver)
    assert_close(found.values, expected, "300 steps", rtol=1e-8)


def test_a_query_without_gradient_scores_nothing() -> None:
    situation = SITUATIONS["positions"]
    model, (train, queries) = situation.model(), situation.data()
    assert (queries[1][1] == -100).all()
    for solver in ("exact", "cg"):
        values = engine(situation, model).scores(queries, train, strategy="identity", solver=solver).values
        assert (values[1] == 0).all()
        assert (values[0] != 0).any()


# ---------------------------------------------------------------------------------------------- what changes nothing


@pytest.mark.parametrize("solver", ["exact", ConjugateGradients(iterations=4), ConjugateGradients(iterations=4, draws=2)], ids=str)
def test_batches_change_nothing(situation: Situation, solver: Any) -> None:
    model, (train, queries) = situation.model(), situation.data()
    attributor = engine(situation, model)
    first, *others = [
        attributor.scores(queries, train, strategy="identity", solver=solver, batch_size=b, query_batch_size=q, overwrite=True).values
        for b, q in ((TRAIN, QUERIES), (4, 3), (1, 1), ("auto", "auto"))
    ]
    for other in others:
        assert_close(other, first, str(solver), rtol=1e-9, atol_of_largest=1e-11)


@pytest.mark.parametrize("solver", ["exact", ConjugateGradients(iterations=300, tolerance=1e-13)], ids=str)
def test_the_sum_of_queries_is_solved_as_one(situation: Situation, solver: Any) -> None:
    model, (train, queries) = situation.model(), situation.data()
    each = engine(situation, model).scores(queries, train, strategy="identity", solver=solver).values
    summed = engine(situation, model).scores(queries, train, strategy="identity", solver=solver, aggregate="queries").values
    assert_close(summed, each.sum(0, keepdim=True), "queries", rtol=1e-8, atol_of_largest=1e-9)
    both = engine(situation, model).scores(queries, train, strategy="identity", solver=solver, aggregate="both").values
    assert_close(both, each.sum().view(1, 1), "both", rtol=1e-7, atol_of_largest=1e-9)


def test_parts_by_token_and_layer_add_up() -> None:
    situation = SITUATIONS["positions"]
    model, (train, queries) = situation.model(), situation.data()
    found = engine(situation, model).scores(queries, train, solver="exact", per_token=True, per_layer=True)
    assert found.per_token is not None
    assert_close(found.per_token.sum(-1) + found.per_token_rest, found.values, "tokens", rtol=1e-9)
    assert_close(sum(found.per_layer.values()), found.values, "layers", rtol=1e-9)


def test_finished_scores_are_read_back(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    situation = SITUATIONS["classification"]
    model, (train, queries) = situation.model(), situation.data()
    first = engine(situation, model, run_dir=tmp_path).scores(queries, train, solver="exact").values

    def never(*_: object) -> None:
        raise AssertionError("solved again")

    monkeypatch.setattr(refine.Refinement, "solve", never)
    assert torch.equal(engine(situation, model, run_dir=tmp_path).scores(queries, train, solver="exact").values, first)
    with pytest.raises(whence.errors.MismatchError):
        engine(situation, model, run_dir=tmp_path).scores(queries, train, solver=Exact(max_examples=5))


def test_a_task_without_columns_says_so() -> None:
    class Own(Task):
        def loss(self, model: nn.Module, batch: Any) -> Tensor:
            return F.cross_entropy(model(batch[0]), batch[1], reduction="none")

    situation = Situation(mlp, classes(4), Own())
    model, (train, queries) = situation.model(), situation.data()
    with pytest.raises(ConfigError, match=r"Own does not define columns.*solver='direct'"):
        engine(situation, model).scores(queries, train, solver="exact")


# ---------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("solver", ["exact", "cg", Exact(), ConjugateGradients()], ids=str)
@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"normalize": "relatif"}, r"normalize='relatif' needs the fitted curvature itself; use it with solver='direct'"),
        ({"normalize": "cosine"}, r"normalize='cosine' needs the fitted curvature itself"),
        ({"query_rank": 2}, r"query_rank=2 needs the fitted curvature itself"),
        ({"response": whence.Unrolled(time=1.0)}, r"response=Unrolled\(time=1.0\) needs the fitted curvature itself"),
        ({"response": "unrolled"}, r"response='unrolled' needs the fitted curvature itself"),
    ],
    ids=str,
)
def test_what_solvers_cannot_be_combined_with(solver: Any, option: dict[str, Any], message: str) -> None:
    situation = SITUATIONS["classification"]
    model, (train, queries) = situation.model(), situation.data()
    with pytest.raises(ConfigError, match=message):
        engine(situation, model, training_time=1.0).scores(queries, train, strategy="identity", solver=solver, **option)


def test_settings_that_cannot_be_used() -> None:
    situation = SITUATIONS["classification"]
    model, (train, queries) = situation.model(), situation.data()
    with pytest.raises(ConfigError, match=r"solver='lu' is not known; choose 'direct', 'cg', 'exact'"):
        engine(situation, model).scores(queries, train, strategy="identity", solver="lu")  # type: ignore[arg-type]
    for wrong in ({"iterations": 0}, {"max_examples": -1}, {"draws": 1.5}, {"iterations": True}):
        with pytest.raises(ConfigError, match=rf"ConjugateGradients\({next(iter(wrong))}=.*must be a whole number of 1 or more"):
            ConjugateGradients(**wrong)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"Exact\(max_examples=0\)"):
        Exact(max_examples=0)
    for tolerance in (1.0, -0.1, float("nan")):
        with pytest.raises(ConfigError, match=r"tolerance must be at least 0 and less than 1"):
            ConjugateGradients(tolerance=tolerance)


@pytest.mark.parametrize("solver", ["exact", "cg"])
def test_no_damping_has_no_inverse(situation: Situation, solver: Any) -> None:
    model, (train, queries) = situation.model(), situation.data()
    with pytest.raises(NumericalError, match=r"layer '\w+': its damping is zero.*Give a positive number"):
        engine(situation, model).scores(queries, train, strategy="identity", solver=solver, damping=0.0)


@pytest.fixture
def little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refine, "free_bytes", lambda device: 10_000)


@pytest.mark.usefixtures("little_memory")
def test_too_little_memory_names_the_way_out() -> None:
    situation = SITUATIONS["classification"]
    model, (train, queries) = situation.model(), situation.data()
    with pytest.raises(ConfigError, match=r"solver='exact' needs .* 33 columns \(11 rows x 3\).*whence.Exact\(max_examples=\.\.\.\)"):
        engine(situation, model).scores(queries, train, solver="exact")
    assert engine(situation, model).scores(queries, train, strategy="identity", solver="cg").values.shape == (QUERIES, TRAIN)


@pytest.mark.parametrize("solver", ["exact", "cg"])
def test_rows_that_are_not_finite_are_named(solver: Any) -> None:
    situation = SITUATIONS["classification"]
    model, (train, queries) = situation.model(), situation.data()
    train[6] = (torch.full((4,), float("nan"), dtype=torch.float64), train[6][1])
    with pytest.raises(NumericalError, match=r"layer '0'.* example ids 6\b"):
        engine(situation, model).scores(queries, train, strategy="identity", solver=solver)


@pytest.mark.parametrize("solver", ["exact", "cg"])
def test_a_matrix_of_nothing_gives_scores_of_nothing(solver: Any) -> None:
    """Rows without any label have neither gradients nor columns."""
    situation = SITUATIONS["positions"]
    model, (train, queries) = situation.model(), situation.data()
    silent = [(x, torch.full_like(y, -100)) for x, y in train]
    values = engine(situation, model).scores(queries, silent, strategy="identity", solver=solver).values
    assert torch.equal(values, torch.zeros_like(values))
