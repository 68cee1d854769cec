"""Find tokens by their rank in a distribution over a whole vocabulary, without sorting the vocabulary.

A token ranks before another one if its logit is larger, or if the logits are equal and its id is smaller. The questions
of sampling are all about this order: which tokens are the first k, where does the sum of probabilities reach top_p,
which token covers a random number. As a rule few tokens can be the answer; they are sorted. Where many can (a flat
distribution), a radix selection looks at some bits of the order at a time, so that the cost has a bound for every
distribution. Arrays of the length of the vocabulary are allocated once in each thread, because fresh memory costs more
than the arithmetic.
"""

from __future__ import annotations

import math
import threading
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from internvl_edge.base.errors import EngineError

# The most tokens that are sorted. Sorting more takes longer than a round of the radix selection.
_SORTED = 8192
# `largest` is for this many tokens; the number of tokens that it sorts stays within `_SORTED`.
FEW = 1024
# Extreme temperatures end here, roughly at the least and the greatest normal float32.
_COLDEST, _HOTTEST = 1e-37, 1e37
# Share of the exact limit below which a token cannot matter; the rest is for rounding.
_CAUTION = 0.5
# Sums of the same weights in another order differ by less. A sum of weights must not lead to the token behind them.
_ROUNDED_DOWN = 1 - 1e-10

# The levels of the radix selection: (shift, width) of the bits of a key. After the last one, all tokens of a bin tie.
_LEVELS = ((17, 15), (2, 15), (0, 2))

Side = Literal["left", "right"]


def peak_of(logits: NDArray[np.float32]) -> np.float32:
    """Return the largest logit.

    Raises:
        EngineError: a logit is NaN or positive infinity, or all are negative infinity.
    """
    peak: np.float32 = logits.max()
    if not np.isfinite(peak):  # NaN wins over every number in numpy's maximum
        raise EngineError(
            f"the model computed {peak} as its largest logit, expected a finite number; "
            "export the checkpoint with --activations float32"
        )
    return peak


def largest(logits: NDArray[np.float32], count: int) -> NDArray[np.intp]:
    """Return the ids of the `count` tokens that rank first, in their order, for logits [vocab] and at most 1024 tokens.

    The maxima of columns of the vocabulary bound the smallest logit that can be among them.
    """
    count = min(count, len(logits))
    rows = max(1, min(64, _SORTED // max(count, 1)))
    columns = len(logits) // rows
    if columns < count:
        return _ranked(_order_keys(-logits), np.arange(len(logits)))[:count]
    mask = _workspace(len(logits)).mask
    maxima = np.concatenate([logits[: rows * columns].reshape(rows, columns).max(0), logits[rows * columns :]])
    limit = np.partition(maxima, len(maxima) - count)[len(maxima) - count]
    above = np.flatnonzero(np.greater(logits, limit, out=mask))  # in fewer than `count` columns of `rows` tokens each
    above = _ranked(_order_keys(-logits[above]), above)[:count]
    if len(above) == count:
        return above
    return np.concatenate([above, np.flatnonzero(np.equal(logits, limit, out=mask))[: count - len(above)]])


def log_probabilities(logits: NDArray[np.float32], tokens: NDArray[np.intp]) -> NDArray[np.float64]:
    """Return the natural logarithms of the probabilities of tokens [n] for logits [vocab]."""
    peak, scratch = peak_of(logits), _workspace(len(logits)).scratch
    total = _sum(np.exp(np.subtract(logits, peak, out=scratch), out=scratch))
    return logits[tokens].astype(np.float64) - float(peak) - math.log(total)


def adjustable(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return a copy of logits [vocab] that may be changed. It is valid until the next call in the same thread."""
    copied = _workspace(len(logits)).logits
    np.copyto(copied, logits)
    return copied


class Ranking:
    """The tokens that may be chosen for logits [vocab], weighted by exp((logit - largest logit) / temperature).

    It is valid until the next one is made in the same thread.

    Args:
        logits: they must have passed `peak_of`, which gives `peak`.
        temperature: above 0.
        top_k: only so many tokens are ranked; 0 for all.
        min_p: what will be looked for has at least this weight; the most probable token has weight 1.
        share: what will be looked for lies within this share of all weights, at most.

    Attributes:
        mass: the sum of the weights of the ranked tokens.
        probable: the sum of those that are at least `min_p`.
    """

    def __init__(
        self,
        logits: NDArray[np.float32],
        peak: np.float32,
        temperature: float,
        top_k: int = 0,
        min_p: float = 0.0,
        share: float = 1.0,
    ) -> None:
        space = _workspace(len(logits))
        scale = np.float32(min(max(temperature, _COLDEST), _HOTTEST))
        peak = peak + np.float32(0)  # not -0.0, so that no difference is
        distances, weights = space.distances, space.weights
        if few := 0 < top_k <= FEW:
            tokens = largest(logits, top_k)
            logits, distances, weights = logits[tokens], np.empty(len(tokens), np.float32), space.weights[: len(tokens)]
        with np.errstate(over="ignore"):  # a distance beyond float32 is a weight of 0
            np.divide(np.subtract(peak, logits, out=distances), scale, out=distances)
        np.exp(np.negative(distances, out=weights), out=weights)
        self._order: _Sorted | _Bins
        if few:
            self.mass = _sum(weights)
            self._order = _Sorted(tokens, weights)
        elif 0 < top_k < len(logits):
            self._order = _Bins(space, counted=True)
            self.mass = self._order.mass_of(top_k)
        else:
            self.mass = _sum(weights)
            least = max(min_p, (1 - share) * self.mass / len(logits) * _CAUTION)
            self._order = _order_of(space, np.float32(least))
        self.probable = self.mass
        if min_p > 0:
            mask = np.greater_equal(weights, np.float32(min_p), out=space.mask[: len(weights)])
            probable = _sum(np.multiply(weights, mask, out=space.scratch[: len(weights)]))
            self.probable = min(self.mass, probable * _ROUNDED_DOWN)

    def reaching(self, mass: float) -> float:
        """Add weights from the most probable token on until the sum is at least `mass`, and return the sum."""
        return self._order.at(mass, "left")[1]

    def covering(self, mass: float) -> int:
        """Add weights from the most probable token on until the sum exceeds `mass`, and return the last token."""
        return self._order.at(mass, "right")[0]


class _Workspace:
    """Arrays for one vocabulary in one thread."""

    def __init__(self, vocab: int) -> None:
        self.vocab = vocab
        self.logits, self.distances, self.weights, self.scratch = np.empty((4, vocab), np.float32)
        self.keys = self.distances.view(np.uint32)  # distances are not negative, so their bits have their order
        self.bits = self.scratch.view(np.uint32)
        self.quarters = np.arange(vocab, dtype=np.uint32) & np.uint32(3)
        self.bins = np.empty(vocab, np.intp)
        self.masses = np.empty(vocab, np.float64)
        self.mask, self.members = np.empty((2, vocab), np.bool_)


_local = threading.local()


def _workspace(vocab: int) -> _Workspace:
    space: _Workspace | None = getattr(_local, "space", None)
    if space is None or space.vocab != vocab:
        space = _local.space = _Workspace(vocab)
    return space


def _order_of(space: _Workspace, least: np.float32) -> _Sorted | _Bins:
    """Order the tokens whose weight is at least `least`, or all."""
    mask = np.greater_equal(space.weights, least, out=space.mask)
    if np.count_nonzero(mask) > _SORTED:
        return _Bins(space)
    tokens = np.flatnonzero(mask)
    tokens = _ranked(space.keys[tokens], tokens)
    return _Sorted(tokens, space.weights[tokens])


class _Sorted:
    """Tokens in their order, with their weights. The weights of the tokens before them sum to `before`."""

    def __init__(self, tokens: NDArray[np.intp], weights: NDArray[np.float32], before: float = 0.0) -> None:
        self._tokens = tokens
        self._masses = before + np.cumsum(weights, dtype=np.float64)

    def at(self, mass: float, side: Side) -> tuple[int, float]:
        """Return the token at which the sum of weights reaches ("left") or exceeds ("right") `mass`, and the sum."""
        index = _found(self._masses, mass, side)
        return int(self._tokens[index]), float(self._masses[index])

    def mass_of(self, count: int) -> float:
        """Return the sum of weights up to the token number `count` of these, from 1 on."""
        return float(self._masses[count - 1])


class _Tied:
    """All tokens that have one key. See `_Sorted`."""

    def __init__(self, space: _Workspace, key: np.uint32, weight: float, count: int, before: float) -> None:
        self._space = space
        self._key = key
        self._weight = weight
        self._count = count
        self._before = before

    def at(self, mass: float, side: Side) -> tuple[int, float]:
        steps = (mass - self._before) / self._weight if self._weight else 0.0
        index = min(max(math.ceil(steps) - 1 if side == "left" else int(steps), 0), self._count - 1)
        tied = np.equal(self._space.keys, self._key, out=self._space.mask)
        return _nth(tied, index), self.mass_of(index + 1)

    def mass_of(self, count: int) -> float:
        return self._before + count * self._weight


class _Bins:
    """Tokens in bins by some bits of their keys: those of `_LEVELS[level]`. See `_Sorted`.

    A bin is ordered when something is looked for in it; one of many tokens by the bits of the next level.

    Args:
        space: the vocabulary. Below the first level, only `space.members` take part.
        level: the number of levels above this one.
        prefix: the bits above, which the members share.
        before: the sum of the weights of all tokens before the members.
        counted: whether `mass_of` will be called.
    """

    def __init__(
        self, space: _Workspace, level: int = 0, prefix: int = 0, before: float = 0.0, counted: bool = False
    ) -> None:
        self._space = space
        self._level = level
        self._before = before
        self._shift, width = _LEVELS[level]
        self._prefix = prefix << width
        # A bin has four parts, and neighbours in the vocabulary go to different ones, because many additions to one sum
        # are slow. Which part does not matter, so the two bits below those of a bin are mixed with the place.
        shift = np.right_shift if self._shift else np.left_shift
        bits = shift(space.keys, np.uint32(abs(self._shift - 2)), out=space.bits)
        if level:
            np.bitwise_and(bits, np.uint32((4 << width) - 1), out=bits)
        np.copyto(space.bins, np.bitwise_xor(bits, space.quarters, out=bits))
        if counted and level:
            np.copyto(space.masses, space.members)
        if counted:
            self._counts = _sums_of_bins(space.bins, space.masses if level else None)
        np.copyto(space.masses, space.weights)
        if level:
            np.copyto(space.masses, 0, where=np.logical_not(space.members, out=space.mask))
        self._masses = before + _sums_of_bins(space.bins, space.masses)
        self._open: tuple[int, _Sorted | _Tied | _Bins] | None = None

    def at(self, mass: float, side: Side) -> tuple[int, float]:
        return self._bin(_found(self._masses, mass, side)).at(mass, side)

    def mass_of(self, count: int) -> float:
        number = _found(self._counts, count, "left")
        return self._bin(number, counted=True).mass_of(count - int(self._counts[number - 1] if number else 0))

    def _bin(self, number: int, counted: bool = False) -> _Sorted | _Tied | _Bins:
        if self._open is None or self._open[0] != number:
            self._open = number, self._ordered(number, counted)
        return self._open[1]

    def _ordered(self, number: int, counted: bool) -> _Sorted | _Tied | _Bins:
        space, prefix = self._space, self._prefix | number
        before = float(self._masses[number - 1]) if number else self._before
        bits = np.right_shift(space.keys, np.uint32(self._shift), out=space.bits)
        members = np.equal(bits, np.uint32(prefix), out=space.members)
        count = int(np.count_nonzero(members))
        if count <= _SORTED:
            tokens = np.flatnonzero(members)
            tokens = _ranked(space.keys[tokens], tokens)
            return _Sorted(tokens, space.weights[tokens], before)
        first = members.argmax()
        if np.count_nonzero(np.equal(space.keys, space.keys[first], out=space.mask)) == count:
            return _Tied(space, space.keys[first], float(space.weights[first]), count, before)
        return _Bins(space, self._level + 1, prefix, before, counted)


def _sums_of_bins(parts: NDArray[np.intp], weights: NDArray[np.float64] | None) -> NDArray[Any]:
    """Return the sums of weights (None: of ones) of all bins up to each one, from the part of a bin of each token."""
    sums = np.bincount(parts, weights=weights)
    sums = np.concatenate([sums, np.zeros(-len(sums) % 4, sums.dtype)])
    return np.cumsum(sums[0::4] + sums[1::4] + sums[2::4] + sums[3::4])


def _nth(mask: NDArray[np.bool_], index: int) -> int:
    """Return the place of True number `index` of a mask, from 0 on."""
    low, high = 0, len(mask)
    while high - low > 1024:
        middle = (low + high) // 2
        before = int(np.count_nonzero(mask[low:middle]))
        low, high, index = (low, middle, index) if index < before else (middle, high, index - before)
    return low + int(np.flatnonzero(mask[low:high])[index])


def _sum(weights: NDArray[np.float32]) -> float:
    return float(weights.sum(dtype=np.float64))


def _found(sums: NDArray[Any], target: float, side: Side) -> int:
    """The first index whose sum reaches the target; rounding never leads behind the last one that adds something."""
    return int(min(np.searchsorted(sums, target, side), np.searchsorted(sums, sums[-1], "left")))


def _order_keys(values: NDArray[np.float32]) -> NDArray[np.uint32]:
    """Keys in the order of float32 values of both signs."""
    bits = (values + np.float32(0)).view(np.uint32)  # -0.0 becomes 0.0
    return np.where(bits >> np.uint32(31), ~bits, bits | np.uint32(0x8000_0000))


def _ranked(keys: NDArray[np.uint32], tokens: NDArray[np.intp]) -> NDArray[np.intp]:
    """Return tokens in the order of their keys, those with equal keys in the order of their ids."""
    both = (keys.astype(np.uint64) << np.uint64(32)) | tokens.astype(np.uint64)
    return (np.sort(both) & np.uint64(0xFFFF_FFFF)).astype(np.intp)
