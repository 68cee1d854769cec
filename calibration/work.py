"""A folder in which a long job keeps its state, so that a killed job can continue.

Every file appears whole: it is written beside its place, brought to the disk and renamed. Each carries its SHA-256:
`.json` and `.npz` as their last line, all others in `NAME.sha256` beside them, which is written last. All of them are
checked when a run is taken up. The folder belongs to one run, described by plain values; another run must not continue
it.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from internvl_edge.base.errors import CheckpointError, EdgeError
from internvl_edge.base.files import replace_text, replacing
from internvl_edge.checkpoint.record import RECORD, REPORTS
from internvl_edge.checkpoint.safetensors_header import read_header

_RUN = "run.json"
# Tells a work folder that has lost its description from a folder of somebody else.
_MARK = ".internvl-edge-work"
_SEALED = (".json", ".npz")
_SEAL = "\nsha256 "
_SEAL_BYTES = len(_SEAL) + 64
OUT = "out"
# What a run may write into its folder; everything else in it is not ours to delete.
_OURS = re.compile(rf"{re.escape(_MARK)}|{OUT}|block-.*|tokenizer|.*\.(json|npz|npy|f32|u8|sha256|new)")
# What to do about a full disk, for `base.files.readable_disk_errors`.
CONTINUES = "make room and repeat the command, which continues where it was"
_SAMPLED_BYTES = 1 << 20
# Of each tensor, where checkpoints are told apart.
_BEGINNING_BYTES = 4096
WEIGHT_SUFFIXES = {".safetensors", ".bin"}
# Configurations, vocabularies and chat templates.
_TEXT_SUFFIXES = {".json", ".txt", ".model", ".jinja"}

Arrays = dict[str, NDArray[Any]]


class WorkFolder:
    """One run's folder. As a context, it disappears on a failure before which nothing was worth keeping.

    Args:
        path: the folder; it is made if absent.
        run: the values that decide the result: checkpoint, data, recipe. JSON values.
        restart: discard the state of an earlier run, whether it is the same run or another.

    Raises:
        EdgeError: the folder holds another run's state, damaged state, or something else.
    """

    def __init__(self, path: Path, run: Mapping[str, Any], restart: bool = False) -> None:
        self.path = path
        if restart and _is_ours(path):
            discard(path)
        path.mkdir(parents=True, exist_ok=True)
        wanted = json.loads(json.dumps(dict(run)))
        if not (path / _RUN).is_file():
            self._require_empty()
            (path / _MARK).touch()
            self.write_json(_RUN, wanted)
            return
        found = self.read_json(_RUN)
        if found != wanted:
            names = sorted(key for key in found.keys() | wanted.keys() if found.get(key) != wanted.get(key))
            raise EdgeError(
                f"{path} holds the state of a run with another {', '.join(names)}; repeat that command to continue it, "
                "or discard it with --restart"
            )
        self._check()

    def __enter__(self) -> WorkFolder:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        state = (path for path in self.path.glob("*") if path.suffix in _SEALED or path.is_dir())
        if kind is not None and (self.path / _RUN).is_file() and not any(path.name != _RUN for path in state):
            discard(self.path)

    def read_json(self, name: str) -> Any:
        """What `write_json` wrote, or None.

        Raises:
            EdgeError: the file is damaged.
        """
        return self.need_json(name) if (self.path / name).is_file() else None

    def write_json(self, name: str, values: Any) -> None:
        """Replace a JSON file as one step."""
        text = json.dumps(values, indent=1, ensure_ascii=False)
        self._write_sealed(name, lambda file: file.write(text.encode()))

    def read_arrays(self, name: str) -> Arrays | None:
        """What `write_arrays` wrote, or None.

        Raises:
            EdgeError: the file is damaged.
        """
        return self.need_arrays(name) if (self.path / name).is_file() else None

    def write_arrays(self, name: str, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Replace an `.npz` file as one step."""
        self._write_sealed(name, lambda file: np.savez(file, **dict(arrays)))  # type: ignore[arg-type]  # numpy's stub

    def need_json(self, name: str) -> Any:
        """What `write_json` wrote; EdgeError where it is gone or damaged."""
        return json.loads(self._need(name).read_bytes()[:-_SEAL_BYTES])

    def need_arrays(self, name: str) -> Arrays:
        """What `write_arrays` wrote; EdgeError where it is gone or damaged."""
        with np.load(self._need(name), allow_pickle=False) as file:  # a zip archive may have something behind its end
            return {key: file[key] for key in file.files}

    @contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        """A path to write any other file at; it becomes `name` as one step when the block succeeds."""
        seal = self._seal(name)
        with replacing(self.path / name, shared=False) as new:
            yield new
            digest = _sha256(new)
            seal.unlink(missing_ok=True)  # killed between here and the last line, the file counts as not written
        replace_text(seal, digest, shared=False)

    def has(self, name: str) -> bool:
        """Whether `writing` wrote a file to its end."""
        return (self.path / name).is_file() and self._seal(name).is_file()

    def need(self, name: str) -> Path:
        """The path of a file that `writing` wrote; EdgeError where it is gone."""
        if not self.has(name):
            raise _damaged(self.path / name)
        return self.path / name

    def digest(self, name: str) -> str:
        """The SHA-256 of a file that `writing` wrote."""
        return self._seal(self.need(name).name).read_text(encoding="ascii")

    def remove(self, name: str) -> None:
        """Delete a file, if it is there."""
        self._seal(name).unlink(missing_ok=True)
        (self.path / name).unlink(missing_ok=True)

    def _need(self, name: str) -> Path:
        path = self.path / name
        if not path.is_file():
            raise _damaged(path)
        _check_sealed(path)
        return path

    def _seal(self, name: str) -> Path:
        return self.path / f"{name}.sha256"

    def _write_sealed(self, name: str, write: Callable[[BinaryIO], object]) -> None:
        with replacing(self.path / name, shared=False) as new:
            with new.open("wb") as file:
                write(file)
            digest = _sha256(new)
            with new.open("ab") as file:
                file.write(f"{_SEAL}{digest}".encode())

    def _check(self) -> None:
        """Raise EdgeError for the first file that is not what was written; files without a seal are not finished."""
        for path in sorted(self.path.rglob("*")):
            if self.path / OUT in path.parents or path.is_dir():
                continue
            if path.suffix in _SEALED:
                _check_sealed(path)
            elif path.suffix == ".sha256":
                written = path.with_suffix("")
                if not written.is_file() or path.read_text(errors="replace") != _sha256(written):
                    raise _damaged(written)

    def _require_empty(self) -> None:
        if any(file.name not in (_MARK, f"{_RUN}.new") for file in self.path.iterdir()):
            what = "discard it with --restart" if (self.path / _MARK).is_file() else "move it away"
            raise EdgeError(f"{self.path} exists and is no work folder of internvl-edge to be continued; {what}")


def discard(path: Path) -> None:
    """Remove a work folder. Killed meanwhile, what is left is nobody's state: the description goes first.

    What a user put into it stays.
    """
    (path / _RUN).unlink(missing_ok=True)
    ours = [entry for entry in path.iterdir() if _OURS.fullmatch(entry.name)]
    if len(ours) == len(list(path.iterdir())):
        shutil.rmtree(path)
        return
    for entry in ours:
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _is_ours(path: Path) -> bool:
    """Whether a folder was a work folder, however damaged; those of earlier versions have no mark."""
    if (path / _MARK).is_file():
        return True
    try:
        text = (path / _RUN).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return '"version"' in text and '"checkpoint"' in text


def _damaged(path: Path) -> EdgeError:
    return EdgeError(f"{path} is damaged or missing, so this run cannot be continued; discard it with --restart")


def _check_sealed(path: Path) -> None:
    """Raise EdgeError where a file does not end in the SHA-256 of what stands before."""
    size = path.stat().st_size - _SEAL_BYTES
    if size < 0:
        raise _damaged(path)
    with path.open("rb") as file:
        file.seek(size)
        seal = file.read()
    if seal != f"{_SEAL}{_sha256(path, size)}".encode():
        raise _damaged(path)


def _sha256(path: Path, size: int | None = None) -> str:
    """Of a file, or of its first `size` bytes."""
    digest = hashlib.sha256()
    left = path.stat().st_size if size is None else size
    with path.open("rb") as file:
        while left > 0 and (block := file.read(min(left, _SAMPLED_BYTES))):
            digest.update(block)
            left -= len(block)
    return digest.hexdigest()


def checkpoint_identity(folder: Path) -> str:
    """Return a digest that distinguishes checkpoints.

    It covers configuration and tokenizer, and of each weight file the name, the size, the first and last megabyte and
    the beginning of every tensor: a fine-tune has the sizes of its base, and may differ from it only in the middle of
    its files. What `quantize` reports beside the model does not count.
    """
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix in _TEXT_SUFFIXES and path.name not in (RECORD, *REPORTS) and path.is_file():
            digest.update(f"{path.name} {_sha256(path)}".encode())
        elif path.suffix in WEIGHT_SUFFIXES:
            size = path.stat().st_size
            digest.update(f"{path.name} {size}".encode())
            with path.open("rb") as file:
                digest.update(file.read(_SAMPLED_BYTES))
                for begin in _beginnings(path):
                    file.seek(begin)
                    digest.update(file.read(_BEGINNING_BYTES))
                file.seek(max(0, size - _SAMPLED_BYTES))
                digest.update(file.read())
    return digest.hexdigest()


def _beginnings(path: Path) -> list[int]:
    """Return where the tensors of a file begin; of a `.bin` file nothing, whose end holds checksums of all tensors."""
    if path.suffix != ".safetensors":
        return []
    try:
        return [entry.begin for entry in read_header(path).values()]
    except CheckpointError:  # a file beside the model's own
        return []
