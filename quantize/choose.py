"""Choose a precision for every unit of linears: least predicted divergence for a cost, or least cost for a divergence.

The options of a unit range from cheap ones with much divergence to expensive ones with little. Only those on the lower
convex hull are useful. The steps along all hulls are taken in order of divergence removed per cost. This is the best
choice for every cost that the steps add up to (the Lagrangian solution). This module knows only numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True)
class Option:
    """One precision that a unit can have.

    Attributes:
        precision: as recipes write it.
        cost: in bits.
        divergence: predicted, in nats.
    """

    precision: str
    cost: float
    divergence: float


@dataclass(frozen=True)
class _Step:
    unit: str
    start: Option
    end: Option

    @property
    def gain(self) -> float:
        """The divergence removed per cost."""
        return (self.start.divergence - self.end.divergence) / (self.end.cost - self.start.cost)


def cheapest(options: Mapping[str, Sequence[Option]]) -> dict[str, Option]:
    """Return the cheapest option of each unit."""
    return {unit: min(each, key=lambda option: (option.cost, option.divergence)) for unit, each in options.items()}


def choose_for_cost(options: Mapping[str, Sequence[Option]], limit: float) -> dict[str, Option]:
    """Return the options with the least total divergence whose costs add up to at most `limit`.

    The cheapest options must fit within `limit`.
    """
    chosen = cheapest(options)
    left = limit - sum(option.cost for option in chosen.values())
    for step in _steps(options):
        if chosen[step.unit] == step.start and step.end.cost - step.start.cost <= left:
            chosen[step.unit] = step.end
            left -= step.end.cost - step.start.cost
    return chosen


def choose_for_divergence(options: Mapping[str, Sequence[Option]], limit: float) -> dict[str, Option]:
    """Return options with a low total cost whose divergences add up to at most `limit`.

    The options with the least divergence must fit within `limit`.
    """
    chosen = cheapest(options)
    total = sum(option.divergence for option in chosen.values())
    taken: list[_Step] = []
    for step in _steps(options):
        if total <= limit:
            break
        if chosen[step.unit] == step.start:
            chosen[step.unit] = step.end
            total += step.end.divergence - step.start.divergence
            taken.append(step)
    for step in sorted(taken, key=lambda step: step.start.cost - step.end.cost):
        without = total + step.start.divergence - step.end.divergence
        if chosen[step.unit] == step.end and without <= limit:
            chosen[step.unit], total = step.start, without
    return chosen


def _steps(options: Mapping[str, Sequence[Option]]) -> list[_Step]:
    """Return the steps of all units' hulls, sorted by divergence removed per cost. Steps of one unit stay in order."""
    steps = [
        _Step(unit, start, end)
        for unit, each in options.items()
        for hull in [lower_hull(each)]
        for start, end in pairwise(hull)
    ]
    return sorted(steps, key=lambda step: step.gain, reverse=True)


def lower_hull(options: Sequence[Option]) -> list[Option]:
    """Return the useful options, cheapest first. Each removes less divergence per cost than the one before it."""
    hull: list[Option] = []
    for option in sorted(options, key=lambda option: (option.cost, option.divergence)):
        if hull and option.divergence >= hull[-1].divergence:
            continue
        while len(hull) > 1 and _Step("", hull[-2], hull[-1]).gain <= _Step("", hull[-2], option).gain:
            hull.pop()
        hull.append(option)
    return hull
