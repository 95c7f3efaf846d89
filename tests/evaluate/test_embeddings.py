"""Embeddings against the models' own hidden states, and models left as found."""

from __future__ import annotations

import copy
import sys
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import case_models as m
import case_tasks as t
from cases import build, collate_padded, watch
from whence.errors import ConfigError, DataError, NumericalError
from whence.evaluate.baselines import embedding_scores
from whence.tasks import Regression

pytest.importorskip("transformers")
from case_hugging_face import BY_NAME, VOCABULARY, HFCase


def cosines(queries: Tensor, train: Tensor) -> Tensor:
    return F.cosine_similarity(queries.unsqueeze(1), train.unsqueeze(0), dim=-1)


def hidden(case: HFCase, model: nn.Module, row: dict[str, Any]) -> Tensor:
    """The mean of the last hidden state of one row alone, without padding, told by the model itself: `[hidden]`.

    The model is a copy: transformers leaves hooks on a model that was asked for its hidden states.
    """
    inputs = {key: value for key, value in case.collator(model)([row]).items() if key != "labels" or "T5" in case.model}
    with torch.no_grad():
        result = copy.deepcopy(model)(**inputs, output_hidden_states=True)
    states = result.encoder_hidden_states if "encoder_hidden_states" in result else result.hidden_states
    # One mean over positions for each choice, then over choices; choices are padded to the longest of the row.
    choices = row["input_ids"] if case.name == "roberta" else [row["input_ids"]]
    return torch.stack([state[: len(ids)].mean(0) for state, ids in zip(states[-1], choices, strict=True)]).mean(0)


def scored(case: HFCase, model: nn.Module, **options: Any) -> Tensor:
    rows = case.rows()
    return embedding_scores(model, rows[:4], rows[4:], **({"collate": case.collator(model), "device": "cpu", "batch_size": 5} | options))


TEXTS = ["bert", "gpt2 classes", "bart classes", "distilbert", "roberta", "gpt2", "llama", "t5", "bart"]


@pytest.mark.parametrize("name", TEXTS)
def test_hugging_face_embeddings_are_the_mean_last_hidden_state(name):
    case = BY_NAME[name]
    model = watch(case.build())
    states = torch.stack([hidden(case, model, row) for row in case.rows()])
    scores = scored(case, model)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, cosines(states[:4], states[4:]), rtol=0, atol=2e-5)
    assert scores.std() > 0.01, "the case tells rows apart"


def test_pictures_are_embedded_in_the_type_of_the_model():
    case = BY_NAME["vit"]
    model = watch(case.build())
    with torch.no_grad():
        states = model.vit(torch.stack([row["pixel_values"] for row in case.rows()])).last_hidden_state.mean(1)
    torch.testing.assert_close(scored(case, model), cosines(states[:4], states[4:]))
    half = watch(case.build().bfloat16())
    torch.testing.assert_close(scored(case, half), cosines(states[:4], states[4:]), rtol=0, atol=0.03)


@pytest.mark.parametrize("name", ["bert", "llama", "roberta", "t5"])
def test_neither_padding_nor_batches_change_embeddings(name):
    case = BY_NAME[name]
    model = case.build()
    collate = case.collator(model)

    def padded(rows: list[Any]) -> dict[str, Tensor]:
        batch = collate(rows)
        ids = F.pad(batch["input_ids"], (0, 4), value=VOCABULARY - 1)
        mask = F.pad(batch["attention_mask"], (0, 4))
        return batch | {"input_ids": ids, "attention_mask": mask}

    expected = scored(case, model, batch_size=1)
    for options in ({"batch_size": 5}, {"batch_size": 100}, {"collate": padded}):
        torch.testing.assert_close(scored(case, model, **options), expected, rtol=0, atol=2e-5)


def test_adapters_count_and_wrappers_do_not():
    peft = pytest.importorskip("peft")
    case = BY_NAME["bert"]
    model, base = case.build(), case.build()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.* is deprecated", category=FutureWarning)
        adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["query"], init_lora_weights=False))
    merged = copy.deepcopy(adapted).merge_and_unload()
    torch.testing.assert_close(scored(case, watch(adapted.eval())), scored(case, merged), rtol=0, atol=1e-5)
    assert (scored(case, merged) - scored(case, base)).abs().max() > 1e-3
    torch.testing.assert_close(scored(case, torch.compile(base, backend="eager")), scored(case, base))


def test_a_model_in_training_is_left_as_found():
    case = BY_NAME["bert"]
    model = case.build().train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    model.bert.encoder.layer[0].eval()
    model.classifier.weight.requires_grad_(False)
    watch(model)
    state, fast = torch.get_rng_state(), torch.backends.mha.get_fastpath_enabled()
    torch.testing.assert_close(scored(case, model), scored(case, case.build()))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.backends.mha.get_fastpath_enabled() == fast
    assert model.config.problem_type is None, "labels would have been looked at"


@pytest.mark.parametrize("plain", [False, True])
def test_a_model_is_left_as_found_when_a_row_cannot_be_used(plain):
    case = BY_NAME["bert"]
    model = watch((m.mlp() if plain else case.build()).train())
    good = [(torch.randn(4), 0)] * 4 if plain else case.rows()[:4]
    with pytest.raises(DataError, match=r"cannot make one batch|no array of numbers"):
        embedding_scores(model, good, [*good, "no row"], collate=None if plain else case.collator(model), device="cpu", batch_size=3)
    broken = [(torch.randn(5), 0)] if plain else [{"input_ids": [1], "attention_mask": [1], "label": 0, "position_ids": [99]}]
    with pytest.raises((RuntimeError, IndexError)):
        embedding_scores(model, good, broken, collate=None if plain else case.collator(model), device="cpu")


def test_the_global_random_state_is_left_when_collating_draws():
    case = BY_NAME["bert"]
    model = case.build()
    collate, state = case.collator(model), torch.get_rng_state()

    def drawing(rows: list[Any]) -> Any:
        torch.rand(1)
        return collate(rows)

    scored(case, model, collate=drawing)
    assert torch.equal(torch.get_rng_state(), state)


def plain_rows(count: int, *shape: int) -> list[tuple[Tensor, int]]:
    generator = torch.Generator().manual_seed(5)
    return [(torch.randn(*shape, generator=generator, dtype=torch.float64), index % 3) for index in range(count)]


def plain(model: nn.Module, rows: list[Any], **options: Any) -> Tensor:
    return embedding_scores(model, rows[:3], rows[3:], **({"collate": None, "device": "cpu", "batch_size": 4} | options))


def test_other_models_are_embedded_by_what_their_last_layer_is_given():
    model, rows = build(m.mlp), plain_rows(9, 4)
    with torch.no_grad():
        states = model[:4](torch.stack([x for x, _ in rows])).float()
    torch.testing.assert_close(plain(model, rows), cosines(states[:3], states[3:]))
    model.train()
    for module in model.modules():
        watch(model)
        assert module.training
    torch.testing.assert_close(plain(model, rows), cosines(states[:3], states[3:]))


@pytest.mark.parametrize("shape", [(5, 4), (2, 3, 4)])
def test_positions_are_averaged(shape):
    model, rows = build(m.PerPosition), plain_rows(9, *shape)
    with torch.no_grad():
        states = torch.tanh(model.inner(torch.stack([x for x, _ in rows]))).flatten(1, -2).mean(1).float()
    task = Regression()
    rows = [(x, torch.zeros(*shape[:-1], 3, dtype=torch.float64)) for x, _ in rows]
    torch.testing.assert_close(plain(model, rows, task=task), cosines(states[:3], states[3:]))


@pytest.mark.parametrize("extra", [0, 3])
def test_padding_that_a_task_knows_of_is_left_out(extra):
    generator = torch.Generator().manual_seed(0)
    rows = [
        {"x": torch.randn(n, 4, generator=generator, dtype=torch.float64), "tags": torch.zeros(n, dtype=torch.long), "labels": 0}
        for n in (2, 5, 3, 4, 2, 5)
    ]

    def collate(rows: list[Any]) -> Any:
        batch = collate_padded(rows, extra)
        return batch | {"labels": torch.zeros(batch["inputs"]["mask"].shape, dtype=torch.long)}

    model = build(m.PerPosition)
    with torch.no_grad():
        states = torch.stack([torch.tanh(model.inner(row["x"])).mean(0) for row in rows]).float()
    task = t.TaggingTask(inputs="inputs", labels="labels")
    torch.testing.assert_close(plain(model, rows, collate=collate, task=task), cosines(states[:3], states[3:]))


def test_a_mask_of_other_positions_is_of_no_account():
    # The last layer sees one vector a row, the mask is of positions before.
    generator = torch.Generator().manual_seed(0)
    rows = [{"x": torch.randn(n, 4, generator=generator, dtype=torch.float64), "labels": 0} for n in (2, 5, 3, 4, 2, 5)]
    model = build(m.MaskedPool)
    with torch.no_grad():
        states = torch.stack([torch.tanh(model.deeper(torch.tanh(model.inner(row["x"])))).mean(0) for row in rows]).float()
    scores = plain(model, rows, collate=collate_padded, task=t.PaddedTask(inputs="inputs", labels="labels"))
    torch.testing.assert_close(scores, cosines(states[:3], states[3:]))


class HeadFirst(nn.Module):
    """The layer that runs last is made first, and is called by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.inner, self.never = nn.Linear(6, 3), nn.Linear(4, 6), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(input=torch.relu(self.inner(x)))


def test_the_last_layer_is_the_one_that_runs_last():
    model, rows = build(HeadFirst), plain_rows(9, 4)
    with torch.no_grad():
        states = torch.relu(model.inner(torch.stack([x for x, _ in rows]))).float()
    torch.testing.assert_close(plain(model, rows), cosines(states[:3], states[3:]))


class Encoded(nn.Module):
    """torch's own encoder, whose last nn.Linear is within the fused layer."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(4, 2, dim_feedforward=6, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(x, src_key_padding_mask=x[..., 0] > 1).sum(1)


def test_layers_within_the_fused_encoder_are_seen():
    model, rows = build(Encoded), plain_rows(9, 5, 4)
    seen: list[Tensor] = []
    other = copy.deepcopy(model).train()  # no fused path in training
    other.encoder.layers[1].linear2.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    other(torch.stack([x for x, _ in rows]))
    states = seen[0].mean(1).float()
    torch.testing.assert_close(plain(model, rows), cosines(states[:3], states[3:]))


def test_a_row_whose_embedding_is_zero_is_like_no_other():
    model = HeadFirst().double()
    with torch.no_grad():
        model.inner.bias.zero_()
    rows = [(torch.zeros(4, dtype=torch.float64), 0), *plain_rows(8, 4)]
    scores = plain(model, rows)
    assert scores[0].tolist() == [0] * 6
    assert scores[1:].abs().max() <= 1


@pytest.mark.parametrize(
    ("factory", "shape", "message"),
    [
        (lambda: nn.Sequential(nn.Conv1d(4, 3, 1), nn.AdaptiveAvgPool1d(1), nn.Flatten()), (4, 2), r"Sequential none ran\. Leave"),
        (m.Choices, (4, 2, 5), r"\[batch, \.\.\., feature\] for 3 rows; in Choices the last one was given the shape \("),
    ],
)
def test_models_without_such_a_layer_are_refused(factory, shape, message):
    with pytest.raises(ConfigError, match=message):
        plain(build(factory), plain_rows(6, *shape))


def test_models_that_give_no_hidden_state_are_refused():
    transformers = sys.modules["transformers"]
    config = transformers.ResNetConfig(embedding_size=4, hidden_sizes=[4, 4], depths=[1, 1], layer_type="basic", num_labels=3)
    model = watch(transformers.ResNetForImageClassification(config).eval())
    rows = [{"pixel_values": torch.randn(3, 32, 32), "labels": 0}] * 2
    with pytest.raises(
        ConfigError, match=r"ResNetModel gives no last hidden state \[batch, position, hidden\] for 2 rows .*Leave the embedding"
    ):
        embedding_scores(model, rows, rows, collate=None, device="cpu")


def test_masks_of_who_attends_to_whom_are_refused():
    case = BY_NAME["bert"]
    model = case.build()

    def square(rows: list[Any]) -> Any:
        batch = case.collator(model)(rows)
        return batch | {"attention_mask": batch["attention_mask"][:, None, None].bool().expand(-1, 1, batch["input_ids"].shape[1], -1)}

    with pytest.raises(ConfigError, match=r"attention mask of shape .* does not say which .* makes a mask \[batch, position\]"):
        scored(case, model, collate=square)


def test_batches_of_other_forms_are_refused():
    case = BY_NAME["bert"]
    with pytest.raises(ConfigError, match=r"takes batches as dicts, not a Tensor"):
        scored(case, case.build(), collate=lambda rows: torch.ones(len(rows), 2))


def test_embeddings_that_are_not_finite_are_named():
    model, rows = build(m.mlp), plain_rows(9, 4)
    rows[5] = (torch.full((4,), float("nan"), dtype=torch.float64), 0)
    with pytest.raises(NumericalError, match=r"embeddings: the training rows \[2\] have values that are not finite"):
        plain(model, rows)


@pytest.mark.parametrize("side", [0, 1])
def test_embeddings_of_no_rows_are_refused(side):
    data = [plain_rows(3, 4), plain_rows(3, 4)]
    data[side] = []
    with pytest.raises(DataError, match=rf"the {('query', 'training')[side]} data set is empty"):
        embedding_scores(build(m.mlp), *data, collate=None, device="cpu")
