"""The JSON files of a checkpoint folder, and the pointers that stand where Git LFS has not fetched a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from internvl_edge.base import json_files
from internvl_edge.base.errors import CheckpointError
from internvl_edge.base.json_files import FILE_BYTES

_ADVICE = "download it again"
_POINTER = b"version https://git-lfs.github.com/"


def read_json(path: Path, default: dict[str, Any] | None = None, *, limit: int = FILE_BYTES) -> dict[str, Any]:
    """The object in one of a checkpoint's JSON files; `default`, where one is given, stands for a file that is absent.

    Raises:
        CheckpointError: the file cannot be read, is larger than `limit` bytes, or holds something else.
    """
    if default is not None and not path.exists():
        return default
    refuse_pointer(path)
    return json_files.read_object(path, CheckpointError, _ADVICE, limit=limit)


def refuse_pointer(path: Path) -> None:
    """Raise CheckpointError where a file is the pointer that Git LFS puts in place of a large file."""
    if not path.is_file():
        return
    try:
        with path.open("rb") as file:
            start = file.read(len(_POINTER))
    except OSError:
        return  # whoever reads the file says so
    if start == _POINTER:
        raise CheckpointError(
            f"{path} is a pointer of Git LFS, not the file itself; fetch it with git lfs pull, or download it again"
        )
