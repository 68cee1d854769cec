"""The hybrid engine: OpenVINO encodes tiles and prompts, ONNX Runtime answers token by token.

Both read the bundle's own graphs. OpenVINO multiplies in bfloat16 where the CPU does, with AMX several times as fast as
ONNX Runtime; ONNX Runtime decodes faster, from a cache it writes in place. After a prompt the keys and values that
OpenVINO computed are copied into that cache, a few milliseconds for thousands of tokens. Weights are held by both.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
from numpy.typing import NDArray

from internvl_edge.base import machine
from internvl_edge.base.errors import EngineError
from internvl_edge.base.extras import requires
from internvl_edge.bundle import names
from internvl_edge.bundle.bundle import Bundle

from .onnxruntime import OnnxRuntimeEngine

# The first release that reads RMSNormalization, RotaryEmbedding and GroupQueryAttention of these graphs.
OLDEST = (2026, 3)
# Prompt tokens per step: OpenVINO's products gain from more rows than ONNX Runtime's.
PREFILL_CHUNK = 512
# Shorter prompts are not worth handing the cache over and back.
_SHORTEST_PROMPT = 64


def is_available() -> bool:
    """Whether a release of OpenVINO that can read the graphs is installed."""
    try:
        _import_openvino()
    except EngineError:
        return False
    return True


class OpenVinoEngine(OnnxRuntimeEngine):
    """Runs `vision.onnx` and prompts in OpenVINO, single tokens in ONNX Runtime (see `Engine` for the protocol).

    Prompts stay with ONNX Runtime where the bundle has a graph for prompts in int8, which is as fast, and where
    OpenVINO has none to read: bundles without the onnxruntime dialect, and int8 caches.

    Args:
        opened: the bundle.
        capacity: tokens in the KV cache.
        threads: CPU threads; all available cores by default.

    Raises:
        EngineError: OpenVINO or ONNX Runtime is missing or too old, or cannot read the graphs.
    """

    def __init__(self, opened: Bundle, *, capacity: int, threads: int | None = None) -> None:
        self._core = _import_openvino().Core()
        super().__init__(opened, capacity=capacity, threads=threads)
        self._requests: list[Any] = []
        has_graph = names.DECODERS["onnxruntime"] in opened.manifest.files and self._cache_dtype == self._dtype
        if has_graph and self._prompts is None:
            compiled = self._compiled(opened, names.DECODERS["onnxruntime"], threads)
            # Two, because the cache that one returns is what the other reads.
            self._requests = [compiled.create_infer_request() for _ in range(2)]

    def encode(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Tiles [tiles, S, S, 3] -> image tokens [tiles, tokens_per_tile, hidden]."""
        parts = [self._vision.infer({"pixels": tile[None]})["image_embeds"] for tile in pixels]
        return np.concatenate(parts).astype(np.float32, copy=False)

    def prefill(self, embeds: NDArray[np.float32]) -> NDArray[np.float32]:
        """Append a prompt [seq, hidden], in chunks; logits [vocab] after its last token."""
        if not self._requests or len(embeds) < _SHORTEST_PROMPT:
            return super().prefill(embeds)
        start, total = self._length, self._room_for(len(embeds))
        cache = {name: np.ascontiguousarray(array[:, :, :start]) for name, array in self._cache_arrays.items()}
        for turn, first in enumerate(range(0, len(embeds), PREFILL_CHUNK)):
            chunk = embeds[first : first + PREFILL_CHUNK]
            inputs = self._inputs(chunk, start + first, total) | _past(cache)
            results = self._requests[turn % 2].infer(inputs, share_inputs=True, share_outputs=True)
            cache = {name: results[f"present.{name}"] for name in cache}
        for name, array in self._cache_arrays.items():
            array[:, :, start:total] = cache[name][:, :, start:total]
        self._length = total
        logits: NDArray[np.float32] = np.array(results["logits"][0, 0])
        return logits

    def close(self) -> None:
        """Release models, sessions and cache."""
        super().close()
        self._requests.clear()
        del self._core

    def _inputs(self, embeds: NDArray[np.float32], past: int, total: int) -> dict[str, NDArray[Any]]:
        cos, sin = self._angles.at(past, len(embeds), total)
        return {
            "inputs_embeds": embeds[None].astype(self._dtype, copy=False),
            "cos": cos[None].astype(self._dtype, copy=False),
            "sin": sin[None].astype(self._dtype, copy=False),
            "past_length": np.array([past]),
            "logits_to_keep": np.array([1]),
        }

    def _load_vision(self, opened: Bundle, threads: int | None) -> Any:
        return self._compiled(opened, names.VISION, threads).create_infer_request()

    def _compiled(self, opened: Bundle, name: str, threads: int | None) -> Any:
        properties = {
            "INFERENCE_NUM_THREADS": threads or machine.cores(),
            "NUM_STREAMS": 1,
            "INFERENCE_PRECISION_HINT": "bf16" if machine.multiplies_bfloat16() else "f32",
        }
        try:
            return self._core.compile_model(str(opened.path(name)), "CPU", properties)
        except RuntimeError as error:
            raise EngineError(f"OpenVINO cannot load {opened.path(name)}: {str(error).splitlines()[-1]}") from None


def _past(cache: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    return {f"past_key_values.{name}": array for name, array in cache.items()}


def _import_openvino() -> Any:
    with requires("openvino", "--engine openvino", EngineError):
        import openvino
    found = tuple(map(int, re.findall(r"\d+", openvino.__version__)[:2]))
    if found < OLDEST:
        wanted = ".".join(map(str, OLDEST))
        raise EngineError(f"openvino {openvino.__version__} cannot read these graphs; install {wanted} or newer")
    return openvino
