"""The peers on tiny models with random weights, against explicit gradients: `python -m pytest bench/test_peer_hf.py`."""

import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

sys.path.insert(0, str(Path(__file__).parent))

from trak.projectors import BasicProjector, NoOpProjector

from support.models import spread_norms
from support.peer import rewrite_conv1d
from support.peer_hf import kronfluence_scores, tracked_layers, trak_scores

KINDS = ("classification", "choice", "lm")
CHOICES = 4
pytestmark = pytest.mark.filterwarnings("ignore")


def tiny(kind, seed=0):
    from transformers import (
        BertConfig,
        BertForMultipleChoice,
        BertForSequenceClassification,
        GPT2Config,
        GPT2LMHeadModel,
    )

    torch.manual_seed(seed)
    if kind == "lm":
        config = GPT2Config(
            vocab_size=50, n_positions=32, n_embd=32, n_layer=2, n_head=4, initializer_range=0.2, bos_token_id=0, eos_token_id=0
        )
        return spread_norms(GPT2LMHeadModel(config)).eval()
    config = BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, num_labels=3,
        max_position_embeddings=32, initializer_range=0.2,
    )  # fmt: skip
    return spread_norms({"classification": BertForSequenceClassification, "choice": BertForMultipleChoice}[kind](config)).eval()


def rows(kind, count, seed):
    generator = torch.Generator().manual_seed(seed)

    def sentence():
        return torch.randint(1, 50, (int(torch.randint(4, 12, (), generator=generator)),), generator=generator).tolist()

    found = []
    for _ in range(count):
        row = {"input_ids": [sentence() for _ in range(CHOICES)] if kind == "choice" else sentence()}
        row["attention_mask"] = [[1] * len(part) for part in row["input_ids"]] if kind == "choice" else [1] * len(row["input_ids"])
        row["labels"] = row["input_ids"] if kind == "lm" else int(torch.randint(3, (), generator=generator))
        found.append(row)
    return found


def collate(batch):
    many = isinstance(batch[0]["input_ids"][0], list)
    columns = {}
    for name in batch[0]:
        if isinstance(batch[0][name], int):
            columns[name] = torch.tensor([row[name] for row in batch])
            continue
        parts = [torch.tensor(part) for row in batch for part in (row[name] if many else [row[name]])]
        padded = pad_sequence(parts, batch_first=True, padding_value=-100 if name == "labels" else 0)
        columns[name] = padded.unflatten(0, (len(batch), -1)) if many else padded
    return columns


def logits_and_targets(kind, model, row):
    """One row, without padding and without the code under test: logits [n, class], targets [n]."""
    if kind == "choice":
        parts = [model(input_ids=torch.tensor([[part]])).logits[0, 0] for part in row["input_ids"]]
        return torch.stack(parts)[None], torch.tensor([row["labels"]])
    logits = model(input_ids=torch.tensor([row["input_ids"]])).logits
    if kind == "lm":
        return logits[0, :-1], torch.tensor(row["input_ids"][1:])
    return logits, torch.tensor([row["labels"]])


def loss(kind, model, row):
    return F.cross_entropy(*logits_and_targets(kind, model, row), reduction="sum")


def log_odds(kind, model, row):
    """log p / (1 - p), summed; and the mean of 1 - p."""
    logits, targets = logits_and_targets(kind, model, row)
    p = logits.double().softmax(-1).gather(-1, targets[:, None])[:, 0]
    return (p / (1 - p)).log().sum(), (1 - p).mean()


def gradients(function, kind, model, rows_, parameters):
    return torch.stack([torch.cat([g.flatten() for g in torch.autograd.grad(function(kind, model, row), parameters)]) for row in rows_])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("measurement", ["loss", "margin"])
def test_identity_is_the_dot_product_of_gradients(kind, measurement, tmp_path):
    model, train, queries = tiny(kind), rows(kind, 12, 1), rows(kind, 5, 2)
    before = {name: values.clone() for name, values in model.state_dict().items()}
    found = kronfluence_scores(
        model, kind, queries, train, collate, damping=None, work=tmp_path, name="tiny", measurement=measurement, strategy="identity"
    )
    assert all(torch.equal(before[name], values) for name, values in model.state_dict().items())
    linear = rewrite_conv1d(model)
    names = tracked_layers(linear)
    assert "lm_head" not in names
    assert len(names) == {"lm": 8, "classification": 14, "choice": 14}[kind]
    parameters = [values for name in names for values in linear.get_submodule(name).parameters()]
    measure = loss if measurement == "loss" else lambda *given: -log_odds(*given)[0]
    expected = gradients(measure, kind, linear, queries, parameters) @ gradients(loss, kind, linear, train, parameters).T
    torch.testing.assert_close(found, expected.float(), rtol=2e-4, atol=2e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("empirical", [False, True])
def test_ekfac_is_cached_and_finds_a_planted_duplicate(kind, empirical, tmp_path):
    model, train = tiny(kind), rows(kind, 12, 1)
    settings = {"damping": None, "empirical": empirical, "work": tmp_path, "name": "tiny"}
    first = kronfluence_scores(model, kind, train[:4], train, collate, **settings)
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("factors_*/*.safetensors")}
    again = kronfluence_scores(model, kind, train[:4], train, collate, **settings)
    assert stamps
    assert stamps == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("factors_*/*.safetensors")}
    assert torch.equal(first, again)
    assert first.shape == (4, 12)
    assert torch.equal(first.argmax(1), torch.arange(4))
    assert bool((first.diagonal() > 0).all())


@pytest.mark.parametrize("kind", KINDS)
def test_other_weights_or_rows_fit_other_factors(kind, tmp_path):
    settings = {"damping": None, "work": tmp_path, "name": "tiny", "strategy": "diagonal"}
    train = rows(kind, 6, 1)
    for model, data in ((tiny(kind), train), (tiny(kind, seed=1), train), (tiny(kind), train[::-1])):
        kronfluence_scores(model, kind, train[:2], data, collate, **settings)
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("kind", KINDS)
def test_trak_without_projection_is_its_formula(kind):
    model, train, queries = tiny(kind), rows(kind, 12, 1), rows(kind, 5, 2)
    parameters = list(model.parameters())
    phi, targets = (gradients(lambda *given: log_odds(*given)[0], kind, model, data, parameters) for data in (train, queries))
    weights = torch.stack([log_odds(kind, model, row)[1] for row in train]).detach()
    # (X'X + r)^-1 X' = X' (XX' + r)^-1: the second is small.
    kernel = phi @ phi.T
    ridge = 0.1 * kernel.trace() / phi.shape[1]
    expected = targets @ phi.T @ torch.linalg.inv(kernel + ridge * torch.eye(len(train))) * weights

    class Short(NoOpProjector):
        """Coordinates in the span of all rows, which lose nothing: the kernel matrix over all parameters would be too large."""

        def project(self, grads, model_id):
            basis = torch.linalg.qr(torch.cat([phi, targets]).T.float())[0]
            return grads @ basis

    width = len(train) + len(queries)
    projector = Short(proj_dim=width, device="cpu")
    found = trak_scores([model], kind, queries, train, collate, ridge=0.1 * width / phi.shape[1], projector=projector)
    # The package scales each model's inverse by its mean size.
    scale = (expected * found).sum() / found.square().sum()
    assert scale > 0
    torch.testing.assert_close(scale * found, expected.float(), rtol=1e-2, atol=1e-2 * float(expected.abs().max()))


@pytest.mark.parametrize("kind", KINDS)
def test_trak_finds_a_planted_duplicate(kind):
    train = rows(kind, 12, 1)
    scores = trak_scores([tiny(kind), tiny(kind, seed=1)], kind, train[:4], train, collate, proj_dim=512)
    assert scores.shape == (4, 12)
    assert scores.dtype == torch.float32
    assert torch.equal(scores.argmax(1), torch.arange(4))
    assert bool((scores.diagonal() > 0).all())


def test_the_sketch_keeps_inner_products_as_the_dense_projection_does():
    from support.peer_hf import SketchProjector

    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(20, 20_000, generator=generator)
    vectors[10:] += vectors[:10]
    truth = vectors @ vectors.T

    def error(projector, scale):
        projected = projector.project(vectors, 0) * scale
        return float((projected @ projected.T - truth).norm() / truth.norm())

    sketch = error(SketchProjector(20_000, 512, 0), 1)
    dense = error(BasicProjector(grad_dim=20_000, proj_dim=512, seed=0, proj_type="rademacher", device="cpu"), 512**-0.5)
    assert sketch < 1.2 * dense < 0.2


def test_trak_refuses_a_singular_kernel():
    with pytest.raises(ValueError, match="no ridge"):
        trak_scores([tiny("lm")], "lm", rows("lm", 1, 2), rows("lm", 12, 1), collate, proj_dim=12, ridge=0.0)
