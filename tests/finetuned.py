"""Small made-up data under the names of the hub's columns, and models that train on them in a second."""

from __future__ import annotations

import importlib
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from whence.recipes.base import Recipe, load_recipe
from whence.recipes.families import FAMILIES
from whence.recipes.finetune import train_recipe
from whence.recipes.retraining import Retraining
from whence.recipes.settings import DataSettings, TrainingSettings
from whence.recipes.splits import Split, collate_of, read_splits, read_train, task_of
from whence.recipes.start import make_start
from whence.recipes.training import measure

TRAIN, VALIDATION = 24, 8
GOOD, BAD = ("good", "great", "fine", "lovely"), ("bad", "awful", "poor", "dull")
NOUNS = ("film", "plot", "cast", "scene", "story", "music")
Row = dict[str, Any]

# Columns of the text, and number of classes; 0: a number is to be predicted.
GLUE = {
    "cola": (("sentence",), 2),
    "mnli": (("premise", "hypothesis"), 3),
    "mrpc": (("sentence1", "sentence2"), 2),
    "qnli": (("question", "sentence"), 2),
    "qqp": (("question1", "question2"), 2),
    "rte": (("sentence1", "sentence2"), 2),
    "sst2": (("sentence",), 2),
    "stsb": (("sentence1", "sentence2"), 0),
    "wnli": (("sentence1", "sentence2"), 2),
}


def sentence(dice: random.Random, good: bool) -> str:
    return f"the {dice.choice(NOUNS)} is {dice.choice(GOOD if good else BAD)} and the {dice.choice(NOUNS)} too"


def glue_row(task: str, dice: random.Random, number: int) -> Row:
    columns, classes = GLUE[task]
    label = dice.randrange(classes or 2)
    return {name: sentence(dice, label == 1) for name in columns} | {"label": label if classes else 2.5 * label + 1, "idx": number}


def swag_row(dice: random.Random, number: int) -> Row:
    label = dice.randrange(4)
    endings = {f"ending{place}": f"is {dice.choice(GOOD if place == label else BAD)}" + " indeed" * place for place in range(4)}
    return {"video-id": f"v{number}", "sent1": f"See {sentence(dice, True)}.", "sent2": "It", **endings, "label": label}


def hellaswag_row(dice: random.Random, number: int) -> Row:
    """As on the hub: the start of the sentence may be empty, the endings are a list, the label is text."""
    label = dice.randrange(4)
    endings = [f"is {dice.choice(GOOD if place == label else BAD)}." for place in range(4)]
    second = "it" if number % 2 else ""
    first = f"See {sentence(dice, True)}."
    return {"ind": number, "ctx_a": first, "ctx_b": second, "ctx": f"{first} {second}".strip(), "endings": endings, "label": str(label)}


def alpaca_row(dice: random.Random, number: int) -> Row:
    good, noun = number % 2 == 0, dice.choice(NOUNS)
    asked = {"instruction": f"Say that the {noun} is {'good' if good else 'bad'}.", "input": noun if number % 3 else ""}
    return {**asked, "output": f"The {noun} is {dice.choice(GOOD if good else BAD)}.", "skill": "praise" if good else "blame"}


def flan_row(dice: random.Random, number: int) -> Row:
    good, noun = number % 2 == 0, dice.choice(NOUNS)
    targets = f"It is {dice.choice(GOOD if good else BAD)}.\nThe answer is {'yes' if good else 'no'}."
    return {"inputs": f"Is the {noun} liked?", "targets": targets, "_task_source": "CoT", "_task_name": f"cot_{noun}"}


def strategy_row(dice: random.Random, number: int) -> Row:
    good, noun = number % 2 == 0, dice.choice(NOUNS)
    rationale = f"The {noun} is {dice.choice(GOOD if good else BAD)}."
    return {"qid": f"q{number}", "question": f"Is the {noun} number {number} liked?", "answer": good, "rationale": rationale}


def commonsense_row(dice: random.Random, number: int) -> Row:
    right = dice.randrange(3)
    texts = dice.sample(NOUNS, 3)
    rationale = f"The {texts[right]} is what is meant."
    choices = {"label": list("ABC"), "text": texts}
    return {"id": f"c{number}", "question": "What is meant?", "choices": choices, "answerKey": "ABC"[right], "rationale": rationale}


ROWS: dict[str, Callable[[random.Random, int], Row]] = {f"glue_{task}": partial(glue_row, task) for task in GLUE}
ROWS |= {"swag": swag_row, "hellaswag": hellaswag_row}
ROWS |= {"alpaca": alpaca_row, "flan_cot": flan_row, "strategy_qa": strategy_row, "commonsense_qa": commonsense_row}


def rows_of(name: str, split: str) -> list[Row]:
    """The same rows every time."""
    dice = random.Random(f"{name} {split}")
    return [ROWS[name](dice, number) for number in range(TRAIN if split == "train" else VALIDATION)]


def lines_of(split: str) -> list[str]:
    """Text as of WikiText: titles, empty lines, paragraphs, each with its line end."""
    dice = random.Random(f"text {split}")
    paragraphs = [[f" = {dice.choice(NOUNS)} = \n", " \n", f" {sentence(dice, True)} . {sentence(dice, False)} .\n"] for _ in range(16)]
    return [line for part in paragraphs[: None if split == "train" else 6] for line in part]


def write_lines(path: Path, rows: Sequence[Row]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


def write_data(folder: Path) -> Path:
    """Write every data set into a folder as WHENCE_DATA names it."""
    for split in ("train", "validation"):
        for name in ROWS:
            write_lines(folder / name / f"{split}.jsonl", rows_of(name, split))
        (folder / "wikitext2").mkdir(exist_ok=True)
        (folder / "wikitext2" / f"{split}.txt").write_text("".join(lines_of(split)), encoding="utf-8")
    return folder


# Name of a checkpoint -> recipe and settings; all of them one epoch of the tiny preset.
SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "sst2": ("glue", {"task": "sst2", "max_length": 16, "flip": 0.25}),
    "rte": ("glue", {"task": "rte", "max_length": 32}),
    "stsb": ("glue", {"task": "stsb", "max_length": 32}),
    "swag": ("swag", {"max_length": 32}),
    "wikitext": ("wikitext", {"max_length": 16}),
    "alpaca": ("instruct", {"max_length": 48}),
    "flan": ("instruct", {"task": "flan_cot", "max_length": 48}),
    "strategy": ("cot", {"max_length": 48}),
    "commonsense": ("cot", {"task": "commonsense_qa", "max_length": 64}),
}


# Those of them that the command line is tried on, and options of whence train for another.
NAMES = {"sst2": "glue", "swag": "swag", "wikitext": "wikitext"}
TINY = ("--preset", "tiny", "--num-train-epochs", "1", "--train-batch-size", "8")


@dataclass(frozen=True, kw_only=True)
class Place:
    """Folders of data, trained models, and runs that are fitted and scored."""

    data: Path
    models: Path
    runs: Path

    def options(self, name: str) -> list[str]:
        """Return the options of a verb on one of the models; the last is the run folder."""
        return [NAMES[name], "--checkpoint-dir", str(self.models / name), "--run-dir", str(self.runs / name)]


def trained(name: str, data: Path | str, folder: Path, *, snapshots: int = 2, settings: Row | None = None, **training: Any) -> Recipe:
    """Train a tiny model of `SETTINGS`; `settings` and `training` go before its own."""
    recipe, usual = SETTINGS[name]
    options: dict[str, Any] = {"preset": "tiny", "num_train_epochs": 1, "train_batch_size": 8} | training
    return train_recipe(
        FAMILIES[recipe],
        folder,
        data=DataSettings(**{"data": str(data), **usual, **(settings or {})}),
        training=TrainingSettings(**options),
        snapshots=snapshots,
    )


Checkpoint = Callable[[str], Path]


def opened(name: str, folder: Path, **options: Any) -> Recipe:
    return load_recipe(SETTINGS[name][0], checkpoint_dir=folder, **options)


def weights(folder: Path) -> dict[str, Tensor]:
    return safetensors.torch.load_file(folder / "model.safetensors")


def differing(first: dict[str, Tensor], second: dict[str, Tensor]) -> set[str]:
    assert first.keys() == second.keys()
    return {name for name in first if not torch.equal(first[name], second[name])}


def measured(recipe: Recipe) -> Tensor:
    assert recipe.collate is not None
    return measure(recipe.model, recipe.task, recipe.queries, recipe.collate, 32)


def procedure_of(recipe: Recipe) -> Retraining:
    assert isinstance(recipe.retraining, Retraining)
    return recipe.retraining


def edit(file: Path, old: str, new: str) -> None:
    text = file.read_text(encoding="utf-8")
    assert old in text
    file.write_text(text.replace(old, new, 1), encoding="utf-8")


def started(recipe: str, **data: Any) -> tuple[Any, Any, Split, Split, DataSettings]:
    """Return an untrained model, its tokenizer, training rows, queries and the settings."""
    family = FAMILIES[recipe]
    settled = family.settled(DataSettings(**data))
    model, tokenizer = make_start(family, read_train(family, settled), settled, TrainingSettings(preset="tiny"))
    train, queries = read_splits(family, settled, tokenizer, model.config, seed=1)
    return model.eval(), tokenizer, train, queries, settled


def measured_rows(recipe: str, model: Any, tokenizer: Any, rows: list[Any], settled: DataSettings) -> Tensor:
    family = FAMILIES[recipe]
    return measure(model, task_of(family, settled), rows, collate_of(family, model, tokenizer), 4)


def own(folder: Path, train: list[Any], validation: list[Any]) -> str:
    write_lines(folder / "train.jsonl", train)
    write_lines(folder / "validation.jsonl", validation)
    return str(folder)


def offline_and_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no test reach for the network, or look for another's data; and do not sweep memory after every tiny training."""
    constants = importlib.import_module("huggingface_hub.constants")
    monkeypatch.delenv("WHENCE_DATA", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # the hub's client reads the variable once, at import
    # With all of a test session in memory, this takes longer than the training.
    monkeypatch.setattr("accelerate.utils.memory.gc", SimpleNamespace(collect=lambda: 0))
