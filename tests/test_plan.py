"""A plan counts what is done, knows what is held, changes nothing, and its advice is true."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cases
import whence
from case_data import labelled
from whence.capture.passes import Rows
from whence.curvature.fit import Fitter
from whence.errors import ConfigError, DataError, NumericalError
from whence.plan import advice, measure
from whence.plan.live import LiveBytes
from whence.plan.measure import Cost, cost_of
from whence.plan.predict import Drafted, make_plan
from whence.plan.result import Plan, duration, size
from whence.plan.samples import sample
from whence.runtime.memory import BatchSize
from whence.scores import pairwise
from whence.storage.shards import ShardStore

CPU = torch.device("cpu")
NAMES = ["mlp", "positions", "conv_groups", "padded", "packed", "transformed_gradients", "half_frozen"]


@pytest.fixture
def drafts(monkeypatch: pytest.MonkeyPatch) -> list[Drafted]:
    """Collect what plans are made of."""
    made: list[Drafted] = []

    def advise(plan: Plan, draft: Drafted) -> tuple[Any, ...]:
        made.append(draft)
        return real(plan, draft)

    real = advice.advise
    monkeypatch.setattr(advice, "advise", advise)
    return made


def planned(case: cases.Case, strategy: str, **options: Any) -> tuple[Plan, Any]:
    train, queries = case.data()
    attributor = case.attributor(case.model())
    sizes = {"batch_size": 5, "query_batch_size": 3, "empirical": not case.sampled}
    return make_plan(attributor, train, queries, strategy=strategy, **{**sizes, **options}), attributor


def rows(shape: tuple[int, ...], count: int, classes: int = 3) -> list[Any]:
    return labelled(torch.Generator().manual_seed(1), count, shape=shape, classes=classes)


def simple(model: nn.Module, **options: Any) -> whence.Attributor:
    return whence.Attributor(model, whence.tasks.Classification(), device="cpu", progress=False, **options)


def test_flops_equal_hand_counts() -> None:
    """Two layers of one position: 4 to 6 and 6 to 3, with biases, so 5 x 6 and 7 x 3 in the internal layout."""
    model = cases.build(lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)))
    plan = make_plan(simple(model), rows((4,), 13), rows((4,), 4), batch_size=5)
    stages = {stage.name: stage for stage in plan.stages}
    network = 2 * (4 * 6 + 6 * 3) + 2 * 6 * 3  # no gradient goes to the first layer's input
    layers = [(5, 6), (7, 3)]
    rotated = sum(2 * (i * i + o * o) for i, o in layers)
    weights = sum(i * o for i, o in layers)
    back = sum(2 * i * o * (i + o) for i, o in layers)
    assert [stage.model_flops for stage in plan.stages] == [13 * network, 0, 13 * network, 4 * network, 13 * network, 13 * network]
    assert stages["Fit covariances"].flops == 13 * (network + rotated)
    assert stages["Eigendecompositions"].flops == 9 * sum(i**3 + o**3 for i, o in layers)
    assert stages["Fit eigenvalues"].flops == 13 * (network + rotated + 2 * weights)
    assert stages["Self-influence"].flops == stages["Fit eigenvalues"].flops
    # Few training rows: queries stay rotated, and positions are rotated towards them.
    assert 13 * rotated < 4 * back
    assert stages["Query gradients"].flops == 4 * (network + rotated + 2 * weights)
    products = sum(2 * 4 * i * o + min(2 * 4 * o, 2 * i * o) for i, o in layers)
    assert stages["Pairwise scores"].flops == 13 * (network + rotated + products)
    assert plan.flops == sum(stage.flops for stage in plan.stages)


def test_the_models_flops_include_attention_and_convolutions() -> None:
    class Attending(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            x = self.inner(x).unsqueeze(1)
            return nn.functional.scaled_dot_product_attention(x, x, x).mean((1, 2))

    plan = make_plan(simple(cases.build(Attending)), rows((16, 8), 3, classes=8), strategy="identity", batch_size=3)
    attention = 2 * 2 * 16 * 16 * 8
    assert plan.stages[0].model_flops >= 3 * (2 * 16 * 8 * 8 + 3 * attention)


@pytest.mark.parametrize(
    ("strategy", "names"),
    [
        ("identity", []),
        ("diagonal", ["Fit eigenvalues"]),
        ("kfac", ["Fit covariances", "Eigendecompositions"]),
        ("ekfac", ["Fit covariances", "Eigendecompositions", "Fit eigenvalues"]),
    ],
)
def test_stages_are_those_of_the_run(strategy: str, names: list[str]) -> None:
    case = cases.case_named("mlp")
    plan, attributor = planned(case, strategy, max_examples=9)
    scoring = ["Query gradients", "Pairwise scores", "Self-influence"]
    assert [stage.name for stage in plan.stages] == names + scoring
    passes = {name: (0, 0) if name == "Eigendecompositions" else (1, 9) for name in names}
    passes |= {"Query gradients": (1, 4), "Pairwise scores": (1, 13), "Self-influence": (1, 13)}
    assert {stage.name: (stage.passes, stage.rows) for stage in plan.stages} == passes
    train, queries = case.data()
    attributor.fit(train, strategy=strategy, max_examples=9)
    attributor.scores(queries, train)
    attributor.self_influence(train)
    assert {row.name for row in attributor.stages.rows()} == set(names + scoring)


def test_without_queries_no_scores_are_planned() -> None:
    case = cases.case_named("mlp")
    plan = make_plan(case.attributor(case.model()), case.data()[0], strategy="diagonal")
    assert [stage.name for stage in plan.stages] == ["Fit eigenvalues", "Self-influence"]
    assert set(plan.disk_bytes) == {"factors", "self_influence"}


@pytest.mark.parametrize("strategy", cases.STRATEGIES)
@pytest.mark.parametrize("name", NAMES)
def test_bytes_that_last_are_those_of_the_real_tensors(
    name: str, strategy: str, drafts: list[Drafted], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = cases.case_named(name)
    plan, attributor = planned(case, strategy)
    state = drafts[0].state
    sums: list[int] = []
    residents: list[Any] = []
    real, make = Fitter._decomposed, pairwise.make_resident

    def decomposed(self: Fitter, layer: Any, totals: dict[str, Tensor], **more: Any) -> Any:
        sums.append(sum(value.nbytes for key, value in totals.items() if not key.endswith("/count")))
        return real(self, layer, totals, **more)

    def make_resident(*given: Any) -> Any:
        residents.append(make(*given))
        return residents[-1]

    monkeypatch.setattr(Fitter, "_decomposed", decomposed)
    monkeypatch.setattr(pairwise, "make_resident", make_resident)
    train, queries = case.data()
    attributor.fit(train, strategy=strategy, empirical=not case.sampled)
    scores = attributor.scores(queries, train, query_batch_size=3)
    influence = attributor.self_influence(train)
    if state.asked.rotated:
        assert max(sums) == 8 * state.covariances
    if strategy != "identity":
        store = ShardStore.open(attributor.run.sub("factors", strategy), kind="factors")
        tensors = [(key, value) for shard in store.names for key, value in store.read(shard).items()]
        assert sum(value.nbytes for _, value in tensors) == plan.disk_bytes["factors"] == state.factors
        assert sum(value.nbytes for key, value in tensors if key in ("inputs", "outputs")) == state.bases
    assert sum(bytes_of(resident) for resident in residents) == state.residents
    assert plan.disk_bytes["scores"] == scores.values.nbytes
    assert plan.disk_bytes["self_influence"] == influence.nbytes


def bytes_of(resident: Any) -> int:
    return sum(value.nbytes for key, value in vars(resident).items() if isinstance(value, Tensor) and key != "weights")


@pytest.mark.parametrize(
    "asked",
    [{"per_layer": True}, {"aggregate": "queries"}, {"aggregate": "both"}, {"query_rank": 1}, {"normalize": "cosine"}, {"per_token": True}],
)
def test_every_request_can_be_planned(asked: dict[str, Any], drafts: list[Drafted], monkeypatch: pytest.MonkeyPatch) -> None:
    case = cases.case_named("padded")
    plan, attributor = planned(case, "kfac", **asked)
    residents: list[Any] = []
    make = pairwise.make_resident
    monkeypatch.setattr(pairwise, "make_resident", lambda *given: residents.append(make(*given)) or residents[-1])
    train, queries = case.data()
    scores = attributor.fit(train, strategy="kfac").scores(queries, train, query_batch_size=3, **asked)
    kept = sum(sum(x.nbytes for x in (r.left, r.right)) if hasattr(r, "left") else r.values.nbytes for r in residents)
    assert drafts[0].state.residents == kept
    per_layer = sum(values.nbytes for values in scores.per_layer.values())
    expected = scores.values.nbytes + per_layer
    if asked.get("per_token"):
        assert plan.disk_bytes["scores"] >= expected
    else:
        assert plan.disk_bytes["scores"] == expected


def test_self_influence_on_the_measurement_takes_two_passes_of_the_model() -> None:
    case = cases.case_named("mlp")
    (loss, _), (measurement, _) = (planned(case, "diagonal", on=on) for on in ("loss", "measurement"))
    assert measurement.stages[-1].passes == 2
    assert measurement.stages[-1].model_flops == 2 * loss.stages[-1].model_flops


def test_nothing_is_written_and_nothing_is_changed(tmp_path: Path) -> None:
    case = cases.case_named("positions")
    model = case.model()
    train, queries = case.data()
    attributor = case.attributor(model, run_dir=tmp_path / "run")
    state = torch.get_rng_state()
    plan = make_plan(attributor, train, queries, batch_size=5)
    assert list(tmp_path.iterdir()) == []
    assert torch.equal(torch.get_rng_state(), state)
    assert attributor.stages.rows() == []
    assert not cases.differences()
    with pytest.raises(whence.errors.NotFittedError):
        attributor.scores(queries, train)
    assert plan.fits
    assert plan.advice == ()


def small() -> tuple[whence.Attributor, list[Any], list[Any]]:
    """A model whose batches, and one whose queries, are what takes memory."""
    model = cases.build(lambda: nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Flatten(), nn.Linear(64 * 200, 3)))
    return simple(model, layers=["0"]), rows((200, 16), 64), rows((200, 16), 8)


def test_a_smaller_batch_is_advised_where_it_helps() -> None:
    attributor, train, queries = small()
    sizes = {"strategy": "diagonal", "batch_size": 64, "query_batch_size": 8}
    plan = make_plan(attributor, train, queries, **sizes)
    assert plan.fits
    rest = max(stage.state_bytes for stage in plan.stages) - plan.model_bytes
    free = rest + (plan.peak_bytes - plan.model_bytes - rest) // 2
    tight = make_plan(attributor, train, queries, **sizes, free=free)
    assert not tight.fits
    (found,) = [one for one in tight.advice if set(one.options) == {"batch_size", "query_batch_size"}]
    assert found.options["batch_size"] < 64
    assert f"batch_size={found.options['batch_size']}" in found.text
    assert make_plan(attributor, train, queries, **{**sizes, **found.options}, free=free).fits


def test_a_lower_rank_or_fewer_queries_are_advised_where_queries_fill_the_memory() -> None:
    model = cases.build(lambda: nn.Sequential(nn.Linear(128, 128), nn.Tanh(), nn.Linear(128, 3)))
    attributor, train, queries = simple(model), rows((128,), 16), rows((128,), 300)
    plan = make_plan(attributor, train, queries, strategy="kfac", batch_size=8, query_batch_size=8)
    tight = partial(make_plan, attributor, train, strategy="kfac", batch_size=8, query_batch_size=8, free=plan.peak_bytes * 2 // 3)
    first = tight(queries)
    assert not first.fits
    options = {key: value for found in first.advice for key, value in found.options.items()}
    assert {"query_rank", "queries at a time"} <= set(options)
    assert tight(queries, query_rank=options["query_rank"]).fits
    assert tight(queries[: options["queries at a time"]]).fits


def test_where_the_curvature_itself_is_too_large_advice_names_the_layers() -> None:
    case = cases.case_named("mlp")
    plan, _ = planned(case, "ekfac", free=5_000)
    assert not plan.fits
    assert any("layers=" in found.text and "B" in found.text for found in plan.advice)
    assert "does not fit" in "\n".join(plan.lines())


def test_where_factors_do_not_fit_at_all_the_rehearsal_is_of_the_model_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from whence.plan import predict

    monkeypatch.setattr(predict, "free_bytes", lambda device: 1_000)
    plan, _ = planned(cases.case_named("mlp"), "ekfac")
    assert not plan.fits
    assert all(stage.seconds > 0 and stage.flops > 0 for stage in plan.stages)


def test_a_long_plan_is_advised_fewer_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(advice, "LONG_S", 0.0)
    train = rows((4,), 1200)
    attributor = simple(cases.build(lambda: nn.Sequential(nn.Linear(4, 3))))
    plan = make_plan(attributor, train)
    options = {key: value for found in plan.advice for key, value in found.options.items()}
    assert options["max_examples"] == 512
    fewer = make_plan(attributor, train, max_examples=512)
    assert [stage.rows for stage in fewer.stages if stage.passes] == [512, 512, 1200]


ERRORS = {
    "empty training data": (lambda case: (case.data()[1][:0], None, {}), DataError, "the training data set is empty"),
    "empty queries": (lambda case: (case.data()[0], [], {}), DataError, "the query data set is empty"),
    "bad label": (lambda case: ([(torch.zeros(4).double(), 99)] * 4, None, {}), DataError, "label 99 is out of range"),
    "strategy": (lambda case: (case.data()[0], None, {"strategy": "newton"}), ConfigError, "strategy='newton' is not known"),
    "batch size": (lambda case: (case.data()[0], None, {"batch_size": 0}), ConfigError, "batch_size=0 cannot be used"),
    "rank": (lambda case: (*case.data(), {"query_rank": 0}), ConfigError, "query_rank=0 cannot be used"),
    "rows": (lambda case: (case.data()[0], None, {"max_examples": 0}), ConfigError, "max_examples=0 cannot be used"),
    "on": (lambda case: (case.data()[0], None, {"on": "labels"}), ConfigError, "on='labels' is not known"),
    "response": (lambda case: (*case.data(), {"response": "unrolled"}), ConfigError, "needs the length of training"),
    "NaN": (lambda case: (case.data()[0], [(torch.full((4,), torch.nan).double(), 0)] * 2, {}), NumericalError, "Query gradients"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_are_those_of_the_calls(name: str) -> None:
    make, kind, text = ERRORS[name]
    case = cases.case_named("mlp")
    train, queries, options = make(case)
    with pytest.raises(kind, match=text):
        make_plan(case.attributor(case.model()), train, queries, **options)


def test_plans_are_json_and_tables() -> None:
    plan, _ = planned(cases.case_named("mlp"), "ekfac")
    value = json.loads(json.dumps(plan.to_json()))
    assert value["total"]["seconds"] == plan.seconds > 0
    assert [stage["name"] for stage in value["stages"]] == [stage.name for stage in plan.stages]
    assert value["fits"] is True
    assert plan.table().row_count == len(plan.stages) + 1


def test_live_bytes_are_exact() -> None:
    given = torch.zeros(1000)
    with LiveBytes() as live:
        given.add_(1)
        view = given[:10]
        assert live.now == 0, "neither in place nor a view is new"
        double = given.double()
        assert live.now == 8000
        product = double * 2
        del double
        assert (live.now, live.peak) == (8000, 16000)
        del product
    assert (live.now, live.peak, view.numel()) == (0, 16000, 10)


def test_costs_are_carried_on_in_a_straight_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass of 0.5 s per batch and 1 s per row and token, which holds 100 bytes and 30 per row."""
    ran: list[int] = []
    monkeypatch.setattr(measure, "seconds_of", lambda run, device: run() or 0.5 + ran[-1])
    monkeypatch.setattr(measure, "peak_of", lambda run, device: run() or 100 + 30 * sum(1 for _ in range(last_rows())))
    monkeypatch.setattr(measure, "_both", lambda run, device, expected: (measure.seconds_of(run, device), measure.peak_of(run, device)))
    last: list[int] = []

    def last_rows() -> int:
        return last[-1]

    data = [torch.zeros(length) for length in [4] * 8 + [2] * 8 + [1] * 7]
    found = sample(Rows(dataset=data, indices=range(23), batch_size=BatchSize(8, device=CPU), collate=None, device=CPU))

    def run(part: Rows) -> None:
        last.append(len(part))
        ran.append(sum(len(data[index]) for index in part.indices))

    monkeypatch.setattr(measure, "LONGEST_S", 1e9)
    cost = cost_of(found, run)
    assert cost.fixed == pytest.approx(0.5)
    assert cost.widths == (1, 2, 4)
    assert cost.per_row == pytest.approx((1, 2, 4))
    assert cost.seconds(found) == pytest.approx(3 * 0.5 + 8 * 4 + 8 * 2 + 7)
    assert cost.transient(100) == pytest.approx(100 + 30 * 100)


def test_costs_beyond_the_measured_queries() -> None:
    few, many = (Cost(fixed=1 + q, widths=(1, 2), per_row=(1 + 2 * q, 5 + 2 * q), bytes_fixed=3 * q, bytes_row=4 * q) for q in (8, 64))
    far = many.beyond(few, (300 - 64) / (64 - 8))
    assert (far.fixed, far.bytes_fixed, far.bytes_row) == pytest.approx((301, 900, 1200))
    assert far.per_row == pytest.approx((601, 605))


def test_numbers_for_people() -> None:
    assert [size(n) for n in (12, 2048, 3.5 * 2**20, 2**31, 2**41)] == ["12 B", "2 KiB", "3.5 MiB", "2 GiB", "2 TiB"]
    assert [duration(s) for s in (0.123, 42, 600, 9000)] == ["0.12 s", "42 s", "10 min", "2 h 30 min"]
