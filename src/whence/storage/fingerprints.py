"""Fingerprints: a model, a data set or a task's source as 64 hex digits that change when the content does."""

from __future__ import annotations

import hashlib
import inspect as python_inspect
import struct
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from whence.errors import DataError

_ALLOWED = "torch tensors, numpy arrays and scalars, str, bytes, bool, int, float, complex, None, and lists, tuples and dicts of these"


def _tensor_bytes(tensor: Tensor) -> bytes:
    flat = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes()


def _encode_tensor(value: Tensor, out: list[bytes]) -> None:
    if value.layout is not torch.strided or value.is_meta or value.is_quantized:
        raise TypeError("a tensor that is sparse, quantized or on the meta device (call .to_dense() or .dequantize() first)")
    out.append(f"t{value.dtype}{list(value.shape)}".encode())
    out.append(_tensor_bytes(value))


def _encode_array(value: np.ndarray[Any, Any] | np.generic, out: list[bytes]) -> None:
    if value.dtype.hasobject:
        raise TypeError("a numpy array of Python objects (dtype object)")
    dtype = value.dtype.descr if value.dtype.names else value.dtype.str
    out.append(f"{'a' if isinstance(value, np.ndarray) else 'g'}{dtype}{list(value.shape)}".encode())
    out.append(value.tobytes())


def _encode_scalar(value: Any) -> bytes | None:
    """Return the bytes of a plain Python value, or None if it is something else."""
    if isinstance(value, (str, bytes, bytearray)):
        tag, data = (b"s", value.encode("utf-8", "surrogatepass")) if isinstance(value, str) else (b"b", value)
        return tag + b"%d:" % len(data) + data
    if value is None or isinstance(value, bool):  # before int: True is an int
        return {None: b"N", True: b"T", False: b"F"}[value]
    if isinstance(value, int):
        return b"i%d;" % value
    if isinstance(value, float):
        return b"f" + struct.pack("<d", value)
    if isinstance(value, complex):
        return b"c" + struct.pack("<dd", value.real, value.imag)
    return None


def _encode_list(value: list[Any] | tuple[Any, ...], out: list[bytes]) -> None:
    out.append(b"l%d:" % len(value))
    if set(map(type, value)) == {int}:  # the same bytes, at a tenth of the time for lists of token ids
        out.append(f"i{';i'.join(map(str, value))};".encode())
        return
    for item in value:
        _encode(item, out)


def _encode_mapping(value: Mapping[Any, Any], out: list[bytes]) -> None:
    items = sorted(((_encoded(key), item) for key, item in value.items()), key=lambda pair: pair[0])
    out.append(b"d%d:" % len(items))
    for key, item in items:
        out.append(key)
        _encode(item, out)


def _encode(value: Any, out: list[bytes]) -> None:
    """Append bytes from which `value` could be rebuilt: each item carries its type and its length or shape.

    Since nothing is ambiguous, two values encode alike only if they are the same; lists and tuples are not told apart.
    """
    if isinstance(value, Tensor):
        _encode_tensor(value, out)
    elif isinstance(value, (np.ndarray, np.generic)):  # before the scalars: numpy's float64 is a float
        _encode_array(value, out)
    elif (scalar := _encode_scalar(value)) is not None:
        out.append(scalar)
    elif isinstance(value, (list, tuple)):
        _encode_list(value, out)
    elif isinstance(value, Mapping):
        _encode_mapping(value, out)
    else:
        raise TypeError(f"an object of type {type(value).__module__}.{type(value).__qualname__}")


def _encoded(value: Any) -> bytes:
    out: list[bytes] = []
    _encode(value, out)
    return b"".join(out)


def fingerprint_model(model: nn.Module) -> str:
    """Return 64 hex digits over all parameters and buffers: names, shapes, dtypes, bytes, and which are shared.

    The order of registration, the device and `requires_grad` do not matter. A tied weight differs from two equal ones,
    because their gradients do.
    """
    named: list[tuple[str, str, Tensor]] = []
    named += [(name, "parameter", tensor) for name, tensor in model.named_parameters(remove_duplicate=False)]
    named += [(name, "buffer", tensor) for name, tensor in model.named_buffers(remove_duplicate=False)]
    digest, first_name = hashlib.sha256(), dict[int, str]()
    for name, kind, tensor in sorted(named, key=lambda entry: entry[0]):
        first = first_name.setdefault(id(tensor), name)
        digest.update(_encoded([kind, name]))
        digest.update(_encoded(tensor.detach() if first == name else first))
    return digest.hexdigest()


def fingerprint_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Return 64 hex digits over named tensors."""
    return hashlib.sha256(_encoded(dict(tensors))).hexdigest()


def fingerprint_rows(dataset: Any, *, inspect: Callable[[int, Any], None] | None = None) -> str:
    """Return 64 hex digits over the content of every row, in order.

    The order of dict keys does not matter, nor whether a sequence is a list or a tuple; `1`, `1.0`, `True` and `"1"`
    all differ. The result is the same with and without `inspect`, and reads each row exactly once.

    Args:
        dataset: anything with `__len__` and `__getitem__`.
        inspect: called with `(index, row)` before the row is hashed, to report bad rows in the same pass.

    Raises:
        DataError: a row cannot be read, or holds something whose content cannot be hashed.
    """
    digest = hashlib.sha256()
    for index in range(len(dataset)):
        try:
            row = dataset[index]
        except Exception as error:
            raise DataError(f"row {index} cannot be read: {type(error).__name__}: {error}. Mend or drop the row.") from error
        if inspect is not None:
            inspect(index, row)
        try:
            digest.update(_encoded(row))
        except TypeError as error:
            raise DataError(
                f"row {index} holds {error}, whose content cannot be compared between runs. "
                f"Rows may hold {_ALLOWED}. Convert it in the data set's __getitem__."
            ) from None
    return digest.hexdigest()


def fingerprint_source(obj: Any) -> str:
    """Return 64 hex digits over the source of an object's class and its base classes, or of a function.

    A class without readable source (typed into a session, compiled) counts by its qualified name. What the object
    holds (options given to a task) is not part of it.
    """
    target = obj if isinstance(obj, type) or (callable(obj) and hasattr(obj, "__qualname__")) else type(obj)
    plain = {"builtins", "abc", "typing"}
    parts = [base for base in target.__mro__ if base.__module__ not in plain] if isinstance(target, type) else [target]
    return hashlib.sha256("\0".join(map(_source, parts or [target])).encode()).hexdigest()


def _source(target: Any) -> str:
    try:
        return python_inspect.getsource(target)
    except (OSError, TypeError):
        return f"{target.__module__}.{target.__qualname__}"
