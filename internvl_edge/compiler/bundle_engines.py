"""Build both engines of a bundle for one target, into the bundle's folder `engines/NAME/`.

The folder appears complete or not at all, and is built again only when its inputs changed. TensorRT must build on the
target device. TensorRT for RTX needs no device, and puts several compute capabilities into one file.
"""

from __future__ import annotations

import shutil
import threading
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from internvl_edge.base.errors import EngineError
from internvl_edge.base.extras import requires
from internvl_edge.base.files import readable_disk_errors
from internvl_edge.base.folders import new_folder
from internvl_edge.base.machine import memory
from internvl_edge.base.progress import Progress, as_progress
from internvl_edge.base.replaceable import require_replaceable
from internvl_edge.bundle import names
from internvl_edge.bundle.bundle import Bundle, sha256
from internvl_edge.bundle.contents import engine_files
from internvl_edge.model.config import ModelConfig
from internvl_edge.model.context import checked_context
from internvl_edge.model.preprocess import MAX_TILES
from internvl_edge.planning.devices import Target
from internvl_edge.planning.footprint import Footprint
from internvl_edge.planning.planner import WIDE_CACHE, build_bytes, choose_programs, slow_steps, stored_on
from internvl_edge.planning.programs import MOST_ROWS, Programs, least_programs
from internvl_edge.planning.storage import bundle_storage
from internvl_edge.planning.versions import compiler_settings, keeps_int8_cache, reads_decomposable
from internvl_edge.runtime.engines.tensorrt.flavour import Flavour, compiler, load_flavour
from internvl_edge.runtime.engines.tensorrt.record import (
    ENGINES,
    TIMING_CACHE,
    BuildOptions,
    EngineRecord,
    engine_folder,
    graph_inputs,
)
from internvl_edge.runtime.engines.tensorrt.self_check import check_engines

from .engine import Build, Built, Profile, Shape, build_engine, interruptible
from .operators import require_operators

_ADVICE = "build for another --device"
# The most logits of a step of one token. It needs one. But where TensorRT for RTX 1.7 knows that there is only one, it
# dequantizes an int8 head in memory, for each token.
_KEPT_BY_A_STEP = 2


def build_engines(
    opened: Bundle,
    target: Target,
    options: BuildOptions,
    *,
    force: bool = False,
    progress: bool | Progress = False,
    check: bool = True,
) -> tuple[EngineRecord, bool]:
    """Build a bundle's engines for a target, unless the same build exists already.

    Args:
        opened: the bundle. Its folder `engines/NAME/` receives the engines.
        target: a device, or a group of devices that share one file.
        options: sizes that are fixed in engines.
        force: build again even if the same build exists.
        progress: show the progress on standard error.
        check: compare the engines with ONNX Runtime where the present GPU can run them (see `self_check`).

    Returns:
        The record of the engines in the folder, and whether this call built them.

    Raises:
        EngineError: TensorRT is missing, is too old or refuses a graph; another device is needed; sizes do not fit; or
            the engines compute something else than ONNX Runtime. No new engines are left then.
    """
    _check_options(opened.manifest.model, target, options)
    _check_graphs(opened)
    flavour = load_flavour(target.flavour)
    folder = engine_folder(opened, target.name)
    wanted = EngineRecord(target.name, flavour.name, flavour.version, target.sms, options, graph_inputs(opened))
    if not force and (present := _present(folder)) and present.same_build(wanted):
        return present, False
    if not flavour.builds_anywhere:
        _check_device(target)
    _check_memory(opened, target, options)
    permit = partial(require_replaceable, folder, True, "a folder of engines", engine_files, _ADVICE)
    progress = as_progress(progress)
    progress.expect(len(ENGINES) + check)
    refusals = readable_disk_errors(folder, "make room", "check its rights", EngineError)
    with refusals, new_folder(folder, permit, _ADVICE) as made, interruptible() as stop:
        if (folder / TIMING_CACHE).is_file():
            shutil.copy(folder / TIMING_CACHE, made)
        built = {graph: _build(opened, flavour, wanted, graph, made, progress, stop) for graph in ENGINES}
        record = replace(
            wanted,
            files={path.name: _entry(path, built) for path in sorted(made.iterdir())},
            figures={
                graph: {"seconds": done.seconds, "peak_rss": done.peak_rss, "layers": done.layers}
                for graph, done in built.items()
            },
        )
        if check:
            with progress.phase("comparing the engines with ONNX Runtime"):
                record = replace(record, check=check_engines(opened, record, made, progress=progress))
        if stop.is_set():
            raise KeyboardInterrupt
        record.write(made)
    return record, True


def obstacle(target: Target) -> str:
    """Return why engines for a target cannot be built on this machine, "" where they can.

    TensorRT for RTX builds for other devices. TensorRT builds on the device itself.
    """
    try:
        if not load_flavour(target.flavour).builds_anywhere:
            _check_device(target)
    except EngineError as error:
        return str(error)
    return ""


def headers(
    opened: Bundle,
    options: BuildOptions,
    decomposed: bool = False,
    *,
    decomposable: bool = False,
    wide_cache: bool = False,
) -> dict[str, tuple[bytes, Path]]:
    """Return the ONNX header of each graph for TensorRT, and the path of the bundle's graph.

    A header is an ONNX model without its large weights, which stay in files beside the bundle's graph.

    Args:
        opened: the bundle.
        options: the sizes and the type of the engines.
        decomposed: for a TensorRT without layers for attention, rotary embedding and the KV cache (before 10.15).
        decomposable: for a TensorRT that has such layers, but not one kernel for each shape of attention.
        wide_cache: keep an int8 KV cache in 16 bits.

    Raises:
        EngineError: onnx-ir is not installed.
    """
    with requires("rtx", "build", EngineError):
        from .graphs import decoder_header, vision_header
    manifest = opened.manifest
    vision, decoder = opened.path(names.VISION), opened.path(names.DECODERS["standard"])
    types = manifest.dtype, options.dtype
    return {
        "vision": (vision_header(vision, manifest.model, *types, decomposed, decomposable), vision),
        "decoder": (
            decoder_header(
                *(decoder, manifest.model, *types, options.slots, options.rows, decomposed),
                decomposable=decomposable,
                wide_cache=wide_cache,
            ),
            decoder,
        ),
    }


def profiles(config: ModelConfig, options: BuildOptions, graph: str) -> tuple[Profile, ...]:
    """Return the optimization profiles of an engine, that is the input shapes it is built for, one program for each.

    The decoder's are those of `Programs`: for one token with a window of the cache, for one token with the whole cache,
    and for prompts, as far as `options.profiles` goes. A single one serves all, and its best shape is one token,
    because users wait longest for decode. With several rows, steps of one token have all rows and all slots, and
    prompts have one row.
    """
    if graph == "vision":
        size = config.vision.image_size
        shape = (size, size, 3)
        return ({"pixels": ((1, *shape), (options.tiles, *shape), (options.tiles, *shape))},)
    decoder, slots, chunk, rows = config.decoder, options.slots, options.chunk, options.rows
    widths = {"inputs_embeds": decoder.hidden_size, "cos": decoder.head_dim // 2, "sin": decoder.head_dim // 2}
    window, all_slots = ((1,), (max(1, slots // 4),), (slots,)), ((slots,), (slots,), (slots,))
    caches = [f"past_key_values.{n}.{kind}" for n in range(decoder.num_hidden_layers) for kind in ("key", "value")]

    def profile(
        best: int, largest: int, kept: int, slots: tuple[Shape, Shape, Shape] = window, batch: int = 1
    ) -> Profile:
        shapes: Profile = {
            name: ((batch, 1, width), (batch, best, width), (batch, largest, width)) for name, width in widths.items()
        }
        if rows > 1:
            cache = batch, decoder.num_key_value_heads, options.slots, decoder.head_dim
            shapes |= dict.fromkeys(caches, (cache, cache, cache)) | {"past_length": ((batch,), (batch,), (batch,))}
        return shapes | {"kept": ((1,), (1,), (kept,)), "slots": slots}

    kept = min(options.kept, chunk)
    if options.profiles == Programs.ONE:
        return (profile(1, chunk, kept),)
    whole = profile(1, 1, _KEPT_BY_A_STEP, all_slots, rows)
    step = profile(1, 1, _KEPT_BY_A_STEP) if rows == 1 else whole
    return (step, *([whole] if options.profiles == Programs.WHOLE else []), profile(chunk, chunk, kept))


def _build(
    opened: Bundle,
    flavour: Flavour,
    record: EngineRecord,
    graph: str,
    folder: Path,
    progress: Progress,
    stop: threading.Event,
) -> Built:
    header, path = headers(
        opened,
        record.options,
        decomposed=not flavour.has_attention,
        decomposable=reads_decomposable(flavour.name, flavour.release),
        wide_cache=not keeps_int8_cache(flavour.name),
    )[graph]
    require_operators(header, path.name, flavour.name, flavour.release)

    build = Build(
        header=header,
        path=path,
        sms=record.compute_capabilities,
        profiles=profiles(opened.manifest.model, record.options, graph),
        output=folder / ENGINES[graph],
        timing_cache=folder / TIMING_CACHE,
    )
    int8_body = graph == "decoder" and bundle_storage(opened.manifest).has_int8_body
    settings = compiler_settings(flavour.name, flavour.release, int8_body)
    with progress.phase(f"building {ENGINES[graph]}") as step, compiler(settings):
        made = build_engine(flavour, build, lambda phase, done, total: step.at(done, total, phase), stop)
    if stop.is_set():
        raise KeyboardInterrupt
    return made


def _entry(path: Path, built: dict[str, Built]) -> dict[str, int | str]:
    digests = {ENGINES[graph]: made.sha256 for graph, made in built.items()}
    return {"bytes": path.stat().st_size, "sha256": digests.get(path.name) or sha256(path)}


def _present(folder: Path) -> EngineRecord | None:
    try:
        return EngineRecord.read(folder)
    except EngineError:
        return None


def _check_options(config: ModelConfig, target: Target, options: BuildOptions) -> None:
    if options.dtype == "bfloat16" and min(target.sms) < 80:
        raise EngineError(f"{target.title} has no bfloat16 (compute capability below 8.0); build with --dtype float16")
    if options.profiles not in tuple(Programs):
        raise EngineError(f"{options.profiles} optimization profiles, expected 1 to {len(Programs)}")
    if not 1 <= options.rows <= MOST_ROWS:
        raise EngineError(f"{options.rows} rows, expected 1 to {MOST_ROWS}")
    if options.rows > 1 and options.profiles != Programs.STEP:
        raise EngineError(
            f"engines for {options.rows} rows have 2 programs, one for prompts and one for steps of all rows, not "
            f"{options.profiles}; leave out --profiles, or --rows"
        )
    if not 1 <= options.chunk <= options.capacity:
        raise EngineError(
            f"steps of {options.chunk} prompt tokens do not fit a context of {options.capacity}; "
            "expected 1 <= --chunk <= --context"
        )
    if options.capacity < config.tokens_per_tile + 2:
        raise EngineError(
            f"a context of {options.capacity} tokens has no room for one tile ({config.tokens_per_tile} tokens) and an "
            "answer; give more --context"
        )
    checked_context(config.decoder, options.capacity)
    if not 1 <= options.tiles <= MAX_TILES:
        raise EngineError(f"{options.tiles} tiles encoded together, expected 1 to {MAX_TILES}")


def _check_device(target: Target) -> None:
    """Raise EngineError unless the present GPU is the target, because TensorRT builds for the device it runs on."""
    from internvl_edge.runtime.engines.tensorrt.cuda import Cuda

    cuda = Cuda()
    found = cuda.compute_capability()
    if found not in target.sms:
        wanted = ", ".join(target.compute_capabilities)
        raise EngineError(
            f"this GPU has compute capability {found / 10:.1f}, {target.title} has {wanted}; "
            f"engines of {target.flavour} are built on the device they run on"
        )


def _check_graphs(opened: Bundle) -> None:
    for name in (names.VISION, names.DECODERS["standard"]):
        if name not in opened.manifest.files:
            raise EngineError(
                f"{opened.folder} has no {name}, which TensorRT reads; export it with the standard dialect"
            )


def _check_memory(opened: Bundle, target: Target, options: BuildOptions) -> None:
    needed = build_bytes(_footprint(opened, target), target.flavour, Programs(options.profiles))
    available = memory("MemAvailable", "SwapFree")
    if available is not None and needed > available:
        fewer = "give --profiles 1" if options.profiles > least_programs(options.rows) else "quantize more"
        raise EngineError(
            f"building needs about {needed / 1e9:.1f} GB of memory, {available / 1e9:.1f} GB are available; "
            f"close other programs, add swap, or {fewer}"
        )


def options_for(
    target: Target, dtype: str | None = None, *, opened: Bundle | None = None, **sizes: int | None
) -> BuildOptions:
    """Return build options with the given values. None means the default: for `dtype`, the target's own type.

    The default prefill step never exceeds the context. The default programs of the decoder are the fastest that the
    target's memory holds beside the model of `opened`, and the fewest where no bundle is given.
    """
    given = {name: size for name, size in sizes.items() if size is not None}
    options = BuildOptions(**(asdict(BuildOptions(dtype or target.dtype)) | given))
    if "chunk" not in given:
        options = replace(options, chunk=min(options.chunk, options.capacity))
    if "profiles" in given:
        return options
    if opened is None:
        return replace(options, profiles=int(least_programs(options.rows)))
    sizes_of_cache = options.capacity, options.rows
    programs = choose_programs(_footprint(opened, target), target.flavour, target.usable_memory, *sizes_of_cache)
    return replace(options, profiles=int(programs))


def notes(opened: Bundle, target: Target, options: BuildOptions) -> list[str]:
    """Return what a user should know about the engines of these options, one line each."""
    footprint = _footprint(opened, target)
    found = []
    if opened.manifest.kv_cache == "int8" and footprint.storage.cache_bytes > 1:
        found.append(WIDE_CACHE)
    if options.profiles == Programs.ONE:
        found.append(slow_steps(footprint, target.flavour, options.capacity))
    return found


def _footprint(opened: Bundle, target: Target) -> Footprint:
    """Return the bytes of a bundle in engines, which hold all floats in 16 bits."""
    storage = replace(bundle_storage(opened.manifest), dtype_bytes=2, vector_bytes=2)
    return Footprint(opened.manifest.model, stored_on(target.flavour, storage))
