"""Build a bundle's TensorRT engines for several devices, each in its own process: time, memory, sizes, layers, kernels.

    python benchmarks/tensorrt_build.py BUNDLE NAME [--device rtx-3060 ...] [--dtype bfloat16] [--profiles 1] [--rows 1]

The kernels are those of the compiled programs in the engine files, one program per optimization profile.

Needs TensorRT for RTX, no GPU. Engines go to a scratch folder that links the bundle's files, and are removed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

from record import run_measured, write_results

from internvl_edge.base.jsonable import encode
from internvl_edge.bundle.bundle import Bundle
from internvl_edge.compiler.bundle_engines import headers, options_for
from internvl_edge.compiler.compiled import compiled_programs
from internvl_edge.compiler.network import parsed_network
from internvl_edge.planning.devices import Devices
from internvl_edge.runtime.engines.tensorrt.flavour import load_flavour

PROGRAM = [sys.executable, "-c", "from internvl_edge.cli import main; main()"]
# One card of each generation, and all in one file.
DEVICES = ("rtx-3060", "rtx-4060", "rtx-5090", "rtx")
TOLD = ("ATTENTION_OUTPUT", "KV_CACHE_UPDATE", "ROTARY_EMBEDDING", "MATRIX_MULTIPLY", "DEQUANTIZE", "QUANTIZE")


def main() -> None:
    """Build for each device and write `results/tensorrt-build-NAME.json`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("name")
    parser.add_argument("--device", action="append", help=f"default: {', '.join(DEVICES)}")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--profiles", help="optimization profiles of the decoder; default: that of build")
    parser.add_argument("--rows", type=int, default=1, help="rows of the KV cache; default: 1")
    arguments = parser.parse_args()
    bundle = Bundle.open(arguments.bundle)
    scratch = Path(tempfile.mkdtemp(dir=arguments.bundle.resolve().parent))
    try:
        for path in bundle.folder.iterdir():
            if path.is_file():
                os.link(path, scratch / path.name)
        extra = ["--profiles", arguments.profiles] if arguments.profiles else []
        extra += ["--rows", str(arguments.rows)]
        builds = [build(scratch, device, arguments.dtype, extra) for device in arguments.device or DEVICES]
    finally:
        shutil.rmtree(scratch)
    files = bundle.manifest.files
    figures = {
        "bundle": arguments.name,
        "stored": bundle.manifest.dtype,
        "quantization": encode(bundle.manifest.quantization),
        "dtype": arguments.dtype,
        "tensorrt_rtx": version("tensorrt-rtx-cu13"),
        "bundle_bytes": {name: files[name].bytes for name in ("vision.data", "decoder.data")},
        "rows": arguments.rows,
        "networks": networks(bundle, arguments.dtype, arguments.rows),
        "builds": builds,
    }
    print(write_results(f"tensorrt-build-{arguments.name}", figures))


def build(bundle: Path, device: str, dtype: str, extra: list[str]) -> dict[str, Any]:
    """One build in a process of its own."""
    command = [*PROGRAM, "build", str(bundle), "--device", device, "--dtype", dtype, *extra, "--force", "--json"]
    run = run_measured(command)
    made = json.loads(run.stdout)
    engines = {
        graph: {
            **figures,
            "bytes": made["files"][f"{graph}.engine"]["bytes"],
            "programs": programs(Path(made["engines"]) / f"{graph}.engine"),
        }
        for graph, figures in made["figures"].items()
    }
    shutil.rmtree(made["engines"])
    result = {
        "device": device,
        "compute_capabilities": made["compute_capabilities"],
        "profiles": made["options"]["profiles"],
        "engines": engines,
    }
    result |= {
        "wall_s": round(run.wall_s, 1),
        "cpu_s": round(run.cpu_s, 1),
        "peak_rss": run.peak_rss,
        "peak_anonymous": run.peak_anonymous,
    }
    print(json.dumps(result), flush=True)
    return result


def programs(engine: Path) -> list[dict[str, Any]]:
    """The counts of each compiled program, and its kernels by name."""
    return [program.summary() | {"names": dict(program.names())} for program in compiled_programs(engine)]


def networks(bundle: Bundle, dtype: str, rows: int) -> dict[str, Any]:
    """What TensorRT parsed: layers by type, and the element types of what products and attention put out."""
    target = Devices().target("rtx")
    found = {}
    for graph, (header, path) in headers(bundle, options_for(target, dtype, rows=rows)).items():
        with parsed_network(load_flavour(target.flavour), header, path) as (_, network):
            layers = [network.get_layer(index) for index in range(network.num_layers)]
            count = Counter(layer.type.name for layer in layers)
            outputs = Counter((layer.type.name, layer.get_output(0).dtype.name) for layer in layers)
            found[graph] = {
                "header_bytes": len(header),
                "layers": {kind: count[kind] for kind in TOLD if count[kind]},
                "product_types": {dtype: n for (kind, dtype), n in outputs.items() if kind == "MATRIX_MULTIPLY"},
                "float32_layers": {kind: n for kind in count if (n := outputs[kind, "FLOAT"])},
            }
    return found


if __name__ == "__main__":
    main()
