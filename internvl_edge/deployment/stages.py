"""The stages from a checkpoint to a device. Each calls what the single command of its name calls.

    DIR/deployment.json   what was decided, and which stages are done
    DIR/checkpoint        the quantized checkpoint
    DIR/bundle            the bundle, with figures and engines: what goes to the device
    DIR/bundle.report     the report of the evaluation

Every stage can be killed at any moment. A later start with the same arguments continues.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from internvl_edge import __version__
from internvl_edge.base import machine
from internvl_edge.base.errors import EdgeError
from internvl_edge.base.folders import writing
from internvl_edge.base.hub import hub_source
from internvl_edge.base.jsonable import encode
from internvl_edge.base.progress import SILENT, Progress
from internvl_edge.base.text import command_line
from internvl_edge.base.units import rounded, share, size
from internvl_edge.bundle.bundle import Bundle
from internvl_edge.bundle.manifest import is_bundle
from internvl_edge.bundle.quality_record import quality_of, record_quality
from internvl_edge.calibration import DataOptions, choose_compute
from internvl_edge.calibration.pipeline import partial_path
from internvl_edge.calibration.work import checkpoint_identity, discard
from internvl_edge.checkpoint.config_reader import read_config
from internvl_edge.checkpoint.hub import resolve_checkpoint, resolve_configuration
from internvl_edge.checkpoint.record import read_record
from internvl_edge.evaluation import EvaluationSettings, evaluate
from internvl_edge.evaluation.report import bundle_report, checkpoint_report, report_folder, write_report
from internvl_edge.export import export_bundle
from internvl_edge.planning.choice import PLANNED_CONTEXT, Choice, Target, choose, cpu_memory, needed_memory
from internvl_edge.planning.devices import Devices
from internvl_edge.planning.footprint import Storage
from internvl_edge.planning.storage import checkpoint_storage, recipe_storage
from internvl_edge.quantize import quantize_checkpoint
from internvl_edge.recipe.files import make_recipe, read_recipe
from internvl_edge.recipe.recipe import Recipe

from .request import Request, find_target
from .state import StageEntry, StateFile

STAGES = ("plan", "quantize", "export", "evaluate", "build")
DEPLOY_PHASES = len(STAGES)
_DTYPE, _ACTIVATIONS = "float16", "float32"
_AS_IT_IS = "as it is"
_DESCRIPTION = ("config.json", "preprocessor_config.json", "processor_config.json")
_QUESTION = ("--image", "PHOTO.jpg", "What is this?")


@dataclass(frozen=True)
class Stage:
    """A stage that ended: its name, what it says in one line, its seconds, and whether an earlier start did it."""

    name: str
    text: str
    seconds: float
    kept: bool = False


@dataclass(frozen=True)
class Deployed:
    """What `deploy` made.

    Attributes:
        folder: of the deployment.
        bundle: what goes to the device.
        choice: recipe, context and memory.
        stages: what each stage did.
        on_device: commands to run on the device, in order, each as words; empty where nothing is left to do there.
        run, serve: the commands that ask the bundle and serve it, as words.
        seconds: of this start.
    """

    folder: Path
    bundle: Path
    choice: Choice
    stages: tuple[Stage, ...]
    on_device: tuple[tuple[str, ...], ...]
    run: tuple[str, ...]
    serve: tuple[str, ...]
    seconds: float


def deploy(
    request: Request, progress: Progress = SILENT, said: Callable[[int, Stage], None] = lambda number, stage: None
) -> Deployed:
    """Plan, quantize, export, evaluate and build, as far as an earlier start has not.

    Args:
        request: what and where.
        progress: shows the phases of the stage that runs.
        said: is told of each stage that ended: its number from 1, and the stage.

    Raises:
        EdgeError: nothing fits the device, the folder holds something else or a deployment with other choices, or as
            the single commands.
    """
    started = time.perf_counter()
    devices = Devices(request.table)
    target = find_target(request.device, devices)
    if is_bundle(Path(request.checkpoint)):
        raise EdgeError(f"{request.checkpoint} is a bundle already; build makes its engines, and run asks it")
    if request.recipe and request.recipe.negative_scales and target.device is not None:
        raise EdgeError(f"{target.title} runs TensorRT, which takes no negative scales; use --positive-scales")
    with writing(request.output) as place:
        state = StateFile(place, request.checkpoint, request.revision, request.device, request.force)
        run = _Run(request, place, target, devices, state, progress, said)
        progress.expect(DEPLOY_PHASES)
        run.plan()
        run.quantize()
        run.export()
        run.evaluate()
        on_device = run.build()
        bundle = request.output / "bundle"
        context = ("--context", str(run.choice.context)) if target.device is None else ()
        ask = ("run", str(bundle), *context, *_QUESTION)
        return Deployed(
            *(request.output, bundle, run.choice, tuple(run.stages), on_device),
            run=ask,
            serve=("serve", str(bundle), *context),
            seconds=time.perf_counter() - started,
        )


@dataclass
class _Run:
    """One start of a deployment. Its methods are the stages, in order."""

    request: Request
    place: Path
    target: Target
    devices: Devices
    state: StateFile
    progress: Progress
    said: Callable[[int, Stage], None]
    stages: list[Stage] = field(default_factory=list)
    _reference: Path | None = None

    def plan(self) -> None:
        """Decide recipe, context and dialect, before anything large is downloaded."""
        began = time.perf_counter()
        with self.progress.phase("plan"):
            folder = resolve_configuration(self.request.checkpoint, self._revision)
            if (source := hub_source(folder)) and not self.state.state.commit:
                self.state.note_commit(source.commit)
            self._config = read_config(folder)
            found = checkpoint_storage(folder, self._config)
            if found and self.request.recipe:
                raise EdgeError(f"{self.request.checkpoint} is quantized already; leave out the options of the recipe")
            self._recipes = {} if found else self._wanted_recipes()
            storages = {_AS_IT_IS: found} if found else {name: _storage(each) for name, each in self._recipes.items()}
            inputs = {
                "version": __version__,
                "checkpoint": _described(folder),
                "device": encode(self.target.device) if self.target.device else self.target.name,
                "recipe": encode(self._recipes) if self.request.recipe else list(storages),
                "context": self.request.context,
            }
            if entry := self.state.done("plan", inputs, lambda: "planned"):
                self.choice = Choice(**entry.values)
            else:
                others = {} if self.target.device is None else self._others()
                chosen = choose(self._config, self.target, storages, self.request.context, others)
                self.state.begin("plan", inputs, "planned")
                self.state.end("plan", "planned", time.perf_counter() - began, encode(chosen))
                self.choice = chosen
        usable = "" if self.target.usable_memory is None else f" of {size(self.target.usable_memory)}"
        self._say(
            f"{self.target.title}: recipe {self.choice.recipe}, context {self.choice.context}, dialect "
            f"{' and '.join(self.target.dialects)}; needs about {size(self.choice.needed)}{usable}",
            began,
            entry,
        )

    def quantize(self) -> None:
        """Make DIR/checkpoint, unless the checkpoint is quantized already."""
        source = resolve_checkpoint(self.request.checkpoint, self._revision)
        began = time.perf_counter()
        if not self._recipes:
            self._checkpoint = source
            self._say("not needed, the checkpoint is quantized already", began)
            return
        self._reference, self._checkpoint = source, self.place / "checkpoint"
        recipe = self._recipes[self.choice.recipe]
        needed = recipe.needs_data or recipe.vision == "int8"
        data, compute = self.request.data or DataOptions(), choose_compute()
        inputs = {
            "version": __version__,
            "checkpoint": checkpoint_identity(source),
            "recipe": encode(recipe),
            "data": data.describe() if needed else None,
            "compute": str(compute) if needed else None,
        }
        with self.progress.phase("quantize"):
            entry = self.state.done("quantize", inputs, self._made_checkpoint)
            if entry is None:
                continued = self.state.begin("quantize", inputs, self._made_checkpoint())
                quantize_checkpoint(
                    source,
                    self._checkpoint,
                    recipe,
                    data=data if needed else None,
                    compute=compute,
                    restart=not continued and partial_path(self._checkpoint).exists(),
                    force=True,
                    progress=self.progress,
                )
            _tidy(self._checkpoint)
            record = read_record(self._checkpoint)
            assert record is not None
            if entry is None or not entry.made:
                write_report(checkpoint_report(self._checkpoint, record, self.request.command), self._checkpoint)
                self.state.end("quantize", self._made_checkpoint(), time.perf_counter() - began)
            self._require_fitting()
        self._say(f"{self.request.output / 'checkpoint'}, {size(sum(record.weights.values()))}", began, entry)

    def export(self) -> None:
        """Make DIR/bundle, with the decoder graph that the target needs."""
        began = time.perf_counter()
        inputs = {
            "version": __version__,
            "checkpoint": checkpoint_identity(self._checkpoint),
            "dialects": list(self.target.dialects),
            "dtype": _DTYPE,
            "activations": _ACTIVATIONS,
        }
        with self.progress.phase("export"):
            entry = self.state.done("export", inputs, self._made_bundle)
            if entry is None:
                self.state.begin("export", inputs, self._made_bundle())
                export_bundle(
                    self._checkpoint,
                    self._bundle,
                    _DTYPE,
                    _ACTIVATIONS,
                    dialects=self.target.dialects,
                    force=True,
                    progress=self.progress,
                )
            _tidy(self._bundle)
            if entry is None or not entry.made:
                self.state.end("export", self._made_bundle(), time.perf_counter() - began)
        total = sum(file.bytes for file in Bundle.open(self._bundle).manifest.files.values())
        self._say(f"{self.request.output / 'bundle'}, {size(total)}", began, entry)

    def evaluate(self) -> None:
        """Compare the bundle with the float checkpoint, and record the figures in it."""
        began = time.perf_counter()
        if reason := self._not_evaluated():
            self._say(f"left out: {reason}", began)
            return
        inputs = {
            "version": __version__,
            "bundle": self._made_bundle(),
            "reference": checkpoint_identity(self._float),
            "dialect": self.target.dialects[0],
        }
        with self.progress.phase("evaluate"):
            entry = self.state.done("evaluate", inputs, self._measured)
            if entry is None:
                known = self._measured()
                self.state.begin("evaluate", inputs, known)
                if not known:  # figures of these files that the user measured may come from more questions
                    self._compare()
            if entry is None or not entry.made:
                self.state.end("evaluate", self._measured(), time.perf_counter() - began)
        quality = quality_of(Bundle.open(self._bundle).manifest)
        self._say(
            f"KL divergence {rounded(quality.figures['kl'])} nats, same most probable token "
            f"{share(quality.figures['top1'])}, {quality.measured['comparison'].questions} questions",
            began,
            entry,
        )

    def _compare(self) -> None:
        settings = EvaluationSettings(self._bundle, self._float, dialect=self.target.dialects[0])
        result = evaluate(settings, self.progress)
        report = bundle_report(self._bundle, result.quality, result.comparison, command=self.request.command)
        write_report(report, report_folder(self._bundle))
        record_quality(self._bundle, result.quality)

    def build(self) -> tuple[tuple[str, ...], ...]:
        """Build engines where the TensorRT of the target is here; return the commands that are left for the device."""
        began = time.perf_counter()
        if self.target.device is None:
            self._say("not needed on a CPU", began)
            return ()
        from internvl_edge.compiler.bundle_engines import build_engines, obstacle, options_for

        target, context = self.devices.target(self.target.name), self.choice.context
        with self.progress.phase("build"):
            reason = obstacle(target)
            if reason:
                given = ("--context", str(context)) if context != PLANNED_CONTEXT else ()
                more = ("--devices", str(self.request.table)) if self.request.table else ()
                self._say(f"left for the device: {reason}", began)
                return (
                    ("build", "bundle", "--device", self.target.name, *given, *more),
                    ("run", "bundle", *_QUESTION),
                    ("serve", "bundle"),
                )
            opened = Bundle.open(self._bundle)
            options = options_for(target, opened=opened, capacity=context)
            record, built = build_engines(opened, target, options, progress=self.progress)
        total = sum(entry["bytes"] for entry in record.files.values())
        text = f"{self.request.output / 'bundle' / 'engines' / self.target.name}, {size(total)}"
        self.stages.append(Stage("build", text, time.perf_counter() - began, not built))
        self.said(len(self.stages), self.stages[-1])
        return ()

    @property
    def _revision(self) -> str | None:
        """The commit of the first start, and before it is known what the user asked for."""
        return self.state.state.commit or self.request.revision

    @property
    def _bundle(self) -> Path:
        return self.place / "bundle"

    @property
    def _float(self) -> Path:
        assert self._reference is not None
        return self._reference

    def _wanted_recipes(self) -> Mapping[str, Recipe]:
        if self.request.recipe:
            return {self.request.recipe_name: self.request.recipe}
        return {name: make_recipe(read_recipe(name)) for name in self.target.presets}

    def _others(self) -> dict[str, Target]:
        """Return the other devices of the same kind."""
        flavour = self.target.device.flavour if self.target.device else ""
        names = [name for name, device in self.devices.all.items() if device.flavour == flavour]
        return {name: find_target(name, self.devices) for name in names if name != self.target.name}

    def _made_checkpoint(self) -> str:
        """Return the identity of DIR/checkpoint, "" where there is none that is whole."""
        return checkpoint_identity(self._checkpoint) if read_record(self._checkpoint) else ""

    def _made_bundle(self) -> str:
        """Return the fingerprint of DIR/bundle, "" where there is none that is whole."""
        try:
            return Bundle.open(self._bundle).manifest.fingerprint
        except EdgeError:
            return ""

    def _measured(self) -> str:
        """Return the fingerprint of the files that the recorded figures belong to, "" for none."""
        quality = quality_of(Bundle.open(self._bundle).manifest)
        return quality.files if "comparison" in quality.measured else ""

    def _require_fitting(self) -> None:
        """Compare what the recipe really made with the target: some recipes decide layer by layer."""
        storage = checkpoint_storage(self._checkpoint, self._config)
        usable = self.target.usable_memory
        if storage is None or usable is None:
            return
        needed = needed_memory(self._config, self.target, storage, self.choice.context)
        if needed > usable and needed > self.choice.needed:
            raise EdgeError(
                f"{self.request.output / 'checkpoint'} needs {size(needed)} with {self.choice.context} tokens, and "
                f"{self.target.title} has {size(usable)}; give a recipe with fewer bits, or a smaller --context"
            )

    def _not_evaluated(self) -> str:
        """Return why nothing can be compared, "" where it can."""
        if not self.request.evaluate:
            return "--no-evaluate"
        if self._reference is None:
            return "the float checkpoint is not known"
        needed, available = cpu_memory(self._config, Storage(), PLANNED_CONTEXT), machine.memory("MemAvailable")
        if available is not None and needed > available and not self._measured():
            later = command_line("evaluate", self.request.output / "bundle", "--reference", self.request.checkpoint)
            return f"the float model needs {size(needed)}, {size(available)} are available; elsewhere: {later}"
        return ""

    def _say(self, text: str, began: float, entry: StageEntry | None = None) -> None:
        name = STAGES[len(self.stages)]
        self.stages.append(Stage(name, text, time.perf_counter() - began, entry is not None))
        self.said(len(self.stages), self.stages[-1])


def _storage(recipe: Recipe) -> Storage:
    """Return what a recipe makes; of one that decides layer by layer, what its own scheme would."""
    return recipe_storage(replace(recipe, layers=(), automatic=None))


def _tidy(folder: Path) -> None:
    """Remove what a process that was killed after a folder appeared has left beside it."""
    with writing(folder):
        if partial_path(folder).exists():
            discard(partial_path(folder))


def _described(folder: Path) -> str:
    """Return a digest of the files that describe a model."""
    digest = hashlib.sha256()
    for name in _DESCRIPTION:
        digest.update((folder / name).read_bytes() if (folder / name).is_file() else b"")
    return digest.hexdigest()
