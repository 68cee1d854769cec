"""Measure how fast a bundle is on this machine, and compare decode with the limit of the machine.

Prompts are random embeddings and images are random pixels, because speed does not depend on the values. The memory
bandwidth limits decode. The share of this limit is B / (t * W): B is the bytes that one token must read (weights as
stored, and the KV cache up to its position), t is the time of the token, and W is the bandwidth in bytes/s, measured in
the same run.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from internvl_edge.base.errors import EngineError
from internvl_edge.base.machine import cores, peak_memory
from internvl_edge.base.progress import Progress, as_progress
from internvl_edge.base.run_record import RunRecord, run_record
from internvl_edge.bundle.bundle import Bundle
from internvl_edge.bundle.manifest import Manifest
from internvl_edge.planning.footprint import Footprint
from internvl_edge.planning.storage import bundle_storage

from . import limits
from .engines import finish
from .engines.steps import common_steps
from .image_cache import ImageCache
from .model import InternVL

PROMPTS = (300, 1800)
CONTEXTS = (300, 2000)
QUESTIONS = (1, 7)
QUESTION_TEXT = 300
ROWS = (1, 2, 4, 8)
SAMPLE_TOKENS = 32
_DECODED = 16
_MOST_RUNS = 1000
# Phases of the progress that `bench` shows.
_PHASES = 7


@dataclass(frozen=True)
class Figure:
    """One measurement: the median of the runs, and their spread (half the range, as a share of the median)."""

    name: str
    value: float
    unit: str
    spread: float = 0.0


@dataclass(frozen=True)
class BenchResult:
    """All figures of one bundle on one machine.

    `device` is where it ran; where "auto" chose, with the reason. `bandwidth` is in bytes/s, `matrix_rate` in FLOP/s,
    and sizes are in bytes. `decode_limit` maps the name of each decode figure to its share of the speed that the
    measured bandwidth allows. `run` is of the whole measurement.
    """

    bundle: str
    device: str
    threads: int
    bandwidth: float
    matrix_rate: float
    disk_bytes: int
    peak_rss_bytes: int
    figures: list[Figure]
    decode_limit: dict[str, float]
    run: RunRecord

    def to_dict(self) -> dict[str, Any]:
        """Return the result as JSON values."""
        return asdict(self)


def bench(
    folder: Path, *, repeat: int = 3, threads: int | None = None, progress: bool | Progress = False, **loading: Any
) -> BenchResult:
    """Measure a bundle. `loading` holds further arguments of `InternVL.load`; with `rows`, rows are measured too.

    `progress` is shown on standard error.

    Raises:
        BundleError, EngineError: as `InternVL.load`.
        EngineError: `repeat` is not from 1 to 1000, or the context has no room for what is measured.
    """
    if not 1 <= repeat <= _MOST_RUNS:
        raise EngineError(f"repeat is {repeat}, expected 1 to {_MOST_RUNS}")
    used, begun = threads or cores(), time.perf_counter()
    # Verify first: only the first load of a bundle hashes its files, and the figure `load` is for all later loads.
    progress = as_progress(progress)
    progress.expect(_PHASES)
    with progress.phase("verifying the bundle"):
        manifest = Bundle.open(folder).manifest
    started = time.perf_counter()
    with progress.phase("loading the bundle"):
        model = InternVL.load(folder, threads=threads, progress=progress, **loading)
    with model:
        load_s = time.perf_counter() - started
        runs = _Runs(model, repeat)
        with progress.phase("measuring the decoding of answers"):
            decode = runs.decode()
        dialect = model.engine.dialect
        device = str(model.choice or loading.get("device"))
        with progress.phase("measuring whole questions"):
            answers = [*decode.values(), *runs.first_token(), runs.second_question()]
        with progress.phase("measuring images and prompts"):
            figures = [Figure("load", load_s, "s"), *runs.vision(), *runs.prefill(), *answers]
        with progress.phase("measuring rows"):
            figures += runs.rows()
    peak_rss = peak_memory()
    # Measured last, so that its arrays do not count in the peak RSS of the model.
    with progress.phase("measuring the limits of this machine"):
        bandwidth, matrix_rate = limits.read_bandwidth(used), limits.matrix_rate()
    footprint = bundle_footprint(manifest, dialect)
    return BenchResult(
        bundle=folder.name,
        device=device,
        threads=used,
        bandwidth=bandwidth,
        matrix_rate=matrix_rate,
        disk_bytes=sum(entry.bytes for entry in manifest.files.values()),
        peak_rss_bytes=peak_rss,
        figures=figures,
        decode_limit={
            figure.name: figure.value * footprint.decode_bytes(context + _DECODED // 2) / bandwidth
            for context, figure in decode.items()
        },
        run=run_record(time.perf_counter() - begun),
    )


def bundle_footprint(manifest: Manifest, dialect: str) -> Footprint:
    """Return the footprint of what this engine reads. A float KV cache has the type that the graphs compute in."""
    storage = bundle_storage(manifest, dialect)
    cache_bytes = storage.cache_bytes if manifest.kv_cache else storage.vector_bytes
    return Footprint(manifest.model, replace(storage, cache_bytes=cache_bytes))


class _Runs:
    """Runs and times every phase on one loaded model."""

    def __init__(self, model: InternVL, repeat: int) -> None:
        self._engine = model.engine
        self._tokens_per_tile = model.config.tokens_per_tile
        self._repeat = repeat
        random = np.random.default_rng(0)
        size = model.config.vision.image_size
        self._tiles = random.integers(0, 256, (max(QUESTIONS), size, size, 3), dtype=np.uint8)
        rows = max(*PROMPTS, *CONTEXTS, max(QUESTIONS) * self._tokens_per_tile + QUESTION_TEXT)
        needed = max(rows, max(CONTEXTS) + _DECODED)
        if needed > self._engine.cache.capacity:
            found = f"the context has {self._engine.cache.capacity} tokens, what is measured needs {needed}"
            raise EngineError(f"{found}; give --context {needed} or more")
        self._embeds = random.standard_normal((rows, model.config.decoder.hidden_size)).astype(np.float32) * 0.05

    def vision(self) -> list[Figure]:
        """Measure milliseconds per tile, for one tile alone and for an image of several tiles."""
        figures = []
        for count in QUESTIONS:
            middle, spread = self._measured(partial(self._engine.encode, self._tiles[:count]))
            figures.append(Figure(f"vision, {_tiles(count)}", middle * 1e3 / count, "ms/tile", spread))
        return figures

    def prefill(self) -> list[Figure]:
        """Measure prompt tokens per second."""
        return [self._rate(f"prefill {count}", count, partial(self._prefill, count)) for count in PROMPTS]

    def decode(self) -> dict[int, Figure]:
        """Measure decoded tokens per second, keyed by the number of tokens already in the KV cache."""
        figures = {}
        for context in CONTEXTS:
            self._prefill(context)
            figures[context] = self._rate(f"decode at {context}", _DECODED, partial(self._decode_from, context))
        return figures

    def first_token(self) -> list[Figure]:
        """Measure seconds from the tiles to the first logits of a question about an image."""
        figures = []
        for count in QUESTIONS:
            middle, spread = self._measured(partial(self._question, count))
            figures.append(Figure(f"first token, {_tiles(count)} + {QUESTION_TEXT}", middle, "s", spread))
        return figures

    def second_question(self) -> Figure:
        """Measure seconds to the first logits of a second question about the same image.

        The image cache already holds the image tokens, and the KV cache those up to the end of a step (see `prefixes`).
        """
        tiles = self._tiles[: max(QUESTIONS)]
        images = ImageCache(self._engine)
        image_tokens = len(tiles) * self._tokens_per_tile
        total = image_tokens + QUESTION_TEXT
        planned = self._engine.steps(total)
        shared = sum(common_steps(planned, planned, image_tokens))
        self._question(len(tiles))
        finish(images.encode_steps(tiles))

        def ask() -> None:
            finish(images.encode_steps(tiles))
            self._engine.cache.reset(shared)
            self._engine.prefill(self._embeds[shared:total])

        middle, spread = self._measured(ask)
        return Figure(f"second question, {_tiles(len(tiles))} + {QUESTION_TEXT}", middle, "s", spread)

    def rows(self) -> list[Figure]:
        """Measure tokens per second in all where several rows decode together, and samples of one prompt.

        There are no figures for an engine with one row.
        """
        rows = self._engine.cache.rows
        if rows == 1:
            return []
        figures = []
        for context in CONTEXTS:
            self._prefill(context)
            for row in range(1, rows):
                self._engine.copy(0, row, context)
            for count in (each for each in ROWS if each <= rows):
                action = partial(self._decode_rows_from, context, count, _DECODED)
                figures.append(self._rate(f"decode at {context}, {_rows(count)}", count * _DECODED, action))
        middle, spread = self._measured(self._samples)
        return [*figures, Figure(f"{rows} samples, {QUESTION_TEXT} + {SAMPLE_TOKENS}", middle, "s", spread)]

    def _samples(self) -> None:
        self._prefill(QUESTION_TEXT)
        rows = self._engine.cache.rows
        for row in range(1, rows):
            self._engine.copy(0, row, QUESTION_TEXT)
        self._decode_rows_from(QUESTION_TEXT, rows, SAMPLE_TOKENS)

    def _decode_rows_from(self, context: int, count: int, steps: int) -> None:
        for row in range(count):
            self._engine.cache.reset(context, row)
        for step in range(steps):
            self._engine.decode_rows(self._embeds[step : step + count], range(count))

    def _rate(self, name: str, tokens: int, action: Callable[[], object]) -> Figure:
        middle, spread = self._measured(action)
        return Figure(name, tokens / middle, "tokens/s", spread)

    def _measured(self, action: Callable[[], object]) -> tuple[float, float]:
        action()
        return limits.median_and_spread([limits.timed(action) for _ in range(self._repeat)])

    def _prefill(self, count: int) -> None:
        self._engine.cache.reset()
        self._engine.prefill(self._embeds[:count])

    def _decode_from(self, context: int) -> None:
        self._engine.cache.reset(context)
        for row in range(_DECODED):
            self._engine.decode(self._embeds[row])

    def _question(self, tiles: int) -> None:
        self._engine.encode(self._tiles[:tiles])
        self._prefill(tiles * self._tokens_per_tile + QUESTION_TEXT)


def _rows(count: int) -> str:
    return f"{count} row" if count == 1 else f"{count} rows"


def _tiles(count: int) -> str:
    return f"{count} tile" if count == 1 else f"{count} tiles"
