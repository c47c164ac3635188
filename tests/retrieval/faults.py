"""A disk that fails, a process that ends and a power cut, each at the n-th change that `files.py` makes to the disk."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from memoir_retrieval.store import files
from memoir_retrieval.store.manifest import MANIFEST

Break = Callable[[], None]


def full() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def read_only() -> None:
    raise OSError(errno.EROFS, os.strerror(errno.EROFS))


def broken() -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@contextmanager
def fault(n: int, strike: Break, torn: bool = False, for_ever: bool = False) -> Iterator[list[str]]:
    """Call `strike` instead of change n (from 1; 0: never), or where `torn` in the middle of it, if it is a write.

    for_ever: and instead of every later one. Yields the names of the changes that were asked for, as they come.
    """
    operations: list[str] = []
    real = files._call

    def call(operation: Callable[..., Any], *arguments: Any) -> Any:
        operations.append(operation.__name__)
        if len(operations) == n or (for_ever and len(operations) > n > 0):
            if torn and operation is os.write:
                operation(arguments[0], arguments[1][: len(arguments[1]) // 2])
            strike()
        return real(operation, *arguments)

    files._call = call
    try:
        yield operations
    finally:
        files._call = real


class Disk:
    """What a power cut leaves of one folder: synced bytes under names that a sync of the folder made durable.

    Three outcomes bound the possible ones: `early`, in which nothing else has reached the disk; `renamed`, in which of
    the names only that of the manifest has; and `late`, in which all have, but files that were not synced are torn.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.names: dict[str, int] = {path.name: path.stat().st_ino for path in folder.iterdir()}
        self.synced = {path.stat().st_ino: path.read_bytes() for path in folder.iterdir()}

    def call(self, operation: Callable[..., Any], *arguments: Any) -> Any:
        done = operation(*arguments)
        if operation is os.fsync:
            path = Path(f"/proc/self/fd/{arguments[0]}").resolve()
            if path == self.folder:
                self.names = {p.name: p.stat().st_ino for p in path.iterdir()}
            elif path.parent == self.folder:
                self.synced[path.stat().st_ino] = path.read_bytes()
        return done

    def early(self, out: Path) -> None:
        out.mkdir()
        for name, inode in self.names.items():
            (out / name).write_bytes(self.synced.get(inode, b""))

    def renamed(self, out: Path) -> None:
        self.early(out)
        now = self.folder / MANIFEST
        if now.exists() and (content := self.synced.get(now.stat().st_ino)) is not None:
            (out / MANIFEST).write_bytes(content)

    def late(self, out: Path) -> None:
        out.mkdir()
        for path in self.folder.iterdir():
            content = self.synced.get(path.stat().st_ino)
            (out / path.name).write_bytes(path.read_bytes()[: path.stat().st_size // 2] if content is None else content)


@contextmanager
def power_cut(n: int, folder: Path) -> Iterator[Disk]:
    """Cut the power instead of change n: whatever comes later fails too. Yields what the disk then holds."""
    disk = Disk(folder)
    with fault(n, broken, for_ever=True):
        broken_call = files._call
        files._call = lambda operation, *arguments: broken_call(
            _named(lambda *a: disk.call(operation, *a), operation), *arguments
        )
        yield disk


def _named(function: Callable[..., Any], like: Callable[..., Any]) -> Callable[..., Any]:
    function.__name__ = like.__name__
    return function


def kill_at(n: int, change: Callable[[], None]) -> int:
    """Run `change` in a process of its own that kills itself in the middle of change n of the disk.

    Returns how many changes it made, or the negative number of the signal that ended it.
    """
    child = os.fork()
    if not child:
        signal.alarm(60)  # a child that hangs ends by another signal than the one that is asked for
        torch.set_num_threads(1)  # threads do not survive a fork
        changes = 255
        try:
            with fault(n, killed, torn=True) as operations:
                change()
            changes = len(operations)
        finally:
            os._exit(changes)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
