"""An answer with the logits before each token, for evaluation. The answer is greedy, or follows given tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .reply import Reply


@dataclass(frozen=True)
class Trace:
    """One answer, token by token.

    Attributes:
        reply: the answer; its `output_ids` are the tokens taken.
        logits: float32 [len(output_ids), vocab]; row i holds the logits before token i was taken.
    """

    reply: Reply
    logits: NDArray[np.float32]


class Recorder:
    """Takes the most probable token, or the next of the given tokens, and keeps all logits."""

    def __init__(self, forced: Sequence[int] | None = None) -> None:
        self._forced = None if forced is None else iter(forced)
        self._logits: list[NDArray[np.float32]] = []

    @property
    def takes_the_best(self) -> bool:
        """False, because the engine must return logits to record."""
        return False

    def choose(self, logits: NDArray[np.float32]) -> int:
        """Record logits [vocab], and return the next token."""
        self._logits.append(logits.copy())
        return int(logits.argmax()) if self._forced is None else next(self._forced)

    def take(self, token: int) -> bool:
        """Refuse, because there are no logits to record."""
        return False

    @property
    def logits(self) -> NDArray[np.float32]:
        """All recorded logits [tokens, vocab]."""
        return np.stack(self._logits)
