"""Log probabilities of the tokens of an answer.

They are those of the model's own distribution: before biases, penalties, temperature and a constraint, as vLLM gives
them by default. Thus they say how sure the model is, not how likely a setting made a token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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

    def logprobs(self, tokenizer: Tokenizer, start: int = 0) -> list[TokenLogprob]:
        """Return the record of each token so far, from the one with number `start` on."""
        found = []
        for tokens, values in self._records[start:]:
            chosen, *top = (_logprob(tokenizer, int(t), float(v)) for t, v in zip(tokens, values, strict=True))
            found.append(TokenLogprob(chosen.token, chosen.text, chosen.bytes, chosen.logprob, top))
        return found


def _logprob(tokenizer: Tokenizer, token: int, value: float) -> Logprob:
    data = tokenizer.token_bytes(token, skip_special=False)
    return Logprob(token, data.decode("utf-8", "replace"), data, value)


def recorded(chooser: Chooser, options: Mapping[str, Any]) -> Chooser:
    """Return a chooser that records log probabilities if the options ask for them."""
    if options.get("logprobs"):
        return LogprobRecorder(chooser, options.get("top_logprobs", 0))
    if options.get("top_logprobs"):
        raise PromptError("top_logprobs needs logprobs=True; set both, or leave it out")
    return chooser
