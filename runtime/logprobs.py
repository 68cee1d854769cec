"""Log probabilities of the tokens of an answer.

They are those of the model's own distribution: before biases, penalties, temperature and a constraint, as vLLM gives
them by default. Thus they say how sure the model is, not how likely a setting made a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from internvl_edge.base.errors import PromptError
from internvl_edge.model.tokenizer import Tokenizer

from .ranking import largest, log_probabilities
from .sampling import Chooser

# Limit of OpenAI's interface.
MOST_LOGPROBS = 20


@dataclass(frozen=True)
class Logprob:
    """A token and its log probability.

    Attributes:
        token: its id.
        text: its text. U+FFFD stands for bytes that are no whole character.
        bytes: its bytes; those of several tokens in a row can make one character.
        logprob: natural logarithm of its probability.
    """

    token: int
    text: str
    bytes: bytes
    logprob: float


@dataclass(frozen=True)
class TokenLogprob(Logprob):
    """A token of an answer, with the most probable tokens at its place in `top`, the most probable one first."""

    top: Sequence[Logprob]


class LogprobRecorder:
    """Chooses as `chooser` does, and records the log probability of each token and of the `top` most probable ones.

    Raises:
        PromptError: `top` is not 0 to 20.
    """

    def __init__(self, chooser: Chooser, top: int = 0) -> None:
        if not 0 <= top <= MOST_LOGPROBS:
            raise PromptError(f"top_logprobs is {top}, expected 0 to {MOST_LOGPROBS}")
        self._chooser = chooser
        self._top = top
        self._records: list[tuple[NDArray[np.intp], NDArray[np.float64]]] = []

    @property
    def takes_the_best(self) -> bool:
        """False, because the engine must return logits to record."""
        return False

    def choose(self, logits: NDArray[np.float32]) -> int:
        """Return the next token for logits [vocab], and record it."""
        token = self._chooser.choose(logits)
        tokens = np.concatenate([[token], largest(logits, self._top)]) if self._top else np.array([token])
        self._records.append((tokens, log_probabilities(logits, tokens)))
        return token

    def take(self, token: int) -> bool:
        """Refuse, because there are no logits to record."""
        return False

    def logprobs(self, tokenizer: Tokenizer) -> list[TokenLogprob]:
        """Return the record of each token so far."""
        found = []
        for tokens, values in self._records:
            chosen, *top = (_logprob(tokenizer, int(t), float(v)) for t, v in zip(tokens, values, strict=True))
            found.append(TokenLogprob(chosen.token, chosen.text, chosen.bytes, chosen.logprob, top))
        return found


def _logprob(tokenizer: Tokenizer, token: int, value: float) -> Logprob:
    data = tokenizer.token_bytes(token, skip_special=False)
    return Logprob(token, data.decode("utf-8", "replace"), data, value)
