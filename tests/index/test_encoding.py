"""Numbers of an index, and back."""

from __future__ import annotations

import pytest
import torch

from whence.errors import ConfigError
from whence.index.encoding import check_dtype, decode, encode, numbers_in, vector_bytes


@pytest.mark.parametrize("numbers", [1, 2, 7, 64])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "int4"])
def test_vectors_come_back(dtype: str, numbers: int) -> None:
    vectors = torch.randn(5, 3, numbers, generator=torch.Generator().manual_seed(numbers))
    values, scale = encode(vectors, dtype)
    assert values[0, 0].numel() * values.element_size() == vector_bytes(numbers, dtype)
    assert numbers_in(vector_bytes(numbers, dtype), dtype) - numbers in (0, 1)
    back = decode(values, dtype, numbers) * scale.unsqueeze(-1)
    # Half a step of the largest number; with 4 bits the largest itself may be cut off to at most three tenths.
    allowed = {"float32": 0, "bfloat16": 2**-8, "int8": 0.5 / 127, "int4": 0.7}[dtype]
    assert ((back - vectors).abs() <= allowed * vectors.abs().amax(-1, keepdim=True) + 1e-7).all()


def test_four_bits_are_cut_off_where_it_loses_least() -> None:
    vectors = torch.randn(200, 256, generator=torch.Generator().manual_seed(0))
    values, scale = encode(vectors, "int4")
    loss = (decode(values, "int4", 256) * scale.unsqueeze(-1) - vectors).square().mean()
    whole = vectors.abs().amax(-1, keepdim=True) / 7
    uncut = ((vectors / whole).round() * whole - vectors).square().mean()
    # The best uniform quantiser of a normal number with 15 levels has 0.0118.
    assert loss < 0.0125
    assert uncut > 0.0132


def test_zeros_stay_zeros() -> None:
    for dtype in ("int8", "int4"):
        values, scale = encode(torch.zeros(2, 6), dtype)
        assert torch.equal(decode(values, dtype, 6) * scale.unsqueeze(-1), torch.zeros(2, 6))


def test_other_types_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"dtype='int2' is not known; choose from .*'int4'"):
        check_dtype("int2")
