"""Build one engine file from one graph: optimization profiles, limits, progress and interruption."""

from __future__ import annotations

import hashlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from internvl_edge.base.errors import EngineError
from internvl_edge.base.machine import peak_memory
from internvl_edge.runtime.engines.tensorrt.flavour import Flavour, last_error

from .network import parsed_network

Shape = tuple[int, ...]
# Input -> smallest, optimal and largest shape.
Profile = dict[str, tuple[Shape, Shape, Shape]]
# Called with a phase, the number of steps done, and the number of all its steps.
Report = Callable[[str, int, int], None]
# Bytes of device memory that a kernel may use as scratch, both while it is selected and while it runs.
WORKSPACE = 1 << 30


@dataclass(frozen=True)
class Built:
    """One engine file: its size in bytes, its SHA-256, its layers, and the seconds to build it.

    `peak_rss` is the peak RSS of the process so far, in bytes.
    """

    bytes: int
    sha256: str
    seconds: float
    peak_rss: int
    layers: int


@dataclass(frozen=True)
class Build:
    """What to build.

    `header` is the graph for TensorRT; `path` is the bundle's graph, which lies beside the weights. `sms` are the
    compute capabilities, such as 86 for 8.6, and `output` is the engine file.
    """

    header: bytes
    path: Path
    sms: tuple[int, ...]
    profiles: tuple[Profile, ...]
    output: Path
    timing_cache: Path | None = None


def build_engine(flavour: Flavour, build: Build, progress: Report, stop: threading.Event) -> Built:
    """Parse the graph, build the engine and write it.

    Raises:
        EngineError: the parser or the builder refuses; the message has its reason.
        KeyboardInterrupt: `stop` was set, and the build stopped between two steps.
    """
    started = time.perf_counter()
    with parsed_network(flavour, build.header, build.path) as (builder, network):
        config = builder.create_builder_config()
        config.set_memory_pool_limit(flavour.api.MemoryPoolType.WORKSPACE, WORKSPACE)
        flavour.set_compute_capabilities(config, build.sms)
        flavour.use_timing_cache(config, build.timing_cache)
        for profile in build.profiles:
            config.add_optimization_profile(_profile(builder, network, profile))
        monitor = make_monitor(
            flavour.api, progress, stop
        )  # the builder holds no reference, so this variable must stay alive
        config.progress_monitor = monitor
        plan = builder.build_serialized_network(network, config)
        if stop.is_set():
            raise KeyboardInterrupt
        if plan is None:
            raise EngineError(
                f"{flavour.name} {flavour.version} cannot build {build.path.name}: {last_error(flavour.log)}"
            )
        data = memoryview(plan)
        with build.output.open("wb") as file:
            file.write(data)
        if timings := flavour.timing_cache(config):
            assert build.timing_cache is not None
            build.timing_cache.write_bytes(timings)
        seconds, peak = time.perf_counter() - started, peak_memory()
        return Built(len(data), hashlib.sha256(data).hexdigest(), round(seconds, 2), peak, network.num_layers)


def make_monitor(api: Any, progress: Report, stop: threading.Event) -> Any:
    """Return a progress monitor for TensorRT: it reports the innermost phase, and stops a build once `stop` is set."""

    class Monitor(api.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            api.IProgressMonitor.__init__(self)
            self._steps: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self._steps[phase_name] = num_steps
            progress(phase_name, 0, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            progress(phase_name, step + 1, self._steps.get(phase_name, step + 1))
            return not stop.is_set()

        def phase_finish(self, phase_name: str) -> None:
            self._steps.pop(phase_name, None)

    return Monitor()


def _profile(builder: Any, network: Any, shapes: Profile) -> Any:
    profile = builder.create_optimization_profile()
    names = {network.get_input(index).name for index in range(network.num_inputs)}
    for name, (smallest, best, largest) in shapes.items():
        if name not in names:
            raise EngineError(f"the graph has no input {name}; export the bundle again")
        profile.set_shape(name, smallest, best, largest)
    return profile


@contextmanager
def interruptible() -> Iterator[threading.Event]:
    """Make Ctrl-C and SIGTERM set an event, which the builder checks between steps.

    An exception would not work: TensorRT loses exceptions from its callbacks. Signals can be handled only in the main
    thread; in other threads the event is never set.
    """
    stop = threading.Event()

    def note(number: int, frame: FrameType | None) -> None:
        stop.set()

    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    previous = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
