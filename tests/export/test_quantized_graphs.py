"""Graphs of quantized checkpoints in both dialects against the torch reference on the weights they stand for."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers import tiny
from helpers.engines import TEXT, run
from helpers.reference import Reference
from helpers.tiny_quantized import write_quantized
from internvl_edge import export_bundle
from internvl_edge.base.errors import EdgeError
from internvl_edge.base.jsonable import encode
from internvl_edge.bundle.bundle import Bundle
from internvl_edge.bundle.manifest import DecoderQuantization
from internvl_edge.bundle.names import DECODERS
from internvl_edge.checkpoint.reader import Checkpoint
from internvl_edge.export.builder import GraphBuilder, Types
from internvl_edge.export.quantized import PackedWeights
from internvl_edge.export.weights import WeightFile
from internvl_edge.model.linear import Scheme
from internvl_edge.runtime.engines import onnxruntime as engine_module
from internvl_edge.runtime.engines.onnxruntime import OnnxRuntimeEngine

COMPRESSED: dict[str, Any] = {"method": "compressed-tensors"}
INT8 = Scheme(8, None, True)
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "qwen2 awq": ({}, {}),
    "qwen2 awq, skewed": ({}, {"skewed": True, "place": "top"}),
    "internlm2 awq, fused, .bin": ({"text": "internlm2"}, {"file_format": "bin", "listed": False}),
    "qwen3 awq": ({"text": "qwen3", "head_dim": 32}, {}),
    "qwen3 native, tied, int4 symmetric": (
        {"text": "qwen3", "head_dim": 24, "layout": "native_prefixed", "tie": True},
        COMPRESSED | {"body": Scheme(4, 32, True)},
    ),
    "native awq": ({"layout": "native_prefixed"}, {"place": "both"}),
    "int4 symmetric, int8 head": ({"text": "internlm2"}, COMPRESSED | {"body": Scheme(4, 64, True), "head": INT8}),
    "int4 with negative scales": ({}, COMPRESSED | {"body": Scheme(4, 32, True), "negative": True}),
    "int8": ({}, COMPRESSED | {"body": INT8, "head": INT8, "listed": False}),
    "int8 groups with zero points": ({}, COMPRESSED | {"body": Scheme(8, 32, False)}),
    "tied, int4 head": ({"layout": "native", "tie": True}, COMPRESSED | {"body": Scheme(4, 32, False)}),
    "int4 per output": ({}, COMPRESSED | {"body": Scheme(4, None, True)}),
    "int8, widths without blocks": (
        {"hidden_size": 72, "num_attention_heads": 3, "num_key_value_heads": 1, "intermediate_size": 200},
        COMPRESSED | {"body": INT8, "head": Scheme(4, None, False)},
    ),
    "int4 groups of 48": (
        {"hidden_size": 96, "num_attention_heads": 6, "intermediate_size": 144},
        COMPRESSED | {"body": Scheme(4, 48, False)},
    ),
}


@pytest.mark.usefixtures("float_activations")
@pytest.mark.parametrize("kind", KINDS)
def test_both_dialects_compute_with_the_checkpoint_s_weights(tmp_path: Path, kind: str) -> None:
    sizes, choices = KINDS[kind]
    source = tiny.write_checkpoint(tmp_path / "float", **sizes)
    quantized, twin = write_quantized(source, tmp_path, **choices)
    bundle = export_bundle(quantized, tmp_path / "bundle")
    reference = Reference(twin)
    expected = reference.generate(TEXT, max_new_tokens=4)
    for dialect in DECODERS:
        logits = run(bundle, dialect, reference, 4)
        np.testing.assert_allclose(logits, expected.step_logits.numpy(), atol=1e-4)
        assert logits.argmax(-1).tolist() == expected.ids
    unquantized = Reference(source).generate(TEXT, max_new_tokens=1).prefill_logits
    assert (unquantized - expected.prefill_logits).abs().max() > 3e-4  # or the checks above would show nothing


@pytest.mark.parametrize("dialect", DECODERS)
def test_rounding_activations_to_int8_costs_little(tmp_path: Path, dialect: str) -> None:
    """What the engine does by default; see the decisions for its cost on real weights."""
    quantized, twin = write_quantized(tiny.write_checkpoint(tmp_path / "float"), tmp_path)
    reference = Reference(twin)
    expected = reference.generate(TEXT, max_new_tokens=1).prefill_logits.numpy()
    error = run(export_bundle(quantized, tmp_path / "bundle"), dialect, reference, 1)[0] - expected
    assert 1e-4 < np.abs(error).max() < 0.1 * expected.std()


@pytest.mark.parametrize("scale", [1.0, 1e-3])
@pytest.mark.parametrize("dialect", DECODERS)
def test_groups_of_zeros_add_nothing_whatever_their_scale(tmp_path: Path, dialect: str, scale: float) -> None:
    """Rows that pruning or padding left empty get a scale that fits no weight beside them."""
    source = tiny.write_checkpoint(tmp_path / "float")
    tensors = load_file(source / "model.safetensors")
    pruned = [name for name in tensors if name.endswith(("o_proj.weight", "down_proj.weight"))]
    for name in pruned:
        tensors[name][::2] = 0
    save_file(tensors, source / "model.safetensors")
    quantized, twin = write_quantized(source, tmp_path)
    packed = load_file(quantized / "model.safetensors")
    for name in pruned:
        packed[name.replace(".weight", ".scales")][:, ::2] = scale
    save_file(packed, quantized / "model.safetensors")
    reference = Reference(twin)
    expected = reference.generate(TEXT, max_new_tokens=1).prefill_logits.numpy()
    error = run(export_bundle(quantized, tmp_path / "bundle"), dialect, reference, 1)[0] - expected
    assert np.abs(error).max() < 0.1 * expected.std()


@pytest.mark.parametrize("kind", KINDS)
def test_every_quantized_product_is_fused(tmp_path: Path, kind: str) -> None:
    sizes, choices = KINDS[kind]
    quantized, _ = write_quantized(tiny.write_checkpoint(tmp_path / "float", **sizes), tmp_path, **choices)
    bundle = export_bundle(quantized, tmp_path / "bundle")
    for name in DECODERS.values():
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath = str(tmp_path / f"optimized-{name}")
        options.log_severity_level = 3
        for key, value in engine_module._CONFIG.items():
            options.add_session_config_entry(key, value)
        onnxruntime.InferenceSession(str(bundle / name), options, providers=["CPUExecutionProvider"])
        graph = onnx.load(options.optimized_model_filepath, load_external_data=False).graph
        count = Counter(node.op_type for node in graph.node)
        fused = 7 * 2 + ("head" in choices)
        unfused = fused if kind == "int4 groups of 48" and name == DECODERS["standard"] else 0
        assert (count["MatMulNBits"], count["DequantizeLinear"]) == (fused - unfused, unfused)


def test_each_dialect_has_its_own_form_of_quantized_weights_and_shares_the_rest(tmp_path: Path) -> None:
    quantized, _ = write_quantized(tiny.write_checkpoint(tmp_path / "float"), tmp_path)
    bundle = export_bundle(quantized, tmp_path / "bundle")
    places: dict[str, dict[str, tuple[str, ...]]] = {}
    for dialect, name in DECODERS.items():
        model = onnx.load(bundle / name, load_external_data=False)
        if dialect == "standard":
            onnx.checker.check_model(str(bundle / name), full_check=True)
            assert {len(node.input) for node in model.graph.node if node.op_type == "DequantizeLinear"} == {2}
            assert {node.domain for node in model.graph.node} == {""}
        places[dialect] = {
            tensor.name: tuple(entry.value for entry in tensor.external_data)
            for tensor in model.graph.initializer
            if tensor.external_data
        }
    standard, ours = places["standard"], places["onnxruntime"]
    assert {standard[name] == ours[name] for name in standard.keys() & ours.keys()} == {True}
    assert {name.rpartition(".")[2] for name in standard.keys() - ours.keys()} == {"values", "scale", "correction"}
    only_ours = {name: place[0] for name, place in ours.items() if name not in standard}
    assert {name.rpartition(".")[2] for name in only_ours} == {"blocks", "block_scale", "block_zero_point"}
    assert set(only_ours.values()) == {"decoder.onnxruntime.data"}


def product_in_graph(checkpoint: Checkpoint, name: str, dialect: str, folder: Path, x: np.ndarray) -> np.ndarray:
    """x [rows, in] times the weights of one linear as a graph of x's type computes it, unoptimized."""
    kind = ir.DataType.FLOAT16 if x.dtype == np.float16 else ir.DataType.FLOAT
    types, file = Types(kind, kind), WeightFile(f"{dialect}.data")
    packed = PackedWeights(checkpoint, types)
    g = GraphBuilder("linear", types, file, checkpoint.shapes, checkpoint.tensor)
    out, inputs = checkpoint.shapes[f"{name}.weight"]
    y = packed.matmul(g, g.input("x", kind, [1, len(x), inputs]), name, dialect)
    assert y is not None
    g.output(y, "y", kind, [1, len(x), out])
    ir.save(g.model(), folder / f"{dialect}.onnx")
    for written in (file, packed.blocks):
        written.write(folder, lambda _: None)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(folder / f"{dialect}.onnx"), options, providers=["CPUExecutionProvider"])
    products: np.ndarray = session.run(None, {"x": x[None]})[0]
    return products[0]


def weights_in_graph(checkpoint: Checkpoint, name: str, dialect: str, folder: Path) -> np.ndarray:
    """The weights [out, in] that a built graph multiplies with."""
    identity = np.eye(checkpoint.shapes[f"{name}.weight"][1], dtype=np.float32)
    return product_in_graph(checkpoint, name, dialect, folder, identity).T


def relative(error: np.ndarray, of: np.ndarray) -> float:
    return float(np.linalg.norm(error) / np.linalg.norm(of))


@pytest.mark.usefixtures("float_activations")
@pytest.mark.parametrize("skewed", [False, True], ids=["centred", "skewed"])
def test_zero_points_are_imported_without_loss_where_a_clamp_loses(tmp_path: Path, skewed: bool) -> None:
    """Every weight through the graph, to 1e-6 of itself; and what clamping q - z to int4 would make of it."""
    quantized, twin = write_quantized(
        tiny.write_checkpoint(tmp_path / "float", text="internlm2"), tmp_path, skewed=skewed
    )
    checkpoint, expected = Checkpoint(quantized), Checkpoint(twin)
    clamped = []
    for name in sorted(checkpoint.schemes):
        exact = expected.tensor(f"{name}.weight")
        for dialect in DECODERS:
            np.testing.assert_allclose(weights_in_graph(checkpoint, name, dialect, tmp_path), exact, rtol=1e-6, atol=0)
        linear = checkpoint.linear(name)
        assert linear is not None
        assert linear.zero_point is not None
        centred = linear.values.astype(int) - np.repeat(linear.zero_point, linear.group_size, axis=1)
        clamp = np.clip(centred, -8, 7) * np.repeat(linear.scale, linear.group_size, axis=1)
        clamped.append(relative(clamp - exact, exact))
    assert np.mean(clamped) > (0.25 if skewed else 0.02)


def test_zero_points_are_a_second_term_for_tensorrt_and_float16_says_what_it_costs(tmp_path: Path) -> None:
    quantized, twin = write_quantized(tiny.write_checkpoint(tmp_path / "float"), tmp_path, skewed=True)
    bundle = export_bundle(quantized, tmp_path / "bundle", "float16", "float16")
    graph = onnx.load(bundle / DECODERS["standard"], load_external_data=False).graph
    assert {len(node.input) for node in graph.node if node.op_type == "DequantizeLinear"} == {2}
    checkpoint, expected = Checkpoint(quantized), Checkpoint(twin)
    corrections = [tensor.name for tensor in graph.initializer if tensor.name.endswith(".correction")]
    assert sorted(corrections) == [f"{name}.correction" for name in sorted(checkpoint.schemes)]
    missed, exact = [], []
    for name in sorted(checkpoint.schemes):
        linear = checkpoint.linear(name)
        assert linear is not None
        assert linear.zero_point is not None
        scale, zeros = linear.scale, linear.scale * (linear.zero_point.astype(np.float32) - 8)
        stored, correction = (
            np.repeat(grid.astype(np.float16).astype(float), linear.group_size, 1) for grid in (scale, zeros)
        )
        exact.append(expected.tensor(f"{name}.weight").astype(float).ravel())
        missed.append((stored * (linear.values.astype(float) - 8) - correction).ravel() - exact[-1])
    summary = Bundle.open(bundle).manifest.quantization
    assert summary is not None
    assert summary.weight_error == pytest.approx(relative(np.concatenate(missed), np.concatenate(exact)), rel=1e-3)
    assert 1e-5 < summary.weight_error < 1e-3


def test_the_manifest_tells_how_the_decoder_is_quantized(tmp_path: Path) -> None:
    source = tiny.write_checkpoint(tmp_path / "float")
    quantized, _ = write_quantized(source, tmp_path)
    bundle = export_bundle(quantized, tmp_path / "bundle", dtype="float16")
    summary = Bundle.open(bundle).manifest.quantization
    body = 2 * (64 * (64 + 32 + 32 + 64) + 3 * 64 * 128)
    head = 64 * Checkpoint(source).config.decoder.vocab_size
    bits = (body * (4 + 36 / 32) + head * 16) / (body + head)
    assert summary == DecoderQuantization("awq", round(bits, 3), 0.0)
    linears = Bundle.open(bundle).manifest.linears
    assert set(linears) == set(Checkpoint(quantized).schemes)
    assert set(linears.values()) == {Scheme(4, 32, symmetric=False)}
    assert Bundle.open(export_bundle(source, tmp_path / "plain")).manifest.quantization is None


@pytest.mark.parametrize("head", [INT8, Scheme(4, 32, False), None], ids=["int8 head", "int4 head", "float head"])
def test_padding_of_the_vocabulary_never_wins(tmp_path: Path, head: Scheme | None) -> None:
    """Rows beyond the tokenizer's that would win by far, and rows of zeros where every logit is negative."""
    source = tiny.write_checkpoint(tmp_path / "float")
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    vocabulary, hidden = config["llm_config"]["vocab_size"], config["llm_config"]["hidden_size"]
    config["llm_config"]["vocab_size"] = vocabulary + 24
    (source / "config.json").write_text(json.dumps(config), encoding="utf-8")
    tensors = load_file(source / "model.safetensors")
    random = torch.Generator().manual_seed(0)
    for name in ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"):
        tensors[name] = torch.cat([tensors[name], 50 * torch.randn(24, hidden, generator=random).bfloat16()])
    tensors["language_model.lm_head.weight"][50:60] = 0
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    padding = [*range(50, 60), *range(vocabulary, vocabulary + 24)]

    choices = COMPRESSED | {"body": Scheme(4, 32, False), "head": head}
    quantized, twin = write_quantized(source, tmp_path, **choices)
    reference = Reference(twin)
    assert int(reference.generate(TEXT, max_new_tokens=1).ids[0]) in padding  # without care it does win
    bundle = export_bundle(quantized, tmp_path / "bundle")
    for dialect in DECODERS:
        logits = run(bundle, dialect, reference, 3)
        assert (logits[:, padding] < np.delete(logits, padding, axis=1).min()).all()


@pytest.mark.usefixtures("float_activations")
@pytest.mark.parametrize("dialect", DECODERS)
def test_float16_activations_stay_close(tmp_path: Path, dialect: str) -> None:
    quantized, twin = write_quantized(tiny.write_checkpoint(tmp_path / "float"), tmp_path)
    reference = Reference(twin)
    bundle = export_bundle(quantized, tmp_path / "bundle", dtype="float16", activations="float16")
    expected = reference.generate(TEXT, max_new_tokens=1).prefill_logits.numpy()
    assert np.abs(run(bundle, dialect, reference, 1)[0] - expected).max() < 0.02 * expected.std()


@pytest.mark.usefixtures("float_activations")
@pytest.mark.parametrize("skewed", [False, True], ids=["centred", "skewed"])
@pytest.mark.parametrize("kind", ["large mean", "one huge channel"])
def test_the_two_terms_do_not_cancel_badly_in_float16(tmp_path: Path, kind: str, skewed: bool) -> None:
    """Inputs for which both terms are much larger than their sum; the zero points' own product is the yardstick."""
    source = tiny.write_checkpoint(tmp_path / "float", hidden_size=512)
    quantized, twin = write_quantized(source, tmp_path, skewed=skewed)
    x = np.random.default_rng(0).standard_normal((16, 512))
    x[:, 3] += 200 if kind == "one huge channel" else 0
    x = (x + (10 if kind == "large mean" else 0)).astype(np.float16)
    name = "decoder.layers.0.mlp.up_proj"
    exact = x.astype(np.float64) @ Checkpoint(twin).tensor(f"{name}.weight").T.astype(np.float64)
    errors = {
        dialect: relative(product_in_graph(Checkpoint(quantized), name, dialect, tmp_path, x) - exact, exact)
        for dialect in DECODERS
    }
    assert errors["onnxruntime"] < 1e-3
    assert errors["standard"] < 1e-3


def test_group_sizes_without_blocks_name_the_layer(tmp_path: Path) -> None:
    sizes = {"hidden_size": 72, "num_attention_heads": 6, "intermediate_size": 144}
    choices = COMPRESSED | {"body": Scheme(4, 24, False)}
    quantized, _ = write_quantized(tiny.write_checkpoint(tmp_path / "float", **sizes), tmp_path, **choices)
    with pytest.raises(EdgeError, match=r"layers\.0\.self_attn\.q_proj has groups of 24.*32, 64 or 128"):
        export_bundle(quantized, tmp_path / "bundle")


@pytest.mark.parametrize("only", DECODERS)
def test_one_dialect_stores_quantized_weights_once(tmp_path: Path, only: str) -> None:
    """Rows wide enough that weights, not alignment, make up the files."""
    source = tiny.write_checkpoint(tmp_path / "float", hidden_size=256, intermediate_size=512)
    quantized, twin = write_quantized(source, tmp_path)
    both = export_bundle(quantized, tmp_path / "both")
    one = export_bundle(quantized, tmp_path / "one", dialects=[only])
    sizes = [sum(path.stat().st_size for path in folder.glob("decoder*.data")) for folder in (both, one)]
    assert sizes[1] < sizes[0] - 2 * 256 * 512 * 3 / 2
    np.testing.assert_array_equal(run(one, only, Reference(twin), 1), run(both, only, Reference(twin), 1))
    (other,) = set(DECODERS) - {only}
    with pytest.raises(EdgeError, match=f"no {other} decoder; export it again with --dialect {other}"):
        OnnxRuntimeEngine(Bundle.open(one), dialect=other, capacity=8)
    with pytest.raises(EdgeError, match=r"dialects \['cuda'\] are not some of"):
        export_bundle(quantized, tmp_path / "none", dialects=["cuda"])


def test_the_command_prints_what_was_quantized_and_what_it_cost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from internvl_edge import cli

    quantized, _ = write_quantized(tiny.write_checkpoint(tmp_path / "float"), tmp_path)
    common = ["internvl-edge", "export", str(quantized)]
    monkeypatch.setattr("sys.argv", [*common, "-o", str(tmp_path / "text"), "--dialect", "standard"])
    with pytest.raises(SystemExit, match="0"):
        cli.main()
    assert "14 x int4 in groups of 32, with zero points" in (printed := capsys.readouterr().out)
    assert "bits per weight, weights equal to the checkpoint's" in printed
    monkeypatch.setattr("sys.argv", [*common, "-o", str(tmp_path / "json"), "--json"])
    with pytest.raises(SystemExit, match="0"):
        cli.main()
    facts = json.loads(capsys.readouterr().out)
    manifest = Bundle.open(tmp_path / "json").manifest
    assert facts["quantization"] == encode(manifest.quantization)
    assert facts["linears"] == encode(manifest.linears)
