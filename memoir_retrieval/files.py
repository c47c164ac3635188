"""Writing files so that a crash at any moment leaves the old content or the new, never a mix."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from memoir_retrieval.errors import StoreError

__all__ = ["publish", "store_lock", "write_synced"]


def write_synced(path: Path, data: bytes) -> None:
    """Write a new file and sync it. A file that cannot be written whole is removed again.

    Raises StoreError where the disk is full, the file would be too large or the folder is read-only.
    """
    try:
        with open(path, "wb") as out:
            out.write(data)
            out.flush()
            os.fsync(out.fileno())
    except OSError as error:
        path.unlink(missing_ok=True) if os.access(path.parent, os.W_OK) else None
        raise _said(path, len(data), error) from error


def publish(path: Path, data: bytes) -> None:
    """Replace a file in one step: write a sibling, sync it, rename it over `path`, sync the folder."""
    sibling = path.with_name(path.name + ".tmp")
    write_synced(sibling, data)
    try:
        _sync_folder(path.parent)  # what the new content names must be durable before the new content is
        os.replace(sibling, path)
    except OSError as error:
        sibling.unlink(missing_ok=True)
        raise _said(path, len(data), error) from error
    try:
        _sync_folder(path.parent)
    except OSError as error:
        raise StoreError(f"{path} is written, but a power cut may still undo it: {error.strerror}") from error


@contextmanager
def store_lock(folder: Path) -> Iterator[None]:
    """Hold the one writer's lock of a store. Raises StoreError at once where another process holds it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock")
        lock.acquire(timeout=0)
    except Timeout:
        raise StoreError(f"store {folder} is being written by another process: wait until it is done") from None
    except OSError as error:
        raise StoreError(
            f"store {folder} cannot be written: {error.strerror}; choose a folder you may write"
        ) from error
    try:
        yield
    finally:
        lock.release()


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _said(path: Path, size: int, error: OSError) -> StoreError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StoreError(
            f"no space left to write {path.name} ({size / 1e6:.2f} MB) in {path.parent}: free some and run the same "
            "command again; the store is unchanged"
        )
    if error.errno == errno.EFBIG:
        return StoreError(
            f"{path} would have {size / 1e6:.2f} MB, more than a file may have here: raise the limit (`ulimit -f`) or "
            "choose a folder on another file system, and run the same command again; the store is unchanged"
        )
    return StoreError(f"{path} cannot be written: {error.strerror}; the store is unchanged")
