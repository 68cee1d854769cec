"""Whether OpenVINO's compiled graphs can be kept on disk: CPU seconds to load them, and whether their numbers stay.

    python benchmarks/settled/openvino_cache.py BUNDLE

Each row is one process, two threads, bfloat16: it loads one graph of the bundle and computes one tile, or two prompts
of 64 and 128 tokens, the second one behind 70 tokens. "fresh" compiles the graph; "CACHE_DIR" has OpenVINO keep it and
load it again; "exported" keeps it by `export_model` and maps it for `import_model`. "rotary written out" splits the
heads for the rotary embedding in a form that OpenVINO does not fuse. Equal means equal to the fresh graph of the same
form, to the bit. Results: results/openvino-cache.json.
"""

from __future__ import annotations

import hashlib
import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import _path  # noqa: F401  (makes `record` importable)
import numpy as np
from record import write_results

GRAPHS = ("vision.onnx", "decoder.onnxruntime.onnx", "prompts.onnx")
FORMS = ("as it is", "rotary written out")
KEPT = ("fresh", "CACHE_DIR", "exported")
PROPERTIES = {"INFERENCE_NUM_THREADS": 2, "NUM_STREAMS": 1, "INFERENCE_PRECISION_HINT": "bf16"}


def write_rotary_out(model: Any) -> None:
    """Cut the heads [batch, heads, seq, width] in two halves by a reshape instead of VariadicSplit."""
    from openvino import opset15 as ops

    for node in model.get_ordered_ops():
        if node.get_type_name() != "VariadicSplit":
            continue
        half = node.output(0).get_partial_shape()[3].get_length()
        halves = ops.reshape(node.input_value(0), np.array([0, 0, 0, 2, half]), special_zero=True)
        parts = ops.split(halves, np.array(3), 2)
        for index in range(2):
            part = ops.squeeze(parts.output(index), np.array([3]))
            for reader in node.output(index).get_target_inputs():
                reader.replace_source_output(part.output(0))
    model.validate_nodes_and_infer_types()


def child(path: Path, form: str, kept: str, folder: Path) -> dict[str, Any]:
    """Load the graph in one way, and return the cost and the digest of what it computes."""
    import openvino

    core, blob = openvino.Core(), folder / "exported.blob"
    properties = PROPERTIES | ({"CACHE_DIR": str(folder)} if kept == "CACHE_DIR" else {})
    started = time.process_time()
    if kept == "exported" and blob.exists():
        compiled = core.import_model(openvino.Tensor(np.memmap(blob, np.uint8, "r")), "CPU", properties)
    elif form == FORMS[0]:
        compiled = core.compile_model(str(path), "CPU", properties)
    else:
        model = core.read_model(path)
        write_rotary_out(model)
        compiled = core.compile_model(model, "CPU", properties)
    loaded = time.process_time() - started
    if kept == "exported" and not blob.exists():
        blob.write_bytes(compiled.export_model())
    digest, largest = computed(compiled)
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    memory = {name: int(line.split()[1]) * 1024 for line in lines for name in ("VmRSS", "RssAnon") if name in line}
    return {
        "cpu_s": round(loaded, 3),
        "resident": memory["VmRSS"],
        "anonymous": memory["RssAnon"],
        "digest": digest,
        "largest_number": largest if math.isfinite(largest) else "infinite",
    }


def computed(compiled: Any) -> tuple[str, float]:
    """A digest of the outputs for inputs that are always the same, and the largest number among them."""
    random, digest, largest = np.random.default_rng(0), hashlib.sha256(), 0.0
    request = compiled.create_infer_request()

    def filled(name: str, shape: Any, tokens: int, past: int) -> np.ndarray[Any, Any]:
        sizes = [dim.get_length() if dim.is_static else None for dim in shape]
        if name == "pixels":
            return random.integers(0, 256, (1, *sizes[1:]), np.uint8)
        if name in ("past_length", "logits_to_keep"):
            return np.array([past if name == "past_length" else 1])
        if name.startswith("past_key_values"):
            return random.standard_normal((1, sizes[1], past, sizes[3])).astype(np.float32)
        if name in ("cos", "sin"):
            angles = (past + np.arange(tokens))[:, None] / 10000 ** (np.arange(sizes[2]) / sizes[2])
            return np.asarray(getattr(np, name)(angles), np.float32)[None]
        return (random.standard_normal((1, tokens, sizes[2])) * 0.05).astype(np.float32)

    for tokens, past in ((64, 0), (128, 70)):
        inputs = {
            each.any_name: filled(each.any_name, each.partial_shape, tokens, past)
            for each in sorted(compiled.inputs, key=lambda each: each.any_name)
        }
        results = request.infer(inputs)
        for output in sorted(compiled.outputs, key=lambda each: each.any_name):
            array = np.asarray(results[output])
            digest.update(array.tobytes())
            found = float(np.abs(array.astype(np.float32)).max())
            largest = max(largest, found if math.isfinite(found) else math.inf)
    return digest.hexdigest()[:16], largest


def main() -> None:
    """Measure all rows and write the results."""
    if len(sys.argv) == 5:
        print(json.dumps(child(Path(sys.argv[1]), *sys.argv[2:4], Path(sys.argv[4]))))
        return
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    rows = []
    for name in GRAPHS:
        path = Path(sys.argv[1], name).resolve()
        for form in FORMS if name != GRAPHS[0] else FORMS[:1]:
            if path.exists():
                rows += [{"graph": name, "form": form} | row for row in kept_rows(path, form)]
    import openvino

    print(write_results("openvino-cache", {"openvino": openvino.__version__, "rows": rows}).read_text("utf-8"))


def kept_rows(path: Path, form: str) -> list[dict[str, Any]]:
    """The fresh graph, and the first and the second start of each way to keep it."""
    rows: list[dict[str, Any]] = []
    for kept in KEPT:
        with tempfile.TemporaryDirectory(dir=path.parent.parent) as folder:
            for start in ("first", "second") if kept != KEPT[0] else ("first",):
                command = [sys.executable, __file__, str(path), form, kept, folder]
                run = subprocess.run(command, capture_output=True, text=True, check=True)
                found = json.loads(run.stdout.splitlines()[-1])
                rows.append({"kept": kept, "start": start} | found)
            disk = sum(file.stat().st_size for file in Path(folder).iterdir())
        rows[-1] |= {"disk": disk}
    digests = [row.pop("digest") for row in rows]
    return [row | {"equal": digest == digests[0]} for row, digest in zip(rows, digests, strict=True)]


if __name__ == "__main__":
    main()
