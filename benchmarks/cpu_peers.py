"""This project and its peers on one CPU: the same work, the same shapes, two threads each, in turn.

    python benchmarks/cpu_peers.py PEERS MODELS NAME [--ours LABEL=BUNDLE[,KEYWORD=VALUE]]... [--only PATTERN]...
        [--rows prefill,decode,vision,first_token,long,rows] [--repeat 3]  -> results/cpu-peers-NAME.json

`make bench-peers` does everything that this needs (`bench_peers.py`). PEERS holds the environments of
`peers/make_env.sh`, MODELS what `peers/cpu_models.sh` made; a peer that lacks one of them is left out. Each program is
a process that loads and then waits, stopped by a signal, for its turn: A B C A B C for every figure, so that a machine
whose speed drifts is as slow for one as for another. The first round of each figure is not counted. Weights are random
in the shapes of a 1B: speed, memory and size do not depend on them, quality is not looked at here.

The results also hold the limits of the machine, measured first (reading, products in float32 and in int8), and what
the work needs at least: operations of a prompt and of a tile, and the bytes that a token of each of our bundles reads.

A program that ends is left out from then on: its results say after what, and keep what was measured before. The results
are written after every row, so that nothing is lost when this program is stopped.
"""

from __future__ import annotations

import json
import signal
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import click
import numpy as np
from record import write_results

from internvl_edge.bundle import names
from internvl_edge.bundle.manifest import Manifest
from internvl_edge.planning.footprint import Footprint, Storage
from internvl_edge.runtime import limits
from internvl_edge.runtime.bench import bundle_footprint

HERE = Path(__file__).parent / "peers"
# What is timed, as `peers/cpu_worker.py` defines it: request and count.
ROWS = {
    "prefill": [("prefill", 300), ("prefill", 1800)],
    "decode": [("decode", 300), ("decode", 2000)],
    "vision": [("vision", 1)],
    "first_token": [("first_token", 7)],
    # After these two, memory is not that of a question any more.
    "long": [("decode", 8000)],
    "rows": [("rows", 4)],
}
# Rows of which one round takes minutes are repeated this often at most.
MOST_REPEATS = {"first_token": 2}
THREADS = 2
_MATRIX = 2048
DECODED = 32
# label: environment, worker, files under MODELS (the first two are arguments, all count as its size on disk)
PEERS = {
    "llama.cpp Q4_0, mmproj q8_0": ("llama-cpp", "cpu_llama_cpp.py", ["gguf/text-Q4_0.gguf", "gguf/mmproj-q8_0.gguf"]),
    "llama.cpp Q8_0, mmproj f16": ("llama-cpp", "cpu_llama_cpp.py", ["gguf/text-Q8_0.gguf", "gguf/mmproj-f16.gguf"]),
    "OpenVINO GenAI int4, int8 tower": (
        "openvino-genai",
        "cpu_openvino_genai.py",
        ["openvino-int4", "openvino-vision/vision-int8.xml", "openvino-vision/vision-int8.bin"],
    ),
    "OpenVINO GenAI int8, fp16 tower": (
        "openvino-genai",
        "cpu_openvino_genai.py",
        ["openvino-int8", "openvino-vision/vision-fp16.xml", "openvino-vision/vision-fp16.bin"],
    ),
    "onnxruntime-genai int4": ("onnxruntime-genai", "cpu_onnxruntime_genai.py", ["onnxruntime-genai-int4"]),
    "transformers bfloat16": ("transformers", "cpu_transformers.py", ["text"]),
}


class Ended(Exception):  # noqa: N818
    """A program ended, or answered something else than a line of JSON."""


@dataclass
class Worker:
    """One program: its process, stopped unless it is its turn, and what was measured of it.

    `failed` says what it was asked for when it ended; "" while it runs.
    """

    label: str
    command: list[str]
    files: list[Path]
    loads: list[float] = field(default_factory=list)
    can: list[str] = field(default_factory=list)
    cannot: str = ""
    seconds: dict[str, list[float]] = field(default_factory=dict)
    memory: dict[str, dict[str, int]] = field(default_factory=dict)
    failed: str = ""
    known: dict[str, Any] = field(default_factory=dict)
    process: Any = None

    def start(self) -> None:
        """Begin anew; the time it says loading took is kept."""
        self.stop()
        if self.failed:
            return
        try:
            self.process = subprocess.Popen(
                self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
            )
            hello = self._answer()
        except (OSError, Ended) as error:
            self._fail("loading", error)
            return
        self.loads.append(hello["load_s"])
        self.can, self.cannot = hello["can"], hello.get("cannot", "")
        self.process.send_signal(signal.SIGSTOP)

    def ask(self, do: str, count: int = 0) -> dict[str, Any] | None:
        """One request while the others stand still; None where the program ended instead of answering."""
        try:
            self.process.send_signal(signal.SIGCONT)
            self.process.stdin.write(json.dumps({"do": do, "count": count}) + "\n")
            self.process.stdin.flush()
            answer = self._answer()
            self.process.send_signal(signal.SIGSTOP)
        except (OSError, Ended) as error:
            self._fail(f"{do} {count}", error)
            return None
        return answer

    def stop(self) -> None:
        """End the process, if there is one."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def _answer(self) -> dict[str, Any]:
        line = self.process.stdout.readline()
        try:
            answer: dict[str, Any] = json.loads(line)
        except ValueError:
            raise Ended(f"exit status {self.process.wait()}" if not line else f"answered {line!r}") from None
        return answer

    def _fail(self, doing: str, error: Exception) -> None:
        self.stop()
        self.failed = f"{doing}: {error}"
        print(f"{self.label} failed at {self.failed}: {' '.join(self.command)}", file=sys.stderr, flush=True)

    def facts(self) -> dict[str, Any]:
        """What goes into the results."""
        return {
            **({"failed": self.failed} if self.failed else {}),
            "load_s": {"median": statistics.median(self.loads) if self.loads else None, "each": self.loads},
            "disk_bytes": sum(_size(path) for path in self.files if path.exists()),
            "memory": self.memory,
            "rows": {name: _row(name, seconds) for name, seconds in self.seconds.items()},
            **({"cannot": self.cannot} if self.cannot else {}),
            **self.known,
        }


def _size(path: Path) -> int:
    files = [path] if path.is_file() else [inner for inner in path.rglob("*") if inner.is_file()]
    return sum(file.stat().st_size for file in files)


def _row(name: str, seconds: list[float]) -> dict[str, Any]:
    """Median and spread in the figure's own unit."""
    do, count = name.split()
    middle, spread = limits.median_and_spread(seconds)
    counted = {"prefill": int(count), "decode": DECODED, "rows": DECODED * int(count)}.get(do)
    value = {"tokens_per_s": counted / middle} if counted else {"s": middle / int(count) if do == "vision" else middle}
    return {**value, "spread": spread, "seconds": seconds}


def measure(workers: list[Worker], rows: list[str], repeat: int, keep: Callable[[], object]) -> None:
    """All figures of all workers, in turn; loading first. `keep` stores what is known so far, after every row."""
    for _ in range(repeat):
        for worker in workers:
            worker.start()
    for row in rows:
        for do, count in ROWS[row]:
            able = [worker for worker in workers if not worker.failed and do in worker.can]
            turn(able, do, count)  # warms up
            for _ in range(min(repeat, MOST_REPEATS.get(row, repeat))):
                for worker, seconds in turn(able, do, count):
                    worker.seconds.setdefault(f"{do} {count}", []).append(seconds)
        for worker in workers:
            if not worker.failed and (memory := worker.ask("memory")):
                worker.memory[f"after {row}"] = memory
        keep()


def turn(workers: list[Worker], do: str, count: int) -> list[tuple[Worker, float]]:
    """Seconds of each worker that still runs, one after the other."""
    found = []
    for worker in workers:
        if not worker.failed and (answer := worker.ask(do, count)):
            found.append((worker, answer["seconds"]))
            print(f"{do} {count} {worker.label}: {answer['seconds']:.3f} s", file=sys.stderr, flush=True)
    return found


def machine_limits() -> dict[str, float]:
    """What the machine can do at best: bytes/s, FLOP/s and int8 operations/s."""
    return {
        "read_bandwidth": limits.read_bandwidth(THREADS),
        "float32_matrix_rate": limits.matrix_rate(),
        "int8_matrix_rate": int8_matrix_rate(),
    }


def int8_matrix_rate() -> float:
    """Operations/s of an int8 product with int32 sums, in the faster one of ONNX Runtime and torch (oneDNN)."""
    import onnx
    import onnxruntime
    import torch
    from onnx import TensorProto, helper

    random = np.random.default_rng(0)
    left = random.integers(0, 128, (_MATRIX, _MATRIX), np.uint8)
    right = random.integers(-64, 64, (_MATRIX, _MATRIX), np.int8)
    shape = [_MATRIX, _MATRIX]
    graph = helper.make_graph(
        [helper.make_node("MatMulInteger", ["left", "right"], ["product"])],
        "product",
        [helper.make_tensor_value_info("left", TensorProto.UINT8, shape)],
        [helper.make_tensor_value_info("product", TensorProto.INT32, shape)],
        [onnx.numpy_helper.from_array(right, "right")],
    )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = THREADS
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    torch.set_num_threads(THREADS)
    signed, other = torch.from_numpy(left.astype(np.int8)), torch.from_numpy(right)
    seconds = [
        limits.best_of(lambda: session.run(None, {"left": left})),
        limits.best_of(lambda: torch._int_mm(signed, other)),
    ]
    return 2 * _MATRIX**3 / min(seconds)


def operations(footprint: Footprint) -> dict[str, float]:
    """Multiplications and additions of what is timed, by row; the same for every program."""
    prompts = {f"prefill {count}": footprint.prefill_operations(count) for _, count in ROWS["prefill"]}
    return prompts | {"vision 1": footprint.vision_operations(1)}


def ours(text: str) -> Worker:
    """LABEL=BUNDLE[,KEYWORD=VALUE]."""
    label, _, rest = text.partition("=")
    bundle, *keywords = rest.split(",")
    worker = Worker(label, [sys.executable, str(HERE / "cpu_ours.py"), bundle, *keywords], [Path(bundle)])
    manifest = Manifest.read(Path(bundle))
    footprint = bundle_footprint(manifest, "onnxruntime")
    contexts = [count for row in ("decode", "long") for _, count in ROWS[row]]
    worker.known = {
        "bundle": Path(bundle).name,
        "form": form(footprint.storage, manifest),
        "operations": operations(footprint),
        "token_bytes": {f"decode {count}": footprint.decode_bytes(count + DECODED // 2) for count in contexts},
    }
    return worker


def form(storage: Storage, manifest: Manifest) -> dict[str, Any]:
    """What a bundle multiplies with, in the words of a recipe; its quality is looked up by this."""
    body, head = storage.body, storage.head
    return {
        "bits": body.bits if body else 16,
        "group_size": body.group_size if body else None,
        "symmetric": body.symmetric if body else None,
        "lm_head": f"int{head.bits}" if head else "fp",
        "vision": f"int{storage.vision.bits}" if storage.vision else "fp",
        "int8_prompts": names.PROMPTS in manifest.files,
    }


def lacking(label: str, peers: Path, models: Path) -> str:
    """Why a peer cannot be measured; "" where everything is there."""
    environment, _, files = PEERS[label]
    if not (peers / environment / "versions.txt").exists():
        return f"no environment {environment}"
    absent = [name for name in files if not (models / name).exists()]
    return f"no model {', '.join(absent)}" if absent else ""


def peer(label: str, peers: Path, models: Path) -> Worker:
    """One of PEERS."""
    environment, script, paths = PEERS[label]
    files = [models / path for path in paths]
    command = [str(peers / environment / "bin" / "python"), str(HERE / script), *map(str, files[:2])]
    return Worker(label, command, files)


@click.command()
@click.argument("peers", type=click.Path(path_type=Path))
@click.argument("models", type=click.Path(path_type=Path))
@click.argument("name")
@click.option("--ours", "bundles", multiple=True, help="LABEL=BUNDLE[,KEYWORD=VALUE]")
@click.option("--only", multiple=True, default=("*",), help="Pattern of the peers to measure; may be repeated.")
@click.option("--rows", default=",".join(ROWS), show_default=True)
@click.option("--repeat", type=click.IntRange(min=1), default=3, show_default=True)
def main(
    peers: Path, models: Path, name: str, bundles: tuple[str, ...], only: tuple[str, ...], rows: str, repeat: int
) -> None:
    """Measure and write the results."""
    chosen = [label for label in PEERS if any(fnmatch(label, pattern) for pattern in only)]
    missing = {label: why for label in chosen if (why := lacking(label, peers, models))}
    for label, why in missing.items():
        print(f"{label} is left out: {why}", file=sys.stderr, flush=True)
    workers = [ours(text) for text in bundles]
    workers += [peer(label, peers, models) for label in chosen if label not in missing]
    versions = {
        environment: (peers / environment / "versions.txt").read_text(encoding="utf-8").splitlines()
        for environment in sorted({PEERS[w.label][0] for w in workers if w.label in PEERS})
    }
    limit = machine_limits()

    def keep() -> Path:
        results = {worker.label: worker.facts() for worker in workers}
        figures = {"threads": THREADS, **limit, "programs": results, "missing": missing, "peer_versions": versions}
        return write_results(f"cpu-peers-{name}", figures)

    try:
        measure(workers, rows.split(","), repeat, keep)
    finally:
        for worker in workers:
            worker.stop()
    path = keep()
    print(path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
