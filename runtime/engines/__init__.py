"""The interface of an engine, which executes the graphs of a bundle.

An engine knows tiles, embeddings, rows, positions and logits. It does not know text.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Protocol, TypeVar, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from .rows import CacheRows

T = TypeVar("T")


class Engine(Protocol):
    """One model on one device. Each row of its KV cache holds one sequence.

    One thread at a time may use an engine; `interrupt` alone may be called from another one.

    Attributes:
        cache: how far each row is filled.
        tiles_at_once: tiles that one step of the tower encodes.
    """

    cache: CacheRows
    tiles_at_once: int

    @property
    def dialect(self) -> str:
        """The name of the decoder graph that decodes, a key of `bundle.names.DECODERS`."""
        ...

    def encode(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Encode tiles [tiles, S, S, 3] to image tokens [tiles, tokens_per_tile, hidden]."""
        ...

    def steps(self, length: int) -> list[int]:
        """Return the sizes of the steps in which a prompt of `length` tokens is computed (see `steps.py`)."""
        ...

    def prefill_steps(self, embeds: NDArray[np.float32], row: int = 0) -> Generator[None, None, NDArray[np.float32]]:
        """Append a prompt [seq, hidden] to a row, one step for each `next`, and return the logits [vocab] at the end.

        What is appended at the end of one of the steps of the whole prompt, except its last one, gets the numbers that
        it gets in the whole prompt. Between two steps other rows may decode, but no other prompt may begin.

        Raises:
            EngineError: the tokens do not fit the cache. The other methods that append raise this, too.
        """
        ...

    def prefill(self, embeds: NDArray[np.float32], row: int = 0) -> NDArray[np.float32]:
        """Append a prompt [seq, hidden] to a row, and return the logits [vocab] after its last token.

        They are valid until the next call.
        """
        return finish(self.prefill_steps(embeds, row))

    def decode(self, embed: NDArray[np.float32], row: int = 0) -> NDArray[np.float32]:
        """Append one token [hidden] to a row, and return the logits [vocab] after it, valid until the next call."""
        return self.decode_rows(embed[None], [row])[0]

    def decode_rows(self, embeds: NDArray[np.float32], rows: Sequence[int]) -> list[NDArray[np.float32]]:
        """Append one token to each of some rows in one step.

        Where the cache has several rows, a row's logits do not depend on which others take part.

        Args:
            embeds: [len(rows), hidden].
            rows: different rows.

        Returns:
            The logits [vocab] of each row, valid until the next call.
        """
        ...

    def score(self, embeds: NDArray[np.float32], row: int = 0) -> NDArray[np.float32]:
        """Append tokens [seq, hidden] to a row, and return the logits [seq, vocab] after each of them.

        The tokens get the rotary angles of one prompt. With dynamic NTK, beyond the model's maximum length, this
        differs from appending them one by one.
        """
        ...

    def copy(self, source: int, target: int, length: int) -> None:
        """Make the first `length` tokens of one row those of another row, too, which loses its own."""
        ...

    def interrupt(self) -> None:
        """End the call that runs in another thread, as far as the library can; it raises EngineError then."""
        ...

    def close(self) -> None:
        """Release the device's memory. The engine cannot be used afterwards."""
        ...


@runtime_checkable
class ChoosingEngine(Engine, Protocol):
    """An engine that can choose the most probable token on its device, so that the logits need not be copied."""

    def decode_token(self, embed: NDArray[np.float32], row: int = 0) -> int:
        """Append one token [hidden] to a row, and return the id of the most probable next token."""
        ...

    def last_logits(self) -> NDArray[np.float32]:
        """Return the logits [vocab] of the last `decode_token`, valid until the next call of the engine."""
        ...


def finish(steps: Generator[None, None, T]) -> T:
    """Run all steps, and return the result."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            result: T = end.value
            return result
