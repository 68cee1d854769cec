"""Locks that die with their process: one writer for each output, and how to tell what a dead process left.

All are `flock`s. Where the system or a file system has none, nothing is kept apart and nothing counts as dead.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import EdgeError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


def lock_path(target: Path) -> Path:
    """The hidden sibling that the one writer of `target` holds; it is gone when nobody writes."""
    return target.with_name(f".{target.name}.lock")


def is_lock(name: str) -> bool:
    """Whether a file's name is that of a lock of `only_writer`."""
    return name.startswith(".") and name.endswith(".lock")


@contextmanager
def only_writer(target: Path, advice: str) -> Iterator[bool]:
    """Keep other processes from writing `target`; yields whether the file system can.

    Args:
        target: what is written; its parent exists.
        advice: what a second process can do beside waiting, for the message.

    Raises:
        EdgeError: another process writes it.
    """
    path = lock_path(target)
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        locked = _lock(descriptor)
        if locked is False:
            pid = os.read(descriptor, 20).decode(errors="replace").strip()
            os.close(descriptor)
            whom = f"another process (pid {pid})" if pid else "another process"
            raise EdgeError(f"{whom} writes {target}; wait for it or {advice}")
        if _is_at(descriptor, path):
            break
        os.close(descriptor)  # its last holder removed it meanwhile
    try:
        os.ftruncate(descriptor, 0)
        os.write(descriptor, str(os.getpid()).encode())
        yield bool(locked)
    finally:
        with suppress(OSError):
            path.unlink(missing_ok=True)
        os.close(descriptor)


@contextmanager
def held(path: Path) -> Iterator[None]:
    """Hold the lock of a file, which is made if absent, as the sign that its writer lives."""
    if fcntl is None:  # an open file could not be renamed there
        path.touch()
        yield
        return
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        _lock(descriptor)
        yield
    finally:
        os.close(descriptor)


def is_abandoned(path: Path) -> bool:
    """Whether nobody holds the lock of a file that exists; False where that cannot be told."""
    try:
        descriptor = os.open(path, os.O_RDWR)
    except OSError:
        return False
    try:
        return _lock(descriptor) is True
    finally:
        os.close(descriptor)


def _lock(descriptor: int) -> bool | None:
    """Whether the lock was got; None where there are no locks."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
