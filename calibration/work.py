"""A folder in which a long job keeps its state, so that a killed job can continue.

Every file appears only when it is complete: it is written beside its place and renamed. The folder belongs to one run,
which plain values describe. Another run must not continue it.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from internvl_edge.base.errors import EdgeError
from internvl_edge.base.files import replace_text, replacing
from internvl_edge.base.json_files import read

_RUN = "run.json"
# The advice about a full disk, for `base.files.readable_disk_errors`.
CONTINUES = "make room and repeat the command, which continues where it was"
# What to do about state that is damaged.
RESTART = "repeat the command with --restart"
_SAMPLED_BYTES = 1 << 20
_STATE_BYTES = 64 << 20
WEIGHT_SUFFIXES = {".safetensors", ".bin"}

Arrays = dict[str, NDArray[Any]]


class WorkFolder:
    """The folder of one run.

    Args:
        path: the folder; it is made if absent.
        run: the values that decide the result: checkpoint, data, recipe. JSON values.
        restart: discard the state of an earlier run, whether it is the same run or another.

    Raises:
        EdgeError: the folder holds another run's state, or other files.
    """

    def __init__(self, path: Path, run: Mapping[str, Any], restart: bool = False) -> None:
        self.path = path
        if restart and (path / _RUN).is_file():
            discard(path)
        path.mkdir(parents=True, exist_ok=True)
        wanted = json.loads(json.dumps(dict(run)))
        found = self.read_json(_RUN)
        if found is None:
            if any(file.name != f"{_RUN}.new" for file in path.iterdir()):
                raise EdgeError(f"{path} exists and is no work folder of internvl-edge; move it away")
            self.write_json(_RUN, wanted)
        elif not isinstance(found, dict):
            raise EdgeError(f"{path / _RUN} is damaged, expected an object; {RESTART}")
        elif found != wanted:
            names = sorted(key for key in found.keys() | wanted.keys() if found.get(key) != wanted.get(key))
            raise EdgeError(
                f"{path} holds the state of a run with another {', '.join(names)}; repeat that command to continue it, "
                "or discard it with --restart"
            )

    def read_json(self, name: str) -> Any:
        """What `write_json` wrote, or None.

        Raises:
            EdgeError: something else has written it, or it is damaged.
        """
        path = self.path / name
        return read(path, EdgeError, RESTART, limit=_STATE_BYTES) if path.is_file() else None

    def write_json(self, name: str, values: Any) -> None:
        """Replace a JSON file in one step."""
        replace_text(self.path / name, json.dumps(values, indent=1, ensure_ascii=False), shared=False)

    def read_arrays(self, name: str) -> Arrays | None:
        """Return the arrays that `write_arrays` wrote, or None."""
        path = self.path / name
        if not path.is_file():
            return None
        with np.load(path, allow_pickle=False) as file:
            return {key: file[key] for key in file.files}

    def write_arrays(self, name: str, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Replace an `.npz` file in one step."""
        with replacing(self.path / name, shared=False) as new, new.open("wb") as file:
            np.savez(file, **dict(arrays))  # type: ignore[arg-type]  # numpy's stub takes the names for its own options


def discard(path: Path) -> None:
    """Remove a work folder.

    The description is removed first. If the removal is interrupted, no run takes the remaining files for its state.
    """
    (path / _RUN).unlink()
    shutil.rmtree(path)


def checkpoint_identity(folder: Path) -> str:
    """Return a digest that distinguishes checkpoints.

    It covers config.json and the names, sizes, first and last megabyte of the weight files.
    """
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in sorted(folder.iterdir()):
        if path.suffix in WEIGHT_SUFFIXES:
            size = path.stat().st_size
            digest.update(f"{path.name} {size}".encode())
            with path.open("rb") as file:
                digest.update(file.read(_SAMPLED_BYTES))
                file.seek(max(0, size - _SAMPLED_BYTES))
                digest.update(file.read())
    return digest.hexdigest()
