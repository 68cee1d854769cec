"""Does emitting MatMulNBits directly pay? Load time, memory, speed and size beside the portable DequantizeLinear form.

    python benchmarks/settled/quantized_load.py WORK [--variant 1B] [--layers 4]

WORK receives a random symmetric int4 checkpoint with an int8 head, its bundle, and the same decoder with the standard
dialect's form of the weights, which ONNX Runtime rewrites at load. Random weights: nothing here says anything about
quality.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import _path  # noqa: F401
import numpy as np
from checkpoint_variants import VARIANTS
from random_checkpoint import write
from record import run_measured, write_results

INT4_GROUP = 128
DECODED = 64
PROMPT = 512
BODY = re.compile(r"language_model\..*layers\..*(_proj|wqkv|wo|w[123])$")
HEAD = re.compile(r"language_model\.(lm_head|output)$")


def main() -> None:
    """Measure and write `results/quantized-load-VARIANT-LAYERS.json`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("--variant", default="1B", choices=VARIANTS)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--child", choices=("load", "speed"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child = _load if arguments.child == "load" else _speed
        print(json.dumps(child(arguments.work, arguments.threads)))
        return
    bundle = _prepare(arguments.work, arguments.variant, arguments.layers)
    forms = {"DequantizeLinear": _portable(bundle, arguments.work), "MatMulNBits": bundle}
    figures: dict[str, Any] = {}
    loads: dict[str, list[Any]] = {form: [] for form in forms}
    for _ in range(arguments.repeat):  # in turns, so that other work on the machine meets both alike
        for form, folder in forms.items():
            loads[form].append(_child(folder, "load", arguments.threads))
    for form, folder in forms.items():
        figures[form] = {
            "load_s": round(statistics.median(run["load_s"] for run in loads[form]), 3),
            "load_cpu_s": round(statistics.median(run["load_cpu_s"] for run in loads[form]), 3),
            "load_s_all": [round(run["load_s"], 3) for run in loads[form]],
            "anonymous_after_load": round(statistics.median(run["anonymous"] for run in loads[form])),
            "peak_anonymous": round(statistics.median(run["peak_anonymous"] for run in loads[form])),
            "weights_bytes": _weights_bytes(folder),
        } | _child(folder, "speed", arguments.threads)
    values = {"variant": arguments.variant, "layers": arguments.layers, "threads": arguments.threads, "forms": figures}
    path = write_results(f"quantized-load-{arguments.variant}-{arguments.layers}", values)
    print(path.read_text())


def _weights_bytes(folder: Path) -> int:
    """Bytes of the external weights that the onnxruntime decoder refers to."""
    import onnx

    from internvl_edge.bundle.names import DECODERS

    graph = onnx.load(folder / DECODERS["onnxruntime"], load_external_data=False).graph
    return sum(
        int(next(entry.value for entry in tensor.external_data if entry.key == "length"))
        for tensor in graph.initializer
        if tensor.external_data
    )


def _child(folder: Path, what: str, threads: int) -> dict[str, Any]:
    run = run_measured([sys.executable, __file__, str(folder), "--child", what, "--threads", str(threads)])
    values: dict[str, Any] = json.loads(run.stdout)
    return values | {"peak_anonymous": run.peak_anonymous} if what == "load" else values


def _prepare(work: Path, variant: str, layers: int) -> Path:
    """A bundle of random integers in the variant's shapes, as many layers of both towers as asked for."""
    from internvl_edge import export_bundle

    if not (work / "float").is_dir():
        chosen = VARIANTS[variant]
        vision = replace(chosen.vision, layers=min(layers, chosen.vision.layers))
        write(replace(chosen, layers=min(layers, chosen.layers), vision=vision), work / "float")
        quantize_randomly(work / "float", work / "quantized")
    return export_bundle(work / "quantized", work / "bundle", dtype="float16", force=True)


def quantize_randomly(source: Path, out: Path) -> None:
    """Random symmetric int4 (groups of 128) in the decoder's layers and random int8 rows in its head."""
    import torch
    from safetensors.torch import load_file, save_file

    from internvl_edge.checkpoint.codecs import compressed_tensors
    from internvl_edge.model.linear import PackedLinear, Scheme

    body, head = Scheme(4, INT4_GROUP, symmetric=True), Scheme(8, None, symmetric=True)
    random = np.random.default_rng(0)
    out.mkdir()
    tensors: dict[str, torch.Tensor] = {}
    for shard in sorted(source.glob("*.safetensors")):
        for name, tensor in load_file(shard).items():
            module = name.removesuffix(".weight")
            if BODY.search(module):
                size, scale = tensor.shape, np.full((tensor.shape[0], tensor.shape[1] // INT4_GROUP), 1e-2, np.float32)
                linear = PackedLinear(random.integers(-8, 8, tuple(size), np.int8), scale, None, 4)
            elif HEAD.search(module):
                values = random.integers(-127, 128, tuple(tensor.shape), np.int8)
                linear = PackedLinear(values, np.full((len(values), 1), 1e-3, np.float32), None, 8)
            else:
                tensors[name] = tensor
                continue
            packed = compressed_tensors.pack(linear)
            tensors |= {f"{module}.{last}": torch.from_numpy(array.copy()) for last, array in packed.items()}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    for path in source.iterdir():
        if path.suffix != ".safetensors" and not path.name.endswith("index.json"):
            (out / path.name).write_bytes(path.read_bytes())
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    targets = {body: ["re:.*layers.*"], head: [f"re:{HEAD.pattern}"]}
    config["quantization_config"] = compressed_tensors.configuration(targets, [])
    (out / "config.json").write_text(json.dumps(config), encoding="utf-8")


def _portable(bundle: Path, work: Path) -> Path:
    """The same bundle, its onnxruntime decoder with quantized weights as the standard dialect writes them."""
    import onnx_ir as ir

    from internvl_edge.bundle.names import DECODERS
    from internvl_edge.checkpoint.reader import Checkpoint
    from internvl_edge.export.builder import Types
    from internvl_edge.export.decoder import build_decoder
    from internvl_edge.export.quantized import PackedWeights
    from internvl_edge.export.weights import WeightFile

    class Portable(PackedWeights):
        def matmul(self, g: Any, x: Any, name: str, dialect: str) -> Any:
            return super().matmul(g, x, name, "standard")

    out = work / "portable"
    out.mkdir(exist_ok=True)
    for path in bundle.iterdir():
        if not path.name.startswith("decoder") and not (out / path.name).exists():
            (out / path.name).symlink_to(path.resolve())
    checkpoint = Checkpoint(work / "quantized")
    types, file = Types(ir.DataType.FLOAT16, ir.DataType.FLOAT), WeightFile("decoder.data")
    ir.save(
        build_decoder(checkpoint, types, "onnxruntime", file, Portable(checkpoint, types)),
        out / DECODERS["onnxruntime"],
    )
    file.write(out, lambda size: None)
    return out


def _options(threads: int) -> Any:
    import onnxruntime

    from internvl_edge.runtime.engines import onnxruntime as engine

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    for key, value in engine._CONFIG.items():
        options.add_session_config_entry(key, value)
    return options


def _load(folder: Path, threads: int) -> dict[str, Any]:
    import onnxruntime

    from internvl_edge.bundle.names import DECODERS

    options, started, cpu = _options(threads), time.perf_counter(), time.process_time()
    session = onnxruntime.InferenceSession(
        str(folder / DECODERS["onnxruntime"]), options, providers=["CPUExecutionProvider"]
    )
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    status = Path(f"/proc/{os.getpid()}/status").read_text(encoding="ascii")
    anonymous = int(re.search(r"RssAnon:\s+(\d+)", status)[1]) * 1024  # type: ignore[index]
    return {"load_s": seconds, "load_cpu_s": cpu, "anonymous": anonymous, "inputs": len(session.get_inputs())}


def _speed(folder: Path, threads: int) -> dict[str, Any]:
    from internvl_edge.bundle.bundle import Bundle
    from internvl_edge.bundle.manifest import Manifest
    from internvl_edge.runtime.engines.onnxruntime import OnnxRuntimeEngine

    engine = OnnxRuntimeEngine(Bundle(folder, Manifest.read(folder)), capacity=2048, threads=threads)
    hidden = engine._decoder.hidden_size
    embeds = np.random.default_rng(0).standard_normal((PROMPT, hidden)).astype(np.float32) * 0.05
    prefill, decode = [], []
    for _ in range(3):
        engine.cache.reset()
        started = time.perf_counter()
        engine.prefill(embeds)
        prefill.append(time.perf_counter() - started)
        started = time.perf_counter()
        for row in embeds[:DECODED]:
            engine.decode(row)
        decode.append(time.perf_counter() - started)
    return {
        f"prefill_{PROMPT}_tokens_per_s": round(PROMPT / min(prefill), 1),
        "decode_tokens_per_s": round(DECODED / min(decode), 1),
    }


if __name__ == "__main__":
    main()
