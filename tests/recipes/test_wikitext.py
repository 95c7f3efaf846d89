"""What wikitext makes of text, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import finetuned
from finetuned import measured_rows, own, started
from whence.errors import ConfigError, DataError
from whence.recipes.base import load_recipe
from whence.recipes.settings import DataSettings
from whence.recipes.wikitext import WikiText

pytest.importorskip("transformers")


def test_text_is_joined_and_cut_and_the_rest_dropped(data: Path) -> None:
    model, tokenizer, train, queries, settled = started("wikitext", data=str(data), max_length=17)
    lines = finetuned.lines_of("train")
    tokens = [token for line in lines for token in tokenizer(line)["input_ids"]]
    joined = [token for row in train.encoded for token in row["input_ids"]]
    assert all(len(row["input_ids"]) == 17 for row in train.encoded)
    assert len(train.encoded) == len(tokens) // 17
    assert joined == tokens[: len(joined)]
    assert "".join(row["text"] for row in train.encoded) == "".join(lines)[: len(tokenizer.decode(joined))]
    assert train.raw == [{"text": row["text"]} for row in train.encoded]
    assert len(tokens) % 17, "a case with a rest"
    values = measured_rows("wikitext", model, tokenizer, queries.encoded[:2], settled)
    assert values.shape == (2,)


def test_limits_are_of_blocks(data: Path) -> None:
    options: dict[str, Any] = {"data": str(data), "max_length": 16}
    _, _, every, asked, _ = started("wikitext", **options)
    _, _, train, queries, _ = started("wikitext", **options, max_train_rows=5, max_query_rows=2)
    assert train.encoded == every.encoded[:5]
    assert len(train.raw) == 5
    assert queries.encoded == asked.encoded[:2]


def test_a_block_longer_than_the_model(checkpoint: Callable[[str], Path], data: Path) -> None:
    with pytest.raises(ConfigError, match=r"max_length=17: the model reads 16 tokens at most\. Give --max-length 16 or less\."):
        load_recipe("wikitext", checkpoint_dir=checkpoint("wikitext"), max_length=17)
    shorter = load_recipe("wikitext", checkpoint_dir=checkpoint("wikitext"), max_length=8)
    assert {len(row["input_ids"]) for row in shorter.train} == {8}


def test_too_little_text(tmp_path: Path) -> None:
    folder = own(tmp_path, [{"text": "a b"}], [{"text": "a"}])
    with pytest.raises(DataError, match=r"the text has \d+ tokens, too few for a block of 64\. Give more, or a smaller --max-length\."):
        started("wikitext", data=folder, max_length=64)


def test_text_in_a_column_of_ones_own(tmp_path: Path) -> None:
    rows = [{"story": line, "id": number} for number, line in enumerate(finetuned.lines_of("train"))]
    _, _, train, _, settled = started("wikitext", data=own(tmp_path, rows, rows), columns=("story",), max_length=8)
    assert settled.columns == ("story",)
    assert train.encoded[0]["text"].startswith(rows[0]["story"][:5])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"flip": 0.1}, r"flip replaces labels, and text has none\. Leave --flip out\."),
        ({"measurement": "margin"}, r"measurement='margin' is for classifiers; choose loss or log_odds\."),
        ({"columns": ("a", "b")}, r"a language model's text is in one column\."),
        ({"label": "kind"}, r"label='kind' names a column of labels, and text has none\. Leave --label out\."),
        ({"max_length": 1}, r"max_length=1 leaves nothing to predict; give blocks of 2 tokens or more\."),
    ],
)
def test_what_wikitext_refuses(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        WikiText().settled(DataSettings(**options))
