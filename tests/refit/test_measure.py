"""Measured outputs and gradients: what changes nothing, what is refused, and what a killed run leaves."""

from __future__ import annotations

import itertools
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cases
import whence
from breaking import broken_off
from compare import assert_close
from whence.errors import ConfigError, DataError, MismatchError, NumericalError, StorageError
from whence.refit import measure, stored
from whence.refit.stored import KIND, StoredLinearised
from whence.tasks import Classification, Regression, Task

EXAMPLES = 11


class Words(nn.Module):
    """Logits of every place from this place and those before it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.mixed, self.head = nn.Linear(3, 5), nn.Linear(5, 5), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.inner(x).tanh().cumsum(1)
        return self.head(self.mixed(h).sin() + h)


def model() -> Words:
    torch.manual_seed(4)
    return cases.watch(Words())


def data(count: int = EXAMPLES, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Rows of up to six places with one to six trained labels."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for index in range(count):
        labels = torch.randint(4, (6,), generator=generator)
        labels[: index * 5 % 6] = -100
        rows.append((torch.randn(6, 3, generator=generator), labels))
    return rows


def attributor(run_dir: Path | None = None, made: nn.Module | None = None, **options: Any) -> whence.Attributor:
    return whence.Attributor(model() if made is None else made, Classification(), run_dir=run_dir, progress=False, **options)


def same(found: StoredLinearised, wanted: StoredLinearised, tolerance: float = 2e-6) -> None:
    for name in ("outputs", "gradients"):
        assert_close(getattr(found, name), getattr(wanted, name), name, rtol=0, atol_of_largest=tolerance)
    for name in ("example", "labels"):
        assert torch.equal(getattr(found, name), getattr(wanted, name))


@pytest.mark.parametrize("per_token", [True, False])
@pytest.mark.parametrize("projection", ["random", "pca", "none"])
def test_batches_and_shards_change_nothing(monkeypatch: pytest.MonkeyPatch, projection: str, per_token: bool) -> None:
    asked: dict[str, Any] = {"dimension": 9, "projection": projection, "per_token": per_token}
    wanted = attributor().linearise(data(), batch_size=EXAMPLES, **asked)
    for size, examples in ((4, 64), (3, 5), (1, 4)):
        monkeypatch.setattr(stored, "EXAMPLES", examples)
        same(attributor().linearise(data(), batch_size=size, **asked), wanted, 1e-5 if projection == "pca" else 2e-6)


def test_examples_keep_their_order_and_tokens() -> None:
    rows = data()
    found = attributor().linearise(rows, dimension=9)
    labels = [(labels != -100).nonzero().flatten() for _, labels in rows]
    assert found.labels.tolist() == torch.cat(labels).tolist()
    assert found.example.bincount().tolist() == [len(own) for own in labels]
    alone = attributor().linearise(rows, dimension=9, rows=[4, 1])
    for place, example in enumerate((4, 1)):
        assert torch.allclose(alone.gradients[alone.example == place], found.gradients[found.example == example], atol=1e-6)


def test_the_loss_is_the_cross_entropy() -> None:
    built = model()
    found = attributor(made=built).linearise(data(), dimension=9)
    wanted = [nn.functional.cross_entropy(built(x[None])[0], labels) for x, labels in data()]
    assert_close(found.loss(torch.zeros(9)), torch.stack(wanted), "loss", rtol=1e-6)


def test_the_mean_is_the_mean_of_the_tokens() -> None:
    tokens, mean = (attributor().linearise(data(), dimension=9, per_token=per_token) for per_token in (True, False))
    for name in ("outputs", "gradients"):
        values = getattr(tokens, name)
        shares = tokens.weights.unsqueeze(1) if values.dim() > 1 else tokens.weights
        summed = torch.zeros(EXAMPLES, *values.shape[1:]).index_add_(0, tokens.example, values * shares)
        assert_close(getattr(mean, name), summed, name, rtol=1e-5, atol_of_largest=1e-6)
    assert mean.weights.tolist() == [1] * EXAMPLES


def test_outputs_are_those_of_a_step_along_the_projection() -> None:
    """With all coordinates, w is a step of the parameters themselves."""
    built = model()
    found = attributor(made=built).linearise(data(), projection="none", per_token=False)
    step = 1e-3 * torch.randn(found.dimensions, generator=torch.Generator().manual_seed(1))
    moved, start = model(), 0
    for name in found.settings["projected"]:
        layer = moved.get_submodule(name)
        size = layer.out_features * (layer.in_features + 1)
        change = step[start : start + size].view(layer.out_features, -1)
        start += size
        with torch.no_grad():
            layer.weight += change[:, :-1]
            layer.bias += change[:, -1]
    after = attributor(made=cases.watch(moved)).linearise(data(), projection="none", per_token=False)
    predicted = found.moved(step)
    assert (after.outputs - predicted).abs().max() < 0.01 * (after.outputs - found.outputs).abs().max()


def test_log_odds_far_out_are_exact() -> None:
    """In float32 `log p / (1 - p)` of these would be infinite, or zero with no gradient."""
    head = nn.Linear(1, 2, bias=False)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[60.0], [-60.0]]))
    rows = [(torch.ones(1), 0), (torch.ones(1), 1)]
    found = attributor(made=cases.watch(head)).linearise(rows, projection="none")
    assert found.outputs.tolist() == [120, -120]
    assert found.gradients.tolist() == [[1, -1], [-1, 1]]


@pytest.mark.parametrize("projection", ["random", "pca", "none"])
def test_later_rows_get_the_coordinates_of_earlier_ones(tmp_path: Path, projection: str) -> None:
    first = attributor(tmp_path).linearise(data(), dimension=9, projection=projection, seed=3)
    again = attributor(tmp_path).linearise(data(), like=first)
    same(again, first)
    assert again.folder == tmp_path / KIND / "validation"
    few = attributor(tmp_path).linearise(data()[2:5], like="train", name="few")
    assert few.dimensions == first.dimensions
    assert torch.allclose(few.gradients, first.gradients[(first.example >= 2) & (first.example < 5)], atol=1e-5)
    same(attributor().linearise(data()[2:5], like=again.folder), few)


def test_principal_directions_lie_in_the_wide_ones() -> None:
    """Chosen among four times as many random ones, and no more of them than there are rows."""
    found = attributor().linearise(data(), dimension=5, projection="pca")
    assert found.dimensions == 5
    wide = attributor().linearise(data(), dimension=20, projection="random").gradients.double()
    assert_close(found.gradients.double(), wide @ found.basis.double(), "rows", rtol=1e-5, atol_of_largest=1e-6)
    few = attributor().linearise(data(1), dimension=40, projection="pca")
    assert few.dimensions == few.rows == 6


def test_other_coordinates_are_refused(tmp_path: Path) -> None:
    first = attributor(tmp_path).linearise(data(), dimension=9)
    other = model()
    with torch.no_grad():
        other.head.bias += 1
    with pytest.raises(MismatchError, match=r"^model: of like=.*, present .*\. Gradients in other coordinates cannot be compared"):
        attributor(made=cases.watch(other)).linearise(data(), like=first)
    with pytest.raises(MismatchError, match=r"projected: of like=\[\"inner\", \"mixed\", \"head\"\], present \[\"head\"\]"):
        attributor(layers=["head"]).linearise(data(), like=first)
    with pytest.raises(StorageError, match="nothing was stored there"):
        attributor(tmp_path).linearise(data(), like="trian")


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"dimension": 8}, r"projection\.dimension: stored 9, present 8"),
        ({"dimension": 9, "seed": 1}, r"projection\.seed: stored 0, present 1"),
        ({"dimension": 9, "per_token": False}, r"per token: stored true, present false"),
        ({"dimension": 9, "rows": [0, 1]}, r"rows: stored null, present \[0, 1\]"),
    ],
)
def test_a_store_of_another_kind_names_the_field(tmp_path: Path, options: dict[str, Any], field: str) -> None:
    attributor(tmp_path).linearise(data(), dimension=9)
    with pytest.raises(MismatchError, match=field + r".*overwrite=True to replace it, or with name="):
        attributor(tmp_path).linearise(data(), **options)
    attributor(tmp_path).linearise(data(), **options, overwrite=True)


def test_other_rows_are_named(tmp_path: Path) -> None:
    attributor(tmp_path).linearise(data(), dimension=9)
    with pytest.raises(MismatchError, match=r"written with other settings: data: stored"):
        attributor(tmp_path).linearise(data(seed=1), dimension=9)


def test_what_is_there_is_not_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = attributor(tmp_path).linearise(data(), dimension=9)
    monkeypatch.setattr(measure.Measure, "write", lambda *_: pytest.fail("it is measured again"))
    same(attributor(tmp_path).linearise(data(), dimension=9), wanted, 0)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


@pytest.mark.parametrize("projection", ["random", "pca"])
def test_a_run_killed_ahead_of_any_write_goes_on_to_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, projection: str
) -> None:
    monkeypatch.setattr(stored, "EXAMPLES", 6)

    def run(folder: Path) -> StoredLinearised:
        return attributor(folder).linearise(data(), dimension=3, projection=projection)

    wanted = files(run(tmp_path / "smooth").folder)
    assert len(wanted) == (4 if projection == "pca" else 3)
    for after in itertools.count():
        folder = tmp_path / str(after)
        again = partial(run, folder)
        if not broken_off(monkeypatch, after, again, KIND):
            break
        if after:
            with pytest.raises(StorageError, match="unfinished"):
                StoredLinearised.open(folder / KIND / "train")
        # Killed once more a little later, and then left alone.
        broken_off(monkeypatch, 2, again, KIND)
        assert files(again().folder) == wanted, f"killed ahead of write {after}"
    assert after >= 6  # the manifest alone, and twice for each shard


def test_rows_that_cannot_be_measured() -> None:
    with pytest.raises(DataError, match=r"row 2 has no trained label once it is collated"):
        attributor().linearise([*data(2), (torch.randn(6, 3), torch.full((6,), -100))])
    wrong = data(3)
    wrong[1][0][2, 1] = torch.nan
    with pytest.raises(NumericalError, match=r"Output gradients: layer 'inner': its input is already NaN or infinite for example ids 1\."):
        attributor().linearise(wrong)


def test_tasks_without_log_odds() -> None:
    rows = [(torch.randn(4), torch.randn(3)) for _ in range(3)]
    with pytest.raises(ConfigError, match=r"a regression has no log-odds\. linearise takes models of classes"):
        whence.Attributor(cases.watch(nn.Sequential(nn.Linear(4, 3))), Regression(), progress=False).linearise(rows)

    class Own(Task):
        def loss(self, model: nn.Module, batch: Any) -> Tensor:
            return model(batch[0]).sum(1)

    with pytest.raises(ConfigError, match="Own does not define log_odds, which linearise needs"):
        whence.Attributor(cases.watch(nn.Sequential(nn.Linear(4, 3))), Own(), progress=False).linearise(rows)


def test_memory_that_runs_out_halves_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted, real, sizes = attributor().linearise(data(), dimension=9), measure.run_columns, []

    def short(recorder: Any, batch: Any, consumer_for: Any) -> Any:
        sizes.append(len(batch.ids))
        if len(batch.ids) > 3:
            raise torch.OutOfMemoryError("out of memory")
        return real(recorder, batch, consumer_for)

    monkeypatch.setattr(measure, "run_columns", short)
    same(attributor().linearise(data(), dimension=9), wanted)
    assert sizes[:4] == [11, 11, 8, 4]
    assert max(sizes[4:]) == 2
