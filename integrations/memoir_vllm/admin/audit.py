"""The audit log: one JSON object per line, appended and synced, beside the store's other files."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import threading
import time
from array import array
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import msgspec

from memoir_retrieval.errors import ConfigError

__all__ = ["AUDIT", "NAME_VARIABLE", "AuditLines", "AuditLog", "Entries", "server_name"]

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


class AuditLines(NamedTuple):
    """A page of the log.

    total: how many entries the log holds.
    torn: as in `Entries`.
    lines: the entries of the page, newest first.
    """

    total: int
    torn: int
    lines: list[dict[str, Any]]


class AuditLog:
    """`audit.jsonl` of a store. Written by servers; nothing here changes or removes a line.

    It is read without a lock: lines are only appended, and one that is not whole yet has no newline.
    """

    def __init__(self, folder: Path, server: str):
        """folder: the store's.
        server: this one, see `server_name`; several may share a store.
        """
        self._path, self._server = folder / AUDIT, server
        self._lock = threading.Lock()
        # What `page` knows of the log, which it need not read again: where each entry begins.
        self._paging = threading.Lock()
        self._inode = self._end = self._torn = 0
        self._starts = array("Q")

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
        file = self._open_file(os.O_RDWR | os.O_APPEND | os.O_CREAT)
        try:
            _lock(file)
            yield file
        finally:
            os.close(file)

    def _open_file(self, how: int) -> int:
        """Open the log. Raises OSError for a link, a folder or a device."""
        try:
            file = os.open(self._path, how | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o640)
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.ENXIO, errno.EISDIR):
                raise _irregular() from None
            raise
        if not stat.S_ISREG(os.fstat(file).st_mode):
            os.close(file)
            raise _irregular()
        return file

    def read(self) -> Entries:
        """All entries. Raises OSError where the log cannot be read, or is a link, a folder or a device."""
        lines, torn = [], 0
        try:
            with os.fdopen(self._open_file(os.O_RDONLY), "rb") as file:
                for _, line in _whole_lines(file, 0):
                    entry = _entry(line)
                    if entry is not None:
                        lines.append(entry)
                    else:
                        torn += bool(line.strip())
        except FileNotFoundError:
            pass
        return Entries(lines, torn)

    def page(self, offset: int, limit: int) -> AuditLines:
        """A page of the entries. Of the others only those are read that came since the last page.

        offset: how many of the newest are left out.
        limit: how many the page has.

        Raises OSError as `read`.
        """
        try:
            with self._paging, os.fdopen(self._open_file(os.O_RDONLY), "rb") as file:
                status = os.fstat(file.fileno())
                if status.st_ino != self._inode or status.st_size < self._end:  # the first page, or a restored log
                    self._inode, self._end, self._torn, self._starts = status.st_ino, 0, 0, array("Q")
                for start, line in _whole_lines(file, self._end):
                    if _entry(line) is not None:
                        self._starts.append(start)
                    else:
                        self._torn += bool(line.strip())
                    self._end = start + len(line)
                end = max(0, len(self._starts) - offset)
                lines = [_entry_at(file, start) for start in reversed(self._starts[max(0, end - limit) : end])]
                return AuditLines(len(self._starts), self._torn, lines)
        except FileNotFoundError:
            return AuditLines(0, 0, [])

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
                waiting[str(entry.get("job"))] = entry
            elif entry.get("what") in ("active", "failed", "interrupted"):
                waiting.pop(str(entry.get("job")), None)
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


def _whole_lines(file: BinaryIO, start: int) -> Iterator[tuple[int, bytes]]:
    """Each line and where it begins, but for one that is still being written.

    start: where the first one begins.
    """
    file.seek(start)
    for line in file:
        if not line.endswith(b"\n"):
            return
        yield start, line
        start += len(line)


def _entry(line: bytes) -> dict[str, Any] | None:
    try:
        return msgspec.json.decode(line, type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None


def _entry_at(file: BinaryIO, start: int) -> dict[str, Any]:
    file.seek(start)
    return msgspec.json.decode(file.readline(), type=dict[str, Any])


def _ends_a_line(file: int) -> bool:
    size = os.fstat(file).st_size
    return not size or os.pread(file, 1, size - 1) == b"\n"
