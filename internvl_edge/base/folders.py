"""Folders that appear whole or not at all, and take the place of old ones without a moment in which there is none.

Every writer of a folder holds its lock (`locks`). What a killed one left beside it, `.NAME.partial-*`, is removed by
the next; an old folder that it left aside in the middle of a replacement is put back by the next that looks for it.
"""

from __future__ import annotations

import ctypes
import os
import re
import secrets
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import EdgeError, RestoredWarning
from .files import sync
from .locks import held, is_abandoned, only_writer
from .signals import terminating_as_interrupt

ANOTHER_OUTPUT = "choose another --output"
# What `tempfile.mkdtemp` and `_aside` append.
_RANDOM = "[a-z0-9_]{8}"
_LOCK = ".lock"
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


@contextmanager
def writing(target: Path, advice: str = ANOTHER_OUTPUT) -> Iterator[Path]:
    """Be the only writer of a folder; yields its path without symbolic links.

    What killed writers left is put back or removed first. SIGTERM is KeyboardInterrupt inside.

    Raises:
        EdgeError: another process writes it.
    """
    target = Path(os.path.realpath(target))
    target.parent.mkdir(parents=True, exist_ok=True)
    with terminating_as_interrupt(), only_writer(target, advice) as alone:
        _put_back(target)
        if alone:
            for left in _leftovers(target):
                shutil.rmtree(left, ignore_errors=True)
        yield target


@contextmanager
def new_folder(target: Path, permit: Callable[[], None], advice: str = ANOTHER_OUTPUT) -> Iterator[Path]:
    """A temporary sibling folder that becomes `target`, or takes its place, when the block succeeds.

    On failure it disappears, also on Ctrl-C and SIGTERM.

    Args:
        target: the folder to make or to replace.
        permit: raises EdgeError where `target` may not be made; asked before the block and again before the end.
        advice: what a second process can do beside waiting.
    """
    with writing(target, advice) as place:
        permit()
        folder = Path(tempfile.mkdtemp(prefix=f".{place.name}.partial-", dir=place.parent))
        try:
            yield folder
            folder.chmod(0o755)
            permit()
            put_in_place(folder, place)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def put_in_place(folder: Path, target: Path) -> None:
    """Give a whole folder its name; one that stood there is afterwards under the name `folder`.

    Killed at any moment, the old or the new folder stands under the name, or `restore` puts the old one back there.
    """
    for root, _, names in os.walk(folder, topdown=False):
        for name in names:
            sync(Path(root, name))
        sync(Path(root))
    if not target.exists():
        folder.rename(target)
    elif not exchange(folder, target):
        _replace_in_steps(folder, target)
    sync(target.parent)


def exchange(one: Path, other: Path) -> bool:
    """Swap two names in one step; False, and nothing done, where the system or the file system cannot."""
    if sys.platform != "linux":
        return False
    swap = getattr(ctypes.CDLL(None), "renameat2", None)
    if swap is None:
        return False
    status: int = swap(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE)
    return status == 0


def is_leftover(name: str) -> bool:
    """Whether a folder's name is one that only writers of another folder make, see `new_folder`."""
    return re.fullmatch(rf"\..+\.partial-{_RANDOM}(\.old)?", name) is not None


def restore(target: Path) -> None:
    """Put back, and say so, a folder that a killed process had moved aside to replace it; before `target` is read."""
    target = Path(os.path.realpath(target))
    if not target.exists() and _left_aside(target):
        with suppress(EdgeError, OSError), only_writer(target, ANOTHER_OUTPUT):
            _put_back(target)


def restore_inside(folder: Path) -> None:
    """`restore` whatever lies in a folder."""
    for path in sorted(folder.glob(".*.old")):
        if is_leftover(path.name):
            restore(folder / path.name[1 : path.name.rindex(".partial-")])


@contextmanager
def scratch_folder(purpose: str) -> Iterator[Path]:
    """A temporary folder that disappears at the end, also on SIGTERM; those of killed processes are removed first."""
    prefix = f"internvl-edge-{purpose}-"
    for lock in Path(tempfile.gettempdir()).glob(f"{prefix}*/{_LOCK}"):
        if is_abandoned(lock):
            shutil.rmtree(lock.parent, ignore_errors=True)
    with terminating_as_interrupt(), tempfile.TemporaryDirectory(prefix=prefix) as name:
        new = Path(name, f"{_LOCK}.new")
        with held(new):
            new.rename(Path(name, _LOCK))  # never seen without its holder
            yield Path(name)


def _replace_in_steps(folder: Path, target: Path) -> None:
    """Two renames, with the old folder aside between them; on failure it comes back at once."""
    old = target.with_name(f".{target.name}.partial-{secrets.token_hex(4)}.old")
    try:
        target.rename(old)
        folder.rename(target)
    except BaseException:
        if old.exists() and not target.exists():
            old.rename(target)
        raise
    old.rename(folder)


def _put_back(target: Path) -> None:
    old = _left_aside(target)
    if old and not target.exists():
        old.rename(target)
        line = f"a process was killed while it replaced {target}; the old one is back under its name"
        warnings.warn(line, RestoredWarning, stacklevel=3)


def _left_aside(target: Path) -> Path | None:
    """The old folder of a replacement that did not end; the latest."""
    found = [path for path in _leftovers(target) if path.suffix == ".old"]
    return max(found, key=lambda path: path.stat().st_ctime_ns, default=None)


def _leftovers(target: Path) -> list[Path]:
    """Folders beside `target` that only its writers make."""
    pattern = re.compile(rf"\.{re.escape(target.name)}\.partial-{_RANDOM}(\.old)?")
    try:
        found = [path for path in target.parent.iterdir() if pattern.fullmatch(path.name)]
    except OSError:  # no such folder, or one that may not be read
        return []
    return [path for path in found if path.is_dir() and not path.is_symlink()]
