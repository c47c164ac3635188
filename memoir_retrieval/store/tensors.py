"""Safetensors files in pieces: written without a copy of the whole in memory, and read as views of a mapped file.

The library `safetensors` does neither for numpy. What is written here has the bytes that it would write; what is read
is only what a store may hold, so that a forged header costs neither memory nor time.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from memoir_retrieval.errors import StoreError
from memoir_retrieval.store.files import Data

__all__ = ["Tensor", "read_tensors", "tensor_chunks", "tensors_size", "unique_keys"]

HEADER_LIMIT = 1 << 16
ROWS_AT_ONCE = 16 << 20  # bytes
_DTYPES = {"I64": np.int64, "F64": np.float64, "F32": np.float32, "I32": np.int32, "U8": np.uint8}
# In the order in which the library puts them into a file.
_NAMES = {np.dtype(dtype): name for name, dtype in _DTYPES.items()}


class Tensor(NamedTuple):
    """What a file must hold under one name.

    dtype: of numpy.
    shape: None stands for any length.
    required: False where a file may lack it.
    """

    dtype: Any
    shape: tuple[int | None, ...]
    required: bool = True


def tensor_chunks(tensors: Mapping[str, np.ndarray], rows: np.ndarray | None = None) -> Iterator[bytes | memoryview]:
    """The bytes of a safetensors file.

    tensors: by name.
    rows: int64 [R], those of every tensor that are written; by default all.

    Raises StoreError for NaN or infinite numbers, which no reader takes.
    """
    head, _ = _head(tensors, rows)
    yield head
    for name, array in _in_order(tensors):
        count = len(array) if rows is None else len(rows)
        step = max(1, ROWS_AT_ONCE // max(1, array[:1].nbytes))
        for first in range(0, count, step):
            chosen = slice(first, first + step) if rows is None else rows[first : first + step]
            piece = np.ascontiguousarray(array[chosen])
            if piece.dtype.kind == "f" and not np.isfinite(piece).all():
                raise StoreError(f"`{name}` would hold NaN or infinite numbers: check the model and its dtype")
            yield piece.reshape(-1).view(np.uint8).data


def tensors_size(tensors: Mapping[str, np.ndarray], rows: np.ndarray | None = None) -> int:
    """How many bytes `tensor_chunks` gives.

    tensors, rows: as it takes them.
    """
    head, size = _head(tensors, rows)
    return len(head) + size


def _in_order(tensors: Mapping[str, np.ndarray]) -> list[tuple[str, np.ndarray]]:
    order = list(_NAMES)
    return sorted(tensors.items(), key=lambda item: (order.index(item[1].dtype), item[0]))


def _head(tensors: Mapping[str, np.ndarray], rows: np.ndarray | None) -> tuple[bytes, int]:
    """What stands before the tensors, and how many bytes these have."""
    header: dict[str, Any] = {}
    offset = 0
    for name, array in _in_order(tensors):
        shape = list(array.shape) if rows is None else [len(rows), *array.shape[1:]]
        end = offset + math.prod(shape) * array.dtype.itemsize
        header[name] = {"dtype": _NAMES[array.dtype], "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, offset


def read_tensors(data: Data, wanted: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """The tensors of a safetensors file, views of its bytes.

    data: the bytes.
    wanted: what it must hold, by name.

    Raises ValueError, in one line, unless it holds just that.
    """
    size = len(data)
    length = int.from_bytes(data[:8], "little")
    if size - length < 8 or not 2 <= length <= HEADER_LIMIT or length % 8:
        raise ValueError(f"its header claims {length} bytes")
    start = 8 + length
    header = unique_keys(bytes(data[8:start]))
    needed = {name for name, tensor in wanted.items() if tensor.required}
    if not isinstance(header, dict) or not needed <= header.keys() <= wanted.keys():
        names = sorted(header)[:5] if isinstance(header, dict) else header
        raise ValueError(f"it holds the tensors {names!s:.80}, not {sorted(needed)}")
    entries = [(name, *_entry(name, entry)) for name, entry in header.items()]
    tensors, end = {}, 0
    for name, dtype, shape, offsets in sorted(entries, key=lambda entry: entry[3]):
        want = wanted[name]
        fits = dtype == want.dtype and len(shape) == len(want.shape)
        if not fits or not all(w is None or w == s for s, w in zip(shape, want.shape, strict=True)):
            raise ValueError(
                f"tensor {name!r} is {dtype} {shape!s:.60}, not {np.dtype(want.dtype)} "
                f"{['any' if n is None else n for n in want.shape]}"
            )
        count = math.prod(shape)
        begin, past = offsets
        if begin != end or past - begin != count * dtype.itemsize or past > size - start or begin % dtype.itemsize:
            raise ValueError(f"tensor {name!r} of shape {shape!s:.60} lies at {offsets!s:.60}")
        tensors[name] = np.frombuffer(data, dtype, count, start + begin).reshape(shape)
        end = past
    if start + end != size:
        raise ValueError(f"{size - start - end} bytes follow its tensors")
    return tensors


def unique_keys(data: bytes) -> Any:
    """Parse JSON in which no object has a key twice and numbers are finite.

    data: the text.

    Raises ValueError for any other.
    """

    def unique(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for key, value in pairs:
            if key in values:
                raise ValueError(f"key {key!r:.60} is given twice")
            values[key] = value
        return values

    def refuse(number: str) -> Any:
        raise ValueError(f"{number} is not a number")

    try:
        return json.loads(data, object_pairs_hook=unique, parse_constant=refuse)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def _entry(name: str, entry: Any) -> tuple[np.dtype, list[int], list[int]]:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"tensor {name!r} is described by {entry!s:.60}")
    shape, offsets = entry["shape"], entry["data_offsets"]
    numbers = isinstance(shape, list) and isinstance(offsets, list) and len(offsets) == 2 and len(shape) <= 4
    if not numbers or not all(type(n) is int and 0 <= n < 1 << 48 for n in [*shape, *offsets]):
        raise ValueError(f"tensor {name!r} is described by {entry!s:.60}")
    if not isinstance(entry["dtype"], str) or entry["dtype"] not in _DTYPES:
        raise ValueError(f"tensor {name!r} is {entry['dtype']!s:.20}, which no store holds")
    return np.dtype(_DTYPES[entry["dtype"]]), shape, offsets
