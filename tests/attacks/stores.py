"""Hostile stores: each function takes a sound store of `small_store` and makes it into an attack.

Except where the attack is on the digests themselves, sizes and digests are made to fit, as a forger would.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forge
import numpy as np
from safetensors.numpy import load, save
from test_store import D, H, K, masks, stored_edit, write

Attack = Callable[[Path], None]
ATTACKS: dict[str, tuple[str, Attack]] = {}
"""Name of the attack -> what the error must say (a regular expression), and the function."""

DEEP = b"[" * 200_000 + b"]" * 200_000


def small_store(folder: Path) -> None:
    """Three edits, of which edit 1 owns two masks, in two memories."""
    memories = np.random.default_rng(0).standard_normal((2, H, D)).astype(np.float32)
    edits = [stored_edit(i, memory=i % 2) for i in range(3)]
    rows, of = np.array([0, 1, 1, 2]), np.array([0, 1, 1, 0], dtype=np.int32)
    write(folder, memories=memories, codes=masks(4), ids=rows, memory_of=of, edits=edits)


def attack(says: str) -> Callable[[Attack], Attack]:
    def add(function: Attack) -> Attack:
        ATTACKS[function.__name__] = (says, function)
        return function

    return add


def also(name: str, says: str, function: Attack) -> None:
    ATTACKS[name] = (says, function)


# ---- the manifest ----------------------------------------------------------------------------------------------


def manifest_with(**values: Any) -> Attack:
    return lambda folder: forge.sign(folder, forge.manifest(folder) | values)


def file_with(kind: str, **values: Any) -> Attack:
    def change(folder: Path) -> None:
        entries = forge.manifest(folder)
        forge.sign(folder, entries | {kind: entries[kind] | values})

    return change


for name, value, says in (
    ("format_of_the_future", {"format": 10**30}, "has format 1e\\+30, this"),
    ("format_zero", {"format": 0}, "format 0"),
    ("format_text", {"format": "2"}, "damaged"),
    ("format_null", {"format": None}, "damaged"),
    ("generation_negative", {"generation": -1}, "generation -1"),
    ("generation_huge", {"generation": 10**40}, "damaged"),
    ("d_huge", {"d": 8 << 60}, "d 922"),
    ("d_odd", {"d": 63}, "d 63"),
    ("d_negative", {"d": -8}, "d -8"),
    ("d_other", {"d": 128}, "tensor '(memory|background|permutation)' is"),
    ("h_zero", {"h": 0}, "h 0"),
    ("h_other", {"h": H + 1}, "tensor 'memory' is float32"),
    ("k_zero", {"k": 0}, "k 0"),
    ("k_above_d", {"k": D + 1}, f"k {D + 1}"),
    ("k_other", {"k": K - 1}, f"row 0 has {K} ones, not k={K - 1}"),
    ("k_float", {"k": 12.5}, "damaged"),
    ("tau_zero", {"tau": 0}, "tau 0"),
    ("tau_negative", {"tau": -0.5}, "tau -0.5"),
    ("tau_above_one", {"tau": 1.01}, "tau 1.01"),
    ("tau_text", {"tau": "0.5"}, "damaged"),
    ("layer_negative", {"layer": -1}, "layer -1"),
    ("next_id_too_small", {"next_id": 2}, "id outside"),
    ("next_id_huge", {"next_id": 1 << 63}, "next_id|damaged"),
    ("seed_negative", {"seed": -1}, "seed -1"),
    ("untrained_miscounted", {"untrained": 1}, "0 edits of edits-1.jsonl are not trained, the manifest says 1"),
    ("unknown_key", {"extra": 1}, "extra"),
    ("span_rule_unknown", {"span": {"rule": "none"}}, "damaged"),
    ("span_text", {"span": "question"}, "damaged"),
    ("base_null", {"base": None}, "damaged"),
    ("base_without_layer", {"base": {"config": "", "tokenizer": ""}}, "damaged"),
    ("chat_number", {"chat": 1}, "damaged"),
    ("contexts_object", {"contexts": {}}, "damaged"),
    ("training_list", {"training": []}, "damaged"),
    ("model_number", {"model": 5}, "damaged"),
    ("files_null", {"memory": None}, "damaged"),
):
    also(f"manifest_{name}", says, manifest_with(**value))

for name, kind, value, says in (
    ("above", "memory", "../memory-1.safetensors", "forged"),
    ("absolute", "codes", "/etc/passwd", "forged"),
    ("device", "edits", "/dev/zero", "forged"),
    ("console", "edits", "CON", "forged"),
    ("nul_byte", "memory", "memory-1.safetensors\0", "forged"),
    ("newline", "memory", "memory-1.safetensors\n", "forged"),
    ("dots", "memory", "memory-1/../memory-1.safetensors", "forged"),
    ("other_kind", "memory", "codes-1.safetensors", "forged"),
    ("other_digits", "memory", "memory-١.safetensors", "forged"),
    ("itself", "edits", "memoir.json", "forged"),
    ("long", "edits", "edits-" + "1" * 5000 + ".jsonl", "forged"),
    ("missing_generation", "edits", "edits-7.jsonl", "edits-7.jsonl is missing"),
):
    also(f"name_{name}", says, file_with(kind, name=value))


def _size(folder: Path, kind: str) -> int:
    return forge.manifest(folder)[kind]["size"]


for kind in forge.KINDS:
    also(f"{kind}_size_negative", "of -1 bytes", file_with(kind, size=-1))
    also(f"{kind}_size_huge", f"{kind} of 10|damaged", file_with(kind, size=10**18))
    also(
        f"{kind}_size_off_by_one", "the manifest says", lambda f, k=kind: file_with(k, size=len(forge.get(f, k)) + 1)(f)
    )
    also(f"{kind}_digest_other", "sha256 is not the manifest's", file_with(kind, sha256="0" * 63 + "1"))
    also(f"{kind}_digest_empty", "sha256 is not the manifest's", file_with(kind, sha256=""))


@attack("its sha256 is not that of its content")
def manifest_flipped_bit(folder: Path) -> None:
    path = folder / "memoir.json"
    path.write_bytes(path.read_bytes().replace(b'"tau": 0.5', b'"tau": 0.7'))


@attack("its sha256 is not that of its content")
def manifest_digest_empty(folder: Path) -> None:
    (folder / "memoir.json").write_bytes(json.dumps(forge.manifest(folder) | {"sha256": ""}).encode())


@attack("format 1 with a sha256")
def manifest_format_1_with_a_digest(folder: Path) -> None:
    forge.sign(folder, forge.manifest(folder) | {"format": 1})


@attack("span.acts last in format 4")
def manifest_of_a_reader_that_acts_elsewhere(folder: Path) -> None:
    entries = forge.manifest(folder)
    forge.sign(folder, entries | {"format": 4, "span": entries["span"] | {"acts": "last"}})


@attack("span.behind 5 with span.acts last in format 6")
def manifest_of_a_reader_that_acts_earlier(folder: Path) -> None:
    entries = forge.manifest(folder)
    forge.sign(folder, entries | {"format": 6, "span": entries["span"] | {"acts": "last", "behind": 5}})


@attack("span.behind -1")
def manifest_that_acts_before_the_question(folder: Path) -> None:
    entries = forge.manifest(folder)
    forge.sign(folder, entries | {"span": entries["span"] | {"acts": "last", "behind": -1}})


@attack("judge 1-0 in format 5")
def manifest_of_a_reader_without_a_judge(folder: Path) -> None:
    forge.sign(folder, forge.manifest(folder) | {"format": 5, "judge": "1-0"})


@attack("damaged")
def manifest_truncated(folder: Path) -> None:
    path = folder / "memoir.json"
    path.write_bytes(path.read_bytes()[:-40])


@attack("damaged")
def manifest_empty(folder: Path) -> None:
    (folder / "memoir.json").write_bytes(b"")


@attack("more than the 16777216 that such a file may have")
def manifest_of_20_megabytes(folder: Path) -> None:
    path = folder / "memoir.json"
    path.write_bytes(path.read_bytes() + b" " * (20 << 20))


@attack("more than the 16777216 that such a file may have")
def manifest_of_10_gigabytes(folder: Path) -> None:
    os.truncate(folder / "memoir.json", 10 << 30)


@attack("nested too deep")
def manifest_deep(folder: Path) -> None:
    text = json.dumps(forge.manifest(folder)).encode()
    forge.sign(folder, text.replace(b'"contexts":', b'"contexts": [' + DEEP + b'], "contexts2":'))


@attack("is given twice")
def manifest_key_twice(folder: Path) -> None:
    text = json.dumps(forge.manifest(folder) | {"sha256": "0" * 64}).encode()
    forge.sign(folder, text.replace(b'"tau": 0.5', b'"tau": 0.5, "tau": 0.9'))


@attack("NaN is not a number")
def manifest_nan(folder: Path) -> None:
    forge.sign(folder, forge.manifest(folder) | {"tau": float("nan")})


@attack("damaged")
def manifest_endless_integer(folder: Path) -> None:
    text = json.dumps(forge.manifest(folder) | {"sha256": "0" * 64}).encode()
    forge.sign(folder, text.replace(b'"seed": 0', b'"seed": ' + b"9" * 1_000_000))


@attack("damaged")
def manifest_in_utf_16(folder: Path) -> None:
    (folder / "memoir.json").write_bytes(json.dumps(forge.manifest(folder)).encode("utf-16"))


# ---- what the names stand for ----------------------------------------------------------------------------------


def in_place(target: str, make: Callable[[Path], None]) -> Attack:
    def change(folder: Path) -> None:
        path = folder / (target if target == "memoir.json" else forge.manifest(folder)[target]["name"])
        path.rename(folder / "real")
        make(path)

    return change


for target in ("memoir.json", *forge.KINDS):
    odd = "is a link, a folder or a device"
    also(f"{target}_is_a_link", odd, in_place(target, lambda path: path.symlink_to("real")))
    also(f"{target}_is_a_link_to_a_device", odd, in_place(target, lambda path: path.symlink_to("/dev/zero")))
    also(f"{target}_is_a_link_to_itself", odd, in_place(target, lambda path: path.symlink_to(path.name)))
    also(f"{target}_is_a_pipe", odd, in_place(target, lambda path: os.mkfifo(path)))
    also(f"{target}_is_a_folder", odd, in_place(target, lambda path: path.mkdir()))
for kind in forge.KINDS:
    also(f"{kind}_missing", "is missing", in_place(kind, lambda path: None))


# ---- tensors ---------------------------------------------------------------------------------------------------


def with_header(kind: str, change: Callable[[dict[str, Any]], Any]) -> Attack:
    """Change the header of a safetensors file: its object in place, or give other bytes."""

    def forged(folder: Path) -> None:
        data = forge.get(folder, kind)
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        given = change(header)
        text = given if isinstance(given, bytes) else json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        forge.put(folder, kind, len(text).to_bytes(8, "little") + text + data[8 + length :])

    return forged


def with_bytes(kind: str, change: Callable[[bytes], bytes]) -> Attack:
    return lambda folder: forge.put(folder, kind, change(forge.get(folder, kind)))


def claims(length: int) -> Callable[[bytes], bytes]:
    return lambda data: length.to_bytes(8, "little") + data[8:]


def entry(tensor: str, **values: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda header: header[tensor].update(values)


def renamed(old: str, new: str) -> Callable[[dict[str, Any]], Any]:
    return lambda header: header.update({new: header.pop(old)})


for kind, tensor in (("memory", "memory"), ("codes", "codes")):
    for name, says, make in (
        ("empty", "header claims|the manifest says", with_bytes(kind, lambda data: b"")),
        ("seven_bytes", "header claims", with_bytes(kind, lambda data: data[:7])),
        ("truncated", "lies at", with_bytes(kind, lambda data: data[:-8])),
        ("longer", "bytes follow its tensors", with_bytes(kind, lambda data: data + bytes(8))),
        ("header_of_10_gigabytes", "header claims", with_bytes(kind, claims(10 << 30))),
        ("header_of_2_to_the_63", "header claims", with_bytes(kind, claims(1 << 63))),
        ("header_of_nothing", "header claims", with_bytes(kind, claims(0))),
        ("header_beyond_the_end", "header claims", with_bytes(kind, lambda data: claims(len(data))(data))),
        ("header_unaligned", "header claims", with_bytes(kind, claims(3))),
        ("header_no_json", "damaged", with_header(kind, lambda h: b"x" * 64)),
        ("header_no_object", "holds the tensors", with_header(kind, lambda h: b"[1, 2]")),
        ("header_deep", "header claims", with_header(kind, lambda h: DEEP)),
        ("header_less_deep", "nested too deep", with_header(kind, lambda h: b"[" * 20_000 + b"]" * 20_000)),
        ("header_no_utf8", "damaged", with_header(kind, lambda h: b'{"\xff": 1}')),
        ("header_key_twice", "is given twice", with_header(
            kind, lambda h, t=tensor: json.dumps(h)[:-1].encode() + b', "%s": 1}' % t.encode())),
        ("metadata", "holds the tensors", with_header(kind, lambda h: h.update({"__metadata__": {"a": "b"}}))),
        ("tensor_missing", "holds the tensors", with_header(kind, lambda h, t=tensor: h.pop(t))),
        ("tensor_renamed", "holds the tensors", with_header(kind, renamed(tensor, "other"))),
        ("tensor_null", "is described by None", with_header(kind, lambda h, t=tensor: h.update({t: None}))),
        ("dtype_other", f"tensor '{tensor}' is int32", with_header(kind, entry(tensor, dtype="I32"))),
        ("dtype_unknown", "which no store holds", with_header(kind, entry(tensor, dtype="F4"))),
        ("dtype_number", "which no store holds", with_header(kind, entry(tensor, dtype=7))),
        ("dtype_list", "which no store holds", with_header(kind, entry(tensor, dtype=["F32"]))),
        ("shape_flat", f"tensor '{tensor}' is", with_header(kind, entry(tensor, shape=[2 * H * D]))),
        ("shape_negative", "is described by", with_header(kind, entry(tensor, shape=[-1, 8]))),
        ("shape_float", "is described by", with_header(kind, entry(tensor, shape=[4.0, 8]))),
        ("shape_bool", "is described by", with_header(kind, entry(tensor, shape=[True, 8]))),
        ("shape_text", "is described by", with_header(kind, entry(tensor, shape="48"))),
        ("shape_huge", "is described by", with_header(kind, entry(tensor, shape=[10**30, 8]))),
        ("shape_of_many", "is described by", with_header(kind, entry(tensor, shape=[1] * 2000))),
        ("shape_empty", f"tensor '{tensor}' is", with_header(kind, entry(tensor, shape=[]))),
        ("offsets_beyond", "lies at", with_header(kind, entry(tensor, data_offsets=[0, 1 << 40]))),
        ("offsets_backwards", "lies at", with_header(kind, entry(tensor, data_offsets=[64, 0]))),
        ("offsets_negative", "is described by", with_header(kind, entry(tensor, data_offsets=[-8, 0]))),
        ("offsets_one", "is described by", with_header(kind, entry(tensor, data_offsets=[0]))),
        ("offsets_overlapping", "lies at", with_header(
            kind, lambda h: [e.update(data_offsets=[0, 512]) for e in h.values()])),
        ("offsets_huge", "is described by", with_header(kind, entry(tensor, data_offsets=[0, 10**40]))),
    ):  # fmt: skip
        also(f"{kind}_{name}", says, make)


def with_tensor(kind: str, tensor: str, change: Callable[[np.ndarray], Any]) -> Attack:
    """Change one tensor, its array in place or by giving another."""

    def forged(folder: Path) -> None:
        tensors = {name: array.copy() for name, array in load(forge.get(folder, kind)).items()}
        given = change(tensors[tensor])
        tensors[tensor] = tensors[tensor] if given is None else given
        forge.put(folder, kind, save(tensors))

    return forged


def at(index: Any, value: float) -> Callable[[np.ndarray], None]:
    return lambda array: array.__setitem__(index, value)


def one_bit(array: np.ndarray) -> None:
    array[2, 3] ^= 16


for name, says, make in (
    ("memory_with_nan", "NaN or infinite", with_tensor("memory", "memory", at((1, 3, 5), np.nan))),
    ("memory_with_infinity", "NaN or infinite", with_tensor("memory", "memory", at((0, 0, 0), -np.inf))),
    ("memory_float64", "'memory' is float64", with_tensor("memory", "memory", lambda a: a.astype(np.float64))),
    ("memory_transposed", "'memory' is float32", with_tensor("memory", "memory", lambda a: a.swapaxes(1, 2).copy())),
    ("memory_too_few", "a memory that", with_tensor("memory", "memory", lambda a: a[:1].copy())),
    ("background_with_nan", "NaN or infinite", with_tensor("memory", "background", at(0, np.nan))),
    ("background_short", "'background' is", with_tensor("memory", "background", lambda a: a[:-1].copy())),
    ("permutation_repeats", "no permutation", with_tensor("memory", "permutation", lambda a: at(0, a[1])(a))),
    ("permutation_out_of_range", "no permutation", with_tensor("memory", "permutation", at(0, D))),
    ("permutation_negative", "no permutation", with_tensor("memory", "permutation", at(0, -(1 << 63)))),
    ("codes_one_bit_more_or_less", "row 2 has 1[13] ones, not k=12", with_tensor("codes", "codes", one_bit)),
    ("codes_all_zero", "row 0 has 0 ones", with_tensor("codes", "codes", lambda a: a * 0)),
    ("codes_all_ones", "row 0 has 64 ones", with_tensor("codes", "codes", lambda a: a * 0 + 255)),
    ("codes_wider", "'codes' is uint8", with_tensor("codes", "codes", lambda a: np.hstack([a, a]))),
    ("codes_one_row_less", "rows", with_tensor("codes", "codes", lambda a: a[:-1].copy())),
    ("codes_none", "rows", with_tensor("codes", "codes", lambda a: a[:0].copy())),
    ("ids_negative", "id outside", with_tensor("codes", "ids", at(0, -1))),
    ("ids_beyond", "id outside", with_tensor("codes", "ids", at(0, 3))),
    ("ids_huge", "id outside", with_tensor("codes", "ids", at(0, (1 << 63) - 1))),
    ("ids_unknown", "edit ids .* differ", with_tensor("codes", "ids", at(3, 0))),
    ("ids_int32", "'ids' is int32", with_tensor("codes", "ids", lambda a: a.astype(np.int32))),
    ("memory_of_beyond", "a memory that", with_tensor("codes", "memory_of", at(0, 2))),
    ("memory_of_negative", "a memory that", with_tensor("codes", "memory_of", at(0, -1))),
    ("memory_of_another", "different memories", with_tensor("codes", "memory_of", at(2, 0))),
):
    also(name, says, make)


# ---- edits -----------------------------------------------------------------------------------------------------


def with_line(line: bytes) -> Attack:
    return with_bytes("edits", lambda data: line + data[data.index(b"\n") :])


LINE = b'{"id":0,"prompt":"p0","target":"t","created":"","loss":0.01,"steps":5%s}'
for name, says, make in (
    ("no_json", "line 1: ", with_line(b"{")),
    ("list", "line 1: ", with_line(b"[]")),
    ("no_utf8", "line 1: ", with_line(LINE % b',"source":"\xff"')),
    ("deep", "line 1: ", with_line(LINE % (b',"x":' + DEEP))),
    ("key_twice", "'id' is given twice", with_line(LINE % b',"id":0')),
    ("id_negative", "line 1: id -1", with_line((LINE % b"").replace(b'"id":0', b'"id":-1'))),
    ("id_huge", "line 1: ", with_line((LINE % b"").replace(b'"id":0', b'"id":' + b"9" * 400))),
    ("id_of_64_bits", "line 1: id 18446744073709551615", with_line(
        (LINE % b"").replace(b":0,", b":18446744073709551615,"))),
    ("id_of_another", "edit ids .* differ", with_line((LINE % b"").replace(b'"id":0', b'"id":1'))),
    ("id_text", "line 1: ", with_line((LINE % b"").replace(b'"id":0', b'"id":"0"'))),
    ("memory_of_another", "different memories", with_line(LINE % b',"memory":1')),
    ("memory_negative", "line 1: id 0, memory -1", with_line(LINE % b',"memory":-1')),
    ("memory_huge", "line 1: ", with_line(LINE % b',"memory":4294967296')),
    ("loss_nan", "line 1: ", with_line((LINE % b"").replace(b"0.01", b"NaN"))),
    ("prompt_missing", "line 1: ", with_line(b'{"id":0,"target":"t","created":"","loss":1,"steps":5}')),
    ("prompt_null", "line 1: ", with_line((LINE % b"").replace(b'"p0"', b"null"))),
    ("blank_line", "line 1: ", with_line(b"")),
    ("nul_bytes", "line 1: ", with_line(bytes(64))),
    ("last_line_without_end", "last line has no end", with_bytes("edits", lambda data: data[:-1])),
    ("bytes_behind", "last line has no end", with_bytes("edits", lambda data: data + b"\0")),
    ("one_less", "edit ids .* differ", with_bytes("edits", lambda data: data[: data[:-1].rindex(b"\n") + 1])),
    ("one_twice", "edit ids .* differ", with_bytes("edits", lambda data: data + data[: data.index(b"\n") + 1])),
    ("none", "edit ids .* differ", with_bytes("edits", lambda data: b"")),
    ("two_on_a_line", "line 1: ", with_bytes("edits", lambda data: data.replace(b"\n", b" ", 1))),
    ("carriage_returns", "last line has no end", with_bytes("edits", lambda data: data.replace(b"\n", b"\r"))),
):  # fmt: skip
    also(f"edits_{name}", says, make)


@attack("header claims|the manifest says")
def codes_of_a_gigabyte_of_nothing(folder: Path) -> None:
    entries = forge.manifest(folder)
    os.truncate(folder / entries["codes"]["name"], 0)
    os.truncate(folder / entries["codes"]["name"], 1 << 30)
    forge.sign(folder, entries | {"codes": entries["codes"] | {"size": 1 << 30}})
