"""Low-rank adapters: trained on a model that stays as it is, kept, opened and trained again."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

import finetuned
import whence
from finetuned import measured, opened, procedure_of
from whence.checkpoints import load_checkpoint
from whence.errors import ConfigError, StorageError
from whence.evaluate.retrain import RetrainSpec, retrain
from whence.pretrained.adapters import lora_targets
from whence.recipes.base import Recipe
from whence.recipes.settings import TrainingSettings

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("peft")
NAMES = ["sst2", "swag", "wikitext"]
SEED = TrainingSettings().seed
LORA: dict[str, Any] = {"lora_rank": 2, "learning_rate": 1e-2}


@pytest.fixture(scope="session")
def adapters(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return the folder of a model with adapters by its name; made once, only read."""
    folder = tmp_path_factory.mktemp("adapters")

    def get(name: str) -> Path:
        if not (folder / name / "whence.json").exists():
            finetuned.trained(name, data, folder / name, **LORA)
        return folder / name

    return get


def trainable(recipe: Recipe) -> set[str]:
    return {name for name, parameter in recipe.model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("name", NAMES)
def test_only_adapters_and_new_heads_are_trained_and_kept(adapters: Any, name: str) -> None:
    folder = adapters(name)
    recipe = opened(name, folder)
    trained = trainable(recipe)
    assert trained
    assert all("lora_" in one or "modules_to_save" in one for one in trained)
    assert any("modules_to_save" in one for one in trained) == (name != "wikitext"), "the head of a classifier is new, and trained"
    kept = safetensors.torch.load_file(folder / "adapter_model.safetensors")
    assert len(kept) == len(trained)
    assert not (folder / "model.safetensors").exists()
    start = safetensors.torch.load_file(folder / "start" / "model.safetensors")
    base: Any = recipe.model
    held = base.get_base_model().state_dict()
    for key, tensor in start.items():
        inner, _, last = key.rpartition(".")
        found = next(
            held[k]
            for k in (key, f"{inner}.base_layer.{last}", f"{inner.replace('classifier', 'classifier.original_module')}.{last}")
            if k in held
        )
        assert torch.equal(found.cpu(), tensor), f"{key} stays as it was"
    for part in ("lora_A", "lora_B"):
        assert any(part in key and bool(tensor.any()) for key, tensor in kept.items())


@pytest.mark.parametrize("name", NAMES)
def test_moments_and_snapshots_hold_what_was_trained(adapters: Any, name: str) -> None:
    recipe = opened(name, adapters(name))
    assert recipe.second_moments is not None
    assert set(safetensors.torch.load_file(recipe.second_moments)) == trainable(recipe)
    parameters = {key for key, _ in recipe.model.named_parameters()}
    assert len(recipe.snapshots) == 2
    for file, _ in recipe.snapshots:
        assert set(safetensors.torch.load_file(file)) & parameters == trainable(recipe)


@pytest.mark.parametrize("name", NAMES)
def test_retraining_on_all_rows_gives_the_trained_adapters(adapters: Any, name: str) -> None:
    """To the last bit, dropout included."""
    recipe = opened(name, adapters(name))
    procedure, every = procedure_of(recipe), tuple(range(len(recipe.train)))
    again = retrain(procedure, RetrainSpec(key=procedure.key, rows=every, seed=SEED))
    assert torch.equal(again, measured(recipe))
    assert not torch.equal(procedure(every, SEED + 1), again)


def test_scores_are_of_the_adapters_and_over_the_run(adapters: Any) -> None:
    recipe = opened("wikitext", adapters("wikitext"))
    options: dict[str, Any] = {"collate": recipe.collate, "progress": False, "device": "cpu"}
    attributor = whence.Attributor(recipe.model, recipe.task, **options)
    attributor.scores(recipe.queries[:1], recipe.train[:2], strategy="identity")
    assert attributor.coverage.tracked
    assert all("lora_" in layer for layer in attributor.coverage.tracked)
    files = [file for file, _ in recipe.snapshots]
    several = whence.Checkpoints(recipe.model, recipe.task, files, **options)
    found = several.scores(recipe.queries[:2], recipe.train[:3], strategy="identity")
    parts = []
    for file in files:
        other = opened("wikitext", adapters("wikitext"))
        load_checkpoint(other.model, file)
        bench = whence.Attributor(other.model, other.task, **options)
        parts.append(bench.scores(recipe.queries[:2], recipe.train[:3], strategy="identity").values)
    torch.testing.assert_close(found.values, torch.stack(parts).mean(0))


@pytest.mark.parametrize("name", NAMES)
def test_folders_of_whence_train_are_checkpoints(adapters: Any, checkpoint: Any, name: str) -> None:
    """Adam's second moments lie beside the weights, under the same names, and are none."""
    for folder in (adapters(name), checkpoint(name)):
        recipe = opened(name, folder)
        before = {key: tensor.clone() for key, tensor in recipe.model.state_dict().items()}
        with torch.no_grad():
            for parameter in recipe.model.parameters():
                if parameter.requires_grad:
                    parameter.zero_()
        load_checkpoint(recipe.model, folder)
        assert finetuned.differing(before, recipe.model.state_dict()) == set()


def test_a_checkpoint_without_the_adapters_is_refused(adapters: Any, tmp_path: Path) -> None:
    recipe = opened("wikitext", adapters("wikitext"))
    with pytest.raises(StorageError, match=r"does not fit the model: it lacks '.*lora_A\.default\.weight'"):
        load_checkpoint(recipe.model, {})


def test_the_folder_may_be_moved(adapters: Any, tmp_path: Path) -> None:
    shutil.copytree(adapters("sst2"), tmp_path / "moved")
    moved, found = opened("sst2", tmp_path / "moved"), opened("sst2", adapters("sst2"))
    assert json.loads((tmp_path / "moved" / "adapter_config.json").read_text())["base_model_name_or_path"] == "start"
    assert torch.equal(measured(moved), measured(found))
    assert procedure_of(moved).key == procedure_of(found).key


def test_what_is_not_said_is_as_in_the_published_runs(adapters: Any) -> None:
    record = json.loads((adapters("wikitext") / "whence.json").read_text(encoding="utf-8"))["training"]
    assert {key: record[key] for key in record if key.startswith("lora")} == {
        "lora_rank": 2,
        "lora_alpha": 16.0,
        "lora_dropout": 0.1,
        "lora_targets": ["c_attn", "c_proj", "c_fc"],
    }


def test_what_is_said(data: Path, tmp_path: Path, adapters: Any) -> None:
    said: dict[str, Any] = {"lora_alpha": 4, "lora_targets": ("query",), "dropout": 0.0}
    recipe = finetuned.trained("sst2", data, tmp_path / "model", **LORA, **said)
    assert all("query" in name or "classifier" in name for name in trainable(recipe))
    assert {module.p for module in recipe.model.modules() if isinstance(module, nn.Dropout)} == {0.0}, "also of the adapters"
    config: Any = recipe.model.peft_config
    assert (config["default"].r, config["default"].lora_alpha) == (2, 4)
    usual = procedure_of(opened("sst2", adapters("sst2"))).key
    keys = {usual, procedure_of(recipe).key}
    for number, more in enumerate(({"lora_alpha": 5}, {"lora_dropout": 0.2}, {"lora_rank": 3}, {"lora_targets": ("value",)})):
        keys.add(procedure_of(finetuned.trained("sst2", data, tmp_path / str(number), **{**LORA, **more})).key)
    assert len(keys) == 6


def test_adapters_are_keyed_by_the_seed(data: Path, tmp_path: Path, adapters: Any) -> None:
    """The same base, other adapters: models from a pretrained base are told apart by nothing else."""
    start = str(adapters("wikitext") / "start")
    one, two = (
        finetuned.trained("wikitext", data, tmp_path / str(seed), preset=None, model=start, seed=seed, **LORA, num_train_epochs=0.1)
        for seed in (1, 2)
    )
    first = [dict(recipe.model.named_parameters()) for recipe in (one, two)]
    names = [name for name in first[0] if "lora_A" in name]
    assert names
    assert all(not torch.equal(first[0][name], first[1][name]) for name in names)
    assert all(torch.equal(first[0][name], first[1][name]) for name in first[0] if "lora" not in name)
    assert procedure_of(one).key != procedure_of(two).key


@pytest.mark.parametrize("at", [2])
def test_an_interrupted_training_goes_on(data: Path, tmp_path: Path, adapters: Any, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    transformers = pytest.importorskip("transformers")
    step = transformers.Trainer.training_step
    count = iter(range(1000))

    def breaks(self: Any, *arguments: Any, **more: Any) -> Any:
        if next(count) == at:
            raise KeyboardInterrupt
        return step(self, *arguments, **more)

    train = partial(finetuned.trained, "sst2", data, tmp_path / "model", **LORA)
    from whence.recipes import training

    monkeypatch.setattr(training, "KEEP_EVERY_S", 0.0)
    monkeypatch.setattr(transformers.Trainer, "training_step", breaks)
    with pytest.raises(KeyboardInterrupt):
        train()
    assert list((tmp_path / "model" / "unfinished").glob("checkpoint-*/adapter_model.safetensors"))
    train()
    again, whole = (safetensors.torch.load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "model", adapters("sst2")))
    assert finetuned.differing(again, whole) == set()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lora_alpha": 3}, r"lora_alpha=3 is of an adapter, and none is asked for\. Give lora_rank too\."),
        ({"lora_rank": 0}, r"lora_rank=0 cannot be used; give a whole number of 1 or more\."),
        ({"lora_rank": 2, "lora_dropout": 1.0}, r"lora_dropout=1\.0 cannot be used"),
        ({"lora_rank": 2, "lora_targets": "query"}, r"lora_targets='query' cannot be used; give names of layers, as a list\."),
    ],
)
def test_settings_of_adapters_that_cannot_be_used(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainingSettings(**settings)


def test_layers_that_are_not_there() -> None:
    model = nn.Sequential()
    model.odd = nn.Linear(2, 2)
    with pytest.raises(
        ConfigError, match=r"is not known of this architecture: Sequential has linear layers named odd\. Give --lora-targets\."
    ):
        lora_targets(model, None)
    with pytest.raises(ConfigError, match=r"lora_targets='even' names no linear layer; Sequential has linear layers named odd\."):
        lora_targets(model, ("even",))
    assert lora_targets(model, ("odd",)) == ("odd",)


QUERY_KEY_VALUE = ("q_proj", "k_proj", "v_proj")


@pytest.mark.parametrize(
    ("architecture", "expected"),
    [
        ("gpt2", ("c_attn", "c_proj", "c_fc")),
        ("gpt_neo", QUERY_KEY_VALUE),  # its feed-forward layers are named as GPT-2's
        ("llama", QUERY_KEY_VALUE),
        ("mistral", QUERY_KEY_VALUE),
        ("opt", QUERY_KEY_VALUE),
        ("bart", QUERY_KEY_VALUE),
        ("gpt_neox", ("query_key_value",)),
        ("bloom", ("query_key_value",)),
        ("falcon", ("query_key_value",)),
        ("t5", ("q", "k", "v")),
        ("mt5", ("q", "k", "v")),
        ("bert", ("query", "key", "value")),
        ("roberta", ("query", "key", "value")),
        ("electra", ("query", "key", "value")),
        ("deberta-v2", ("query_proj", "key_proj", "value_proj")),
        ("distilbert", ("q_lin", "k_lin", "v_lin")),
    ],
)
def test_the_usual_layers_of_every_architecture(architecture: str, expected: tuple[str, ...]) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model(architecture)
    with torch.device("meta"):
        model = transformers.AutoModel.from_config(config)
    assert lora_targets(model, None) == expected
