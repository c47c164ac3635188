#!/usr/bin/env bash
# msgspec 0.22.0: two equal structs are encoded to different bytes under `omit_defaults=True`.
#
# Seen: a field is left out only if it holds the default *object*. A value that was computed or decoded and is equal to
# the default is written. So `a == b`, and encode(a) != encode(b), in JSON and in MessagePack.
# Expected: equal structs, equal bytes.
# Why it matters here: edits and decisions are such structs. A digest over encoded structs, and a promise of "same input,
# same bytes", hold only where every default is an interned or empty object, such as "", () or None.
# Source: seen by running; the documentation of `omit_defaults` names the check for empty collections only.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check msgspec==0.22.0
cd "$folder"
"$folder/venv/bin/python" - <<'PY'
import msgspec


class Settings(msgspec.Struct, omit_defaults=True):
    tau: float = 0.5
    requires: tuple[str, ...] = ("Example",)
    source: str = ""


default = Settings()
decoded = msgspec.json.decode(b'{"tau": 0.5, "requires": ["Example"], "source": ""}', type=Settings)
print("msgspec", msgspec.__version__)
print("equal:", default == decoded)
print(msgspec.json.encode(default), msgspec.json.encode(decoded))
assert default == decoded
assert msgspec.json.encode(default) == b"{}"
assert msgspec.json.encode(decoded) == b'{"tau":0.5,"requires":["Example"]}'
assert msgspec.msgpack.encode(default) != msgspec.msgpack.encode(decoded)
PY
