"""Folders of Hugging Face and Trainers: model, task and collate function are those that were saved or trained with."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import whence
from compare import assert_close
from whence.errors import ConfigError, DataError
from whence.pretrained import open_pretrained, open_trainer
from whence.tasks import CausalLM, SequenceClassification

pytest.importorskip("transformers")
import transformers

from case_hugging_face import BY_NAME, CASES, PAD, HFCase, tokenizer


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reaches for the network; the hub's client reads the variable once, at import."""
    from huggingface_hub import constants

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


# ---------------------------------------------------------------------------------------------- folders


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_folder_gives_model_task_and_collator(case: HFCase, tmp_path: Path) -> None:
    model, task, collate = open_pretrained(case.save(tmp_path))
    assert type(model).__name__ == case.model
    assert type(task) is case.task
    assert not model.training
    assert next(model.parameters()).dtype == torch.float32
    built = case.build()
    wanted = task.loss(built, case.collator(built)(case.rows()))
    assert_close(task.loss(model, collate(case.rows())), wanted, case.name)


def test_scores_from_a_folder(tmp_path: Path) -> None:
    case = BY_NAME["distilbert"]
    model, task, collate = open_pretrained(str(case.save(tmp_path)))
    attributor = whence.Attributor(model, task, collate=collate, progress=False).fit(case.rows(), strategy="kfac")
    scores = attributor.scores(case.rows()[:2], case.rows())
    assert scores.values.shape == (2, len(case.rows()))
    assert torch.isfinite(scores.values).all()


def test_the_checkpoints_type_is_kept(tmp_path: Path) -> None:
    BY_NAME["llama"].build().bfloat16().save_pretrained(tmp_path)
    assert next(open_pretrained(tmp_path)[0].parameters()).dtype == torch.bfloat16


def test_another_task_may_be_given(tmp_path: Path) -> None:
    own = SequenceClassification(measurement="margin")
    assert open_pretrained(BY_NAME["bert"].save(tmp_path / "a"), task=own)[1] is own
    config = transformers.BertConfig(**BY_NAME["bert"].options)
    transformers.BertForMaskedLM(config).save_pretrained(tmp_path / "b")
    model, task, _ = open_pretrained(tmp_path / "b", task=own)
    assert (type(model).__name__, task) == ("BertForMaskedLM", own)


def test_a_decoder_that_classifies_learns_the_padding_token_of_its_tokenizer(tmp_path: Path) -> None:
    case = BY_NAME["gpt2 classes"]
    case.save(tmp_path)
    edit(tmp_path / "config.json", pad_token_id=None)
    model, task, collate = open_pretrained(tmp_path)
    assert model.config.pad_token_id == PAD
    built = case.build()
    assert_close(task.loss(model, collate(case.rows())), task.loss(built, case.collator(built)(case.rows())), "loss")
    edit(tmp_path / "tokenizer_config.json", pad_token=None)
    with pytest.raises(
        ConfigError, match=r"neither the tokenizer nor the configuration of GPT2ForSequenceClassification names a padding token"
    ):
        open_pretrained(tmp_path)


def edit(path: Path, **fields: Any) -> None:
    held = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({key: value for key, value in (held | fields).items() if value is not None}), encoding="utf-8")


# ---------------------------------------------------------------------------------------------- collating


def collator(tmp_path: Path, name: str, **options: Any) -> Any:
    return open_pretrained(BY_NAME[name].save(tmp_path, **options))[2]


def test_rows_are_padded_on_the_right_and_other_columns_dropped(tmp_path: Path) -> None:
    rows = [{"input_ids": [3, 4, 5], "token_type_ids": [0, 0, 1], "label": 2, "text": "c d e"}]
    rows.append({"input_ids": torch.tensor([6]), "token_type_ids": torch.tensor([1]), "label": 0, "text": "f"})
    batch = collator(tmp_path, "bert")(rows)
    assert {key: value.tolist() for key, value in batch.items()} == {
        "input_ids": [[3, 4, 5], [6, PAD, PAD]],
        "attention_mask": [[1, 1, 1], [1, 0, 0]],
        "token_type_ids": [[0, 0, 1], [1, 0, 0]],
        "labels": [2, 0],
    }
    assert batch["labels"].dtype == torch.int64


def test_labels_of_language_models(tmp_path: Path) -> None:
    collate = collator(tmp_path, "gpt2")
    batch = collate([{"input_ids": [3, 4, 2]}, {"input_ids": [5, 6]}])
    assert batch["labels"].tolist() == [[3, 4, 2], [5, 6, -100]]
    batch = collate([{"input_ids": [3, 4, PAD], "attention_mask": [1, 1, 0]}, {"input_ids": [5, 6]}])
    assert batch["labels"].tolist() == [[3, 4, -100], [5, 6, -100]]
    batch = collate([{"input_ids": [3, 4, 2], "labels": [-100, 4, 2]}, {"input_ids": [5], "labels": [5]}])
    assert batch["labels"].tolist() == [[-100, 4, 2], [5, -100, -100]]


def test_targets_have_a_length_of_their_own(tmp_path: Path) -> None:
    batch = collator(tmp_path, "t5")([{"input_ids": [3, 2], "labels": [4, 5, 2]}, {"input_ids": [6, 7, 8, 2], "labels": [2]}])
    assert batch["input_ids"].shape == (2, 4)
    assert batch["labels"].tolist() == [[4, 5, 2], [2, -100, -100]]


def test_choices_are_padded_alike(tmp_path: Path) -> None:
    batch = collator(tmp_path, "roberta")([{"input_ids": [[3], [4, 5]], "label": 1}, {"input_ids": [[6, 7, 8], [9]], "label": 0}])
    assert batch["input_ids"].tolist() == [[[3, 0, 0], [4, 5, 0]], [[6, 7, 8], [9, 0, 0]]]
    assert batch["attention_mask"].tolist() == [[[1, 0, 0], [1, 1, 0]], [[1, 1, 1], [1, 0, 0]]]
    assert batch["labels"].tolist() == [1, 0]


@pytest.mark.parametrize(
    ("name", "rows", "message"),
    [
        (
            "bert",
            [{"text": "words", "label": 1}],
            r"columns \['label', 'labels', 'text'\], none of which BertForSequenceClassification takes",
        ),
        ("bert", [([3], 1)], r"a row is a tuple. Give rows as dicts"),
        ("bert", [{"input_ids": [3], "label": 1}, {"input_ids": [3]}], r"one row has the columns .*'labels'.*Give all rows the same"),
        ("bert", [{"input_ids": [3], "labels": [1.0]}, {"input_ids": [3], "labels": [1.0, 0.0]}], r"column 'labels' has rows of different"),
        ("bert", [{"input_ids": ["a"], "label": 1}], r"column 'input_ids' holds \['a'\], which is no array of numbers"),
        ("roberta", [{"input_ids": [[3]] * 2}, {"input_ids": [[3]] * 3}], r"column 'input_ids' has rows of 2 and of 3 choices"),
        (
            "vit",
            [{"pixel_values": torch.zeros(3, 8, 8)}, {"pixel_values": torch.zeros(3, 8, 4)}],
            r"\(3, 8, 4\), \(3, 8, 8\). Bring all rows",
        ),
    ],
)
def test_rows_that_are_no_batch(tmp_path: Path, name: str, rows: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        collator(tmp_path, name)(rows)


def test_without_a_tokenizer_rows_must_be_of_one_length(tmp_path: Path) -> None:
    collate = collator(tmp_path, "bert", with_tokenizer=False)
    assert collate([{"input_ids": [3, 4]}, {"input_ids": [5, 6]}])["input_ids"].shape == (2, 2)
    with pytest.raises(DataError, match=r"\(1,\), \(2,\). There is no tokenizer beside the model.*tokenizer.save_pretrained"):
        collate([{"input_ids": [3, 4]}, {"input_ids": [5]}])


# ---------------------------------------------------------------------------------------------- adapters


def adapted(model: nn.Module, **options: Any) -> Any:
    peft = pytest.importorskip("peft")
    torch.manual_seed(4)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.* is deprecated", category=FutureWarning)
        return peft.get_peft_model(model, peft.LoraConfig(r=2, init_lora_weights=False, **options))


def test_an_adapter_is_loaded_onto_its_base(tmp_path: Path) -> None:
    case = BY_NAME["llama"]
    case.save(tmp_path / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    trained = adapted(base, task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"]).eval()
    trained.save_pretrained(tmp_path / "adapter")
    model, task, collate = open_pretrained(tmp_path / "adapter")
    assert type(task) is CausalLM
    assert not model.training
    rows = case.rows()
    assert_close(task.loss(model, collate(rows)), task.loss(trained, collate(rows)), "adapter")
    attributor = whence.Attributor(model, task, collate=collate, progress=False).fit(rows, strategy="ekfac", batch_size=3)
    assert attributor.coverage.share == 1.0
    assert all("lora_" in name for name in attributor.coverage.tracked)
    assert attributor.self_influence(rows).min() >= 0


def test_the_classes_of_an_adapter_are_those_of_its_head(tmp_path: Path) -> None:
    """The base is a masked language model; head and number of classes are in the adapter alone."""
    config = transformers.BertConfig(**BY_NAME["bert"].options)
    transformers.BertForMaskedLM(config).save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "adapter")
    # The base has no pooler, which a classifier then has at random: it is trained and saved with the head.
    base = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=5)
    trained = adapted(base, task_type="SEQ_CLS", target_modules=["query"], modules_to_save=["pooler"]).eval()
    trained.save_pretrained(tmp_path / "adapter")
    model, task, collate = open_pretrained(tmp_path / "adapter")
    rows = BY_NAME["bert"].rows()
    logits = model(**collate(rows)).logits
    assert logits.shape == (len(rows), 5)
    assert_close(logits, trained(**collate(rows)).logits, "logits")
    assert type(task) is SequenceClassification


def test_an_adapter_without_a_head_on_a_base_without_one_is_refused(tmp_path: Path) -> None:
    config = transformers.BertConfig(**BY_NAME["bert"].options)
    transformers.BertForMaskedLM(config).save_pretrained(tmp_path / "base")
    base = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=5)
    adapted(base, task_type="SEQ_CLS", target_modules=["query"]).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ConfigError, match=r"lacks weights of BertForSequenceClassification: bert.pooler.*They would be random"):
        open_pretrained(tmp_path / "adapter")


def test_an_adapter_whose_base_is_gone(tmp_path: Path) -> None:
    case = BY_NAME["llama"]
    base = transformers.AutoModelForCausalLM.from_pretrained(case.save(tmp_path / "base"))
    adapted(base, task_type="CAUSAL_LM", target_modules=["q_proj"]).save_pretrained(tmp_path / "adapter")
    edit(tmp_path / "adapter" / "adapter_config.json", base_model_name_or_path=str(tmp_path / "elsewhere"))
    with pytest.raises(ConfigError, match=r"there is no folder '.*elsewhere'"):
        open_pretrained(tmp_path / "adapter")
    edit(tmp_path / "adapter" / "adapter_config.json", base_model_name_or_path="")
    with pytest.raises(ConfigError, match=r"does not name its base model. Set base_model_name_or_path"):
        open_pretrained(tmp_path / "adapter")


# ---------------------------------------------------------------------------------------------- what cannot be opened


def test_folders_that_cannot_be_opened(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"there is no folder '.*missing'. Give a folder written by save_pretrained, or a name"):
        open_pretrained(tmp_path / "missing")
    with pytest.raises(ConfigError, match=r"there is no folder './missing'"):
        open_pretrained("./missing")
    with pytest.raises(ConfigError, match=r"the folder '.*empty' has neither config.json nor adapter_config.json"):
        open_pretrained(tmp_path / "empty")
    with pytest.raises(ConfigError, match=r"'.*file' is a file. Give the folder that holds it"):
        open_pretrained(tmp_path / "file")


def test_configurations_that_cannot_be_used(tmp_path: Path) -> None:
    BY_NAME["bert"].save(tmp_path)
    edit(tmp_path / "config.json", architectures=["BertForMaskedLM"])
    with pytest.raises(
        ConfigError, match=r"is a BertForMaskedLM, for which whence has no ready task \(those it has: SequenceClassification, "
    ):
        open_pretrained(tmp_path)
    edit(tmp_path / "config.json", architectures=["NobodysModel"])
    with pytest.raises(ConfigError, match=r"is a NobodysModel"):
        open_pretrained(tmp_path, task=CausalLM())
    edit(tmp_path / "config.json", architectures=None)
    with pytest.raises(ConfigError, match=r"does not say which class the model is \('architectures' is missing\)"):
        open_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"the model in '.*' cannot be loaded: .*Save it again with save_pretrained"):
        open_pretrained(tmp_path)


def test_weights_that_are_missing_are_not_made_up(tmp_path: Path) -> None:
    BY_NAME["bert"].save(tmp_path)
    edit(tmp_path / "config.json", architectures=["BertForTokenClassification"], num_hidden_layers=3)
    with pytest.raises(ConfigError, match=r"lacks weights of BertForTokenClassification: bert.encoder.layer.2.* and 12 more"):
        open_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ConfigError, match=r"the model in '.*' cannot be loaded: .*Save it again"):
        open_pretrained(tmp_path)
    weights.unlink()
    with pytest.raises(ConfigError, match=r"the model in '.*' cannot be loaded: .*model.safetensors"):
        open_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["nobody/nothing-at-all", "nothing-at-all"])
def test_a_name_that_the_hub_does_not_give(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"'{name}' is no folder here, and the Hugging Face hub did not give it: .*HF_HUB_OFFLINE"):
        open_pretrained(name)


@pytest.mark.parametrize("missing", ["transformers", "peft"])
def test_an_extra_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    BY_NAME["bert"].save(tmp_path)
    if missing == "peft":
        (tmp_path / "adapter_config.json").write_text("{}", encoding="utf-8")
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ConfigError, match=rf'Hugging Face models need {missing}, which is not installed.*pip install "whence\[hf\]"'):
        open_pretrained(tmp_path)


# ---------------------------------------------------------------------------------------------- trainers


def trainer_of(model: nn.Module, tmp_path: Path, *, smoothing: float = 0.0, **options: Any) -> Any:
    pytest.importorskip("accelerate")
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        report_to=[],
        use_cpu=True,
        max_steps=1,
        disable_tqdm=True,
        save_strategy="no",
        label_smoothing_factor=smoothing,
    )
    return transformers.Trainer(model=model, args=arguments, **options)


def test_a_trainer_gives_what_it_was_trained_with(tmp_path: Path) -> None:
    case = BY_NAME["bert"]
    rows = [row | {"text": "dropped"} for row in case.rows()]
    collate = transformers.DataCollatorWithPadding(tokenizer())
    trainer = trainer_of(case.build(), tmp_path, data_collator=collate, train_dataset=rows)
    trainer.train()
    model, task, collate = open_trainer(trainer)
    assert model is trainer.model
    assert type(task) is SequenceClassification
    model.eval()  # the Trainer leaves it in training mode; an Attributor would see to it
    batch = collate(rows)
    assert "text" not in batch
    assert_close(task.loss(model, batch), task.loss(model, case.collator(model)(rows)), "loss")
    attributor = whence.Attributor(model, task, collate=collate, progress=False).fit(rows, strategy="diagonal")
    assert torch.isfinite(attributor.self_influence(rows)).all()


def test_a_trainers_adapters_and_wrappers(tmp_path: Path) -> None:
    model = adapted(BY_NAME["llama"].build(), task_type="CAUSAL_LM", target_modules=["q_proj"])
    trainer = trainer_of(model, tmp_path)
    trainer.model = nn.DataParallel(model)
    opened, task, _ = open_trainer(trainer)
    assert opened is model
    assert type(task) is CausalLM


class BertForSequenceClassification(transformers.BertForSequenceClassification):  # type: ignore[misc]
    """Labels under another name."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, label_of_row: Tensor | None = None) -> Any:
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, labels=label_of_row)


def test_a_trainers_labels_keep_their_name(tmp_path: Path) -> None:
    model = BertForSequenceClassification(transformers.BertConfig(**BY_NAME["bert"].options))
    _, task, collate = open_trainer(trainer_of(model.eval(), tmp_path))
    row = {"input_ids": [3, 4], "label_of_row": 1, "text": "dropped"}
    assert set(collate([row])) == {"input_ids", "label_of_row"}
    assert_close(task.loss(model, collate([row])), model(**collate([row])).loss[None], "loss")


def test_trainers_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"open_trainer takes a transformers.Trainer, not a str: it has no model and no data_collator"):
        open_trainer("trainer")
    model = BY_NAME["bert"].build()
    with pytest.raises(ConfigError, match=r"given label_smoothing_factor=0.1, but SequenceClassification explains the plain loss"):
        open_trainer(trainer_of(model, tmp_path, smoothing=0.1))
    with pytest.raises(ConfigError, match=r"a loss function of its own \(compute_loss_func\)"):
        open_trainer(trainer_of(model, tmp_path, compute_loss_func=lambda *args, **kwargs: None))
    own = SequenceClassification()
    assert open_trainer(trainer_of(model, tmp_path, smoothing=0.1), task=own)[1] is own
    options = {key: value for key, value in BY_NAME["bert"].options.items() if key != "num_labels"}
    masked = transformers.BertForMaskedLM(transformers.BertConfig(**options))
    with pytest.raises(ConfigError, match=r"the Trainer's model is a BertForMaskedLM, for which whence has no ready task"):
        open_trainer(trainer_of(masked, tmp_path))
    answers = transformers.BertForQuestionAnswering(transformers.BertConfig(**options))
    with pytest.raises(ConfigError, match=r"several kinds of labels \(start_positions, end_positions\)"):
        open_trainer(trainer_of(answers, tmp_path))
