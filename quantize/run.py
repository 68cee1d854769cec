"""`quantize`: checkpoint -> quantised checkpoint, one layer at a time, resumable, whole or not at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from internvl_edge.calibration.compute import Compute, choose_compute
from internvl_edge.calibration.dataset import CalibrationSet, DataOptions, prepare
from internvl_edge.calibration.decoder_pass import DecoderPass, Statistics
from internvl_edge.calibration.run import (
    embedded_set,
    partial_path,
    progress_bar,
    require_same_checkpoint,
    run_description,
    say,
)
from internvl_edge.calibration.tower import Replacements, no_replacements
from internvl_edge.calibration.work import WorkFolder, checkpoint_identity, readable_disk_errors
from internvl_edge.checkpoint import Checkpoint
from internvl_edge.errors import EdgeError
from internvl_edge.recipe import GROUP_SIZES, Recipe
from internvl_edge.tensor_files import open_tensor_files

from .files import OutTensor, write_file, write_shards
from .layer import BlockQuantiser, QuantisedBlock
from .output import OutputLayout
from .vision import VisionQuantiser, VisionReport

_OUT = "out"
_ERRORS = "errors.json"


@dataclass(frozen=True)
class QuantisationReport:
    """What `quantize_checkpoint` did.

    Attributes:
        folder: the new checkpoint.
        recipe: what was asked for.
        bytes: size of its weight files.
        errors: relative output error of each linear on calibration tokens; empty without data.
        vision: what became of the tower; None where it keeps its floats.
        samples, tokens, image_tokens: of the calibration set; 0 without data.
        broken: items that were skipped.
    """

    folder: Path
    recipe: Recipe
    bytes: int
    errors: dict[str, float]
    samples: int = 0
    tokens: int = 0
    image_tokens: int = 0
    broken: tuple[str, ...] = ()
    vision: VisionReport | None = None


def quantize_checkpoint(
    checkpoint: str | Path,
    out: str | Path,
    recipe: Recipe | None = None,
    *,
    data: DataOptions | None = None,
    stats: str | Path | None = None,
    compute: Compute | None = None,
    restart: bool = False,
    progress: bool = False,
) -> QuantisationReport:
    """Quantise a checkpoint folder into another one.

    The state of an unfinished run lies in `OUT.partial`; the same call continues it, with the same result.

    Args:
        checkpoint: local folder with float weights.
        out: the folder to make.
        recipe: how; default w4a16-awq in groups of 128.
        data: calibration data for recipes that need it; default: the built-in set.
        stats: instead of data, what `calibrate` made with this checkpoint; not for int8 vision, which needs images.
        compute: device and type of the calibration; default: the best of this machine.
        restart: discard an unfinished run.
        progress: bars with the time left, on standard error.

    Raises:
        EdgeError: checkpoint, data or recipe do not fit, `out` exists, or values are not finite; one line each.
    """
    source, target = Checkpoint(Path(checkpoint)), Path(out)
    recipe, compute = recipe or Recipe(), compute or choose_compute()
    if target.exists():
        raise EdgeError(f"{target} exists; choose another --output or remove it")
    if data is not None and stats is not None:
        raise EdgeError("both data and statistics were given; statistics already hold their data")
    if stats is not None and recipe.vision == "int8":
        raise EdgeError(
            "int8 vision needs the images, which statistics no longer hold; give data instead of statistics"
        )
    check_recipe(source, recipe)
    with readable_disk_errors(target):
        run = _Run(source, target, recipe, compute, progress)
        return run.finish(run.quantise(data, None if stats is None else Path(stats), restart))


def check_recipe(checkpoint: Checkpoint, recipe: Recipe) -> None:
    """Refuse what cannot be quantised as asked.

    Raises:
        EdgeError: quantised already, a group size that does not divide a layer's inputs (named, with the sizes that
            fit), outputs that AutoAWQ cannot pack, or a head that is also the token table.
    """
    if checkpoint.quantization is not None:
        raise EdgeError(f"{checkpoint.folder} is quantised already; give the original checkpoint")
    decoder = checkpoint.config.decoder
    shapes: dict[str, tuple[int, ...]] = {
        name.removesuffix(".weight"): shape
        for name, shape in checkpoint.shapes.items()
        if name.startswith("decoder.layers.") and len(shape) == 2 and recipe.decoder != "fp"
    }
    if recipe.lm_head != "fp":
        if decoder.tie_word_embeddings:
            raise EdgeError("lm_head is also the token table of this model and cannot be quantised; use --lm-head fp")
        shapes["decoder.lm_head"] = checkpoint.shapes["decoder.lm_head.weight"]
    grouped = {name: shape for name, shape in shapes.items() if recipe.bits == 4 or name != "decoder.lm_head"}
    for name, shape in grouped.items() if recipe.bits == 4 else ():
        outputs, inputs = shape[0], shape[1]
        if inputs % recipe.group_size:
            fitting = [size for size in GROUP_SIZES if all(shape[1] % size == 0 for shape in grouped.values())]
            choice = f"sizes that fit all layers: {', '.join(map(str, fitting))}" if fitting else "no size fits all"
            raise EdgeError(f"{name} has {inputs} inputs, which groups of {recipe.group_size} do not divide; {choice}")
        if recipe.is_autoawq and outputs % 8:
            raise EdgeError(f"{name} has {outputs} outputs, AutoAWQ packs multiples of 8; use --symmetric")


class _Run:
    """One quantisation in progress."""

    def __init__(self, checkpoint: Checkpoint, target: Path, recipe: Recipe, compute: Compute, progress: bool) -> None:
        self._checkpoint = checkpoint
        self._target = target
        self._recipe = recipe
        self._compute = compute
        self._progress = progress
        self._layout = OutputLayout(checkpoint, recipe)
        scale_dtype = torch.float16 if recipe.is_autoawq else _TORCH[self._layout.float_dtype.name]
        self._vision: VisionReport | None = None
        self._quantiser = BlockQuantiser(checkpoint, recipe, compute, scale_dtype)

    def quantise(self, data: DataOptions | None, stats: Path | None, restart: bool) -> CalibrationSet | None:
        """All blocks into the work folder; returns the calibration set where one was used."""
        identity = checkpoint_identity(self._checkpoint.folder)
        needed = self._recipe.needs_data or self._recipe.vision == "int8"
        options = (data or DataOptions()) if needed and stats is None else None
        run = run_description(identity, options, self._compute if needed else None)
        run |= {"recipe": self._recipe.to_dict(), "stats": str(stats.resolve()) if needed and stats else None}
        self._work = WorkFolder(partial_path(self._target), run, restart)
        if not needed:
            self._without_data()
            return None
        if stats is not None:
            calibration = CalibrationSet.open(stats)
            require_same_checkpoint(calibration, identity)
        else:
            assert options is not None
            calibration = prepare(self._work, self._checkpoint, identity, options, say)
            replaced = self._quantise_vision(calibration) if self._recipe.vision == "int8" else no_replacements
            if self._recipe.needs_data:  # image tokens as the device will compute them
                embedded_set(self._work, self._checkpoint, identity, options, self._compute, self._progress, replaced)
        if self._recipe.needs_data:
            self._with_data(calibration)
        else:
            self._without_data()
        return calibration

    def finish(self, calibration: CalibrationSet | None) -> QuantisationReport:
        """Put the new checkpoint together and into place."""
        blocks = sorted(self._work.path.glob("block-*"))
        quantised = [
            OutTensor.stored(name, tensor) for block in blocks for name, tensor in open_tensor_files(block).items()
        ]
        unchanged = self._layout.unchanged(tensor.name for tensor in quantised)
        tensors = sorted([*quantised, *unchanged], key=lambda tensor: tensor.name)
        total = sum(tensor.nbytes for tensor in tensors)
        errors = {name: error for block in blocks for name, error in _read_errors(block).items()}
        folder = self._work.path / _OUT
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        _require_space(folder, total)
        self._layout.copy_side_files(folder)
        config = json.dumps(self._layout.config(tensor.name for tensor in quantised), indent=2, ensure_ascii=False)
        (folder / "config.json").write_text(config + "\n", encoding="utf-8")
        with progress_bar("write", total, self._progress) as advance:
            write_shards(folder, tensors, progress=advance)
        image_tokens = int(calibration.is_image.sum()) if calibration else 0
        folder.rename(self._target)
        shutil.rmtree(self._work.path)
        report = QuantisationReport(self._target, self._recipe, total, errors, vision=self._vision)
        if calibration is None:
            return report
        return replace(
            report,
            samples=len(calibration.names),
            tokens=calibration.total,
            image_tokens=image_tokens,
            broken=tuple(calibration.broken),
        )

    def _quantise_vision(self, calibration: CalibrationSet) -> Replacements:
        how = self._recipe.vision_int8
        quantiser = VisionQuantiser(self._work, self._checkpoint, calibration, self._compute, how)
        self._vision = quantiser.run(lambda label, steps: progress_bar(label, steps, self._progress))
        for block in quantiser.blocks:
            self._once(f"block-{block}", partial(quantiser.block, block))
        return quantiser.replacements

    def _without_data(self) -> None:
        layers = self._checkpoint.config.decoder.num_hidden_layers if self._recipe.decoder != "fp" else 0
        with progress_bar("quantize", layers, self._progress) as advance:
            for layer in range(layers):
                self._once(f"block-{layer:03}", partial(self._quantiser.layer, layer, None))
                advance(1)
        if self._recipe.lm_head != "fp":
            self._once("block-head", lambda: self._quantiser.head(None))

    def _with_data(self, calibration: CalibrationSet) -> None:
        layers = self._checkpoint.config.decoder.num_hidden_layers
        steps = DecoderPass.steps(calibration, layers)
        with progress_bar("quantize", steps, self._progress) as advance:
            decoder = DecoderPass(self._work, self._checkpoint, calibration, self._compute, advance)
            decoder.run(self._quantiser.wanted, self._handle)
            if self._recipe.lm_head != "fp":
                inputs = decoder.observe_head(self._quantiser.wanted) if self._recipe.lm_head == "int4" else None
                self._once("block-head", lambda: self._quantiser.head(inputs))

    def _handle(self, layer: int, statistics: Statistics) -> Mapping[str, Tensor]:
        block = self._quantiser.layer(layer, statistics)
        self._store(f"block-{layer:03}", block)
        return block.replacements(f"decoder.layers.{layer}.", self._compute)

    def _once(self, name: str, make: Callable[[], QuantisedBlock]) -> None:
        if not (self._work.path / name / "model.safetensors").is_file():
            self._store(name, make())

    def _store(self, name: str, block: QuantisedBlock) -> None:
        folder = self._work.path / name
        folder.mkdir(exist_ok=True)
        self._work.write_json(f"{name}/{_ERRORS}", block.errors)
        write_file(folder / "model.safetensors", self._layout.tensors(block))


_TORCH = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def _read_errors(block: Path) -> dict[str, float]:
    values: dict[str, Any] = json.loads((block / _ERRORS).read_text(encoding="utf-8"))
    return {name: float(error) for name, error in values.items()}


def _require_space(folder: Path, total: int) -> None:
    free = shutil.disk_usage(folder).free
    if total > free:
        raise EdgeError(
            f"the quantised checkpoint needs {total / 1e9:.2f} GB, {folder.parent} has {free / 1e9:.2f} GB free; make "
            "room and repeat the command, which continues here"
        )
