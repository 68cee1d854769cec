"""One row of the GPU acceptance run: an engine on a bundle, compared with the CPU engine and timed.

    python benchmarks/gpu_rows.py ENGINE BUNDLE [REFERENCE]

ENGINE is tensorrt_rtx, tensorrt, onnxruntime (with CUDA, on a bundle that computes in float16), or
torch-TYPE[-decomposed]: the graphs for TensorRT interpreted in torch, TYPE is bfloat16 or float16. REFERENCE is the
bundle for the CPU engine [default: BUNDLE].

Prints one JSON object. A process of its own, so that a crash of a driver or a library costs one row. Prompts are random
embeddings and tiles random pixels, drawn from a fixed seed. `judge` says whether a row agrees with the CPU.
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

from internvl_edge.base.errors import EdgeError, EngineError
from internvl_edge.base.extras import requires
from internvl_edge.bundle.bundle import Bundle
from internvl_edge.planning.devices import Target
from internvl_edge.planning.footprint import Footprint
from internvl_edge.planning.storage import bundle_storage
from internvl_edge.runtime.engines import Engine
from internvl_edge.runtime.engines.device import require_cuda
from internvl_edge.runtime.engines.onnxruntime import OnnxRuntimeEngine
from internvl_edge.runtime.engines.tensorrt.cuda import Cuda
from internvl_edge.runtime.engines.tensorrt.engine import TensorRTEngine

CAPACITY = 4096
PROMPT, DEPTHS, TILES = 1800, (300, 2000), 7
# What is compared: prompts of one step, and of several with the last one padded; decoding beyond the first window, from
# one window to the next (at 1536 and 1792 tokens), and an answer that each engine continues with its own tokens.
SHORT, LONG = "", "@long"
CASES = {SHORT: (64, 16), LONG: (1500, 48), "@longer": (1777, 24)}
ANSWER, SHORT_PROMPT = 128, 200
# 16-bit numbers against float32 on the CPU; a wrong position, mask or weight is far below.
LEAST_COSINE = 0.99
# How much worse a long prompt may be than a short one: errors of attention over many slots show here first.
MOST_DRIFT = 20
# The logit of another token than the CPU's may be so near to the CPU's best, in standard deviations of the logits.
MOST_GAP = 0.15
REPEATS, STEPS = 3, 64
COPIED = 1 << 30


def main() -> None:
    """Measure and print; a refusal is a row too, with its message."""
    name, folder = sys.argv[1], Path(sys.argv[2])
    reference = Path(sys.argv[3]) if len(sys.argv) > 3 else folder
    row: dict[str, Any] = {"engine": name}
    try:
        measured = interpreted if name.startswith("torch-") else measure
        row |= measured(name, Bundle.open(folder), Bundle.open(reference))
    except EdgeError as error:
        row["refused"] = str(error)
    if "finite" in row:
        row["verdict"] = judge(row)
    print(json.dumps(row))


def measure(name: str, bundle: Bundle, reference: Bundle) -> dict[str, Any]:
    """Parity, speed, memory and the share of the copy bandwidth."""
    cuda = Cuda()
    bandwidth = copy_bandwidth(cuda)
    free = cuda.call("cudaMemGetInfo")
    started = time.perf_counter()
    engine = open_engine(name, bundle, cuda.compute_capability())
    row: dict[str, Any] = {"load_s": round(time.perf_counter() - started, 1), "copy_gbs": round(bandwidth / 1e9, 1)}
    row |= parity(engine, reference)
    row |= speed(engine, bundle, bandwidth)
    row["memory_mb"] = round((free - cuda.call("cudaMemGetInfo")) / 1e6)
    return row


def interpreted(name: str, bundle: Bundle, reference: Bundle) -> dict[str, Any]:
    """Parity of the graphs for TensorRT in torch, on the GPU where torch finds one."""
    with requires("quantize", "the graphs in torch", EngineError):
        import torch
    from torch_engine import TorchEngine

    _, dtype, *form = name.split("-")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    engine: Any = TorchEngine(bundle, dtype, form == ["decomposed"], device, CAPACITY)
    return {"device": device, **parity(engine, reference)}


def open_engine(name: str, bundle: Bundle, sm: int) -> Engine:
    """The engine on the present GPU; TensorRT's are built first."""
    if name == "onnxruntime":
        require_cuda(bundle)
        return OnnxRuntimeEngine(bundle, device="cuda", capacity=CAPACITY)
    from internvl_edge.compiler.bundle_engines import build_engines, options_for

    target = Target("acceptance", "this GPU", name, (f"{sm // 10}.{sm % 10}",))
    build_engines(bundle, target, options_for(target, capacity=CAPACITY), check=False)  # `parity` compares more
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
        cuda.synchronize(stream)
        best = max(best, 4 * 2 * COPIED / (time.perf_counter() - started))
    cuda.close()
    return best


def parity(engine: Engine, bundle: Bundle) -> dict[str, Any]:
    """How near an engine's numbers are to the CPU engine's.

    In each of `CASES`, both get the same embeddings at every step: nothing follows from an earlier difference but
    through the cache. `same_token` is the share of steps with the same best token. In the answer each engine continues
    with its own tokens; `greedy_same` of them are the same, and `greedy_gap` is how far the CPU's logits put the first
    other one below the best, in standard deviations.
    """
    cpu = OnnxRuntimeEngine(bundle, capacity=CAPACITY)
    random, width = np.random.default_rng(1), bundle.manifest.model.decoder.hidden_size
    size = bundle.manifest.model.vision.image_size
    pixels = random.integers(0, 256, (TILES, size, size, 3), np.uint8)
    found, expected = engine.encode(pixels), cpu.encode(pixels)
    row: dict[str, Any] = {"vision_cosine": round(min(map(_cosine, found, expected)), 6)}
    finite = [np.isfinite(found).all()]
    for name, (prompt, steps) in CASES.items():
        embeds = (0.02 * random.standard_normal((prompt + steps, width))).astype(np.float32)
        mine, theirs = (_follow(each, embeds, prompt) for each in (engine, cpu))
        row[f"logits_cosine{name}"] = round(min(map(_cosine, mine, theirs)), 6)
        row[f"same_token{name}"] = round(float((mine.argmax(axis=1) == theirs.argmax(axis=1)).mean()), 3)
        finite.append(np.isfinite(mine).all())
    table = bundle.embeddings()
    prompt = (0.02 * random.standard_normal((SHORT_PROMPT, width))).astype(np.float32)
    row |= _greedy(engine, cpu, prompt, table)
    return row | {"finite": bool(all(finite))}


def judge(row: dict[str, Any]) -> str:
    """Say "agrees", or what does not."""
    if not row["finite"]:
        return "numbers that are not finite"
    for name, value in row.items():
        if "cosine" in name and not value >= LEAST_COSINE:
            return f"{name} is {value}, expected {LEAST_COSINE} or more"
    short = max(1 - row[f"logits_cosine{SHORT}"], 1e-5)
    for name in CASES:
        if (drift := (1 - row[f"logits_cosine{name}"]) / short) > MOST_DRIFT:
            return f"logits{name} are {drift:.0f} times as far from the CPU's as those of a short prompt"
    if row["greedy_gap"] > MOST_GAP:
        return f"a token of the answer is {row['greedy_gap']} standard deviations below the CPU's best"
    return "agrees"


def _follow(engine: Engine, embeds: np.ndarray[Any, Any], prompt: int) -> np.ndarray[Any, Any]:
    """Logits [1 + steps, vocab] after a prompt and each later embedding."""
    engine.cache.reset()
    logits = [engine.prefill(embeds[:prompt]).copy()]
    return np.stack(logits + [engine.decode(embed).copy() for embed in embeds[prompt:]])


def _greedy(engine: Engine, cpu: Engine, prompt: np.ndarray[Any, Any], table: Any) -> dict[str, Any]:
    """Continue a prompt greedily on both until they take other tokens."""
    logits = []
    for each in (engine, cpu):
        each.cache.reset()
        logits.append(each.prefill(prompt).copy())
    for same in range(ANSWER):
        mine, theirs = int(logits[0].argmax()), int(logits[1].argmax())
        if mine != theirs:
            gap = float(logits[1][theirs] - logits[1][mine]) / float(logits[1].std())
            return {"greedy_same": same, "greedy_gap": round(gap, 4)}
        logits = [each.decode(table[mine]).copy() for each in (engine, cpu)]
    return {"greedy_same": ANSWER, "greedy_gap": 0.0}


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
