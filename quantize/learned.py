"""Learn the rounding of one block: move weights to the other neighbor where the block's output comes nearer.

What error compensation leaves of each weight before it is rounded, in units of the grid, is the latent u of the weight.
W = scale * (round(u) - zero) is what the block computes with, and the gradient of W passes to u as if nothing were
rounded (the straight-through estimator), as in Nagel et al., 2020 (arXiv:2004.10568) and Cheng et al., 2023
(arXiv:2309.05516). Scales, zero points and norms stay.

The aim is what the float model puts out behind this block, for the input that the quantized model gives it. The drift
of all blocks before is thus corrected too. Text and image tokens count alike: the error of each is relative to the size
of its own target. This module does not know files.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from internvl_edge.base.progress import SILENT, Advance, Progress
from internvl_edge.calibration.compute import choose_compute
from internvl_edge.calibration.stream import BlockStream
from internvl_edge.recipe.recipe import LearnedRounding

from .block import Latent, QuantizedBlock
from .rounding import Grid
from .sensitivity import probe_samples

_BETAS = (0.9, 0.95)
_EPSILON = 1e-12
_WARM_UP = 3
# Weights of linears with more inputs than this take smaller steps, by the square of the ratio. Every step moves all
# weights of an output, most of them by noise, and the noise of all inputs adds up.
_INPUTS = 1536
# As far as a latent goes beyond the lowest and the highest integer: it must still round to them.
_BEYOND = 0.49
# Outputs of a linear that move together.
_ROWS = 512
# The error before and after is measured on about so many tokens.
_CHECKED_TOKENS = 2048


@dataclass(frozen=True)
class Learned:
    """What learning did to one layer.

    Attributes:
        before, after: squared error of the layer's output relative to the target, mean over some calibration tokens.
            They are equal where no integer was kept that learning had changed.
        changed: share of the integers that changed.
        seconds: what it took.
    """

    before: float
    after: float
    changed: float
    seconds: float


class RoundingLearner:
    """Learns the rounding of one block after another.

    Args:
        stream: the pass that quantizes, whose inputs are those of the quantized model.
        reference: a pass of the float model through the same blocks. It goes one block ahead.
        how: the recipe's choices.
        progress: shows the steps.
    """

    def __init__(
        self, stream: BlockStream, reference: BlockStream, how: LearnedRounding, progress: Progress = SILENT
    ) -> None:
        self._stream = stream
        self._reference = reference
        self._how = how
        self._progress = progress
        self._blocks = stream.blocks
        # Products of gradients need no more than bfloat16; what stays (norms, residual, loss, latents) is float32.
        self._compute = choose_compute(str(stream.blocks.compute.device))
        self._lengths = stream.blocks.lengths(0)

    def learn(self, index: int, block: QuantizedBlock) -> Learned | None:
        """Change the latents of a block, if it has any; `BlockQuantizer.settle` makes integers of them.

        A block that does not come nearer to its target keeps what it had: its latents are gone then.
        """
        if not block.latents:
            return None
        started = time.perf_counter()
        self._reference.run(SILENT, "", lambda index, statistics: None, until=index + 1)
        prefix = f"{self._blocks.names[index]}."
        weights = self._blocks.load(index, self._compute.dtype)
        weights |= block.replacements(prefix, self._compute)
        latents = {
            name.removeprefix(prefix): _Moving(latent, block.linears[name].values)
            for name, latent in block.latents.items()
        }
        for name, moving in latents.items():
            moving.weight = weights[f"{name}.weight"] = moving.rounded(self._compute.dtype).requires_grad_()
        checked = probe_samples(self._lengths, _CHECKED_TOKENS)
        before = self._error(index, weights, checked)
        with self._progress.phase(f"learning the rounding of layer {index}", self._how.steps, "steps") as advance:
            self._steps(index, weights, list(latents.values()), advance)
        after, seconds = self._error(index, weights, checked), time.perf_counter() - started
        if not after < before:
            block.latents.clear()
            return Learned(before, before, 0.0, seconds)
        total = sum(latent.values.numel() for latent in block.latents.values())
        return Learned(before, after, sum(moving.changed() for moving in latents.values()) / total, seconds)

    def _steps(self, index: int, weights: dict[str, Tensor], latents: Sequence[_Moving], advance: Advance) -> None:
        steps = self._how.steps
        for step, items in enumerate(batches(self._lengths, self._how.tokens, steps, (self._how.seed, index))):
            with torch.enable_grad():
                torch.autograd.backward(self._loss(index, weights, items))
            warm, left = min(1.0, (step + 1) / _WARM_UP), (steps - step) / max(1, steps - _WARM_UP)
            rate = self._how.rate * min(warm, left)
            for moving in latents:
                moving.step(step + 1, rate)
            advance(1)

    @torch.no_grad()
    def _error(self, index: int, weights: dict[str, Tensor], items: Sequence[int]) -> float:
        losses = [float(self._loss(index, weights, [item])) * self._lengths[item] for item in items]
        return sum(losses) / sum(self._lengths[item] for item in items)

    def _loss(self, index: int, weights: dict[str, Tensor], items: Sequence[int]) -> Tensor:
        """Return the squared error of the output relative to the target's square, mean over the tokens of items."""
        x = torch.cat([self._stream.inputs(index, range(item, item + 1)) for item in items])
        target = torch.cat([self._reference.inputs(index + 1, range(item, item + 1)) for item in items])
        missed = (self._blocks.run(index, weights, x, items) - target).square().mean(-1)
        return (missed / target.square().mean(-1).clamp(min=1e-12)).mean()


class _Moving:
    """The latent of one linear, with the weight that the block computes with, and Adam's moments.

    All steps go through some rows at a time: what they need in between would otherwise be several times the weight.

    Args:
        latent: what moves.
        start: [out, in], the integers that it rounds to now.
    """

    weight: Tensor

    def __init__(self, latent: Latent, start: NDArray[Any]) -> None:
        self._latent = latent
        self._start = torch.from_numpy(start)
        self._first, self._second = torch.zeros_like(latent.values), torch.zeros_like(latent.values)
        low, high = latent.grid.limits
        self._limits = low - _BEYOND, high + _BEYOND
        self._pace = min(1.0, _INPUTS / latent.values.shape[1]) ** 2

    def rounded(self, dtype: torch.dtype) -> Tensor:
        """Return the weight that the latent stands for now, [out, in]."""
        weight = torch.empty_like(self._latent.values, dtype=dtype)
        for rows, grid in self._pieces():
            weight[rows] = grid.dequantize(self._integers(rows))
        return weight

    @torch.no_grad()
    def step(self, number: int, rate: float) -> None:
        """Take one step of Adam, and compute the weight anew."""
        assert self.weight.grad is not None
        rate *= self._pace
        for rows, grid in self._pieces():
            gradient = self.weight.grad[rows].float().reshape(*grid.scale.shape, -1)
            gradient = gradient.mul_(grid.scale[..., None]).flatten(1)
            first, second = self._first[rows], self._second[rows]
            first.lerp_(gradient, 1 - _BETAS[0])
            second.lerp_(gradient.square_(), 1 - _BETAS[1])
            size = (second / (1 - _BETAS[1] ** number)).sqrt_().add_(_EPSILON)
            values = self._latent.values[rows]
            values.addcdiv_(first, size, value=-rate / (1 - _BETAS[0] ** number)).clamp_(*self._limits)
            self.weight[rows] = grid.dequantize(self._integers(rows))
        self.weight.grad = None

    def changed(self) -> int:
        """Return the number of integers that differ from those of the beginning."""
        start = self._start.to(self._latent.values.device)
        return sum(int((self._integers(rows) != start[rows]).sum()) for rows, _ in self._pieces())

    def _integers(self, rows: slice) -> Tensor:
        return torch.round(self._latent.values[rows]).clamp_(*self._latent.grid.limits)

    def _pieces(self) -> Iterator[tuple[slice, Grid]]:
        grid = self._latent.grid
        for start in range(0, len(grid.scale), _ROWS):
            rows = slice(start, start + _ROWS)
            yield rows, Grid(grid.scheme, grid.scale[rows], grid.zero[rows])


def batches(lengths: Sequence[int], tokens: int, count: int, seed: tuple[int, int]) -> Iterator[list[int]]:
    """Yield so many lists of items with at least so many tokens each, in an order that the seed decides.

    Every item comes once before any comes again.
    """
    generator, waiting = np.random.default_rng(seed), list[int]()
    for _ in range(count):
        batch: list[int] = []
        while sum(lengths[item] for item in batch) < tokens and len(batch) < len(lengths):
            waiting = waiting or [int(item) for item in generator.permutation(len(lengths))]
            batch.append(waiting.pop())
        yield batch


def mean(found: Sequence[Learned]) -> Learned:
    """Return the mean of errors and changes over layers, and the seconds of all."""
    before, after, changed, seconds = np.array([astuple(each) for each in found]).T
    return Learned(float(before.mean()), float(after.mean()), float(changed.mean()), float(seconds.sum()))
