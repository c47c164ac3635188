"""The audit log: one JSON object per line, appended and synced, beside the store's other files."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from memoir_retrieval.errors import ConfigError
from memoir_retrieval.store.files import open_shared

__all__ = ["AUDIT", "NAME_VARIABLE", "AuditLog", "Entries", "server_name"]

AUDIT = "audit.jsonl"
NAME_VARIABLE = "MEMOIR_SERVER_NAME"
LOCK_S = 5.0  # another server that writes has done so by then

# The whole write: tests take bytes from it, as a full or a slow device does.
_write = os.write


class Entries(NamedTuple):
    """What the log holds.

    lines: the entries, oldest first.
    torn: how many lines are no entry: a crash or a full disk cut them off.
    """

    lines: list[dict[str, Any]]
    torn: int


class AuditLog:
    """`audit.jsonl` of a store. Written by servers; nothing here changes or removes a line."""

    def __init__(self, folder: Path, server: str):
        """folder: the store's.
        server: this one, see `server_name`; several may share a store.
        """
        self._path, self._server = folder / AUDIT, server
        self._lock = threading.Lock()

    def write(self, what: str, who: str, job: str, **more: Any) -> None:
        """Append one line and sync it.

        what: "accepted", "stored", "active", "failed", "interrupted" or "reloaded".
        who: the holder of the token.
        job: its id.
        more: further keys of the line.

        Raises OSError where the disk does not take the whole line, and where the log is a link, a folder or a device: a
        change that cannot be logged is not made.
        """
        when = datetime.now(UTC).isoformat(timespec="milliseconds")
        line = msgspec.json.encode({"when": when, "who": who, "what": what, "job": job, "server": self._server, **more})
        with self._lock, self._open() as file:
            rest = memoryview(line + b"\n" if _ends_a_line(file) else b"\n" + line + b"\n")
            while rest:
                count = _write(file, rest)
                if count <= 0:
                    raise OSError(errno.EIO, "the disk took none of it")
                rest = rest[count:]
            os.fsync(file)

    @contextlib.contextmanager
    def _open(self) -> Iterator[int]:
        """The log, open for this server alone where the file system knows locks."""
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        try:
            file = os.open(self._path, flags, 0o640)
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.ENXIO, errno.EISDIR):
                raise _irregular() from None
            raise
        try:
            if not stat.S_ISREG(os.fstat(file).st_mode):
                raise _irregular()
            _lock(file)
            yield file
        finally:
            os.close(file)

    def read(self) -> Entries:
        """All entries. Raises StoreError where the log is a link, a folder or a device."""
        lines, torn = [], 0
        try:
            with open_shared(self._path) as (handle, _, _), open(handle, "rb", closefd=False) as file:
                for line in file:
                    try:
                        lines.append(msgspec.json.decode(line, type=dict[str, Any]))
                    except (msgspec.DecodeError, UnicodeDecodeError):
                        torn += bool(line.strip())
        except FileNotFoundError:
            pass
        return Entries(lines, torn)

    def lines(self) -> list[dict[str, Any]]:
        """The entries of `read`."""
        return self.read().lines

    def unfinished(self) -> list[dict[str, Any]]:
        """Accepted changes of this server of which the log does not say what became of them: it was stopped.

        A container that is started again has another host name, so of a server that was given no name the port counts.
        """
        waiting: dict[str, dict[str, Any]] = {}
        for entry in self.lines():
            if _key(str(entry.get("server"))) != _key(self._server):
                continue
            if entry.get("what") == "accepted":
                waiting[entry.get("job", "")] = entry
            elif entry.get("what") in ("active", "failed", "interrupted"):
                waiting.pop(entry.get("job", ""), None)
        return list(waiting.values())


def server_name(host: str, port: int) -> str:
    """What this server is called in the audit log: its given name, or host and port.

    host, port: on which it listens.

    Raises ConfigError for a name that could be mistaken for a host and port.
    """
    name = os.environ.get(NAME_VARIABLE)
    if name is None:
        return f"{host}:{port}"
    if not name.isascii() or not name.isprintable() or not name or ":" in name or name.isdecimal() or len(name) > 64:
        raise ConfigError(
            f"{NAME_VARIABLE} is {name!r}: use 1 to 64 ASCII characters that are not a number, without a colon"
        )
    return name


def _key(server: str) -> str:
    """What is the same when a server is started again."""
    return server.rpartition(":")[2]


def _irregular() -> OSError:
    return OSError(errno.ELOOP, f"{AUDIT} is a link, a folder or a device, not a file: remove it")


def _lock(file: int) -> None:
    until = time.monotonic() + LOCK_S
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > until:
                raise OSError(errno.EAGAIN, f"another process has held {AUDIT} for {LOCK_S:.0f} seconds") from None
            time.sleep(0.01)
        except OSError:  # no locks on this file system
            return
        else:
            return


def _ends_a_line(file: int) -> bool:
    size = os.fstat(file).st_size
    return not size or os.pread(file, 1, size - 1) == b"\n"
