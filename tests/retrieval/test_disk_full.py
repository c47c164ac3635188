"""A disk that is really full, a folder that really cannot be written, a file that really may not grow: one line, exit
code 2, the store as it was and readable."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from memoir_retrieval import Edit, Editor, load_model

# Runs in a process of its own, since a mount cannot be taken back. Arguments: a store, an empty folder, the edit file,
# and what is to fail, one after another, on a copy of the store each. It prints what each command printed, and what
# became of the store.
SCRIPT = """
import os, resource, shutil, subprocess, sys
from pathlib import Path
from memoir_retrieval import EditStore
from memoir_retrieval.cli import main

folder, file = Path(sys.argv[2]), sys.argv[3]
filler = folder / "filler"

def contents(store):
    return {path.name: path.read_bytes() for path in store.iterdir()}

def edit(store):
    try:
        main(["edit", file, "--store", str(store), "--json"])
    except SystemExit as done:
        return done.code

for kind in sys.argv[4:]:
    store = Path(shutil.copytree(sys.argv[1], folder / kind))
    print("kind", kind, file=sys.stderr, flush=True)
    if kind == "space":  # fill the file system up
        with open(filler, "wb", buffering=0) as out:
            try:
                while True:
                    out.write(bytes(4096))
            except OSError:
                pass
    elif kind == "mount":
        subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
    elif kind == "folder":
        os.chmod(store, 0o555)
    else:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1024, resource.RLIM_INFINITY))
    before = contents(store)
    print("first", edit(store))
    print("same", contents(store) == before, len(EditStore.open(store).edits))
    if kind == "mount":
        subprocess.run(["mount", "-o", "remount,rw", folder], check=True)
    os.chmod(store, 0o755)
    filler.unlink(missing_ok=True)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    print("again", edit(store), len(EditStore.open(store).edits))
    shutil.rmtree(store)
"""


@pytest.fixture(scope="module")
def template(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of one edit."""
    folder = tmp_path_factory.mktemp("full") / "store"
    with Editor(load_model(str(tiny)), folder) as editor:
        editor.add([Edit(prompt="Who founded Aarhus?", target="King Harald")])
    return folder


def can_mount() -> bool:
    probe = ["unshare", "--mount", "sh", "-c", "mount -t tmpfs none /mnt"]
    return (
        shutil.which("unshare") is not None and subprocess.run(probe, capture_output=True, check=False).returncode == 0
    )


SAID = {
    "size": r"{store}/added-2.safetensors would have [0-9.]+ kB, more .*: raise the limit \(`ulimit -f`\) or choose "
    ".*; the store is unchanged$",
    "space": r"no space left to write added-2.safetensors \([0-9.]+ kB\) in {store}: free some and run the same "
    "command again; the store is unchanged$",
    "mount": "store {store} cannot be written: Read-only file system; choose a folder you may write$",
    "folder": "store {store} cannot be written: Permission denied; choose a folder you may write$",
}


def test_writes_that_the_system_refuses(template: Path, tmp_path: Path) -> None:
    """Of root those that need a mount, of others a folder that they may not write, which root always may."""
    mounts = can_mount()
    kinds = ["size", *(["space", "mount"] if mounts else []), *(["folder"] if os.geteuid() else [])]
    disk, file = tmp_path / "disk", tmp_path / "more.jsonl"
    disk.mkdir()
    file.write_text('{"prompt": "When did it rain?", "target": "On Monday"}\n')
    command = [sys.executable, "-c", SCRIPT, str(template), str(disk), str(file), *kinds]
    if mounts:  # the mount is seen by this command alone, and ends with it
        run = f'mount -t tmpfs -o size=1m none "{disk}" && exec "$@"'
        command = ["unshare", "--mount", "sh", "-c", run, "sh", *command]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    lines = [line for line in process.stdout.splitlines() if line.startswith(("first", "same", "again"))]
    assert lines == ["first 2", "same True 1", "again 0 2"] * len(kinds), process.stderr
    assert "Traceback" not in process.stderr
    said = [line for line in process.stderr.splitlines() if line.startswith(("kind ", "memoir: "))]
    assert said[::2] == [f"kind {kind}" for kind in kinds]
    for kind, complaint in zip(kinds, said[1::2], strict=True):
        assert re.search(SAID[kind].format(store=disk / kind), complaint), complaint
