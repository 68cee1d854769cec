"""The ONNX Runtime engine, on the CPU by default and on CUDA on request.

The KV cache has a fixed buffer for the keys and one for the values of each layer. Each buffer is bound as `past` and as
`present`, so that a step writes only its own positions. Pages of the cache that no step has touched use no memory.

A buffer holds the rows of the cache one after the other. A step takes rows that are neighbors in memory, so each row
has a place, and rows that decode together move to the last places. Their logits must not depend on which rows these
are. So every decode step of a cache with several rows computes an even number of them: ONNX Runtime multiplies a single
row, and the odd one of several, with another kernel, whose sums are rounded differently. The place behind the last row
is the partner of an odd row. It holds nothing. In the standard dialect, sums over the cache are rounded differently
where another row is longer, so there each row decodes in a step of its own.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from internvl_edge.base.errors import EngineError
from internvl_edge.base.extras import requires
from internvl_edge.base.machine import cores, multiplies_int8_exactly
from internvl_edge.bundle import names
from internvl_edge.bundle.bundle import Bundle
from internvl_edge.model.rope import RotaryAngles

from ..native.choice import Attention, choose_attention
from . import Engine
from .kv_buffers import KvBuffers
from .rows import CacheRows
from .steps import steps, steps_from

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
# Prompt tokens per step, the largest first. The largest bounds memory, and saves most of the upper triangle of the
# attention scores. Later prompts continue at the ends of steps, so the small ones save them work. They cost a prompt
# nothing: 250 tokens of a 1B model take 1.51 s in one step and 1.50 s in three (docs/performance.md).
PREFILL_SIZES = (256, 128, 64)
# The same for the int8 graph, which is faster in large steps.
_INT8_PREFILL_SIZES = (512, 256, 128, 64)
# Prompts of fewer tokens than this use the decoder graph: the int8 graph would not make them faster. What counts is the
# whole prompt, not the part that is not yet in the cache, so that the answer does not depend on earlier prompts.
SHORTEST_PROMPT = 16
# ONNX Runtime fuses the quantized weights of the standard dialect when it loads the graph. These entries make it round
# activations to int8 (accuracy level 4), and use blocks of 128 inputs where weights have one scale per output. The
# graph of the onnxruntime dialect holds the same settings.
_CONFIG = {"session.qdq_matmulnbits_accuracy_level": "4", "session.qdq_matmulnbits_block_size": "128"}
# This entry accumulates int8 products in 32 bits. It is exact and half as fast, for CPUs whose fast instructions would
# saturate in 16 bits.
_WIDE_SUMS = ("session.x64quantprecision", "1")
# This entry makes threads sleep between the long steps of vision and prefill. Decode keeps spinning threads, because
# it would be 10 % slower without them.
_SLEEPING = ("session.force_spinning_stop", "1")
# This entry of a call gives the arena's free memory back at its end. After a tile or the last large step of a prompt,
# that is a hundred MB and more. Single tokens and guesses keep the little that they use.
_SHRINKING = ("memory.enable_memory_arena_shrinkage", "cpu:0")
# This entry names the folder of the weights of a graph that is handed over in memory.
_WEIGHTS = "session.model_external_initializers_file_folder_path"
# Tokens per step of `score`: its logits take 5 MB.
_SCORE_CHUNK = 8
# ONNX Runtime's GroupQueryAttention requires a head width that is a multiple of this.
_GROUPED_HEAD = 8
# Tiles are encoded together as long as the attention scores of one layer stay below this many bytes.
_SCORES_BYTES = 64 << 20


class OnnxRuntimeEngine(Engine):
    """Runs a bundle's `vision.onnx` and one of its decoder graphs (see `Engine` for the protocol).

    Args:
        opened: the bundle.
        device: "cpu" or "cuda".
        dialect: decoder graph, "onnxruntime" or "standard"; the default is the fastest that the bundle has.
        capacity: tokens in each row of the KV cache.
        rows: sequences that the KV cache holds side by side. CUDA takes one.
        threads: CPU threads; the default is all available cores.
        exact: keep ONNX Runtime's own attention, which rounds nothing (see `choose_attention`).

    Attributes:
        attention: what computes attention, and why.

    Raises:
        EngineError: ONNX Runtime is missing or broken, or has no provider for the device.
    """

    def __init__(
        self,
        opened: Bundle,
        *,
        device: str = "cpu",
        dialect: str | None = None,
        capacity: int,
        rows: int = 1,
        threads: int | None = None,
        exact: bool = False,
    ) -> None:
        self._ort = _import_onnxruntime(device)
        if rows > 1 and device != "cpu":
            raise EngineError(f"device {device!r} has one row, {rows} were asked for; leave out rows")
        dialect = dialect or _fastest_dialect(opened)
        _check_dialect(opened, dialect)
        if opened.manifest.activations == "bfloat16":
            raise EngineError(
                "this bundle computes in bfloat16, which ONNX Runtime does not; export with --activations float32"
            )
        model = opened.manifest.model
        self._device = device
        self._dialect = dialect
        self._decoder = model.decoder
        self._angles = RotaryAngles(model.decoder)
        self._dtype = np.dtype(opened.manifest.activations)
        self._cache_dtype = np.dtype(opened.manifest.kv_cache or self._dtype)
        self._run_options = self._ort.RunOptions()
        self.attention = (
            choose_attention(opened.manifest, exact) if device == "cpu" else Attention(None, f"the device is {device}")
        )
        self._load_tower = partial(self._load_vision, opened, threads)
        self._loaded_tower: Any = None
        with ThreadPoolExecutor(1) as pool:  # a session packs its weights with one thread
            prompts = pool.submit(self._load_prompts, opened, threads) if dialect == "onnxruntime" else None
            self._text = self._session(opened, names.DECODERS[dialect], threads)
        self._prompts = prompts.result() if prompts else None
        vision = model.vision
        scores = 4 * vision.num_attention_heads * (vision.grid_size**2 + 1) ** 2
        self.tiles_at_once = max(1, _SCORES_BYTES // scores)
        self.cache = CacheRows(capacity, rows)
        self._buffers = KvBuffers(self.cache, model.decoder, self._cache_dtype, self._value)
        self._steps: dict[int, _Step] = {}

    @property
    def dialect(self) -> str:
        """The name of the decoder graph that runs."""
        return self._dialect

    def encode(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Encode tiles [tiles, S, S, 3] to image tokens [tiles, tokens_per_tile, hidden]."""
        parts = [self._encode(part) for part in _parts(pixels, self.tiles_at_once)]
        return np.concatenate(parts).astype(np.float32, copy=False)

    def steps(self, length: int) -> list[int]:
        """Return the sizes of the steps of a prompt of `length` tokens. The int8 graph leaves the last token over."""
        if self._prompts is not None and length >= SHORTEST_PROMPT:
            return [*steps(length - 1, _INT8_PREFILL_SIZES), 1]
        return steps(length, PREFILL_SIZES)

    def prefill_steps(self, embeds: NDArray[np.float32], row: int = 0) -> Generator[None, None, NDArray[np.float32]]:
        """Append a prompt [seq, hidden] to a row, in chunks (see `Engine`)."""
        total = self.cache.room_for(len(embeds), row)
        *chunks, last = self._chunks(embeds, row)
        in_int8 = self._prompts is not None and total >= SHORTEST_PROMPT
        for chunk in chunks:
            session, kept = (self._prompts, 0) if in_int8 else (self._text, 1)
            step = _Step(self, session, tokens=len(chunk), kept=kept)
            self._append(step, chunk, total, row, shrink=chunk is chunks[-1])
            yield
        step = _Step(self, self._text, tokens=len(last))
        self._append(step, last, total, row, shrink=len(last) > _SCORE_CHUNK)
        yield
        logits: NDArray[np.float32] = step.logits[0, 0].copy()
        return logits

    def decode_rows(self, embeds: NDArray[np.float32], rows: Sequence[int]) -> list[NDArray[np.float32]]:
        """Append one token [hidden] to each row (see `Engine`)."""
        totals = [self.cache.room_for(1, row) for row in rows]
        if self._dialect == "standard" and len(rows) > 1:
            return [self.decode_rows(embeds[index : index + 1], [row])[0].copy() for index, row in enumerate(rows)]
        first, count = self._buffers.gather(rows)
        if count not in self._steps:
            self._steps[count] = _Step(self, self._text, rows=count)
        step = self._steps[count]
        places = [self._buffers.places[row] - first for row in rows]
        for embed, place, total in zip(embeds, places, totals, strict=True):
            step.fill(embed[None], total - 1, total, place)
        for idle in range(len(rows), count):
            step.fill(embeds[:1], 0, 1, idle)
        step.run(first)
        for row in rows:
            self.cache.append(1, row)
        return [step.logits[place, 0] for place in places]

    def score(self, embeds: NDArray[np.float32], row: int = 0) -> NDArray[np.float32]:
        """Append tokens [seq, hidden] to a row, and return the logits [seq, vocab] after each of them."""
        total = self.cache.room_for(len(embeds), row)
        return np.concatenate([self._score(chunk, total, row) for chunk in _parts(embeds, _SCORE_CHUNK)])

    def copy(self, source: int, target: int, length: int) -> None:
        """Make the first `length` tokens of one row those of another row, too."""
        self._buffers.copy(source, target, length)
        self.cache.copied(source, target, length)

    def interrupt(self) -> None:
        """End the call that runs in another thread; it raises EngineError then. Later calls are not affected."""
        self._run_options.terminate = True

    def close(self) -> None:
        """Release the sessions and the KV cache."""
        del self._loaded_tower, self._load_tower, self._text, self._prompts, self._buffers
        self._steps.clear()

    def _chunks(self, embeds: NDArray[np.float32], row: int) -> list[NDArray[np.float32]]:
        """Cut what remains of a prompt, [seq, hidden], at the ends of its steps."""
        start = self.cache.length(row)
        sizes = steps_from(self.steps(start + len(embeds)), start) or self.steps(len(embeds))
        return np.split(embeds, np.cumsum(sizes)[:-1])

    def _append(self, step: _Step, embeds: NDArray[np.float32], total: int, row: int, *, shrink: bool = False) -> None:
        """Append tokens of a sequence that has `total` in the end."""
        step.fill(embeds, self.cache.length(row), total)
        step.run(self._buffers.places[row], shrink)
        self.cache.append(len(embeds), row)

    def _score(self, embeds: NDArray[np.float32], total: int, row: int) -> NDArray[np.float32]:
        step = _Step(self, self._text, tokens=len(embeds), kept=len(embeds))
        self._append(step, embeds, total, row)
        logits: NDArray[np.float32] = step.logits[0].copy()
        return logits

    def _encode(self, pixels: NDArray[np.uint8]) -> NDArray[Any]:
        with self._interruptible(shrink=True) as options:
            embeds: NDArray[Any] = self._tower.run(None, {"pixels": pixels}, options)[0]
        return embeds

    @contextmanager
    def _interruptible(self, shrink: bool = False) -> Iterator[Any]:
        """Options of one call, which `interrupt` can end. An interrupted call is an EngineError.

        With `shrink`, the call gives the free memory of the CPU's arena back at its end.
        """
        options = self._run_options = self._ort.RunOptions()
        if shrink and self._device == "cpu":
            options.add_run_config_entry(*_SHRINKING)
        try:
            yield options
        except Exception:
            if options.terminate:
                raise EngineError("the computation was interrupted") from None
            raise

    @property
    def _tower(self) -> Any:
        """The vision tower. The first image loads it, so text alone needs neither its time nor its memory."""
        if self._loaded_tower is None:
            self._loaded_tower = self._load_tower()
        return self._loaded_tower

    def _load_vision(self, opened: Bundle, threads: int | None) -> Any:
        return self._session(opened, names.VISION, threads, _SLEEPING)

    def _load_prompts(self, opened: Bundle, threads: int | None) -> Any:
        """Return a session of the int8 graph for long prompts, or None.

        It is None where the bundle has no such graph, the device is not the CPU, or this CPU cannot add int8 products
        exactly.
        """
        usable = self._device == "cpu" and names.PROMPTS in opened.manifest.files and multiplies_int8_exactly()
        return self._session(opened, names.PROMPTS, threads, _SLEEPING) if usable else None

    def _session(self, opened: Bundle, name: str, threads: int | None, *entries: tuple[str, str]) -> Any:
        options = self._ort.SessionOptions()
        options.intra_op_num_threads = threads or cores()
        options.log_severity_level = 3
        for key, value in (*_CONFIG.items(), *entries):
            options.add_session_config_entry(key, value)
        if opened.manifest.rounds_inputs and not multiplies_int8_exactly():
            options.add_session_config_entry(*_WIDE_SUMS)
        graph = self.attention.graph(opened.path(name))
        if graph is not None:
            options.register_custom_ops_library(str(self.attention.file))
            options.add_session_config_entry(_WEIGHTS, str(opened.folder))
        try:
            return self._ort.InferenceSession(
                graph or str(opened.path(name)), options, providers=[PROVIDERS[self._device]]
            )
        except Exception as error:  # onnxruntime raises its own kinds, all derived from Exception
            raise EngineError(f"ONNX Runtime cannot load {opened.path(name)}: {str(error).splitlines()[0]}") from None

    def _value(self, array: NDArray[Any]) -> Any:
        return self._ort.OrtValue.ortvalue_from_numpy(array, self._device, 0)


class _Step:
    """Bindings of a session for `tokens` tokens of each of `rows` rows. Each run fills the bound arrays again.

    `logits` [rows, kept, vocab] are those of the last `kept` positions. The int8 graph has none.
    """

    def __init__(
        self, engine: OnnxRuntimeEngine, session: Any, *, rows: int = 1, tokens: int = 1, kept: int = 1
    ) -> None:
        decoder = engine._decoder
        self._engine = engine
        self._session = session
        self._rows = rows
        self._arrays = {
            "inputs_embeds": np.zeros((rows, tokens, decoder.hidden_size), engine._dtype),
            "cos": np.zeros((rows, tokens, decoder.head_dim // 2), engine._dtype),
            "sin": np.zeros((rows, tokens, decoder.head_dim // 2), engine._dtype),
            "past_length": np.zeros(rows, np.int64),
        }
        self._binding = session.io_binding()
        self._first: int | None = None
        if kept:
            self._arrays["logits_to_keep"] = np.array([kept], np.int64)
            self._logits = engine._value(np.zeros((rows, kept, decoder.vocab_size), np.float32))
            self._binding.bind_ortvalue_output("logits", self._logits)

    @property
    def logits(self) -> NDArray[np.float32]:
        """The logits [rows, kept, vocab] of the last run. They are in the memory of this object."""
        logits: NDArray[np.float32] = self._logits.numpy()
        return logits

    def fill(self, embeds: NDArray[np.float32], start: int, total: int, row: int = 0) -> None:
        """Set a row's tokens [tokens, hidden], at the positions from `start` on in a sequence of `total` tokens."""
        cos, sin = self._engine._angles.at(start, len(embeds), total)
        for name, values in (("inputs_embeds", embeds), ("cos", cos), ("sin", sin)):
            self._arrays[name][row] = values
        self._arrays["past_length"][row] = start

    def run(self, first: int, shrink: bool = False) -> None:
        """Compute the rows at the places from `first` on. `shrink` is that of `_interruptible`."""
        if first != self._first:
            self._engine._buffers.bind(self._binding, first, self._rows)
            self._first = first
        for name, array in self._arrays.items():
            self._binding.bind_cpu_input(name, array)
        with self._engine._interruptible(shrink) as options:
            self._session.run_with_iobinding(self._binding, options)


def _parts(array: NDArray[Any], size: int) -> Iterator[NDArray[Any]]:
    return (array[start : start + size] for start in range(0, len(array), size))


def _runs_grouped_attention(opened: Bundle) -> bool:
    return opened.manifest.model.decoder.head_dim % _GROUPED_HEAD == 0


def _fastest_dialect(opened: Bundle) -> str:
    has_own = names.DECODERS["onnxruntime"] in opened.manifest.files
    return "onnxruntime" if has_own and _runs_grouped_attention(opened) else "standard"


def _check_dialect(opened: Bundle, dialect: str) -> None:
    if dialect not in names.DECODERS:
        raise EngineError(f"dialect {dialect!r} is not one of {', '.join(names.DECODERS)}")
    if names.DECODERS[dialect] not in opened.manifest.files:
        raise EngineError(f"this bundle has no {dialect} decoder; export it again with --dialect {dialect}")
    if dialect == "onnxruntime" and not _runs_grouped_attention(opened):
        raise EngineError(
            f"ONNX Runtime's GroupQueryAttention takes heads of a multiple of {_GROUPED_HEAD}, this model has "
            f"{opened.manifest.model.decoder.head_dim}; use --dialect standard"
        )


def _import_onnxruntime(device: str) -> Any:
    with requires("gpu" if device == "cuda" else "cpu", "ONNX Runtime", EngineError):
        import onnxruntime
    if not hasattr(onnxruntime, "get_available_providers"):
        raise EngineError(
            "the onnxruntime installation is damaged (onnxruntime and onnxruntime-gpu overwrite each other): "
            "uninstall both, then install one"
        )
    if PROVIDERS.get(device) not in onnxruntime.get_available_providers():
        raise EngineError(
            f"device {device!r} is not available in ONNX Runtime {onnxruntime.__version__} here "
            f"(providers: {', '.join(onnxruntime.get_available_providers())}); for cuda install 'internvl-edge[gpu]'"
        )
    return onnxruntime
