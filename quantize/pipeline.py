"""`quantize`: turn a checkpoint into a quantized one, one layer at a time.

A killed run continues where it stopped. The output folder appears complete or not at all.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

from torch import Tensor

from internvl_edge.base.errors import EdgeError
from internvl_edge.base.field_types import require_type
from internvl_edge.base.files import readable_disk_errors, replace_text, require_space
from internvl_edge.base.folders import put_in_place, writing
from internvl_edge.base.hub import hub_source
from internvl_edge.base.jsonable import decode, dumps, encode
from internvl_edge.base.progress import Progress, as_progress
from internvl_edge.base.replaceable import require_replaceable
from internvl_edge.base.run_record import run_record
from internvl_edge.calibration.compute import Compute, choose_compute
from internvl_edge.calibration.dataset import CalibrationSet, DataOptions, adopt, describe_set, prepare
from internvl_edge.calibration.models import Decoder
from internvl_edge.calibration.pipeline import (
    embed,
    no_replacements,
    partial_path,
    require_same_checkpoint,
    run_description,
)
from internvl_edge.calibration.stream import BlockStream, Statistics
from internvl_edge.calibration.work import CONTINUES, OUT, WorkFolder, checkpoint_identity, discard
from internvl_edge.checkpoint.license import CARD, read_license
from internvl_edge.checkpoint.reader import Checkpoint
from internvl_edge.checkpoint.record import RECORD, LinearReport, QuantizationRecord, quantized_files, weight_files
from internvl_edge.checkpoint.tensor_files import OutTensor, open_tensor_files, write_file, write_shards
from internvl_edge.publishing.card import checkpoint_card
from internvl_edge.recipe.recipe import Recipe

from .automatic import DIVERGENCE_PHASES, average_bits, measure_divergences, plan_by_divergence, predicted_divergence
from .block import QuantizedBlock
from .layer import BlockQuantizer
from .learned import Learned, RoundingLearner, mean
from .output import OutputLayout
from .plan import Plan, kept_vision, plan_decoder
from .sensitivity import Divergences
from .vision import VisionQuantizer, VisionReport, vision_phases

_REPORTS = "linears.json"
_WEIGHTS = "model.safetensors"
# The label of the pass that quantizes the decoder.
_DECODER = "decoder"


@dataclass(frozen=True)
class QuantizationReport:
    """The result of `quantize_checkpoint`.

    Attributes:
        folder: the new checkpoint.
        recipe: the recipe that was used.
        bytes: size of the weight files.
        record: the contents of `quantization.json`: every linear, the data, the errors.
        divergences: the measurements that an automatic choice was made from: nats by precision, by the first of the
            linears that share an input; None without an automatic choice.
        vision: the result for the vision tower; None where it stays float.
        learned: what learning did to the layers, mean, and the seconds it took; None where no rounding was learned.
    """

    folder: Path
    recipe: Recipe
    bytes: int
    record: QuantizationRecord
    divergences: Divergences | None = None
    vision: VisionReport | None = None
    learned: Learned | None = None

    @property
    def errors(self) -> dict[str, float]:
        """The relative output error on calibration data of each quantized linear for which it is known."""
        return self.record.errors


def quantize_checkpoint(
    checkpoint: str | Path,
    out: str | Path,
    recipe: Recipe | None = None,
    *,
    data: DataOptions | None = None,
    calibration: str | Path | None = None,
    compute: Compute | None = None,
    restart: bool = False,
    force: bool = False,
    progress: bool | Progress = False,
) -> QuantizationReport:
    """Quantize a checkpoint folder into another folder.

    The state of an unfinished run is in `OUT.partial`. The same call continues it, with the same result.

    Args:
        checkpoint: local folder with float weights.
        out: the folder to make.
        recipe: how to quantize; default w4a16-awq in groups of 128.
        data: calibration data for recipes that need it; default: the built-in set.
        calibration: the output of `calibrate` for this checkpoint, instead of data. Any recipe can use it.
        compute: device and type of the calibration; default: the best of this machine.
        restart: discard an unfinished run.
        force: replace an existing quantized checkpoint at `out`, if nothing else lies in it; at the end, in one step.
        progress: show the progress on standard error.

    Raises:
        EdgeError: checkpoint, data or recipe do not fit, `out` exists, another process makes it, or values are not
            finite; one line each.
    """
    recipe, compute = recipe or Recipe(), compute or choose_compute()
    require_type("recipe", recipe, Recipe, 'Recipe(), or make_recipe(read_recipe("cpu")) of internvl_edge.recipe.files')
    require_type("data", data or DataOptions(), DataOptions, "DataOptions(PATH) of internvl_edge.calibration")
    require_type("compute", compute, Compute, 'choose_compute("cpu") of internvl_edge.calibration')
    source, target = Checkpoint(Path(checkpoint)), Path(out)
    permit = partial(require_replaceable, target, force, "a quantized checkpoint", quantized_files)
    permit()
    if data is not None and calibration is not None:
        raise EdgeError("both data and a calibration set were given; a set already holds its data")
    plan = plan_decoder(source, recipe)
    with readable_disk_errors(target, CONTINUES), writing(target) as place:
        permit()
        run = _Run(source, recipe, plan, compute, as_progress(progress))
        with run.work_folder(place, data, None if calibration is None else Path(calibration), restart):
            folder, report = run.checkpoint(run.quantize())
            permit()
            put_in_place(folder, place)
            discard(partial_path(place))
        return replace(report, folder=target)


class _Run:
    """One quantization in progress."""

    def __init__(
        self, checkpoint: Checkpoint, recipe: Recipe, plan: Plan, compute: Compute, progress: Progress
    ) -> None:
        self._checkpoint = checkpoint
        self._recipe = recipe
        self._plan = plan
        self._compute = compute
        self._progress = progress
        self._vision: VisionReport | None = None
        self._blocks: list[str] = []
        self._started = time.perf_counter()
        self._divergences: Divergences | None = None
        self._layout = OutputLayout(checkpoint, recipe)

    def _quantizer(self) -> BlockQuantizer:
        return BlockQuantizer(self._checkpoint, self._recipe, self._compute, self._layout.scale_dtype, self._plan)

    def work_folder(self, target: Path, data: DataOptions | None, given: Path | None, restart: bool) -> WorkFolder:
        """Where this run keeps its state; first of all."""
        self._identity = checkpoint_identity(self._checkpoint.folder)
        self._needed = self._recipe.needs_data or self._recipe.vision == "int8"
        self._options = (data or DataOptions()) if self._needed and given is None else None
        self._given = given if self._needed else None
        run = run_description(self._identity, self._options, self._compute if self._needed else None)
        run |= {"recipe": encode(self._recipe), "calibration": describe_set(self._given) if self._given else None}
        self._work = WorkFolder(partial_path(target), run, restart)
        return self._work

    def quantize(self) -> CalibrationSet | None:
        """All blocks into the work folder; returns the calibration set where one was used."""
        self._progress.expect(self._phases())
        if not self._needed:
            self._without_data()
            return None
        calibration = self._calibration_set()
        parts = self._work, self._checkpoint, calibration, self._compute
        tower = self._quantize_vision(calibration) if self._recipe.vision == "int8" else None
        if not self._recipe.needs_data:
            assert tower is not None
            self._vision = tower.report(self._progress, embedded=False)
            self._without_data()
            return calibration
        # With the quantized tower, so that image embeddings are those that the device will compute.
        embed(*parts, self._progress, tower.replacements if tower else no_replacements)
        if tower:
            self._vision = tower.report(self._progress, embedded=True)
        if self._recipe.choice:
            self._divergences = measure_divergences(*parts, self._recipe, self._plan, self._progress)
            self._plan = plan_by_divergence(self._checkpoint, self._recipe, self._plan, self._divergences)
        self._with_data(calibration)
        return calibration

    def _calibration_set(self) -> CalibrationSet:
        if self._given is None:
            assert self._options is not None
            return prepare(self._work, self._checkpoint, self._identity, self._options, self._progress)
        given = CalibrationSet.open(self._given)
        require_same_checkpoint(given, self._identity)
        # An int8 tower makes embeddings of its own.
        return adopt(self._work, given, self._recipe.vision == "fp", self._progress)

    def checkpoint(self, calibration: CalibrationSet | None) -> tuple[Path, QuantizationReport]:
        """Put the new checkpoint together, in a folder of the work folder."""
        quantized = [
            OutTensor.stored(name, tensor)
            for block in sorted(self._blocks)
            for name, tensor in open_tensor_files(self._work.need(f"{block}/{_WEIGHTS}").parent).items()
        ]
        unchanged = self._layout.unchanged(tensor.name for tensor in quantized)
        tensors = sorted([*quantized, *unchanged], key=lambda tensor: tensor.name)
        total = sum(tensor.nbytes for tensor in tensors)
        linears = [
            decode(LinearReport, values)
            for block in sorted(self._blocks)
            for values in self._work.need_json(f"{block}/{_REPORTS}")
        ]
        folder = self._work.path / OUT
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        require_space(folder, total, "the quantized checkpoint", CONTINUES)
        self._layout.copy_side_files(folder)
        config = json.dumps(
            self._layout.config(self._plan, (tensor.name for tensor in quantized)), indent=2, ensure_ascii=False
        )
        (folder / "config.json").write_text(config + "\n", encoding="utf-8")
        if self._recipe.kv_cache == "int8":
            assert calibration is not None
            decoder = Decoder(self._checkpoint, self._compute, calibration)
            BlockStream(self._work, _DECODER, decoder).kv_scales().write(folder)
        with self._progress.phase("writing the checkpoint", total, "bytes") as advance:
            write_shards(folder, tensors, progress=advance)
        record = self._record(Checkpoint(folder), calibration, linears)
        replace_text(folder / RECORD, dumps(record))
        card = checkpoint_card(record, self._checkpoint.config.layout, read_license(self._checkpoint.folder))
        (folder / CARD).write_text(card, encoding="utf-8")
        learned = None
        if self._recipe.rounding == "learned":
            layers = range(self._checkpoint.config.decoder.num_hidden_layers)
            noted = [self._work.need_json(_learned(layer)) for layer in layers]
            found = [decode(Learned, values) for values in noted if values is not None]
            learned = mean(found) if found else None  # an automatic choice may leave nothing to learn
        report = QuantizationReport(folder, self._recipe, total, record, self._divergences, self._vision, learned)
        return folder, report

    def _record(
        self, made: Checkpoint, calibration: CalibrationSet | None, linears: list[LinearReport]
    ) -> QuantizationRecord:
        """Return the record of how the new checkpoint `made` was quantized; `linears` are those of the decoder."""
        source, vision = self._checkpoint.folder, self._vision
        hub = hub_source(source)
        return QuantizationRecord(
            checkpoint=hub.repository if hub else source.resolve().name,
            recipe=asdict(self._recipe),
            samples=len(calibration.names) if calibration else 0,
            tokens=calibration.total if calibration else 0,
            image_tokens=int(calibration.is_image.sum()) if calibration else 0,
            broken=tuple(calibration.broken) if calibration else (),
            weights=weight_files(made.folder),
            components=made.components(),
            linears=(*(vision.linears(made) if vision else ()), *linears),
            tower=vision.compared if vision else None,
            bits_per_weight=average_bits(self._checkpoint, self._plan),
            predicted_kl=predicted_divergence(self._plan),
            run=run_record(time.perf_counter() - self._started),
            files=tuple(
                sorted({CARD, *(path.name for path in made.folder.iterdir() if path.suffix != ".safetensors")})
            ),
            hub=hub,
        )

    def _quantize_vision(self, calibration: CalibrationSet) -> VisionQuantizer:
        how = self._recipe.vision_int8
        how = replace(how, keep=(*how.keep, *kept_vision(self._checkpoint, self._recipe)))
        quantizer = VisionQuantizer(self._work, self._checkpoint, calibration, self._compute, how)
        quantizer.run(self._progress)
        for block in quantizer.blocks:
            self._once(f"block-{block}", partial(quantizer.block, block))
        return quantizer

    def _phases(self) -> int:
        """The number of phases that the progress shows; what is there already is counted too."""
        recipe = self._recipe
        return (
            self._needed  # the data
            + (vision_phases(recipe) if recipe.vision == "int8" else 0)
            + recipe.needs_data  # embeddings
            + (DIVERGENCE_PHASES if recipe.choice else 0)
            + 2  # quantizing and writing
        )

    def _without_data(self) -> None:
        rounded = any(choice.precision.scheme for choice in self._plan.values())
        layers = self._checkpoint.config.decoder.num_hidden_layers if rounded else 0
        quantizer = self._quantizer()
        with self._progress.phase("quantizing the decoder", layers, "layers") as advance:
            for layer in range(layers):
                self._once(_block(layer), partial(quantizer.layer, layer, None))
                advance(1)
        if self._recipe.lm_head != "fp":
            self._once("block-head", lambda: quantizer.head(None))

    def _with_data(self, calibration: CalibrationSet) -> None:
        quantizer, decoder = self._quantizer(), Decoder(self._checkpoint, self._compute, calibration)
        stream = BlockStream(self._work, _DECODER, decoder)
        learner = None
        if self._recipe.rounding == "learned":
            reference = BlockStream(self._work, f"{_DECODER}-reference", decoder)
            learner = RoundingLearner(stream, reference, self._recipe.learning, self._progress)

        def handle(index: int, statistics: Statistics) -> Mapping[str, Tensor]:
            block = quantizer.layer(index, statistics, latents=learner is not None)
            if learner is not None:
                self._work.write_json(_learned(index), encode(learner.learn(index, block)))
                quantizer.settle(block)
            self._store(_block(index), block)
            return block.replacements(f"{decoder.names[index]}.", self._compute)

        stream.run(self._progress, "quantizing the decoder", handle, quantizer.wanted)
        self._blocks += [_block(layer) for layer in range(len(decoder.names))]
        if self._recipe.lm_head != "fp":
            inputs = stream.observe_output("lm_head", decoder.normed, quantizer.head_request)
            self._once("block-head", lambda: quantizer.head(inputs))

    def _once(self, name: str, make: Callable[[], QuantizedBlock]) -> None:
        if not self._work.has(f"{name}/{_WEIGHTS}"):
            self._store(name, make())
        self._blocks.append(name)

    def _store(self, name: str, block: QuantizedBlock) -> None:
        (self._work.path / name).mkdir(exist_ok=True)
        self._work.write_json(f"{name}/{_REPORTS}", encode(list(block.reports.values())))
        with self._work.writing(f"{name}/{_WEIGHTS}") as new:
            write_file(new, self._layout.tensors(block))


def _learned(layer: int) -> str:
    return f"learned-{layer:03}.json"


def _block(layer: int) -> str:
    return f"block-{layer:03}"
