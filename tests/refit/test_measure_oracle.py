"""Outputs and gradients of every token against a batch of one through autograd, on every kind of layer and task."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cases
import whence
from compare import assert_close
from oracle_layers import as_trained_matrix, layer_of, trained
from whence.capture import columns
from whence.tasks import CausalLM, Classification, Seq2SeqLM

pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from architectures import adapted  # noqa: E402
from case_hugging_face import BY_NAME  # noqa: E402

ROWS = 5


def logits_and_labels(task: Any, model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    """Logits `[label, class]` of the one row, and its labels, aligned by hand."""
    if isinstance(task, Classification):
        return model(batch[0])[0].flatten(0, -2) if model(batch[0]).dim() > 2 else model(batch[0]), batch[1].flatten()
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    labels = batch["labels"]
    if isinstance(task, Seq2SeqLM):
        inputs["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels=labels)
    logits = model(**inputs).logits
    if isinstance(task, CausalLM):
        return logits[0, :-1], labels[0, 1:]
    return logits.reshape(-1, logits.shape[-1]), labels.flatten()


def log_odds(task: Any, model: nn.Module, batch: Any) -> Tensor:
    """`log p / (1 - p)` of every trained label of the one row, `[label]`, in float64."""
    logits, labels = logits_and_labels(task, model, batch)
    p = logits[labels != -100].double().softmax(-1).gather(1, labels[labels != -100].unsqueeze(1)).squeeze(1)
    return p.log() - (1 - p).log()


def expected(attributor: whence.Attributor, names: list[str], rows: list[Any], *, per_token: bool) -> tuple[Tensor, Tensor, list[int]]:
    """Outputs, gradients `[row, parameter]`, and how many rows each example has."""
    outputs, gradients, counts = [], [], []
    model, task, collate = attributor.model, attributor.task, attributor.collate or torch.utils.data.default_collate

    layers = {name: layer_of(model, name) for name in names}
    wanted = [p for layer in layers.values() for p in trained(layer)]
    for row in rows:
        odds = log_odds(task, model, collate([row]))
        counts.append(len(odds) if per_token else 1)
        outputs.append(odds.detach() if per_token else odds.detach().mean(0, keepdim=True))
        for output in odds if per_token else [odds.mean()]:
            slopes = iter(torch.autograd.grad(output, wanted, retain_graph=True, allow_unused=True))
            matrices = [as_trained_matrix(layer, [next(slopes) for _ in trained(layer)]) for layer in layers.values()]
            gradients.append(torch.cat([matrix.flatten() for matrix in matrices]))
    return torch.cat(outputs), torch.stack(gradients), counts


def check(attributor: whence.Attributor, rows: list[Any], **options: Any) -> None:
    for per_token in (True, False):
        found = attributor.linearise(rows, projection="none", per_token=per_token, name=str(per_token), **options)
        outputs, gradients, counts = expected(attributor, found.settings["projected"], rows, per_token=per_token)
        assert found.example.bincount().tolist() == counts
        assert found.weights.tolist() == pytest.approx([1 / n for n in counts for _ in range(n)])
        assert_close(found.outputs.double(), outputs, "outputs", rtol=1e-6, atol_of_largest=1e-6)
        assert_close(found.gradients.double(), gradients, "gradients", rtol=2e-6, atol_of_largest=1e-6)


def attributor_of(name: str, model: nn.Module | None = None, **options: Any) -> tuple[whence.Attributor, list[Any]]:
    case = BY_NAME[name]
    built = case.build() if model is None else model
    cases.watch(built.double())
    return whence.Attributor(built, case.task(), collate=case.collator(built), progress=False, **options), case.rows()[:ROWS]


def slow(*names: str) -> list[Any]:
    return [pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.parametrize("name", ["llama", "t5", *slow("gpt2", "bert", "gpt2 classes", "distilbert", "roberta", "bart")])
def test_every_token_of_an_architecture(name: str) -> None:
    """Shared and tied weights, padding on either side of an encoder-decoder, prompts that are not trained, and a batch that is not full."""
    check(*attributor_of(name), batch_size=3)


@pytest.mark.parametrize("name", ["gpt2", *slow("llama", "t5", "distilbert")])
def test_every_token_with_embeddings_and_heads(name: str) -> None:
    check(*attributor_of(name, layers="all"), batch_size=4)


TARGETS = {"gpt2": ["c_attn", "c_proj"], "llama": ["q_proj", "down_proj"], "t5": ["q", "v", "wo"]}


@pytest.mark.parametrize("name", ["gpt2", *slow("llama", "t5")])
def test_every_token_of_an_adapter(name: str) -> None:
    model = adapted(BY_NAME[name].build, TARGETS[name])
    attributor, rows = attributor_of(name, model)
    assert all("lora" in layer.name for layer in attributor._layers)
    check(attributor, rows, batch_size=3)


class Places(nn.Module):
    """Logits of every position from all positions; a parameter without a handler; a layer used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(4, 4), nn.Linear(4, 3)
        self.scale = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.inner(self.inner(x).tanh()) * self.scale
        return self.head(h + h.cumsum(1))


def places() -> list[Any]:
    generator = torch.Generator().manual_seed(3)
    labels = torch.randint(-1, 3, (ROWS, 5), generator=generator)
    labels[:, 2] = 1
    return [(torch.randn(5, 4, generator=generator).double(), row.masked_fill(row < 0, -100)) for row in labels]


@pytest.mark.parametrize("fallback", [False, True])
def test_every_position_of_a_plain_module(fallback: bool) -> None:
    model = cases.watch(Places().double())
    check(whence.Attributor(model, Classification(), fallback=fallback, progress=False), places(), batch_size=3)


def passes_from(monkeypatch: pytest.MonkeyPatch, call: Callable[[], Any]) -> set[int]:
    """Return the ranks of what backward passes began from: 3 for the head's input, 2 for the log-odds."""
    seen, real = set(), columns._root

    def noted(*arguments: Any) -> tuple[Tensor, Tensor]:
        root, slopes = real(*arguments)
        seen.add(root.dim())
        return root, slopes

    monkeypatch.setattr(columns, "_root", noted)
    call()
    return seen


@pytest.mark.parametrize(("name", "layers", "rank"), [("llama", None, 3), ("t5", None, 3), ("llama", "all", 2)])
def test_the_head_is_passed_once(monkeypatch: pytest.MonkeyPatch, name: str, layers: str | None, rank: int) -> None:
    attributor, rows = attributor_of(name, layers=layers)
    assert passes_from(monkeypatch, lambda: attributor.linearise(rows)) == {rank}


def test_a_way_around_the_head_is_seen() -> None:
    x = torch.randn(1, 2, 3, requires_grad=True)
    h = x * 2
    through, around = h.exp().sum(-1), (h.exp() + x).sum(-1)
    assert columns._only_way(through, h)
    assert not columns._only_way(around, h)
    assert not columns._only_way(through, x)


def next_key(options: dict[str, Any]) -> str:
    return next(iter(options))


# Dynamo makes the objects that it warns of making.
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("options", [{"compile": True}, {"offload": True}, {"precision": "bfloat16"}], ids=next_key)
def test_options_of_passes(options: dict[str, Any]) -> None:
    wanted, found = (attributor_of("llama", **more) for more in ({}, options))
    one, other = (attributor.linearise(rows[:3], dimension=50) for attributor, rows in (wanted, found))
    tolerance = 2e-2 if "precision" in options else 2e-6
    assert_close(other.outputs, one.outputs, "outputs", rtol=0, atol_of_largest=tolerance)
    assert_close(other.gradients, one.gradients, "gradients", rtol=0, atol_of_largest=tolerance)
