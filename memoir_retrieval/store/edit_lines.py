"""The edits of a store, one JSON object a line, decoded when they are asked for."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import overload

import msgspec
import numpy as np

from memoir_retrieval.edits.record import StoredEdit
from memoir_retrieval.errors import StoreError
from memoir_retrieval.store.files import CHUNK, Data
from memoir_retrieval.store.tensors import unique_keys

__all__ = ["JoinedEdits", "StoredEdits", "edit_chunks"]

_decode = msgspec.json.Decoder(StoredEdit).decode
_encode = msgspec.json.Encoder().encode


class _Edits(Sequence[StoredEdit]):
    """A sequence of edits that are decoded when they are asked for."""

    def _edit(self, number: int) -> StoredEdit:
        raise NotImplementedError

    @overload
    def __getitem__(self, index: int) -> StoredEdit: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[StoredEdit, ...]: ...
    def __getitem__(self, index: int | slice) -> StoredEdit | tuple[StoredEdit, ...]:
        numbers = range(len(self))[index]
        if isinstance(numbers, range):
            return tuple(self._edit(number) for number in numbers)
        return self._edit(numbers)

    def __iter__(self) -> Iterator[StoredEdit]:
        return (self._edit(number) for number in range(len(self)))


class StoredEdits(_Edits):
    """Lines of a file, in file order. A line that is no edit raises StoreError, naming the file, when it is read."""

    def __init__(self, data: Data, name: str):
        """Nothing is read yet.

        data: the file's bytes, kept as they are.
        name: for messages.
        """
        self._data = data
        self._name = name

    @cached_property
    def _ends(self) -> np.ndarray:
        """Offset behind the newline of each line: int64 [N]."""
        ends = [
            np.flatnonzero(np.frombuffer(self._data, np.uint8, min(CHUNK, len(self._data) - start), start) == 10)
            + start
            + 1
            for start in range(0, len(self._data), CHUNK)
        ]
        return np.concatenate(ends) if ends else np.empty(0, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends)

    def check(self) -> None:
        """Decode every line. Raises StoreError for one that is no edit, and for bytes behind the last newline."""
        for number in range(len(self)):
            self._edit(number, strict=True)
        if len(self._data) != (self._ends[-1] if len(self) else 0):
            raise StoreError(f"{self._name} is damaged (its last line has no end): restore it from a backup")

    def _edit(self, number: int, strict: bool = False) -> StoredEdit:
        line = bytes(self._data[self._ends[number - 1] if number else 0 : self._ends[number] - 1])
        try:
            edit = _decode(line)
            if not (0 <= edit.id < 1 << 63 and 0 <= edit.memory < 1 << 31):
                raise ValueError(f"id {edit.id}, memory {edit.memory}")
            if strict and _encode(edit) != line:  # not as we write it: keys of a later version, or a key twice
                unique_keys(line)
        except (ValueError, RecursionError) as error:
            why = " ".join(str(error).split())
            raise StoreError(
                f"{self._name} is damaged (line {number + 1}: {why:.200}): restore it from a backup"
            ) from error
        return edit


class JoinedEdits(_Edits):
    """The edits of one file after those of another."""

    def __init__(self, *parts: StoredEdits):
        """parts: the edits of each file, one behind the other."""
        self._parts = parts
        self._starts = np.cumsum([0, *(len(part) for part in parts)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def check(self) -> None:
        """See `StoredEdits.check`."""
        for part in self._parts:
            part.check()

    def _edit(self, number: int) -> StoredEdit:
        part = int(np.searchsorted(self._starts, number, side="right")) - 1
        return self._parts[part][number - int(self._starts[part])]


def edit_chunks(edits: Iterable[StoredEdit]) -> Iterator[bytes]:
    """The bytes of a file of edits, in pieces of at least a megabyte.

    edits: all of them, in order.

    Raises StoreError for a loss of NaN or infinity, which JSON cannot hold.
    """
    held: list[bytes] = []
    size = 0
    for edit in edits:
        if not math.isfinite(edit.loss):
            raise StoreError(f"edit {edit.id} would have the loss {edit.loss}: check the model and its dtype")
        held.append(_encode(edit) + b"\n")
        size += len(held[-1])
        if size > 1 << 20:
            yield b"".join(held)
            held, size = [], 0
    yield b"".join(held)
