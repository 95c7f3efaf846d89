"""From a folder or a Trainer to scores in one call each, against autograd on the same model."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import whence
from compare import assert_close
from whence.errors import ConfigError, LayerError
from whence.tasks import CausalLM, SequenceClassification

pytest.importorskip("transformers")
import transformers

from case_hugging_face import BY_NAME, HFCase, tokenizer


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reaches for the network; the hub's client reads the variable once, at import."""
    from huggingface_hub import constants

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


OPTIONS: dict[str, Any] = {"device": "cpu", "progress": False}


def products(model: nn.Module, collate: Callable, loss: Callable, queries: list, train: list, parameters: list) -> Tensor:
    """Return gradient products of losses `[query, train]`, a row at a time by autograd, in float64."""

    def gradients(rows: list) -> Tensor:
        found = []
        for row in rows:
            value = loss(model(**{k: v for k, v in collate([row]).items() if k != "labels"}), collate([row])["labels"])
            parts = torch.autograd.grad(value, parameters, allow_unused=True, materialize_grads=True)
            found.append(torch.cat([part.flatten() for part in parts]).double())
        return torch.stack(found)

    model.eval()
    return gradients(queries) @ gradients(train).T


def of_class(output: Any, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(output.logits, labels)


def of_tokens(output: Any, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(output.logits[0, :-1], labels[0, 1:], reduction="sum")


def tracked_parameters(attributor: whence.Attributor) -> list[nn.Parameter]:
    """Return the parameters of the modules that are tracked."""
    names = attributor.coverage.tracked
    return [p for name, p in attributor.model.named_parameters() if name.rpartition(".")[0] in names and p.requires_grad]


# ---------------------------------------------------------------------------------------------- folders


@pytest.mark.parametrize(
    ("name", "loss"), [("bert", of_class), ("gpt2 classes", of_class), ("gpt2", of_tokens), ("llama", of_tokens), ("qwen2", of_tokens)]
)
def test_a_folder_gives_scores(tmp_path: Path, name: str, loss: Callable) -> None:
    case = BY_NAME[name]
    rows = case.rows()
    attributor = whence.Attributor.from_pretrained(case.save(tmp_path), **OPTIONS)
    scores = attributor.scores(rows[:3], rows, strategy="identity", batch_size=5)
    expected = products(attributor.model, attributor.collate, loss, rows[:3], rows, tracked_parameters(attributor))
    assert_close(scores.values, expected, name, rtol=1e-3, atol_of_largest=1e-4)


def test_a_folder_is_fitted_and_kept_in_a_run_folder(tmp_path: Path) -> None:
    case = BY_NAME["bert"]
    rows, folder = case.rows(), case.save(tmp_path / "model")
    first = whence.Attributor.from_pretrained(folder, run_dir=tmp_path / "run", **OPTIONS).fit(rows).scores(rows[:2], rows)
    again = whence.Attributor.from_pretrained(str(folder), run_dir=tmp_path / "run", **OPTIONS).scores(rows[:2], rows)
    assert torch.equal(first.values, again.values)
    assert first.top(0, 3) == again.top(0, 3)


def test_rows_from_text(tmp_path: Path) -> None:
    """As a user has them: text through the tokenizer that lies beside the model, labels as numbers."""
    case = BY_NAME["bert"]
    folder = case.save(tmp_path)
    words = transformers.AutoTokenizer.from_pretrained(folder)
    texts = ["w3 w4 w5", "w9", "w7 w8 w3 w3 w10", "w4 w4"]
    rows = [{**words(text), "label": number % 3, "text": text} for number, text in enumerate(texts)]
    attributor = whence.Attributor.from_pretrained(folder, **OPTIONS)
    together = attributor.scores(rows, rows, strategy="identity", batch_size=4)
    alone = attributor.scores(rows, rows, strategy="identity", batch_size=1, query_batch_size=1, overwrite=True)
    assert_close(together.values, alone.values, "padding", rtol=1e-3, atol_of_largest=1e-4)


def test_options_and_task_reach_the_class(tmp_path: Path) -> None:
    case = BY_NAME["bert"]
    task = SequenceClassification(measurement="margin")
    attributor = whence.Attributor.from_pretrained(case.save(tmp_path), task=task, layers=["classifier"], seed=3, **OPTIONS)
    assert attributor.task is task
    assert set(attributor.coverage.tracked) == {"classifier"}
    assert attributor.seed == 3
    seen = []

    def collate(rows: list) -> Any:
        seen.append(len(rows))
        return case.collator(attributor.model)(rows)

    own = whence.Attributor.from_pretrained(tmp_path, collate=collate, **OPTIONS)
    own.self_influence(case.rows(), strategy="identity", batch_size=5)
    assert max(seen) == 5
    with pytest.raises(ConfigError, match=r"there is no folder '.*nowhere'"):
        whence.Attributor.from_pretrained(tmp_path / "nowhere")


def adapter(case: HFCase, base: Path, folder: Path, **options: Any) -> None:
    peft = pytest.importorskip("peft")
    loaded = getattr(transformers, case.model).from_pretrained(base)
    torch.manual_seed(4)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.* is deprecated", category=FutureWarning)
        peft.get_peft_model(loaded, peft.LoraConfig(r=2, init_lora_weights=False, **options)).save_pretrained(folder)


@pytest.mark.parametrize(
    ("name", "loss", "options"),
    [
        ("llama", of_tokens, {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj"]}),
        ("bert", of_class, {"task_type": "SEQ_CLS", "target_modules": ["query"]}),
    ],
)
def test_an_adapter_folder_gives_scores_of_the_adapter(tmp_path: Path, name: str, loss: Callable, options: dict[str, Any]) -> None:
    case = BY_NAME[name]
    adapter(case, case.save(tmp_path / "base"), tmp_path / "adapter", **options)
    rows = case.rows()
    attributor = whence.Attributor.from_pretrained(tmp_path / "adapter", **OPTIONS)
    scores = attributor.scores(rows[:3], rows, strategy="identity")
    trained = [p for p in attributor.model.parameters() if p.requires_grad]
    assert_close(
        scores.values, products(attributor.model, attributor.collate, loss, rows[:3], rows, trained), name, rtol=1e-3, atol_of_largest=1e-4
    )
    assert attributor.coverage.share == 1.0
    assert any("lora_A" in layer for layer in attributor.coverage.tracked)


# ---------------------------------------------------------------------------------------------- trainers


class Rates(transformers.TrainerCallback):  # type: ignore[misc]
    """Keeps the learning rate of every step that the optimizer takes."""

    def __init__(self) -> None:
        self.rates: list[float] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        self.rates.append(optimizer.param_groups[0]["lr"])


def trainer_of(case: HFCase, folder: Path, **options: Any) -> tuple[Any, Rates]:
    pytest.importorskip("accelerate")
    rates = Rates()
    arguments = {"max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-3, **options}
    trainer = transformers.Trainer(
        model=case.build(),
        args=transformers.TrainingArguments(
            output_dir=str(folder), report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no", logging_steps=1, **arguments
        ),
        data_collator=transformers.DataCollatorWithPadding(tokenizer()),
        train_dataset=case.rows(),
        eval_dataset=case.rows(),
        callbacks=[rates],
    )
    return trainer, rates


def test_a_trainer_gives_scores_of_its_run(tmp_path: Path) -> None:
    case = BY_NAME["bert"]
    trainer, rates = trainer_of(case, tmp_path)
    trainer.train()
    rows = trainer.train_dataset
    attributor = whence.Attributor.from_trainer(trainer, **OPTIONS)
    assert attributor.model is trainer.model
    time = sum(rates.rates)
    assert len(rates.rates) == 2
    assert attributor.training_time == pytest.approx(time, rel=1e-12)
    plain = attributor.scores(rows[:3], rows, strategy="identity").values
    expected = products(attributor.model, attributor.collate, of_class, rows[:3], rows, tracked_parameters(attributor))
    assert_close(plain, expected, "scores", rtol=1e-3, atol_of_largest=1e-4)
    unrolled = attributor.fit(rows).scores(rows[:3], rows, response="unrolled").values
    named = attributor.scores(rows[:3], rows, response=whence.Unrolled(time=time), overwrite=True).values
    assert_close(unrolled, named, "unrolled", rtol=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"max_steps": 7, "lr_scheduler_type": "linear", "warmup_steps": 3},
        {"max_steps": 7, "lr_scheduler_type": "cosine", "warmup_steps": 2},
        {"max_steps": 5, "lr_scheduler_type": "constant"},
        {"max_steps": 6, "lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"power": 2.0}},
        {"max_steps": -1, "num_train_epochs": 2, "gradient_accumulation_steps": 3},
        {"max_steps": 5, "weight_decay": 0.1, "optim": "adamw_torch"},
    ],
    ids=str,
)
def test_the_length_of_training_is_the_sum_of_its_learning_rates(tmp_path: Path, options: dict[str, Any]) -> None:
    trainer, rates = trainer_of(BY_NAME["bert"], tmp_path, **options)
    trainer.train()
    assert len(rates.rates) == trainer.state.global_step > 2
    assert whence.Attributor.from_trainer(trainer, **OPTIONS).training_time == pytest.approx(sum(rates.rates), rel=1e-9)


class Stop(transformers.TrainerCallback):  # type: ignore[misc]
    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = state.global_step >= 3


def test_a_run_that_was_stopped_early(tmp_path: Path) -> None:
    """Only the steps that were taken count, by the schedule of the run that was planned."""
    trainer, rates = trainer_of(BY_NAME["bert"], tmp_path, max_steps=20)
    trainer.add_callback(Stop())
    trainer.train()
    assert len(rates.rates) == 3
    assert whence.Attributor.from_trainer(trainer, **OPTIONS).training_time == pytest.approx(sum(rates.rates), rel=1e-9)


def test_an_optimizer_and_a_schedule_of_ones_own(tmp_path: Path) -> None:
    """The Trainer then does not ask its arguments, and neither may the length of training: it is the sum that was really taken."""
    trainer, rates = trainer_of(BY_NAME["bert"], tmp_path, max_steps=4)
    optimizer = torch.optim.SGD(trainer.model.parameters(), lr=0.5)
    trainer.optimizer, trainer.lr_scheduler = optimizer, torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.1)
    trainer.train()
    assert rates.rates == pytest.approx([0.5, 0.5, 0.05, 0.05])
    found = whence.Attributor.from_trainer(trainer, **OPTIONS).training_time
    assert found is None or found == pytest.approx(sum(rates.rates), rel=1e-6)


def test_a_schedule_that_waits_for_the_evaluation(tmp_path: Path) -> None:
    """What rates it chose cannot be told from the arguments; the Trainer is opened all the same."""
    trainer, rates = trainer_of(BY_NAME["bert"], tmp_path, max_steps=3, lr_scheduler_type="reduce_lr_on_plateau", eval_strategy="epoch")
    trainer.train()
    found = whence.Attributor.from_trainer(trainer, **OPTIONS).training_time
    assert found is None or found == pytest.approx(sum(rates.rates), rel=1e-6)


def test_the_trainers_optimizer_gives_second_moments(tmp_path: Path) -> None:
    trainer, _ = trainer_of(BY_NAME["bert"], tmp_path, optim="adamw_torch")
    trainer.train()
    moments = whence.second_moments(trainer.model, trainer.optimizer)
    assert set(moments) == {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    attributor = whence.Attributor.from_trainer(trainer, second_moments=moments, **OPTIONS)
    assert torch.isfinite(attributor.scores(trainer.train_dataset[:2], trainer.train_dataset, strategy="identity").values).all()


def test_before_training_there_is_no_length(tmp_path: Path) -> None:
    trainer, _ = trainer_of(BY_NAME["bert"], tmp_path)
    attributor = whence.Attributor.from_trainer(trainer, **OPTIONS)
    assert attributor.training_time is None
    rows = trainer.train_dataset
    with pytest.raises(ConfigError, match=r"response='unrolled' needs the length of training"):
        attributor.fit(rows, strategy="diagonal").scores(rows[:2], rows, response="unrolled")
    given = whence.Attributor.from_trainer(trainer, training_time=0.5, **OPTIONS)
    assert given.training_time == 0.5


# ---------------------------------------------------------------------------------------------- gradient checkpointing


# transformers 5.23 has a new name for it; the old one is what models are used with.
OLD_NAME = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")


def scores_of(model: nn.Module, case: HFCase, task: Any) -> list[Tensor]:
    rows = case.rows()
    attributor = whence.Attributor(model, task, collate=case.collator(model), **OPTIONS).fit(rows, strategy="ekfac", batch_size=5)
    return [attributor.scores(rows[:3], rows, batch_size=5).values, attributor.self_influence(rows)]


@OLD_NAME
@pytest.mark.parametrize(("name", "task"), [("bert", SequenceClassification()), ("llama", CausalLM()), ("gpt2", CausalLM())])
def test_gradient_checkpointing_changes_nothing(name: str, task: Any) -> None:
    case = BY_NAME[name]
    plain = scores_of(case.build().double(), case, task)
    model = case.build().double()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    for found, expected in zip(scores_of(model, case, task), plain, strict=True):
        assert_close(found, expected, name, rtol=1e-6, atol_of_largest=1e-8)
    assert model.training
    assert model.is_gradient_checkpointing


@OLD_NAME
def test_reentrant_checkpoints_are_right_or_refused() -> None:
    case = BY_NAME["bert"]
    plain = scores_of(case.build().double(), case, SequenceClassification())
    model = case.build().double()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    try:
        found = scores_of(model, case, SequenceClassification())
    except LayerError as error:
        assert "use_reentrant=False" in str(error)  # noqa: PT017
    else:
        assert_close(found[0], plain[0], "scores", rtol=1e-6, atol_of_largest=1e-8)
