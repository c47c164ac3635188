"""The audit log: one JSON object a line, appended and synced, beside the store's other files."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec

__all__ = ["AUDIT", "AuditLog"]

AUDIT = "audit.jsonl"


class AuditLog:
    """`audit.jsonl` of a store. Written by servers; nothing here changes or removes a line.

    server: host and port of this one; several may share a store.
    """

    def __init__(self, folder: Path, server: str):
        self._path, self._server = folder / AUDIT, server
        self._lock = threading.Lock()

    def write(self, what: str, who: str, job: str, **more: Any) -> None:
        """Append one line and sync it. what: "accepted", "stored", "active", "failed", "interrupted" or "reloaded".

        Raises OSError where the disk refuses: a change that cannot be logged is not made.
        """
        when = datetime.now(UTC).isoformat(timespec="milliseconds")
        line = msgspec.json.encode({"when": when, "who": who, "what": what, "job": job, "server": self._server, **more})
        line += b"\n"
        with self._lock:
            file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o640)
            try:
                if not _ends_a_line(self._path):
                    line = b"\n" + line
                os.write(file, line)
                os.fsync(file)
            finally:
                os.close(file)

    def lines(self) -> list[dict[str, Any]]:
        """All entries, oldest first. A line that a crash has cut off is left out."""
        return list(self._read())

    def _read(self) -> Iterator[dict[str, Any]]:
        try:
            with open(self._path, "rb") as file:
                for line in file:
                    try:
                        yield msgspec.json.decode(line, type=dict[str, Any])
                    except (msgspec.DecodeError, UnicodeDecodeError):
                        continue
        except FileNotFoundError:
            return

    def unfinished(self) -> list[dict[str, Any]]:
        """Accepted changes of this server of which the log does not say what became of them: it was stopped."""
        waiting: dict[str, dict[str, Any]] = {}
        for entry in self._read():
            if entry.get("server") != self._server:
                continue
            if entry.get("what") == "accepted":
                waiting[entry.get("job", "")] = entry
            elif entry.get("what") in ("active", "failed", "interrupted"):
                waiting.pop(entry.get("job", ""), None)
        return list(waiting.values())


def _ends_a_line(path: Path) -> bool:
    size = path.stat().st_size
    if not size:
        return True
    with open(path, "rb") as file:
        file.seek(size - 1)
        return file.read(1) == b"\n"
