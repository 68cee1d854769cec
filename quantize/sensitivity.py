"""Measure what rounding a linear does to the end of the model, in one backward pass for all linears.

Rounding some linears changes the output of their block by d, which is computed exactly. The effect of d behind the
block is followed through the Jacobian J of all later blocks. With g the gradient, at the output of the block, of a
random scalar at the end of the model,

    E[(g . d)^2] = (J d)^T S (J d)

where S is what the scalar is made for (Hutchinson's estimator):

- tower: v . embeddings with random signs v. S is the identity, so this is the squared error of the embeddings.
- decoder: sum log p(y), with tokens y drawn from the model's own predictions. S is the Fisher information F of the
  logits, and 1/2 (J d)^T F (J d) is the Kullback-Leibler divergence of the next token to second order, in nats.

A few gradients, carried back through one block at a time, therefore replace one run of the rest of the model per linear
and precision. Effects of different linears are taken to add up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from internvl_edge.base.progress import Progress
from internvl_edge.calibration.block_weights import load_tensor
from internvl_edge.calibration.blocks import rms_norm
from internvl_edge.calibration.compute import Compute, to_torch
from internvl_edge.calibration.dataset import CalibrationSet
from internvl_edge.calibration.models import Decoder
from internvl_edge.calibration.statistics import InputStatistics, StatisticsRequest
from internvl_edge.calibration.stream import BlockStream, Probe, Statistics
from internvl_edge.calibration.work import WorkFolder
from internvl_edge.checkpoint.reader import Checkpoint
from internvl_edge.recipe.recipe import Precision

from .folding import SCALE_GROUPS
from .layer import BlockQuantizer

# The number of gradients per probe tile. With four tiles, an error is known to about a quarter.
_DIRECTIONS = 8
# The number of tokens in the decoder's probes, and the number of draws for each probe.
_PROBE_TOKENS = 2048
_DRAWS = 16
# The numbers of lm_head rows and of tokens that are multiplied at a time.
_HEAD_ROWS = 16384
_HEAD_TOKENS = 512

# What is found beside the linears: the mean squared length of a probe tile's embeddings.
_ENERGY = "embeddings"

# Takes the index of a block and returns, by the name of each linear, the tensors that replace the block's own when only
# that linear is rounded.
OneByOne = Callable[[int], Mapping[str, Mapping[str, Tensor]]]
# Name of a unit's first linear -> {precision as recipes write it: divergence in nats}.
Divergences = dict[str, dict[str, float]]


def felt(gradients: Tensor, changes: Tensor) -> Tensor:
    """Return the mean of (g . d)^2 over the draws, [changes] float64.

    Args:
        gradients: [draws, rows, width].
        changes: [changes, rows, width] of the same type.
    """
    return (gradients.flatten(1) @ changes.flatten(1).T).double().square().mean(0)


# ---- tower ----


def tower_parts(stream: BlockStream, one_by_one: OneByOne, progress: Progress, title: str) -> dict[str, float]:
    """Return each canonical linear's share of the embeddings' relative squared error (mean over probe tiles).

    A killed run continues. `stream` is a finished pass through the float tower.
    """
    blocks = stream.blocks
    last = len(blocks.names) - 1
    shape = (len(stream.probes), _DIRECTIONS, blocks.lengths(last + 1)[0], blocks.width(last + 1))

    def signs(item: int) -> Tensor:
        drawn = np.random.default_rng(0).integers(0, 2, shape, np.int8)[list(stream.probes).index(item)]
        return torch.from_numpy(drawn.astype(np.float32) * 2 - 1).to(blocks.compute.device)

    @torch.no_grad()
    def measure(index: int, probes: Iterator[Probe]) -> dict[str, float]:
        rounded = one_by_one(index)
        # The differences of nearly equal outputs would be lost in the rounding of bfloat16.
        weights = blocks.load(index, torch.float32)
        totals = dict.fromkeys(rounded, 0.0)
        for probe in probes:
            items = range(probe.item, probe.item + 1)
            y = blocks.run(index, weights, probe.x, items)
            for name, tensors in rounded.items():
                change = blocks.run(index, {**weights, **tensors}, probe.x, items) - y
                # No block follows the last one, so its errors are exact.
                if index == last:
                    totals[name] += float(change.double().square().sum())
                else:
                    totals[name] += float(felt(probe.gradients.double(), change[None].double()))
        found = {f"{blocks.names[index]}.{name}": total / len(stream.probes) for name, total in totals.items()}
        if index == last:
            energies = [float(stream.output(item).double().square().sum()) for item in stream.probes]
            found[_ENERGY] = float(np.mean(energies)) or 1.0
        return found

    found = stream.back(progress, title, signs, measure)
    return {name: value / found[_ENERGY] for name, value in found.items() if name != _ENERGY}


# ---- decoder ----


class DecoderSensitivity:
    """Measures the divergence that each candidate precision causes in each unit of linears. All state is on disk.

    The forward stage runs the float decoder, makes the candidates, and stores d for a few samples, the probes. These
    are not used to make the candidates: on data that error compensation was fitted to, candidates would look better
    than they are.

    Args:
        work, checkpoint, calibration, compute: those of the run.
        quantizers: one per candidate precision that rounds something. Each quantizes all linears alike.
    """

    def __init__(
        self,
        work: WorkFolder,
        checkpoint: Checkpoint,
        calibration: CalibrationSet,
        compute: Compute,
        quantizers: Mapping[Precision, BlockQuantizer],
    ) -> None:
        self._work = work
        self._checkpoint = checkpoint
        self._calibration = calibration
        self._quantizers = quantizers
        self._blocks = Decoder(checkpoint, compute, calibration)
        self._groups = SCALE_GROUPS[checkpoint.config.decoder.architecture]
        self._probes = probe_samples(calibration.lengths)
        held_out = self._probes if len(self._probes) <= len(calibration.lengths) // 2 else ()
        self._stream = BlockStream(work, "decoder-float", self._blocks, self._probes, held_out)

    def run(self, progress: Progress) -> Divergences:
        """Run both stages. A killed run continues.

        Raises:
            EdgeError: NaN or infinity; the message names layer, tensor and sample.
        """
        self._stream.run(progress, "trying precisions in the decoder", self._candidates, self.wanted)
        title = "measuring the sensitivity of the decoder"
        found: Divergences = self._stream.back(progress, title, self._scores, self._measure)
        self._work.remove(_changes(0))
        self._stream.forget()
        return found

    @property
    def wanted(self) -> StatisticsRequest:
        """The statistics that all candidates need."""
        each = [quantizer.wanted for quantizer in self._quantizers.values()]
        return StatisticsRequest(gram=any(wanted.gram for wanted in each), tokens=max(wanted.tokens for wanted in each))

    def _candidates(self, index: int, statistics: Statistics) -> None:
        """Round one layer with every candidate, and store the change of its output, for one unit at a time."""
        prefix = f"{self._blocks.names[index]}."
        replaced: list[dict[str, Tensor]] = []
        for quantizer in self._quantizers.values():
            block = quantizer.layer(index, {name: _copy(inputs) for name, inputs in statistics.items()})
            replaced += [quantizer.only_unit(prefix, group, block) for group in self._groups]
        weights = self._blocks.load(index, torch.float32)
        arrays = {}
        for item in self._probes:
            items = range(item, item + 1)
            x = self._stream.inputs(index, items)
            y = self._blocks.run(index, weights, x, items)
            changed = (self._blocks.run(index, weights | one, x, items) for one in replaced)
            stored = torch.stack([(other - y).to(torch.bfloat16) for other in changed])
            arrays[str(item)] = stored.cpu().view(torch.int16).numpy()
        self._work.write_arrays(_changes(index), arrays)

    @torch.no_grad()
    def _measure(self, index: int, probes: Iterator[Probe]) -> Divergences:
        """Return the divergences of one layer's candidates."""
        self._work.remove(_changes(index + 1))  # measured and stored
        arrays = self._work.need_arrays(_changes(index))
        total, power = torch.zeros(2, len(self._quantizers) * len(self._groups), dtype=torch.float64)
        for probe in probes:
            changes = torch.from_numpy(arrays[str(probe.item)]).view(torch.bfloat16).to(probe.x.device).float()
            total += felt(probe.gradients, changes).cpu()
            power += changes.flatten(1).double().square().sum(1).cpu()
        shape = len(self._quantizers), len(self._groups)
        nats = self._pooled(total.reshape(shape), power.reshape(shape)) / 2 / self._positions()
        return {
            f"{self._blocks.names[index]}.{group.consumers[0]}": {
                str(precision): float(nats[row, column]) for row, precision in enumerate(self._quantizers)
            }
            for column, group in enumerate(self._groups)
        }

    def _pooled(self, totals: Tensor, powers: Tensor) -> Tensor:
        """Return the divergence totals [candidates, units], pooled over candidates by their squared errors.

        The squared error of a candidate is exact, but the divergence that it causes is estimated only to some tenths.
        Finer or coarser rounding of a unit's weights changes the size of the error and hardly its direction. All
        weight-only candidates therefore share one estimate of divergence per squared error. Candidates with rounded
        inputs cause errors in other directions and have their own estimate.
        """
        pooled = torch.empty_like(totals)
        inputs = torch.tensor([bool(p.scheme and p.scheme.static_inputs) for p in self._quantizers])
        for rows in (inputs, ~inputs):
            pooled[rows] = powers[rows] * totals[rows].sum(0) / powers[rows].sum(0).clamp(min=1e-300)
        return pooled

    def _scores(self, item: int) -> Tensor:
        """Return gradients of sum log p(y) at the decoder's output, [draws, tokens, width].

        y is drawn at every position that is not an image token.
        """
        decoder = self._checkpoint.config.decoder
        exact = replace(self._blocks.compute, dtype=torch.float32)
        x = self._stream.output(item)
        weight = load_tensor(self._checkpoint, "decoder.norm.weight", exact)
        table = to_torch(self._checkpoint.tensor("decoder.lm_head.weight"))
        generator = torch.Generator().manual_seed(item)
        with torch.no_grad():
            hidden = rms_norm(x, weight, decoder.rms_norm_eps)
            scores = torch.cat([_draw(table, part, generator) for part in torch.split(hidden, _HEAD_TOKENS)], dim=1)
        scores[:, torch.from_numpy(self._is_image(item)).to(scores.device)] = 0
        x = x.requires_grad_()
        with torch.enable_grad():
            normed = rms_norm(x, weight, decoder.rms_norm_eps)
            pulled = [torch.autograd.grad(normed, x, score, retain_graph=True)[0] for score in scores]
        return torch.stack(pulled)

    def _is_image(self, item: int) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
        start = sum(self._calibration.lengths[:item])
        return self._calibration.is_image[start : start + self._calibration.lengths[item]]

    def _positions(self) -> int:
        return max(1, sum(int((~self._is_image(item)).sum()) for item in self._probes))


def _draw(table: Tensor, hidden: Tensor, generator: torch.Generator) -> Tensor:
    """Return W[y] - E W for y drawn from softmax(W h), [draws, tokens, width]."""
    parts = torch.split(table, _HEAD_ROWS)
    logits = [hidden @ part.to(hidden.device).float().T for part in parts]
    probabilities = torch.cat(logits, dim=1).softmax(-1)
    mean = torch.zeros_like(hidden)
    for part, share in zip(parts, torch.split(probabilities, _HEAD_ROWS, dim=1), strict=True):
        mean += share @ part.to(hidden.device).float()
    drawn = torch.multinomial(probabilities.cpu(), _DRAWS, replacement=True, generator=generator)
    return table[drawn.T].to(hidden.device).float() - mean


def probe_samples(lengths: Sequence[int], tokens: int = _PROBE_TOKENS) -> list[int]:
    """Return evenly spaced samples with about this many tokens in total, and at least one sample."""
    count = max(1, min(len(lengths), tokens * len(lengths) // max(1, sum(lengths))))
    return [int(index) for index in np.unique(np.linspace(0, len(lengths) - 1, count).round())]


def _copy(inputs: InputStatistics) -> InputStatistics:
    """Copy statistics whose Gram matrix a quantizer may overwrite."""
    return replace(inputs, gram=None if inputs.gram is None else inputs.gram.clone())


def _changes(index: int) -> str:
    return f"decoder-changes-{index}.npz"
