"""What the host does for one token of the TensorRT engine: Python only, with CUDA and TensorRT stubbed.

    python benchmarks/tensorrt_host_path.py NAME

The stubs return at once and compute nothing, so what is left is the time in which a GPU would wait for the host: the
row of the token table, its conversion, the rotary angles, and the calls. Decoders have the shapes of the published
sizes. Writes results/tensorrt-host-path-NAME.json: microseconds of CPU time per token, the median and the best of
batches of tokens, beside the limit. Exit status 1 where a median is above the limit.

To measure another commit, run this file with that commit's folder as the working directory and as PYTHONPATH.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import numpy as np
from checkpoint_variants import VARIANTS, json_files
from record import write_results

from internvl_edge.bundle.bundle import sha256
from internvl_edge.bundle.token_table import TokenTable
from internvl_edge.checkpoint.config_reader import read_config
from internvl_edge.model.config import ModelConfig
from internvl_edge.runtime.engines.tensorrt.cuda import Cuda
from internvl_edge.runtime.engines.tensorrt.engine import TensorRTEngine
from internvl_edge.runtime.engines.tensorrt.flavour import Flavour, make_log
from internvl_edge.runtime.engines.tensorrt.record import ENGINES, BuildOptions, EngineRecord, engine_folder

LIMIT_US = 60
CAPACITY = 4096
BATCHES, TOKENS, PROMPT = 15, 200, 300
ROWS = 2000  # of the token table; a whole one would only take disk
VERSIONS = {"tensorrt": "10.16.1", "tensorrt_rtx": "1.7.1"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="name of the results file, such as before or after")
    name = parser.parse_args().name
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for size in ("1B", "2B", "8B"):
            config = configuration(size, Path(folder) / size)
            for flavour in VERSIONS:
                for dtype in ("bfloat16", "float16"):
                    place = Path(folder) / f"{size}-{flavour}-{dtype}"
                    row: dict[str, Any] = {"model": size, "flavour": flavour, "dtype": dtype}
                    row |= measure(config, flavour, dtype, place)
                    rows.append(row)
                    print(json.dumps(row))
    write_results(f"tensorrt-host-path-{name}", {"limit_us": LIMIT_US, "tokens": BATCHES * TOKENS, "rows": rows})
    worst = max(row["us_per_token"] for row in rows)
    sys.exit(0 if worst < LIMIT_US else f"{worst} microseconds per token, the limit is {LIMIT_US}")


def configuration(size: str, folder: Path) -> ModelConfig:
    """The configuration of a published size."""
    folder.mkdir()
    for name, content in json_files(VARIANTS[size]).items():
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
    return read_config(folder)


def measure(config: ModelConfig, flavour: str, dtype: str, folder: Path) -> dict[str, float]:
    """Microseconds of CPU time per token, the reading of its row included."""
    engine = stubbed_engine(config, flavour, dtype, folder)
    table = token_table(config.decoder.hidden_size, folder)
    engine.prefill(np.zeros((PROMPT, config.decoder.hidden_size), np.float32))
    times = []
    for batch in range(BATCHES):
        started = time.process_time_ns()
        for token in range(TOKENS):
            engine.decode_token(table[token + batch])
        times.append((time.process_time_ns() - started) / TOKENS / 1e3)
    engine.close()
    return {"us_per_token": round(median(times), 1), "best_us": round(min(times), 1)}


def token_table(width: int, folder: Path) -> TokenTable:
    """A token table in float16, as a bundle has it."""
    path = folder / "embeddings.bin"
    rows = np.random.default_rng(1).standard_normal((ROWS, width), np.float32).astype(np.float16)
    rows.tofile(path)
    return TokenTable(path, "float16", (ROWS, width))


def stubbed_engine(config: ModelConfig, flavour: str, dtype: str, folder: Path) -> TensorRTEngine:
    """An engine over stubs, opened as one of a bundle."""
    opened = stubbed_bundle(config, flavour, BuildOptions(dtype, capacity=CAPACITY), folder)
    api = StubTensorRT(config, VERSIONS[flavour])
    return TensorRTEngine(opened, cuda=Cuda(StubCuda()), flavour=Flavour(flavour, api, make_log(api)))


def stubbed_bundle(config: ModelConfig, flavour: str, options: BuildOptions, folder: Path, sm: int = 86) -> Any:
    """What the engine needs of a bundle with built engines, without graphs and weights."""
    opened: Any = SimpleNamespace(
        folder=folder, manifest=SimpleNamespace(model=config, kv_cache=None, files={}, activations="float32")
    )
    place = engine_folder(opened, "stub")
    place.mkdir(parents=True)
    for name in ENGINES.values():
        (place / name).write_text(name, encoding="utf-8")
    files = {name: {"bytes": len(name), "sha256": sha256(place / name)} for name in ENGINES.values()}
    EngineRecord("stub", flavour, VERSIONS[flavour], (sm,), options, {}, files).write(place)
    return opened


class StubCuda:
    """`cuda.bindings.runtime` without a device: every call succeeds at once."""

    cudaError_t = SimpleNamespace(cudaSuccess=0)  # noqa: N815
    cudaHostAllocDefault, cudaStreamNonBlocking = 0, 1  # noqa: N815
    cudaMemcpyKind = SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2, cudaMemcpyDeviceToDevice=3)  # noqa: N815
    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)  # noqa: N815
    cudaDeviceAttr = SimpleNamespace(  # noqa: N815
        cudaDevAttrComputeCapabilityMajor=8, cudaDevAttrComputeCapabilityMinor=6
    )

    def __init__(self) -> None:
        self._host: dict[int, Any] = {}
        self._next = 1 << 30

    def cudaDeviceGetAttribute(self, attribute: int, device: int) -> tuple[int, int]:  # noqa: N802
        return 0, attribute

    def cudaMalloc(self, size: int) -> tuple[int, int]:  # noqa: N802
        self._next += size // 4096 * 4096 + 8192
        return 0, self._next

    def cudaHostAlloc(self, size: int, flags: int) -> tuple[int, int]:  # noqa: N802
        buffer = (ctypes.c_uint8 * size)()
        self._host[ctypes.addressof(buffer)] = buffer
        return 0, ctypes.addressof(buffer)

    def __getattr__(self, name: str) -> Any:
        return _nothing if name.startswith(("cudaFree", "cudaMem", "cudaSet")) else _handle


def _nothing(*arguments: Any) -> tuple[int]:
    return (0,)


def _handle(*arguments: Any) -> tuple[int, int]:
    return (0, 1)


class StubTensorRT:
    """Either flavour's module: engines with the inputs and outputs of a model, and contexts that accept everything."""

    TensorIOMode = SimpleNamespace(INPUT="input", OUTPUT="output")
    ExecutionContextAllocationStrategy = SimpleNamespace(USER_MANAGED="user managed")
    CudaGraphStrategy = SimpleNamespace(WHOLE_GRAPH_CAPTURE="whole graph")
    DynamicShapesKernelSpecializationStrategy = SimpleNamespace(LAZY="lazy", EAGER="eager")

    class ILogger:
        INTERNAL_ERROR, ERROR, WARNING = range(3)

    def __init__(self, config: ModelConfig, version: str) -> None:
        self.__version__ = version
        parts = [f"{layer}.{kind}" for layer in range(config.decoder.num_hidden_layers) for kind in ("key", "value")]
        self._tensors = {
            b"decoder.engine": {
                "input": [
                    *("inputs_embeds", "cos", "sin", "past_length", "kept", "slots"),
                    *(f"past_key_values.{part}" for part in parts),
                ],
                "output": ["token", "logits", *(f"present.{part}" for part in parts)],
            },
            b"vision.engine": {"input": ["pixels"], "output": ["image_embeds"]},
        }

    def Runtime(self, log: Any) -> Any:  # noqa: N802
        return SimpleNamespace(deserialize_cuda_engine=lambda data: _engine(self._tensors[bytes(data)], self.context))

    def context(self) -> Any:
        """An execution context."""
        return StubContext()


def _engine(tensors: dict[str, list[str]], context: Callable[[], Any]) -> Any:
    modes = {name: mode for mode, names in tensors.items() for name in names}
    names = list(modes)
    return SimpleNamespace(
        device_memory_size_v2=1000,
        num_io_tensors=len(names),
        num_optimization_profiles=1,
        get_tensor_name=names.__getitem__,
        get_tensor_mode=modes.__getitem__,
        get_tensor_shape=lambda name: (-1,),
        get_tensor_dtype=lambda name: SimpleNamespace(itemsize=2),
        create_execution_context=lambda config: context(),
        create_runtime_config=lambda: SimpleNamespace(
            create_runtime_cache=lambda: SimpleNamespace(deserialize=lambda data: None, serialize=lambda: b""),
            set_execution_context_allocation_strategy=lambda strategy: None,
            set_runtime_cache=lambda cache: None,
        ),
    )


class StubContext:
    """An execution context that accepts everything and computes nothing."""

    def __getattr__(self, name: str) -> Any:
        return _accepts


def _accepts(*arguments: Any) -> bool:
    return True


if __name__ == "__main__":
    main()
