"""Masks as packed binary codes: D bits, exactly k ones, little bit order, D/8 bytes a row."""

from __future__ import annotations

import math
from operator import index as as_int

import numpy as np
from numpy.typing import NDArray

from memoir_index.errors import CodeError

Codes = NDArray[np.uint8]
Masks = NDArray[np.bool_]

_ONES_IN_BYTE: NDArray[np.uint8] = np.array([bin(byte).count("1") for byte in range(256)], dtype=np.uint8)


def check_shape(d: int, k: int) -> tuple[int, int]:
    """Return (d, k) as plain ints.

    Raises CodeError unless d is a positive multiple of 8 and 1 <= k <= d.
    """
    d, k = _check_bits(d), as_int(k)
    if not 1 <= k <= d:
        raise CodeError(f"k={k} ones do not fit a mask of d={d} bits: k must lie in 1..{d}")
    return d, k


def pack(masks: Masks) -> Codes:
    """Pack masks to uint8 codes [N, D/8]; bit i of a mask is bit i % 8 of byte i // 8.

    masks: bool [N, D].

    Raises CodeError for another dtype, another number of axes, or D not a multiple of 8.
    """
    masks = np.asarray(masks)
    if masks.dtype != np.bool_:
        raise CodeError(f"masks have dtype {masks.dtype}, not bool: pass `masks != 0`")
    if masks.ndim != 2:
        raise CodeError(f"masks have shape {masks.shape}, not [N, D]: pass one mask as `mask[None]`")
    _check_bits(masks.shape[1])
    return np.packbits(masks, axis=1, bitorder="little")


def unpack(codes: Codes, d: int) -> Masks:
    """Undo `pack`: bool masks [N, D].

    codes: uint8 [N, D/8].
    d: D, bits of a mask.

    Raises CodeError for another dtype, number of axes or width than d gives.
    """
    return np.unpackbits(check_layout(codes, _check_bits(d)), axis=1, bitorder="little").view(np.bool_)


def popcount(codes: Codes) -> NDArray[np.int64]:
    """Number of ones in every row, int64 [N].

    codes: uint8 [N, W].

    Raises CodeError for another dtype or number of axes.
    """
    codes = _check_bytes(codes)
    if not hasattr(np, "bitwise_count"):  # numpy 1.26
        return _popcount_table(codes)
    words = codes.view(np.uint64) if codes.size and codes.shape[1] % 8 == 0 else codes
    return np.bitwise_count(words).sum(axis=1, dtype=np.int64)


def overlap_from_hamming(dist: NDArray[np.integer] | int, k: int) -> NDArray[np.float64]:
    """Share of the k ones that two masks have in common, float64 in [0, 1], of the shape of dist.

    dist: Hamming distance in bits, whole numbers of any shape.
    k: ones of either mask.

    Two masks of k ones that share b of them differ in dist = 2(k - b) bits, so b/k = (k - dist/2)/k.
    """
    return np.asarray((k - np.asarray(dist, dtype=np.float64) / 2) / k, dtype=np.float64)


def hamming_radius(tau: float, k: int) -> int:
    """Largest Hamming distance, in bits, at which two masks of k ones still overlap by tau or more.

    tau: the least overlap/k, in (0, 1].
    k: ones of a mask.

    The rule is overlap/k >= tau, decided on whole bits: at least ceil(tau*k - 1e-9) shared ones, and never
    fewer than one. The 1e-9 absorbs the rounding of tau*k: 0.07 * 100 is 7.000000000000001 in floating
    point, and a mask with exactly 7 shared ones must still match.

    Raises CodeError unless 0 < tau <= 1.
    """
    if not 0 < tau <= 1:
        raise CodeError(f"tau={tau} is outside (0, 1]: pass the least share of common ones, such as 0.5")
    return 2 * (k - max(1, math.ceil(tau * k - 1e-9)))


def check_codes(codes: Codes, d: int, k: int, *, first_row: int = 0) -> Codes:
    """Return codes, C-contiguous (copied only if they were not), each row with exactly k ones.

    codes: uint8 [N, d/8].
    d: bits of a mask.
    k: its ones.
    first_row: what errors call the first row.

    Raises CodeError for a wrong d or k, dtype, number of axes or width, and for a row with another number of ones,
    naming the first such row.
    """
    d, k = check_shape(d, k)
    codes = check_layout(codes, d)
    ones = popcount(codes)
    wrong = np.flatnonzero(ones != k)
    if wrong.size:
        row = int(wrong[0])
        raise CodeError(
            f"code at row {first_row + row} has {ones[row]} ones, not k={k}: make masks with this k and this d={d}"
        )
    return codes


def _check_bits(d: int) -> int:
    d = as_int(d)
    if d <= 0 or d % 8:
        raise CodeError(f"d={d} bits do not fill whole bytes: d must be a positive multiple of 8")
    return d


def _check_bytes(codes: Codes) -> Codes:
    codes = np.asarray(codes)
    if codes.dtype != np.uint8:
        raise CodeError(f"codes have dtype {codes.dtype}, not uint8: pack bool masks with `pack(masks)`")
    if codes.ndim != 2:
        raise CodeError(f"codes have shape {codes.shape}, not [N, D/8]: pass one code as `code[None]`")
    return np.ascontiguousarray(codes)


def check_layout(codes: Codes, d: int) -> Codes:
    """Like `check_codes`, but without looking at the rows themselves."""
    codes = _check_bytes(codes)
    if codes.shape[1] != d // 8:
        raise CodeError(f"codes are {codes.shape[1]} bytes wide, not {d // 8}: these masks were not made with d={d}")
    return codes


def _popcount_table(codes: Codes) -> NDArray[np.int64]:
    return _ONES_IN_BYTE[codes].sum(axis=1, dtype=np.int64)
