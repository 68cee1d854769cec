"""Measure how far one model's predictions are from another's over the same tokens: arrays of logits in, figures out.

Knows nothing about models. Divergences are Kullback-Leibler divergences D(reference || candidate) in nats.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# Divergences are counted on a logarithmic axis, four bins for each power of ten.
_EDGES = tuple(float(edge) for edge in np.logspace(-7, 2, 37))

# Above this, the reference gives each token of a text less than one chance in a thousand on average. The text is then
# nothing that this model would say, and how much less probable another model finds it tells nothing of its quality.
MEANINGFUL_PERPLEXITY = 1000.0


@dataclass(frozen=True)
class Divergence:
    """One sequence, position by position; all arrays are [positions].

    Attributes:
        kl: D(reference || candidate), nats.
        same_top: whether both find the same token most probable.
        reference_nll, candidate_nll: -log p(target), nats.
    """

    kl: NDArray[np.float64]
    same_top: NDArray[np.bool_]
    reference_nll: NDArray[np.float64]
    candidate_nll: NDArray[np.float64]

    @property
    def same_answer(self) -> bool:
        """Whether the most probable tokens are the same at every position."""
        return bool(self.same_top.all())

    @property
    def same_prefix(self) -> int:
        """Positions before the first one where the most probable tokens differ.

        Where the targets are the reference's greedy answer, so many tokens of the candidate's own are the same.
        """
        different = np.flatnonzero(~self.same_top)
        return int(different[0]) if len(different) else len(self.same_top)


def divergence(
    reference: NDArray[np.float32], candidate: NDArray[np.float32], targets: Sequence[int] | NDArray[np.integer]
) -> Divergence:
    """Compare logits [positions, vocab] of two models; `targets` [positions] are the tokens that came next."""
    rows = np.arange(len(reference))
    expected, found = log_softmax(reference), log_softmax(candidate)
    # Where the reference gives no probability at all (padding at -3e4), the product is 0 and must not become NaN.
    kl = (np.exp(expected) * (expected - found)).sum(axis=1)
    picked = np.asarray(targets, np.intp)
    return Divergence(
        kl=np.maximum(kl, 0.0),  # rounding leaves -1e-16 where both are equal
        same_top=reference.argmax(axis=1) == candidate.argmax(axis=1),
        reference_nll=-expected[rows, picked],
        candidate_nll=-found[rows, picked],
    )


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return logarithms of the probabilities, [positions, vocab] in float64."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return shifted


@dataclass(frozen=True)
class DivergenceSummary:
    """Figures over the positions of several sequences, every position counting the same.

    Attributes:
        positions: how many.
        kl_mean, kl_p99, kl_max: nats.
        top1_agreement: share of positions with the same most probable token.
        reference_perplexity, candidate_perplexity: exp of the mean -log p(target).
    """

    positions: int
    kl_mean: float
    kl_p99: float
    kl_max: float
    top1_agreement: float
    reference_perplexity: float
    candidate_perplexity: float

    @property
    def has_perplexity(self) -> bool:
        """Whether the perplexities say anything: the reference finds the targets probable at all."""
        return self.reference_perplexity <= MEANINGFUL_PERPLEXITY


def summarize(parts: Iterable[Divergence]) -> DivergenceSummary:
    """Join sequences into one set of figures; there must be at least one position."""
    parts = list(parts)
    kl = np.concatenate([part.kl for part in parts])
    return DivergenceSummary(
        positions=len(kl),
        kl_mean=float(kl.mean()),
        kl_p99=float(np.quantile(kl, 0.99)),
        kl_max=float(kl.max()),
        top1_agreement=float(np.concatenate([part.same_top for part in parts]).mean()),
        reference_perplexity=_perplexity([part.reference_nll for part in parts]),
        candidate_perplexity=_perplexity([part.candidate_nll for part in parts]),
    )


@dataclass(frozen=True)
class Histogram:
    """Counts between `edges`, one fewer than these; the outermost bins hold what lies beyond."""

    edges: tuple[float, ...]
    counts: tuple[int, ...]


def histogram(kl: NDArray[np.float64]) -> Histogram:
    """Count divergences [positions] on a logarithmic scale; what is no number is left out."""
    inside = np.clip(kl[np.isfinite(kl)], _EDGES[0], np.nextafter(_EDGES[-1], 0))
    counts, _ = np.histogram(inside, _EDGES)
    return Histogram(_EDGES, tuple(counts.tolist()))


def _perplexity(parts: list[NDArray[np.float64]]) -> float:
    return float(np.exp(np.concatenate(parts).mean()))
