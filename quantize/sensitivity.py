"""How much of the image embeddings' error each linear of the tower causes: one pass from the projector back.

Rounding linear L alone changes the output of its block by d, computed exactly; what becomes of d on the way through the
other blocks is followed to first order. With random signs v over the embeddings and g the gradient of v . embeddings,

    E[(g . d)^2] = |J d|^2

(Hutchinson's estimator), so a few gradients through one block at a time do for all linears what running the rest of the
tower once per linear would do. Errors of different linears are taken as uncorrelated: their squares add up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from internvl_edge.calibration.block_weights import load_block
from internvl_edge.calibration.blocks import Weights, no_observer
from internvl_edge.calibration.compute import Compute
from internvl_edge.calibration.work import WorkFolder
from internvl_edge.checkpoint.reader import Checkpoint

from .vision_pass import PROJECTOR, Progress, VisionPass, blocks_of, run_block

# Gradients per probe tile: with four tiles, an error is known to about a quarter.
DIRECTIONS = 8
_STATE = "vision-sensitivity.json"
# (block) -> tensors that replace the block's own where only one of its linears is rounded, by the linear's name.
OneByOne = Callable[[str], Mapping[str, Mapping[str, Tensor]]]


class SensitivityPass:
    """Walks the blocks backwards over the probes that a finished float `VisionPass` has kept; resumable."""

    def __init__(
        self, work: WorkFolder, checkpoint: Checkpoint, forward: VisionPass, compute: Compute, progress: Progress
    ) -> None:
        self._work = work
        self._checkpoint = checkpoint
        self._config = checkpoint.config
        self._forward = forward
        # Differences of nearly equal outputs: bfloat16 would drown them.
        self._compute = replace(compute, dtype=torch.float32)
        self._progress = progress
        self._blocks = blocks_of(self._config)

    def run(self, one_by_one: OneByOne) -> dict[str, float]:
        """Canonical linear name -> its part of the embeddings' relative squared error, mean over the probes."""
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
        """Squared errors of one block's linears, and the gradient files of the block before it."""
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
        """The block's output, and the gradients [directions, tokens, width] one block further to the front."""
        with torch.enable_grad():
            x = x.clone().requires_grad_()
            y = run_block(self._config, block, weights, x, no_observer)
            pulled = [torch.autograd.grad(y, x, g[None], retain_graph=True)[0][0] for g in behind]
        return y.detach()[0], torch.stack(pulled)

    def _squared(self, block: str, change: Tensor, behind: Tensor) -> float:
        if block == PROJECTOR:  # nothing follows: no estimate needed
            return float(change.double().square().sum())
        return float((behind.double() * change.double()).sum((1, 2)).square().mean())

    def _gradients(self, index: int) -> Tensor:
        """[probes, directions, tokens, width] behind block `index` - 1; random signs behind the last."""
        if index < len(self._blocks):
            arrays = self._work.need_arrays(self._gradient_name(index))
            return torch.from_numpy(arrays["g"]).to(self._compute.device)
        shape = self._forward.probes(index).shape
        signs = np.random.default_rng(0).integers(0, 2, (shape[0], DIRECTIONS, *shape[1:]), np.int8)
        return torch.from_numpy(signs.astype(np.float32) * 2 - 1).to(self._compute.device)

    def _gradient_name(self, index: int) -> str:
        return f"vision-gradient-{index}.npz"


def choose_floats(parts: Mapping[str, float], costs: Mapping[str, float], limit: float) -> list[str]:
    """Linears to leave in floats so that the others' parts add up to at most `limit`, in the order they were taken.

    Taken by error removed per cost; one that turns out not to be needed in the end goes back, the dearest first.
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
