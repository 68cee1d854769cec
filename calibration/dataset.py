"""A calibration set on disk: the token ids of each sample, and the decoder's input embeddings.

    calibration.json  the samples, the SHA-256 of the other files, and that of all this
    tokens.npy        int32 [tokens] of all samples, concatenated
    tiles.u8          uint8 [tiles, S, S, 3], the tiles of all images
    embeddings.f32    float32 [tokens, hidden]; rows of image tokens come from the vision tower and the projector

It is made in two resumable steps: `prepare` (text and tiles) and `pipeline.embed` (the tower). Each recipe reads what
it needs: an int8 tower is measured with the tiles, and makes embeddings of its own.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from internvl_edge.base.errors import EdgeError
from internvl_edge.base.field_types import require_types
from internvl_edge.base.folders import put_in_place, restore
from internvl_edge.base.json_files import read_object
from internvl_edge.base.jsonable import decode
from internvl_edge.base.progress import Progress
from internvl_edge.checkpoint.reader import Checkpoint
from internvl_edge.model.preprocess import MAX_TILES

from .compute import to_torch
from .items import image_files, read_items
from .samples import DEFAULT_MAX_TOKENS, SampleBuilder, good_samples
from .work import OUT, WorkFolder, discard

MANIFEST = "calibration.json"
TOKENS = "tokens.npy"
EMBEDDINGS = "embeddings.f32"
TILES = "tiles.u8"
_FILES = (TOKENS, TILES, EMBEDDINGS)
# What earlier versions wrote beside these.
_EARLIER = "statistics.npz"
_TOKENIZER = "tokenizer"
_DIGEST = "sha256"
_EMBED_TOKENS = "decoder.embed_tokens.weight"
_ROWS = 8192
_AGAIN = "make the calibration set again"
_MANIFEST_BYTES = 64 << 20


@dataclass(frozen=True)
class DataOptions:
    """The choice of samples.

    Attributes:
        source: a folder of images, a JSON Lines file, or None for the built-in set.
        samples: largest number of samples.
        seed: decides which samples are used, and in which order.
        max_tiles: most tiles of an image, without its thumbnail; the model's own limit, where that is lower.
        max_tokens: an item with more tokens is broken.
        max_broken: more broken items than this are an error.

    Raises:
        EdgeError: from the constructor, for a number that is too small or too large, or a value of another type.
    """

    source: Path | None = None
    samples: int = 64
    seed: int = 0
    max_tiles: int = 4
    max_tokens: int = DEFAULT_MAX_TOKENS
    max_broken: int = 8

    def __post_init__(self) -> None:
        if isinstance(self.source, str):  # as in every other place where a path is given
            object.__setattr__(self, "source", Path(self.source))
        require_types(self)
        if min(self.samples, self.max_tokens) < 1 or self.max_broken < 0 or not 1 <= self.max_tiles <= MAX_TILES:
            raise EdgeError(
                f"calibration takes at least 1 sample and 1 token, 1 to {MAX_TILES} tiles, and 0 or more broken items"
            )

    def describe(self) -> dict[str, Any]:
        """Return the JSON values that decide which samples result. A file's size and time stand for its content."""
        values = asdict(self) | {"source": "built-in"}
        if self.source is not None and self.source.exists():
            read = image_files(self.source) if self.source.is_dir() else [self.source]
            values["source"] = _describe_files(self.source, read)
        return values


def describe_set(folder: Path) -> list[str]:
    """Return the JSON values that tell a calibration set from another. Sizes and times stand for contents."""
    return _describe_files(folder, [folder / name for name in (MANIFEST, *_FILES)])


def _describe_files(place: Path, read: list[Path]) -> list[str]:
    """The place, and a digest of those files of it that are read: others, such as this run's own state, may change."""
    found = [(file.relative_to(place).as_posix(), file.stat()) for file in read if file.is_file()]
    stats = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in found]
    return [str(place.resolve()), hashlib.sha256(json.dumps(stats).encode()).hexdigest()[:16]]


@dataclass(frozen=True)
class CalibrationSet:
    """An embedded calibration set.

    Attributes:
        folder: the folder of the set.
        checkpoint: identity of the checkpoint that it was made with.
        names: names of the samples.
        lengths: tokens of each sample.
        tiles: tiles of each sample.
        broken: one line for each item that was skipped.
        image_token: the placeholder's id.
        hidden_size: width of the decoder.
        files: SHA-256 of the other files by their names; empty in a work folder, which has seals instead.
    """

    folder: Path
    checkpoint: str
    names: list[str]
    lengths: list[int]
    tiles: list[int]
    broken: list[str]
    image_token: int
    hidden_size: int
    files: dict[str, str] = field(default_factory=dict)

    @staticmethod
    def open(folder: Path) -> CalibrationSet:
        """Read a set that `calibrate` wrote. Whether its large files are what was written, only `adopt` checks.

        Raises:
            EdgeError: the folder holds no calibration set, or an incomplete one.
        """
        restore(folder)
        path = folder / MANIFEST
        if not path.is_file():
            raise EdgeError(f"{folder} is no calibration set; make one with internvl-edge calibrate CHECKPOINT -o DIR")
        try:
            values = read_object(path, EdgeError, _AGAIN, limit=_MANIFEST_BYTES)
            written = values.pop(_DIGEST, None)  # earlier versions wrote none, and `adopt` takes no set of theirs
            if written is not None and written != _digest(values):
                raise ValueError("it is not what was written")
            found = decode(CalibrationSet, {**values, "folder": folder}, strict=True)
            if not len(found.names) == len(found.lengths) == len(found.tiles):
                raise ValueError("names, lengths and tiles are not of the same samples")
            if min(*found.lengths, *found.tiles, found.image_token, found.hidden_size) < 0:
                raise ValueError("a number is negative")
        except ValueError as error:
            raise EdgeError(f"{path} is damaged ({error}); {_AGAIN}") from None
        _ = found.is_image, found.embeddings()  # found out now, not after hours of quantizing
        return found

    @property
    def total(self) -> int:
        """The number of tokens in all samples."""
        return sum(self.lengths)

    @property
    def is_image(self) -> NDArray[np.bool_]:
        """[tokens] True where a token comes from an image.

        Raises:
            EdgeError: the tokens' file is missing or damaged.
        """
        path = self.folder / TOKENS
        try:
            tokens = np.load(path, allow_pickle=False)
        except (OSError, EOFError, ValueError):
            tokens = None
        if tokens is None or tokens.shape != (self.total,):
            raise EdgeError(f"{path} is missing or incomplete; {_AGAIN}")
        return np.asarray(tokens == self.image_token)

    def embeddings(self) -> NDArray[np.float32]:
        """float32 [tokens, hidden], mapped from its file."""
        path, shape = self.folder / EMBEDDINGS, (self.total, self.hidden_size)
        if not path.is_file() or path.stat().st_size != 4 * shape[0] * shape[1]:
            raise EdgeError(f"{path} is missing or incomplete; {_AGAIN}")
        return np.memmap(path, np.float32, "r", shape=shape)

    def tile_embeddings(self, tile: int) -> NDArray[np.float32]:
        """float32 [tokens, hidden] of one tile's image tokens."""
        places = np.flatnonzero(self.is_image).reshape(sum(self.tiles), -1)[tile]
        return np.array(self.embeddings()[places])

    @property
    def tile_owners(self) -> list[str]:
        """The name of each tile's sample."""
        return [name for name, count in zip(self.names, self.tiles, strict=True) for _ in range(count)]

    def pixels(self, size: int) -> NDArray[np.uint8]:
        """uint8 [tiles, size, size, 3], mapped from their file.

        Raises:
            EdgeError: the tiles' file is missing or incomplete.
        """
        path, shape = self.folder / TILES, (sum(self.tiles), size, size, 3)
        if not path.is_file() or path.stat().st_size != prod(shape):
            raise EdgeError(f"{path} is missing or incomplete; {_AGAIN}")
        return np.memmap(path, np.uint8, "r", shape=shape) if shape[0] else np.empty(shape, np.uint8)

    def chunks(self, tokens: int) -> list[range]:
        """Split the samples, in their order, into ranges of at most `tokens` tokens.

        A longer sample is its own range.
        """
        runs: list[range] = []
        start, size = 0, 0
        for index, length in enumerate(self.lengths):
            if size and size + length > tokens:
                runs.append(range(start, index))
                start, size = index, 0
            size += length
        return [*runs, range(start, len(self.lengths))]


def prepare(
    work: WorkFolder,
    checkpoint: Checkpoint,
    identity: str,
    options: DataOptions,
    progress: Progress,
) -> CalibrationSet:
    """Tokenize and tile the samples into the work folder; `pipeline.embed` makes the embeddings.

    If the work folder has them already, only open them.

    Raises:
        EdgeError: no data, too many broken items.
    """
    if (values := work.read_json(MANIFEST)) is not None:
        progress.skip(1)
        return CalibrationSet(work.path, **values)
    # The same code builds the tokenizer of an exported bundle.
    from internvl_edge.checkpoint.tokenizer_files import build_tokenizer

    tokenizer = work.path / _TOKENIZER
    tokenizer.write_bytes(build_tokenizer(checkpoint.folder, checkpoint.config))
    builder = SampleBuilder(checkpoint.config, tokenizer, options.max_tiles, options.max_tokens)
    ids: list[NDArray[np.int32]] = []
    manifest: dict[str, Any] = {"checkpoint": identity, "names": [], "lengths": [], "tiles": [], "broken": []}

    noted: set[str] = set()

    def skipped(line: str) -> None:
        manifest["broken"].append(line)
        problem = line.partition(": ")[2]
        if problem not in noted:  # a form that is not known has as many lines as the file
            noted.add(problem)
            progress.note(f"skipped {line}")

    items = read_items(options.source, options.seed)
    preparing = progress.phase("preparing the calibration data", options.samples, "samples")
    with preparing as advance, work.writing(TILES) as new, new.open("wb") as file:
        for sample in good_samples(items, builder, options.samples, options.max_broken, skipped):
            file.write(sample.tiles.tobytes())
            ids.append(sample.ids)
            manifest["names"].append(sample.name)
            manifest["lengths"].append(len(sample.ids))
            manifest["tiles"].append(len(sample.tiles))
            advance(1)
    with work.writing(TOKENS) as new, new.open("wb") as file:
        np.save(file, np.concatenate(ids))
    manifest |= {"image_token": builder.image_token, "hidden_size": checkpoint.config.decoder.hidden_size}
    work.write_json(MANIFEST, manifest)
    return CalibrationSet(work.path, **manifest)


def embed_tokens(path: Path, checkpoint: Checkpoint, calibration: CalibrationSet) -> None:
    """Write the embeddings file as it is without images: each token's row of the table."""
    tokens = np.load(calibration.folder / TOKENS, allow_pickle=False)
    table = checkpoint.tensor(_EMBED_TOKENS)
    with path.open("wb") as file:
        for start in range(0, len(tokens), _ROWS):
            rows = to_torch(table[tokens[start : start + _ROWS]]).float().numpy()
            file.write(np.ascontiguousarray(rows).tobytes())


def adopt(work: WorkFolder, given: CalibrationSet, embedded: bool, progress: Progress) -> CalibrationSet:
    """Take the set that `calibrate` made into the work folder, as if `prepare` (and `embed`) had made it there.

    Args:
        work: the folder of the run.
        given: the set.
        embedded: take its embeddings; otherwise its tiles, from which they are made.
        progress: counts the phase.

    Raises:
        EdgeError: a file of the set is missing, or not the one that `calibrate` wrote.
    """
    progress.skip(1)
    for name in (TOKENS, EMBEDDINGS if embedded else TILES):
        if not work.has(name):
            if not (given.folder / name).is_file():
                raise EdgeError(f"{given.folder / name} is missing or incomplete; {_AGAIN}")
            with work.writing(name) as new:
                _link(given.folder / name, new)
            if work.digest(name) != given.files.get(name):
                work.remove(name)
                raise EdgeError(f"{given.folder / name} is damaged or was changed; {_AGAIN}")
    manifest = {name: value for name, value in asdict(given).items() if name != "folder"}
    work.write_json(MANIFEST, manifest)
    return CalibrationSet(work.path, **manifest)


def finish(work: WorkFolder, target: Path, permit: Callable[[], None]) -> None:
    """The set in a work folder becomes the folder `target` in one step; then the work folder goes.

    Until that step the work folder keeps all it has, so that a killed run continues. `permit` raises EdgeError where
    `target` may not be made.
    """
    folder = work.path / OUT
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name in _FILES:
        _link(work.need(name), folder / name)
    values = work.need_json(MANIFEST) | {"files": {name: work.digest(name) for name in _FILES}}
    text = json.dumps(values | {_DIGEST: _digest(values)}, indent=1, ensure_ascii=False)
    (folder / MANIFEST).write_text(text, encoding="utf-8")
    permit()
    put_in_place(folder, target)
    discard(work.path)


def calibration_files(folder: Path) -> set[str]:
    """A calibration set's own files.

    Raises:
        EdgeError: the folder does not read as a calibration set.
    """
    CalibrationSet.open(folder)
    return {MANIFEST, *_FILES, _EARLIER}


def _digest(values: dict[str, Any]) -> str:
    """Return the SHA-256 of the entries of calibration.json."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def _link(source: Path, target: Path) -> None:
    """Give the file a second name, or copy it where the file system does not support hard links."""
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
