"""BM25 against formulas worked out by hand, and rows that it cannot read."""

from __future__ import annotations

import logging
import math
import socket
from typing import Any

import pytest
import torch

from whence.errors import ConfigError, DataError
from whence.evaluate.baselines import bm25_scores


def text(*tokens: int) -> dict[str, Any]:
    return {"input_ids": list(tokens)}


# Four rows of 3, 4, 1 and 2 tokens, on average 2.5, with numbers that have gaps.
CORPUS = [text(500, 500, 7), text(500, 90, 90, 90), text(7), text(11, 30000)]


def test_by_hand():
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


def test_against_the_formula_on_a_random_corpus():
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


def test_special_tokens_and_padding_change_nothing():
    def dressed(row: dict[str, Any]) -> dict[str, Any]:
        ids = [1, *row["input_ids"], 2]
        return {"input_ids": [*ids, 90, 7, 0], "attention_mask": [1] * len(ids) + [0] * 3}

    asked = [text(500, 90), text(7, 7, 11)]
    torch.testing.assert_close(bm25_scores(list(map(dressed, asked)), list(map(dressed, CORPUS))), bm25_scores(asked, CORPUS))


def test_tokens_of_exactly_95_per_cent_stay():
    rows = [text(5, 100 + n) for n in range(19)] + [text(100, 6)]
    assert bm25_scores([text(5)], rows)[0, 0] > 0
    assert not bm25_scores([text(5)], [*rows, text(5, 6)])[0].any()


def test_choices_are_read_together():
    nested = [{"input_ids": [[500, 500], [7]]}, {"input_ids": [[500, 90], [90, 90]], "attention_mask": [[1, 1], [1, 1]]}, *CORPUS[2:]]
    asked = [{"input_ids": [[500], [90, 7]]}]
    torch.testing.assert_close(bm25_scores(asked, nested), bm25_scores([text(500, 90, 7)], CORPUS))


def test_rows_may_hold_tensors_and_arrays():
    rows = [{"input_ids": torch.tensor(row["input_ids"]), "attention_mask": torch.ones(len(row["input_ids"]))} for row in CORPUS]
    rows[1] = {"input_ids": rows[1]["input_ids"].view(2, 2).numpy()}
    torch.testing.assert_close(bm25_scores(rows, rows), bm25_scores(CORPUS, CORPUS))


def test_queries_and_rows_without_known_words_match_nothing():
    rows = [*CORPUS, text()]
    scores = bm25_scores([text(77), text(), text(500)], rows)
    assert not scores[:2].any()
    assert not scores[:, 4].any()
    assert not bm25_scores([text(5)], [text(5)]).any(), "a word of every row tells no row from another"
    assert not bm25_scores([text(5)], [text(), text()]).any()


def test_nothing_is_printed_logged_or_asked_of_a_network(capfd, caplog, monkeypatch):
    def refused(*_: Any, **__: Any) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refused)
    monkeypatch.setattr(logging.getLogger("bm25s"), "level", logging.DEBUG)  # as its import leaves it
    with caplog.at_level(logging.DEBUG):
        bm25_scores(CORPUS, CORPUS)
    assert not caplog.records
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("row", [{"pixel_values": 1, "labels": 0}, {"input_ids": None, "labels": 1, "pixel_values": 2}])
def test_rows_without_words_are_refused_with_what_to_do(row):
    with pytest.raises(
        ConfigError, match=r"query row 1 has no 'input_ids'; it has .*'?pixel_values.*tokenised rows .*leave this baseline out"
    ):
        bm25_scores([text(1), row], CORPUS)


def test_rows_that_are_no_dicts_are_refused():
    with pytest.raises(ConfigError, match=r"training row 0 has no 'input_ids'; it has a tuple"):
        bm25_scores(CORPUS, [(torch.ones(2), 1)])


def test_a_mask_of_another_length_is_refused():
    with pytest.raises(DataError, match=r"training row 0 has 2 input_ids and an attention_mask of 1"):
        bm25_scores(CORPUS, [{"input_ids": [4, 5], "attention_mask": [1]}])


def test_empty_data_are_refused():
    with pytest.raises(DataError, match=r"training data set is empty"):
        bm25_scores(CORPUS, [])
