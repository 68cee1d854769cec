"""One row of the GPU acceptance run: an engine on a bundle, compared with the CPU engine and timed.

    python benchmarks/gpu_rows.py ENGINE BUNDLE         ENGINE: tensorrt_rtx, tensorrt or onnxruntime

Prints one JSON object. A process of its own, so that a crash of a driver or a library costs one row. Prompts are random
embeddings and tiles random pixels, drawn from a fixed seed.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from internvl_edge.base.errors import EdgeError
from internvl_edge.bundle.bundle import Bundle
from internvl_edge.planning.devices import Target
from internvl_edge.planning.footprint import Footprint
from internvl_edge.planning.storage import bundle_storage
from internvl_edge.runtime.engines import Engine
from internvl_edge.runtime.engines.onnxruntime import OnnxRuntimeEngine
from internvl_edge.runtime.engines.tensorrt.cuda import Cuda
from internvl_edge.runtime.engines.tensorrt.engine import TensorRTEngine

CAPACITY = 4096
PROMPT, DEPTHS, TILES = 1800, (300, 2000), 7
PARITY_PROMPT, PARITY_STEPS = 64, 16
REPEATS, STEPS = 3, 64
COPIED = 1 << 30


def main() -> None:
    """Measure and print; a refusal is a row too, with its message."""
    name, folder = sys.argv[1], Path(sys.argv[2])
    row: dict[str, Any] = {"engine": name}
    try:
        row |= measure(name, Bundle.open(folder))
    except EdgeError as error:
        row["refused"] = str(error)
    print(json.dumps(row))


def measure(name: str, bundle: Bundle) -> dict[str, Any]:
    """Parity, speed, memory and the share of the copy bandwidth."""
    cuda = Cuda()
    bandwidth = copy_bandwidth(cuda)
    free = cuda.call("cudaMemGetInfo")
    started = time.perf_counter()
    engine = open_engine(name, bundle, cuda.compute_capability())
    row: dict[str, Any] = {"load_s": round(time.perf_counter() - started, 1), "copy_gbs": round(bandwidth / 1e9, 1)}
    row |= parity(engine, bundle)
    row |= speed(engine, bundle, bandwidth)
    row["memory_mb"] = round((free - cuda.call("cudaMemGetInfo")) / 1e6)
    return row


def open_engine(name: str, bundle: Bundle, sm: int) -> Engine:
    """The engine on the present GPU; TensorRT's are built first."""
    if name == "onnxruntime":
        return OnnxRuntimeEngine(bundle, device="cuda", capacity=CAPACITY)
    from internvl_edge.runtime.engines.tensorrt.build.bundle_engines import build_engines, options_for

    target = Target("acceptance", "this GPU", name, (f"{sm // 10}.{sm % 10}",))
    build_engines(bundle, target, options_for(target, capacity=CAPACITY))
    return TensorRTEngine(bundle, "acceptance")


def copy_bandwidth(cuda: Cuda) -> float:
    """Bytes read and written per second by copies within the device's memory; the best of a few."""
    source, target = (cuda.device_memory(COPIED, "the bandwidth test") for _ in range(2))
    kind = cuda._runtime.cudaMemcpyKind.cudaMemcpyDeviceToDevice
    stream, best = cuda.stream(), 0.0
    for _ in range(5):
        started = time.perf_counter()
        for _ in range(4):
            cuda.call("cudaMemcpyAsync", target, source, COPIED, kind, stream)
        cuda.synchronise(stream)
        best = max(best, 4 * 2 * COPIED / (time.perf_counter() - started))
    cuda.close()
    return best


def parity(engine: Engine, bundle: Bundle) -> dict[str, Any]:
    """How near image tokens and logits are to the CPU engine's, and on how many steps the best token is the same.

    Both get the same embeddings at every step: nothing follows from an earlier difference but through the cache.
    """
    cpu = OnnxRuntimeEngine(bundle, capacity=CAPACITY)
    random, width = np.random.default_rng(1), bundle.manifest.model.decoder.hidden_size
    size = bundle.manifest.model.vision.image_size
    pixels = random.integers(0, 256, (1, size, size, 3), np.uint8)
    embeds = (0.02 * random.standard_normal((PARITY_PROMPT + PARITY_STEPS, width))).astype(np.float32)
    rows = []
    for each in (engine, cpu):
        logits = [each.prefill(embeds[:PARITY_PROMPT]).copy()]
        logits += [each.decode(embed).copy() for embed in embeds[PARITY_PROMPT:]]
        rows.append(np.stack(logits))
    same = float((rows[0].argmax(axis=1) == rows[1].argmax(axis=1)).mean())
    return {
        "vision_cosine": round(_cosine(engine.encode(pixels), cpu.encode(pixels)), 6),
        "logits_cosine": round(min(_cosine(a, b) for a, b in zip(*rows, strict=True)), 6),
        "same_token": round(same, 3),
        "finite": bool(np.isfinite(rows[0]).all()),
    }


def speed(engine: Engine, bundle: Bundle, bandwidth: float) -> dict[str, Any]:
    """Medians: vision in ms per tile, prefill and decoding in tokens/s, and decoding's share of the bandwidth."""
    model = bundle.manifest.model
    random, width, size = np.random.default_rng(2), model.decoder.hidden_size, model.vision.image_size
    pixels = random.integers(0, 256, (TILES, size, size, 3), np.uint8)
    embeds = (0.02 * random.standard_normal((PROMPT, width))).astype(np.float32)

    def prompt() -> None:
        engine.cache.reset()
        engine.prefill(embeds)

    row: dict[str, Any] = {
        "vision_ms_per_tile": round(1e3 * _seconds(lambda: engine.encode(pixels)) / TILES, 2),
        "prefill_tokens_per_s": round(PROMPT / _seconds(prompt)),
    }
    footprint = Footprint(model, bundle_storage(bundle.manifest))
    step = getattr(engine, "decode_token", engine.decode)
    for depth in DEPTHS:
        engine.cache.reset()
        for start in range(0, depth, PROMPT):
            engine.prefill(embeds[: min(PROMPT, depth - start)])

        def steps(depth: int = depth) -> None:
            engine.cache.reset(depth)
            for n in range(STEPS):
                step(embeds[n])

        seconds = _seconds(steps) / STEPS
        share = footprint.decode_bytes(depth + STEPS // 2) / seconds / bandwidth
        row |= {f"decode_tokens_per_s@{depth}": round(1 / seconds, 1), f"bandwidth_share@{depth}": round(share, 3)}
    return row


def _seconds(work: Callable[[], object]) -> float:
    """Median of a few runs after two that warm up: kernels are compiled and graphs captured then."""
    times = []
    for _ in range(2 + REPEATS):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return median(times[2:])


def _cosine(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> float:
    a, b = a.ravel().astype(np.float64), b.ravel().astype(np.float64)
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


if __name__ == "__main__":
    main()
