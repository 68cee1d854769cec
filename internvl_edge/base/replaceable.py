"""What `--force` may replace: a folder that reads as ours, in which nothing lies that is not its own."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from .errors import EdgeError
from .files import is_temporary
from .folders import ANOTHER_OUTPUT, is_leftover
from .locks import is_abandoned, is_lock

# (folder) -> its own files, as paths relative to it; "NAME/" is a folder in which folders are made by `new_folder`.
# Raises EdgeError where the folder does not read as what it should be.
Contents = Callable[[Path], Collection[str]]


def require_replaceable(target: Path, force: bool, kind: str, contents: Contents, advice: str = ANOTHER_OUTPUT) -> None:
    """Raise EdgeError where `target` exists and may not be replaced.

    Args:
        target: what is to be made.
        force: whether the user allows to replace what is there.
        kind: what may be replaced, for the message: "a bundle".
        contents: reads what is there as `kind`.
        advice: what to do beside removing files.
    """
    if os.path.ismount(target):
        raise EdgeError(f"{target} is the root of a disk, which cannot be replaced; give a folder in it")
    if not os.path.lexists(target):
        return
    if not force:
        raise EdgeError(f"{target} exists; {advice} or pass --force to replace it")
    if not target.is_dir():
        raise EdgeError(f"{target} is not {kind}, so --force does not replace it; remove it or {advice}")
    found = sorted(path.name for path in target.iterdir())
    if not found:
        return
    try:
        own = contents(target)
    except EdgeError as error:
        reason = str(error).partition(";")[0]
        raise EdgeError(
            f"--force replaces {kind} alone: {reason}, and {target / found[0]} lies there; remove {target} or {advice}"
        ) from None
    for strange in _strange_files(target, own):
        raise EdgeError(
            f"--force replaces {kind} alone: {target / strange} is not part of it; remove that file or {advice}"
        )


def _strange_files(folder: Path, own: Collection[str]) -> Iterator[Path]:
    """What lies in a folder and is not its own, relative to it.

    Raises:
        EdgeError: a writer of what lies there lives.
    """
    made_in = {Path(name) for name in own if name.endswith("/")}
    files = {Path(name) for name in own} - made_in
    folders = made_in | {parent for file in files for parent in file.parents}
    for root, inner, names in os.walk(folder):
        place = Path(root).relative_to(folder)
        for name in sorted(inner):
            if place in made_in and is_leftover(name):
                inner.remove(name)
            elif place / name not in folders or Path(root, name).is_symlink():
                yield place / name
        for name in sorted(names):
            if place in made_in and is_lock(name):
                _require_abandoned(Path(root, name))
            elif place / name not in files and not any(is_temporary(place / name, file) for file in files):
                yield place / name


def _require_abandoned(lock: Path) -> None:
    if not is_abandoned(lock):
        raise EdgeError(f"another process writes in {lock.parent}; wait for it")
