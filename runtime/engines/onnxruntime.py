"""The ONNX Runtime engine: CPU by default, CUDA when asked.

The KV cache is one fixed buffer per layer, bound as both `past` and `present`, so a step writes only its own positions.
Untouched pages of the cache cost no memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from internvl_edge.base.errors import EngineError
from internvl_edge.base.extras import requires
from internvl_edge.base.machine import cores, multiplies_int8_exactly
from internvl_edge.bundle import names
from internvl_edge.bundle.bundle import Bundle
from internvl_edge.model.rope import RotaryAngles

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
# Prompt tokens per step: bounds memory, and skips the upper triangle of the attention scores.
PREFILL_CHUNK = 256
# The same in int8, where large steps are the faster ones.
_INT8_PREFILL_CHUNK = 512
# Shorter prompts are not worth a graph of their own.
_SHORTEST_PROMPT = 16
# For quantized weights of the standard dialect, which ONNX Runtime fuses at load: activations rounded to int8, and
# blocks of 128 inputs where weights have one scale per output. The onnxruntime dialect says the same in its graph.
_CONFIG = {"session.qdq_matmulnbits_accuracy_level": "4", "session.qdq_matmulnbits_block_size": "128"}
# Products with int8 inputs added up in 32 bits where the CPU's fast way would saturate in 16 (half as fast, exact).
_WIDE_SUMS = ("session.x64quantprecision", "1")
# Threads that wait for long steps need not burn a core until the next one; decoding's do, it would be 10 % slower.
_SLEEPING = ("session.force_spinning_stop", "1")
# Tokens of which all logits are kept at once: 8 x 151674 of them are 5 MB.
_SCORE_CHUNK = 8
# ONNX Runtime's GroupQueryAttention takes heads whose width is a multiple of this.
_GROUPED_HEAD = 8
# Tiles are encoded together while one layer's attention scores stay below this many bytes.
_SCORES_BYTES = 64 << 20


class OnnxRuntimeEngine:
    """Runs a bundle's `vision.onnx` and one of its decoder graphs (see `Engine` for the protocol).

    Args:
        opened: the bundle.
        device: "cpu" or "cuda".
        dialect: decoder graph, "onnxruntime" or "standard"; by default the fastest that the bundle has.
        capacity: tokens in the KV cache.
        threads: CPU threads; all available cores by default.

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
        threads: int | None = None,
    ) -> None:
        self._ort = _import_onnxruntime(device)
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
        self._capacity = capacity
        self._length = 0
        self._vision = self._load_vision(opened, threads)
        self._text = self._session(opened, names.DECODERS[dialect], threads)
        self._prompts = self._load_prompts(opened, threads) if dialect == "onnxruntime" else None
        vision = model.vision
        scores = 4 * vision.num_attention_heads * (vision.grid_size**2 + 1) ** 2
        self._tiles_at_once = max(1, _SCORES_BYTES // scores)
        self._cache_arrays = {name: self._allocate_cache() for name in self._cache_names()}
        self._cache = {name: self._value(array) for name, array in self._cache_arrays.items()}
        self._logits = self._value(np.zeros((1, 1, model.decoder.vocab_size), np.float32))
        self._step = _Step(self, self._text, 1, self._logits)

    @property
    def dialect(self) -> str:
        """The decoder graph that runs."""
        return self._dialect

    @property
    def capacity(self) -> int:
        """Tokens that fit the cache."""
        return self._capacity

    @property
    def length(self) -> int:
        """Tokens in the cache."""
        return self._length

    def encode(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Tiles [tiles, S, S, 3] -> image tokens [tiles, tokens_per_tile, hidden]."""
        parts = [
            self._vision.run(None, {"pixels": pixels[start : start + self._tiles_at_once]})[0]
            for start in range(0, len(pixels), self._tiles_at_once)
        ]
        return np.concatenate(parts).astype(np.float32, copy=False)

    def prefill(self, embeds: NDArray[np.float32]) -> NDArray[np.float32]:
        """Append a prompt [seq, hidden], in chunks; logits [vocab] after its last token.

        Raises:
            EngineError: it does not fit the cache; the same holds for `decode` and `score`.
        """
        total = self._room_for(len(embeds))
        if self._prompts is not None and len(embeds) >= _SHORTEST_PROMPT:
            for chunk in _chunks(embeds[:-1], _INT8_PREFILL_CHUNK):
                _Step(self, self._prompts, len(chunk)).run(chunk, total)
            embeds = embeds[-1:]
        for chunk in _chunks(embeds, PREFILL_CHUNK):
            _Step(self, self._text, len(chunk), self._logits).run(chunk, total)
        return self._last_logits()

    def decode(self, embed: NDArray[np.float32]) -> NDArray[np.float32]:
        """Append one token [hidden]; logits [vocab] after it, valid until the next call."""
        self._step.run(embed[None], self._room_for(1))
        return self._last_logits()

    def score(self, embeds: NDArray[np.float32]) -> NDArray[np.float32]:
        """Append tokens [seq, hidden]; logits [seq, vocab] after each of them."""
        total = self._room_for(len(embeds))
        chunks = (embeds[start : start + _SCORE_CHUNK] for start in range(0, len(embeds), _SCORE_CHUNK))
        return np.concatenate([self._score_chunk(chunk, total) for chunk in chunks])

    def reset(self, length: int = 0) -> None:
        """Forget everything from position `length` on; what lies there is overwritten later and masked until then."""
        self._length = min(length, self._length)

    def close(self) -> None:
        """Release sessions and cache."""
        del self._step, self._vision, self._text, self._prompts, self._cache, self._cache_arrays, self._logits

    def _room_for(self, count: int) -> int:
        """Tokens in the cache once `count` more are in it."""
        total = self._length + count
        if total > self._capacity:
            used = f"{self._length} of {self._capacity} are used"
            raise EngineError(f"{count} tokens do not fit the cache, {used}; load with --context {total} or more")
        return total

    def _score_chunk(self, embeds: NDArray[np.float32], total: int) -> NDArray[np.float32]:
        logits = self._value(np.zeros((1, len(embeds), self._decoder.vocab_size), np.float32))
        _Step(self, self._text, len(embeds), logits, kept=len(embeds)).run(embeds, total)
        return np.array(logits.numpy()[0])  # a copy: the value's memory ends with it

    def _last_logits(self) -> NDArray[np.float32]:
        logits: NDArray[np.float32] = self._logits.numpy()[0, 0]
        return logits

    def _load_vision(self, opened: Bundle, threads: int | None) -> Any:
        return self._session(opened, names.VISION, threads, _SLEEPING)

    def _load_prompts(self, opened: Bundle, threads: int | None) -> Any:
        """The graph for long prompts, where the bundle has one and this CPU multiplies bytes without loss."""
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
        try:
            return self._ort.InferenceSession(str(opened.path(name)), options, providers=[PROVIDERS[self._device]])
        except Exception as error:  # onnxruntime raises its own kinds, all derived from Exception
            raise EngineError(f"ONNX Runtime cannot load {opened.path(name)}: {str(error).splitlines()[0]}") from None

    def _cache_names(self) -> Iterable[str]:
        return (f"{layer}.{kind}" for layer in range(self._decoder.num_hidden_layers) for kind in ("key", "value"))

    def _allocate_cache(self) -> NDArray[Any]:
        return np.zeros(
            (1, self._decoder.num_key_value_heads, self._capacity, self._decoder.head_dim), self._cache_dtype
        )

    def _value(self, array: NDArray[Any]) -> Any:
        return self._ort.OrtValue.ortvalue_from_numpy(array, self._device, 0)


class _Step:
    """Bindings of a session for `count` tokens at once; the arrays behind them are filled anew for each run.

    `logits` [1, kept, vocab] receives those of the last positions; the graph for prompts has none.
    """

    def __init__(
        self, engine: OnnxRuntimeEngine, session: Any, count: int, logits: Any = None, *, kept: int = 1
    ) -> None:
        decoder = engine._decoder
        self._engine = engine
        self._session = session
        self._count = count
        self._arrays = {
            "inputs_embeds": np.empty((1, count, decoder.hidden_size), engine._dtype),
            "cos": np.empty((1, count, decoder.head_dim // 2), engine._dtype),
            "sin": np.empty((1, count, decoder.head_dim // 2), engine._dtype),
            "past_length": np.zeros(1, np.int64),
        }
        if logits is not None:
            self._arrays["logits_to_keep"] = np.array([kept], np.int64)
        self._binding = session.io_binding()
        self._bind_fixed(logits)

    def run(self, embeds: NDArray[np.float32], total: int) -> None:
        """Compute tokens [count, hidden] as positions length .. of a sequence of `total` tokens."""
        engine, arrays = self._engine, self._arrays
        cos, sin = engine._angles.at(engine.length, self._count, total)
        arrays["inputs_embeds"][0], arrays["cos"][0], arrays["sin"][0] = embeds, cos, sin
        arrays["past_length"][0] = engine.length
        for name, array in arrays.items():
            self._binding.bind_cpu_input(name, array)
        self._session.run_with_iobinding(self._binding)
        engine._length += self._count

    def _bind_fixed(self, logits: Any) -> None:
        for name, value in self._engine._cache.items():
            self._binding.bind_ortvalue_input(f"past_key_values.{name}", value)
            self._binding.bind_ortvalue_output(f"present.{name}", value)
        if logits is not None:
            self._binding.bind_ortvalue_output("logits", logits)


def _chunks(embeds: NDArray[np.float32], size: int) -> Iterator[NDArray[np.float32]]:
    return (embeds[start : start + size] for start in range(0, len(embeds), size))


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
