"""What int8 does to a vision tower: the embeddings of photographs and synthetic documents, speed and size.

    python benchmarks/int8_vision.py quality CHECKPOINT     -> results/int8-vision-quality-NAME.json
    python benchmarks/int8_vision.py speed CHECKPOINT       -> results/int8-vision-speed-NAME.json
    python benchmarks/int8_vision.py cost CHECKPOINT        -> results/int8-vision-cost-NAME.json

quality: each way of calibrating, with and without SmoothQuant and fallback, quantizes CHECKPOINT with the built-in set,
exports it and compares its image embeddings, computed by ONNX Runtime, with those of the float bundle. Photographs are
those of scikit-image, documents are drawn with words, fonts and seeds that calibration does not see. Last come towers
that compute the same with some channels much larger than others, which is what SmoothQuant is for.
speed, cost: of running and of quantizing, for checkpoints in published shapes whose weights may be random. Both graphs
run in turn, one tile at a time.
"""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import torch
from record import run_measured, write_results
from safetensors.torch import load_file, save_file

from internvl_edge.bundle.names import VISION
from internvl_edge.calibration import DataOptions, choose_compute
from internvl_edge.calibration.synthetic import sample
from internvl_edge.checkpoint.reader import Checkpoint
from internvl_edge.export import export_bundle
from internvl_edge.export.builder import Types
from internvl_edge.export.exporter import DTYPES
from internvl_edge.export.vision import build_vision
from internvl_edge.export.weights import WeightFile
from internvl_edge.model.config import ModelConfig
from internvl_edge.model.preprocess import load_image, tile_image
from internvl_edge.quantize import VisionReport, quantize_checkpoint
from internvl_edge.recipe.recipe import CALIBRATORS, Recipe, VisionInt8

PHOTOGRAPHS = (
    *("astronaut.png", "brick.png", "camera.png", "cell.png", "chelsea.png", "clock_motion.png", "coffee.png"),
    *("coins.png", "grass.png", "gravel.png", "hubble_deep_field.jpg", "ihc.png", "microaneurysms.png", "moon.png"),
    *("motorcycle_left.png", "motorcycle_right.png", "page.png", "retina.jpg", "rocket.jpg", "text.png"),
)
DOCUMENTS = 60
CALIBRATION_SAMPLES = 48
MAX_TILES = 4
# The errors of the linears are measured, but none is so large that a linear stays float.
MEASURED = 0.5
THREADS = 2
REPEAT = 9


def recipes() -> Iterator[tuple[str, VisionInt8]]:
    """Every calibrator with and without smoothing, all linears int8; then what falling back to floats is worth."""
    for smoothing in (True, False):
        for calibrator in CALIBRATORS:
            yield calibrator, VisionInt8(calibrator, smoothing, cosine=MEASURED)
    yield "best, fc2 of the tower in floats", VisionInt8(cosine=MEASURED, keep=("vision.*.fc2",))
    for cosine in (0.9995, 0.9997, 0.9998):
        yield f"best, floats where {cosine} needs them", VisionInt8(cosine=cosine)


def quality(checkpoint: Path, work: Path) -> dict[str, Any]:
    """All recipes on one checkpoint in the remote-code layout, one safetensors file."""
    torch.set_num_threads(1)  # small towers: threads cost more at their barriers than they save
    config = Checkpoint(checkpoint).config
    sets = {"photographs": photographs(config), "documents": documents(config)}
    expected = {name: embeddings(checkpoint, work / "float", tiles) for name, tiles in sets.items()}
    rows = [compare(name, how, checkpoint, sets, expected, work) for name, how in recipes()]
    hard = with_outliers(checkpoint, work / "outliers")
    rows += [
        compare(f"{name}, tower with outlier channels", how, hard, sets, expected, work)
        for name, how in recipes()
        if how in (VisionInt8(cosine=MEASURED), VisionInt8(smoothing=False, cosine=MEASURED))
    ]
    counts = {f"{name}_tiles": len(tiles) for name, tiles in sets.items()}
    return {"checkpoint": checkpoint.name, "images": len(PHOTOGRAPHS), **counts, "rows": rows}


def compare(
    name: str,
    how: VisionInt8,
    checkpoint: Path,
    sets: dict[str, np.ndarray],
    expected: dict[str, np.ndarray],
    work: Path,
) -> dict[str, Any]:
    """One recipe's row: what became of the embeddings of each set of tiles."""
    started = time.perf_counter()
    report = quantize(checkpoint, work / "int8", how)
    seconds = time.perf_counter() - started
    found = {key: embeddings(work / "int8", work / "bundle", tiles) for key, tiles in sets.items()}
    shutil.rmtree(work / "int8")
    shutil.rmtree(work / "bundle")
    row = {
        "name": name,
        "recipe": asdict(how),
        "seconds": round(seconds, 1),
        "predicted_cosine": report.predicted_cosine,
        "calibration_cosine": report.cosine,
        "floats": report.floats,
        **{key: agreement(expected[key], found[key]) for key in sets},
        "layers": asdict(report)["layers"] if how == VisionInt8(cosine=MEASURED) else None,
    }
    print(name, how.smoothing, {key: row[key] for key in sets}, len(report.floats), flush=True)
    return row


def with_outliers(checkpoint: Path, out: Path) -> Path:
    """The same function with channels as large towers have them: one in 48 behind each norm is 64 times as large, and
    the weights that take it are 64 times smaller; both exact in every float type."""
    shutil.copytree(checkpoint, out)
    tensors = load_file(checkpoint / "model.safetensors")
    for norm, linear in (("norm1", "attn.qkv"), ("norm2", "mlp.fc1")):
        for name in [name for name in tensors if f".{norm}." in name]:
            tensors[name][::48] *= 64
            if name.endswith(".weight"):
                tensors[name.replace(f".{norm}.", f".{linear}.")][:, ::48] /= 64
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


def quantize(checkpoint: Path, out: Path, how: VisionInt8, samples: int = CALIBRATION_SAMPLES) -> VisionReport:
    """The tower alone, with the built-in calibration set, computed in float32."""
    recipe = Recipe("fp", vision="int8", vision_int8=how)
    compute = choose_compute("cpu", "float32")
    report = quantize_checkpoint(
        checkpoint, out, recipe, data=DataOptions(samples=samples, max_tiles=MAX_TILES), compute=compute
    )
    assert report.vision is not None
    return report.vision


def photographs(config: ModelConfig) -> np.ndarray:
    """Tiles of scikit-image's pictures."""
    import skimage

    folder = Path(skimage.__file__).parent / "data"
    return np.concatenate([tiles_of(folder / name, config) for name in PHOTOGRAPHS])


def documents(config: ModelConfig) -> np.ndarray:
    """Tiles of drawn pictures."""
    return np.concatenate([tiles_of(sample("test", index, seed=1).image, config) for index in range(DOCUMENTS)])


def tiles_of(image: Any, config: ModelConfig) -> np.ndarray:
    """uint8 [tiles, S, S, 3] of one picture."""
    return tile_image(
        load_image(image),
        image_size=config.vision.image_size,
        max_tiles=MAX_TILES,
        min_tiles=config.min_tiles,
        use_thumbnail=config.use_thumbnail,
    )


def embeddings(checkpoint: Path, bundle: Path, tiles: np.ndarray) -> np.ndarray:
    """[tiles, tokens, hidden] float32, exported where it is not yet."""
    if not bundle.exists():
        export_bundle(checkpoint, bundle, "float32")
    session = vision_session(bundle, 1)
    return np.concatenate([session.run(None, {"pixels": tiles[i : i + 8]})[0] for i in range(0, len(tiles), 8)])


def vision_session(bundle: Path, threads: int) -> onnxruntime.InferenceSession:
    """ONNX Runtime on the CPU."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(str(bundle / VISION), options, providers=["CPUExecutionProvider"])


def agreement(expected: np.ndarray, found: np.ndarray) -> dict[str, float]:
    """Cosines of whole tiles and of single image tokens, and the relative error."""
    a, b = expected.astype(np.float64), found.astype(np.float64)

    def cosine(axes: tuple[int, ...]) -> np.ndarray:
        return (a * b).sum(axes) / np.sqrt(np.square(a).sum(axes) * np.square(b).sum(axes))

    tiles, tokens = cosine((1, 2)), cosine((2,))
    return {
        "tile_mean": float(tiles.mean()),
        "tile_min": float(tiles.min()),
        "token_mean": float(tokens.mean()),
        "token_1_percent": float(np.quantile(tokens, 0.01)),
        "relative_error": float(np.linalg.norm(b - a) / np.linalg.norm(a)),
    }


def speed(checkpoint: Path, work: Path) -> dict[str, Any]:
    """Milliseconds per tile and bytes of the vision graph with float32 and int8 weights; float16 for its size."""
    maker = Path(__file__).with_name("int8_tower.py")
    subprocess.run([sys.executable, str(maker), str(checkpoint), str(work / "int8")], check=True)
    sources = {"float32": (checkpoint, "float32"), "float16": (checkpoint, "float16")}
    sources["int8"] = (work / "int8", "float16")
    sizes = {name: write_vision(source, work / f"{name}-graph", dtype) for name, (source, dtype) in sources.items()}
    sessions = {name: vision_session(work / f"{name}-graph", THREADS) for name in ("float32", "int8")}
    size = Checkpoint(checkpoint).config.vision.image_size
    tile = np.random.default_rng(0).integers(0, 256, (1, size, size, 3), np.uint8)
    times: dict[str, list[float]] = {name: [] for name in sessions}
    for turn in range(REPEAT + 1):
        for name, session in sessions.items():
            started = time.perf_counter()
            session.run(None, {"pixels": tile})
            if turn:  # the first warms up
                times[name].append(1000 * (time.perf_counter() - started))
    ratios = [a / b for a, b in zip(times["float32"], times["int8"], strict=True)]
    return {
        "checkpoint": checkpoint.name,
        "threads": THREADS,
        "ms_per_tile": {name: {"median": statistics.median(t), "best": min(t)} for name, t in times.items()},
        "float32_over_int8": {"median": statistics.median(ratios), "each": [round(ratio, 2) for ratio in ratios]},
        "vision_bytes": sizes,
    }


def write_vision(checkpoint: Path, out: Path, dtype: str) -> int:
    """The vision graph alone; its size in bytes."""
    out.mkdir()
    file = WeightFile("vision.data")
    types = Types(DTYPES[dtype], DTYPES["float32"])
    ir.save(build_vision(Checkpoint(checkpoint), types, file), out / VISION)
    file.write(out, lambda size: None)
    return sum(path.stat().st_size for path in out.iterdir())


def cost(checkpoint: Path, work: Path) -> dict[str, Any]:
    """Time and memory of quantizing a tower with few tiles."""
    command = [sys.executable, "-c", "from internvl_edge.cli import main; main()", "quantize", str(checkpoint)]
    options = ["--vision", "int8", "--samples", "8", "--max-tiles", "1", "--json", "-o", str(work / "int8")]
    run = run_measured([*command, *options])
    return {
        "checkpoint": checkpoint.name,
        "tiles": json.loads(run.stdout)["vision"]["tiles"],
        "wall_s": round(run.wall_s, 1),
        "cpu_s": round(run.cpu_s, 1),
        "peak_anonymous_bytes": run.peak_anonymous,
    }


_COMMANDS = {"quality": quality, "speed": speed, "cost": cost}


def main() -> None:
    """Command line."""
    if len(sys.argv) != 3 or sys.argv[1] not in _COMMANDS:
        sys.exit(__doc__)
    checkpoint = Path(sys.argv[2])
    with tempfile.TemporaryDirectory() as folder:
        values = _COMMANDS[sys.argv[1]](checkpoint, Path(folder))
    print(write_results(f"int8-vision-{sys.argv[1]}-{checkpoint.resolve().name}", values))


if __name__ == "__main__":
    main()
