"""The interface of an engine, which executes the graphs of a bundle.

An engine knows tiles, embeddings, positions and logits. It does not know text.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray


class Engine(Protocol):
    """One model on one device with one KV cache of fixed capacity."""

    @property
    def dialect(self) -> str:
        """The name of the decoder graph that decodes, a key of `bundle.names.DECODERS`."""
        ...

    @property
    def capacity(self) -> int:
        """The most tokens that the KV cache can hold, prompt and answer together."""
        ...

    @property
    def length(self) -> int:
        """The number of tokens in the KV cache."""
        ...

    def encode(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Encode tiles [tiles, S, S, 3] to image tokens [tiles, tokens_per_tile, hidden]."""
        ...

    def steps(self, length: int) -> list[int]:
        """Return the sizes of the steps in which a prompt of `length` tokens is computed (see `steps.py`)."""
        ...

    def prefill(self, embeds: NDArray[np.float32]) -> NDArray[np.float32]:
        """Append a prompt [seq, hidden] to the KV cache, and return the logits [vocab] after its last token.

        What is appended at the end of one of the steps of the whole prompt, except its last one, gets the numbers that
        it gets in the whole prompt.
        """
        ...

    def decode(self, embed: NDArray[np.float32]) -> NDArray[np.float32]:
        """Append one token [hidden] to the KV cache, and return the logits [vocab] after it.

        The logits are valid until the next call.
        """
        ...

    def score(self, embeds: NDArray[np.float32]) -> NDArray[np.float32]:
        """Append tokens [seq, hidden] to the KV cache, and return the logits [seq, vocab] after each of them.

        The tokens get the rotary angles of one prompt. With dynamic NTK, beyond the model's maximum length, this
        differs from appending them one by one.
        """
        ...

    def reset(self, length: int = 0) -> None:
        """Drop all tokens from position `length` on."""
        ...

    def close(self) -> None:
        """Release the device's memory. The engine cannot be used afterwards."""
        ...


@runtime_checkable
class ChoosingEngine(Engine, Protocol):
    """An engine that can choose the most probable token on its device, so that the logits need not be copied."""

    def decode_token(self, embed: NDArray[np.float32]) -> int:
        """Append one token [hidden] to the KV cache, and return the id of the most probable next token."""
        ...
