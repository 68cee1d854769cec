"""The tower and the projector in int8: observe, round, measure what each linear costs, leave in floats what costs most.

Four resumable stages over some of the calibration set's tiles, one block in memory at a time: the float tower forward
(every linear is rounded on the way), the way back (`sensitivity`), the choice, and the chosen tower forward, whose
embeddings are compared with the float ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from internvl_edge.base.errors import EdgeError
from internvl_edge.base.jsonable import decode
from internvl_edge.calibration.block_weights import require_finite
from internvl_edge.calibration.compute import Compute, to_numpy, to_torch
from internvl_edge.calibration.dataset import CalibrationSet
from internvl_edge.calibration.statistics import InputStatistics, StatisticsRequest
from internvl_edge.calibration.work import WorkFolder
from internvl_edge.checkpoint.reader import Checkpoint
from internvl_edge.checkpoint.record import ActivationRange
from internvl_edge.recipe.recipe import VisionInt8

from .block import QuantizedBlock
from .integer import IntegerLinear, quantize_linear
from .linear_report import activation_range
from .sensitivity import SensitivityPass, choose_floats
from .smoothing import divide
from .vision_pass import PROJECTOR, TileSample, VisionPass, blocks_of

# Linears of a block and the norm that smoothing folds into, where one comes directly before.
_TOWER = {"attn.qkv": "norm1", "attn.proj": None, "mlp.fc1": "norm2", "mlp.fc2": None}
_PROJECTOR = {"fc1": "norm", "fc2": None}
_SUBSET_TOKENS = 1024
_MOST_TILES = 64
_PROBES = 4
_CHOICE = "vision-choice.json"

# (label, steps) -> a bar; entering it gives the function that moves it.
Bars = Callable[[str, int], AbstractContextManager[Callable[[int], object]]]


@dataclass(frozen=True)
class VisionReport:
    """What became of tower and projector.

    Attributes:
        tiles: of the calibration set that were used.
        cosine: mean over tiles, of the embeddings with those of the float tower, as calibration computes them.
        lowest_cosine: of the worst tile.
        predicted_cosine: what the measured parts of all int8 linears add up to.
        layers: by canonical linear name: "stored" (int8 or float), "part" of the embeddings' relative squared error as
            int8, "calibrator", "strength" of smoothing, "range" that its input is rounded in, relative output "error",
            "inputs" (an `ActivationRange`), "reason" why it keeps floats.
    """

    tiles: int
    cosine: float
    lowest_cosine: float
    predicted_cosine: float
    layers: dict[str, dict[str, Any]]

    @property
    def floats(self) -> list[str]:
        """Linears that kept their floats."""
        return [name for name, facts in self.layers.items() if facts["stored"] == "float"]


class VisionQuantizer:
    """Quantizes the tower of one checkpoint; all state lies in the work folder."""

    def __init__(
        self, work: WorkFolder, checkpoint: Checkpoint, calibration: CalibrationSet, compute: Compute, how: VisionInt8
    ) -> None:
        self._work = work
        self._checkpoint = checkpoint
        self._config = checkpoint.config
        self._compute = compute
        self._how = how
        self._tiles = TileSample.of(calibration, self._config, _MOST_TILES, _PROBES)
        self._blocks = blocks_of(self._config)
        if not len(self._tiles.pixels):
            raise EdgeError("int8 vision needs images, the calibration data holds none; give --data with images")

    def run(self, bars: Bars) -> VisionReport:
        """All stages; continues where it was killed.

        Raises:
            EdgeError: NaN or infinity, named by block, tensor and sample.
        """
        steps = len(self._blocks) * len(self._tiles.pixels)
        with bars("vision, float", steps) as advance:
            forward = VisionPass(self._work, "float", self._checkpoint, self._tiles, self._compute, advance)
            forward.run(StatisticsRequest(tokens=_SUBSET_TOKENS), self._round)
        with bars("vision, sensitivity", len(self._blocks)) as advance:
            back = SensitivityPass(self._work, self._checkpoint, forward, self._compute, advance)
            parts = back.run(self._one_by_one)
        forward.remove_probes()
        self._work.write_json(_CHOICE, self._choose(parts))
        with bars("vision, int8", steps) as advance:
            rounded = VisionPass(
                self._work, "int8", self._checkpoint, self._tiles, self._compute, advance, self.replacements
            )
            rounded.run(None, lambda block, statistics: None)
        rounded.remove_probes()
        return self._report(parts, cosines(forward.embeddings(), rounded.embeddings()))

    def replacements(self, block: str) -> dict[str, Tensor]:
        """What replaces a block's tensors where calibration is to compute what devices will; after the choice."""
        floats = self._floats()
        kept = {n: linear for n, linear in self._load(block).items() if f"{block}.{n}" not in floats}
        return self._tensors(block, kept, self._compute.dtype)

    def block(self, block: str) -> QuantizedBlock:
        """What is stored of a block; after `run`."""
        made = QuantizedBlock()
        for name, linear in self._load(block).items():
            if f"{block}.{name}" in self._floats():
                continue
            made.linears[f"{block}.{name}"] = linear.packed
            for tensor, divided in self._divided_norm(block, name, linear).items():
                made.tensors[f"{block}.{tensor}"] = to_numpy(divided)
        return made

    @property
    def blocks(self) -> list[str]:
        """The blocks that may hold int8 linears."""
        return self._blocks

    # -- stages -----------------------------------------------------------------------------------------------------

    def _round(self, block: str, statistics: Mapping[str, InputStatistics]) -> None:
        arrays: dict[str, NDArray[Any]] = {}
        facts: dict[str, dict[str, Any]] = {}
        for name, norm in _linears(block).items():
            weight = to_torch(self._checkpoint.tensor(f"{block}.{name}.weight"))
            require_finite(weight, f"{block}.{name}.weight")
            vectors = [to_torch(self._checkpoint.tensor(vector)) for vector in self._norm_vectors(block, norm)]
            linear = quantize_linear(
                weight.to(self._compute.device, torch.float32, copy=True),
                statistics[name],
                self._how.calibrator,
                [vector.to(self._compute.device) for vector in vectors] if norm and self._how.smoothing else None,
            )
            arrays |= {f"{name}/{part}": array for part, array in linear.arrays().items()}
            seen = asdict(activation_range(statistics[name], clipped_at=linear.range))
            facts[name] = linear.facts() | {"inputs": seen}
        self._work.write_arrays(f"vision-{block}.npz", arrays)
        self._work.write_json(f"vision-{block}.json", facts)

    def _one_by_one(self, block: str) -> dict[str, dict[str, Tensor]]:
        return {name: self._tensors(block, {name: one}, torch.float32) for name, one in self._load(block).items()}

    def _choose(self, parts: Mapping[str, float]) -> dict[str, str]:
        """Linears that keep floats, with the reason."""
        reasons = {
            name: f"matches {pattern}" for name in parts for pattern in self._how.keep if fnmatchcase(name, pattern)
        }
        free = {name: part for name, part in parts.items() if name not in reasons}
        if self._how.cosine:
            limit = 2 * (1 - self._how.cosine)
            costs = {name: float(np.prod(self._checkpoint.shapes[f"{name}.weight"])) for name in free}
            for name in choose_floats(free, costs, limit):
                reasons[name] = f"as int8 it alone adds {parts[name]:.1e} of the {limit:.1e} that are allowed"
        return reasons

    def _report(self, parts: Mapping[str, float], found: np.ndarray[Any, Any]) -> VisionReport:
        floats = self._floats()
        layers = {}
        for block in self._blocks:
            for name, facts in self._work.need_json(f"vision-{block}.json").items():
                full = f"{block}.{name}"
                stored = {"stored": "float", "reason": floats[full]} if full in floats else {"stored": "int8"}
                inputs = decode(ActivationRange, facts["inputs"])
                layers[full] = stored | {"part": parts[full], **facts, "inputs": inputs}
        error = sum(part for name, part in parts.items() if name not in floats)
        return VisionReport(
            tiles=len(self._tiles.pixels),
            cosine=float(found.mean()),
            lowest_cosine=float(found.min()),
            predicted_cosine=1 - error / 2,
            layers=layers,
        )

    # -- tensors ----------------------------------------------------------------------------------------------------

    def _floats(self) -> dict[str, str]:
        chosen: dict[str, str] = self._work.need_json(_CHOICE)
        return chosen

    def _load(self, block: str) -> dict[str, IntegerLinear]:
        arrays, facts = self._work.need_arrays(f"vision-{block}.npz"), self._work.need_json(f"vision-{block}.json")
        return {
            name: IntegerLinear.stored(
                {key.removeprefix(f"{name}/"): array for key, array in arrays.items() if key.startswith(f"{name}/")},
                facts[name],
            )
            for name in facts
        }

    def _tensors(self, block: str, linears: Mapping[str, IntegerLinear], dtype: torch.dtype) -> dict[str, Tensor]:
        """As `calibration.blocks.linear` and the norms take them."""
        tensors: dict[str, Tensor] = {}
        for name, linear in linears.items():
            packed = linear.packed
            tensors[f"{name}.weight"] = torch.from_numpy(packed.values).to(dtype)
            tensors[f"{name}.weight_scale"] = torch.from_numpy(packed.scale[:, 0])
            tensors[f"{name}.input_scale"] = torch.tensor(packed.input_scale, dtype=torch.float32)
            divided = self._divided_norm(block, name, linear)
            tensors |= {vector: tensor.float() for vector, tensor in divided.items()}
        return {name: tensor.to(self._compute.device) for name, tensor in tensors.items()}

    def _divided_norm(self, block: str, name: str, linear: IntegerLinear) -> dict[str, Tensor]:
        """The norm before a linear after smoothing, in its stored type, by names in the block."""
        if linear.smoothing is None:
            return {}
        scale = torch.from_numpy(linear.smoothing)
        return {
            vector.removeprefix(f"{block}."): divide(to_torch(self._checkpoint.tensor(vector)), scale)
            for vector in self._norm_vectors(block, _linears(block)[name])
        }

    def _norm_vectors(self, block: str, norm: str | None) -> list[str]:
        """Canonical names of a norm's weight and, where it has one, bias."""
        names = [f"{block}.{norm}.{part}" for part in ("weight", "bias")] if norm else []
        return [name for name in names if self._checkpoint.has(name)]


def _linears(block: str) -> dict[str, str | None]:
    return _PROJECTOR if block == PROJECTOR else _TOWER


def cosines(expected: np.ndarray[Any, Any], found: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Cosine of each tile's embeddings [tiles, tokens, hidden], all its tokens as one vector."""
    pairs = ((a.astype(np.float64).ravel(), b.astype(np.float64).ravel()) for a, b in zip(expected, found, strict=True))
    return np.array([a @ b / max(float(np.linalg.norm(a) * np.linalg.norm(b)), 1e-30) for a, b in pairs])
