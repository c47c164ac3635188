"""Packed masks and an exact nearest-mask index over FAISS."""

from memoir_index.codes import (
    check_codes,
    hamming_radius,
    overlap_from_hamming,
    pack,
    popcount,
    unpack,
)
from memoir_index.errors import CodeError, MemoirError
from memoir_index.hamming import HammingIndex, Hits

__all__ = [
    "CodeError",
    "HammingIndex",
    "Hits",
    "MemoirError",
    "check_codes",
    "hamming_radius",
    "overlap_from_hamming",
    "pack",
    "popcount",
    "unpack",
]
