"""`engine.json`, the record of a folder of engines: its inputs, its target, its options and the TensorRT that built it.

`build` writes the record and the engine reads it. The folder is `engines/NAME/` in the bundle, and is valid only for
the recorded inputs.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from internvl_edge.base.errors import EngineError
from internvl_edge.base.files import replace_text
from internvl_edge.base.folders import restore_inside
from internvl_edge.base.json_files import read_object
from internvl_edge.base.jsonable import decode
from internvl_edge.base.text import PLAIN_NAME, is_plain_name, shown
from internvl_edge.bundle import names
from internvl_edge.bundle.bundle import Bundle
from internvl_edge.bundle.manifest import FileEntry
from internvl_edge.model.limits import LARGEST
from internvl_edge.planning.programs import MOST_ROWS, Programs, slots_of

RECORD = names.ENGINE_RECORD
ENGINES = {"vision": "vision.engine", "decoder": "decoder.engine"}
TIMING_CACHE = "timing.cache"
FORMAT_VERSION = 1
_FLAVOURS = ("tensorrt", "tensorrt_rtx")
_DTYPES = ("bfloat16", "float16")
_AGAIN = "build the engines again"


@dataclass(frozen=True)
class BuildOptions:
    """Sizes that are fixed when engines are built.

    Attributes:
        dtype: the type that the engines compute in, "bfloat16" or "float16".
        capacity: the most tokens in the KV cache, prompt and answer together.
        chunk: the most prompt tokens per prefill step.
        kept: the most positions of one step that get logits, to verify guessed tokens.
        tiles: the most tiles that are encoded together.
        profiles: the number of the decoder's programs, a value of `Programs`.
        rows: the sequences that the KV cache holds side by side. A decode step computes all of them.
    """

    dtype: str
    capacity: int = 4096
    chunk: int = 512
    kept: int = 16
    tiles: int = 4
    profiles: int = 1
    rows: int = 1

    @property
    def slots(self) -> int:
        """The slots of one row of the KV cache."""
        return slots_of(self.capacity, self.rows)


@dataclass(frozen=True)
class EngineRecord:
    """The record of one folder of engines.

    Attributes:
        target: name of the device or the group that it was built for.
        flavour, version: the TensorRT that built it. No other one can run it.
        compute_capabilities: those of the devices it runs on, such as 86 for 8.6.
        options: the sizes that were fixed.
        inputs: SHA-256 of the bundle's files that it was built from, by name.
        files: the files of the folder, name -> {"bytes", "sha256"}.
        figures: seconds, peak_rss (bytes) and layers of each engine, for information.
        check: what `self_check.check_engines` found on the device, for information.
    """

    target: str
    flavour: str
    version: str
    compute_capabilities: tuple[int, ...]
    options: BuildOptions
    inputs: dict[str, str]
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    figures: dict[str, dict[str, float]] = field(default_factory=dict)
    check: dict[str, Any] = field(default_factory=dict)

    def same_build(self, other: EngineRecord) -> bool:
        """Return whether both records have the same inputs, options, target and TensorRT."""
        ignored = {"files", "figures", "check"}
        mine, theirs = ({k: v for k, v in asdict(record).items() if k not in ignored} for record in (self, other))
        return mine == theirs

    def write(self, folder: Path) -> None:
        """Write `engine.json`."""
        text = json.dumps({"format_version": FORMAT_VERSION, **asdict(self)}, indent=2)
        replace_text(folder / RECORD, text + "\n", shared=False)

    @staticmethod
    def read(folder: Path, complete: bool = True) -> EngineRecord:
        """Read a folder's record, and, with `complete`, check that every file exists with its recorded size.

        Raises:
            EngineError: there are no engines, the record or a file is damaged, or the format is newer.
        """
        path = folder / RECORD
        if not path.exists():
            raise EngineError(f"no engines in {folder}; make them with internvl-edge build")
        try:
            values = read_object(path, EngineError, _AGAIN)
        except EngineError as error:
            raise EngineError(f"{path} is damaged: {error}") from None
        version = values.pop("format_version", None)
        if isinstance(version, int) and version > FORMAT_VERSION:
            raise EngineError(f"{path} is of a newer version; update internvl-edge or {_AGAIN}")
        try:
            if version != FORMAT_VERSION or isinstance(version, bool):
                raise ValueError(f"format_version is {shown(version)}, expected {FORMAT_VERSION}")
            record = decode(EngineRecord, values, strict=True)
            _require_possible(record)
        except ValueError as error:
            raise EngineError(f"{path} is damaged ({error}); {_AGAIN}") from None
        if record.target != folder.resolve().name:
            raise EngineError(f"{path} is of engines for {record.target}; rename its folder so, or {_AGAIN}")
        for name, entry in record.files.items() if complete else ():
            if not (folder / name).is_file() or (folder / name).stat().st_size != entry["bytes"]:
                raise EngineError(f"{folder / name} is missing or incomplete; {_AGAIN}")
        return record


def _require_possible(record: EngineRecord) -> None:
    """Raise ValueError for what no build writes, the place named."""
    for name in (record.target, *record.files):
        if not is_plain_name(name):
            raise ValueError(f"{shown(name)} is no plain name of {PLAIN_NAME}")
    for name, entry in record.files.items():
        try:
            decode(FileEntry, entry, strict=True)
        except ValueError as error:
            raise ValueError(f"files.{name}: {error}") from None
    if missing := set(ENGINES.values()) - record.files.keys():
        raise ValueError(f"files.{min(missing)} is missing")
    if record.flavour not in _FLAVOURS or record.options.dtype not in _DTYPES:
        raise ValueError(f"flavour {shown(record.flavour)} with dtype {shown(record.options.dtype)} is not known")
    if not record.compute_capabilities or not all(10 <= sm < 1000 for sm in record.compute_capabilities):
        raise ValueError(f"compute_capabilities is {shown(record.compute_capabilities)}, expected numbers like 86")
    most = {"profiles": len(Programs), "rows": MOST_ROWS}
    for name, size in asdict(record.options).items():
        largest = most.get(name, LARGEST["max_position_embeddings"])
        if name != "dtype" and not 1 <= size <= largest:
            raise ValueError(f"options.{name} is {size}, expected a number from 1 to {largest}")


def engine_folder(opened: Bundle, target: str) -> Path:
    """Where a target's engines lie."""
    return opened.folder / names.ENGINES / target


def rows_text(rows: int) -> str:
    """Return "1 row" or "4 rows"."""
    return f"{rows} row" if rows == 1 else f"{rows} rows"


def graph_inputs(opened: Bundle) -> dict[str, str]:
    """Return the SHA-256 of the files that engines are built from, by name."""
    files = opened.manifest.files
    inputs = (names.VISION, names.DECODERS["standard"], "vision.data", "decoder.data")
    return {name: files[name].sha256 for name in inputs if name in files}


def find_engines(opened: Bundle, sm: int, target: str | None = None) -> EngineRecord:
    """Return the record of the first engines that fit a compute capability and the bundle's present files.

    With `target`, only the engines of this name are searched.

    Raises:
        EngineError: there are no such engines, they cannot be read, or they were built from other files than the
            bundle's present ones.
    """
    found: list[EngineRecord] = []
    unreadable: list[EngineError] = []
    for folder in engine_folders(opened, target):
        try:
            found.append(EngineRecord.read(folder))
        except EngineError as error:  # engines in other folders may still be valid
            unreadable.append(error)
    suitable = [record for record in found if sm in record.compute_capabilities]
    fresh = [record for record in suitable if record.inputs == graph_inputs(opened)]
    if fresh:
        return fresh[0]
    if unreadable and not suitable:
        raise unreadable[0]
    if not suitable:
        there = ", ".join(f"{record.target} ({'/'.join(map(str, record.compute_capabilities))})" for record in found)
        raise EngineError(
            f"{opened.folder} has no engines for compute capability {sm / 10:.1f} (found: {there or 'none'}); "
            "make them with internvl-edge build --device NAME"
        )
    raise EngineError(
        f"the engines {suitable[0].target} in {opened.folder} were built from other files; build them again"
    )


def engine_names(opened: Bundle) -> list[str]:
    """Return the names of the folders of engines in a bundle, whatever their state."""
    return [folder.name for folder in engine_folders(opened)]


def engine_folders(opened: Bundle, target: str | None = None) -> list[Path]:
    """Return the folders of a bundle's engines, or of those for one target, by name.

    Hidden folders, in which builds were interrupted, are left out.
    """
    engines = opened.folder / names.ENGINES
    restore_inside(engines)
    folders = sorted(path.parent for path in engines.glob(f"*/{RECORD}"))
    return [folder for folder in folders if not folder.name.startswith(".") and target in (None, folder.name)]
