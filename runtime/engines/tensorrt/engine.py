"""The TensorRT engine runs the built engines of a bundle on the present GPU, with cuda-bindings alone (see `Engine`).

The KV cache stays on the device. A decode step sends one embedding to the device and gets one token id back; logits are
copied only on request. A decode step is one CUDA graph, which TensorRT for RTX captures itself and which this module
captures for TensorRT. Vision has its own stream and memory, so `encode` may run in one thread while another one
decodes.
"""

from __future__ import annotations

import contextlib
import logging
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from internvl_edge.base.errors import EngineError
from internvl_edge.base.files import replacing
from internvl_edge.bundle import names
from internvl_edge.bundle.bundle import Bundle
from internvl_edge.model.rope import RotaryAngles

from ..steps import steps, steps_from
from .buffers import HALVES, Block
from .cuda import Cuda
from .flavour import Flavour, load_flavour
from .program import Context, Program
from .record import ENGINES, EngineRecord, engine_folder, find_engines
from .runtime_cache import NEW_ENTRIES, DeviceCache

# Attention reads the KV cache in multiples of this many slots. Each multiple is one shape, and so one CUDA graph.
WINDOW = 512
_log = logging.getLogger(__name__)


class TensorRTEngine:
    """Runs the engines that `build` put into a bundle.

    Args:
        opened: the bundle.
        target: name of the engines' folder; the default is the first one that fits the present GPU.
        cuda, flavour: replacements for the installed libraries, for tests.

    Raises:
        EngineError: there is no GPU or no engine for it, the engines were built from other files or by another
            TensorRT, or there is too little memory. Nothing stays allocated then.
    """

    def __init__(
        self, opened: Bundle, target: str | None = None, *, cuda: Cuda | None = None, flavour: Flavour | None = None
    ) -> None:
        self._cuda = cuda or Cuda()
        self._programs: list[Program] = []
        self._contexts: list[Context] = []
        self._closed = False
        try:
            self._open(opened, target, flavour)
        except BaseException:
            self.close()
            raise

    def _open(self, opened: Bundle, target: str | None, flavour: Flavour | None) -> None:
        model = opened.manifest.model
        record = find_engines(opened, self._cuda.compute_capability(), target)
        self._folder = engine_folder(opened, record.target)
        self._flavour = flavour or load_flavour(record.flavour)
        if self._flavour.version != record.version:
            raise EngineError(
                f"the engines in {self._folder} are of {record.flavour} {record.version}, installed is "
                f"{self._flavour.version}; build them again"
            )
        self._options = record.options
        self._decoder = model.decoder
        self._half = HALVES[record.options.dtype]
        self._angles = RotaryAngles(model.decoder)
        self._length = 0
        text = self._program(record, "decoder")
        self._stream = self._cuda.stream()
        self._results = Block(
            self._cuda,
            {
                "token": ((record.options.kept,), np.int64),
                "logits": ((record.options.kept, model.decoder.vocab_size), np.float32),
            },
            "logits",
        )
        itemsize = np.dtype(opened.manifest.kv_cache or self._half.stored).itemsize
        chunk = record.options.chunk if NEW_ENTRIES in text.outputs() else 0
        self._cache = DeviceCache(self._cuda, model.decoder, record.options.capacity, itemsize, chunk)
        shared = self._shared_addresses(record.options.capacity)
        self._decode = self._step(text, 0, 1, shared)
        self._prefill = self._step(text, text.profiles() - 1, record.options.chunk, shared)
        self._graph = _DecodeGraph(self._cuda, self._decode, self._stream, not self._flavour.captures_itself)
        self._vision = _Vision(self, self._program(record, "vision"), opened)

    @property
    def dialect(self) -> str:
        """The name of the decoder graph that engines are built from."""
        return "standard"

    @property
    def capacity(self) -> int:
        """The most tokens that the KV cache can hold."""
        return self._options.capacity

    @property
    def length(self) -> int:
        """The number of tokens in the KV cache."""
        return self._length

    def encode(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Encode tiles [tiles, S, S, 3] to image tokens [tiles, tokens_per_tile, hidden]."""
        return self._vision.encode(pixels)

    def steps(self, length: int) -> list[int]:
        """Return the sizes of the steps of a prompt of `length` tokens."""
        return steps(length, (self._options.chunk,))

    def prefill(self, embeds: NDArray[np.float32]) -> NDArray[np.float32]:
        """Append a prompt [seq, hidden] in chunks, and return the logits [vocab] after its last token.

        The logits are valid until the next call.
        """
        total = self._room_for(len(embeds))
        sizes = steps_from(self.steps(total), self._length) or self.steps(len(embeds))
        for chunk in np.split(embeds, np.cumsum(sizes)[:-1]):
            self._run(self._prefill, chunk, total, [len(chunk) - 1])
        logits: NDArray[np.float32] = self._logits(1)[0]
        return logits

    def decode(self, embed: NDArray[np.float32]) -> NDArray[np.float32]:
        """Append one token [hidden], and return the logits [vocab] after it, valid until the next call."""
        self._decode_one(embed)
        logits: NDArray[np.float32] = self._logits(1)[0]
        return logits

    def decode_token(self, embed: NDArray[np.float32]) -> int:
        """Append one token [hidden], and return the most probable next token, which the device chooses."""
        self._decode_one(embed)
        return int(self._results.arrays["token"][0])

    def score(self, embeds: NDArray[np.float32]) -> NDArray[np.float32]:
        """Append tokens [seq, hidden], and return the logits [seq, vocab] after each of them."""
        total = self._room_for(len(embeds))
        rows = []
        for start in range(0, len(embeds), self._options.kept):
            part = embeds[start : start + self._options.kept]
            self._run(self._prefill, part, total, list(range(len(part))))
            rows.append(self._logits(len(part)).copy())
        return np.concatenate(rows)

    def reset(self, length: int = 0) -> None:
        """Drop all tokens from position `length` on. Their entries stay masked until later tokens overwrite them."""
        self._length = min(length, self._length)

    def close(self) -> None:
        """Save the compiled kernels for the next start, then release everything. Further calls do nothing."""
        if self._closed:
            return
        self._closed = True
        try:
            self._keep_kernels()
        finally:
            if graph := getattr(self, "_graph", None):
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

    def _decode_one(self, embed: NDArray[np.float32]) -> None:
        total = self._room_for(1)
        self._decode.fill(embed[None], self._length, total, [0])
        self._graph.run(self._decode.shapes(1, 1, self._window(total)))
        self._cache.store(self._length, 1, self._stream)
        self._cuda.synchronise(self._stream)
        self._length = total

    def _run(self, step: _Step, embeds: NDArray[np.float32], total: int, kept: list[int]) -> None:
        step.fill(embeds, self._length, total, kept)
        step.context.reshape(step.shapes(len(embeds), len(kept), self._window(self._length + len(embeds))))
        step.enqueue(self._stream)
        self._cache.store(self._length, len(embeds), self._stream)
        self._cuda.synchronise(self._stream)  # the next step fills the host block again
        self._length += len(embeds)

    def _window(self, used: int) -> int:
        return min(-(-used // WINDOW) * WINDOW, self.capacity)

    def _room_for(self, count: int) -> int:
        total = self._length + count
        if count < 1 or total > self.capacity:
            used = f"{self._length} of {self.capacity} are used"
            raise EngineError(f"{count} tokens do not fit the cache, {used}; build with more --context")
        return total

    def _logits(self, count: int) -> NDArray[np.float32]:
        logits = self._results.arrays["logits"]
        self._results.download("logits", self._stream, logits[:count].nbytes)
        self._cuda.synchronise(self._stream)
        rows: NDArray[np.float32] = logits[:count]
        return rows

    def _program(self, record: EngineRecord, graph: str) -> Program:
        path = self._folder / ENGINES[graph]
        kept = self._folder / names.RUNTIME_CACHES[graph]
        data = kept.read_bytes() if kept.is_file() else b""
        program = Program(self._flavour, self._cuda, path, record.files[path.name]["sha256"], data)
        self._programs.append(program)
        return program

    def _step(self, program: Program, profile: int, rows: int, shared: dict[str, int]) -> _Step:
        step = _Step(self, self._context(program, profile, self._stream, repeats=rows == 1), rows)
        addresses = shared | step.addresses()
        if missing := (program.inputs().keys() | program.outputs().keys()) ^ addresses.keys():
            raise EngineError(f"{ENGINES['decoder']} does not have the expected {sorted(missing)[0]}; build it again")
        step.context.bind(addresses)
        return step

    def _context(self, program: Program, profile: int, stream: Any, repeats: bool) -> Context:
        context = program.context(profile, stream, repeats)
        self._contexts.append(context)
        return context

    def _shared_addresses(self, capacity: int) -> dict[str, int]:
        """Return the addresses that all steps use: the KV cache, the slot numbers and the results."""
        slots = Block(self._cuda, {"slots": ((capacity,), np.int64)}, "slot numbers")
        slots.arrays["slots"][:] = np.arange(capacity)
        slots.upload(self._stream)
        self._cuda.synchronise(self._stream)
        results = {name: self._results.address(name) for name in ("token", "logits")}
        return {"slots": slots.address("slots")} | results | self._cache.addresses()

    def _keep_kernels(self) -> None:
        """Save the compiled kernels. A write error is ignored, because it only makes the next start slower."""
        for program, graph in zip(self._programs, ("decoder", "vision"), strict=False):
            data = program.cache_bytes()
            path = self._folder / names.RUNTIME_CACHES[graph]
            with contextlib.suppress(OSError):
                if data and not (path.is_file() and path.read_bytes() == data):
                    with replacing(path) as temporary:
                        temporary.write_bytes(data)


class _Step:
    """The inputs of a step of up to `rows` tokens, and the execution context that computes it."""

    def __init__(self, engine: TensorRTEngine, context: Context, rows: int) -> None:
        decoder, half = engine._decoder, engine._half
        self.context = context
        self._engine = engine
        half_head = decoder.head_dim // 2
        self._widths = {"inputs_embeds": decoder.hidden_size, "cos": half_head, "sin": half_head}
        parts: dict[str, tuple[tuple[int, ...], Any]] = {"past_length": ((1,), np.int64), "kept": ((rows,), np.int64)}
        parts |= {name: ((rows, width), half.stored) for name, width in self._widths.items()}
        self._block = Block(engine._cuda, parts, "inputs of the decoder")

    def addresses(self) -> dict[str, int]:
        """Return the addresses of this step's own inputs."""
        return {name: self._block.address(name) for name in self._block.arrays}

    def fill(self, embeds: NDArray[np.float32], start: int, total: int, kept: list[int]) -> None:
        """Write the inputs of tokens [rows, hidden] at the positions from `start` on, in a sequence of `total` tokens.

        `kept` are the indices of the tokens that get logits.
        """
        arrays, pack = self._block.arrays, self._engine._half.pack
        cos, sin = self._engine._angles.at(start, len(embeds), total)
        for name, values in (("inputs_embeds", embeds), ("cos", cos), ("sin", sin)):
            arrays[name][: len(embeds)] = pack(values)
        arrays["past_length"][0] = start
        arrays["kept"][: len(kept)] = kept

    def shapes(self, rows: int, kept: int, window: int) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the inputs whose shape varies."""
        return {name: (1, rows, width) for name, width in self._widths.items()} | {"kept": (kept,), "slots": (window,)}

    def enqueue(self, stream: Any) -> None:
        """Start the copy of the inputs to the device, the computation, and the copy of the token ids to the host."""
        self._block.upload(stream)
        self.context.enqueue(stream)
        self._engine._results.download("token", stream)


class _DecodeGraph:
    """The CUDA graph of a decode step.

    It is captured when a shape occurs for the second time, because TensorRT prepares itself in the first run.
    """

    def __init__(self, cuda: Cuda, step: _Step, stream: Any, captures: bool) -> None:
        self._cuda = cuda
        self._step = step
        self._stream = stream
        self._captures = captures
        self._shapes: dict[str, tuple[int, ...]] | None = None
        self._graph: Any = None

    def run(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """Start one step with these input shapes."""
        if shapes != self._shapes:
            self.close()
            self._step.context.reshape(shapes)
            self._step.enqueue(self._stream)
            self._shapes = shapes
            return
        if self._captures and self._graph is None:
            self._capture()
        if self._graph is None:
            self._step.enqueue(self._stream)
        else:
            self._cuda.launch(self._graph, self._stream)

    def close(self) -> None:
        """Release the graph."""
        if self._graph is not None:
            self._cuda.destroy_graph(self._graph)
            self._graph = None

    def _capture(self) -> None:
        """Capture the graph. If that fails, log it once; later steps launch their kernels one by one, more slowly."""
        self._cuda.begin_capture(self._stream)
        try:
            self._step.enqueue(self._stream)
        except EngineError as error:
            self._captures = False
            with contextlib.suppress(EngineError):
                self._cuda.destroy_graph(self._cuda.end_capture(self._stream))
            _log.warning("decoding without a CUDA graph: %s", error)
            return
        self._graph = self._cuda.end_capture(self._stream)


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
        self._context = engine._context(program, 0, self._stream, repeats=False)
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
            self._cuda.synchronise(self._stream)
            parts.append(self._half.unpack(self._embeds.arrays["image_embeds"][: len(part)]))
        return np.concatenate(parts)
