"""Engines really built by TensorRT for RTX, without a GPU; skipped where it is not installed.

Networks are inspected as parsed: what an engine became can only be read with a driver.
"""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest

from helpers import tiny
from helpers.commands import run_script
from helpers.kv_scales import write_scales
from helpers.parsed_networks import layer_types, layers, outputs_of_type, shape_inputs, tensors
from helpers.repository import REPOSITORY
from helpers.tiny_quantized import write_quantized
from internvl_edge import export_bundle
from internvl_edge.base.errors import EdgeError, EngineError
from internvl_edge.base.progress import Progress
from internvl_edge.bundle.bundle import Bundle
from internvl_edge.compiler import build_engines, bundle_engines
from internvl_edge.compiler.bundle_engines import headers, options_for
from internvl_edge.compiler.engine import Build, build_engine
from internvl_edge.compiler.network import parsed_network
from internvl_edge.model.linear import Scheme
from internvl_edge.planning.devices import Devices, Target
from internvl_edge.runtime.engines.tensorrt.flavour import load_flavour
from internvl_edge.runtime.engines.tensorrt.record import ENGINES, RECORD, EngineRecord, engine_folder

pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed (pip install tensorrt-rtx-cu13)")

RTX = Devices().target("rtx")
NEWER = {"ATTENTION_INPUT", "ATTENTION_OUTPUT", "ROTARY_EMBEDDING", "KV_CACHE_UPDATE", "NORMALIZATION_RMS"}
SIZES = {"capacity": 256, "chunk": 64, "tiles": 2}
SYMMETRIC = {"method": "compressed-tensors", "body": Scheme(4, 64, True), "head": Scheme(8, None, True)}


def export(folder: Path, quantized: dict[str, Any] | None = None, **choices: Any) -> Bundle:
    checkpoint = tiny.write_checkpoint(folder / "plain", **choices)
    if quantized is not None:
        checkpoint, _ = write_quantized(checkpoint, folder / "quantized", **quantized)
    return Bundle.open(export_bundle(checkpoint, folder / "bundle", "float16"))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return export(tmp_path_factory.mktemp("built"))


def networks(bundle: Bundle, dtype: str = "bfloat16", decomposed: bool = False, rows: int = 1) -> Any:
    flavour = load_flavour("tensorrt_rtx")
    for header, path in headers(bundle, options_for(RTX, dtype, **SIZES, rows=rows), decomposed).values():
        with parsed_network(flavour, header, path) as (_, network):
            yield network


# -- what TensorRT reads in the graphs ---------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["qwen2", "qwen3", "internlm2"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_decoder_is_attention_layers_over_a_cache_written_in_place(tmp_path: Path, text: str, dtype: str) -> None:
    bundle = export(tmp_path, text=text)
    decoder = bundle.manifest.model.decoder
    _, network = networks(bundle, dtype)
    count = layer_types(network)
    assert count["ATTENTION_INPUT"] == count["ATTENTION_OUTPUT"] == decoder.num_hidden_layers
    assert count["KV_CACHE_UPDATE"] == count["ROTARY_EMBEDDING"] == 2 * decoder.num_hidden_layers
    assert count["SOFTMAX"] == count["SCATTER"] == 0
    assert count["TOPK"] == 1
    io = tensors(network)
    kind = {"bfloat16": "BF16", "float16": "HALF"}[dtype]
    cache = (1, decoder.num_key_value_heads, SIZES["capacity"], decoder.head_dim)
    for layer in range(decoder.num_hidden_layers):
        for part in ("key", "value"):
            assert io[f"past_key_values.{layer}.{part}"] == ("input", kind, cache)
            assert io[f"present.{layer}.{part}"] == ("output", kind, cache)
    assert io["inputs_embeds"] == ("input", kind, (1, -1, decoder.hidden_size))
    assert io["logits"] == ("output", "FLOAT", (1, -1, decoder.vocab_size))
    assert io["token"] == ("output", "INT64", (1, -1))
    assert shape_inputs(network) == []


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_an_int8_cache_is_read_as_int8_and_what_is_new_comes_out(tmp_path: Path, dtype: str) -> None:
    checkpoint = tiny.write_checkpoint(tmp_path / "plain")
    write_scales(checkpoint)
    bundle = Bundle.open(export_bundle(checkpoint, tmp_path / "bundle", "float16"))
    decoder = bundle.manifest.model.decoder
    _, network = networks(bundle, dtype)
    count = layer_types(network)
    assert count["ATTENTION_INPUT"] == decoder.num_hidden_layers
    assert count["QUANTIZE"] == 2 * decoder.num_hidden_layers
    assert count["DEQUANTIZE"] == 4 * decoder.num_hidden_layers
    assert count["KV_CACHE_UPDATE"] == 0
    io = tensors(network)
    cache = (1, decoder.num_key_value_heads, SIZES["capacity"], decoder.head_dim)
    assert {io[name] for name in io if name.startswith("past_key_values")} == {("input", "INT8", cache)}
    rows = 2 * decoder.num_hidden_layers * decoder.num_key_value_heads
    assert io["new_entries"] == ("output", "INT8", (1, rows, -1, decoder.head_dim))
    assert shape_inputs(network) == []
    record, built = build_engines(bundle, RTX, options_for(RTX, dtype, **SIZES))
    assert built
    assert record.files[ENGINES["decoder"]]["bytes"] > 0


@pytest.mark.parametrize("kind", [{}, {"text": "internlm2", "vision": "6b"}, {"text": "qwen3", "head_dim": 32}])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_decomposed_graphs_need_no_newer_layers(tmp_path: Path, kind: dict[str, Any], dtype: str) -> None:
    """What TensorRT 10.3 is given; its own parser is not here, that of TensorRT for RTX takes it and builds it."""
    bundle = export(tmp_path, **kind)
    model = bundle.manifest.model
    seeing, reading = (
        layer_types(network) & Counter(dict.fromkeys(NEWER | {"SOFTMAX"}, 1000))
        for network in networks(bundle, dtype, decomposed=True)
    )
    assert seeing == {"SOFTMAX": model.vision_layers_used}
    assert reading == {"SOFTMAX": model.decoder.num_hidden_layers}
    flavour, options = load_flavour("tensorrt_rtx"), options_for(RTX, dtype, **SIZES)
    for graph, (header, path) in headers(bundle, options, decomposed=True).items():
        shapes = bundle_engines.profiles(model, options, graph)
        build = Build(header, path, RTX.sms, shapes, tmp_path / f"{graph}.engine")
        assert build_engine(flavour, build, lambda phase, done, total: None, threading.Event()).bytes > 0


def test_no_float32_but_norms_and_logits(bundle: Bundle) -> None:
    """Matrix products, attention, activations and the cache all have 16 bits; RMS norms compute in float32 inside.

    The head alone computes in float16, where fewer logits are equal.
    """
    for network, norms, heads in zip(
        networks(bundle), (0, 2 * bundle.manifest.model.decoder.num_hidden_layers + 1), (0, 1), strict=True
    ):
        for kind in ("ATTENTION_OUTPUT", "KV_CACHE_UPDATE", "ROTARY_EMBEDDING", "ACTIVATION"):
            assert set(outputs_of_type(network, kind)) <= {"BF16"}
        products = outputs_of_type(network, "MATRIX_MULTIPLY")
        assert products.keys() <= {"BF16", "HALF"}
        assert products["HALF"] == heads
        assert outputs_of_type(network, "REDUCE")["FLOAT"] == norms
        assert outputs_of_type(network, "CAST")["FLOAT"] <= 2 * norms + 1


@pytest.mark.parametrize("scales", [False, True], ids=["cache of floats", "int8 cache"])
@pytest.mark.parametrize("quantized", [None, {"skewed": True}, SYMMETRIC], ids=["floats", "awq", "symmetric"])
def test_decoders_with_norms_of_heads_build(tmp_path: Path, quantized: dict[str, Any] | None, scales: bool) -> None:
    """Qwen3's heads are wider than hidden / heads; the norms of q and k are two more sums in float32 per layer."""
    source = tiny.write_checkpoint(tmp_path / "plain", text="qwen3", head_dim=32, padding_rows=5)
    if quantized is not None:
        source, _ = write_quantized(source, tmp_path, **quantized)
    if scales:
        write_scales(source)
    bundle = Bundle.open(export_bundle(source, tmp_path / "bundle", "float16"))
    decoder = bundle.manifest.model.decoder
    assert decoder.head_dim * decoder.num_attention_heads != decoder.hidden_size
    _, network = networks(bundle)
    norms, corrections = 4 * decoder.num_hidden_layers + 1, 4 * decoder.num_hidden_layers
    zero_points = quantized is not None and quantized != SYMMETRIC
    assert outputs_of_type(network, "REDUCE")["FLOAT"] == norms + corrections * zero_points
    record, built = build_engines(bundle, RTX, options_for(RTX, "bfloat16", **SIZES))
    assert built
    assert record.files[ENGINES["decoder"]]["bytes"] > 0


def test_the_tower_takes_bytes_and_has_one_attention_per_layer(bundle: Bundle) -> None:
    vision, _ = networks(bundle)
    model = bundle.manifest.model
    size = model.vision.image_size
    assert tensors(vision) == {
        "pixels": ("input", "UINT8", (-1, size, size, 3)),
        "image_embeds": ("output", "BF16", (-1, model.tokens_per_tile, model.decoder.hidden_size)),
    }
    assert layer_types(vision)["ATTENTION_OUTPUT"] == model.vision_layers_used
    assert layer_types(vision)["SOFTMAX"] == 0


@pytest.mark.parametrize("name", ["awq", "symmetric"])
def test_int4_stays_weight_only_with_its_correction_beside_it(tmp_path: Path, name: str) -> None:
    """A quantized product is a dequantized constant and a matrix product; zero points add one small product more."""
    bundle = export(tmp_path, {"skewed": True} if name == "awq" else SYMMETRIC)
    _, network = networks(bundle)
    config = bundle.manifest.model.decoder
    linears, head = 7 * config.num_hidden_layers, 1
    dequantized = [layer for layer in layers(network) if layer.type.name == "DEQUANTIZE"]
    assert len(dequantized) == (linears if name == "awq" else linears + head)
    types = Counter(layer.get_input(0).dtype.name for layer in dequantized)
    assert types == ({"INT4": linears} if name == "awq" else {"INT4": linears, "INT8": head})
    made = Counter(layer.get_output(0).dtype.name for layer in dequantized)
    assert made == ({"BF16": linears} if name == "awq" else {"BF16": linears, "HALF": head})
    corrections = linears if name == "awq" else 0
    assert layer_types(network)["MATRIX_MULTIPLY"] == linears + head + corrections
    # q, k and v share the sums of their input, gate and up theirs; they are added up in float32.
    norms = 2 * config.num_hidden_layers + 1
    sums = 4 * config.num_hidden_layers if name == "awq" else 0
    assert outputs_of_type(network, "REDUCE")["FLOAT"] == norms + sums


def test_int8_towers_keep_their_quantized_products(tmp_path: Path) -> None:
    """Inputs and weights of every product in the blocks are quantized; attention and the rest have 16 bits."""
    source, checkpoint = tiny.write_checkpoint(tmp_path / "plain"), tmp_path / "int8"
    script = REPOSITORY / "benchmarks" / "int8_tower.py"
    assert run_script(script, source, checkpoint).returncode == 0
    bundle = Bundle.open(export_bundle(checkpoint, tmp_path / "bundle", "float16"))
    vision, _ = networks(bundle)
    products = 4 * bundle.manifest.model.vision_layers_used
    assert layer_types(vision)["QUANTIZE"] == products
    assert layer_types(vision)["DEQUANTIZE"] == 2 * products
    assert outputs_of_type(vision, "QUANTIZE") == {"INT8": products}
    assert outputs_of_type(vision, "DEQUANTIZE") == {"BF16": 2 * products}
    assert set(outputs_of_type(vision, "MATRIX_MULTIPLY")) == {"BF16"}
    assert build_engines(bundle, RTX, options_for(RTX, **SIZES))[1]


# -- engines -----------------------------------------------------------------------------------------------------------


def test_one_file_for_all_cards_is_built_once(tmp_path: Path) -> None:
    bundle = export(tmp_path)
    options = options_for(RTX, **SIZES)
    log = io.StringIO()
    with Progress(log) as progress:
        record, built = build_engines(bundle, RTX, options, progress=progress)
    assert built
    assert record.compute_capabilities == (86, 89, 120)
    assert log.getvalue().splitlines()[:3] == [
        "internvl-edge: [1 of 3] building vision.engine",
        "internvl-edge: [2 of 3] building decoder.engine",
        "internvl-edge: [3 of 3] comparing the engines with ONNX Runtime",
    ]
    folder = engine_folder(bundle, "rtx")
    assert sorted(path.name for path in folder.iterdir()) == sorted([*ENGINES.values(), RECORD])
    assert EngineRecord.read(folder) == record
    for figures in record.figures.values():
        assert figures["peak_rss"] > 1e7
        assert figures["seconds"] > 0
    before = (folder / "decoder.engine").stat().st_mtime_ns
    assert build_engines(bundle, RTX, options)[1] is False
    assert (folder / "decoder.engine").stat().st_mtime_ns == before
    for changed in (replace(options, capacity=512), replace(options, dtype="float16")):
        assert build_engines(bundle, RTX, changed)[1] is True
    (folder / "decoder.engine").write_bytes(b"half")
    assert build_engines(bundle, RTX, options)[1] is True
    assert [path.name for path in folder.parent.iterdir()] == ["rtx"]


@pytest.mark.parametrize("quantized", [{"skewed": True}, SYMMETRIC])
def test_quantized_engines_build(tmp_path: Path, quantized: dict[str, Any]) -> None:
    bundle = export(tmp_path, quantized)
    assert build_engines(bundle, RTX, options_for(RTX, **SIZES))[1]


def test_two_profiles_and_other_compute_capabilities_build(bundle: Bundle) -> None:
    older = Target("turing", "a card of the 20 series", "tensorrt_rtx", ("7.5",))
    assert options_for(older).dtype == "float16"
    with pytest.raises(EngineError, match="no bfloat16"):
        build_engines(bundle, older, options_for(older, "bfloat16", **SIZES))
    ada = Devices().target("rtx-4060")
    assert build_engines(bundle, ada, options_for(ada, **SIZES, profiles=2))[0].compute_capabilities == (89,)


@pytest.mark.parametrize("form", ["modern", "int8 cache", "decomposed"])
def test_engines_for_several_rows_build(tmp_path: Path, form: str) -> None:
    checkpoint = tiny.write_checkpoint(tmp_path / "plain")
    if form == "int8 cache":
        write_scales(checkpoint)
    bundle = Bundle.open(export_bundle(checkpoint, tmp_path / "bundle", "float16"))
    model, options = bundle.manifest.model, options_for(RTX, **SIZES, rows=3)
    assert (options.profiles, options.slots) == (2, SIZES["capacity"] // 128 * 128 + 128)
    _, network = networks(bundle, decomposed=form == "decomposed", rows=3)
    io = tensors(network)
    kind = "INT8" if form == "int8 cache" else "BF16"
    cache = (-1, model.decoder.num_key_value_heads, options.slots, model.decoder.head_dim)
    assert {io[name][1:] for name in io if name.startswith("past_key_values")} == {(kind, cache)}
    assert io["inputs_embeds"] == ("input", "BF16", (-1, -1, model.decoder.hidden_size))
    assert io["past_length"] == ("input", "INT64", (-1,))
    assert io["logits"] == ("output", "FLOAT", (-1, -1, model.decoder.vocab_size))
    assert ("new_entries" in io) == (form != "modern")
    assert shape_inputs(network) == []
    if form == "decomposed":
        header, path = headers(bundle, options, decomposed=True)["decoder"]
        shapes = bundle_engines.profiles(model, options, "decoder")
        build = Build(header, path, RTX.sms, shapes, tmp_path / "decoder.engine")
        made = build_engine(load_flavour("tensorrt_rtx"), build, lambda phase, done, total: None, threading.Event())
        assert made.bytes > 0
        return
    record, built = build_engines(bundle, RTX, options)
    assert built
    assert EngineRecord.read(engine_folder(bundle, "rtx")).options.rows == 3
    assert build_engines(bundle, RTX, options) == (record, False)
    assert build_engines(bundle, RTX, options_for(RTX, **SIZES, rows=2))[1]


def test_a_graph_the_parser_rejects_is_one_line_that_names_the_node(tmp_path: Path) -> None:
    """Zero points are what TensorRT takes least: the very graph that the exact correction avoids."""
    bundle = export(tmp_path, SYMMETRIC)
    flavour = load_flavour("tensorrt_rtx")
    header, path = headers(bundle, options_for(RTX, **SIZES))["decoder"]
    model = onnx.load_from_string(header)
    node = next(node for node in model.graph.node if node.op_type == "DequantizeLinear")
    scale = next(value for value in model.graph.initializer if value.name == node.input[1])
    zeros = onnx.helper.make_tensor("zeros", onnx.TensorProto.INT4, scale.dims, [3] * (scale.dims[0] * scale.dims[1]))
    model.graph.initializer.append(zeros)
    node.input.append("zeros")
    with (
        pytest.raises(EngineError, match=r"rejects decoder\.onnx") as error,
        parsed_network(flavour, model.SerializeToString(), path),
    ):
        pass
    assert node.name in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("sizes", "fragment"),
    [
        ({"capacity": 4}, "no room for one tile"),
        ({"capacity": 64, "chunk": 65}, "do not fit a context of 64"),
        ({"tiles": 0}, "0 tiles"),
        ({"profiles": 4}, "4 optimization profiles, expected 1 to 3"),
        ({"rows": 65}, "65 rows, expected 1 to 64"),
        ({"rows": 2, "profiles": 3}, "engines for 2 rows have 2 programs, .* not 3; leave out --profiles, or --rows"),
        ({"rows": 2, "profiles": 1}, "engines for 2 rows have 2 programs, .* not 1; leave out --profiles, or --rows"),
    ],
)
def test_sizes_that_cannot_be(bundle: Bundle, sizes: dict[str, int], fragment: str) -> None:
    with pytest.raises(EngineError, match=fragment):
        build_engines(bundle, RTX, options_for(RTX, **sizes))


def test_a_bundle_for_onnx_runtime_alone_is_refused(tmp_path: Path) -> None:
    bundle = export(tmp_path)
    files = {name: entry for name, entry in bundle.manifest.files.items() if name != "decoder.onnx"}
    bare = replace(bundle, manifest=replace(bundle.manifest, files=files))
    with pytest.raises(EngineError, match=r"has no decoder\.onnx, which TensorRT reads"):
        build_engines(bare, RTX, options_for(RTX, **SIZES))


def test_scales_below_0_are_refused_by_name(tmp_path: Path) -> None:
    bundle = export(tmp_path, SYMMETRIC | {"negative": True})
    with pytest.raises(EdgeError, match=r"layers\.0\.self_attn\.q_proj has scales below 0, .* --positive-scales"):
        build_engines(bundle, RTX, options_for(RTX, **SIZES))


def test_too_little_memory_is_said_before_anything_starts(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle_engines, "memory", lambda *fields: 10**6)
    with pytest.raises(EngineError, match=r"needs about 0\.5 GB of memory, 0\.0 GB are available"):
        build_engines(bundle, RTX, options_for(RTX, **SIZES), force=True)


def test_compute_capabilities_that_the_library_does_not_know(bundle: Bundle) -> None:
    future = Target("future", "a card of the future", "tensorrt_rtx", ("99.0",))
    with pytest.raises(EngineError, match="does not build for SM990"):
        build_engines(bundle, future, options_for(future, **SIZES))
    assert not engine_folder(bundle, "future").exists()


def test_jetson_engines_are_built_on_the_jetson(bundle: Bundle) -> None:
    orin = Devices().target("orin-nano-8gb")
    with pytest.raises(EdgeError, match=r"JetPack|compute capability"):
        build_engines(bundle, orin, options_for(orin, **SIZES))


@pytest.mark.parametrize("force", [False, True])
def test_a_file_of_the_user_beside_engines_is_named_and_kept(tmp_path: Path, force: bool) -> None:
    bundle = export(tmp_path)
    folder = engine_folder(bundle, "rtx")
    folder.mkdir(parents=True)
    (folder / RECORD).write_text('{"format_version": 1, "files": {}}')
    (folder / "mine.engine").touch()
    with pytest.raises(EdgeError, match=rf"{folder}/mine.engine is not part of it; remove that file or build"):
        build_engines(bundle, RTX, options_for(RTX, **SIZES), force=force)
    assert (folder / "mine.engine").exists()


def test_an_interrupted_build_leaves_nothing(tmp_path: Path) -> None:
    bundle = export(tmp_path)
    code = "from internvl_edge.cli import main; main()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, "build", str(bundle.folder), "--device", "rtx"], stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        if list(bundle.folder.glob("engines/.rtx.partial-*/vision.engine")):
            process.send_signal(signal.SIGTERM)
            break
        time.sleep(0.002)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode in (130, -signal.SIGTERM), stderr
    assert os.listdir(bundle.folder / "engines") == []


def test_the_command(tmp_path: Path) -> None:
    bundle = export(tmp_path)
    code = "from internvl_edge.cli import main; main()"
    command = [sys.executable, "-c", code, "build", str(bundle.folder), "--context", "256", "--chunk", "64"]
    made = json.loads(subprocess.run([*command, "--json"], capture_output=True, text=True, check=True).stdout)
    assert made["built"]
    assert made["options"]["capacity"] == 256
    assert made["options"]["profiles"] == 3  # a tiny model has room for all programs
    assert made["notes"] == []
    again = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "nothing changed" in again.stdout
    assert "programs of the decoder: 3" in again.stdout
    several = subprocess.run([*command, "--rows", "4"], capture_output=True, text=True, check=True)
    assert "4 rows, " in several.stdout
    assert "programs of the decoder: 2" in several.stdout
    one = subprocess.run([*command, "--profiles", "1"], capture_output=True, text=True, check=True)
    assert "Note: one program serves prompts and steps, so each step copies the cache" in one.stdout
    wrong = subprocess.run([*command, "--device", "abacus"], capture_output=True, text=True, check=False)
    assert wrong.returncode == 2
    assert wrong.stderr.count("\n") == 1
