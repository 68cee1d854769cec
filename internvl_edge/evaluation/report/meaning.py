"""Say in words what a figure means: how large a divergence is beside measured ones, and what differs in answers."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..compare import Comparison


@dataclass(frozen=True)
class Landmark:
    """What quantization of one kind did to the two demo readers, over 64 answers and 500 questions each.

    Attributes:
        kind: of quantization.
        rows: the names of its rows in benchmarks/results/reader-quality-*.json, where the figures come from.
        least, most: mean KL divergence, nats.
        points: change of the exact answers, in points of a hundred, from the worst to the best row.
    """

    kind: str
    rows: tuple[str, ...]
    least: float
    most: float
    points: tuple[float, float]


LANDMARKS = (
    Landmark(
        "8-bit weights, int8 tower or int8 cache",
        ("w8a16", "w8a16, rounded", "int8 cache", "int8 vision"),
        0.00004,
        0.00040,
        (-0.4, 0.2),
    ),
    Landmark(
        "4-bit weights with AWQ",
        (
            *("w4a16-awq", "w4a16-awq, int8 head", "w4a16-awq, symmetric"),
            *("recipe cpu", "recipe rtx", "recipe orin", "recipe thor"),
        ),
        0.00281,
        0.01520,
        (-1.4, -0.4),
    ),
    Landmark(
        "4-bit weights rounded without data, or 8-bit inputs",
        ("w4a16-rtn", "w4a16-rtn, symmetric", "w8a8"),
        0.01804,
        0.03197,
        (-2.4, -0.4),
    ),
)


def divergence_in_words(kl: float) -> str:
    """Say where a mean KL divergence, in nats, lies beside the landmarks."""
    if not math.isfinite(kl):
        return "The divergence is no number: the model is broken."
    for mark in LANDMARKS:
        if mark.least <= kl <= mark.most:
            return f"This is what {mark.kind} cost the demo readers, together with {_points(mark)}."
    if kl < LANDMARKS[0].least:
        return f"This is less than any quantization of the demo readers cost ({LANDMARKS[0].least:g} nats)."
    if kl > LANDMARKS[-1].most:
        times = kl / LANDMARKS[-1].most
        return (
            f"This is {times:.2g} times the most that any recipe cost the demo readers ({LANDMARKS[-1].most:g} nats). "
            "Small models on general text have such values; read the answers side by side before you use the bundle."
        )
    below = max((mark for mark in LANDMARKS if mark.most < kl), key=lambda mark: mark.most)
    above = min((mark for mark in LANDMARKS if mark.least > kl), key=lambda mark: mark.least)
    return f"This is more than {below.kind} cost the demo readers, and less than {above.kind} did."


def changes_in_words(found: Comparison) -> str:
    """Say how many answers and tokens differ from the reference's."""
    different = round((1 - found.same_answers) * found.cases)
    if different == 0:
        answers = f"All {found.cases} greedy answers equal those of {found.reference}, token for token."
    else:
        answers = f"{different} of {found.cases} greedy answers differ from those of {found.reference}."
    missed = 1 - found.greedy.top1_agreement
    if missed <= 0:
        return answers
    return f"{answers} At 1 of {1 / missed:.0f} tokens the most probable next token is another one."


def _points(mark: Landmark) -> str:
    worst, best = mark.points
    return f"{worst:+.1f} to {best:+.1f} points of exact answers".replace("-", "\N{MINUS SIGN}")
