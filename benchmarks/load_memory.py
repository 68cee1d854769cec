"""Seconds to load a bundle and the memory that it takes: loaded, after a prompt, after a tile; and what was tried.

    python benchmarks/load_memory.py NAME BUNDLE [--rounds 3] [--only FORM ...]

Every figure is of a fresh process with two threads, ONNX Runtime alone, a context of 4096 tokens: it loads, reads a
prompt of 1800 tokens, decodes 32, then encodes one tile twice. Figures are medians of the rounds, in which the forms
take turns. A form changes how ONNX Runtime is used, by its own options alone; "product" is what `InternVL.load` does.
The limits are 0.5 s, and what llama.cpp took for the same model (results/cpu-peers-int4.json). Results:
results/load-memory-NAME.json.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
from record import write_results

THREADS, CONTEXT, PROMPT, TOKENS = 2, 4096, 1800, 32
# llama.cpp, Q4_0 with an int8 tower: seconds to load, bytes of memory for text and with a tile, bytes on disk.
LIMITS = {"load_s": 0.5, "text": 0.79e9, "with_tile": 1.18e9, "disk": 0.76e9}


# ---- the forms: each changes the engine class before the bundle is loaded ----


def product(engine: Any, folder: Path) -> None:
    """Change nothing."""


def no_shrinkage(engine: Any, folder: Path) -> None:
    """Keep the arena's free memory, as before."""
    plain = engine._interruptible
    engine._interruptible = lambda self, shrink=False: plain(self)


def with_entries(**entries: str) -> Callable[[Any, Path], None]:
    """Return a form that gives every session further configuration entries; dots are written as `__`."""

    def change(engine: Any, folder: Path) -> None:
        session = engine._session
        pairs = [(name.replace("__", "."), value) for name, value in entries.items()]
        engine._session = lambda self, opened, name, threads, *more: session(self, opened, name, threads, *more, *pairs)

    return change


def one_arena(engine: Any, folder: Path) -> None:
    """Let all sessions use one arena, which grows by what is asked for."""
    import onnxruntime
    from onnxruntime.capi._pybind_state import OrtAllocatorType, OrtArenaCfg, OrtMemoryInfo, OrtMemType

    info = OrtMemoryInfo("Cpu", OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, OrtMemType.DEFAULT)
    # (most bytes, 1 = grow by what is asked for, first chunk, most dead bytes of a chunk); -1 and 0 are the defaults.
    onnxruntime.create_and_register_allocator(info, OrtArenaCfg(0, 1, -1, -1))
    with_entries(session__use_env_allocators="1")(engine, folder)


def options_of(ort: Any, threads: Any, entries: Any) -> Any:
    """The options of a session, without those of the bundle."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    for key, value in entries:
        options.add_session_config_entry(key, value)
    return options


def unpacked_tower(engine: Any, folder: Path) -> None:
    """Load the tower from a saved optimized graph over the bundle's own data, without packing its weights."""
    session = engine._session

    def load(self: Any, opened: Any, name: str, threads: Any, *more: Any) -> Any:
        if name != "vision.onnx":
            return session(self, opened, name, threads, *more)
        ort, path = self._ort, folder / "vision.saved.onnx"
        options = options_of(ort, threads, more)
        if not path.exists():
            options.optimized_model_filepath = str(path)
            return ort.InferenceSession(str(opened.path(name)), options, providers=["CPUExecutionProvider"])
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.add_session_config_entry("session.disable_prepacking", "1")
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    engine._session = load


def saved_packed(engine: Any, folder: Path) -> None:
    """Load every graph from a saved optimized graph with its packed weights in one mapped file."""

    def load(self: Any, opened: Any, name: str, threads: Any, *more: Any) -> Any:
        ort, path = self._ort, folder / name
        options = options_of(ort, threads, more)
        if not path.exists():
            options.optimized_model_filepath = str(path)
            for key, value in {
                "optimized_model_external_initializers_file_name": f"{name}.packed",
                "optimized_model_external_initializers_min_size_in_bytes": "1024",
                "save_external_prepacked_constant_initializers": "1",
            }.items():
                options.add_session_config_entry(f"session.{key}", value)
            return session_of(ort, opened.path(name), options)
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        return session_of(ort, path, options)

    def session_of(ort: Any, path: Path, options: Any) -> Any:
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    engine._session = load


FORMS: dict[str, Callable[[Any, Path], None]] = {
    "product": product,
    "arena keeps its memory": no_shrinkage,
    "one arena": one_arena,
    "initializers outside the arena": with_entries(session__use_device_allocator_for_initializers="1"),
    "tower without packing": unpacked_tower,
    "saved packed weights": saved_packed,
}
# Those that save files at their first start.
SAVING = ("tower without packing", "saved packed weights")


# ---- one process ----


def child(form: str, bundle: str, folder: Path) -> dict[str, Any]:
    """Load and use a bundle in this process, and return its figures."""
    from internvl_edge import InternVL
    from internvl_edge.runtime.engines.onnxruntime import OnnxRuntimeEngine

    FORMS[form](OnnxRuntimeEngine, folder)
    found: dict[str, Any] = {}
    started, cpu = time.perf_counter(), time.process_time()
    model = InternVL.load(bundle, "cpu", engine="onnxruntime", context=CONTEXT, threads=THREADS)
    found |= {"load_s": time.perf_counter() - started, "load_cpu_s": time.process_time() - cpu, "loaded": memory()}
    engine, config = model.engine, model.config
    random = np.random.default_rng(0)
    rows = random.standard_normal((PROMPT, config.decoder.hidden_size)).astype(np.float32) * 0.05
    found["prompt_cpu_s"] = cpu_of(lambda: engine.prefill(rows))
    found["decode_cpu_s"] = cpu_of(lambda: [engine.decode(row) for row in rows[:TOKENS]])
    found["text"] = memory()
    size = config.vision.image_size
    tile = random.integers(0, 256, (1, size, size, 3), np.uint8)
    for turn in ("first", "second"):
        found[f"{turn}_tile_cpu_s"] = cpu_of(lambda: engine.encode(tile))
    return found | {"with_tile": memory()}


def cpu_of(action: Callable[[], object]) -> float:
    """CPU seconds of this process that an action takes."""
    started = time.process_time()
    action()
    return time.process_time() - started


def memory() -> dict[str, int]:
    """Bytes of this process: resident and anonymous now, and the most that were resident."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    names = {"resident": "VmRSS", "anonymous": "RssAnon", "peak": "VmHWM"}
    return {name: int(fields[field].split()[0]) * 1024 for name, field in names.items()}


# ---- all of them ----


def middle(values: list[Any]) -> Any:
    """The median of numbers, or of each entry of dictionaries."""
    if isinstance(values[0], dict):
        return {name: middle([value[name] for value in values]) for name in values[0]}
    found = statistics.median(values)
    return round(found, 4) if isinstance(values[0], float) else int(found)


@click.command()
@click.argument("name")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--rounds", default=3, help="Processes for each form.")
@click.option("--only", multiple=True, type=click.Choice(list(FORMS)), help="Forms to measure.  [default: all]")
@click.option("--child", "as_child", nargs=2, type=str, hidden=True)
def main(name: str, bundle: Path, rounds: int, only: tuple[str, ...], as_child: tuple[str, str]) -> None:
    """Measure the forms of one bundle and write the results."""
    if as_child:
        print(json.dumps(child(as_child[0], str(bundle), Path(as_child[1]))))
        return
    runs: dict[str, list[Any]] = {form: [] for form in only or FORMS}
    with tempfile.TemporaryDirectory(dir=bundle.parent) as work:
        folders = {form: Path(work, form.replace(" ", "-")) for form in runs}
        for form, folder in folders.items():
            prepare(folder, bundle)
            if form in SAVING:
                in_child(form, bundle, folder)
        for _ in range(rounds):
            for form, folder in folders.items():
                runs[form].append(in_child(form, bundle, folder))
                click.echo(f"{form}: {runs[form][-1]}")
        found = {form: middle(values) | {"saved_bytes": saved_bytes(folders[form])} for form, values in runs.items()}
    setting = {"threads": THREADS, "context": CONTEXT, "prompt": PROMPT, "tokens": TOKENS, "rounds": rounds}
    disk = sum(path.stat().st_size for path in bundle.iterdir() if path.is_file())
    print(write_results(f"load-memory-{name}", setting | {"limits": LIMITS, "disk": disk, "forms": found}))


def in_child(form: str, bundle: Path, folder: Path) -> dict[str, Any]:
    """Return the figures of one form, measured in a process of its own."""
    command = [sys.executable, __file__, "-", str(bundle), "--child", form, str(folder)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode:
        raise SystemExit(f"{form}: {run.stderr.strip().splitlines()[-1]}")
    found: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return found


def prepare(folder: Path, bundle: Path) -> None:
    """Make a folder in which saved graphs find the bundle's data files beside them."""
    if not folder.exists():
        folder.mkdir(parents=True)
        for path in bundle.glob("*.data"):
            (folder / path.name).hardlink_to(path)


def saved_bytes(folder: Path) -> int:
    """Bytes of what a form saved beside the bundle."""
    return sum(path.stat().st_size for path in folder.iterdir() if path.suffix != ".data" and path.is_file())


if __name__ == "__main__":
    main()
