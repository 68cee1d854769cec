"""Write files and folders atomically, and turn disk errors into messages of one line.

After a process was killed, the old file or the complete new file is there. On a failure, including Ctrl-C and SIGTERM,
a partial folder is removed.
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
    """Yield a temporary sibling file. If the block succeeds, it replaces `path` in one step and keeps the old mode.

    Args:
        path: the file to create or replace.
        shared: whether other processes may write the same file at the same time. In a folder that only one process
            uses, False gives the sibling a fixed name, so that the next run overwrites what a killed run left.
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
    """Yield a temporary sibling folder. If the block succeeds, it becomes `target` or replaces it.

    On a failure, including Ctrl-C and SIGTERM, the folder is removed.
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
    """Turn a full disk or a missing permission inside the block into an error of one line.

    Args:
        target: the file or folder that the block writes, for the message.
        when_full: what to do when the disk is full.
        when_refused: what to do when writing is not permitted.
        error: the class of the error to raise.

    Raises:
        EdgeError: of the class `error`.
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
    """Raise EdgeError if the disk of `folder` has less than `needed` bytes free."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise EdgeError(f"{what} needs {needed / 1e9:.2f} GB, {folder.parent} has {free / 1e9:.2f} GB free; {advice}")


@contextmanager
def _terminating_as_interrupt() -> Iterator[None]:
    """Make SIGTERM raise KeyboardInterrupt, so that it cleans up as Ctrl-C does.

    This works only in the main thread, because Python handles signals only there.
    """

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
