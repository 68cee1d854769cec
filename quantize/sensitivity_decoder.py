"""Measure the KL divergence (in nats) that rounding causes in the predictions, per decoder linear and precision.

Rounding some linears changes the output of their block by d, which is computed exactly. The effect of d behind the
block is followed to second order. The divergence of the next token is 1/2 (J d)^T F (J d), where J is the Jacobian of
the rest of the decoder and F the Fisher information of its logits. With tokens y drawn from the model's own predictions
and g the gradient of sum log p(y),

    E[(g . d)^2] = (J d)^T F (J d)

A few draws, carried back through one block at a time, therefore replace one run of the rest of the decoder per linear
and precision. Divergences of different linears are taken to add up.

The work has two resumable stages. The forward stage runs the float decoder, makes the candidates, and stores d for a
few samples. The backward stage carries the gradients back. Those samples are not used to make the candidates: on data
that error compensation was fitted to, candidates would look better than they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from internvl_edge.base.progress import Progress
from internvl_edge.calibration.block_weights import load_block, load_tensor
from internvl_edge.calibration.blocks import decoder_block, no_observer, rms_norm
from internvl_edge.calibration.compute import Compute, to_torch
from internvl_edge.calibration.dataset import CalibrationSet
from internvl_edge.calibration.decoder_pass import DecoderPass, Statistics
from internvl_edge.calibration.statistics import InputStatistics, StatisticsRequest
from internvl_edge.calibration.work import WorkFolder
from internvl_edge.checkpoint.reader import Checkpoint
from internvl_edge.recipe.recipe import Precision

from .folding import SCALE_GROUPS
from .layer import BlockQuantizer

# The number of tokens in the samples of the backward stage, and the number of draws for each sample.
_PROBE_TOKENS = 2048
_DRAWS = 16
_LABEL = "float-"
_STATE = "decoder-sensitivity.json"
# The numbers of lm_head rows and of tokens that are multiplied at a time.
_HEAD_ROWS = 16384
_HEAD_TOKENS = 512

# Name of a unit's first linear -> {precision as recipes write it: divergence in nats}.
Divergences = dict[str, dict[str, float]]


class DecoderSensitivity:
    """Measures the sensitivity of one checkpoint's decoder. All state is in the work folder.

    Args:
        work, checkpoint, calibration, compute: those of the run.
        quantizers: one per candidate precision that rounds something. Each quantizes all linears alike.
    """

    _pass: DecoderPass

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
        self._decoder = checkpoint.config.decoder
        self._calibration = calibration
        self._compute = compute
        # The differences of nearly equal outputs would be lost in the rounding of bfloat16.
        self._exact = replace(compute, dtype=torch.float32)
        self._quantizers = quantizers
        self._groups = SCALE_GROUPS[self._decoder.architecture]
        self._samples = probe_samples(calibration.lengths)

    def run(self, progress: Progress) -> Divergences:
        """Run both stages. A killed run continues.

        Raises:
            EdgeError: NaN or infinity; the message names layer, tensor and sample.
        """
        layers = self._decoder.num_hidden_layers
        steps = DecoderPass.steps(self._calibration, layers)
        with progress.phase("trying precisions in the decoder", steps, "layers", layers) as advance:
            self._pass = DecoderPass(
                self._work, self._checkpoint, self._calibration, self._compute, advance, _LABEL, self._held_out()
            )
            self._pass.run(self._wanted(), self._candidates)
        with progress.phase("measuring the sensitivity of the decoder", layers, "layers") as advance:
            state = self._work.read_json(_STATE) or {"left": layers, "divergences": {}}
            found: Divergences = state["divergences"]
            advance(layers - state["left"])
            for layer in reversed(range(state["left"])):
                found |= self._back(layer)
                self._work.write_json(_STATE, {"left": layer, "divergences": found})
                for name in (_gradient(layer + 1), _changes(layer)):
                    self._work.remove(name)
                advance(1)
        self._work.remove(_gradient(0))
        self._pass.forget()
        return found

    def _held_out(self) -> Sequence[int]:
        """Return the samples of the backward stage, or none where they are more than half of all samples."""
        return self._samples if len(self._samples) <= len(self._calibration.lengths) // 2 else ()

    # -- forward ----------------------------------------------------------------------------------------------------

    def _wanted(self) -> StatisticsRequest:
        each = [quantizer.wanted for quantizer in self._quantizers.values()]
        return StatisticsRequest(gram=any(wanted.gram for wanted in each), tokens=max(wanted.tokens for wanted in each))

    def _candidates(self, layer: int, statistics: Statistics) -> None:
        """Round one layer with every candidate, and store the change of its output, for one unit at a time."""
        prefix = f"decoder.layers.{layer}."
        replaced: list[dict[str, Tensor]] = []
        for quantizer in self._quantizers.values():
            block = quantizer.layer(layer, {name: _copy(inputs) for name, inputs in statistics.items()})
            replaced += [quantizer.only_unit(prefix, group, block) for group in self._groups]
        weights = load_block(self._checkpoint, prefix, self._exact)
        arrays = {}
        for sample in self._samples:
            x, rotary = self._pass.inputs(layer, sample), self._pass.rotary(sample)
            lengths = [len(x)]
            y = decoder_block(weights, x, lengths, rotary, self._decoder, no_observer)
            changed = (decoder_block(weights | one, x, lengths, rotary, self._decoder, no_observer) for one in replaced)
            stored = torch.stack([(other - y).to(torch.bfloat16) for other in changed])
            arrays[f"x{sample}"] = x.cpu().numpy()
            arrays[f"d{sample}"] = stored.cpu().view(torch.int16).numpy()
        self._work.write_arrays(_changes(layer), arrays)

    # -- back -------------------------------------------------------------------------------------------------------

    def _back(self, layer: int) -> Divergences:
        """Return the divergences of one layer's candidates, and write the gradients at its input."""
        prefix = f"decoder.layers.{layer}."
        weights = load_block(self._checkpoint, prefix, self._exact)
        arrays = self._work.need_arrays(_changes(layer))
        behind = self._gradients(layer + 1)
        total, power = torch.zeros(2, len(self._quantizers) * len(self._groups), dtype=torch.float64)
        before = {}
        for sample in self._samples:
            x = torch.from_numpy(arrays[f"x{sample}"]).to(self._exact.device)
            gradients = behind[sample].to(self._exact.device)
            changes = torch.from_numpy(arrays[f"d{sample}"]).view(torch.bfloat16).to(self._exact.device).float()
            total += ((gradients.flatten(1) @ changes.flatten(1).T).double().square().mean(0)).cpu()
            power += changes.flatten(1).double().square().sum(1).cpu()
            if layer:
                before[str(sample)] = self._pull(weights, x, gradients, sample).cpu().numpy()
        if layer:
            self._work.write_arrays(_gradient(layer), before)
        shape = len(self._quantizers), len(self._groups)
        nats = self._pooled(total.reshape(shape), power.reshape(shape)) / 2 / self._positions()
        return {
            prefix + group.consumers[0]: {
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

    def _pull(self, weights: Mapping[str, Tensor], x: Tensor, gradients: Tensor, sample: int) -> Tensor:
        """Return the gradients [draws, tokens, width] at the input of the block."""
        with torch.enable_grad():
            x = x.clone().requires_grad_()
            y = decoder_block(weights, x, [len(x)], self._pass.rotary(sample), self._decoder, no_observer)
            pulled = [torch.autograd.grad(y, x, gradient, retain_graph=True)[0] for gradient in gradients]
        return torch.stack(pulled)

    def _gradients(self, layer: int) -> dict[int, Tensor]:
        """Return, by sample, the gradients [draws, tokens, width] at the input of `layer`.

        Behind the last layer they come from the predictions themselves.
        """
        if layer < self._decoder.num_hidden_layers:
            arrays = self._work.need_arrays(_gradient(layer))
            return {sample: torch.from_numpy(arrays[str(sample)]) for sample in self._samples}
        return {sample: self._scores(sample) for sample in self._samples}

    @torch.no_grad()
    def _scores(self, sample: int) -> Tensor:
        """Return gradients of sum log p(y) at the decoder's output.

        y is drawn at every position that is not an image token.
        """
        x = self._pass.inputs(self._decoder.num_hidden_layers, sample)
        weight = load_tensor(self._checkpoint, "decoder.norm.weight", self._exact)
        hidden = rms_norm(x, weight, self._decoder.rms_norm_eps)
        table = to_torch(self._checkpoint.tensor("decoder.lm_head.weight"))
        generator = torch.Generator().manual_seed(sample)
        parts = [self._draw(table, part, generator) for part in torch.split(hidden, _HEAD_TOKENS)]
        scores = torch.cat(parts, dim=1)
        scores[:, torch.from_numpy(self._is_image(sample)).to(scores.device)] = 0
        with torch.enable_grad():
            x = x.clone().requires_grad_()
            normed = rms_norm(x, weight, self._decoder.rms_norm_eps)
            pulled = [torch.autograd.grad(normed, x, score, retain_graph=True)[0] for score in scores]
        return torch.stack(pulled)

    def _draw(self, table: Tensor, hidden: Tensor, generator: torch.Generator) -> Tensor:
        """Return W[y] - E W for y drawn from softmax(W h), [draws, tokens, width]."""
        parts = torch.split(table, _HEAD_ROWS)
        logits = [hidden @ part.to(hidden.device).float().T for part in parts]
        probabilities = torch.cat(logits, dim=1).softmax(-1)
        mean = torch.zeros_like(hidden)
        for part, share in zip(parts, torch.split(probabilities, _HEAD_ROWS, dim=1), strict=True):
            mean += share @ part.to(hidden.device).float()
        drawn = torch.multinomial(probabilities.cpu(), _DRAWS, replacement=True, generator=generator)
        return table[drawn.T].to(hidden.device).float() - mean

    def _is_image(self, sample: int) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
        start = sum(self._calibration.lengths[:sample])
        return self._calibration.is_image[start : start + self._calibration.lengths[sample]]

    def _positions(self) -> int:
        return max(1, sum(int((~self._is_image(sample)).sum()) for sample in self._samples))


def probe_samples(lengths: Sequence[int], tokens: int = _PROBE_TOKENS) -> list[int]:
    """Return evenly spaced samples with about this many tokens in total, and at least one sample."""
    count = max(1, min(len(lengths), tokens * len(lengths) // max(1, sum(lengths))))
    return [int(index) for index in np.unique(np.linspace(0, len(lengths) - 1, count).round())]


def _copy(inputs: InputStatistics) -> InputStatistics:
    """Copy statistics whose Gram matrix a quantizer may overwrite."""
    return replace(inputs, gram=None if inputs.gram is None else inputs.gram.clone())


def _changes(layer: int) -> str:
    return f"decoder-changes-{layer}.npz"


def _gradient(layer: int) -> str:
    return f"decoder-gradient-{layer}.npz"
