"""Files of a store: written so that a crash at any moment leaves the old content or the new, and read so that a file
which somebody uses is never removed.

Every call that changes the disk goes through `_call`, so that tests can make each one fail or end the process there.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import mmap
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock, Timeout

from memoir_retrieval.errors import StoreError

__all__ = ["Written", "open_shared", "publish", "read_or_map", "read_small", "remove_unused", "store_lock", "write_new"]

CHUNK = 16 << 20
Data = bytearray | mmap.mmap


class Written(NamedTuple):
    """What was written.

    size: in bytes.
    sha256: of the content, in hexadecimal.
    """

    size: int
    sha256: str


def _call(operation: Callable[..., Any], *arguments: Any) -> Any:
    return operation(*arguments)


def write_new(path: Path, chunks: Iterable[bytes | memoryview], whole: int | None = None) -> Written:
    """Write a new file and sync it. A file that cannot be written whole is removed again.

    What a crash left under this name is removed first, never written into: it may be a link to something else.

    path: where.
    chunks: its bytes, piece by piece.
    whole: how many there are, where that is known: an error says how much room the file needs.

    Raises StoreError where the disk is full, the file would be too large or the folder is read-only.
    """
    size, digest = 0, hashlib.sha256()
    try:
        _unlink(path)
        handle = _call(os.open, path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        try:
            for chunk in chunks:
                size += len(chunk)
                digest.update(chunk)
                rest = memoryview(chunk)
                while rest:
                    rest = rest[_call(os.write, handle, rest[:CHUNK]) :]
            _call(os.fsync, handle)
        finally:
            os.close(handle)
    except OSError as error:
        _forget(path)
        raise _write_error(path, size if whole is None else whole, error, least=whole is None) from error
    except BaseException:
        _forget(path)
        raise
    return Written(size, digest.hexdigest())


def publish(path: Path, data: bytes, *, names_files: bool = True) -> None:
    """Replace a file in one step: write a sibling, sync it, rename it over the file, sync the folder.

    path: the file.
    data: its new content.
    names_files: the content names files that were made before it; they are on the disk before it is.
    """
    sibling = path.with_name(path.name + ".tmp")
    write_new(sibling, [data], len(data))
    try:
        if names_files:
            _sync_folder(path.parent)
        _call(os.replace, sibling, path)
    except OSError as error:
        _forget(sibling)
        raise _write_error(path, len(data), error) from error
    try:
        _sync_folder(path.parent)
    except OSError as error:
        raise StoreError(f"{path} is written, but a power cut may still undo it: {error.strerror}") from error


def remove_unused(paths: Iterable[Path]) -> list[Path]:
    """Remove files that no reader holds. Returns those that stay, because one does or the system refuses.

    paths: the files.
    """
    kept = []
    for path in paths:
        try:
            if not path.is_symlink():
                handle = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
                try:
                    if _lock(handle, fcntl.LOCK_EX) is None:
                        kept.append(path)
                        continue
                    _unlink(path)
                finally:
                    os.close(handle)
            else:
                _unlink(path)
        except FileNotFoundError:
            continue
        except OSError:
            kept.append(path)
    return kept


@contextmanager
def store_lock(folder: Path) -> Iterator[None]:
    """Hold the one writer's lock of a store.

    folder: the store's.

    Raises StoreError at once where another process holds it, and where the lock is a link, a folder or a device: in a
    folder that came from somebody else it may lead to any file.
    """
    file = folder / ".lock"
    try:
        _make_folder(folder)
        if os.path.lexists(file) and not stat.S_ISREG(os.lstat(file).st_mode):
            raise StoreError(f"{file} is a link, a folder or a device, not a file: remove it")
        lock = FileLock(file, thread_local=False)  # whoever leaves may be another thread than who came
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


@contextmanager
def open_shared(path: Path) -> Iterator[tuple[int, int, bool]]:
    """A regular file open for reading: (descriptor, size in bytes, whether it is locked against removal).

    The shared lock lasts as long as a duplicate of the descriptor is open, such as the one that mmap keeps. Some file
    systems know no locks.

    path: the file.

    Raises FileNotFoundError where a writer is removing the file, OSError where it cannot be opened, and StoreError for
    what is no regular file.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO, errno.EISDIR):
            raise _irregular(path) from error
        raise
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise _irregular(path)
        locked = _lock(handle, fcntl.LOCK_SH)
        status = os.fstat(handle)
        if locked is None or (locked and not status.st_nlink):
            raise FileNotFoundError(errno.ENOENT, "being removed", str(path))
        yield handle, status.st_size, bool(locked)
    finally:
        os.close(handle)


def read_small(path: Path, limit: int) -> bytes:
    """The bytes of a small file.

    path: the file.
    limit: how many bytes it may have.

    Raises StoreError for a larger file, else as `open_shared`.
    """
    with open_shared(path) as (handle, size, _):
        if size > limit:
            raise StoreError(
                f"{path} has {size} bytes, more than the {limit} that such a file may have: it may be forged"
            )
        return bytes(_read(handle, size))


def read_or_map(path: Path, size: int, map_from: int) -> Data:
    """The content of a file, read or mapped. A mapping is private: writing into it changes no file.

    path: the file.
    size: in bytes.
    map_from: from how many bytes on it is mapped, if it can be locked meanwhile.

    Raises StoreError for another size, else as `open_shared`.
    """
    with open_shared(path) as (handle, length, locked):
        if length != size:
            raise StoreError(
                f"{path} is damaged: it has {length} bytes, the manifest says {size}; restore it from a backup"
            )
        if size >= map_from and locked:
            return mmap.mmap(handle, size, access=mmap.ACCESS_COPY)
        return _read(handle, size)


def _read(handle: int, size: int) -> bytearray:
    """At most `size` bytes, in memory that may be written, as torch wants it."""
    data = bytearray(size)
    with open(handle, "rb", closefd=False) as file:
        del data[file.readinto(data) :]
    return data


def _lock(handle: int, kind: int) -> bool | None:
    """Lock without waiting. None: another process holds a lock that forbids it. False: no locks on this file system."""
    try:
        fcntl.flock(handle, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return None
    except OSError:
        return False
    return True


def _irregular(path: Path) -> StoreError:
    return StoreError(
        f"{path} is a link, a folder or a device, not a file: copy the store with `cp -rL` to have plain files"
    )


def _make_folder(folder: Path) -> None:
    if not folder.is_dir():
        _make_folder(folder.parent)
        try:
            _call(os.mkdir, folder)
        except FileExistsError:
            if not folder.is_dir():
                raise
        _sync_folder(folder.parent)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        _call(os.fsync, handle)
    finally:
        os.close(handle)


def _unlink(path: Path) -> None:
    if os.path.lexists(path):
        _call(os.unlink, path)


def _forget(path: Path) -> None:
    """Remove what was half written; where even that fails it is no part of any generation, and the next write does."""
    try:
        _unlink(path)
    except OSError:
        return


def _write_error(path: Path, size: int, error: OSError, *, least: bool = False) -> StoreError:
    path = path.with_name(path.name.removesuffix(".tmp"))
    much = f"{size / 1e6:.2f} MB" if size > 1e5 else f"{size / 1e3:.1f} kB"
    much = f"at least {much}" if least else much
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StoreError(
            f"no space left to write {path.name} ({much}) in {path.parent}: free some and run the same "
            "command again; the store is unchanged"
        )
    if error.errno == errno.EFBIG:
        return StoreError(
            f"{path} would have {much}, more than a file may have here: raise the limit (`ulimit -f`) or "
            "choose a folder on another file system, and run the same command again; the store is unchanged"
        )
    return StoreError(f"{path} cannot be written: {error.strerror}; the store is unchanged")
