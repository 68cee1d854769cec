"""Steps of the decoder on the device: which shapes occur, the inputs of a step, and the CUDA graph of a decode step.

A shape that occurs for the first time costs time: TensorRT for RTX compiles kernels for it, and a CUDA graph is one
shape. So attention reads a few lengths of the KV cache, and for TensorRT for RTX prompts are padded to a few sizes.

This module knows steps, shapes and memory. It does not know a bundle.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from internvl_edge.base.errors import EngineError
from internvl_edge.model.config import DecoderConfig
from internvl_edge.model.rope import RotaryAngles

from .buffers import Block, Half
from .cuda import Cuda
from .program import Context

# Attention reads the KV cache in multiples of this many slots, up to eight of them; then in quarters of a power of two.
WINDOW = 512
_EVEN_WINDOWS = 8
# The smallest step of a prompt. Each size is twice the one before, up to the engine's largest step.
SMALLEST_STEP = 64
_log = logging.getLogger(__name__)


def window(used: int, capacity: int) -> int:
    """Return how many slots of the cache a step reads that needs the first `used` ones."""
    step = WINDOW
    while used > _EVEN_WINDOWS * step:
        step *= 2
    return min(-(-used // step) * step, capacity)


def windows(capacity: int) -> list[int]:
    """Return all values of `window`, in order: few even for a long context, 8 for 4096 slots and 20 for 32768."""
    found = [window(1, capacity)]
    while found[-1] < capacity:
        found.append(window(found[-1] + 1, capacity))
    return found


def step_sizes(largest: int) -> list[int]:
    """Return the sizes that steps of a prompt have, in order."""
    sizes = []
    size = SMALLEST_STEP
    while size < largest:
        sizes.append(size)
        size *= 2
    return [*sizes, largest]


def split(count: int, start: int, sizes: Sequence[int], capacity: int) -> Iterator[tuple[int, int]]:
    """Yield (tokens, size) of the steps that append `count` tokens from position `start` on.

    A step has one of `sizes`, and what follows its tokens is padding. At the end of the cache, where no padding fits,
    steps have powers of two, the largest first.
    """
    while count:
        size = next((size for size in sizes if size >= count), sizes[-1])
        tokens = min(count, size)
        if start + size > capacity:
            tokens = size = 1 << (tokens.bit_length() - 1)
        yield tokens, size
        start, count = start + tokens, count - tokens


class PackedAngles:
    """Rotary angles in the type of an engine, computed once for all positions of a cache.

    With dynamic NTK, a sequence beyond the model's maximum length has angles of its own, computed for each step.
    """

    def __init__(self, decoder: DecoderConfig, capacity: int, half: Half) -> None:
        self._angles = RotaryAngles(decoder)
        self._pack = half.pack
        cos, sin = self._angles.at(0, capacity, 1)
        self._cos, self._sin = half.pack(cos), half.pack(sin)

    def at(self, start: int, count: int, total: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """Return cos and sin [count, head_dim / 2] from position `start` on, for a sequence of `total` tokens."""
        if self._angles.scales_at(total):
            cos, sin = self._angles.at(start, count, total)
            return self._pack(cos), self._pack(sin)
        return self._cos[start : start + count], self._sin[start : start + count]


class Step:
    """The inputs of a step, and the execution context that computes it: of up to `tokens` tokens of one row of the
    cache, or of one token of each of its rows.

    Args:
        cuda: allocates and copies.
        context: computes the step.
        decoder, half: the sizes and the type of the inputs.
        angles: the rotary angles.
        tokens: the most tokens of a step, of each row.
        kept: the most tokens of a step that get logits.
        results: receives the token ids.
        rows: the rows of the cache that a step computes.
    """

    def __init__(
        self,
        cuda: Cuda,
        context: Context,
        decoder: DecoderConfig,
        half: Half,
        angles: PackedAngles,
        tokens: int,
        kept: int,
        results: Block,
        rows: int = 1,
    ) -> None:
        self.context = context
        self._pack, self._angles, self._results = half.pack, angles, results
        half_head = decoder.head_dim // 2
        self._widths = {"inputs_embeds": decoder.hidden_size, "cos": half_head, "sin": half_head}
        self._rows = rows
        parts: dict[str, tuple[tuple[int, ...], Any]] = {
            "past_length": ((rows,), np.int64),
            "kept": ((kept,), np.int64),
        }
        parts |= {name: ((rows * tokens, width), half.stored) for name, width in self._widths.items()}
        self._block = Block(cuda, parts, "inputs of the decoder")
        arrays = self._block.arrays
        self._embeds, self._cos, self._sin = (arrays[name] for name in self._widths)
        self._past_length, self._kept = arrays["past_length"], arrays["kept"]

    def addresses(self) -> dict[str, int]:
        """Return the addresses of this step's own inputs."""
        return {name: self._block.address(name) for name in self._block.arrays}

    def fill_one(self, embed: NDArray[np.float32], position: int, row: int = 0) -> None:
        """Write the inputs of a row's one token [hidden], the last of its sequence. It gets logits."""
        cos, sin = self._angles.at(position, 1, position + 1)
        self._embeds[row] = self._pack(embed)
        self._cos[row : row + 1], self._sin[row : row + 1] = cos, sin
        self._past_length[row] = position

    def idle(self, row: int, length: int) -> None:
        """Let a row of `length` tokens compute what nobody reads. Its entry goes behind its last token."""
        self._past_length[row] = length

    def fill(self, embeds: NDArray[np.float32], tokens: int, start: int, total: int, kept: NDArray[np.int64]) -> None:
        """Write the inputs of tokens [n, hidden] at the positions from `start` on, in a sequence of `total` tokens.

        Tokens from n to `tokens` are padding: zeros, which no token sees, and whose entries later tokens overwrite.
        `kept` are the indices of the tokens that get logits.
        """
        cos, sin = self._angles.at(start, tokens, total)
        self._embeds[: len(embeds)] = self._pack(embeds)
        self._embeds[len(embeds) : tokens] = 0
        self._cos[:tokens], self._sin[:tokens] = cos, sin
        self._past_length[0] = start
        self._kept[: len(kept)] = kept

    def reshape(self, tokens: int, kept: int, slots: int) -> None:
        """Set the shapes of the inputs whose shape varies."""
        shapes = {name: (self._rows, tokens, width) for name, width in self._widths.items()}
        self.context.reshape(shapes | {"kept": (kept,), "slots": (slots,)})

    def enqueue(self, stream: Any) -> None:
        """Start the copy of the inputs to the device, the computation, and the copy of the token ids to the host."""
        self._block.upload(stream)
        self.context.enqueue(stream)
        self._results.download("token", stream)


class DecodeGraph:
    """The CUDA graph of a decode step.

    It is captured when a window occurs for the second time, because TensorRT prepares itself in the first run.
    """

    def __init__(self, cuda: Cuda, step: Step, stream: Any, captures: bool) -> None:
        self._cuda = cuda
        self._step = step
        self._stream = stream
        self._captures = captures
        self._slots = 0
        self._graph: Any = None

    def run(self, slots: int) -> None:
        """Start one step that reads this many slots of the cache."""
        if slots != self._slots:
            self.close()
            self._step.reshape(1, 1, slots)
            self._step.enqueue(self._stream)
            self._slots = slots
            return
        if self._captures and self._graph is None:
            self._capture()
        if self._graph is None:
            self._step.enqueue(self._stream)
        else:
            self._cuda.launch(self._graph, self._stream)

    def close(self) -> None:
        """Release the graph."""
        self._slots = 0
        if self._graph is not None:
            self._cuda.destroy_graph(self._graph)
            self._graph = None

    def _capture(self) -> None:
        """Capture the graph. If any part of that fails, log it once; later steps launch their kernels one by one.

        This is slower and gives the same tokens. An error that concerns more than the capture comes up again there.
        """
        try:
            self._cuda.begin_capture(self._stream)
            self._step.enqueue(self._stream)
            self._graph = self._cuda.end_capture(self._stream)
        except EngineError as error:
            self._captures = False
            self._cuda.abandon_capture(self._stream)
            _log.warning("decoding without a CUDA graph: %s", error)
