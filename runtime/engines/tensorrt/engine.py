"""The TensorRT engine runs the built engines of a bundle on the present GPU, with cuda-bindings alone (see `Engine`).

The KV cache stays on the device. A decode step sends one embedding to the device and gets one token id back; logits are
copied only on request. A decode step is one CUDA graph, which TensorRT for RTX captures itself and which this module
captures for TensorRT. Vision has its own stream and memory, so `encode` may run in one thread while another one
decodes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterator, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from internvl_edge.base.errors import EngineError
from internvl_edge.base.files import replacing
from internvl_edge.base.progress import SILENT, Progress
from internvl_edge.bundle import names
from internvl_edge.bundle.bundle import Bundle
from internvl_edge.planning.programs import reads_whole

from .. import Engine
from ..rows import CacheRows
from .buffers import HALVES, Block
from .cuda import Cuda
from .flavour import Flavour, load_flavour
from .program import Context, Program
from .record import ENGINES, EngineRecord, engine_folder, find_engines, rows_text
from .runtime_cache import NEW_ENTRIES, DeviceCache
from .steps import DecodeGraph, PackedAngles, Step, split, step_sizes, window, windows

# Bytes. Compiled kernels of one engine beyond this are neither saved nor loaded. Their number is bounded by the shapes.
_LARGEST_KERNELS = 256 << 20


class TensorRTEngine(Engine):
    """Runs the engines that `build` put into a bundle.

    Prompts are computed in one row of the KV cache. A decode step of engines for several rows computes all of them, and
    reads all slots of the cache, so that a row's numbers do not depend on the lengths of the others. Rows that take no
    part get an entry behind their last one, which nobody sees, and which their next token overwrites.

    Args:
        opened: the bundle.
        target: name of the engines' folder; the default is the first one that fits the present GPU.
        built: a record and the folder of its files, in place of engines that are in the bundle.
        capacity: the most tokens in each row; the default is, and the most is, what the engines were built for.
        rows: the sequences that are computed side by side; the most is what the engines were built for.
        progress: shows the warm-up, which takes longest when TensorRT for RTX compiles kernels for this GPU for the
            first time.
        warm: run each shape once before the first answer needs it (see `_warm_up`).
        cuda, flavour: replacements for the installed libraries, for tests.

    Raises:
        EngineError: there is no GPU or no engine for it, the engines were built from other files or by another
            TensorRT, or there is too little memory. Nothing stays allocated then.
    """

    def __init__(
        self,
        opened: Bundle,
        target: str | None = None,
        *,
        built: tuple[EngineRecord, Path] | None = None,
        capacity: int | None = None,
        rows: int = 1,
        progress: Progress = SILENT,
        warm: bool = True,
        cuda: Cuda | None = None,
        flavour: Flavour | None = None,
    ) -> None:
        self._cuda = cuda or Cuda()
        self._programs: list[Program] = []
        self._contexts: list[Context] = []
        self._decoding: list[tuple[Step, DecodeGraph]] = []
        self._closed = False
        try:
            self._open(opened, built or self._find(opened, target), capacity, rows, flavour)
            if warm:
                self._warm_up(progress)
        except BaseException:
            self.close()
            raise

    def _find(self, opened: Bundle, target: str | None) -> tuple[EngineRecord, Path]:
        record = find_engines(opened, self._cuda.compute_capability(), target)
        return record, engine_folder(opened, record.target)

    def _open(
        self, opened: Bundle, built: tuple[EngineRecord, Path], capacity: int | None, rows: int, flavour: Flavour | None
    ) -> None:
        model = opened.manifest.model
        record, self._folder = built
        self._flavour = flavour or load_flavour(record.flavour)
        if self._flavour.version != record.version:
            raise EngineError(
                f"the engines in {self._folder} are of {record.flavour} {record.version}, installed is "
                f"{self._flavour.version}; build them again"
            )
        self._options = record.options
        self.cache = CacheRows(record.options.capacity if capacity is None else capacity, rows)
        self.tiles_at_once = record.options.tiles
        if self.cache.capacity > record.options.capacity:
            raise EngineError(
                f"the engines in {self._folder} hold {record.options.capacity} tokens, asked for are {capacity}; "
                f"leave out --context, or build with --context {capacity}"
            )
        if rows > record.options.rows:
            raise EngineError(
                f"the engines in {self._folder} hold {rows_text(record.options.rows)}, asked for are {rows}; ask for "
                f"fewer, or build with --rows {rows}"
            )
        self._decoder = model.decoder
        self._half = HALVES[record.options.dtype]
        self._angles = PackedAngles(model.decoder, record.options.capacity, self._half)
        # Where a new shape costs a compilation, prompts are padded to few sizes. Elsewhere padding costs more.
        chunk = record.options.chunk
        compiles, kept = self._flavour.builds_anywhere, min(record.options.kept, chunk)
        self._sizes = step_sizes(chunk) if compiles else range(1, chunk + 1)
        self._score_sizes = [kept] if compiles else range(1, kept + 1)
        text = self._program(record, "decoder")
        self._stream = self._cuda.stream()
        self._rows, self._slots = record.options.rows, record.options.slots
        most = max(record.options.kept, self._rows)
        self._results = Block(
            self._cuda,
            {"token": ((most,), np.int64), "logits": ((most, model.decoder.vocab_size), np.float32)},
            "logits",
        )
        itemsize = text.itemsize("past_key_values.0.key")  # an int8 cache of the bundle can be one of 16 bits here
        new = max(chunk, self._rows) if NEW_ENTRIES in text.outputs() else 0
        self._device_cache = DeviceCache(self._cuda, model.decoder, self._slots, itemsize, self._rows, new)
        self._bound = 0  # the row that the prefill step is bound to
        self._last = 0  # the row of the last decode step of one row
        shared = self._shared_addresses(self._slots)
        # The programs of an engine: for one token with a part of the cache, for one token with the whole cache, and for
        # prompts. The last one does the work of those that are not there.
        count = text.profiles()
        self._decoding = [self._decoder_step(text, profile, shared) for profile in range(max(1, count - 1))]
        self._prefill = self._step(text, count - 1, chunk, kept, shared)
        self._vision = _Vision(self, self._program(record, "vision"), opened)

    @property
    def dialect(self) -> str:
        """The name of the decoder graph that engines are built from."""
        return "standard"

    def encode(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Encode tiles [tiles, S, S, 3] to image tokens [tiles, tokens_per_tile, hidden]."""
        return self._vision.encode(pixels)

    def steps(self, length: int) -> list[int]:
        """Return the sizes of the steps of a prompt of `length` tokens, without padding.

        Only the last one has padding, and the plan of what is left depends on its start and its length alone. So a
        prompt that continues at the end of one of its steps takes the same shapes as in an empty cache.
        """
        return [tokens for tokens, _ in split(length, 0, self._sizes, self._options.capacity)]

    def prefill_steps(self, embeds: NDArray[np.float32], row: int = 0) -> Generator[None, None, NDArray[np.float32]]:
        """Append a prompt [seq, hidden] in chunks (see `Engine`)."""
        total = self.cache.room_for(len(embeds), row)
        left = len(embeds)
        for part, size in self._parts(embeds, self._sizes, row):
            self._run(part, size, total, np.array([len(part) - 1]), row)
            left -= len(part)
            if not left:  # before other rows decode, whose logits take the same place
                logits = self._logits_of([0])[0].copy()
            yield
        return logits

    def decode_rows(self, embeds: NDArray[np.float32], rows: Sequence[int]) -> list[NDArray[np.float32]]:
        """Append one token to each row (see `Engine`)."""
        self._decode(embeds, rows)
        return self._logits_of(rows)

    def decode_token(self, embed: NDArray[np.float32], row: int = 0) -> int:
        """Append one token [hidden], and return the most probable next token, which the device chooses."""
        self._decode(embed[None], [row])
        self._last = row
        return int(self._results.arrays["token"][row])

    def last_logits(self) -> NDArray[np.float32]:
        """Copy the logits [vocab] of the last `decode_token` from the device. They are valid until the next call."""
        return self._logits_of([self._last])[0]

    def score(self, embeds: NDArray[np.float32], row: int = 0) -> NDArray[np.float32]:
        """Append tokens [seq, hidden], and return the logits [seq, vocab] after each of them."""
        total = self.cache.room_for(len(embeds), row)
        found = []
        for part, size in self._parts(embeds, self._score_sizes, row):
            # Padding asks for the logits of the last token again, so that the shapes of all steps are the same.
            self._run(part, size, total, np.minimum(np.arange(size), len(part) - 1), row)
            found += [logits.copy() for logits in self._logits_of(range(len(part)))]
        return np.stack(found)

    def copy(self, source: int, target: int, length: int) -> None:
        """Make the first `length` tokens of one row those of another row, too."""
        self._device_cache.copy(source, target, length, self._stream)
        self._cuda.synchronize(self._stream)
        self.cache.copied(source, target, length)

    def interrupt(self) -> None:
        """Do nothing, because a step on the device is short."""

    def close(self) -> None:
        """Save the compiled kernels for the next start, then release everything. Further calls do nothing."""
        if self._closed:
            return
        self._closed = True
        try:
            self._keep_kernels()
        finally:
            for _, graph in self._decoding:
                graph.close()
            for context in self._contexts:
                context.close()
            for program in self._programs:
                program.close()
            self._cuda.close()

    def __enter__(self) -> TensorRTEngine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_closed"):
            self.close()

    def _decode(self, embeds: NDArray[np.float32], rows: Sequence[int]) -> None:
        """Append one token [hidden] to each of some rows."""
        totals = [self.cache.room_for(1, row) for row in rows]
        program, slots = self._program_for(max(totals))
        step, graph = self._decoding[program]
        for embed, row, total in zip(embeds, rows, totals, strict=True):
            step.fill_one(embed, total - 1, row)
        for row in set(range(self.cache.rows)).difference(rows):
            step.idle(row, self.cache.length(row))
        graph.run(slots)
        for row, total in zip(rows, totals, strict=True):
            self._device_cache.store(total - 1, 1, 1, self._stream, row, row)
        self._cuda.synchronize(self._stream)
        for row in rows:
            self.cache.append(1, row)

    def _program_for(self, total: int) -> tuple[int, int]:
        """Return which program computes the last of `total` tokens, and how many slots of the cache it reads."""
        if self._rows > 1:
            return 0, self._slots
        slots = window(total, self._slots)
        whole = len(self._decoding) > 1 and reads_whole(slots, self._slots)
        return (1, self._slots) if whole else (0, slots)

    def _parts(
        self, embeds: NDArray[np.float32], sizes: Sequence[int], row: int
    ) -> Iterator[tuple[NDArray[np.float32], int]]:
        """Yield the tokens of each step, and its size with padding."""
        start = 0
        for tokens, size in split(len(embeds), self.cache.length(row), sizes, self._options.capacity):
            yield embeds[start : start + tokens], size
            start += tokens

    def _run(self, embeds: NDArray[np.float32], size: int, total: int, kept: NDArray[np.int64], row: int = 0) -> None:
        step, start = self._prefill, self.cache.length(row)
        if row != self._bound:
            step.context.bind(self._device_cache.addresses(row))
            self._bound = row
        step.fill(embeds, size, start, total, kept)
        step.reshape(size, len(kept), window(start + size, self._slots))
        step.enqueue(self._stream)
        self._device_cache.store(start, len(embeds), size, self._stream, row)
        self._cuda.synchronize(self._stream)  # the next step fills the host block again
        self.cache.append(len(embeds), row)

    def _warm_up(self, progress: Progress) -> None:
        """Run shapes once that would otherwise be slow in the first answer, and leave the cache empty.

        TensorRT for RTX compiles kernels for a shape when it first occurs. All shapes of decode steps and tiles are
        run, which are compiled before they run, and each size of prompt steps, which are compiled in the background.
        TensorRT has nothing to compile, but loads its kernels with the first run: one shape of each kind is run.
        """
        compiles = self._flavour.builds_anywhere
        lengths = [1, *(slots + 1 for slots in windows(self._slots) if slots < self.cache.capacity)]
        lengths = list({self._program_for(length): length for length in lengths}.values())  # one for each shape
        tiles, sizes = range(1, self._options.tiles + 1), step_sizes(self._options.chunk)
        if not compiles:
            tiles, lengths, sizes = tiles[:1], lengths[:1], sizes[:1]
        runs: list[Callable[[], object]] = [partial(self._vision.warm_up, count) for count in tiles]
        runs += [partial(self._warm_up_decode, length) for length in lengths]
        runs += [partial(self._warm_up_prompt, size) for size in sizes]
        label = "compiling kernels for this GPU" if compiles and not self._has_kernels() else "warming up"
        with progress.phase(label, len(runs), "shapes") as step:
            for run in runs:
                run()
                step(1)
        self.cache.reset()

    def _warm_up_decode(self, length: int) -> None:
        self.cache.reset()
        self.cache.append(length - 1)
        self._decode(np.zeros((1, self._decoder.hidden_size), np.float32), [0])

    def _warm_up_prompt(self, size: int) -> None:
        self.cache.reset()
        self._run(np.zeros((size, self._decoder.hidden_size), np.float32), size, size, np.array([size - 1]))

    def _logits_of(self, rows: Sequence[int]) -> list[NDArray[np.float32]]:
        """Copy some rows of the logits of the last step from the device, and wait."""
        logits = self._results.arrays["logits"]
        for row in rows:
            self._results.download("logits", self._stream, logits[row].nbytes, row * logits[row].nbytes)
        self._cuda.synchronize(self._stream)
        return [logits[row] for row in rows]

    def _program(self, record: EngineRecord, graph: str) -> Program:
        path = self._folder / ENGINES[graph]
        program = Program(self._flavour, self._cuda, path, record.files[path.name]["sha256"], self._kernels(graph))
        self._programs.append(program)
        return program

    def _kernels(self, graph: str) -> bytes:
        """Return the kernels of an earlier start, b"" for none."""
        path = self._folder / names.RUNTIME_CACHES[graph]
        return path.read_bytes() if path.is_file() and path.stat().st_size <= _LARGEST_KERNELS else b""

    def _has_kernels(self) -> bool:
        return all((self._folder / name).is_file() for name in names.RUNTIME_CACHES.values())

    def _decoder_step(self, program: Program, profile: int, shared: dict[str, int]) -> tuple[Step, DecodeGraph]:
        step = self._step(program, profile, 1, 1, shared, self._rows)
        return step, DecodeGraph(self._cuda, step, self._stream, not self._flavour.captures_itself)

    def _step(
        self, program: Program, profile: int, tokens: int, kept: int, shared: dict[str, int], rows: int = 1
    ) -> Step:
        context = self._context(program, profile, self._stream, repeats=tokens == 1, eager=tokens == 1)
        step = Step(self._cuda, context, self._decoder, self._half, self._angles, tokens, kept, self._results, rows)
        addresses = shared | step.addresses()
        if missing := (program.inputs().keys() | program.outputs().keys()) ^ addresses.keys():
            raise EngineError(f"{ENGINES['decoder']} does not have the expected {sorted(missing)[0]}; build it again")
        step.context.bind(addresses)
        if self._rows > 1:  # the batch of these inputs differs from program to program
            cache = {name: shape for name, shape in program.inputs().items() if name.startswith("past_key_values")}
            step.context.reshape({name: (rows, *shape[1:]) for name, shape in cache.items()} | {"past_length": (rows,)})
        return step

    def _context(self, program: Program, profile: int, stream: Any, *, repeats: bool, eager: bool) -> Context:
        context = program.context(profile, stream, repeats=repeats, eager=eager)
        self._contexts.append(context)
        return context

    def _shared_addresses(self, count: int) -> dict[str, int]:
        """Return the addresses that all steps use: the KV cache, the slot numbers and the results."""
        slots = Block(self._cuda, {"slots": ((count,), np.int64)}, "slot numbers")
        slots.arrays["slots"][:] = np.arange(count)
        slots.upload(self._stream)
        self._cuda.synchronize(self._stream)
        results = {name: self._results.address(name) for name in ("token", "logits")}
        return {"slots": slots.address("slots")} | results | self._device_cache.addresses()

    def _keep_kernels(self) -> None:
        """Save the compiled kernels. A write error is ignored, because it only makes the next start slower.

        Too many kernels are not saved; the next start then begins with those that were saved before.
        """
        for program, graph in zip(self._programs, ("decoder", "vision"), strict=False):
            data = program.cache_bytes()
            path = self._folder / names.RUNTIME_CACHES[graph]
            with contextlib.suppress(OSError):
                if 0 < len(data) <= _LARGEST_KERNELS and not (path.is_file() and path.read_bytes() == data):
                    with replacing(path) as temporary:
                        temporary.write_bytes(data)


class _Vision:
    """The vision engine, with its own stream, memory and execution context."""

    def __init__(self, engine: TensorRTEngine, program: Program, opened: Bundle) -> None:
        model, tiles = opened.manifest.model, engine._options.tiles
        self._cuda, self._half, self._tiles = engine._cuda, engine._half, tiles
        size = model.vision.image_size
        self._shape = (size, size, 3)
        self._stream = self._cuda.stream()
        self._pixels = Block(self._cuda, {"pixels": ((tiles, *self._shape), np.uint8)}, "tiles")
        shape = (tiles, model.tokens_per_tile, model.decoder.hidden_size)
        self._embeds = Block(self._cuda, {"image_embeds": (shape, self._half.stored)}, "image tokens")
        self._context = engine._context(program, 0, self._stream, repeats=False, eager=True)
        self._context.bind(
            {"pixels": self._pixels.address("pixels"), "image_embeds": self._embeds.address("image_embeds")}
        )

    def encode(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """See `Engine.encode`."""
        if pixels.dtype != np.uint8 or pixels.shape[1:] != self._shape:
            raise EngineError(f"tiles are {pixels.dtype} {pixels.shape}, expected uint8 [tiles, {self._shape}]")
        parts = []
        for start in range(0, len(pixels), self._tiles):
            part = pixels[start : start + self._tiles]
            self._pixels.arrays["pixels"][: len(part)] = part
            self._context.reshape({"pixels": part.shape})
            self._pixels.upload(self._stream)
            self._context.enqueue(self._stream)
            self._embeds.download("image_embeds", self._stream)
            self._cuda.synchronize(self._stream)
            parts.append(self._half.unpack(self._embeds.arrays["image_embeds"][: len(part)]))
        return np.concatenate(parts)

    def warm_up(self, tiles: int) -> None:
        """Encode this many black tiles."""
        self.encode(np.zeros((tiles, *self._shape), np.uint8))
