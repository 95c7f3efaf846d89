"""Averages over checkpoints, runs followed segment by segment, and models that have their own parameters back."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.utils.data import default_collate

import oracle
import whence
from cases import build, watch
from compare import assert_close
from whence.curvature.fit import Fitter
from whence.errors import ConfigError, MismatchError, NumericalError, StorageError
from whence.scores.pairwise import Pairwise
from whence.tasks import Classification, Regression

TASK = Classification(measurement="margin")
LAYERS = ("0", "2")


def some(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rows(seed: int, count: int) -> list:
    return list(zip(some(seed, count, 4), (torch.arange(count) * 2 + seed) % 3, strict=True))


TRAIN, QUERIES = rows(1, 12), rows(2, 3)


def model() -> nn.Module:
    return build(lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)))


def state(seed: int, like: nn.Module) -> dict[str, Tensor]:
    """Return a checkpoint some way off the model."""
    return {name: value + 0.5 * some(seed + n, *value.shape) for n, (name, value) in enumerate(like.state_dict().items())}


def loaded(like: nn.Module, parameters: dict[str, Tensor]) -> nn.Module:
    other = copy.deepcopy(like)
    other.load_state_dict(parameters)
    return other


def single(like: nn.Module, **options: Any) -> whence.Attributor:
    return whence.Attributor(like, TASK, device="cpu", progress=False, **options)


def several(like: nn.Module, checkpoints: Any, **options: Any) -> whence.Checkpoints:
    return whence.Checkpoints(like, TASK, checkpoints, device="cpu", progress=False, **options)


# ---------------------------------------------------------------------------------------------- averages


@pytest.mark.parametrize("strategy", ["identity", "diagonal", "kfac", "ekfac"])
def test_the_mean_of_two_is_the_mean_of_two_attributors(strategy: Any) -> None:
    end = model()
    states = [state(10, end), state(20, end)]
    singles = [single(loaded(end, s)).fit(TRAIN, strategy=strategy) for s in states]
    both = several(end, states).fit(TRAIN, strategy=strategy)
    options: dict[str, Any] = {"strategy": strategy, "per_layer": True, "train_rows": [7, 3, 2, 9], "query_rows": [2, 0]}
    found, parts = both.scores(QUERIES, TRAIN, **options), [a.scores(QUERIES, TRAIN, **options) for a in singles]
    assert_close(found.values, (parts[0].values + parts[1].values) / 2, "scores", rtol=1e-12)
    for name in LAYERS:
        assert_close(found.per_layer[name], (parts[0].per_layer[name] + parts[1].per_layer[name]) / 2, name, rtol=1e-12)
    assert found.top(0, 1)[0][0] in options["train_rows"]
    effects = (parts[0].removal_effect() + parts[1].removal_effect()) / 2
    assert_close(found.removal_effect(), effects, "removal", rtol=1e-12)
    own = torch.stack([a.self_influence(TRAIN, strategy=strategy) for a in singles]).mean(0)
    assert_close(both.self_influence(TRAIN, strategy=strategy), own, "self-influence", rtol=1e-12)


def test_means_of_tokens_and_sums() -> None:
    class Text(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.head = nn.Linear(4, 5), nn.Linear(5, 3)

        def forward(self, input_ids: Tensor) -> Tensor:
            return self.head(torch.tanh(self.inner(input_ids)).mean(1))

    def collate(some_rows: list) -> dict[str, Any]:
        x, y = default_collate(some_rows)
        return {"x": {"input_ids": x}, "input_ids": x, "y": y}

    end, task = build(Text), Classification(inputs="x", labels="y")
    data = list(zip(some(1, 6, 4, 4), torch.arange(6) % 3, strict=True))
    states = [state(10, end), state(20, end)]
    options: dict[str, Any] = {"collate": collate, "device": "cpu", "progress": False}
    # Row checks look at a row's parts by the batch's names.
    task.inspect_row = lambda *_: None  # type: ignore[method-assign]
    both = whence.Checkpoints(end, task, states, **options).scores(data, data, strategy="identity", per_token=True)
    parts = [
        whence.Attributor(loaded(end, s), task, **options).scores(data, data, strategy="identity", per_token=True).per_token for s in states
    ]
    assert both.per_token is not None
    assert both.per_token.shape == (6, 6, 4)
    assert_close(both.per_token, torch.stack(parts).mean(0), "tokens", rtol=1e-12)
    summed = whence.Checkpoints(end, task, states, **options).scores(data, data, strategy="identity", aggregate="both").values
    assert_close(summed, both.values.sum().view(1, 1), "sum", rtol=1e-10)


def test_mean_scores_of_other_sizes_or_none() -> None:
    end = model()
    one = single(end).scores(QUERIES, TRAIN, strategy="identity")
    other = single(end).scores(QUERIES[:2], TRAIN, strategy="identity")
    assert torch.equal(whence.mean_scores([one]).values, one.values)
    with pytest.raises(ConfigError, match=r"scores of shapes \[\(3, 12\), \(2, 12\)\] cannot be averaged"):
        whence.mean_scores([one, other])
    with pytest.raises(ConfigError):
        whence.mean_scores([])


# ---------------------------------------------------------------------------------------------- kinds of checkpoints


class Tied(nn.Module):
    """A head tied to an embedding, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.norm, self.head = nn.Embedding(9, 4), nn.BatchNorm1d(4), nn.Linear(4, 9, bias=False)
        self.head.weight = self.words.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.norm(self.words(ids).mean(1)))


def text(count: int) -> list:
    generator = torch.Generator().manual_seed(4)
    return list(zip(torch.randint(9, (count, 5), generator=generator), torch.arange(count) % 9, strict=True))


def test_files_folders_and_state_dicts_are_one(tmp_path: Path) -> None:
    """Also where a file has a tied tensor under one name, or a folder's weights lie in several files."""
    end = build(Tied)
    other = {name: value.clone() for name, value in end.state_dict().items()}
    other["words.weight"] = other["head.weight"] = other["words.weight"] + 0.5 * some(3, 9, 4)
    other["norm.running_mean"] = some(5, 4)
    stored = {name: value.contiguous().clone() for name, value in other.items() if name != "head.weight"}
    safetensors.torch.save_file(stored, tmp_path / "own.safetensors")
    (tmp_path / "folder").mkdir()
    for number, names in enumerate((["words.weight"], [name for name in stored if name != "words.weight"])):
        path = tmp_path / "folder" / f"model-0000{number + 1}-of-00002.safetensors"
        safetensors.torch.save_file({name: stored[name] for name in names}, path)
    found = []
    for checkpoint in (other, tmp_path / "own.safetensors", str(tmp_path / "own.safetensors"), tmp_path / "folder"):
        made = several(end, [checkpoint], layers="all")
        found.append(made.scores(text(4), text(8), strategy="identity").values)
    expected = single(loaded(end, other), layers="all").scores(text(4), text(8), strategy="identity").values
    for values in found:
        assert_close(values, expected, "checkpoint", rtol=1e-12)
    assert not torch.allclose(single(end, layers="all").scores(text(4), text(8), strategy="identity").values, expected)


def test_the_model_has_its_own_parameters_back(tmp_path: Path) -> None:
    """Bit for bit, in the same tensors; the fixture of conftest.py compares them too. Checkpoints stay what they were."""
    end = build(Tied)
    end.train()
    end.words.weight.grad = torch.ones_like(end.words.weight)
    watch(end)
    before = {name: (value.data_ptr(), value.clone()) for name, value in end.state_dict().items()}
    states = [{name: value.clone() for name, value in end.state_dict().items()} for _ in range(2)]
    for number, s in enumerate(states):
        s["words.weight"] = s["head.weight"] = s["words.weight"] + some(number, 9, 4)
        s["norm.running_var"] = s["norm.running_var"] * (number + 2)
    kept = copy.deepcopy(states)
    made = several(end, states, layers="all").fit(text(8), strategy="kfac")
    made.scores(text(2), text(8))
    made.self_influence(text(8))
    made.unrolled_scores(text(2), text(8), [1.0, 2.0])
    assert end.training
    for name, value in end.state_dict().items():
        assert value.data_ptr() == before[name][0]
        assert torch.equal(value, before[name][1])
    for s, k in zip(states, kept, strict=True):
        assert all(torch.equal(s[name], k[name]) for name in k)


def test_the_model_has_its_own_parameters_back_after_an_error() -> None:
    end = model()
    broken = state(20, end)
    broken["2.weight"][1, 1] = float("nan")
    made = several(end, [state(10, end), broken])
    for call in (
        lambda: made.fit(TRAIN),
        lambda: made.scores(QUERIES, TRAIN, strategy="identity"),
        lambda: made.self_influence(TRAIN, strategy="identity"),
    ):
        with pytest.raises(NumericalError, match="layer '2'"):
            call()
        assert torch.isfinite(end[2].weight).all()
    half = several(end, [state(10, end), {"0.weight": torch.zeros(5, 4)}])
    with pytest.raises(StorageError):
        half.self_influence(TRAIN, strategy="identity")


def test_checkpoints_that_do_not_fit(tmp_path: Path) -> None:
    end = model()
    good = state(1, end)
    cases: list[tuple[Any, str]] = [
        ({k: v for k, v in good.items() if k != "2.bias"}, r"the state dict does not fit the model: it lacks '2.bias'"),
        (good | {"3.weight": torch.zeros(1)}, r"it has '3.weight', which the model lacks"),
        (good | {"0.weight": torch.zeros(5, 3)}, r"it has another shape of '0.weight'"),
        (tmp_path / "nowhere", r"nowhere: no safetensors file is there. Give a file, or a folder"),
        (tmp_path, r"no safetensors file is there"),
    ]
    for checkpoint, message in cases:
        with pytest.raises(StorageError, match=message):
            several(end, [checkpoint]).self_influence(TRAIN, strategy="identity")
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file({"0.weight": torch.zeros(5, 4, dtype=torch.float64)}, path)
    with pytest.raises(StorageError, match=r"checkpoint .*model.safetensors does not fit the model: it lacks"):
        several(end, [path]).self_influence(TRAIN, strategy="identity")
    for content in (path.read_bytes()[:40], b"", b"PK\x03\x04 some pickle"):
        path.write_bytes(content)
        with pytest.raises(StorageError, match=r"model.safetensors cannot be read: .*Save the checkpoint again as safetensors"):
            several(end, [path]).self_influence(TRAIN, strategy="identity")
    with pytest.raises(ConfigError, match=r"checkpoints is empty; give files, folders or state dicts"):
        several(end, [])


# ---------------------------------------------------------------------------------------------- segments


def collected(like: nn.Module, data: list, objective: Any) -> list[oracle.Example]:
    return oracle.collect(like, LAYERS, TASK, data, collate=default_collate, objective=lambda m, batch, _: objective(m, batch))


def stacked(examples: list[oracle.Example], name: str) -> Tensor:
    return torch.stack([example.gradient[name].flatten() for example in examples])


def dense_segments(end: nn.Module, states: list[dict[str, Tensor]], times: list[float], strategy: str, decay: float) -> dict[str, Tensor]:
    """Carry the queries back with `exp(-t (H + decay))` of later segments, and meet each segment's gradients under
    the integral of `exp(-s (H + decay))` over its time."""
    carried = {name: stacked(collected(end, QUERIES, TASK.measurement), name) for name in LAYERS}
    total = {name: torch.zeros(len(QUERIES), len(TRAIN), dtype=torch.float64) for name in LAYERS}
    for parameters, time in reversed(list(zip(states, times, strict=True))):
        examples = collected(loaded(end, parameters), TRAIN, TASK.loss)
        for name, curvature in oracle.fit(LAYERS, strategy, examples).items():
            size = carried[name].shape[1]
            eye = torch.eye(size, dtype=torch.float64)
            exponent = torch.zeros(2 * size, 2 * size, dtype=torch.float64)
            exponent[:size, :size], exponent[:size, size:] = -(curvature.dense(0) + decay * eye), eye
            block = torch.linalg.matrix_exp(time * exponent)
            total[name] += carried[name] @ block[:size, size:] @ stacked(examples, name).T
            carried[name] = carried[name] @ block[:size, :size]
    return total


@pytest.mark.parametrize("decay", [0.0, 0.4])
@pytest.mark.parametrize("strategy", ["diagonal", "kfac", "ekfac"])
def test_segments_are_those_of_dense_matrices(strategy: Any, decay: float) -> None:
    end = model()
    states, times = [state(10, end), state(20, end), state(30, end)], [0.7, 2.0, 5.0]
    made = several(end, states).fit(TRAIN, strategy=strategy, empirical=True)
    expected = dense_segments(end, states, times, strategy, decay)
    found = made.unrolled_scores(QUERIES, TRAIN, times, strategy=strategy, weight_decay=decay, per_layer=True, batch_size=5)
    for name in LAYERS:
        assert_close(found.per_layer[name], expected[name], name, rtol=1e-7, atol_of_largest=1e-9)
    assert_close(found.values, sum(expected.values()), "all", rtol=1e-7, atol_of_largest=1e-9)  # type: ignore[arg-type]
    some_ = made.unrolled_scores(
        QUERIES, TRAIN, times, strategy=strategy, weight_decay=decay, query_rows=[2, 0], train_rows=[5, 1], overwrite=True
    )
    assert_close(some_.values, found.values[[2, 0]][:, [5, 1]], "rows", rtol=1e-9)
    assert {row for row, _ in some_.top(0, 2)} == {5, 1}
    assert_close(some_.removal_effect(), some_.values / len(TRAIN), "removal", rtol=1e-12)


@pytest.mark.parametrize("strategy", ["diagonal", "kfac", "ekfac"])
def test_one_segment_at_the_end_is_the_unrolled_response(strategy: Any) -> None:
    end = model()
    own = {name: value.clone() for name, value in end.state_dict().items()}
    made = several(end, [own]).fit(TRAIN, strategy=strategy)
    expected = single(end).fit(TRAIN, strategy=strategy).scores(QUERIES, TRAIN, response=whence.Unrolled(time=1.7))
    assert_close(made.unrolled_scores(QUERIES, TRAIN, [1.7]).values, expected.values, strategy, rtol=1e-9)
    decayed = single(end).fit(TRAIN, strategy=strategy).scores(QUERIES, TRAIN, response=whence.Unrolled(time=1.7), damping=0.3)
    found = made.unrolled_scores(QUERIES, TRAIN, [1.7], weight_decay=0.3, overwrite=True)
    assert_close(found.values, decayed.values, "weight decay", rtol=1e-9)


def test_a_run_cut_in_two_is_the_same_run() -> None:
    """With the same checkpoint on both sides, times add up: exp(-t2 H) (1 - exp(-t1 H)) + (1 - exp(-t2 H)) = 1 - exp(-(t1 + t2) H)."""
    end = model()
    one = state(10, end)
    whole = several(end, [one]).fit(TRAIN).unrolled_scores(QUERIES, TRAIN, [3.0]).values
    halves = several(end, [one, one]).fit(TRAIN).unrolled_scores(QUERIES, TRAIN, [1.2, 1.8]).values
    assert_close(halves, whole, "halves", rtol=1e-8)


def test_short_segments_are_gradients_along_the_run() -> None:
    """Short of time no segment undoes anything: sum over checkpoints of time times the product of gradients (TracIn)."""
    end = model()
    states, times = [state(10, end), state(20, end)], [1e-9, 3e-9]
    queries = collected(end, QUERIES, TASK.measurement)
    plain: Tensor | float = 0.0
    for parameters, time in zip(states, times, strict=True):
        train = collected(loaded(end, parameters), TRAIN, TASK.loss)
        plain = plain + sum(time * stacked(queries, name) @ stacked(train, name).T for name in LAYERS)
    assert isinstance(plain, Tensor)
    for strategy in ("ekfac", "identity"):
        made = several(end, states).fit(TRAIN, strategy=strategy)  # type: ignore[arg-type]
        found = made.unrolled_scores(QUERIES, TRAIN, times, strategy=strategy)  # type: ignore[arg-type]
        assert_close(found.values, plain, strategy, rtol=1e-6, atol_of_largest=1e-7)


def test_times_of_another_number() -> None:
    end = model()
    made = several(end, [state(10, end), state(20, end)]).fit(TRAIN)
    for times in ([1.0], [1.0, 2.0, 3.0], []):
        with pytest.raises(ConfigError, match=rf"times has {len(times)} entries for 2 checkpoints; give one for each segment"):
            made.unrolled_scores(QUERIES, TRAIN, times)
    with pytest.raises(ConfigError, match=r"must be a positive number"):
        made.unrolled_scores(QUERIES, TRAIN, [1.0, 0.0])


@pytest.mark.parametrize(
    "option",
    [{"normalize": "cosine"}, {"per_token": True}, {"aggregate": "queries"}, {"query_rank": 1}, {"solver": "cg"}, {"bach_size": 3}],
)
def test_options_that_segments_do_not_take_are_no_silence(option: dict[str, Any]) -> None:
    end = model()
    made = several(end, [state(10, end)]).fit(TRAIN, strategy="diagonal")
    with pytest.raises((ConfigError, TypeError), match=next(iter(option))):
        made.unrolled_scores(QUERIES, TRAIN, [1.0], **option)


# ---------------------------------------------------------------------------------------------- run folders


def counted(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Count fits and blocks of scores that are really computed."""
    counts = {"fit": 0, "block": 0}
    fit, block = Fitter.fit, Pairwise.block

    def count(name: str, inner: Any, *arguments: Any) -> Any:
        counts[name] += 1
        return inner(*arguments)

    monkeypatch.setattr(Fitter, "fit", lambda *a: count("fit", fit, *a))
    monkeypatch.setattr(Pairwise, "block", lambda *a: count("block", block, *a))
    return counts


def test_a_run_folder_is_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    end = model()
    states = [state(10, end), state(20, end)]
    counts = counted(monkeypatch)

    def work(folder: Path | None) -> list[Tensor]:
        made = several(end, states, run_dir=folder).fit(TRAIN)
        unrolled = made.unrolled_scores(QUERIES, TRAIN, [1.0, 2.0])
        return [made.scores(QUERIES, TRAIN).values, unrolled.values, made.self_influence(TRAIN)]

    first = work(tmp_path)
    assert counts == {"fit": 2, "block": 4}
    for one, other in zip(work(tmp_path), first, strict=True):
        assert torch.equal(one, other)
    assert counts == {"fit": 2, "block": 4}
    for one, other in zip(work(None), first, strict=True):
        assert torch.equal(one, other)
    with pytest.raises(MismatchError):
        several(end, states, run_dir=tmp_path).unrolled_scores(QUERIES, TRAIN, [1.0, 2.5])
    with pytest.raises(MismatchError):
        several(end, states[::-1], run_dir=tmp_path).fit(TRAIN)


def test_an_interrupted_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    end = model()
    states = [state(10, end), state(20, end), state(30, end)]
    expected = several(end, states).fit(TRAIN).unrolled_scores(QUERIES, TRAIN, [1.0, 2.0, 3.0]).values
    counts = counted(monkeypatch)
    with monkeypatch.context() as patch:
        real = Fitter.fit

        def stopped(self: Any) -> None:
            if counts["fit"] == 1:
                raise KeyboardInterrupt
            real(self)

        patch.setattr(Fitter, "fit", stopped)
        with pytest.raises(KeyboardInterrupt):
            several(end, states, run_dir=tmp_path).fit(TRAIN)
    made = several(end, states, run_dir=tmp_path).fit(TRAIN)
    assert counts["fit"] == 3
    with monkeypatch.context() as patch:
        real_block = Pairwise.block

        def stopped_block(*arguments: Any) -> Any:
            if counts["block"] == 2:
                raise KeyboardInterrupt
            return real_block(*arguments)

        patch.setattr(Pairwise, "block", stopped_block)
        with pytest.raises(KeyboardInterrupt):
            made.unrolled_scores(QUERIES, TRAIN, [1.0, 2.0, 3.0])
    found = several(end, states, run_dir=tmp_path).unrolled_scores(QUERIES, TRAIN, [1.0, 2.0, 3.0], strategy="ekfac")
    assert counts["block"] == 3
    assert torch.equal(found.values, expected)


class Line(Regression):
    """A label drawn one standard deviation off gives the output's own gradient: EKFAC of one linear output is then exact."""

    def sampled_loss(self, model: nn.Module, batch: Any, noise: Any) -> Tensor:
        return model(batch[0]).squeeze(1)


def test_checkpoints_of_a_real_run() -> None:
    """Gradient descent on a quadratic loss, each row's weight changed a little: the change at the end is the scores', sign and unit.

    What is left is the error of six segments with the gradients of their middles, of the order of a segment's length squared.
    """
    x, y, qx, qy = some(5, 12, 4), some(6, 12), some(7, 4, 4), some(8, 4)
    start = build(lambda: nn.Linear(4, 1), seed=3)

    def descend(weights: Tensor, keep: list | None = None) -> nn.Module:
        net = copy.deepcopy(start)
        for step in range(120):
            if keep is not None and step % 20 == 10:
                keep.append({name: value.clone() for name, value in net.state_dict().items()})
            loss = (weights * 0.5 * (net(x).squeeze(1) - y).square()).mean()
            with torch.no_grad():
                for p, g in zip(net.parameters(), torch.autograd.grad(loss, list(net.parameters())), strict=True):
                    p -= 0.01 * g
        return net

    def measured(net: nn.Module) -> Tensor:
        return 0.5 * (net(qx).squeeze(1) - qy).detach().square()

    states: list[dict[str, Tensor]] = []
    end = descend(torch.ones(12), states)
    less = [descend(torch.ones(12, dtype=torch.float64).index_fill(0, torch.tensor([t]), 1 - 1e-6)) for t in range(12)]
    effects = torch.stack([(measured(net) - measured(end)) / 1e-6 for net in less], dim=1)
    train, queries = list(zip(x, y, strict=True)), list(zip(qx, qy, strict=True))
    made = whence.Checkpoints(end, Line(), states, device="cpu", progress=False).fit(train, strategy="ekfac")
    found = made.unrolled_scores(queries, train, [0.2] * 6).removal_effect()
    assert (found - effects).norm() < 0.01 * effects.norm()
