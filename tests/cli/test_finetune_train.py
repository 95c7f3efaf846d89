"""The verb train: what it prints, writes and refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import finetuned
from commands import done, refused
from finetuned import NAMES, TINY, Place
from whence.recipes.base import load_recipe

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("datasets")
pytestmark = pytest.mark.usefixtures("offline_and_quick")


@pytest.mark.parametrize("name", NAMES)
def test_train_saves_a_model_and_says_how_good_it_is(run: Any, here: Path, place: Place, name: str) -> None:
    options = ["train", NAMES[name], "--data", place.data, *TINY, "--max-length", 16, "--checkpoint-dir", "ck", "--snapshots", 2]
    result = done(run, *options, "--json")
    found = load_recipe(NAMES[name], checkpoint_dir=here / "ck")
    assert result.data["recipe"] == found.name
    assert result.data["checkpoint_dir"] == "ck"
    assert result.data["train"] == len(found.train)
    assert result.data["queries"] == len(found.queries)
    assert ("perplexity" if name == "wikitext" else "accuracy") in result.data
    assert len(found.snapshots) == 2
    assert "Train" in result.err
    message = refused(run, *options)
    assert "ck is not empty. Give a new folder as --checkpoint-dir, or --overwrite to replace" in message
    text = done(run, *options, "--overwrite").out
    assert [line.split()[0] for line in text.splitlines()][:2] == ["recipe", "checkpoint"]


def test_train_takes_all_its_options(run: Any, here: Path, place: Place) -> None:
    (here / "options.yaml").write_text("preset: tiny\nnum-train-epochs: 1\nfreeze: ['*embeddings*']\nflip: 0.25\n", encoding="utf-8")
    options = ["--learning-rate", "1e-3", "--weight-decay", 0, "--dropout", 0, "--seed", 3, "--lr-scheduler-type", "cosine"]
    options += ["--max-train-rows", 16, "--max-query-rows", 4, "--measurement", "loss", "--warmup-ratio", 0.1, "--eval-batch-size", 2]
    result = done(run, "train", "glue", "--task", "rte", "--data", place.data, "--config", "options.yaml", *options, "--json")
    assert result.data["checkpoint_dir"] == "checkpoints/glue"
    assert (result.data["train"], result.data["queries"]) == (16, 4)
    record = json.loads((here / "checkpoints/glue/whence.json").read_text(encoding="utf-8"))
    training = {"learning_rate": 1e-3, "weight_decay": 0, "dropout": 0, "seed": 3, "lr_scheduler_type": "cosine", "warmup_ratio": 0.1}
    assert training.items() <= record["training"].items()
    assert record["training"]["freeze"] == ["*embeddings*"]
    expected = {"task": "rte", "flip": 0.25, "measurement": "loss", "max_train_rows": 16}
    assert expected.items() <= record["data"].items()
    found = load_recipe("glue", checkpoint_dir=here / "checkpoints/glue")
    assert found.flipped is not None
    assert found.flipped.sum() == 4


def test_train_several_runs_of_adapters(run: Any, here: Path, place: Place) -> None:
    pytest.importorskip("peft")
    options = ["--data", place.data, "--max-length", 48, *TINY, "--lora-rank", 2, "--lora-targets", "q,v", "--snapshots", 1]
    options += ["--task", "strategy_qa", "--group", "answer", "--architecture", "t5"]
    result = done(run, "train", "cot", *options, "--runs", 2, "--json")
    folders = [f"checkpoints/cot/run-{number}" for number in range(2)]
    assert [one["checkpoint_dir"] for one in result.data["runs"]] == folders
    assert result.data["checkpoint_dir"] == "checkpoints/cot"
    for one, folder in zip(result.data["runs"], folders, strict=True):
        assert 0 <= one["option_accuracy"] <= 1
        found = load_recipe("cot", checkpoint_dir=here / folder)
        assert found.name == one["recipe"]
        assert set(found.groups or ()) == {"True", "False"}
        names = {name.split(".lora_")[0].rpartition(".")[2] for name, p in found.model.named_parameters() if p.requires_grad}
        assert names == {"q", "v"}
    text = done(run, "train", "cot", *options, "--runs", 2).out
    assert text.count("checkpoint dir") == 2, "what has ended is kept"
    assert "Give lora_rank too." in refused(run, "train", "cot", "--data", place.data, "--preset", "tiny", "--lora-alpha", 4)


def test_train_on_data_of_ones_own(run: Any, here: Path) -> None:
    for split, count in (("train", 12), ("validation", 4)):
        rows = [{"words": f"word {n}", "more": "again", "kind": ["ash", "oak", "elm"][n % 3]} for n in range(count)]
        finetuned.write_lines(here / "own" / f"{split}.jsonl", rows)
    options = ["--data", "own", "--columns", "words,more", "--label", "kind", "--checkpoint-dir", "ck"]
    assert done(run, "train", "glue", *options, *TINY, "--json").data["train"] == 12
    found = load_recipe("glue", checkpoint_dir=here / "ck")
    assert found.describe is not None
    assert found.describe(found.train[1]) == "words: word 1\nmore: again\nkind: 2 (oak)"
    done(run, "fit", "glue", "--checkpoint-dir", "ck", "--strategy", "diagonal")


def test_the_hub_out_of_reach(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    message = refused(run, "train", "swag", "--preset", "tiny")
    assert "the data set 'allenai/swag' cannot be had from the Hugging Face hub" in message
    assert "--data FOLDER (or WHENCE_DATA)" in message


def test_a_model_out_of_reach(run: Any, place: Place) -> None:
    message = refused(run, "train", "glue", "--data", place.data, "--max-train-rows", 4)
    assert "the model 'google-bert/bert-base-cased' cannot be loaded" in message
    assert "--preset small" in message
