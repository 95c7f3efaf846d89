"""A training that was interrupted goes on, and ends where it would have ended."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

import finetuned
from finetuned import opened
from whence.errors import ConfigError
from whence.recipes import training as module
from whence.recipes.families import FAMILIES
from whence.recipes.finetune import train_recipe
from whence.recipes.settings import DataSettings, TrainingSettings
from whence.runtime.progress import Stages

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
FILES = ["model.safetensors", "second_moments.safetensors", "start/model.safetensors"]
STEPS = 6


class Interrupting(Stages):
    """Raises in the midst of a training, and remembers what was shown."""

    def __init__(self, at: int | None) -> None:
        super().__init__(enabled=False)
        self.at, self.shown, self.advanced = at, "", list[int]()

    @contextmanager
    def track(self, total: int, description: str) -> Iterator[Callable[[int], None]]:
        self.shown = description

        def advance(n: int) -> None:
            self.advanced.append(n)
            if sum(self.advanced) == self.at:
                raise KeyboardInterrupt

        yield advance


@pytest.fixture(autouse=True)
def after_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "KEEP_EVERY_S", 0.0)


def run(name: str, data: Path, folder: Path, *, at: int | None = None, overwrite: bool = False, **training: Any) -> Interrupting:
    """Train for two epochs of three steps, up to before step `at` is kept."""
    recipe, settings = finetuned.SETTINGS[name]
    options: dict[str, Any] = {"preset": "tiny", "num_train_epochs": 2, "train_batch_size": 8} | training
    stages = Interrupting(at)
    train_recipe(
        FAMILIES[recipe],
        folder,
        data=DataSettings(data=str(data), **settings),
        training=TrainingSettings(**options),
        snapshots=3,
        overwrite=overwrite,
        stages=stages,
    )
    return stages


def interrupt(name: str, data: Path, folder: Path, at: int, **options: Any) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(name, data, folder, at=at, **options)


def check_same(first: Path, second: Path) -> None:
    files = sorted(path.name for path in (first / "snapshots").iterdir())
    assert files == sorted(path.name for path in (second / "snapshots").iterdir())
    for file in [*FILES, *(f"snapshots/{file}" for file in files), "whence.json", "config.json"]:
        assert (first / file).read_bytes() == (second / file).read_bytes(), file
    assert sorted(path.name for path in first.iterdir()) == sorted(path.name for path in second.iterdir())


@pytest.mark.parametrize(("name", "at"), [("sst2", 2), ("sst2", 5), ("swag", 4), ("wikitext", 6)])
def test_a_training_that_goes_on_ends_the_same(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, at: int) -> None:
    """To the last bit: weights, moments, snapshots and times; from within an epoch (2, 5, 6) and from the end of one (4)."""
    interrupt(name, data, tmp_path / "model", at)
    kept = [path.name for path in (tmp_path / "model" / "unfinished").glob("checkpoint-*")]
    assert kept == [f"checkpoint-{at - 1}"], "the last one only"
    assert not list((tmp_path / "model" / "unfinished").rglob("*.bin")), "no plain pickle"
    stages = run(name, data, tmp_path / "model")
    assert stages.shown == "Training, continued"
    assert stages.advanced == [at - 1] + [1] * (sum(stages.advanced) - at + 1)
    monkeypatch.undo()
    finetuned.offline_and_quick(monkeypatch)
    assert run(name, data, tmp_path / "usual").shown == "Training"
    check_same(tmp_path / "model", tmp_path / "usual")
    assert len(opened(name, tmp_path / "model").snapshots) == 3


def test_interrupted_again_and_again(data: Path, tmp_path: Path) -> None:
    for at in (2, 3, 5, STEPS):
        interrupt("sst2", data, tmp_path / "model", at)
    run("sst2", data, tmp_path / "model")
    run("sst2", data, tmp_path / "usual")
    check_same(tmp_path / "model", tmp_path / "usual")


def test_a_checkpoint_that_is_not_whole_does_not_count(data: Path, tmp_path: Path) -> None:
    interrupt("sst2", data, tmp_path / "model", 3)
    half = tmp_path / "model" / "unfinished" / "checkpoint-3"
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"half")
    assert run("sst2", data, tmp_path / "model").advanced[0] == 2
    run("sst2", data, tmp_path / "usual")
    check_same(tmp_path / "model", tmp_path / "usual")


def test_interrupted_before_the_first_checkpoint(data: Path, tmp_path: Path) -> None:
    interrupt("sst2", data, tmp_path / "model", 1)
    with pytest.raises(ConfigError, match=r"model is of a training that did not end\. Go on with it: the same whence train glue \.\.\."):
        opened("sst2", tmp_path / "model")
    assert run("sst2", data, tmp_path / "model").shown == "Training"
    assert len(opened("sst2", tmp_path / "model").train) == finetuned.TRAIN


def test_interrupted_after_the_last_step(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("whence.recipes.finetune._keep", interrupted)
        run("sst2", data, tmp_path / "model")
    assert run("sst2", data, tmp_path / "model").advanced == [STEPS - 1, 1]
    run("sst2", data, tmp_path / "usual")
    check_same(tmp_path / "model", tmp_path / "usual")


def test_where_nothing_was_kept_another_training_may_start(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="matches no parameter"):
        run("sst2", data, tmp_path / "model", freeze=("*decoder*",))
    assert run("sst2", data, tmp_path / "model").shown == "Training"


def test_another_training_does_not_go_on(tmp_path: Path) -> None:
    data, folder = finetuned.write_data(tmp_path / "data"), tmp_path / "model"
    interrupt("sst2", data, folder, 3)
    message = r"model holds a training that did not end, with another learning_rate, seed, start\. Give the same to go on with it, another"
    with pytest.raises(ConfigError, match=message):
        run("sst2", data, folder, learning_rate=1e-3, seed=5)
    with pytest.raises(ConfigError, match="with another recipe, task"):
        run("swag", data, folder)
    file = data / "glue_sst2" / "train.jsonl"
    file.write_text(file.read_text(encoding="utf-8").replace('"label": 1', '"label": 0', 1), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"with another rows\."):
        run("sst2", data, folder)
    finetuned.write_data(data)
    assert run("sst2", data, folder).shown == "Training, continued", "a refusal takes nothing away"


def test_overwrite_starts_something_else_anew(data: Path, tmp_path: Path) -> None:
    interrupt("sst2", data, tmp_path / "model", 5)
    interrupt("sst2", data, tmp_path / "model", 3, seed=5, overwrite=True)
    stages = run("sst2", data, tmp_path / "model", seed=5)
    assert stages.advanced[0] == 2, "of the second training"
    run("sst2", data, tmp_path / "usual", seed=5)
    check_same(tmp_path / "model", tmp_path / "usual")
    with pytest.raises(ConfigError, match=r"is not empty\. Give a new folder"):
        run("sst2", data, tmp_path / "model", seed=5)


def test_the_same_command_with_overwrite_goes_on(data: Path, tmp_path: Path) -> None:
    interrupt("sst2", data, tmp_path / "model", 5, overwrite=True)
    stages = run("sst2", data, tmp_path / "model", overwrite=True)
    assert stages.shown == "Training, continued"
    assert stages.advanced[0] == 4
    run("sst2", data, tmp_path / "model", overwrite=True)  # of a finished one: from its beginning
    run("sst2", data, tmp_path / "usual")
    check_same(tmp_path / "model", tmp_path / "usual")


def test_two_trainings_of_one_folder(data: Path, tmp_path: Path) -> None:
    interrupt("sst2", data, tmp_path / "model", 3)
    lock = FileLock(tmp_path / "model" / "unfinished" / ".lock", is_singleton=False)
    with lock, pytest.raises(ConfigError, match=r"model is being trained by another process\. Wait for it to end, or give another folder"):
        run("sst2", data, tmp_path / "model")
    assert run("sst2", data, tmp_path / "model").shown == "Training, continued"


def test_checkpoints_are_kept_by_time(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "KEEP_EVERY_S", 300.0)
    interrupt("sst2", data, tmp_path / "model", 5)
    assert not list((tmp_path / "model" / "unfinished").glob("checkpoint-*"))
