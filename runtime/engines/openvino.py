"""The hybrid engine: OpenVINO encodes tiles and prompts, and ONNX Runtime decodes token by token.

Both libraries read the bundle's own graphs, and both hold the weights. OpenVINO multiplies in bfloat16 where the CPU
can and the bundle does not compute in float32; with AMX it is several times as fast as ONNX Runtime. ONNX Runtime
decodes faster, because it writes its KV cache in place. After a prompt, the keys and values that OpenVINO computed are
copied into that cache. This takes a few milliseconds for thousands of tokens. `interrupt` does not end a call of
OpenVINO, which runs until its chunk or tile is computed.
"""

from __future__ import annotations

import re
from collections.abc import Generator, Iterator
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from internvl_edge.base import machine
from internvl_edge.base.errors import EngineError
from internvl_edge.base.extras import requires
from internvl_edge.bundle import names
from internvl_edge.bundle.bundle import Bundle

from .onnxruntime import SHORTEST_PROMPT, OnnxRuntimeEngine
from .steps import steps

# The first release that can read RMSNormalization, RotaryEmbedding and GroupQueryAttention in these graphs.
OLDEST = (2026, 3)
# Prompt tokens per step, the largest first. OpenVINO gains from larger steps than ONNX Runtime does. There are few
# sizes because OpenVINO keeps memory for every length that it has seen. The rest of a prompt, fewer tokens than the
# smallest size, goes to ONNX Runtime: the two copies of the KV cache would take longer than the product. With the int8
# graph, the rest is padded to the smallest size instead, so that ONNX Runtime need not hold this graph as well.
PREFILL_SIZES = (512, 256, 128, 64)


def is_available() -> bool:
    """Return whether a release of OpenVINO that can read the graphs is installed."""
    try:
        _import_openvino()
    except EngineError:
        return False
    return True


class OpenVinoEngine(OnnxRuntimeEngine):
    """Runs `vision.onnx` and prompts in OpenVINO, and single tokens in ONNX Runtime (see `Engine` for the protocol).

    A bundle with an int8 graph for prompts has them computed by this graph: in OpenVINO where the CPU has AMX, which
    ONNX Runtime uses less well, and otherwise in ONNX Runtime, which is faster then (docs/performance.md). Prompts also
    stay with ONNX Runtime where OpenVINO has no graph that it can read, because the bundle has no onnxruntime dialect
    or an int8 KV cache.

    Args:
        opened: the bundle.
        capacity: tokens in each row of the KV cache.
        rows: sequences that the KV cache holds side by side.
        threads: CPU threads; the default is all available cores.
        exact: do not round to bfloat16.

    Raises:
        EngineError: OpenVINO or ONNX Runtime is missing or too old, or cannot read the graphs.
    """

    def __init__(
        self, opened: Bundle, *, capacity: int, rows: int = 1, threads: int | None = None, exact: bool = False
    ) -> None:
        self._core = _import_openvino().Core()
        self._exact = exact
        self._requests: list[Any] = []
        super().__init__(opened, capacity=capacity, rows=rows, threads=threads, exact=exact)
        self.tiles_at_once = 1
        graph = None if self._prompts is not None else self._prompt_graph(opened)
        self._pads = graph == names.PROMPTS
        self._compile_prompts = partial(self._compiled, opened, graph, threads) if graph is not None else None

    def steps(self, length: int) -> list[int]:
        """Return the sizes of the steps of a prompt of `length` tokens. The int8 graph leaves the last token over."""
        if self._pads and length >= SHORTEST_PROMPT:
            return [*steps(length - 1, PREFILL_SIZES), 1]
        in_openvino = self._compile_prompts is not None and not self._pads
        return steps(length, PREFILL_SIZES) if in_openvino else super().steps(length)

    def prefill_steps(self, embeds: NDArray[np.float32], row: int = 0) -> Generator[None, None, NDArray[np.float32]]:
        """Append a prompt [seq, hidden] to a row, in chunks (see `Engine`)."""
        start, total = self.cache.length(row), self.cache.room_for(len(embeds), row)
        chunks = self._openvino_chunks(embeds, row, total)
        if not chunks:
            return (yield from super().prefill_steps(embeds, row))
        cache = {name: np.ascontiguousarray(array[:, :, :start]) for name, array in self._entries(row)}
        first = 0
        for turn, chunk in enumerate(chunks):
            inputs = self._inputs(chunk, start + first, total) | _past(cache)
            results = self._request(turn).infer(inputs, share_inputs=True, share_outputs=True)
            cache = {name: results[f"present.{name}"] for name in cache}
            first += len(chunk)  # only the last chunk can be padded, so the cache before it has no entries of padding
            yield
        for name, array in self._entries(row):
            array[:, :, start : start + first] = cache[name][:, :, start : start + first]
        self.cache.append(first, row)
        if first < len(embeds):
            return (yield from super().prefill_steps(embeds[first:], row))
        logits: NDArray[np.float32] = np.array(results["logits"][0, 0])
        return logits

    def close(self) -> None:
        """Release the models, the sessions and the KV cache."""
        super().close()
        self._requests.clear()
        del self._core, self._compile_prompts

    def _request(self, turn: int) -> Any:
        """One of two requests for steps of prompts. They take turns, as each reads the cache that the other returned.

        The first step compiles the graph, so that loading does not wait for it.
        """
        if not self._requests:
            assert self._compile_prompts is not None
            compiled = self._compile_prompts()
            self._requests = [compiled.create_infer_request() for _ in range(2)]
        return self._requests[turn % 2]

    def _encode(self, pixels: NDArray[np.uint8]) -> NDArray[Any]:
        embeds: NDArray[Any] = self._tower.infer({"pixels": pixels})["image_embeds"]
        return embeds

    def _entries(self, row: int) -> Iterator[tuple[str, NDArray[Any]]]:
        """The entries of a row [1, kv_heads, capacity, head_dim] by the name of their input."""
        place = self._buffers.places[row]
        return ((name, array[place : place + 1]) for name, array in self._buffers.arrays.items())

    def _openvino_chunks(self, embeds: NDArray[np.float32], row: int, total: int) -> list[NDArray[np.float32]]:
        """The chunks [seq, hidden] of a prompt that OpenVINO computes; the prompt has `total` tokens in the end."""
        if self._compile_prompts is None:
            return []
        chunks = self._chunks(embeds, row)
        if self._pads:
            return chunks[:-1] if total >= SHORTEST_PROMPT else []
        return [each for each in chunks if len(each) >= PREFILL_SIZES[-1]]

    def _inputs(self, embeds: NDArray[np.float32], past: int, total: int) -> dict[str, NDArray[Any]]:
        tokens = len(embeds)
        size = max(tokens, PREFILL_SIZES[-1]) if self._pads else tokens
        inputs: dict[str, NDArray[Any]] = {"past_length": np.array([past])}
        for name, values in zip(
            ("inputs_embeds", "cos", "sin"), (embeds, *self._angles.at(past, tokens, total)), strict=True
        ):
            inputs[name] = np.zeros((1, size, values.shape[-1]), self._dtype)
            inputs[name][0, :tokens] = values
        return inputs if self._pads else inputs | {"logits_to_keep": np.array([1])}

    def _load_prompts(self, opened: Bundle, threads: int | None) -> Any:
        """Load the int8 graph in ONNX Runtime only where OpenVINO does not run it."""
        return None if self._prompt_graph(opened) == names.PROMPTS else super()._load_prompts(opened, threads)

    def _prompt_graph(self, opened: Bundle) -> str | None:
        """The graph that computes prompts in OpenVINO, or None."""
        if self._cache_dtype != self._dtype:
            return None
        if names.PROMPTS in opened.manifest.files and machine.multiplies_int8_exactly():
            return names.PROMPTS if machine.multiplies_int8_tiles() else None
        return names.DECODERS["onnxruntime"] if names.DECODERS["onnxruntime"] in opened.manifest.files else None

    def _load_vision(self, opened: Bundle, threads: int | None) -> Any:
        return self._compiled(opened, names.VISION, threads).create_infer_request()

    def _compiled(self, opened: Bundle, name: str, threads: int | None) -> Any:
        rounds = not self._exact and machine.multiplies_bfloat16() and opened.manifest.activations != "float32"
        properties = {
            "INFERENCE_NUM_THREADS": threads or machine.cores(),
            "NUM_STREAMS": 1,
            "INFERENCE_PRECISION_HINT": "bf16" if rounds else "f32",
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
