"""`engine.json`: what a folder of engines was built from, for what, with what. `build` writes it, the engine reads it.

A folder of engines belongs to its bundle: it lies in `engines/NAME/` there and is valid for the recorded inputs alone.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from internvl_edge.base.errors import EngineError
from internvl_edge.base.files import replace_text
from internvl_edge.base.folders import restore_inside
from internvl_edge.bundle import names
from internvl_edge.bundle.bundle import Bundle

RECORD = names.ENGINE_RECORD
ENGINES = {"vision": "vision.engine", "decoder": "decoder.engine"}
TIMING_CACHE = "timing.cache"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class BuildOptions:
    """Sizes that are fixed when engines are built.

    Attributes:
        dtype: "bfloat16" or "float16", what graphs compute in.
        capacity: tokens in the KV cache, prompt and answer together.
        chunk: most prompt tokens per step.
        kept: most positions of one step that get logits, for checking guessed tokens.
        tiles: most tiles encoded together.
        profiles: 1, or 2 with one of them for single tokens; two hold 16-bit weights twice.
    """

    dtype: str
    capacity: int = 4096
    chunk: int = 512
    kept: int = 16
    tiles: int = 4
    profiles: int = 1


@dataclass(frozen=True)
class EngineRecord:
    """One folder of engines.

    Attributes:
        target: name of the device or group it was built for.
        flavour, version: the TensorRT that built it and alone can run it.
        compute_capabilities: like 86, of the devices it runs on.
        options: the fixed sizes.
        inputs: SHA-256 of the bundle's files that went in.
        files: of the folder, name -> {"bytes", "sha256"}.
        figures: seconds, peak_rss and layers, per engine, for people.
    """

    target: str
    flavour: str
    version: str
    compute_capabilities: tuple[int, ...]
    options: BuildOptions
    inputs: dict[str, str]
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    figures: dict[str, dict[str, float]] = field(default_factory=dict)

    def same_build(self, other: EngineRecord) -> bool:
        """Whether the same inputs, sizes, target and TensorRT went in."""
        ignored = {"files", "figures"}
        mine, theirs = ({k: v for k, v in asdict(record).items() if k not in ignored} for record in (self, other))
        return mine == theirs

    def write(self, folder: Path) -> None:
        """Write `engine.json`."""
        text = json.dumps({"format_version": FORMAT_VERSION, **asdict(self)}, indent=2)
        replace_text(folder / RECORD, text + "\n", shared=False)

    @staticmethod
    def read(folder: Path) -> EngineRecord:
        """Read a folder's record; every file must be there in its size.

        Raises:
            EngineError: no engines, a damaged record or file, or a newer format.
        """
        path = folder / RECORD
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            if values.pop("format_version") > FORMAT_VERSION:
                raise EngineError(f"{path} is of a newer version; update internvl-edge or build the engines again")
            options = BuildOptions(**values.pop("options"))
            capabilities = tuple(values.pop("compute_capabilities"))
            record = EngineRecord(options=options, compute_capabilities=capabilities, **values)
        except FileNotFoundError:
            raise EngineError(f"no engines in {folder}; make them with internvl-edge build") from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise EngineError(f"{path} is damaged ({error}); build the engines again") from None
        for name, entry in record.files.items():
            if not (folder / name).is_file() or (folder / name).stat().st_size != entry["bytes"]:
                raise EngineError(f"{folder / name} is missing or incomplete; build the engines again")
        return record


def engine_folder(opened: Bundle, target: str) -> Path:
    """Where a target's engines lie."""
    return opened.folder / names.ENGINES / target


def graph_inputs(opened: Bundle) -> dict[str, str]:
    """SHA-256 of the files that engines are built from, by name."""
    files = opened.manifest.files
    inputs = (names.VISION, names.DECODERS["standard"], "vision.data", "decoder.data")
    return {name: files[name].sha256 for name in inputs if name in files}


def find_engines(opened: Bundle, sm: int, target: str | None = None) -> EngineRecord:
    """The engines of a bundle for a compute capability, or those of a name; the first that fit the bundle's files.

    Raises:
        EngineError: there are none, those there are cannot be read, or they were built from other files than the
            bundle's present ones.
    """
    found: list[EngineRecord] = []
    unreadable: list[EngineError] = []
    for folder in _engine_folders(opened, target):
        try:
            found.append(EngineRecord.read(folder))
        except EngineError as error:  # the engines beside it may be sound
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


def _engine_folders(opened: Bundle, target: str | None) -> list[Path]:
    """By name; without the hidden ones, in which builds were interrupted."""
    engines = opened.folder / names.ENGINES
    restore_inside(engines)
    folders = sorted(path.parent for path in engines.glob(f"*/{RECORD}"))
    return [folder for folder in folders if not folder.name.startswith(".") and target in (None, folder.name)]
