"""Batches, blocks of rows, checks of data sets, and the choice of a device."""

from __future__ import annotations

import collections
import types
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset, IterableDataset, TensorDataset

from whence.errors import ConfigError, DataError
from whence.runtime.batches import check_dataset, iterate_batches, row_blocks, to_device
from whence.runtime.device import resolve_device

META = torch.device("meta")  # a device other than the CPU that every machine has
Pair = collections.namedtuple("Pair", "left right")


def test_batches_follow_the_indices_and_keep_the_ragged_last_one() -> None:
    dataset = TensorDataset(torch.arange(10) * 10, torch.arange(10))
    batches = list(iterate_batches(dataset, [7, 3, 9, 0, 3], batch_size=2, device="cpu"))
    assert [batch.ids for batch in batches] == [[7, 3], [9, 0], [3]]
    assert [batch.data[0].tolist() for batch in batches] == [[70, 30], [90, 0], [30]]
    assert list(iterate_batches(dataset, [], batch_size=2, device="cpu")) == []
    assert next(iterate_batches(dataset, range(3), batch_size=8, device="cpu", collate=list)).data[2][1] == 2


def test_rows_are_read_when_their_batch_is_reached() -> None:
    read: list[int] = []

    class Watched(Dataset[int]):
        def __getitem__(self, index: int) -> int:
            read.append(index)
            return index

    batches = iterate_batches(Watched(), torch.arange(6), batch_size=3, device="cpu")  # type: ignore[arg-type]
    assert read == []
    assert next(batches).ids == [0, 1, 2]
    assert read == [0, 1, 2]
    assert all(type(index) is int for index in read)


def test_a_collate_failure_names_the_examples_and_the_cause() -> None:
    rows = [torch.zeros(2), torch.zeros(2), torch.zeros(2), torch.zeros(3)]
    batches = iterate_batches(rows, [0, 1, 2, 3], batch_size=2, device="cpu")
    next(batches)
    with pytest.raises(DataError, match=r"default_collate cannot make .* \[2, 3\]: RuntimeError: .* Give rows of one shape") as caught:
        next(batches)
    assert isinstance(caught.value.__cause__, RuntimeError)
    with pytest.raises(DataError, match=r"\[0, 1, .*31\] and 8 more: TypeError"):
        next(iterate_batches([object()] * 40, range(40), batch_size=40, device="cpu"))


def test_a_row_that_cannot_be_read_is_named() -> None:
    with pytest.raises(DataError, match=r"row 5 cannot be read: IndexError: .*Mend or drop the row"):
        next(iterate_batches([1, 2], [0, 5], batch_size=2, device="cpu"))


def test_sizes_below_one_are_refused_at_the_call() -> None:
    with pytest.raises(ConfigError, match="batch_size=0 is not possible; give at least 1"):
        iterate_batches([1], [0], batch_size=0, device="cpu")
    with pytest.raises(ConfigError, match="block=-1 rows is not possible; give at least 1"):
        row_blocks(3, -1)


def test_blocks_cover_every_row_once() -> None:
    assert row_blocks(7, 3) == [range(3), range(3, 6), range(6, 7)]
    assert row_blocks(6, 3) == [range(3), range(3, 6)]
    assert row_blocks(2, 100) == [range(2)]
    assert row_blocks(0, 3) == []


def test_tensors_are_moved_wherever_they_are() -> None:
    x = torch.zeros(2)
    batch = {"a": x, "b": [x, (x, "text")], "pair": Pair(x, 3), "none": None, "dict": collections.OrderedDict(y=x)}
    moved = to_device(batch, META)
    assert moved["a"].device == moved["b"][0].device == moved["b"][1][0].device == moved["pair"].left.device == META
    assert type(moved["pair"]) is Pair
    assert moved["pair"].right == 3
    assert type(moved["dict"]) is collections.OrderedDict
    assert moved["dict"]["y"].device == META
    assert (moved["b"][1][1], moved["none"]) == ("text", None)
    assert batch["a"] is x
    assert batch["dict"]["y"] is x
    assert to_device(types.MappingProxyType({"a": x}), META)["a"].device == META
    assert next(iterate_batches([x], [0], batch_size=1, device="meta")).data.device == META


def test_a_batch_encoding_stays_one() -> None:
    transformers = pytest.importorskip("transformers")
    encoding = transformers.BatchEncoding({"input_ids": torch.ones(2, 3), "text": ["a", "b"]})
    batch = next(iterate_batches([0, 1], [0, 1], batch_size=2, device="meta", collate=lambda rows: encoding)).data
    assert type(batch) is transformers.BatchEncoding
    assert batch["input_ids"].device == META
    assert batch["text"] == ["a", "b"]


class Stream(IterableDataset[int]):
    def __iter__(self) -> Any:
        yield 1


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ([], r"the training data set is empty: it has 0 rows"),
        (TensorDataset(torch.zeros(0, 2)), r"the training data set is empty"),
        ((i for i in range(3)), r"a generator, has no __len__ and no __getitem__\. Give a sequence of rows"),
        (Stream(), r"a Stream, has no __len__\."),
        ({1, 2}, r"a set, has no __getitem__\."),
        ({"train": [1], "test": [2]}, r"is a dict with the keys 'train', 'test', not a sequence of rows\. Give"),
        (torch.tensor(3), r"the length of the training data set, a Tensor, is not known: .*0-d tensor"),
    ],
)
def test_data_sets_that_cannot_be_used_are_refused(dataset: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        check_dataset(dataset, "training")


def test_data_sets_that_can_be_used_give_their_length() -> None:
    assert check_dataset([1, 2], "query") == 2
    assert check_dataset(TensorDataset(torch.zeros(3, 2)), "query") == 3
    assert check_dataset(torch.zeros(4, 2), "query") == 4


def test_devices() -> None:
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert resolve_device("cpu") == resolve_device(torch.device("cpu")) == torch.device("cpu")
    with pytest.raises(ConfigError, match=r"device='gpu' cannot be used here: .*\. This machine has 'auto', 'cpu'"):
        resolve_device("gpu")
    with pytest.raises(ConfigError, match=r"device='cuda:99' cannot be used here"):
        resolve_device(torch.device("cuda:99"))
