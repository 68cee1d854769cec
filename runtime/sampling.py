"""Choose a token from logits: greedy, or by temperature, top-k and top-p sampling, with a repetition penalty.

The order of the steps and the meaning of each parameter are those of transformers' `generate`, which the original
code calls.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from internvl_edge.base.errors import PromptError


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        temperature: 0 is greedy; higher values flatten the distribution.
        top_k: sample among the k most probable tokens; 0 keeps all.
        top_p: sample among the most probable tokens whose probabilities sum to at least this.
        repetition_penalty: divides the positive logits, and multiplies the negative logits, of tokens that the answer
            already has. Tokens of the prompt count in the native layout, as in transformers. They do not in the
            published layout, whose original code generates from embeddings.
        seed: seed of the random generator; None takes a new one each time.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        limits = (
            ("temperature", self.temperature >= 0, "at least 0"),
            ("top_k", self.top_k >= 0, "at least 0"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("repetition_penalty", self.repetition_penalty > 0, "above 0"),
            ("seed", self.seed is None or self.seed >= 0, "at least 0"),
        )
        for name, fits, expected in limits:
            if not fits:
                raise PromptError(f"{name} is {getattr(self, name)}, expected {expected}")


class Chooser(Protocol):
    """The interface that chooses each token of an answer."""

    @property
    def takes_the_best(self) -> bool:
        """Whether it always takes the most probable token. Then the engine may choose the token itself."""
        ...

    def choose(self, logits: NDArray[np.float32]) -> int:
        """Return the next token for logits [vocab].

        The logits must not be changed, and are valid only during the call.
        """
        ...


class Sampler:
    """Chooses the tokens of one answer.

    `counted` are tokens that the repetition penalty counts from the start.
    """

    def __init__(self, sampling: Sampling, counted: Iterable[int] = ()) -> None:
        self._sampling = sampling
        self._random = np.random.default_rng(sampling.seed)
        self._answered: set[int] = set(counted)

    @property
    def takes_the_best(self) -> bool:
        """Whether sampling is greedy and no penalty changes the logits."""
        return self._sampling.temperature == 0 and self._sampling.repetition_penalty == 1

    def choose(self, logits: NDArray[np.float32]) -> int:
        """Return the next token for logits [vocab], and leave the logits unchanged."""
        token = self._choose(self._penalised(logits))
        self._answered.add(token)
        return token

    def _penalised(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        penalty = np.float32(self._sampling.repetition_penalty)
        if penalty == 1 or not self._answered:
            return logits
        logits, tokens = logits.copy(), list(self._answered)
        seen = logits[tokens]
        logits[tokens] = np.where(seen > 0, seen / penalty, seen * penalty)
        return logits

    def _choose(self, logits: NDArray[np.float32]) -> int:
        if self._sampling.temperature == 0:
            return int(logits.argmax())
        tokens, probabilities = self.distribution(logits)
        return int(self._random.choice(tokens, p=probabilities))

    def distribution(self, logits: NDArray[np.float32]) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
        """Return the tokens that can be chosen for logits [vocab], most probable first, and their probabilities."""
        kept = min(self._sampling.top_k or len(logits), len(logits))
        tokens = np.argpartition(-logits, kept - 1)[:kept]
        tokens = tokens[np.argsort(-logits[tokens], kind="stable")]
        scaled = (logits[tokens].astype(np.float64) - float(logits[tokens[0]])) / self._sampling.temperature
        probabilities = np.exp(scaled)
        probabilities /= probabilities.sum()
        # Keep a token as long as the tokens before it do not reach top_p. The first token always stays.
        before = np.cumsum(probabilities) - probabilities
        count = int(np.searchsorted(before, self._sampling.top_p, side="left"))
        probabilities = probabilities[: max(1, count)]
        return tokens[: len(probabilities)], probabilities / probabilities.sum()
