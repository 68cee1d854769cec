"""Draw tokens from a distribution over a whole vocabulary without sorting the vocabulary.

A token ranks before another one if its logit is larger, or if the logits are equal and its id is smaller. The parts of
a distribution that sampling keeps (top_k, top_p, min_p) are beginnings of this order. `Weights` draws from the whole
and tells how much weight ranks before a token, which costs a few passes over the vocabulary; its `Order` finds the
border of a part. As a rule few tokens can be the border, and they are sorted. Where many can (a flat distribution), a
radix selection looks at some bits of the order at a time, so that the cost has a bound for every distribution. Arrays
of the length of the vocabulary are allocated once in each thread, because fresh memory costs more than the arithmetic.
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
# Weights are summed in blocks of this many tokens.
_BLOCK = 512
# `largest` is for this many tokens; the number of tokens that it sorts stays within `_SORTED`.
FEW = 1024
# Every so manieth token is in the sample that brackets a rank, and this many tokens of it on each side.
_STRIDE, _MARGIN = 37, 96
# Extreme temperatures end here, roughly at the least and the greatest normal float32.
_COLDEST, _HOTTEST = 1e-37, 1e37
# Share of the exact limit below which a token cannot matter; the rest is for rounding.
_CAUTION = 0.5
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


class Weights:
    """The weights exp((logit - largest logit) / temperature) of all tokens, for logits [vocab].

    They are valid until the next ones are made in the same thread.

    Args:
        logits: they must have passed `peak_of`, which gives `peak`.
        temperature: above 0.
        top_k: only the tokens that rank so high have a weight; 0 for all.
        min_p: tokens of less weight have none, but they count in `mass`; the most probable token has weight 1.

    Attributes:
        mass: the sum of the weights after `top_k` and before `min_p`.
        kept: the sum of the weights.
    """

    def __init__(
        self, logits: NDArray[np.float32], peak: np.float32, temperature: float, top_k: int = 0, min_p: float = 0.0
    ) -> None:
        self._space = space = _workspace(len(logits))
        scale = np.float32(min(max(temperature, _COLDEST), _HOTTEST))
        np.subtract(peak + np.float32(0), logits, out=space.distances)  # the largest logit can be -0.0, no distance is
        with np.errstate(over="ignore"):  # a distance beyond float32 is a weight of 0
            np.divide(space.distances, scale, out=space.distances)
        np.exp(np.negative(space.distances, out=space.weights), out=space.weights)
        if 0 < top_k < len(logits):
            _drop_from(space, top_k)
        self._add_up()
        self.mass = self.kept
        if min_p > 0:
            probable = np.greater_equal(space.weights, np.float32(min_p), out=space.mask)
            np.multiply(space.weights, probable, out=space.weights)
            self._add_up()

    def _add_up(self) -> None:
        self._masses = np.cumsum(self._space.blocks.sum(1), dtype=np.float64)
        self.kept = float(self._masses[-1])

    def covering(self, share: float) -> int:
        """Add weights in the order of ids until the sum exceeds this share of all, and return the last token."""
        target = share * self.kept
        number = found(self._masses, target, "right")
        inside = np.cumsum(self._space.blocks[number], dtype=np.float64)
        before = float(self._masses[number - 1]) if number else 0.0
        return number * _BLOCK + found(inside, target - before, "right")

    def mass_before(self, token: int) -> float:
        """Return the sum of the weights of the tokens that rank before this one."""
        space = self._space
        key = space.keys[token]
        before = np.less(space.keys, key, out=space.mask)
        mass = _sum(np.multiply(space.weights, before, out=space.scratch))
        return mass + float(space.weights[token]) * int(np.count_nonzero(space.keys[:token] == key))

    def order(self, share: float) -> Order:
        """Return the order of the tokens. What is looked for in it must lie within this share of `mass`."""
        return Order(self._space, np.float32((1 - share) * self.mass / self._space.vocab * _CAUTION))


class Order:
    """Tokens in their order, those with less than the `least` weight left out. See `Weights.order`."""

    def __init__(self, space: _Workspace, least: np.float32) -> None:
        mask = np.greater_equal(space.weights, least, out=space.mask)
        if np.count_nonzero(mask) <= _SORTED:
            self._parts: _Sorted | _Bins = _Sorted(space, np.flatnonzero(mask))
        else:
            self._parts = _Bins(space)

    def reaching(self, mass: float) -> float:
        """Add weights from the first token on until the sum is at least `mass`, and return the sum."""
        return self._parts.at(mass, "left")[1]

    def covering(self, mass: float) -> int:
        """Add weights from the first token on until the sum exceeds `mass`, and return the last token."""
        return self._parts.at(mass, "right")[0]


class _Workspace:
    """Arrays for one vocabulary in one thread."""

    def __init__(self, vocab: int) -> None:
        self.vocab = vocab
        self.logits, self.distances, self.scratch = np.empty((3, vocab), np.float32)
        self.blocks = np.zeros((-(-vocab // _BLOCK), _BLOCK), np.float32)
        self.weights = self.blocks.reshape(-1)[:vocab]
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


def _drop_from(space: _Workspace, count: int) -> None:
    """Set the weights of all tokens to 0 but the first `count` in the order."""
    last = _key_of_rank(space, count)
    first = np.less_equal(space.keys, last, out=space.mask)
    surplus = int(np.count_nonzero(first)) - count
    np.multiply(space.weights, first, out=space.weights)
    if surplus:
        tied = np.flatnonzero(np.equal(space.keys, last, out=space.mask))
        space.weights[tied[len(tied) - surplus :]] = 0


def _key_of_rank(space: _Workspace, count: int) -> np.uint32:
    """Return the key of the token number `count` in the order, from 1 on. A sample of the keys brackets it."""
    sample = np.sort(space.keys[::_STRIDE])
    place = count * len(sample) // space.vocab
    low, high = int(sample[max(place - _MARGIN, 0)]), int(sample[min(place + _MARGIN, len(sample) - 1)])

    def up_to(key: int) -> int:
        return int(np.count_nonzero(np.less_equal(space.keys, np.uint32(key), out=space.mask)))

    before, until = (up_to(low - 1) if low else 0), up_to(high)
    if before >= count:
        low, before = 0, 0
    if until < count:
        high, until = int(space.keys.max()), space.vocab
    while low < high and until - before > _SORTED:
        middle = (low + high) // 2
        found = up_to(middle)
        low, before, high, until = (middle + 1, found, high, until) if found < count else (low, before, middle, found)
    if low == high:
        return np.uint32(low)
    inside = np.greater_equal(space.keys, np.uint32(low), out=space.mask)
    inside &= np.less_equal(space.keys, np.uint32(high), out=space.members)
    return np.uint32(np.sort(space.keys[np.flatnonzero(inside)])[count - before - 1])


class _Sorted:
    """Tokens sorted by their keys. The weights of the tokens before them sum to `before`."""

    def __init__(self, space: _Workspace, tokens: NDArray[np.intp], before: float = 0.0) -> None:
        self._tokens = _ranked(space.keys[tokens], tokens)
        self._masses = before + np.cumsum(space.weights[self._tokens], dtype=np.float64)

    def at(self, mass: float, side: Side) -> tuple[int, float]:
        """Return the token at which the sum of weights reaches ("left") or exceeds ("right") `mass`, and the sum."""
        index = found(self._masses, mass, side)
        return int(self._tokens[index]), float(self._masses[index])


class _Tied:
    """The first `count` tokens that have one key. See `_Sorted`."""

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
        return _nth(tied, index), self._before + (index + 1) * self._weight


class _Bins:
    """Tokens in bins by some bits of their keys: those of `_LEVELS[level]`. See `_Sorted`.

    A bin is ordered when something is looked for in it; one of many tokens by the bits of the next level.

    Args:
        space: the vocabulary. Below the first level, only `space.members` take part.
        level: the number of levels above this one.
        prefix: the bits above, which the members share.
        before: the sum of the weights of all tokens before the members.
    """

    def __init__(self, space: _Workspace, level: int = 0, prefix: int = 0, before: float = 0.0) -> None:
        self._space = space
        self._level = level
        self._before = before
        self._shift, width = _LEVELS[level]
        self._prefix = prefix << width
        # A bin has four parts, and neighbors in the vocabulary go to different ones, because many additions to one sum
        # are slow. Which part does not matter, so the two bits below those of a bin are mixed with the place.
        shift = np.right_shift if self._shift else np.left_shift
        bits = shift(space.keys, np.uint32(abs(self._shift - 2)), out=space.bits)
        if level:
            np.bitwise_and(bits, np.uint32((4 << width) - 1), out=bits)
        np.copyto(space.bins, np.bitwise_xor(bits, space.quarters, out=bits))
        np.copyto(space.masses, space.weights)
        if level:
            np.copyto(space.masses, 0, where=np.logical_not(space.members, out=space.mask))
        sums = np.bincount(space.bins, weights=space.masses)
        sums = np.concatenate([sums, np.zeros(-len(sums) % 4)])
        self._masses = before + np.cumsum(sums[0::4] + sums[1::4] + sums[2::4] + sums[3::4])
        self._open: tuple[int, _Sorted | _Tied | _Bins] | None = None

    def at(self, mass: float, side: Side) -> tuple[int, float]:
        number = found(self._masses, mass, side)
        if self._open is None or self._open[0] != number:
            self._open = number, self._ordered(number)
        return self._open[1].at(mass, side)

    def _ordered(self, number: int) -> _Sorted | _Tied | _Bins:
        space, prefix = self._space, self._prefix | number
        before = float(self._masses[number - 1]) if number else self._before
        bits = np.right_shift(space.keys, np.uint32(self._shift), out=space.bits)
        members = np.equal(bits, np.uint32(prefix), out=space.members)
        members &= np.greater(space.weights, 0, out=space.mask)  # those without a weight cannot be found
        count = int(np.count_nonzero(members))
        if count <= _SORTED:
            return _Sorted(space, np.flatnonzero(members), before)
        first = int(members.argmax())
        tied = np.equal(space.keys, space.keys[first], out=space.mask)
        tied &= members
        if np.count_nonzero(tied) == count:
            return _Tied(space, space.keys[first], float(space.weights[first]), count, before)
        return _Bins(space, self._level + 1, prefix, before)


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


def found(sums: NDArray[Any], target: float, side: Side) -> int:
    """Return the first index whose sum reaches ("left") or exceeds ("right") the target.

    Rounding of the target never leads behind the last index that adds something.
    """
    return int(min(np.searchsorted(sums, target, side), np.searchsorted(sums, sums[-1], "left")))


def _order_keys(values: NDArray[np.float32]) -> NDArray[np.uint32]:
    """Keys in the order of float32 values of both signs."""
    bits = (values + np.float32(0)).view(np.uint32)  # -0.0 becomes 0.0
    return np.where(bits >> np.uint32(31), ~bits, bits | np.uint32(0x8000_0000))


def _ranked(keys: NDArray[np.uint32], tokens: NDArray[np.intp]) -> NDArray[np.intp]:
    """Return tokens in the order of their keys, those with equal keys in the order of their ids."""
    both = (keys.astype(np.uint64) << np.uint64(32)) | tokens.astype(np.uint64)
    return (np.sort(both) & np.uint64(0xFFFF_FFFF)).astype(np.intp)
