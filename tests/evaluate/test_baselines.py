"""Baselines against formulas worked out by hand and against the models' own hidden states, and models left as found."""

from __future__ import annotations

import copy
import logging
import math
import socket
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
from whence.evaluate.baselines import BASELINES, bm25_scores, embedding_scores, loss_scores, random_scores, signed_by_class
from whence.tasks import Regression

pytest.importorskip("transformers")
from case_hugging_face import BY_NAME, VOCABULARY, HFCase

NAN = float("nan")


def text(*tokens: int) -> dict[str, Any]:
    return {"input_ids": list(tokens)}


# Four rows of 3, 4, 1 and 2 tokens, on average 2.5, with numbers that have gaps.
CORPUS = [text(500, 500, 7), text(500, 90, 90, 90), text(7), text(11, 30000)]


# ---------------------------------------------------------------------------------------------- words


class TestWords:
    def test_by_hand(self):
        scores = bm25_scores([text(500, 90, 12345, 500), text(7)], CORPUS)
        # 500 is in two rows of four and asked for twice; 90 is in one; 12345 in none.
        once, common, rare = 1.5 * (0.25 + 0.75 * 3 / 2.5), math.log(1 + 2.5 / 2.5), math.log(1 + 3.5 / 1.5)
        longest, alone = 1.5 * (0.25 + 0.75 * 4 / 2.5), 1.5 * (0.25 + 0.75 * 1 / 2.5)
        expected = [
            [2 * common * 2 / (2 + once), 2 * common * 1 / (1 + longest) + rare * 3 / (3 + longest), 0, 0],
            [common * 1 / (1 + once), 0, common * 1 / (1 + alone), 0],
        ]
        torch.testing.assert_close(scores, torch.tensor(expected))
        assert scores.dtype == torch.float32

    def test_against_the_formula_on_a_random_corpus(self):
        generator = torch.Generator().manual_seed(0)
        # Token 3 is in nearly all rows, token 40 in none of the training rows.
        rows = [torch.randint(0, 40, (2 + n % 9,), generator=generator).tolist() + ([3] if n else [5]) for n in range(40)]
        asked = [torch.randint(0, 41, (6,), generator=generator).tolist() for _ in range(5)]
        kept = [[token for token in row if token != 3] for row in rows]
        mean = sum(map(len, kept)) / len(kept)

        def match(query: list[int], row: list[int]) -> float:
            total = 0.0
            for token in query:
                n, f = sum(token in other for other in kept), row.count(token)
                total += math.log(1 + (len(kept) - n + 0.5) / (n + 0.5)) * f / (f + 1.5 * (0.25 + 0.75 * len(row) / mean))
            return total

        assert sum(3 in row for row in rows) > 38
        expected = torch.tensor([[match(query, row) for row in kept] for query in asked])
        torch.testing.assert_close(bm25_scores([text(*ids) for ids in asked], [text(*row) for row in rows]), expected)

    def test_special_tokens_and_padding_change_nothing(self):
        def dressed(row: dict[str, Any]) -> dict[str, Any]:
            ids = [1, *row["input_ids"], 2]
            return {"input_ids": [*ids, 90, 7, 0], "attention_mask": [1] * len(ids) + [0] * 3}

        asked = [text(500, 90), text(7, 7, 11)]
        torch.testing.assert_close(bm25_scores(list(map(dressed, asked)), list(map(dressed, CORPUS))), bm25_scores(asked, CORPUS))

    def test_tokens_of_exactly_95_per_cent_stay(self):
        rows = [text(5, 100 + n) for n in range(19)] + [text(100, 6)]
        assert bm25_scores([text(5)], rows)[0, 0] > 0
        assert not bm25_scores([text(5)], [*rows, text(5, 6)])[0].any()

    def test_choices_are_read_together(self):
        nested = [{"input_ids": [[500, 500], [7]]}, {"input_ids": [[500, 90], [90, 90]], "attention_mask": [[1, 1], [1, 1]]}, *CORPUS[2:]]
        asked = [{"input_ids": [[500], [90, 7]]}]
        torch.testing.assert_close(bm25_scores(asked, nested), bm25_scores([text(500, 90, 7)], CORPUS))

    def test_rows_may_hold_tensors_and_arrays(self):
        rows = [{"input_ids": torch.tensor(row["input_ids"]), "attention_mask": torch.ones(len(row["input_ids"]))} for row in CORPUS]
        rows[1] = {"input_ids": rows[1]["input_ids"].view(2, 2).numpy()}
        torch.testing.assert_close(bm25_scores(rows, rows), bm25_scores(CORPUS, CORPUS))

    def test_queries_and_rows_without_known_words_match_nothing(self):
        rows = [*CORPUS, text()]
        scores = bm25_scores([text(77), text(), text(500)], rows)
        assert not scores[:2].any()
        assert not scores[:, 4].any()
        assert not bm25_scores([text(5)], [text(5)]).any(), "a word of every row tells no row from another"
        assert not bm25_scores([text(5)], [text(), text()]).any()

    def test_nothing_is_printed_logged_or_asked_of_a_network(self, capfd, caplog, monkeypatch):
        def refused(*_: Any, **__: Any) -> None:
            raise AssertionError("the network was asked")

        monkeypatch.setattr(socket.socket, "connect", refused)
        monkeypatch.setattr(logging.getLogger("bm25s"), "level", logging.DEBUG)  # as its import leaves it
        with caplog.at_level(logging.DEBUG):
            bm25_scores(CORPUS, CORPUS)
        assert not caplog.records
        assert capfd.readouterr() == ("", "")

    @pytest.mark.parametrize("row", [{"pixel_values": 1, "labels": 0}, {"input_ids": None, "labels": 1, "pixel_values": 2}])
    def test_rows_without_words_are_refused_with_what_to_do(self, row):
        with pytest.raises(
            ConfigError, match=r"query row 1 has no 'input_ids'; it has .*'?pixel_values.*tokenised rows .*leave this baseline out"
        ):
            bm25_scores([text(1), row], CORPUS)

    def test_rows_that_are_no_dicts_are_refused(self):
        with pytest.raises(ConfigError, match=r"training row 0 has no 'input_ids'; it has a tuple"):
            bm25_scores(CORPUS, [(torch.ones(2), 1)])

    def test_a_mask_of_another_length_is_refused(self):
        with pytest.raises(DataError, match=r"training row 0 has 2 input_ids and an attention_mask of 1"):
            bm25_scores(CORPUS, [{"input_ids": [4, 5], "attention_mask": [1]}])

    def test_empty_data_are_refused(self):
        with pytest.raises(DataError, match=r"training data set is empty"):
            bm25_scores(CORPUS, [])


# ---------------------------------------------------------------------------------------------- embeddings


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
    rows[5] = (torch.full((4,), NAN, dtype=torch.float64), 0)
    with pytest.raises(NumericalError, match=r"embeddings: the training rows \[2\] have values that are not finite"):
        plain(model, rows)


@pytest.mark.parametrize("side", [0, 1])
def test_embeddings_of_no_rows_are_refused(side):
    data = [plain_rows(3, 4), plain_rows(3, 4)]
    data[side] = []
    with pytest.raises(DataError, match=rf"the {('query', 'training')[side]} data set is empty"):
        embedding_scores(build(m.mlp), *data, collate=None, device="cpu")


# ---------------------------------------------------------------------------------------------- the others


def test_random_scores_are_those_of_their_seed_and_of_no_other():
    state = torch.get_rng_state()
    scores = random_scores(30, 400, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert scores.shape == (30, 400)
    assert scores.dtype == torch.float32
    assert torch.equal(scores, random_scores(30, 400, seed=3))
    assert not torch.equal(scores, random_scores(30, 400, seed=4))
    # 12,000 numbers: the standard deviation of their mean is 0.009; four of those.
    assert abs(float(scores.mean())) < 0.037
    # Queries have orders of their own: 400 pairs correlate by 0.05 at random.
    assert torch.corrcoef(scores).fill_diagonal_(0).abs().max() < 0.25


@pytest.mark.parametrize(("queries", "train", "message"), [(0, 3, r"queries=0 rows"), (3, -1, r"train=-1 rows")])
def test_random_scores_of_nothing_are_refused(queries, train, message):
    with pytest.raises(ConfigError, match=message):
        random_scores(queries, train)


def test_loss_scores_are_the_losses_for_every_query():
    losses = torch.tensor([0.5, 2.0, 0.0], dtype=torch.float64, requires_grad=True)
    scores = loss_scores(losses, 2)
    assert scores.tolist() == [[0.5, 2.0, 0.0]] * 2
    assert scores.dtype == torch.float32
    assert not scores.requires_grad
    scores[0, 0] = 7
    assert scores[1, 0] == 0.5, "each query has its own row"


@pytest.mark.parametrize(
    ("losses", "message"), [([[1.0]], r"losses have shape \(1, 1\), 0 of them not finite"), ([1.0, NAN], r"\(2,\), 1 of them not finite")]
)
def test_losses_that_are_no_scores(losses, message):
    with pytest.raises(DataError, match=message):
        loss_scores(torch.tensor(losses), 2)
    with pytest.raises(ConfigError, match=r"queries=0 rows"):
        loss_scores(torch.ones(2), 0)


def test_the_sign_is_that_of_the_class():
    scores = torch.tensor([[1.0, 2.0, 0.0], [3.0, -4.0, 5.0]])
    signed = signed_by_class(scores, torch.tensor([0, 1]), torch.tensor([0, 1, 1]))
    assert signed.tolist() == [[1, -2, 0], [-3, -4, 5]]
    assert scores.tolist() == [[1, 2, 0], [3, -4, 5]]


@pytest.mark.parametrize(("queries", "train"), [(3, 3), (2, 2), (1, 3)])
def test_classes_of_other_rows_are_refused(queries, train):
    with pytest.raises(DataError, match=rf"query_classes \({queries},\) and classes \({train},\)"):
        signed_by_class(torch.zeros(2, 3), torch.zeros(queries), torch.zeros(train))


def test_names_are_in_the_order_of_tables():
    assert BASELINES == ("random", "bm25", "bm25 signed", "embedding", "embedding signed", "gradient cosine", "loss")
