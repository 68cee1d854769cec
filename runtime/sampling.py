"""Choose a token from logits: greedy, or at random from a part of the distribution, with penalties and biases.

The steps, in this order: `logit_bias`, `repetition_penalty`, `frequency_penalty` and `presence_penalty`, then the most
probable token at temperature 0, else `temperature`, `top_k`, `top_p`, `min_p` and a random choice. The steps of
transformers' `generate` are in its order and have its meaning; the original code calls it. The others have OpenAI's
meaning, and vLLM's place in the order.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from internvl_edge.base.errors import PromptError
from internvl_edge.base.text import shown

from .ranking import FEW, Weights, adjustable, found, largest, peak_of

# Limits of OpenAI's interface.
MOST_BIASES = 300
_LARGEST_BIAS = 100.0
_LARGEST_PENALTY = 2.0
# From this top_p on, a token is drawn from the whole distribution, again if it is not of the part that top_p keeps, and
# at most so many times. A draw costs less than finding the border of that part, and the result has its distribution.
_LEAST_SHARE, _TRIES = 0.4, 6


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        temperature: 0 is greedy; higher values flatten the distribution.
        top_k: sample among the k most probable tokens; 0 keeps all. Of equally probable tokens, those with smaller ids
            come first, here and in `top_p`.
        top_p: sample among the most probable tokens whose probabilities sum to at least this.
        min_p: sample among the tokens that have at least this share of the probability of the most probable one.
        repetition_penalty: divides the positive logits, and multiplies the negative logits, of tokens that the answer
            already has. Tokens of the prompt count in the native layout, as in transformers. They do not in the
            published layout, whose original code generates from embeddings.
        frequency_penalty: -2 to 2; taken from the logit of a token once for each time that the answer has it.
        presence_penalty: -2 to 2; taken from the logit of each token that the answer has.
        logit_bias: {token id: -100 to 100}, added to logits; at most 300 tokens. -100 all but excludes a token, and 100
            all but forces it.
        seed: seed of the random generator; None takes a new one each time. An answer depends on its seed and its logits
            alone, whatever else runs.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    min_p: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None

    def __post_init__(self) -> None:
        penalty = f"{-_LARGEST_PENALTY:g} to {_LARGEST_PENALTY:g}"
        limits = (
            ("temperature", 0 <= self.temperature < math.inf, "at least 0 and finite"),
            ("top_k", self.top_k >= 0, "at least 0"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "0 to 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "above 0 and finite"),
            ("frequency_penalty", abs(self.frequency_penalty) <= _LARGEST_PENALTY, penalty),
            ("presence_penalty", abs(self.presence_penalty) <= _LARGEST_PENALTY, penalty),
            ("seed", self.seed is None or self.seed >= 0, "at least 0"),
        )
        for name, fits, expected in limits:
            if not fits:
                raise PromptError(f"{name} is {shown(getattr(self, name))}, expected {expected}")
        self._check_bias()

    def _check_bias(self) -> None:
        bias = self.logit_bias or {}
        if len(bias) > MOST_BIASES:
            raise PromptError(f"logit_bias has {len(bias)} tokens, expected at most {MOST_BIASES}; leave some out")
        for token, value in bias.items():
            if token < 0 or not abs(value) <= _LARGEST_BIAS:
                raise PromptError(
                    f"logit_bias has {shown(value)} for token {shown(token)}, expected -100 to 100 for a token id"
                )


class Chooser(Protocol):
    """The interface that chooses each token of an answer. `choose` is called once for each token, in their order."""

    @property
    def takes_the_best(self) -> bool:
        """Whether it always takes the most probable token. Then the engine may choose the token itself."""
        ...

    def choose(self, logits: NDArray[np.float32]) -> int:
        """Return the next token for logits [vocab].

        The logits must not be changed, and are valid only during the call.
        """
        ...

    def take(self, token: int) -> bool:
        """Take the most probable token, which the engine chose, and return True; or refuse it, and return False.

        After a refusal, `choose` must be called with the logits. It is for choosers that take the best.
        """
        ...


class Sampler:
    """Chooses the tokens of one answer.

    `counted` are tokens that the repetition penalty counts from the start. A choice is `pick`, which changes nothing
    but the random generator, and `accept`.
    """

    def __init__(self, sampling: Sampling, counted: Iterable[int] = ()) -> None:
        self._sampling = sampling
        self._random = np.random.default_rng(sampling.seed)
        self._penalties = _Penalties(sampling, counted) if _penalizes(sampling) else None
        bias = sampling.logit_bias or {}
        self._biased = np.fromiter(bias.keys(), np.intp, len(bias))
        self._biases = np.fromiter(bias.values(), np.float32, len(bias))

    @property
    def takes_the_best(self) -> bool:
        """Whether sampling is greedy and nothing changes the logits."""
        return self.is_greedy and self._penalties is None and not len(self._biased)

    @property
    def is_greedy(self) -> bool:
        """Whether it takes the most probable token after biases and penalties."""
        return self._sampling.temperature == 0

    def choose(self, logits: NDArray[np.float32]) -> int:
        """Return the next token for logits [vocab], and leave the logits unchanged.

        Raises:
            EngineError: a logit is NaN or positive infinity, or all are negative infinity.
        """
        token = self.pick(logits)
        self.accept(token)
        return token

    def take(self, token: int) -> bool:
        """See `Chooser`."""
        self.accept(token)
        return True

    def pick(self, logits: NDArray[np.float32]) -> int:
        """Return a token for logits [vocab] as `choose` does; the answer does not have it yet."""
        logits = self._adjusted(logits)
        if self.is_greedy:
            token = int(logits.argmax())
            peak_of(logits[token : token + 1])  # argmax finds NaN and infinity first
            return token
        return self._sample(logits)

    def accept(self, token: int) -> None:
        """Make a token part of the answer, whose penalties count it from now on."""
        if self._penalties is not None:
            self._penalties.count(token)

    def _adjusted(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        if self._penalties is None and not len(self._biased):
            return logits
        logits = adjustable(logits)
        logits[self._biased] += self._biases
        if self._penalties is not None:
            self._penalties.apply(logits)
        return logits

    def _sample(self, logits: NDArray[np.float32]) -> int:
        sampling, peak = self._sampling, peak_of(logits)
        if 0 < sampling.top_k <= FEW:
            return self._sample_among(largest(logits, sampling.top_k), logits, peak)
        weights = Weights(logits, peak, sampling.temperature, sampling.top_k, sampling.min_p)
        if sampling.top_p == 1:
            return weights.covering(self._random.random())
        for _ in range(_TRIES if sampling.top_p >= _LEAST_SHARE else 0):
            token = weights.covering(self._random.random())
            # Keep a token as long as the tokens before it do not reach top_p. The first token always stays.
            if weights.mass_before(token) < sampling.top_p * weights.mass:
                return token
        order = weights.order(sampling.top_p)
        return order.covering(self._random.random() * order.reaching(sampling.top_p * weights.mass))

    def _sample_among(self, tokens: NDArray[np.intp], logits: NDArray[np.float32], peak: np.float32) -> int:
        """Choose among a few tokens, the most probable one first."""
        sampling = self._sampling
        with np.errstate(over="ignore"):  # a distance beyond float64 is a weight of 0
            weights = np.exp((logits[tokens].astype(np.float64) - float(peak)) / sampling.temperature)
        sums = np.cumsum(weights)
        count = len(tokens)
        if sampling.top_p < 1:
            count = max(1, int(np.searchsorted(sums - weights, sampling.top_p * sums[-1], side="left")))
        if sampling.min_p > 0:
            count = min(count, int(np.count_nonzero(weights >= sampling.min_p)))
        return int(tokens[found(sums[:count], self._random.random() * sums[count - 1], "right")])


def _penalizes(sampling: Sampling) -> bool:
    return sampling.repetition_penalty != 1 or sampling.frequency_penalty != 0 or sampling.presence_penalty != 0


class _Penalties:
    """The tokens that penalties count, each once, and how often the answer has them."""

    def __init__(self, sampling: Sampling, counted: Iterable[int]) -> None:
        self._sampling = sampling
        tokens = list(dict.fromkeys(counted))
        self._places = {token: place for place, token in enumerate(tokens)}
        self._tokens = np.array(tokens, np.intp)
        self._counts = np.zeros(len(tokens), np.float32)

    def count(self, token: int) -> None:
        place = self._places.setdefault(token, len(self._places))
        if place == len(self._tokens):  # room for as many again, so that growing is rare
            self._tokens = np.concatenate([self._tokens, np.zeros(place + 64, np.intp)])
            self._counts = np.concatenate([self._counts, np.zeros(place + 64, np.float32)])
        self._tokens[place] = token
        self._counts[place] += 1

    def apply(self, logits: NDArray[np.float32]) -> None:
        """Change logits [vocab] in place."""
        tokens, counts = self._tokens[: len(self._places)], self._counts[: len(self._places)]
        seen, sampling = logits[tokens], self._sampling
        if sampling.repetition_penalty != 1:
            penalty = np.float32(sampling.repetition_penalty)
            seen = np.where(seen > 0, seen / penalty, seen * penalty)
        seen -= np.float32(sampling.frequency_penalty) * counts
        seen -= np.float32(sampling.presence_penalty) * (counts > 0)
        logits[tokens] = seen
