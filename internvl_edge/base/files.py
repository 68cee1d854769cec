"""Files that appear whole or not at all, and one line for what a disk refuses.

A killed process, or a power failure, leaves the old file or the new one, never half of one. Folders: see `folders`.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

from .errors import EdgeError
from .locks import held, is_abandoned

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENOTEMPTY)
# A file system that cannot sync, or not this.
_UNSYNCED = (errno.EINVAL, errno.ENOTSUP, errno.EROFS, errno.EBADF)


@contextmanager
def replacing(path: Path, *, shared: bool = True) -> Iterator[Path]:
    """Yield a temporary sibling file. If the block succeeds, it replaces `path` in one step and keeps the old mode.

    Its content is on the disk before that step.

    Args:
        path: the file to create or replace.
        shared: whether other processes may write the same file at the same time. In a folder that only one process
            uses, False gives the sibling a fixed name, so that the next run overwrites what a killed run left.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}" if shared else unshared_name(path))
    if shared:
        _remove_abandoned(path)
    try:
        with held(temporary) if shared else nullcontext():
            yield temporary
            if path.exists():
                shutil.copymode(path, temporary)
            sync(temporary)
            temporary.replace(path)
            sync(path.parent)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def unshared_name(path: Path) -> str:
    """The name under which `path` is written where only one process uses its folder."""
    return f"{path.name}.new"


def replace_text(path: Path, text: str, *, shared: bool = True) -> None:
    """Write a UTF-8 text file in one step."""
    with replacing(path, shared=shared) as temporary:
        temporary.write_text(text, encoding="utf-8")


def sync(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk; a kill needs none of this, a power failure does."""
    if os.name == "nt":
        return
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except PermissionError:  # a folder that may be written and not read
        return
    try:
        os.fsync(descriptor)
    except OSError as refusal:
        if refusal.errno not in _UNSYNCED:
            raise
    finally:
        os.close(descriptor)


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


def is_temporary(found: Path, path: Path) -> bool:
    """Whether a file's name is one under which `path` is written."""
    name = rf"\.{re.escape(path.name)}\.(\d+|[0-9a-f]{{8}})"
    return found.parent == path.parent and re.fullmatch(name, found.name) is not None


def _remove_abandoned(path: Path) -> None:
    """Remove the siblings in which killed processes were writing `path`."""
    with suppress(OSError):
        for sibling in path.parent.iterdir():
            if is_temporary(sibling, path) and is_abandoned(sibling):
                sibling.unlink(missing_ok=True)
