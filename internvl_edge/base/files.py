"""Files and folders that appear whole or not at all, and one line for what a disk refuses.

A killed process leaves the old file or the new one, never half of one; a partial folder disappears on any failure.
"""

from __future__ import annotations

import errno
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from .errors import EdgeError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST)


@contextmanager
def replacing(path: Path, *, shared: bool = True) -> Iterator[Path]:
    """A temporary sibling to write; it takes the place of `path` in one step, with its mode, when the block succeeds.

    Args:
        path: the file to make or to replace.
        shared: other processes may write the same file at the same time. In a folder of one process alone, False gives
            the sibling a fixed name, so that what a killed run left is overwritten by the next.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}" if shared else f"{path.name}.new")
    try:
        yield temporary
        if path.exists():
            shutil.copymode(path, temporary)
        temporary.replace(path)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def replace_text(path: Path, text: str, *, shared: bool = True) -> None:
    """Write a UTF-8 text file in one step."""
    with replacing(path, shared=shared) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A temporary sibling folder that becomes `target`, or takes its place, when the block succeeds.

    On failure it disappears, also on Ctrl-C and SIGTERM.
    """
    with _terminating_as_interrupt():
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=target.parent))
        try:
            yield folder
            folder.chmod(0o755)
            if target.exists():
                old = folder.with_name(folder.name + ".old")
                target.rename(old)
                folder.rename(target)
                shutil.rmtree(old, ignore_errors=True)
            else:
                folder.rename(target)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise


@contextmanager
def readable_disk_errors(
    target: Path,
    when_full: str = "nothing was kept, make room",
    when_refused: str = "choose another --output",
    error: type[EdgeError] = EdgeError,
) -> Iterator[None]:
    """Turn a full disk or missing rights inside the block into one line.

    Args:
        target: what is being written, for the message.
        when_full: what to do about a full disk.
        when_refused: what to do where writing is not allowed.
        error: the kind of error to raise.

    Raises:
        EdgeError: of the kind `error`.
    """
    try:
        yield
    except OSError as refusal:
        reason = os.strerror(refusal.errno or 0)
        if refusal.errno in _FULL:
            raise error(f"the disk of {target} is full ({reason}); {when_full}") from None
        if refusal.errno in _REFUSED:
            raise error(f"cannot write to {target} ({reason}); {when_refused}") from None
        raise


def require_space(folder: Path, needed: int, what: str, advice: str) -> None:
    """Raise EdgeError where the disk of `folder` has less than `needed` bytes free."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise EdgeError(f"{what} needs {needed / 1e9:.2f} GB, {folder.parent} has {free / 1e9:.2f} GB free; {advice}")


@contextmanager
def _terminating_as_interrupt() -> Iterator[None]:
    """SIGTERM cleans up like Ctrl-C does; signals can only be handled in the main thread."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    try:
        previous = signal.signal(signal.SIGTERM, stop)
    except ValueError:
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
