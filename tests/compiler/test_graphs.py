"""Graphs written for TensorRT: the same numbers as the bundle's own graphs, in another type and fixed sizes."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from helpers import tiny
from helpers.commands import run_script
from helpers.kv_scales import write_scales, write_scales_of_zeros
from helpers.repository import REPOSITORY
from helpers.tiny_quantized import write_quantized
from internvl_edge import export_bundle
from internvl_edge.base.errors import BundleError
from internvl_edge.bundle.bundle import Bundle
from internvl_edge.checkpoint.reader import Checkpoint
from internvl_edge.compiler.bundle_engines import headers
from internvl_edge.compiler.graphs import decoder_header, vision_header
from internvl_edge.compiler.stored import StoredGraph
from internvl_edge.export import DTYPES, exporter
from internvl_edge.model.linear import Scheme
from internvl_edge.model.rope import RotaryAngles
from internvl_edge.runtime.engines import onnxruntime as engine_module
from internvl_edge.runtime.engines.onnxruntime import OnnxRuntimeEngine
from internvl_edge.runtime.engines.tensorrt.record import BuildOptions

CAPACITY = 64
EXACT = ("session.qdq_matmulnbits_accuracy_level", "1")
KINDS: dict[str, dict[str, Any]] = {
    "qwen2": {},
    "internlm2": {"text": "internlm2"},
    "qwen3": {"text": "qwen3", "head_dim": 32, "padding_rows": 5},
    "native, 6b": {"layout": "native", "vision": "6b"},
}
NUMPY = {
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(uint8)": np.uint8,
    "tensor(float)": np.float32,
}


def opened(folder: Path, dtype: str, activations: str = "float32", **choices: Any) -> Bundle:
    checkpoint = tiny.write_checkpoint(folder / "checkpoint", **choices)
    return Bundle.open(export_bundle(checkpoint, folder / "bundle", dtype, activations))


def tailored(bundle: Bundle, dtype: str, decomposed: bool = False) -> tuple[bytes, bytes]:
    options = BuildOptions(dtype, capacity=CAPACITY)
    made = headers(bundle, options, decomposed)
    return made["vision"][0], made["decoder"][0]


def session(bundle: Bundle, header: bytes, name: str) -> onnxruntime.InferenceSession:
    """External data is found beside the header, so it is written there."""
    path = bundle.folder / name
    path.write_bytes(header)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry(*EXACT)
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


class Steps:
    """The tailored decoder in ONNX Runtime, with the cache carried by hand; slots beyond the used part hold rubbish."""

    def __init__(self, bundle: Bundle, header: bytes) -> None:
        self._session = session(bundle, header, "tailored.onnx")
        self._angles = RotaryAngles(bundle.manifest.model.decoder)
        self._past = {
            value.name: np.full(value.shape, 7, np.float16)
            for value in self._session.get_inputs()
            if value.name.startswith("past_key_values")
        }
        self._length = 0

    def run(self, embeds: np.ndarray[Any, Any], window: int, kept: list[int]) -> tuple[np.ndarray[Any, Any], list[int]]:
        cos, sin = self._angles.at(self._length, len(embeds), self._length + len(embeds))
        feeds = {"inputs_embeds": embeds[None], "cos": cos[None], "sin": sin[None]}
        feeds = {name: array.astype(np.float16) for name, array in feeds.items()}
        feeds |= {
            "past_length": np.array([self._length]),
            "slots": np.arange(window),
            "kept": np.array(kept),
        } | self._past
        names = [value.name for value in self._session.get_outputs()]
        outputs = dict(zip(names, self._session.run(None, feeds), strict=True))
        if "new_entries" in outputs:
            new = np.split(outputs["new_entries"], len(self._past), axis=1)
            for past, entries in zip(self._past.values(), new, strict=True):
                past[:, :, self._length : self._length + len(embeds)] = entries
        else:
            self._past = {name: outputs[name.replace("past_key_values", "present")] for name in self._past}
        self._length += len(embeds)
        return outputs["logits"][0], outputs["token"][0].tolist()


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("stored", ["float32", "float16", "bfloat16"])
def test_float16_headers_compute_what_the_bundle_computes(tmp_path: Path, kind: str, stored: str) -> None:
    bundle = opened(tmp_path, stored, **KINDS[kind])
    _assert_same_numbers(bundle, 0.03)


@pytest.mark.parametrize("kind", list(KINDS))
def test_decomposed_headers_compute_the_same_with_operators_of_opset_21(tmp_path: Path, kind: str) -> None:
    bundle = opened(tmp_path, "float16", **KINDS[kind])
    for header in tailored(bundle, "float16", decomposed=True):
        model = onnx.load_from_string(header)
        assert [entry.version for entry in model.opset_import] == [21]
        for node in model.graph.node:
            assert onnx.defs.get_schema(node.op_type, 21)  # raises where the operator is newer
    _assert_same_numbers(bundle, 0.03, decomposed=True)


def test_quantized_decoders_keep_their_correction(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums over groups cancel: they stay in float32, while scales become 16-bit constants."""
    checkpoint, _ = write_quantized(tiny.write_checkpoint(tmp_path / "plain"), tmp_path / "checkpoint", skewed=True)
    bundle = Bundle.open(export_bundle(checkpoint, tmp_path / "bundle", "float16"))
    model = ir.from_proto(onnx.load_from_string(tailored(bundle, "float16")[1]))
    sums = [node for node in model.graph if node.op_type == "ReduceSum"]
    assert sums
    for node in sums:
        parts = node.inputs[0].producer()  # type: ignore[union-attr]
        assert parts is not None
        assert parts.op_type == "Reshape"
        producer = parts.inputs[0].producer()  # type: ignore[union-attr]
        assert producer is not None
        assert (producer.op_type, producer.attributes["to"].as_int()) == ("Cast", int(ir.DataType.FLOAT))
    assert {node.inputs[1].dtype for node in model.graph if node.op_type == "DequantizeLinear"} == {  # type: ignore[union-attr]
        ir.DataType.FLOAT16
    }
    # Neither side may round activations to int8, as ONNX Runtime does by default.
    monkeypatch.setitem(engine_module._CONFIG, *EXACT)
    _assert_same_numbers(bundle, 0.03)


@pytest.mark.parametrize("scheme", [Scheme(8, None, True), Scheme(4, 32, True), Scheme(4, 32, False)], ids=str)
@pytest.mark.parametrize("decomposed", [False, True])
def test_a_quantized_head_with_an_odd_vocabulary_gets_columns_and_loses_them_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: Scheme, decomposed: bool
) -> None:
    plain = tiny.write_checkpoint(tmp_path / "plain", text="internlm2")
    choices = {"method": "compressed-tensors", "body": Scheme(4, 32, True), "head": scheme}
    checkpoint, _ = write_quantized(plain, tmp_path / "checkpoint", **choices)
    bundle = Bundle.open(export_bundle(checkpoint, tmp_path / "bundle", "float16"))
    vocabulary = bundle.manifest.model.decoder.vocab_size
    assert vocabulary % 2
    for dtype in ("float16", "bfloat16"):
        graph = ir.from_proto(onnx.load_from_string(tailored(bundle, dtype, decomposed)[1])).graph
        columns = {
            value.shape[-1]
            for node in graph
            if node.op_type == "DequantizeLinear"
            for value in node.inputs[:2]
            if value is not None and value.shape is not None and value.shape.rank()
        }
        assert all(isinstance(count, int) and count % 2 == 0 for count in columns)
        assert -(-vocabulary // 16) * 16 in columns
        assert next(value for value in graph.outputs if value.name == "logits").shape[-1] == vocabulary  # type: ignore[index]
    monkeypatch.setitem(engine_module._CONFIG, *EXACT)
    _assert_same_numbers(bundle, 0.03, decomposed)


@pytest.mark.parametrize("decomposed", [False, True])
def test_an_int8_cache_in_sixteen_bits_is_nearer_to_the_model_without_rounding(
    tmp_path: Path, decomposed: bool
) -> None:
    checkpoint = tiny.write_checkpoint(tmp_path / "checkpoint")
    exact = Bundle.open(export_bundle(checkpoint, tmp_path / "exact", "float16"))
    write_scales(checkpoint)
    bundle = Bundle.open(export_bundle(checkpoint, tmp_path / "bundle", "float16"))
    made = headers(bundle, BuildOptions("float16", capacity=CAPACITY), decomposed, wide_cache=True)
    embeds = np.random.default_rng(5).standard_normal((12, bundle.manifest.model.decoder.hidden_size))
    embeds = (0.6 * embeds).astype(np.float32)
    expected = OnnxRuntimeEngine(exact, dialect="standard", capacity=CAPACITY).score(embeds)
    rounded = OnnxRuntimeEngine(bundle, dialect="standard", capacity=CAPACITY).score(embeds)
    steps = Steps(bundle, made["decoder"][0])
    first, _ = steps.run(embeds[:7], 7, list(range(7)))
    second, _ = steps.run(embeds[7:], CAPACITY, list(range(5)))
    error = np.abs(np.concatenate([first, second]) - expected).max()
    assert error < 0.03 * expected.std()
    assert error < 0.5 * np.abs(rounded - expected).max()


@pytest.mark.parametrize("decomposed", [False, True])
def test_scales_of_channels_of_zeros_have_inverses_in_float16(tmp_path: Path, decomposed: bool) -> None:
    """Also where the bundle computes in float32, which holds larger numbers."""
    checkpoint = tiny.write_checkpoint(tmp_path / "checkpoint")
    write_scales_of_zeros(checkpoint)
    bundle = Bundle.open(export_bundle(checkpoint, tmp_path / "bundle"))
    graph = onnx.load_from_string(tailored(bundle, "float16", decomposed)[1]).graph
    constants = [onnx.numpy_helper.to_array(each) for each in graph.initializer if not each.external_data]
    assert {np.dtype(np.float16)} <= {constant.dtype for constant in constants}
    assert all(np.isfinite(constant).all() for constant in constants)


def test_the_token_is_chosen_from_logits_of_a_float16_product(tmp_path: Path) -> None:
    """The token is chosen from float32 logits of a float16 product, whatever the layers compute in."""
    bundle = opened(tmp_path, "float32")
    graph = ir.from_proto(onnx.load_from_string(tailored(bundle, "bfloat16")[1])).graph
    token = next(value for value in graph.outputs if value.name == "token").producer()
    assert token is not None
    logits = token.inputs[0]
    assert logits is not None
    assert (logits.name, logits.dtype) == ("logits", ir.DataType.FLOAT)
    narrow = logits.producer()
    assert narrow is not None
    product = narrow.inputs[0].producer()  # type: ignore[union-attr]
    assert product is not None
    assert product.op_type == "MatMul"
    hidden, weights = product.inputs
    cast = hidden.producer() if hidden is not None else None
    assert cast is not None
    assert cast.op_type == "Cast"
    assert cast.attributes["to"].as_int() == int(ir.DataType.FLOAT16)
    assert weights is not None
    stored = weights.producer()
    assert stored is not None
    assert (stored.op_type, stored.attributes["to"].as_int()) == ("Cast", int(ir.DataType.FLOAT16))
    assert isinstance(_source(weights).const_value, ir.ExternalTensor)


def _assert_same_numbers(bundle: Bundle, tolerance: float, decomposed: bool = False) -> None:
    """Vision and eight decoder steps, a prompt in two chunks included, in shares of the standard deviation."""
    vision, decoder = tailored(bundle, "float16", decomposed)
    config, random = bundle.manifest.model, np.random.default_rng(5)
    engine = OnnxRuntimeEngine(bundle, dialect="standard", capacity=CAPACITY)
    size = config.vision.image_size
    pixels = random.integers(0, 256, (3, size, size, 3), np.uint8)
    expected = engine.encode(pixels)
    found = session(bundle, vision, "tailored_vision.onnx").run(None, {"pixels": pixels})[0]
    assert found.dtype == np.float16
    assert np.abs(found - expected).max() < tolerance * expected.std()
    embeds = (0.6 * random.standard_normal((20, config.decoder.hidden_size))).astype(np.float32)
    steps = Steps(bundle, decoder)
    for chunk, window in ((embeds[:9], 9), (embeds[9:14], 20), *((embeds[n : n + 1], CAPACITY) for n in range(14, 20))):
        expected = engine.score(chunk)
        kept = sorted({0, len(chunk) // 2, len(chunk) - 1})
        logits, tokens = steps.run(chunk, window, kept)
        assert np.abs(logits - expected[kept]).max() < tolerance * expected.std()
        assert tokens == logits.argmax(axis=-1).tolist()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("activations", ["float32", "float16", "bfloat16"])
def test_only_sums_norms_and_logits_are_float32(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, activations: str
) -> None:
    monkeypatch.setattr(exporter, "ACTIVATIONS", tuple(DTYPES))  # graphs of older bundles may compute in bfloat16
    bundle = opened(tmp_path, "bfloat16", activations)
    wanted = {"float16": ir.DataType.FLOAT16, "bfloat16": ir.DataType.BFLOAT16}[dtype]
    for header in tailored(bundle, dtype):
        graph = ir.from_proto(onnx.load_from_string(header)).graph
        floats = {value.dtype for value in graph.inputs if value.name not in ("pixels", "past_length", "slots", "kept")}
        assert floats <= {wanted}
        outputs = {value.name: value.dtype for value in graph.outputs}
        assert outputs.pop("logits", ir.DataType.FLOAT) == ir.DataType.FLOAT
        assert outputs.pop("token", ir.DataType.INT64) == ir.DataType.INT64
        assert set(outputs.values()) == {wanted}
        half = [node for node in graph if node.op_type == "Cast" and node.attributes["to"].as_int() == 10]
        if dtype == "bfloat16":  # bytes become float16 first, and the head computes in it
            first, *others = half
            source = first.inputs[0]
            assert source is not None
            maker = source.producer()
            assert source.name == "pixels" or (maker is not None and maker.op_type == "RMSNormalization")
            assert all(cast.inputs[0] is not None and cast.inputs[0].is_initializer() for cast in others)
        casts = [node.attributes["to"].as_int() for node in graph if node.op_type == "Cast" and node not in half]
        assert set(casts) <= {int(wanted), int(ir.DataType.FLOAT)}
        assert casts.count(int(ir.DataType.FLOAT)) <= 1  # the logits
        stored = {value.const_value.dtype for value in graph.initializers.values() if value.const_value is not None}
        assert ir.DataType.FLOAT not in stored or activations != "float32"


def test_weights_stay_in_the_bundles_files(tmp_path: Path) -> None:
    bundle = opened(tmp_path, "float16")
    for header, own in zip(tailored(bundle, "bfloat16"), ("vision.onnx", "decoder.onnx"), strict=True):
        graph = ir.from_proto(onnx.load_from_string(header)).graph
        matrices = [
            value.const_value
            for node in graph
            if node.op_type == "MatMul"
            for value in (_source(node.inputs[1]),)
            if value.is_initializer()
        ]
        assert matrices
        assert all(isinstance(matrix, ir.ExternalTensor) for matrix in matrices)
        assert len(header) < 3 * bundle.path(own).stat().st_size


def _source(value: ir.Value | None) -> ir.Value:
    """The weight behind a cast."""
    assert value is not None
    producer = value.producer()
    if producer is not None and producer.op_type == "Cast":
        assert producer.inputs[0] is not None
        return producer.inputs[0]
    return value


def test_another_graph_is_refused(tmp_path: Path) -> None:
    bundle = opened(tmp_path, "float16")
    model = bundle.manifest.model
    with pytest.raises(
        BundleError, match=r"not the graph that export writes \(expected the weight vision.*export the bun"
    ):
        vision_header(bundle.path("decoder.onnx"), model, "float16", "float16")
    other = replace(model, decoder=replace(model.decoder, intermediate_size=3))
    with pytest.raises(BundleError, match=r"gate_proj.weight of shape \[64, 3\], found \[64, 128\]\); export"):
        decoder_header(bundle.path("decoder.onnx"), other, "float16", "float16", CAPACITY)
    shallow = replace(model, decoder=replace(model.decoder, num_hidden_layers=1))
    with pytest.raises(BundleError, match=r"expected no weight decoder\.layers\.1\.") as error:
        decoder_header(bundle.path("decoder.onnx"), shallow, "float16", "float16", CAPACITY)
    assert "\n" not in str(error.value)


def test_a_quantized_graph_of_another_dialect_is_refused(tmp_path: Path) -> None:
    checkpoint, _ = write_quantized(tiny.write_checkpoint(tmp_path / "plain"), tmp_path / "checkpoint")
    bundle = Bundle.open(export_bundle(checkpoint, tmp_path / "bundle", "float16"))
    path = bundle.path("decoder.onnxruntime.onnx")
    with pytest.raises(BundleError, match=r"decoder\.onnxruntime\.onnx is not the graph that export writes"):
        decoder_header(path, bundle.manifest.model, "float16", "float16", CAPACITY)


def test_a_weight_that_does_not_fit_the_type_is_named(tmp_path: Path) -> None:
    bundle = opened(tmp_path, "float32")
    graph = StoredGraph(bundle.path("decoder.onnx"), bundle.manifest.model)
    name = "decoder.norm.weight"
    tensor = graph.add(name, ir.DataType.FLOAT, (64,), lambda: np.zeros(64))
    assert isinstance(tensor, ir.ExternalTensor)
    with bundle.path("decoder.data").open("r+b") as file:
        file.seek(tensor.offset or 0)
        file.write(np.float32(1e6).tobytes())
    with pytest.raises(BundleError, match=rf"{name} does not fit float16; try another --dtype"):
        graph.add(name, ir.DataType.FLOAT16, (64,), lambda: np.zeros(64))
    wide = graph.add(name, ir.DataType.BFLOAT16, (64,), lambda: np.zeros(64)).numpy()
    assert float(wide[0]) == pytest.approx(1e6, rel=0.01)


@pytest.mark.parametrize("activations", ["float32", "float16"])
def test_what_a_graph_says_of_its_checkpoint_is_what_the_checkpoint_says(tmp_path: Path, activations: str) -> None:
    """Schemes, the scales of int8 inputs and of the cache; format 1 of the manifest does not know them all."""
    plain = tiny.write_checkpoint(tmp_path / "plain", vision_hidden_size=128)
    script = REPOSITORY / "benchmarks" / "int8_tower.py"
    assert run_script(script, plain, tmp_path / "tower").returncode == 0
    mixed = {"method": "compressed-tensors", "body": Scheme(4, 32, False), "head": Scheme(8, None, True)}
    decoder, _ = write_quantized(plain, tmp_path / "decoder", **mixed)
    write_scales(decoder)
    for folder, name in ((tmp_path / "tower", "vision.onnx"), (decoder, "decoder.onnx")):
        checkpoint = Checkpoint(folder)
        bundle = Bundle.open(export_bundle(folder, tmp_path / f"bundle of {name}", "float16", activations))
        graph = StoredGraph(bundle.path(name), checkpoint.config)
        part = "decoder." if name == "decoder.onnx" else ("vision.", "projector.")
        assert graph.schemes == {key: scheme for key, scheme in checkpoint.schemes.items() if key.startswith(part)}
        assert graph.schemes
        inputs = [key for key, scheme in graph.schemes.items() if scheme.static_inputs]
        assert bool(inputs) == (name == "vision.onnx")
        close = {"rtol": 1e-6 if activations == "float32" else 1e-3}
        for key in inputs:
            np.testing.assert_allclose(graph.input_scale(key), checkpoint.input_scale(key), **close)
        if name == "decoder.onnx":
            assert graph.kv_scales is not None
            assert checkpoint.kv_scales is not None
            np.testing.assert_allclose(graph.kv_scales.key, checkpoint.kv_scales.key, **close)
            np.testing.assert_allclose(graph.kv_scales.value, checkpoint.kv_scales.value, **close)


def test_the_tower_of_a_bundle_of_format_1_is_written_again(tmp_path: Path) -> None:
    """Its graph was made with the last version that wrote format 1."""
    shutil.copytree(REPOSITORY / "tests" / "data" / "format-1" / "mixed", tmp_path / "bundle")
    bundle = Bundle.open(tmp_path / "bundle")
    model = bundle.manifest.model
    pixels = np.random.default_rng(3).integers(0, 256, (2, *[model.vision.image_size] * 2, 3), np.uint8)
    expected = session(bundle, bundle.path("vision.onnx").read_bytes(), "own.onnx").run(None, {"pixels": pixels})[0]
    for decomposed in (False, True):
        header = vision_header(bundle.path("vision.onnx"), model, bundle.manifest.dtype, "float16", decomposed)
        found = session(bundle, header, "written.onnx").run(None, {"pixels": pixels})[0]
        assert np.sqrt(np.square(found - expected).mean()) < 0.03 * expected.std()  # int8 inputs round differently


def test_bundles_may_be_links(tmp_path: Path) -> None:
    """Package caches and copies made with `cp -l` hold hard links."""
    bundle = opened(tmp_path, "float16")
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in bundle.folder.iterdir():
        os.link(path, copy / path.name)
    assert tailored(Bundle.open(copy), "float16") == tailored(bundle, "float16")
