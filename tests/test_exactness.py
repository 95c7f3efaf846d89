"""Approximations where they are exact: against the dense matrix of second moments, made from per-example gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import oracle
import whence
from cases import EMPIRICAL, STRATEGIES, Case, build, case_named
from whence.tasks import Regression

DAMPING = 0.05


def ids(case: Case) -> str:
    return case.name


def rotation(n: int) -> Tensor:
    return torch.linalg.qr(torch.randn(n, n, dtype=torch.float64)).Q


def linear(into: int, out: int, *, bias: bool) -> nn.Sequential:
    return build(lambda: nn.Sequential(nn.Linear(into, out, bias=bias)))


def rows_with(model: nn.Module, inputs: Tensor, residuals: Tensor) -> list:
    """Return rows whose gradient of half the squared error is exactly `residual x input^T` (plus the residual for the bias)."""
    with torch.no_grad():
        targets = model(inputs) - residuals
    return list(zip(inputs, targets, strict=True))


def dense_scores(model: nn.Module, queries: list, train: list) -> Tensor:
    """Return `G_q^T (E[G G^T] + damping)^-1 G_t` with the full matrix of second moments."""

    def vectors(rows: list) -> Tensor:
        gradients = []
        for x, y in rows:
            loss = 0.5 * (model(x[None]) - y).square().sum()
            gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]))
        return torch.stack(gradients)

    left, right = vectors(queries), vectors(train)
    matrix = right.T @ right / len(right)
    return left @ torch.linalg.solve(matrix + DAMPING * torch.eye(len(matrix), dtype=torch.float64), right.T)


def engine_scores(model: nn.Module, queries: list, train: list, strategy: str) -> Tensor:
    attributor = whence.Attributor(model, Regression(), device="cpu", progress=False)
    attributor.fit(train, strategy=strategy, empirical=True, batch_size=7)
    return attributor.scores(queries, train, damping=DAMPING, batch_size=7).values.double()


def some_rows(model: nn.Module, into: int, out: int, count: int = 5) -> list:
    return rows_with(model, torch.randn(count, into, dtype=torch.float64), torch.randn(count, out, dtype=torch.float64))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("strategy", ["kfac", "ekfac"])
def test_factored_curvature_is_exact_where_inputs_and_residuals_are_independent(strategy: str, bias: bool) -> None:
    """Every input meets every residual once, so E[G x G] is exactly the Kronecker product of E[aa^T] and E[gg^T]."""
    model = linear(4, 3, bias=bias)
    inputs, residuals = torch.randn(7, 4, dtype=torch.float64) + 0.5, torch.randn(5, 3, dtype=torch.float64)
    train = rows_with(model, inputs.repeat_interleave(5, 0), residuals.repeat(7, 1))
    queries = some_rows(model, 4, 3)
    oracle.assert_close(engine_scores(model, queries, train, strategy), dense_scores(model, queries, train), f"{strategy} against dense")


def one_coefficient_each(model: nn.Module, turn_in: Tensor, turn_out: Tensor) -> list:
    """Return rows whose gradients have one coefficient each in the turned axes: second moments are diagonal there, but no product."""
    into, out = len(turn_in), len(turn_out)
    size = 0.5 + torch.rand(out, into, dtype=torch.float64)
    inputs = torch.cat([turn_in * size[o, :, None] for o in range(out)])
    residuals = (
        torch.cat([turn_out[o].expand(into, out) for o in range(out)]) * torch.linspace(1, 2, out * into, dtype=torch.float64)[:, None]
    )
    return rows_with(model, inputs, residuals)


def test_ekfac_is_exact_where_the_eigenbasis_is_right_and_kfac_is_not() -> None:
    model = linear(4, 3, bias=False)
    train, queries = one_coefficient_each(model, rotation(4), rotation(3)), some_rows(model, 4, 3)
    wanted = dense_scores(model, queries, train)
    oracle.assert_close(engine_scores(model, queries, train, "ekfac"), wanted, "ekfac against dense")
    for other in ("kfac", "diagonal"):
        assert not torch.allclose(engine_scores(model, queries, train, other), wanted, rtol=1e-2), f"{other} cannot be exact here"


def test_diagonal_is_exact_where_each_example_moves_one_weight() -> None:
    model = linear(4, 3, bias=False)
    train = one_coefficient_each(model, torch.eye(4, dtype=torch.float64), torch.eye(3, dtype=torch.float64))
    queries = some_rows(model, 4, 3)
    oracle.assert_close(engine_scores(model, queries, train, "diagonal"), dense_scores(model, queries, train), "diagonal against dense")


@pytest.mark.parametrize("strategy", ["kfac", "ekfac"])
def test_sampled_fisher_of_a_gaussian_output_layer(strategy: str) -> None:
    """The true Fisher of unit-variance regression is `I x E[aa^T]`, to be met by one drawn target for each of 6000 rows.

    A mean of n squares of Gaussians has a relative spread of sqrt(2 / n) = 1.8%; 12% leaves room for the largest of 20 entries of
    correlated scores. Targets play no part: the data's own are far off.
    """
    model = linear(3, 2, bias=True)
    inputs = torch.randn(6000, 3, dtype=torch.float64) * torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    train = rows_with(model, inputs, torch.full((6000, 2), 9.0, dtype=torch.float64))
    queries = some_rows(model, 3, 2)
    attributor = whence.Attributor(model, Regression(), device="cpu", progress=False).fit(train, strategy=strategy, batch_size=1000)
    found = attributor.scores(queries, train[:4], damping=1e-6).values.double()
    extended = torch.cat([inputs, torch.ones(6000, 1, dtype=torch.float64)], 1)
    moments = extended.T @ extended / 6000 + 1e-6 * torch.eye(4, dtype=torch.float64)
    with torch.no_grad():
        (a_q, g_q), (a_t, g_t) = (
            (torch.stack([torch.cat([x, x.new_ones(1)]) for x, _ in rows]), torch.stack([model(x) - y for x, y in rows]))
            for rows in (queries, train[:4])
        )
    wanted = (g_q @ g_t.T) * (a_q @ torch.linalg.solve(moments, a_t.T))
    oracle.assert_close(found, wanted, f"{strategy}, sampled", rtol=0.12, atol_of_largest=0.02)


# ---------------------------------------------------------------------------------------------- identities between scores


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", ["mlp", "conv_groups", "positions", "padded_labels", "reused_unevenly", "regression", "packed"])
def test_self_influence_is_the_diagonal_of_pairwise(name: str, strategy: str) -> None:
    case = case_named(name)
    task = case.task()
    task.measurement = task.loss
    rows = case.data()[0]
    attributor = case.attributor(case.model(), task=task).fit(rows, strategy=strategy, empirical=True, batch_size=5)
    square = attributor.scores(rows, rows, batch_size=4, query_batch_size=3).values
    own = attributor.self_influence(rows, batch_size=6)
    assert own.dtype == torch.float64
    assert own.device.type == "cpu"
    oracle.assert_close(own, square.diagonal(), f"{name} {strategy} self-influence")
    oracle.assert_close(square, square.T, f"{name} {strategy} symmetry")
    assert (own >= 0).all()


@pytest.mark.parametrize("case", EMPIRICAL, ids=ids)
def test_layers_add_up_to_the_scores(case: Case) -> None:
    rows, queries = case.data()
    attributor = case.attributor(case.model()).fit(rows, empirical=True, batch_size=5)
    scores = attributor.scores(queries, rows, per_layer=True, batch_size=5, query_batch_size=3)
    total = sum(scores.per_layer.values())
    oracle.assert_close(scores.values, total, case.name, rtol=0.0, atol_of_largest=1e-13)


@pytest.mark.parametrize("name", ["mlp", "conv_depthwise", "choices", "tied"])
def test_identity_is_plain_products_of_gradients(name: str) -> None:
    case = case_named(name)
    model, task, (rows, queries) = case.model(), case.task(), case.data()

    def flat(row: object, objective: object) -> Tensor:
        value = objective(model, case.collate([row])).sum()
        return torch.cat([g.flatten() for g in torch.autograd.grad(value, list(model.parameters()))])

    wanted = torch.stack([flat(q, task.measurement) for q in queries]) @ torch.stack([flat(r, task.loss) for r in rows]).T
    # Identity needs no data: scores may be asked for at once.
    scores = case.attributor(model).scores(queries, rows, strategy="identity")
    oracle.assert_close(scores.values, wanted, f"{name}: identity against autograd on the whole model")


@pytest.mark.parametrize("strategy", STRATEGIES[1:])
def test_a_large_damping_leaves_plain_products(strategy: str) -> None:
    case = case_named("conv_groups")
    rows, queries = case.data()
    attributor = case.attributor(case.model()).fit(rows, strategy=strategy, empirical=True)
    damped = attributor.scores(queries, rows, damping=1e9).values * 1e9
    oracle.assert_close(damped, attributor.scores(queries, rows, strategy="identity").values, strategy, atol_of_largest=1e-8)


def test_the_sign_and_the_unit_are_those_of_a_removal() -> None:
    """Least squares is solved exactly without row t; to first order the query's loss rises by score / N."""
    model = build(lambda: nn.Sequential(nn.Linear(2, 1, bias=False)))
    inputs, noise = torch.randn(400, 2, dtype=torch.float64), torch.randn(400, 1, dtype=torch.float64)
    targets = inputs @ torch.tensor([[1.0], [-2.0]], dtype=torch.float64) + 0.3 * noise

    def solved(keep: Tensor) -> Tensor:
        return torch.linalg.lstsq(inputs[keep], targets[keep]).solution

    everything = torch.arange(400)
    with torch.no_grad():
        model[0].weight.copy_(solved(everything).T)
    from cases import watch

    watch(model)
    rows = list(zip(inputs, targets, strict=True))
    attributor = whence.Attributor(model, Regression(), device="cpu", progress=False).fit(rows, strategy="kfac")
    # With one output the Hessian of the mean loss is E[aa^T]; sampled residuals have a variance of 1 up to 7% (400 rows), hence rtol.
    effect = attributor.scores(rows[:5], rows, damping=1e-8).removal_effect()
    query = inputs[:5], targets[:5]

    def losses(weight: Tensor) -> Tensor:
        return 0.5 * (query[0] @ weight - query[1]).square().squeeze(1)

    actual = torch.stack([losses(solved(everything[everything != t])) - losses(solved(everything)) for t in range(400)], 1)
    for q in range(5):
        correlation = torch.corrcoef(torch.stack([effect[q].double(), actual[q]]))[0, 1]
        assert correlation > 0.99
        slope = (effect[q].double() * actual[q]).sum() / actual[q].square().sum()
        assert slope.item() == pytest.approx(1.0, rel=0.35)


# ---------------------------------------------------------------------------------------------- eigendecompositions


def covariances(*shape: int) -> Tensor:
    """Return covariances `[*shape, n, n]` of correlated columns."""
    x = torch.randn(*shape[:-1], 3 * shape[-1], shape[-1], dtype=torch.float64) @ torch.randn(shape[-1], shape[-1], dtype=torch.float64)
    return x.mT @ x / x.shape[-2]


@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (3, 4), (2, 17), (1, 64)])
def test_eigenbasis_is_orthogonal_and_gives_the_matrix_back(shape: tuple[int, int]) -> None:
    from whence.curvature.basis import eigenbasis

    matrix = covariances(*shape)
    values, vectors = eigenbasis(matrix)
    assert values.shape == shape
    assert vectors.shape == (*shape, shape[-1])
    eye = torch.eye(shape[-1], dtype=torch.float64).expand_as(matrix)
    oracle.assert_close(vectors.mT @ vectors, eye, "Q^T Q", rtol=0, atol_of_largest=1e-13)
    oracle.assert_close(vectors @ vectors.mT, eye, "Q Q^T", rtol=0, atol_of_largest=1e-13)
    oracle.assert_close(vectors @ torch.diag_embed(values) @ vectors.mT, matrix, "Q diag Q^T", rtol=0, atol_of_largest=1e-13)
    assert (values >= 0).all()


def test_eigenbasis_of_a_rank_deficient_matrix_has_no_negative_eigenvalue() -> None:
    from whence.curvature.basis import eigenbasis

    x = torch.randn(3, 8, dtype=torch.float64)
    matrix = (x.T @ x)[None]
    values, vectors = eigenbasis(matrix)
    assert (values >= 0).all()
    assert int((values > 1e-9).sum()) == 3
    oracle.assert_close(vectors @ torch.diag_embed(values) @ vectors.mT, matrix, "Q diag Q^T", rtol=0, atol_of_largest=1e-13)
    values, vectors = eigenbasis(torch.zeros(1, 4, 4, dtype=torch.float64))
    assert (values == 0).all()
    oracle.assert_close(vectors.mT @ vectors, torch.eye(4, dtype=torch.float64)[None], "Q^T Q of nothing", atol_of_largest=1e-14)


def test_eigenbasis_of_single_precision_is_computed_in_double() -> None:
    """A float32 covariance is taken as it is: its decomposition is as good as that of the same numbers in float64."""
    from whence.curvature.basis import eigenbasis

    matrix = covariances(1, 30).float()
    _, vectors = eigenbasis(matrix)
    tolerance = 1e-13 if vectors.dtype == torch.float64 else 3e-7
    oracle.assert_close(
        vectors.double().mT @ vectors.double(), torch.eye(30, dtype=torch.float64)[None], "Q^T Q", atol_of_largest=tolerance
    )


def test_eigenbasis_ignores_an_asymmetry_of_rounding() -> None:
    from whence.curvature.basis import eigenbasis

    matrix = covariances(1, 6)
    skew = torch.randn(1, 6, 6, dtype=torch.float64) * 1e-12
    first, second = eigenbasis(matrix)[0], eigenbasis(matrix + skew - skew.mT)[0]
    oracle.assert_close(first, second, "eigenvalues of the symmetric part", rtol=1e-10)
