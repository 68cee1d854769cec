"""The ONNX Runtime engine, on the CPU by default and on CUDA on request.

The KV cache has a fixed buffer for the keys and one for the values of each layer. Each buffer is bound as `past` and as
`present`, so that a step writes only its own positions. Pages of the cache that no step has touched use no memory.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from internvl_edge.base.errors import EngineError
from internvl_edge.base.extras import requires
from internvl_edge.base.machine import cores, multiplies_int8_exactly
from internvl_edge.bundle import names
from internvl_edge.bundle.bundle import Bundle
from internvl_edge.model.rope import RotaryAngles

from .steps import steps, steps_from

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
# Prompt tokens per step, the largest first. The largest bounds memory, and saves most of the upper triangle of the
# attention scores. Later prompts continue at the ends of steps, so the small ones save them work.
PREFILL_SIZES = (256, 64)
# Prompt tokens per step of the int8 graph, which is faster in large steps.
_INT8_PREFILL_SIZES = (512, 256, 128, 64)
# Prompts with fewer tokens than this use the decoder graph: the int8 graph would not make them faster.
_SHORTEST_PROMPT = 16
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
# Tokens per step of `score`: float32 logits of 8 x 151674 take 5 MB.
_SCORE_CHUNK = 8
# ONNX Runtime's GroupQueryAttention requires a head width that is a multiple of this.
_GROUPED_HEAD = 8
# Tiles are encoded together as long as the attention scores of one layer stay below this many bytes.
_SCORES_BYTES = 64 << 20


class OnnxRuntimeEngine:
    """Runs a bundle's `vision.onnx` and one of its decoder graphs (see `Engine` for the protocol).

    Args:
        opened: the bundle.
        device: "cpu" or "cuda".
        dialect: decoder graph, "onnxruntime" or "standard"; the default is the fastest that the bundle has.
        capacity: tokens in the KV cache.
        threads: CPU threads; the default is all available cores.

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
        """The name of the decoder graph that runs."""
        return self._dialect

    @property
    def capacity(self) -> int:
        """The most tokens that the KV cache can hold."""
        return self._capacity

    @property
    def length(self) -> int:
        """The number of tokens in the KV cache."""
        return self._length

    def encode(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Encode tiles [tiles, S, S, 3] to image tokens [tiles, tokens_per_tile, hidden]."""
        parts = [
            self._vision.run(None, {"pixels": pixels[start : start + self._tiles_at_once]})[0]
            for start in range(0, len(pixels), self._tiles_at_once)
        ]
        return np.concatenate(parts).astype(np.float32, copy=False)

    def steps(self, length: int) -> list[int]:
        """Return the sizes of the steps of a prompt of `length` tokens. The int8 graph leaves the last token over."""
        if self._prompts is not None and length >= _SHORTEST_PROMPT:
            return [*steps(length - 1, _INT8_PREFILL_SIZES), 1]
        return steps(length, PREFILL_SIZES)

    def prefill(self, embeds: NDArray[np.float32]) -> NDArray[np.float32]:
        """Append a prompt [seq, hidden] in chunks, and return the logits [vocab] after its last token.

        Raises:
            EngineError: the tokens do not fit the KV cache. `decode` and `score` raise this too.
        """
        total = self._room_for(len(embeds))
        *chunks, last = self._chunks(embeds)
        for chunk in chunks:
            self._append(chunk, total)
        _Step(self, self._text, len(last), self._logits).run(last, total)
        return self._last_logits()

    def decode(self, embed: NDArray[np.float32]) -> NDArray[np.float32]:
        """Append one token [hidden], and return the logits [vocab] after it, valid until the next call."""
        self._step.run(embed[None], self._room_for(1))
        return self._last_logits()

    def score(self, embeds: NDArray[np.float32]) -> NDArray[np.float32]:
        """Append tokens [seq, hidden], and return the logits [seq, vocab] after each of them."""
        total = self._room_for(len(embeds))
        chunks = (embeds[start : start + _SCORE_CHUNK] for start in range(0, len(embeds), _SCORE_CHUNK))
        return np.concatenate([self._score_chunk(chunk, total) for chunk in chunks])

    def reset(self, length: int = 0) -> None:
        """Drop all tokens from position `length` on. Their entries stay masked until later tokens overwrite them."""
        self._length = min(length, self._length)

    def close(self) -> None:
        """Release the sessions and the KV cache."""
        del self._step, self._vision, self._text, self._prompts, self._cache, self._cache_arrays, self._logits

    def _room_for(self, count: int) -> int:
        """Return the number of tokens in the KV cache after `count` more; raise EngineError where they do not fit."""
        total = self._length + count
        if total > self._capacity:
            used = f"{self._length} of {self._capacity} are used"
            raise EngineError(f"{count} tokens do not fit the cache, {used}; load with --context {total} or more")
        return total

    def _chunks(self, embeds: NDArray[np.float32]) -> list[NDArray[np.float32]]:
        """Cut what remains of a prompt, [seq, hidden], at the ends of its steps."""
        sizes = steps_from(self.steps(self._length + len(embeds)), self._length) or self.steps(len(embeds))
        return np.split(embeds, np.cumsum(sizes)[:-1])

    def _append(self, chunk: NDArray[np.float32], total: int) -> None:
        """Compute a chunk [count, hidden] of a prompt that is not its last one."""
        if self._prompts is not None and total >= _SHORTEST_PROMPT:
            _Step(self, self._prompts, len(chunk)).run(chunk, total)
        else:
            _Step(self, self._text, len(chunk), self._logits).run(chunk, total)

    def _score_chunk(self, embeds: NDArray[np.float32], total: int) -> NDArray[np.float32]:
        logits = self._value(np.zeros((1, len(embeds), self._decoder.vocab_size), np.float32))
        _Step(self, self._text, len(embeds), logits, kept=len(embeds)).run(embeds, total)
        return np.array(logits.numpy()[0])  # copied, because the memory belongs to the OrtValue

    def _last_logits(self) -> NDArray[np.float32]:
        logits: NDArray[np.float32] = self._logits.numpy()[0, 0]
        return logits

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
    """Bindings of a session for `count` tokens at once. Each run fills the bound arrays again.

    `logits` [1, kept, vocab] receives the logits of the last `kept` positions. The int8 graph has no logits.
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
        """Compute tokens [count, hidden] at the positions from `engine.length` on, in a sequence of `total` tokens."""
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
