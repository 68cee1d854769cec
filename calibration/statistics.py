"""Statistics of a linear layer's input, collected while samples pass through it.

They are the mean and maximum of |x| per channel and, on request, the Gram matrix X^T X and an evenly spaced subset of
the tokens. Sums are float64 per channel and float32 in the Gram matrix. A value that is not finite is an error that
names the layer, the tensor and the sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from internvl_edge.base.errors import EdgeError

from .compute import is_finite

# Wider Gram matrices are computed in block columns above the diagonal, which is half the work of the full product.
_GRAM_BLOCK = 256


@dataclass(frozen=True)
class StatisticsRequest:
    """The statistics to collect in addition to those per channel.

    Attributes:
        gram: the Gram matrix, [in, in] float32. It needs the square of the widest layer in memory.
        tokens: rows of the token subset, 0 for none.
    """

    gram: bool = False
    tokens: int = 0


@dataclass
class InputStatistics:
    """The statistics of one linear layer's input [tokens, in].

    Attributes:
        count: number of tokens seen.
        sum_abs: [in] float64.
        max_abs: [in] float32.
        gram: [in, in] float32 sum of outer products, or None.
        subset: [rows, in] some of the inputs themselves, evenly spaced over all tokens, or None.
    """

    count: int
    sum_abs: Tensor
    max_abs: Tensor
    gram: Tensor | None = None
    subset: Tensor | None = None

    @property
    def mean_abs(self) -> Tensor:
        """[in] float32 mean of |x|."""
        return (self.sum_abs / max(self.count, 1)).float()

    def add(self, x: Tensor) -> None:
        """Add x [tokens, in] to all statistics but the subset, which depends on the positions of the tokens."""
        magnitude = x.abs()
        self.count += len(x)
        self.sum_abs += magnitude.sum(0, dtype=torch.float32)
        torch.maximum(self.max_abs, magnitude.amax(0).float(), out=self.max_abs)
        if self.gram is not None:
            _add_gram(self.gram, x)


def _add_gram(gram: Tensor, x: Tensor) -> None:
    """Add x^T x to `gram`. A wide one is filled only on and above its block diagonal; `symmetrize` mirrors it."""
    width = x.shape[1]
    block = width if width < 2 * _GRAM_BLOCK else _GRAM_BLOCK
    for start in range(0, width, block):
        gram[start : start + block, start:] += x[:, start : start + block].T @ x[:, start:]


def symmetrize(gram: Tensor) -> Tensor:
    """Mirror the part above the diagonal to the part below it, in place."""
    for start in range(0, len(gram), _GRAM_BLOCK):
        rows = slice(start, start + _GRAM_BLOCK)
        gram[start + _GRAM_BLOCK :, rows] = gram[rows, start + _GRAM_BLOCK :].T
        block = gram[rows, rows]
        block.copy_(torch.triu(block) + torch.triu(block, 1).T)
    return gram


@dataclass
class Observer:
    """Collects the statistics of all linear inputs of one block while chunks of samples pass through it.

    Attributes:
        block: canonical name of the block, for messages: "decoder.layers.3".
        total: number of tokens that will pass in total.
        wanted: the statistics to collect.
        inputs: the result, by the name of the (first) linear that takes the input.
    """

    block: str
    total: int
    wanted: StatisticsRequest
    inputs: dict[str, InputStatistics] = field(default_factory=dict)
    _offset: int = 0
    _samples: Sequence[tuple[str, int]] = ()

    def begin(self, offset: int, samples: Sequence[tuple[str, int]]) -> None:
        """Announce the next chunk: the index of its first token among all tokens, and (name, tokens) of each sample."""
        self._offset, self._samples = offset, samples

    def __call__(self, name: str, x: Tensor) -> None:
        """Add the input [..., in] of linear `name` for the announced chunk.

        Raises:
            EdgeError: x holds NaN or infinity.
        """
        x = x.flatten(0, -2)
        statistics = self.inputs.get(name)
        if statistics is None:
            statistics = self.inputs[name] = self._empty(x)
        statistics.add(x)
        if not is_finite(statistics.max_abs):
            self.check(f"the input of {name}", x)
        if statistics.subset is not None:
            self._keep_subset(statistics.subset, x)

    def check(self, what: str, x: Tensor) -> None:
        """Raise EdgeError, naming the sample, where x [tokens, width] of the announced chunk is not finite."""
        if is_finite(x):
            return
        bad = ~torch.isfinite(x).all(-1)
        row = int(bad.nonzero()[0])
        end = 0
        for sample, tokens in self._samples:
            end += tokens
            if row < end:
                raise EdgeError(
                    f"{self.block}: {what} holds NaN or infinity for the sample {sample} ({int(bad.sum())} tokens in "
                    "all); the checkpoint is damaged or the layer overflows, try --dtype float32"
                )
        raise AssertionError(f"{len(x)} tokens observed, {end} announced")

    def _empty(self, x: Tensor) -> InputStatistics:
        width, device = x.shape[1], x.device
        rows = min(self.wanted.tokens, self.total)
        return InputStatistics(
            count=0,
            sum_abs=torch.zeros(width, dtype=torch.float64, device=device),
            max_abs=torch.zeros(width, device=device),
            gram=torch.zeros(width, width, device=device) if self.wanted.gram else None,
            subset=torch.empty(rows, width, dtype=x.dtype, device=device) if rows else None,
        )

    def _keep_subset(self, subset: Tensor, x: Tensor) -> None:
        places = (np.arange(len(subset)) * self.total) // len(subset)
        first, last = np.searchsorted(places, [self._offset, self._offset + len(x)])
        rows = torch.from_numpy(places[first:last] - self._offset)
        subset[first:last] = x[rows.to(x.device)]
