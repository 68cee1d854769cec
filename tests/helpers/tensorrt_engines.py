"""Fake TensorRT engines: a folder as a build leaves it, and the engine's host side over the fake GPU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from helpers.fake_gpu import FakeCuda, FakeTensorRT
from internvl_edge.bundle.bundle import Bundle, sha256
from internvl_edge.compiler.bundle_engines import headers
from internvl_edge.compiler.bundle_engines import profiles as profiles_of
from internvl_edge.compiler.engine import Profile
from internvl_edge.runtime.engines.tensorrt.cuda import Cuda
from internvl_edge.runtime.engines.tensorrt.engine import TensorRTEngine
from internvl_edge.runtime.engines.tensorrt.flavour import Flavour, make_log
from internvl_edge.runtime.engines.tensorrt.record import (
    ENGINES,
    BuildOptions,
    EngineRecord,
    engine_folder,
    graph_inputs,
)

CAPACITY = 96
FLAVOURS = {"tensorrt": "10.16.1", "tensorrt_rtx": "1.7.1"}
OLD = "10.3.0"


def write_engines(
    bundle: Bundle,
    flavour: str,
    profiles: int = 1,
    capacity: int = CAPACITY,
    chunk: int = 16,
    rows: int = 1,
    **changes: Any,
) -> EngineRecord:
    """Write a folder as `build` would leave it, with headers in place of engines."""
    options = BuildOptions("float16", capacity=capacity, chunk=chunk, kept=3, tiles=2, profiles=profiles, rows=rows)
    folder = engine_folder(bundle, "fake")
    folder.mkdir(parents=True, exist_ok=True)
    for graph, (header, _) in headers(bundle, options, decomposed=FLAVOURS[flavour] == OLD).items():
        (folder / ENGINES[graph]).write_bytes(header)
    files = {
        name: {"bytes": (folder / name).stat().st_size, "sha256": sha256(folder / name)} for name in ENGINES.values()
    }
    record = EngineRecord("fake", flavour, FLAVOURS[flavour], (86,), options, graph_inputs(bundle), files)
    record = replace(record, **changes)
    record.write(folder)
    for kept in folder.glob("*.cache"):
        kept.unlink()
    return record


def ranges_of(bundle: Bundle) -> dict[str, tuple[Profile, ...]]:
    """The optimization profiles of the engines in a folder that `write_engines` wrote."""
    model, options = bundle.manifest.model, EngineRecord.read(engine_folder(bundle, "fake")).options
    return {graph: profiles_of(model, options, graph) for graph in ENGINES}


def open_engine(
    bundle: Bundle, cuda: FakeCuda, flavour: str = "tensorrt", profiles: int = 1, **options: Any
) -> tuple[TensorRTEngine, FakeTensorRT]:
    """Open the engines of `write_engines` over a fake GPU, without warming up unless the options say so."""
    api = FakeTensorRT(cuda, bundle.folder, FLAVOURS[flavour], profiles, ranges_of(bundle))
    options = {"warm": False} | options
    return TensorRTEngine(bundle, cuda=Cuda(cuda), flavour=Flavour(flavour, api, make_log(api)), **options), api
