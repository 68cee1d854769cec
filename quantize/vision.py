"""Quantize the vision tower and the projector to int8, and keep the linears with the largest error in floats.

The work has four resumable stages over some of the calibration set's tiles, with one block in memory at a time:

1. Run the float tower, and round every linear on the way.
2. Measure the error that each linear causes (`sensitivity`), where the choice depends on it.
3. Choose the linears that stay float.
4. Compare the embeddings of the quantized tower with the float ones. Where the decoder needs those of all tiles
   anyway, they are taken from there, and the quantized tower is not run for this.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from internvl_edge.base.errors import EdgeError
from internvl_edge.base.jsonable import decode
from internvl_edge.base.progress import Progress
from internvl_edge.calibration.block_weights import require_finite
from internvl_edge.calibration.compute import Compute, to_numpy, to_torch
from internvl_edge.calibration.dataset import CalibrationSet
from internvl_edge.calibration.models import PROJECTOR, Tower
from internvl_edge.calibration.statistics import StatisticsRequest
from internvl_edge.calibration.stream import BlockStream, Statistics
from internvl_edge.calibration.work import WorkFolder
from internvl_edge.checkpoint.reader import Checkpoint
from internvl_edge.checkpoint.record import ActivationRange, LinearReport, TowerReport
from internvl_edge.model.components import bits_per_weight
from internvl_edge.recipe.recipe import Recipe, VisionInt8

from .block import QuantizedBlock
from .choose import Option, choose_for_divergence
from .integer import IntegerLinear, quantize_linear
from .linear_report import activation_range
from .sensitivity import tower_parts
from .smoothing import divide

# The linears of a block, and the norm directly before each one, which smoothing folds into (None where there is none).
_TOWER = {"attn.qkv": "norm1", "attn.proj": None, "mlp.fc1": "norm2", "mlp.fc2": None}
_PROJECTOR = {"fc1": "norm", "fc2": None}
_SUBSET_TOKENS = 1024
_MOST_TILES = 64
_PROBES = 4
_CHOICE = "vision-choice.json"


def vision_phases(recipe: Recipe) -> int:
    """Return the number of phases of the progress that a `VisionQuantizer` shows for a recipe."""
    return 1 + recipe.vision_int8.measures + (not recipe.needs_data)


@dataclass(frozen=True)
class VisionReport:
    """The result of quantizing tower and projector.

    Attributes:
        tiles: the number of tiles of the calibration set that were used.
        cosine: cosine of the embeddings with those of the float tower, as calibration computes them; mean over tiles.
        lowest_cosine: the cosine of the worst tile.
        predicted_cosine: the cosine that follows from the sum of the measured errors of all int8 linears; None where
            they were not measured.
        layers: by canonical linear name: "stored" (int8 or float), "part" of the embeddings' relative squared error as
            int8 (None where it was not measured), "calibrator", "strength" of smoothing, "range" (its input's largest
            unclipped |x|), relative output "error", "inputs" (an `ActivationRange`), "reason" why it stays float.
    """

    tiles: int
    cosine: float
    lowest_cosine: float
    predicted_cosine: float | None
    layers: dict[str, dict[str, Any]]

    @property
    def floats(self) -> list[str]:
        """The linears that stay float."""
        return [name for name, facts in self.layers.items() if facts["stored"] == "float"]

    @property
    def compared(self) -> TowerReport:
        """The comparison with the float tower, for the record."""
        return TowerReport(self.tiles, self.cosine, self.lowest_cosine, self.predicted_cosine)

    def linears(self, made: Checkpoint) -> list[LinearReport]:
        """Return what the record says of each linear. `made` is the new checkpoint."""
        dtype, float_bits = made.float_type()
        linears = []
        for name, layer in self.layers.items():
            scheme, inputs = made.schemes.get(name), made.shapes[f"{name}.weight"][-1]
            error: float = layer["error"]
            linears.append(
                LinearReport(
                    name=name,
                    dtype=dtype,
                    scheme=scheme,
                    bits_per_weight=round(bits_per_weight(scheme, inputs, float_bits), 3) if scheme else float_bits,
                    error=error,
                    sqnr_db=-20 * math.log10(error) if error else None,
                    part=layer["part"],
                    reason=layer.get("reason", ""),
                    inputs=layer["inputs"],
                )
            )
        return linears


class VisionQuantizer:
    """Quantizes the vision tower of one checkpoint. All state is in the work folder."""

    def __init__(
        self, work: WorkFolder, checkpoint: Checkpoint, calibration: CalibrationSet, compute: Compute, how: VisionInt8
    ) -> None:
        self._work = work
        self._checkpoint = checkpoint
        self._calibration = calibration
        self._compute = compute
        self._how = how
        tiles, owners = calibration.pixels(checkpoint.config.vision.image_size), calibration.tile_owners
        self._chosen = evenly(len(owners), _MOST_TILES)
        if not self._chosen:
            raise EdgeError("int8 vision needs images, the calibration data holds none; give --data with images")
        self._tower = Tower(checkpoint, compute, tiles[self._chosen], [owners[index] for index in self._chosen])
        self._tiles = len(self._chosen)
        probes = evenly(self._tiles, _PROBES) if how.measures else ()
        self._forward = BlockStream(work, "tower-float", self._tower, probes)
        self._parts: dict[str, float] = {}

    def run(self, progress: Progress) -> None:
        """Round all linears and choose those that stay float. A killed run continues.

        Raises:
            EdgeError: NaN or infinity; the message names block, tensor and sample.
        """
        wanted = StatisticsRequest(tokens=_SUBSET_TOKENS)
        self._forward.run(progress, "measuring the vision tower", self._round, wanted, replaces=False)
        if self._how.measures:
            title = "measuring the sensitivity of the vision tower"
            self._parts = tower_parts(self._forward, self._one_by_one, progress, title)
        self._work.write_json(_CHOICE, self._choose(self._parts))

    def report(self, progress: Progress, embedded: bool) -> VisionReport:
        """Compare the embeddings of the quantized tower with those of the float one. Requires `run`.

        Args:
            progress: for the phase.
            embedded: the embeddings of the calibration set are those of the quantized tower; otherwise, this runs it.
        """
        names = self._tower.names
        if not embedded:
            stream = BlockStream(self._work, "tower-int8", self._tower)
            stream.run(progress, "checking the int8 vision tower", lambda index, _: self.replacements(names[index]))
            rounded = [stream.inputs(len(names), range(tile, tile + 1)) for tile in range(self._tiles)]
        else:
            rounded = [torch.from_numpy(self._calibration.tile_embeddings(tile)) for tile in self._chosen]
        expected = (self._forward.inputs(len(names), range(tile, tile + 1)) for tile in range(self._tiles))
        return self._report([cosine(*pair) for pair in zip(expected, rounded, strict=True)])

    def replacements(self, block: str) -> dict[str, Tensor]:
        """Return the tensors that replace a block's own so that calibration computes as devices do. Requires `run`."""
        return self.block(block).replacements(f"{block}.", self._compute)

    def block(self, block: str) -> QuantizedBlock:
        """Return the tensors of a block that are stored. Requires `run`."""
        floats: dict[str, str] = self._work.need_json(_CHOICE)
        return self._made(block, {n: one for n, one in self._load(block).items() if f"{block}.{n}" not in floats})

    @property
    def blocks(self) -> list[str]:
        """The blocks that can hold int8 linears."""
        return self._tower.names

    # -- stages -----------------------------------------------------------------------------------------------------

    def _round(self, index: int, statistics: Statistics) -> None:
        block = self._tower.names[index]
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

    def _one_by_one(self, index: int) -> dict[str, dict[str, Tensor]]:
        block, exact = self._tower.names[index], replace(self._compute, dtype=torch.float32)
        linears = self._load(block).items()
        return {name: self._made(block, {name: one}).replacements(f"{block}.", exact) for name, one in linears}

    def _choose(self, parts: Mapping[str, float]) -> dict[str, str]:
        """Return the linears that stay float, each with its reason."""
        every = [f"{block}.{name}" for block in self._tower.names for name in _linears(block)]
        reasons = {
            name: f"matches {pattern}" for name in every for pattern in self._how.keep if fnmatchcase(name, pattern)
        }
        free = {name: part for name, part in parts.items() if name not in reasons}
        if self._how.measures:
            limit = 2 * (1 - self._how.cosine)
            weights = {name: float(np.prod(self._checkpoint.shapes[f"{name}.weight"])) for name in free}
            options = {
                name: [Option("int8", weights[name], part), Option("float", 2 * weights[name], 0.0)]
                for name, part in free.items()
            }
            for name, option in choose_for_divergence(options, limit).items():
                if option.precision == "float":
                    reasons[name] = f"as int8 it alone adds {parts[name]:.1e} of the {limit:.1e} that are allowed"
        return reasons

    def _report(self, found: Sequence[float]) -> VisionReport:
        floats: dict[str, str] = self._work.need_json(_CHOICE)
        layers = {}
        for block in self._tower.names:
            for name, facts in self._work.need_json(f"vision-{block}.json").items():
                full = f"{block}.{name}"
                stored = {"stored": "float", "reason": floats[full]} if full in floats else {"stored": "int8"}
                inputs = decode(ActivationRange, facts["inputs"])
                layers[full] = stored | {"part": self._parts.get(full), **facts, "inputs": inputs}
        error = sum(part for name, part in self._parts.items() if name not in floats)
        return VisionReport(
            tiles=self._tiles,
            cosine=float(np.mean(found)),
            lowest_cosine=min(found),
            predicted_cosine=1 - error / 2 if self._parts else None,
            layers=layers,
        )

    # -- tensors ----------------------------------------------------------------------------------------------------

    def _load(self, block: str) -> dict[str, IntegerLinear]:
        arrays, facts = self._work.need_arrays(f"vision-{block}.npz"), self._work.need_json(f"vision-{block}.json")
        return {
            name: IntegerLinear.stored(
                {key.removeprefix(f"{name}/"): array for key, array in arrays.items() if key.startswith(f"{name}/")},
                facts[name],
            )
            for name in facts
        }

    def _made(self, block: str, linears: Mapping[str, IntegerLinear]) -> QuantizedBlock:
        """Return some linears of a block in int8, with the norms before them divided, as they are stored."""
        made = QuantizedBlock()
        for name, linear in linears.items():
            made.linears[f"{block}.{name}"] = linear.packed
            if linear.smoothing is not None:
                scale = torch.from_numpy(linear.smoothing)
                for vector in self._norm_vectors(block, _linears(block)[name]):
                    made.tensors[vector] = to_numpy(divide(to_torch(self._checkpoint.tensor(vector)), scale))
        return made

    def _norm_vectors(self, block: str, norm: str | None) -> list[str]:
        """Return the canonical names of a norm's weight and of its bias where it has one."""
        names = [f"{block}.{norm}.{part}" for part in ("weight", "bias")] if norm else []
        return [name for name in names if self._checkpoint.has(name)]


def _linears(block: str) -> dict[str, str | None]:
    return _PROJECTOR if block == PROJECTOR else _TOWER


def evenly(count: int, most: int) -> list[int]:
    """Return at most `most` evenly spaced indices below `count`."""
    kept = min(count, most)
    return [index * count // kept for index in range(kept)]


def cosine(expected: Tensor, found: Tensor) -> float:
    """Return the cosine of the embeddings of one tile, with all its tokens as one vector."""
    a, b = (tensor.double().cpu().numpy().ravel() for tensor in (expected, found))
    if not (a.any() or b.any()):
        return 1.0
    return float(a @ b / max(float(np.linalg.norm(a) * np.linalg.norm(b)), 1e-30))
