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

# Runs in a process of its own, since neither a mount nor a limit can be taken back. Arguments: what fails, the store,
# the edit file. It prints what the command printed, and then what became of the store.
SCRIPT = """
import os, resource, subprocess, sys
from pathlib import Path
from memoir_retrieval import EditStore
from memoir_retrieval.cli import main

kind, store, file = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
filler = store.parent / "filler"
if kind == "space":  # fill the file system up
    with open(filler, "wb", buffering=0) as out:
        try:
            while True:
                out.write(bytes(4096))
        except OSError:
            pass
elif kind == "mount":
    subprocess.run(["mount", "-o", "remount,ro", store.parent], check=True)
elif kind == "folder":
    os.chmod(store, 0o555)
else:
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, resource.RLIM_INFINITY))

def contents():
    return {path.name: path.read_bytes() for path in store.iterdir()}

def edit():
    try:
        main(["edit", file, "--store", str(store), "--json"])
    except SystemExit as done:
        return done.code

before = contents()
print("first", edit())
print("same", contents() == before, len(EditStore.open(store).edits))
if kind == "mount":
    subprocess.run(["mount", "-o", "remount,rw", store.parent], check=True)
os.chmod(store, 0o755)
filler.unlink(missing_ok=True)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
print("again", edit(), len(EditStore.open(store).edits))
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


root = pytest.mark.skipif(not can_mount(), reason="no right to mount a file system (needs root)")
user = pytest.mark.skipif(os.geteuid() == 0, reason="root may write into any folder")


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        pytest.param(
            "space",
            r"no space left to write added-2.safetensors \([0-9.]+ kB\) in {store}: free some and run the same command "
            "again; the store is unchanged$",
            marks=root,
        ),
        (
            "size",
            r"{store}/added-2.safetensors would have [0-9.]+ kB, more .*: raise the limit \(`ulimit -f`\) or choose .*"
            "; the store is unchanged$",
        ),
        pytest.param(
            "mount",
            r"store {store} cannot be written: Read-only file system; choose a folder you may write$",
            marks=root,
        ),
        pytest.param(
            "folder", r"store {store} cannot be written: Permission denied; choose a folder you may write$", marks=user
        ),
    ],
)
def test_a_write_that_the_system_refuses(template: Path, tmp_path: Path, kind: str, said: str) -> None:
    folder, store = tmp_path / "disk", tmp_path / "disk" / "store"
    folder.mkdir()
    file = tmp_path / "more.jsonl"
    file.write_text('{"prompt": "When did it rain?", "target": "On Monday"}\n')
    run = f'cp -r "{template}" "{store}" && exec "{sys.executable}" -c "$SCRIPT" {kind} "{store}" "{file}"'
    command = ["sh", "-c", run]
    if kind in ("space", "mount"):  # the mount is seen by this command alone, and ends with it
        command = ["unshare", "--mount", "sh", "-c", f'mount -t tmpfs -o size=1m none "{folder}" && {run}']
    process = subprocess.run(command, env=os.environ | {"SCRIPT": SCRIPT}, capture_output=True, text=True, check=False)
    lines = process.stdout.splitlines()
    assert [line for line in lines if line.startswith(("first", "same", "again"))] == [
        "first 2",
        "same True 1",
        "again 0 2",
    ]
    complaints = [line for line in process.stderr.splitlines() if line.startswith("memoir: ")]
    assert len(complaints) == 1 and "Traceback" not in process.stderr
    assert re.search(said.format(store=store), complaints[0]), complaints[0]
