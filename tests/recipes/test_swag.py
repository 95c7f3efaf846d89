"""What swag makes of rows under the hub's names, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import finetuned
from finetuned import measured_rows, own, started
from whence.errors import ConfigError, DataError
from whence.recipes.families import FAMILIES
from whence.recipes.settings import DataSettings
from whence.recipes.swag import Swag

pytest.importorskip("transformers")


def test_swag_under_the_names_of_the_hub(data: Path) -> None:
    model, tokenizer, train, _, settled = started("swag", data=str(data), max_length=32)
    raw = finetuned.rows_of("swag", "train")
    assert [row["labels"] for row in train.encoded] == [row["label"] for row in raw]
    for row, first in zip(train.encoded, raw, strict=True):
        assert len(row["input_ids"]) == 4
        assert len({len(ids) for ids in row["input_ids"]}) == 1, "a rectangle"
        for place, (ids, mask) in enumerate(zip(row["input_ids"], row["attention_mask"], strict=True)):
            real = [token for token, kept in zip(ids, mask, strict=True) if kept]
            assert tokenizer.decode(real, skip_special_tokens=True) == f"{first['sent1']}{first['sent2']} {first[f'ending{place}']}"
            assert {token for token, kept in zip(ids, mask, strict=True) if not kept} <= {tokenizer.pad_token_id}
    text = train.encoded[0]["text"].splitlines()
    assert text[0] == raw[0]["sent1"]
    assert text[1 + raw[0]["label"]] == f"* {raw[0]['label']}: It {raw[0]['ending' + str(raw[0]['label'])]}"
    assert sum(line.startswith("*") for line in text) == 1
    assert measured_rows("swag", model, tokenizer, train.encoded[:5], settled).shape == (5,)


def test_hellaswag_under_the_names_of_the_hub(data: Path) -> None:
    model, tokenizer, train, queries, settled = started("swag", task="hellaswag", data=str(data), max_length=32)
    raw = finetuned.rows_of("hellaswag", "train")
    assert [row["labels"] for row in train.encoded] == [int(row["label"]) for row in raw]
    for number in (0, 1):  # without and with the start of a sentence
        first = tokenizer.decode(train.encoded[number]["input_ids"][0], skip_special_tokens=True)
        assert first == f"{raw[number]['ctx_a']}{raw[number]['ctx_b']}{' ' if number else ''}{raw[number]['endings'][0]}"
    assert FAMILIES["swag"].source(settled).hub == "Rowan/hellaswag"
    assert measured_rows("swag", model, tokenizer, queries.encoded[:2], settled).shape == (2,)


def test_hellaswag_with_the_columns_of_swag(tmp_path: Path) -> None:
    rows = finetuned.rows_of("swag", "train")[:6]
    _, _, train, _, _ = started("swag", task="hellaswag", data=own(tmp_path, rows, rows))
    _, _, same, _, _ = started("swag", task="swag", data=own(tmp_path, rows, rows))
    assert train.encoded == same.encoded


def test_the_margin_of_a_choice_is_not_changed_by_padding(data: Path) -> None:
    """Rows of one batch are padded to the longest ending of all."""
    model, tokenizer, train, _, settled = started("swag", data=str(data), max_length=32)
    together = measured_rows("swag", model, tokenizer, train.encoded[:4], settled)
    alone = torch.cat([measured_rows("swag", model, tokenizer, [row], settled) for row in train.encoded[:4]])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label": 4}, r"row 0 has the label 4; give the number of the right ending, 0 to 3\."),
        ({"label": "b"}, r"row 0 has the label 'b'; give the number of the right ending, 0 to 3\."),
        ({"label": True}, r"row 0 has the label True;"),
        ({"label": None}, r"row 0 has no 'label'"),
        ({"sent1": None}, r"a row has the columns .*sent1.*; expected sent1, sent2, ending0, ending1, \.\.\. and label\."),
    ],
)
def test_rows_of_swag_that_are_none(data: Path, change: dict[str, Any], message: str) -> None:
    model, tokenizer, _, _, settled = started("swag", data=str(data))
    row = finetuned.rows_of("swag", "train")[0] | change
    with pytest.raises(DataError, match=message):
        Swag().encode(tokenizer, model.config, [row], settled)


def test_a_choice_needs_two_endings() -> None:
    with pytest.raises(DataError, match=r"a row has 1 endings; give ending0, ending1, \.\.\. or a list in the column endings\."):
        list(Swag().texts([{"sent1": "a", "sent2": "b", "endings": ["c"], "label": 0}], DataSettings()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "swog"}, r"--task swog is not known to swag; choose swag or hellaswag\."),
        ({"columns": ("text",)}, r"leave --columns out\."),
        ({"measurement": "log_odds"}, r"measurement='log_odds' is for language models; choose loss or margin\."),
    ],
)
def test_what_swag_refuses(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Swag().settled(DataSettings(**options))
