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
from memoir_index.plan import Plan, choose_plan, sketch_bits

__all__ = [
    "CodeError",
    "HammingIndex",
    "Hits",
    "MemoirError",
    "Plan",
    "check_codes",
    "choose_plan",
    "hamming_radius",
    "overlap_from_hamming",
    "pack",
    "popcount",
    "sketch_bits",
    "unpack",
]
