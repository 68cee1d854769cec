"""Measure how much of the image embeddings' error each linear of the vision tower causes, in one backward pass.

Rounding only linear L changes the output of its block by d, which is computed exactly. The effect of d on the
embeddings is followed to first order through the other blocks (Jacobian J). With random signs v over the embeddings and
g the gradient of v . embeddings,

    E[(g . d)^2] = |J d|^2

(Hutchinson's estimator). A few gradients through one block at a time therefore replace one run of the remaining tower
per linear. Errors of different linears are taken as uncorrelated, so their squares add up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from internvl_edge.base.progress import Advance
from internvl_edge.calibration.block_weights import load_block
from internvl_edge.calibration.blocks import Weights, no_observer
from internvl_edge.calibration.compute import Compute
from internvl_edge.calibration.work import WorkFolder
from internvl_edge.checkpoint.reader import Checkpoint

from .vision_pass import PROJECTOR, VisionPass, blocks_of, run_block

# The number of gradients per probe tile. With four tiles, an error is known to about a quarter.
DIRECTIONS = 8
_STATE = "vision-sensitivity.json"
# Takes a block and returns, by the name of each linear, the tensors that replace the block's own when only that linear
# is rounded.
OneByOne = Callable[[str], Mapping[str, Mapping[str, Tensor]]]


class SensitivityPass:
    """A resumable backward pass over the blocks, for the probe tiles that a finished float `VisionPass` has kept."""

    def __init__(
        self, work: WorkFolder, checkpoint: Checkpoint, forward: VisionPass, compute: Compute, progress: Advance
    ) -> None:
        self._work = work
        self._checkpoint = checkpoint
        self._config = checkpoint.config
        self._forward = forward
        # The differences of nearly equal outputs would be lost in the rounding of bfloat16.
        self._compute = replace(compute, dtype=torch.float32)
        self._progress = progress
        self._blocks = blocks_of(self._config)

    def run(self, one_by_one: OneByOne) -> dict[str, float]:
        """Return each canonical linear's share of the embeddings' relative squared error (mean over probe tiles)."""
        state = self._work.read_json(_STATE) or {"left": len(self._blocks), "parts": {}}
        parts: dict[str, float] = state["parts"]
        self._progress(len(self._blocks) - state["left"])
        if not state["left"]:
            return parts
        embeds = self._forward.probes(len(self._blocks))
        energy = float(np.square(embeds, dtype=np.float64).sum(axis=(1, 2)).mean()) or 1.0
        for index in reversed(range(state["left"])):
            found = self._block(index, one_by_one)
            parts |= {f"{self._blocks[index]}.{name}": value / energy for name, value in found.items()}
            self._work.write_json(_STATE, {"left": index, "parts": parts})
            self._work.remove(self._gradient_name(index + 1))
            self._progress(1)
        self._work.remove(self._gradient_name(0))
        return parts

    def _block(self, index: int, one_by_one: OneByOne) -> dict[str, float]:
        """Return the squared errors of one block's linears, and write the gradient file for the block before it."""
        block = self._blocks[index]
        weights = load_block(self._checkpoint, f"{block}.", self._compute)
        rounded = one_by_one(block)
        behind = self._gradients(index + 1)
        inputs = torch.from_numpy(self._forward.probes(index)).to(self._compute.device)
        totals = dict.fromkeys(rounded, 0.0)
        before = []
        for tile, x in enumerate(inputs):
            y, gradients = self._pull(block, weights, x[None], behind[tile])
            before.append(gradients)
            with torch.no_grad():
                for name, tensors in rounded.items():
                    change = run_block(self._config, block, weights | dict(tensors), x[None], no_observer)[0] - y
                    totals[name] += self._squared(block, change, behind[tile])
        if index:
            self._work.write_arrays(self._gradient_name(index), {"g": torch.stack(before).cpu().numpy()})
        return {name: total / len(inputs) for name, total in totals.items()}

    def _pull(self, block: str, weights: Weights, x: Tensor, behind: Tensor) -> tuple[Tensor, Tensor]:
        """Return the block's output and the gradients [directions, tokens, width] at its input."""
        with torch.enable_grad():
            x = x.clone().requires_grad_()
            y = run_block(self._config, block, weights, x, no_observer)
            pulled = [torch.autograd.grad(y, x, g[None], retain_graph=True)[0][0] for g in behind]
        return y.detach()[0], torch.stack(pulled)

    def _squared(self, block: str, change: Tensor, behind: Tensor) -> float:
        if block == PROJECTOR:  # no block follows, so the error is exact
            return float(change.double().square().sum())
        return float((behind.double() * change.double()).sum((1, 2)).square().mean())

    def _gradients(self, index: int) -> Tensor:
        """Return the gradients [probes, directions, tokens, width] at the output of block `index` - 1.

        At the output of the last block these are random signs.
        """
        if index < len(self._blocks):
            arrays = self._work.need_arrays(self._gradient_name(index))
            return torch.from_numpy(arrays["g"]).to(self._compute.device)
        shape = self._forward.probes(index).shape
        signs = np.random.default_rng(0).integers(0, 2, (shape[0], DIRECTIONS, *shape[1:]), np.int8)
        return torch.from_numpy(signs.astype(np.float32) * 2 - 1).to(self._compute.device)

    def _gradient_name(self, index: int) -> str:
        return f"vision-gradient-{index}.npz"


def choose_floats(parts: Mapping[str, float], costs: Mapping[str, float], limit: float) -> list[str]:
    """Choose the linears that stay float, so that the errors of all others add up to at most `limit`.

    Linears are chosen by error removed per cost, and returned in that order. A linear that proves unnecessary in the
    end is dropped again, the most expensive first.
    """
    left = sum(parts.values())
    taken: list[str] = []
    for name in sorted(parts, key=lambda name: parts[name] / costs[name], reverse=True):
        if left <= limit:
            break
        taken.append(name)
        left -= parts[name]
    for name in sorted(taken, key=lambda name: costs[name], reverse=True):
        if left + parts[name] <= limit:
            taken.remove(name)
            left += parts[name]
    return taken
