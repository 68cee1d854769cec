"""The CUDA half of the TensorRT engine on the present GPU, with a stand-in for TensorRT: no compiler is needed.

    python benchmarks/gpu_cuda.py           prints one JSON object

The stand-in's "kernels" are copies within the device, from a step's inputs to its outputs. All else is the engine as it
ships: pinned and device blocks, streams, the capture and replay of a step, new entries stored into the KV cache by 2D
copies at odd capacities, the rows of a cache and copies between them, and an image encoded in one thread while another
one decodes. Each value that comes back is compared with what was sent. Also measures the microseconds of one step, in
which the GPU has next to nothing to do.
"""

from __future__ import annotations

import json
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tensorrt_host_path import VERSIONS, StubTensorRT, stubbed_bundle

from internvl_edge.base.errors import EdgeError
from internvl_edge.model.config import DecoderConfig, ModelConfig, RopeConfig, VisionConfig
from internvl_edge.planning.programs import slots_of
from internvl_edge.runtime.engines.tensorrt.buffers import HALVES, Block
from internvl_edge.runtime.engines.tensorrt.cuda import Cuda
from internvl_edge.runtime.engines.tensorrt.engine import TensorRTEngine
from internvl_edge.runtime.engines.tensorrt.flavour import Flavour, make_log
from internvl_edge.runtime.engines.tensorrt.record import BuildOptions
from internvl_edge.runtime.engines.tensorrt.runtime_cache import DeviceCache

CAPACITY, CHUNK, STEPS, ROWS = 1301, 512, 600, 3
# The new entries of a token are as many numbers as its embedding: 2 x 2 layers x 2 heads x 32.
HIDDEN, LAYERS, HEADS, WIDTH = 256, 2, 2, 32
TILES, SIDE = 2, 28


def main() -> None:
    """Check and print; a failure is a row with its reason."""
    row: dict[str, Any] = {"engine": "CUDA with a stand-in"}
    try:
        row |= check(Cuda)
    except (EdgeError, AssertionError) as error:
        row["wrong"] = " ".join(str(error).split())[:300] or type(error).__name__
    print(json.dumps(row))


def check(connect: Any) -> dict[str, Any]:
    """Run all checks; `connect` returns a new `Cuda`. Raises AssertionError for a value that is not the one sent."""
    checked = [check_blocks(connect()), *(check_stores(connect(), itemsize) for itemsize in (1, 2))]
    checked += [check_rows(connect(), itemsize) for itemsize in (1, 2)]
    with tempfile.TemporaryDirectory() as folder:
        steps, captured = check_steps(connect, Path(folder))
    return {"checks": [*checked, *steps], "graph_launches": captured["launches"], "us_per_step": captured["us"]}


def check_blocks(cuda: Cuda) -> str:
    """Bytes go to the device and come back, each part at its own aligned place."""
    block = Block(cuda, {"a": ((1001,), np.uint8), "b": ((3, 77), np.float32)}, "a test")
    stream, random = cuda.stream(), np.random.default_rng(1)
    sent = {"a": random.integers(0, 256, 1001, np.uint8), "b": random.standard_normal((3, 77)).astype(np.float32)}
    for name, values in sent.items():
        assert block.address(name) % 256 == 0, "an address is not aligned"
        block.arrays[name][...] = values
    block.upload(stream)
    cuda.synchronize(stream)
    for name in sent:
        block.arrays[name][...] = 0
        block.download(name, stream)
    cuda.synchronize(stream)
    for name, values in sent.items():
        _require_same(block.arrays[name], values, f"part {name} of a block")
    cuda.close()
    return "blocks"


def check_stores(cuda: Cuda, itemsize: int) -> str:
    """New entries land at their positions in every layer and head, and nowhere else, also with gaps between parts."""
    kind, stream = (np.int8, np.uint16)[itemsize - 1], cuda.stream()
    cache = DeviceCache(cuda, decoder(), CAPACITY, itemsize, new=CHUNK)
    places = cache.addresses()
    expected = np.zeros((2 * LAYERS, HEADS, CAPACITY, WIDTH), kind)
    random, new = np.random.default_rng(2), Block(cuda, {"new": ((2 * LAYERS * HEADS, CHUNK, WIDTH), kind)}, "a test")
    for start, count, rows in ((0, 512, 512), (512, 37, 64), (549, 1, 1), (CAPACITY - 5, 5, 8)):
        entries = random.integers(0, 100, (2 * LAYERS * HEADS, rows, WIDTH)).astype(kind)
        new.arrays["new"].reshape(-1)[: entries.size] = entries.reshape(-1)
        new.upload(stream)
        within = cuda._runtime.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        cuda.call("cudaMemcpyAsync", places["new_entries"], new.address("new"), entries.nbytes, within, stream)
        cache.store(start, count, rows, stream)
        cuda.synchronize(stream)
        expected[:, :, start : start + count] = entries.reshape(2 * LAYERS, HEADS, rows, WIDTH)[:, :, :count]
    _require_cache(cuda, places, expected, stream)
    cuda.close()
    return f"2D stores of {8 * itemsize} bits"


def check_rows(cuda: Cuda, itemsize: int) -> str:
    """New entries of a step of all rows land in each of them, and the first tokens of a row in another one."""
    kind, stream, slots = (np.int8, np.uint16)[itemsize - 1], cuda.stream(), slots_of(CAPACITY, ROWS)
    cache = DeviceCache(cuda, decoder(), slots, itemsize, ROWS, CHUNK)
    expected = np.zeros((2 * LAYERS, ROWS, HEADS, slots, WIDTH), kind)
    entries = np.random.default_rng(4).integers(1, 100, (ROWS, 2 * LAYERS, HEADS, CHUNK, WIDTH)).astype(kind)
    starts = (0, 700, CAPACITY - CHUNK)
    for row, start in enumerate(starts):  # a prompt for each row
        _send(cuda, entries[row], cache.addresses(row)["new_entries"], stream)
        cache.store(start, CHUNK, CHUNK, stream, row)
        cuda.synchronize(stream)
        expected[:, row, :, start : start + CHUNK] = entries[row]
    step = np.ascontiguousarray(entries[:, :, :, 7:8])
    _send(cuda, step, cache.addresses()["new_entries"], stream)
    for row, start in ((2, CAPACITY), (0, CHUNK)):  # one token for two of them
        cache.store(start, 1, 1, stream, row, row)
        expected[:, row, :, start : start + 1] = step[row]
    cache.copy(0, 1, 300, stream)
    cuda.synchronize(stream)
    expected[:, 1, :, :300] = expected[:, 0, :, :300]
    for row in range(ROWS):
        _require_cache(cuda, cache.addresses(row), expected[:, row], stream)
    cuda.close()
    return f"rows of {8 * itemsize} bits"


def _send(cuda: Cuda, values: NDArray[Any], address: int, stream: Any) -> None:
    """Copy an array to the device, and wait."""
    host = cuda.pinned(values.nbytes)
    host[:] = values.reshape(-1).view(np.uint8)
    cuda.to_device(address, host.ctypes.data, values.nbytes, stream)
    cuda.synchronize(stream)


def _require_cache(cuda: Cuda, places: dict[str, int], expected: NDArray[Any], stream: Any) -> None:
    """Compare a row of the cache with [parts, heads, slots, width]."""
    host = cuda.pinned(expected[0].nbytes)
    names = [f"past_key_values.{layer}.{part}" for layer in range(LAYERS) for part in ("key", "value")]
    for name, values in zip(names, expected, strict=True):
        assert places[name] % 256 == 0, "an address of the cache is not aligned"
        cuda.to_host(host.ctypes.data, places[name], host.nbytes, stream)
        cuda.synchronize(stream)
        _require_same(host.view(values.dtype).reshape(values.shape), values, name)


def check_steps(connect: Any, folder: Path) -> tuple[list[str], dict[str, Any]]:
    """The engine decodes over windows with captured graphs, alone and beside an encoder in another thread."""
    cuda = connect()
    launches = 0
    launch = cuda.launch

    def counted(graph: Any, stream: Any) -> None:
        nonlocal launches
        launches += 1
        launch(graph, stream)

    cuda.launch = counted
    config, options = model(), BuildOptions("bfloat16", capacity=CAPACITY, chunk=CHUNK, kept=4, tiles=TILES)
    opened = stubbed_bundle(config, "tensorrt", options, folder, cuda.compute_capability())
    api = StandIn(config, cuda)
    engine = TensorRTEngine(opened, cuda=cuda, flavour=Flavour("tensorrt", api, make_log(api)))
    random = np.random.default_rng(3)
    embeds = HALVES["bfloat16"].unpack(
        HALVES["bfloat16"].pack(random.standard_normal((STEPS + 50, HIDDEN), np.float32))
    )
    pixels = random.integers(0, 60, (5, SIDE, SIDE, 3), np.uint8)
    answers = decode(engine, embeds)
    assert launches > STEPS // 2, "steps were not replayed as graphs"
    _require_same(np.array(answers), np.arange(50, 50 + STEPS), "the positions that came back")
    image = encode(engine, pixels)
    with ThreadPoolExecutor(2) as pool:
        beside = pool.submit(lambda: [encode(engine, pixels) for _ in range(20)])
        again = pool.submit(decode, engine, embeds)
    assert again.result() == answers, "another thread changed what was decoded"
    for found in beside.result():
        _require_same(found, image, "tiles encoded beside an answer")
    _require_same(image.reshape(-1), expected_image(pixels), "the bytes of tiles")
    started = time.perf_counter()
    decode(engine, embeds)
    seconds = (time.perf_counter() - started) / STEPS
    engine.close()
    return ["steps, captured and replayed", "two threads"], {"launches": launches, "us": round(1e6 * seconds, 1)}


def decode(engine: TensorRTEngine, embeds: NDArray[np.float32]) -> list[int]:
    """A prompt of 50 tokens, then single ones over a change of window."""
    engine.cache.reset()
    engine.prefill(embeds[:50])
    return [engine.decode_token(row) for row in embeds[50:]]


def encode(engine: TensorRTEngine, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Tiles in batches."""
    return engine.encode(pixels)


def expected_image(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """What the stand-in makes of tiles: the first bytes of each batch as 16-bit numbers."""
    found = []
    for start in range(0, len(pixels), TILES):
        part = pixels[start : start + TILES]
        found.append(part.reshape(-1)[: len(part) * 2 * HIDDEN].view(np.uint16))
    return HALVES["bfloat16"].unpack(np.concatenate(found))


def decoder() -> DecoderConfig:
    """A decoder in which the new entries of a token are as many numbers as its embedding."""
    return DecoderConfig(
        "qwen2", HIDDEN, LAYERS, 4, HEADS, WIDTH, 512, 100, 1e-6, 32768, RopeConfig(1e4), False, False, False
    )


def model() -> ModelConfig:
    """A model of that decoder with tiles of 28 pixels, each of which becomes one image token."""
    vision = VisionConfig(32, 1, 2, 64, SIDE, 14, "layer_norm", 1e-6, True, False, 1e-6)
    return ModelConfig("remote", vision, decoder(), 0.5, "v2", -1, "internvl2_5", None, 1, 12, True)


class StandIn(StubTensorRT):
    """TensorRT with copies within the device in place of kernels."""

    def __init__(self, config: ModelConfig, cuda: Cuda) -> None:
        super().__init__(config, VERSIONS["tensorrt"])
        outputs = self._tensors[b"decoder.engine"]["output"]
        self._tensors[b"decoder.engine"]["output"] = [*outputs[:2], "new_entries"]
        self._cuda = cuda

    def context(self) -> Any:
        """An execution context of copies."""
        return _CopyingContext(self._cuda)


class _CopyingContext:
    """token <- past_length, logits and new_entries <- the embeddings, image_embeds <- the pixels."""

    def __init__(self, cuda: Cuda) -> None:
        self._cuda = cuda
        self._addresses: dict[str, int] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}

    def set_tensor_address(self, name: str, address: int) -> bool:
        self._addresses[name] = address
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self._shapes[name] = shape
        return True

    def set_device_memory(self, address: int, size: int) -> None:
        """Use no memory."""

    def set_optimization_profile_async(self, profile: int, stream: Any) -> bool:
        return True

    def execute_async_v3(self, stream: int) -> bool:
        if "pixels" in self._addresses:
            self._copy("image_embeds", "pixels", self._shapes["pixels"][0] * 2 * HIDDEN, stream)
            return True
        self._copy("token", "past_length", 8, stream)
        size = 2 * self._shapes["inputs_embeds"][1] * HIDDEN
        self._copy("new_entries", "inputs_embeds", size, stream)
        self._copy("logits", "inputs_embeds", 2 * HIDDEN // 4, stream)
        return True

    def _copy(self, target: str, source: str, size: int, stream: int) -> None:
        kind = self._cuda._runtime.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        self._cuda.call("cudaMemcpyAsync", self._addresses[target], self._addresses[source], size, kind, stream)


def _require_same(found: NDArray[Any], sent: NDArray[Any], what: str) -> None:
    different = int((found != sent).sum()) if found.shape == sent.shape else -1
    assert not different, f"{what}: {different} of {sent.size} values are not those that were sent"


if __name__ == "__main__":
    main()
