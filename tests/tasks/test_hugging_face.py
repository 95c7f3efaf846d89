"""Tasks of Hugging Face models: the models' own losses, padding, sampling, masks, and scores that no batch changes."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import whence
from compare import assert_close
from whence.errors import ConfigError, DataError
from whence.runtime.noise import KeyedNoise
from whence.tasks import CausalLM, MultipleChoice, Seq2SeqLM, SequenceClassification, TokenClassification
from whence.tasks.likelihoods import IGNORE, Bernoulli, Categorical, Gaussian

pytest.importorskip("transformers")
from case_hugging_face import BY_NAME, CASES, VOCABULARY, HFCase

all_cases = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def cast(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.double() if key == "pixel_values" else value for key, value in batch.items()}


def counted(case: HFCase, labels: Tensor) -> float:
    """By what the model's own mean divides: trained tokens, numbers, or (for squares, which we halve) twice the rows."""
    if case.name == "bert number":
        return len(labels) / 2
    shifted = labels[:, 1:] if case.task is CausalLM else labels
    return float((shifted != IGNORE).sum())


@all_cases
def test_the_loss_is_the_models_own(case: HFCase) -> None:
    """Within 1e-6: several models compute their loss in float32 whatever their type."""
    model = case.build().double()
    batch = case.collator(model)(case.rows())
    loss = case.task().loss(model, batch)
    assert loss.shape == (len(case.rows()),)
    own = model(**cast(batch)).loss * counted(case, batch["labels"])
    assert_close(loss.sum(), own, case.name, rtol=1e-6)


@all_cases
def test_neither_padding_nor_neighbours_change_loss_samples_or_columns(case: HFCase) -> None:
    model, task, rows = case.build().double(), case.task(), case.rows()[:5]
    collate = case.collator(model)

    def results(rows: list[Any], ids: list[int]) -> tuple[Tensor, ...]:
        batch = collate(rows)
        noise = KeyedNoise(seed=1, stream=0, ids=ids, device="cpu")
        return task.loss(model, batch), task.sampled_loss(model, batch, noise), task.measurement(model, batch)

    together = results(rows, list(range(5)))
    alone = [results([row], [i]) for i, row in enumerate(rows)]
    for place, what in enumerate(("loss", "sampled loss", "measurement")):
        assert_close(together[place], torch.cat([each[place] for each in alone]), f"{case.name} {what}", rtol=1e-12)


@all_cases
def test_scores_do_not_depend_on_the_batch(case: HFCase) -> None:
    """EKFAC with drawn labels, in float64: batches of 1 and of 4."""
    model, rows = case.build().double(), case.rows()
    collate, found = case.collator(model), []
    for batch_size in (1, 4):
        attributor = whence.Attributor(model, case.task(), collate=collate, progress=False)
        attributor.fit(rows, strategy="ekfac", batch_size=batch_size)
        scores = attributor.scores(rows[:3], rows, batch_size=batch_size, query_batch_size=batch_size)
        found.append((scores.values, attributor.self_influence(rows, batch_size=batch_size)))
    for one, four in zip(*found, strict=True):
        assert one.abs().max() > 0
        assert_close(four, one, case.name, rtol=0.0, atol_of_largest=1e-10)


@pytest.mark.parametrize("name", ["bert", "bert labels", "bert number", "roberta", "distilbert"])
def test_columns_sum_to_the_fisher_matrix(name: str) -> None:
    """By enumeration of all labels, over the parameters of the last two layers; for numbers from the Jacobian."""
    case = BY_NAME[name]
    model, task, row = case.build().double(), case.task(), case.rows()[2]
    for parameter in list(model.parameters())[:-4]:
        parameter.requires_grad = False
    batch = case.collator(model)([row])
    columns = task.columns(model, batch)
    J = gradients(model, columns.squeeze(1))
    if name == "bert number":
        assert_close(J, gradients(model, model(**batch).logits[0]), name, rtol=1e-12)
        return
    output = task.output(model, batch)
    wanted = torch.zeros(())
    for labels, probability in enumerated(output.detach()[0], batch["labels"][0]):
        g = gradients(model, task.loss(model, {**batch, "labels": labels.unsqueeze(0)}))[0]
        wanted = wanted + probability * torch.outer(g, g)
    assert_close(J.T @ J, wanted, name, rtol=1e-9)


def gradients(model: nn.Module, values: Tensor) -> Tensor:
    parameters = [p for p in model.parameters() if p.requires_grad]
    rows = [torch.autograd.grad(value, parameters, retain_graph=True, materialize_grads=True) for value in values]
    return torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])


def enumerated(output: Tensor, labels: Tensor) -> Any:
    """Give all labels that could have been, with their probabilities under the output."""
    if labels.is_floating_point():
        p = output.sigmoid()
        for given in product((0.0, 1.0), repeat=len(p)):
            y = torch.tensor(given)
            yield y, (y * p + (1 - y) * (1 - p)).prod()
        return
    p = output.softmax(-1).view(-1, output.shape[-1])
    real = (labels.flatten() != IGNORE).nonzero().flatten().tolist()
    for given in product(range(p.shape[-1]), repeat=len(real)):
        y = labels.flatten().clone()
        y[real] = torch.tensor(given)
        yield y.view(labels.shape), p[real, list(given)].prod()


@pytest.mark.parametrize("name", ["bert", "vit", "distilbert", "roberta", "gpt2", "t5"])
def test_log_odds_are_those_of_the_label_against_all_others(name: str) -> None:
    """Directly from probabilities, where they are far from 0 and 1."""
    case = BY_NAME[name]
    measure = "log_odds" if case.task in (CausalLM, Seq2SeqLM) else "margin"
    model, task = case.build().double(), case.task(measurement=measure)
    batch = case.collator(model)(case.rows())
    logits, labels = model(**cast(batch)).logits, batch["labels"]
    if case.task is CausalLM:
        logits, labels = logits[:, :-1], labels[:, 1:]
    p = logits.softmax(-1).gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    odds = torch.where(labels == IGNORE, 0.0, (p / (1 - p)).log())
    wanted = -odds.flatten(1).sum(1) if odds.dim() > 1 else -odds
    assert_close(task.measurement(model, batch), wanted, name, rtol=1e-8)


def test_language_models_refuse_columns() -> None:
    case = BY_NAME["gpt2"]
    model = case.build()
    with pytest.raises(ConfigError, match=r"CausalLM has one column per token and entry of the vocabulary.*solver='direct'"):
        CausalLM().columns(model, case.collator(model)(case.rows()))


def test_causal_labels_default_to_the_real_tokens() -> None:
    model, task = BY_NAME["gpt2"].build(), CausalLM()
    batch = {"input_ids": torch.tensor([[3, 4, 5], [6, 7, 2]]), "attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]])}
    assert task.targets(batch).tolist() == [[4, 5, IGNORE], [7, IGNORE, IGNORE]]
    assert_close(task.loss(model, batch), task.loss(model, {**batch, "labels": torch.tensor([[3, 4, 5], [6, 7, IGNORE]])}), "labels")


@pytest.mark.parametrize(
    ("problem_type", "outputs", "labels", "kind"),
    [
        (None, 1, torch.tensor([0.5]), Gaussian),
        (None, 3, torch.tensor([1]), Categorical),
        (None, 3, torch.tensor([[1.0, 0.0, 1.0]]), Bernoulli),
        ("regression", 3, torch.tensor([[1.0, 0.0, 1.0]]), Gaussian),
        ("multi_label_classification", 1, torch.tensor([[1.0]]), Bernoulli),
    ],
)
def test_the_problem_type_is_found_as_transformers_does(problem_type: Any, outputs: int, labels: Tensor, kind: type) -> None:
    model = BY_NAME["bert"].build()
    assert type(SequenceClassification(problem_type=problem_type).likelihood(model, outputs, labels)) is kind
    model.config.problem_type = problem_type
    assert type(SequenceClassification().likelihood(model, outputs, labels)) is kind


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_masks_follow_the_streams_of_encoder_and_decoder(name: str) -> None:
    """Every Linear layer finds the mask of the positions it is called on; the two streams have different lengths."""
    from whence.capture.assemble import mask_for

    case = BY_NAME[name]
    model, task = case.build(), case.task()
    batch = case.collator(model)([{"input_ids": [3, 4, 5, 2], "labels": [6, 2]}, {"input_ids": [3, 2], "labels": [7, 8, 2]}])
    masks, sizes = task.padding_mask(batch), {}
    hooks = [
        module.register_forward_hook(lambda module, args, output, layer=layer: sizes.__setitem__(layer, args[0].shape[:2]))
        for layer, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    task.loss(model, batch)
    for hook in hooks:
        hook.remove()
    assert len(sizes) == len(hooks)
    for layer, size in sizes.items():
        mask = mask_for(masks, layer, size)  # raises if it is of another shape
        assert mask is not None, layer
        assert torch.equal(mask.bool(), batch["attention_mask"].bool() if size[1] == 4 else batch["labels"] != IGNORE)


def test_four_choices_are_one_example() -> None:
    case = BY_NAME["roberta"]
    batch = case.collator(case.build())(case.rows()[:2])
    assert batch["input_ids"].shape[:2] == (2, 4)
    assert MultipleChoice().example_ids(batch).tolist() == [0] * 4 + [1] * 4
    assert torch.equal(MultipleChoice().padding_mask(batch), batch["attention_mask"].view(8, -1))


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        (SequenceClassification, {"measurement": "odds"}, r"measurement='odds' is not known; choose 'loss' or 'margin'"),
        (CausalLM, {"measurement": "margin"}, r"measurement='margin' is not known; choose 'loss' or 'log_odds'"),
        (SequenceClassification, {"problem_type": "guess"}, r"problem_type='guess' is not known; choose 'single_label_classification'"),
    ],
)
def test_options_are_checked(task: Any, options: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        task(**options)


def prepared(name: str, **options: Any) -> tuple[Any, nn.Module]:
    case = BY_NAME[name]
    model, task = case.build(), case.task(**options)
    with torch.no_grad():
        task.prepare(model, case.collator(model)(case.rows()[:2]))
    return task, model


IDS = {"input_ids": [3, 4, 5]}


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("bert", IDS, r"row 7 has no labels: it has \['input_ids'\]. Give every row labels under 'labels'"),
        ("bert", {**IDS, "label": 3}, r"row 7: label 3 is out of range: the model has 3 classes, so labels run from 0 to 2"),
        ("bert", {**IDS, "label": "good"}, r"row 7: its labels 'good' are not numbers. Turn them into class numbers"),
        ("bert", {**IDS, "label": -100}, r"row 7 has no label that counts: all are -100"),
        ("bert", {"input_ids": [3, VOCABULARY], "label": 0}, r"row 7: token id 24 is out of range: the model knows the ids 0 to 23"),
        ("vit", {"pixel_values": torch.zeros(3, 8, 8)}, r"row 7 has no labels"),
        ("bert number", {**IDS, "label": float("nan")}, r"row 7: its target is NaN or infinite"),
        ("bert labels", {**IDS, "labels": [1.0, 0.0]}, r"row 7: labels \[1.0, 0.0\] cannot be used.*takes 3 numbers from 0 to 1"),
        ("distilbert", {**IDS, "labels": [0, 1]}, r"row 7 has 3 tokens and 2 labels. Give one label per token, -100 where there is none"),
        ("distilbert", {**IDS, "labels": 1}, r"row 7: its labels have the shape \(\). TokenClassification takes one label per token"),
        ("distilbert", {**IDS, "labels": [IGNORE] * 3}, r"row 7 has no label that counts"),
        ("roberta", {"input_ids": [[3]] * 3, "label": 0}, r"row 7 has 3 choices, but the first rows have 4"),
        ("roberta", {"input_ids": [[3]] * 4, "label": 4}, r"row 7: label 4 is out of range: the model has 4 classes"),
        ("roberta", {"input_ids": [[3], [4], [5], [99]], "label": 0}, r"row 7: token id 99 is out of range"),
        ("gpt2", {"input_ids": [3]}, r"row 7 has no trained token: the first token is never predicted"),
        ("llama", {**IDS, "labels": [3, IGNORE, IGNORE]}, r"row 7 has no trained token"),
        ("llama", {**IDS, "labels": [IGNORE, 4, 99]}, r"row 7: label 99 is out of range: the model has 24 classes"),
        ("llama", {**IDS, "attention_mask": [1, 0, 0]}, r"row 7 has no trained token"),
        ("t5", IDS, r"row 7 has no labels"),
        ("t5", {**IDS, "labels": [[3, 4]]}, r"row 7: its labels have the shape \(1, 2\). Seq2SeqLM takes the target's token ids"),
        ("t5", {**IDS, "labels": [IGNORE]}, r"row 7 has no label that counts"),
    ],
)
def test_a_row_that_cannot_be_used_is_named(name: str, row: Any, message: str) -> None:
    task, model = prepared(name)
    with pytest.raises(DataError, match=message):
        task.inspect_row(model, 7, row)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_good_rows_pass(case: HFCase) -> None:
    task, model = prepared(case.name)
    for index, row in enumerate(case.rows()):
        task.inspect_row(model, index, row)


@pytest.mark.parametrize("row", [("some text", 1), {"text": "some text", "label": "good"}, {"text": "some text", "stars": 2}])
def test_rows_that_are_not_tokenised_are_left_to_the_collate_function(row: Any) -> None:
    task, model = prepared("bert")
    task.inspect_row(model, 0, row)


def test_a_bad_row_is_found_before_long_work() -> None:
    case = BY_NAME["bert"]
    model = case.build()
    rows = [*case.rows(), {"input_ids": [3, 4], "label": 9}]
    attributor = whence.Attributor(model, SequenceClassification(), collate=case.collator(model), progress=False)
    with pytest.raises(DataError, match=r"row 16: label 9 is out of range"):
        attributor.fit(rows)


class Bare(nn.Module):
    """Returns what it is told to."""

    def __init__(self, result: Any) -> None:
        super().__init__()
        self.inner, self.result = nn.Linear(1, 3), result

    def forward(self, input_ids: Tensor) -> Any:
        return self.result


def test_batches_and_models_that_do_not_fit() -> None:
    ids, labels = torch.zeros(2, 3, dtype=torch.long), torch.tensor([0, 1])
    task = SequenceClassification()
    with pytest.raises(DataError, match=r"SequenceClassification takes batches as dicts .* not a tuple. Give a collate function"):
        task.loss(Bare(None), (ids, labels))
    with pytest.raises(DataError, match=r"a batch has no 'labels'; it has \['input_ids', 'stars'\].*SequenceClassification\(labels=...\)"):
        task.loss(Bare((torch.randn(2, 3),)), {"input_ids": ids, "stars": labels} | {"stars": None})
    with pytest.raises(ConfigError, match=r"Bare returned a dict without logits. Use a model with a head for this task"):
        task.loss(Bare({}), {"input_ids": ids, "labels": labels})
    with pytest.raises(DataError, match=r"the model gives \(2, 3\) for labels of shape \(2, 1\). Classification takes logits"):
        task.prepare(Bare(torch.randn(2, 3)), {"input_ids": ids, "labels": labels.unsqueeze(1)})
    with pytest.raises(DataError, match=r"the model gives \(2, 3\) for labels of shape \(2, 2\). Multi-label"):
        task.prepare(Bare(torch.randn(2, 3)), {"input_ids": ids, "labels": torch.rand(2, 2)})
    with pytest.raises(
        ConfigError, match=r"Seq2SeqLM: Bare has no prepare_decoder_input_ids_from_labels. Give batches with decoder_input_ids"
    ):
        Seq2SeqLM().loss(Bare(None), {"input_ids": ids, "labels": ids})
    with pytest.raises(ConfigError, match=r"measurement='margin' is not defined for a regression.*choose 'loss'"):
        prepared("bert number", measurement="margin")


def test_logits_may_come_as_a_tuple_or_alone() -> None:
    logits, batch = torch.randn(2, 3), {"input_ids": torch.zeros(2, 3), "stars": torch.tensor([0, 2])}
    task = SequenceClassification(labels="stars")
    assert torch.equal(task.loss(Bare((logits, 0)), batch), task.loss(Bare(logits), batch))


def test_a_missing_attention_mask_is_no_mask() -> None:
    assert TokenClassification().padding_mask({"input_ids": torch.zeros(1, 2)}) is None
    assert MultipleChoice().padding_mask({"input_ids": torch.zeros(1, 4, 2)}) is None
    assert set(Seq2SeqLM().padding_mask({"labels": torch.zeros(1, 2)})) == {"decoder.*", "*.decoder.*", "lm_head*", "*.lm_head*"}


def test_no_cache_is_kept_and_pixels_take_the_models_type() -> None:
    seen: dict[str, Any] = {}
    model = BY_NAME["gpt2"].build()
    hook = model.register_forward_pre_hook(lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True)
    CausalLM().loss(model, {"input_ids": torch.tensor([[3, 4]])})
    hook.remove()
    assert seen["use_cache"] is False
    case = BY_NAME["vit"]
    model = case.build().bfloat16()
    assert SequenceClassification().loss(model, case.collator(model)(case.rows()[:2])).dtype == torch.float32
