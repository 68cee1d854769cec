"""Which device "auto" takes and why, and what CUDA refuses, over fakes of the libraries: no GPU is needed."""

from __future__ import annotations

import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest

from helpers import tiny
from helpers.fake_gpu import FakeCuda, FakeTensorRT
from helpers.tensorrt_engines import CAPACITY, FLAVOURS, open_engine, write_engines
from internvl_edge import InternVL, export_bundle
from internvl_edge.base.errors import EngineError
from internvl_edge.base.progress import SILENT
from internvl_edge.bundle.bundle import Bundle
from internvl_edge.runtime.engines import device as device_module
from internvl_edge.runtime.engines.device import IDENTITY, DeviceChoice, choose_device, most_rows, require_cuda
from internvl_edge.runtime.engines.onnxruntime import OnnxRuntimeEngine
from internvl_edge.runtime.engines.rows import CacheRows
from internvl_edge.runtime.engines.tensorrt import engine as engine_module


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_checkpoint(tmp_path_factory.mktemp("device") / "checkpoint")


@pytest.fixture(scope="module")
def float32(checkpoint: Path) -> Bundle:
    return Bundle.open(export_bundle(checkpoint, checkpoint.parent / "float32", "float16"))


@pytest.fixture(scope="module")
def float16(checkpoint: Path) -> Bundle:
    return Bundle.open(export_bundle(checkpoint, checkpoint.parent / "float16", "float16", "float16"))


@pytest.fixture
def built(float32: Bundle, tmp_path: Path) -> Bundle:
    """A bundle with engines, as a build leaves them."""
    shutil.copytree(float32.folder, tmp_path / "built")
    bundle = Bundle.open(tmp_path / "built")
    write_engines(bundle, "tensorrt")
    return bundle


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    """A GPU with compute capability 8.6 and TensorRT 10.16.1, all of it fake."""
    cuda = FakeCuda()
    monkeypatch.setattr("internvl_edge.runtime.engines.tensorrt.cuda._import_runtime", lambda: cuda)
    monkeypatch.setitem(sys.modules, "tensorrt", FakeTensorRT(cuda, Path(), FLAVOURS["tensorrt"]))
    return cuda


def use_onnxruntime(monkeypatch: pytest.MonkeyPatch, offered: bool, starts: bool | str) -> None:
    """Replace ONNX Runtime by one that offers CUDA or not, whose sessions run on it, on the CPU, or fail."""

    class Session:
        def __init__(self, graph: bytes, options: Any, providers: list[str]) -> None:
            assert (graph, providers) == (IDENTITY, ["CUDAExecutionProvider"])
            if isinstance(starts, str):
                raise RuntimeError(f"{starts}\nand a second line")

        def get_providers(self) -> list[str]:
            return ["CUDAExecutionProvider", "CPUExecutionProvider"] if starts else ["CPUExecutionProvider"]

    providers = [*(["CUDAExecutionProvider"] if offered else []), "CPUExecutionProvider"]
    fake = SimpleNamespace(
        __version__="1.99.0",
        get_available_providers=lambda: providers,
        SessionOptions=SimpleNamespace,
        InferenceSession=Session,
        set_default_logger_severity=lambda severity: None,
        preload_dlls=lambda: print("libcudnn.so.9 is missing"),
    )
    monkeypatch.setitem(sys.modules, "onnxruntime", fake)


# -- auto --------------------------------------------------------------------------------------------------------------


def test_engines_for_the_present_gpu_come_first(monkeypatch: pytest.MonkeyPatch, built: Bundle, gpu: FakeCuda) -> None:
    use_onnxruntime(monkeypatch, offered=True, starts=True)
    choice = choose_device(built)
    assert choice == DeviceChoice("tensorrt", "engines fake for compute capability 8.6")
    assert str(choice) == "tensorrt (engines fake for compute capability 8.6)"
    assert gpu.leaks == {}
    assert choose_device(built, context=CAPACITY, dialect="standard").device == "tensorrt"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"compute_capabilities": (89,)}, r"no engines for compute capability 8\.6 \(found: fake \(89\)\)"),
        ({"version": "10.15.1"}, r"the engines fake are of tensorrt 10\.15\.1, not 10\.16\.1"),
        ({"inputs": {"vision.onnx": "0" * 64}}, "built from other files"),
    ],
)
@pytest.mark.usefixtures("gpu")
def test_engines_that_are_not_for_this_gpu_library_or_bundle_are_passed_over(
    monkeypatch: pytest.MonkeyPatch, built: Bundle, changes: dict[str, Any], reason: str
) -> None:
    write_engines(built, "tensorrt", **changes)
    use_onnxruntime(monkeypatch, offered=False, starts=False)
    choice = choose_device(built)
    assert choice.device == "cpu"
    with pytest.raises(EngineError, match=reason):
        raise EngineError(choice.reason)
    assert choice.reason.endswith("; this ONNX Runtime has no CUDA")


@pytest.mark.parametrize(
    ("options", "device", "reason"),
    [
        ({"engine": "openvino"}, "cpu", "the engine openvino was asked for"),
        ({"threads": 2}, "cpu", "a number of threads was asked for"),
        ({"exact": True}, "cpu", "TensorRT engines compute in 16 bits, and exact numbers were asked for"),
        ({"dialect": "onnxruntime"}, "cpu", "TensorRT engines do not run the dialect onnxruntime"),
        ({"context": CAPACITY + 1}, "cpu", f"the engines fake hold {CAPACITY} tokens, asked for are {CAPACITY + 1}"),
    ],
)
@pytest.mark.usefixtures("gpu")
def test_what_a_user_asks_for_decides(
    monkeypatch: pytest.MonkeyPatch, built: Bundle, options: dict[str, Any], device: str, reason: str
) -> None:
    use_onnxruntime(monkeypatch, offered=False, starts=False)
    choice = choose_device(built, **options)
    assert choice.device == device
    assert choice.reason.startswith(reason)


def test_cuda_is_next_where_it_starts_and_the_bundle_has_16_bits(
    monkeypatch: pytest.MonkeyPatch, float16: Bundle, float32: Bundle
) -> None:
    use_onnxruntime(monkeypatch, offered=True, starts=True)
    assert choose_device(float16) == DeviceChoice("cuda", "the bundle has no TensorRT engines")
    choice = choose_device(float32)
    assert choice.device == "cpu"
    assert choice.reason.endswith("the bundle computes in float32, but CUDA's attention takes float16")


def test_a_machine_without_a_gpu_takes_the_cpu_and_says_why(
    monkeypatch: pytest.MonkeyPatch, float16: Bundle, built: Bundle
) -> None:
    """Nothing of CUDA is imported where the bundle has no engines: every start would pay for it."""
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", None)
    choice = choose_device(float16)
    assert choice == DeviceChoice("cpu", "the bundle has no TensorRT engines; this ONNX Runtime has no CUDA")
    assert choose_device(built).reason.startswith("cuda-bindings cannot be imported")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(EngineError, match=r"no device can run this bundle: .* no TensorRT engines; ONNX Runtime is"):
        choose_device(float16)


# -- loading -----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("gpu")
def test_a_model_tells_what_auto_chose(monkeypatch: pytest.MonkeyPatch, built: Bundle, float32: Bundle) -> None:
    loaded: list[dict[str, Any]] = []

    class Engine:
        tiles_at_once = 1

        def __init__(self, opened: Bundle, **options: Any) -> None:
            self.cache = CacheRows(CAPACITY)
            loaded.append(options)

        encode = close = lambda self, *arguments: None

    monkeypatch.setattr(engine_module, "TensorRTEngine", Engine)
    with InternVL.load(built.folder, context=50) as model:
        assert str(model.choice) == "tensorrt (engines fake for compute capability 8.6)"
    assert loaded == [{"capacity": 50, "rows": 1, "progress": SILENT}]
    with InternVL.load(float32.folder, "cpu") as model:
        assert model.choice is None
    assert len(loaded) == 1


@pytest.mark.parametrize(
    ("device", "options", "message"),
    [
        ("tensorrt", {"engine": "onnxruntime"}, "engine onnxruntime has no effect on device tensorrt"),
        ("tensorrt", {"dialect": "onnxruntime"}, "dialect onnxruntime has no effect on device tensorrt"),
        ("tensorrt", {"threads": 1}, "threads 1 has no effect on device tensorrt"),
        ("tensorrt", {"context": CAPACITY + 1}, f"hold {CAPACITY} tokens, asked for are {CAPACITY + 1}.*--context"),
        ("tensorrt", {"rows": 2}, "fake hold 1 row, asked for are 2; ask for fewer, or build with --rows 2"),
        ("tensorrt", {"exact": True}, "TensorRT engines compute in 16 bits; leave out --exact"),
        ("cuda", {"engine": "openvino"}, "engine openvino has no effect on device cuda"),
        ("cuda", {"rows": 2}, "device cuda has one row, 2 were asked for"),
    ],
)
@pytest.mark.usefixtures("gpu")
def test_no_argument_is_ignored(built: Bundle, device: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(EngineError, match=message):
        InternVL.load(built.folder, device, **options)


def test_more_rows_than_the_engines_have_mean_another_device(monkeypatch: pytest.MonkeyPatch, built: Bundle) -> None:
    monkeypatch.setattr("internvl_edge.runtime.engines.tensorrt.cuda._import_runtime", FakeCuda)
    monkeypatch.setitem(sys.modules, "tensorrt", FakeTensorRT(FakeCuda(), Path(), FLAVOURS["tensorrt"]))
    write_engines(built, "tensorrt", profiles=2, rows=4)
    assert choose_device(built, rows=4) == DeviceChoice("tensorrt", "engines fake for compute capability 8.6")
    choice = choose_device(built, rows=5)
    assert choice.device == "cpu"
    assert choice.reason.startswith("the engines fake hold 4 rows, asked for are 5; ")
    assert [most_rows(built, device) for device in ("tensorrt", "cuda", "cpu")] == [4, 1, 64]
    use_onnxruntime(monkeypatch, offered=True, starts=True)
    half = replace(built, manifest=replace(built.manifest, activations="float16"))
    assert choose_device(half, rows=5).reason.endswith("; CUDA has one row, asked for are 5")
    assert choose_device(half, rows=5).device == "cpu"


def test_a_smaller_context_than_the_engines_is_kept_to(built: Bundle) -> None:
    cuda = FakeCuda()
    engine, _ = open_engine(built, cuda, capacity=40, warm=True)
    width = built.manifest.model.decoder.hidden_size
    assert (engine.cache.capacity, engine.cache.length()) == (40, 0)
    engine.prefill(np.zeros((40, width), np.float32))
    with pytest.raises(EngineError, match="1 tokens do not fit the cache, 40 of 40 are used"):
        engine.decode(np.zeros(width, np.float32))
    engine.close()
    assert cuda.leaks == {}


# -- CUDA --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activations", ["float32", "bfloat16"])
def test_a_bundle_in_other_types_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, float32: Bundle, activations: str
) -> None:
    use_onnxruntime(monkeypatch, offered=True, starts=True)
    bundle = replace(float32, manifest=replace(float32.manifest, activations=activations))
    with pytest.raises(EngineError, match=f"computes in {activations}, but .* float16; .* --activations float16"):
        require_cuda(bundle)
    if activations == "float32":
        with pytest.raises(EngineError, match="computes in float32"):
            InternVL.load(float32.folder, "cuda")


@pytest.mark.parametrize(("starts", "reason"), [(False, ""), ("no driver", r" \(no driver\)")])
def test_a_session_that_falls_back_to_the_cpu_is_an_error(
    monkeypatch: pytest.MonkeyPatch, float16: Bundle, capsys: pytest.CaptureFixture[str], starts: Any, reason: str
) -> None:
    use_onnxruntime(monkeypatch, offered=True, starts=starts)
    with pytest.raises(EngineError, match=rf"CUDA does not start in ONNX Runtime 1\.99\.0{reason}; .* cuDNN"):
        require_cuda(float16)
    assert capsys.readouterr().out == ""
    assert choose_device(float16).reason.endswith("; CUDA does not start in ONNX Runtime 1.99.0")


def test_without_the_provider_the_error_lists_those_that_are_there(float16: Bundle) -> None:
    with pytest.raises(EngineError, match=r"no CUDA \(providers: .*CPUExecutionProvider\).* 'internvl-edge\[gpu\]'"):
        InternVL.load(float16.folder, "cuda")


def test_cuda_gets_its_arguments(monkeypatch: pytest.MonkeyPatch, float16: Bundle) -> None:
    loaded: list[dict[str, Any]] = []

    class Loaded(OnnxRuntimeEngine):
        def __init__(self, opened: Bundle, **options: Any) -> None:
            loaded.append(options.copy())
            super().__init__(opened, **options | {"device": "cpu"})

    monkeypatch.setattr(device_module, "OnnxRuntimeEngine", Loaded)
    monkeypatch.setattr(device_module, "require_cuda", lambda opened: None)
    with InternVL.load(float16.folder, "cuda", dialect="standard", context=300, threads=1) as model:
        assert model.chat("Hello", max_new_tokens=1).text is not None
    assert loaded == [{"device": "cuda", "dialect": "standard", "capacity": 300, "threads": 1}]


def test_the_probe_is_a_model_that_onnx_runtime_runs() -> None:
    session = onnxruntime.InferenceSession(IDENTITY, providers=["CPUExecutionProvider"])
    np.testing.assert_array_equal(session.run(None, {"x": np.array([3], np.float32)})[0], [3])


def test_in_float16_all_that_attention_reads_has_16_bits(float16: Bundle, float32: Bundle) -> None:
    """The types for which CUDA has kernels: nothing of a step's attention may need the host (see `require_cuda`)."""
    import onnx

    types = {}
    for bundle in (float16, float32):
        graph = onnx.shape_inference.infer_shapes(
            onnx.load(bundle.path("decoder.onnxruntime.onnx"), load_external_data=False)
        ).graph
        known = {value.name: value.type.tensor_type.elem_type for value in (*graph.input, *graph.value_info)}
        caches = {name: kind for name, kind in known.items() if name.startswith("past_key_values")}
        nodes = [node for node in graph.node if node.op_type in ("GroupQueryAttention", "RotaryEmbedding")]
        assert len([node for node in nodes if node.op_type == "GroupQueryAttention"]) == len(caches) // 2 > 0
        angles = {known[name] for name in ("cos", "sin", "inputs_embeds")}
        types[bundle.manifest.activations] = set(caches.values()) | angles
    assert types == {"float16": {onnx.TensorProto.FLOAT16}, "float32": {onnx.TensorProto.FLOAT}}


def test_float16_answers_are_those_of_float32(float16: Bundle, float32: Bundle) -> None:
    """The form for CUDA, run on the CPU, which computes it more slowly."""
    embeds = (0.6 * np.random.default_rng(5).standard_normal((40, float16.manifest.model.decoder.hidden_size))).astype(
        np.float32
    )
    half, full = (OnnxRuntimeEngine(bundle, capacity=64, threads=1) for bundle in (float16, float32))
    for found, wanted in ((half.prefill(embeds[:30]), full.prefill(embeds[:30])),):
        assert np.abs(found - wanted).max() < 0.05 * wanted.std()
    for row in embeds[30:]:
        wanted = full.decode(row)
        assert np.abs(half.decode(row) - wanted).max() < 0.05 * wanted.std()
