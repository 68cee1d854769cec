"""A 1B in its real shapes becomes engines for RTX 30, 40 and 50 cards, without a GPU: what only its size can break.

Random weights: builders look at shapes and types. Needs 9 GB of disk and 8 GB of memory for some minutes.
"""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers.parsed_networks import layer_types, layers
from helpers.repository import REPOSITORY
from internvl_edge import export_bundle
from internvl_edge.bundle.bundle import Bundle
from internvl_edge.checkpoint.reader import Checkpoint
from internvl_edge.compiler.bundle_engines import headers, options_for, profiles
from internvl_edge.compiler.compiled import compiled_programs
from internvl_edge.compiler.engine import Build, Built, build_engine
from internvl_edge.compiler.network import parsed_network
from internvl_edge.planning.devices import Devices
from internvl_edge.planning.programs import Programs
from internvl_edge.runtime.engines.tensorrt.flavour import load_flavour

pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed (pip install tensorrt-rtx-cu13)")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.disk_usage("/tmp").free < 12e9, reason="less than 12 GB of disk are free"),
    pytest.mark.skipif(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") < 8e9, reason="less than 8 GB memory"),
]
BENCHMARKS = REPOSITORY / "benchmarks"
RTX = Devices().target("rtx")
LAYERS, PRODUCTS = 24, 7 * 24 + 1


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("full") / "1B"
    run("random_checkpoint.py", "1B", str(folder))
    yield folder
    shutil.rmtree(folder.parent)


def run(script: str, *arguments: str) -> None:
    subprocess.run([sys.executable, str(BENCHMARKS / script), *arguments], check=True, capture_output=True)


def quantized(checkpoint: Path, *options: str) -> Path:
    out = checkpoint.with_name("quantized")
    command = "from internvl_edge.cli import main; main()"
    arguments = ["quantize", str(checkpoint), "-o", str(out), "--group-size", "64", *options]
    subprocess.run([sys.executable, "-c", command, *arguments], check=True, capture_output=True)
    return out


def built(
    checkpoint: Path, folder: Path, graph: str, programs: Programs = Programs.ONE
) -> tuple[Built, Counter[str], Counter[str]]:
    """One engine of a checkpoint for all three generations: figures, layers, and the types that are dequantized.

    The engine file stays in the folder.
    """
    bundle = Bundle.open(export_bundle(checkpoint, folder / "bundle", "float16", dialects=["standard"]))
    options = options_for(RTX, profiles=int(programs))
    header, path = headers(bundle, options)[graph]
    flavour = load_flavour("tensorrt_rtx")
    with parsed_network(flavour, header, path) as (_, network):
        kinds = layer_types(network)
        stored = Counter(layer.get_input(0).dtype.name for layer in layers(network) if layer.type.name == "DEQUANTIZE")
    shapes = profiles(bundle.manifest.model, options, graph)
    build = Build(header, path, RTX.sms, shapes, folder / "engine")
    made = build_engine(flavour, build, lambda phase, done, total: None, threading.Event())
    shutil.rmtree(bundle.folder)
    return made, kinds, stored


@pytest.mark.parametrize("graph", ["vision", "decoder"])
def test_sixteen_bits(checkpoint: Path, tmp_path: Path, graph: str) -> None:
    made, kinds, stored = built(checkpoint, tmp_path, graph)
    assert kinds["ATTENTION_OUTPUT"] == LAYERS
    assert not stored
    weights = sum(
        size
        for name, size in weight_bytes(checkpoint).items()
        if name.startswith("decoder") == (graph == "decoder") and "embed_tokens" not in name
    )
    assert weights < made.bytes < 1.05 * weights


def weight_bytes(checkpoint: Path) -> dict[str, int]:
    return {name: 2 * math.prod(shape) for name, shape in Checkpoint(checkpoint).shapes.items()}


@pytest.mark.parametrize("form", ["symmetric", "with correction"])
def test_int4_decoder(checkpoint: Path, tmp_path: Path, form: str) -> None:
    symmetric = ["--symmetric", "--lm-head", "int8"] if form == "symmetric" else []
    folder = quantized(checkpoint, "--scheme", "w4a16-rtn", *symmetric)
    made, kinds, stored = built(folder, tmp_path, "decoder", Programs.WHOLE)
    shutil.rmtree(folder)
    assert kinds["ATTENTION_OUTPUT"] == LAYERS
    corrections = 0 if symmetric else PRODUCTS - 1
    assert kinds["MATRIX_MULTIPLY"] == PRODUCTS + corrections
    assert stored == ({"INT4": PRODUCTS - 1, "INT8": 1} if symmetric else {"INT4": PRODUCTS - 1})
    assert made.bytes < (0.40e9 if symmetric else 0.55e9)
    step, whole, prompt = compiled_programs(tmp_path / "engine")
    for program in (step, whole, prompt):
        assert sum(kernel.attends for kernel in program.kernels) == LAYERS
        assert program.unpacked == ()
    assert len(whole.kernels) < (12 if symmetric else 20) * LAYERS
    assert not whole.cache_rewrites
    assert len(step.cache_rewrites) == len(prompt.cache_rewrites) == 2 * LAYERS
    assert step.summary()["cache_transposes"] == 0
    assert whole.scratch < 0.1e9  # a head of floats in memory would be 0.27e9


def test_int8_vision(checkpoint: Path, tmp_path: Path) -> None:
    folder = checkpoint.with_name("int8")
    run("int8_tower.py", str(checkpoint), str(folder))
    made, kinds, stored = built(folder, tmp_path, "vision")
    shutil.rmtree(folder)
    assert kinds["ATTENTION_OUTPUT"] == LAYERS
    assert stored == {"INT8": 2 * 4 * LAYERS}
    assert made.bytes < 0.36e9
