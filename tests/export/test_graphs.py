"""Exported graphs in both dialects against the independent torch reference, on tiny checkpoints of every kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import pytest

from helpers import tiny
from helpers.engines import TEXT, engine_for, greedy, random_tiles
from helpers.manifests import change_manifest
from helpers.reference import Reference
from internvl_edge import export_bundle
from internvl_edge.base.errors import EdgeError, EngineError
from internvl_edge.bundle.bundle import Bundle
from internvl_edge.bundle.names import DECODERS, VISION
from internvl_edge.runtime.engines.onnxruntime import PREFILL_SIZES, OnnxRuntimeEngine

KINDS: dict[str, dict[str, Any]] = {
    "qwen2": {},
    "internlm2": {"text": "internlm2"},
    "qwen3, other width of heads": {"text": "qwen3", "head_dim": 32, "padding_rows": 5},
    "qwen3, large eps": {"text": "qwen3", "rms_norm_eps": 0.5},
    "qwen3, one kv head, ties": {"text": "qwen3", "num_attention_heads": 6, "num_key_value_heads": 1, "head_dim": 24}
    | {"tie": True, "bias": True, "hidden_size": 80},
    "qwen3 native": {"text": "qwen3", "layout": "native", "head_dim": 8, "num_key_value_heads": 4},
    "qwen3 native with prefix, ties, 6b tower": {"text": "qwen3", "layout": "native_prefixed", "tie": True}
    | {"head_dim": 40, "vision": "6b", "shards": 3, "transformers": 4},
    "tiles of one token per 16 patches": {"downsample_ratio": 0.25, "text": "qwen3", "head_dim": 16},
    "tiles without a shuffle": {"downsample_ratio": 1.0, "template": "Hermes-2"},
    "internlm2-chat": {"text": "internlm2", "template": "internlm2-chat"},
    "internlm2 with biases": {"text": "internlm2", "bias": True},
    "6b tower": {"vision": "6b"},
    "earlier vision layer": {"select_layer": -2},
    "pixel shuffle v1": {"ps_version": "v1", "image_size": 84},
    "native": {"layout": "native", "transformers": 4},
    "native with prefix and ties": {"layout": "native_prefixed", "tie": True},
    "native llama, 6b tower": {"layout": "native", "text": "llama", "vision": "6b"},
    "linear scaling": {"text": "internlm2", "rope_scaling": {"type": "linear", "factor": 3.0}},
    "wide": {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 1, "num_hidden_layers": 3},
    "shards of pickles": {"shards": 3, "file_format": "bin", "dtype": "float16"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_both_dialects_compute_what_the_reference_computes(tmp_path: Path, kind: str) -> None:
    checkpoint = tiny.write_checkpoint(tmp_path / "checkpoint", **KINDS[kind])
    reference = Reference(checkpoint)
    bundle = export_bundle(checkpoint, tmp_path / "bundle")
    config = Bundle.open(bundle).manifest.model
    tiles = random_tiles(3, config.vision.image_size)
    ids = TEXT[:4] + [reference.image_token_id()] * (3 * config.tokens_per_tile) + TEXT
    expected = reference.generate(ids, tiles, max_new_tokens=8)
    table = reference.weights["language_model.model.embed_tokens.weight"].float().numpy()
    for dialect in DECODERS:
        engine = engine_for(bundle, dialect)
        features = engine.encode(tiles)
        np.testing.assert_allclose(features, reference.extract_feature(tiles).numpy(), atol=2e-5)
        embeds = table[ids]
        embeds[np.array(ids) == reference.image_token_id()] = features.reshape(-1, features.shape[-1])
        tokens, logits = greedy(engine, embeds, table, count=8)
        np.testing.assert_allclose(logits, expected.step_logits.numpy(), atol=1e-4)
        assert tokens == expected.ids


@pytest.mark.parametrize("dialect", DECODERS)
def test_dynamic_ntk_follows_the_cached_original(tmp_path: Path, dialect: str) -> None:
    """Prompts below, across and beyond the maximum, in that order and back: no request leaves a trace for the next."""
    checkpoint = tiny.write_checkpoint(
        tmp_path / "checkpoint",
        text="internlm2",
        max_position_embeddings=300,
        rope_scaling={"type": "dynamic", "factor": 2.0},
        rope_theta=1e4,
    )
    reference = Reference(checkpoint)
    engine = engine_for(export_bundle(checkpoint, tmp_path / "bundle"), dialect)
    table = reference.weights["language_model.model.embed_tokens.weight"].float().numpy()
    for length in (20, 296, 300, 301, 2 * PREFILL_SIZES[0] + 7, 20):
        ids = np.random.default_rng(length).integers(3, 90, length).tolist()
        expected = reference.generate(ids, max_new_tokens=10)
        tokens, logits = greedy(engine, table[ids], table, count=10)
        np.testing.assert_allclose(logits, expected.step_logits.numpy(), atol=1e-4)
        assert tokens == expected.ids


def test_ntk_is_not_a_rounding_matter(tmp_path: Path) -> None:
    """The test above can fail: without scaling the same prompt gives other logits."""
    sizes: dict[str, Any] = {"text": "internlm2", "max_position_embeddings": 64, "rope_theta": 1e4}
    plain = Reference(tiny.write_checkpoint(tmp_path / "plain", **sizes))
    scaled = Reference(
        tiny.write_checkpoint(tmp_path / "scaled", rope_scaling={"type": "dynamic", "factor": 2.0}, **sizes)
    )
    ids = np.random.default_rng(0).integers(3, 90, 200).tolist()
    difference = (
        plain.generate(ids, max_new_tokens=1).prefill_logits - scaled.generate(ids, max_new_tokens=1).prefill_logits
    )
    assert difference.abs().max() > 1e-2


@pytest.mark.parametrize("dialect", DECODERS)
def test_the_cache_is_written_in_place_and_can_be_wound_back(tmp_path: Path, dialect: str) -> None:
    checkpoint = tiny.write_checkpoint(tmp_path / "checkpoint")
    engine = engine_for(export_bundle(checkpoint, tmp_path / "bundle"), dialect, capacity=64)
    embeds = np.random.default_rng(0).standard_normal((40, engine._decoder.hidden_size)).astype(np.float32)
    once = engine.prefill(embeds).copy()
    assert engine.cache.length() == 40
    engine.cache.reset(25)
    assert engine.cache.length() == 25
    np.testing.assert_allclose(engine.prefill(embeds[25:]), once, atol=1e-5)
    stepwise = [engine.decode(row).copy() for row in (engine.cache.reset(38), embeds[38:])[1]]
    np.testing.assert_allclose(stepwise[-1], once, atol=1e-5)


def test_the_fastest_dialect_that_fits_is_taken(tmp_path: Path) -> None:
    """GroupQueryAttention takes heads of a multiple of 8; others run in the standard dialect, or are refused."""
    from internvl_edge.base.errors import EngineError

    odd = tiny.write_checkpoint(tmp_path / "checkpoint", hidden_size=80, num_attention_heads=4)  # heads of 20
    opened = Bundle.open(export_bundle(odd, tmp_path / "bundle"))
    reference = Reference(odd)
    engine = OnnxRuntimeEngine(opened, capacity=64, threads=1)
    expected = reference.logits(TEXT)[-1].numpy()
    np.testing.assert_allclose(engine.prefill(reference.embed(TEXT).numpy()), expected, atol=1e-4)
    with pytest.raises(EngineError, match="multiple of 8, this model has 20"):
        OnnxRuntimeEngine(opened, dialect="onnxruntime", capacity=64)


@pytest.mark.parametrize("dialect", DECODERS)
def test_scores_of_several_tokens_are_those_of_one_after_the_other(tmp_path: Path, dialect: str) -> None:
    checkpoint = tiny.write_checkpoint(tmp_path / "checkpoint")
    engine = engine_for(export_bundle(checkpoint, tmp_path / "bundle"), dialect, capacity=64)
    embeds = np.random.default_rng(0).standard_normal((50, engine._decoder.hidden_size)).astype(np.float32)
    engine.prefill(embeds[:20])
    one_by_one = np.stack([engine.decode(row).copy() for row in embeds[20:]])
    engine.cache.reset(20)
    np.testing.assert_allclose(engine.score(embeds[20:]), one_by_one, atol=2e-5)
    assert engine.cache.length() == 50


@pytest.mark.parametrize("dialect", DECODERS)
def test_rows_of_a_batch_are_independent_and_several_logits_can_be_kept(tmp_path: Path, dialect: str) -> None:
    """`batch` and `logits_to_keep` are the graph's: two different rows at once, the last three positions of each."""
    import onnxruntime

    checkpoint = tiny.write_checkpoint(tmp_path / "checkpoint", text="internlm2")
    reference, bundle = Reference(checkpoint), export_bundle(checkpoint, tmp_path / "bundle")
    opened = Bundle.open(bundle)
    decoder = opened.manifest.model.decoder
    session = onnxruntime.InferenceSession(str(bundle / DECODERS[dialect]), providers=["CPUExecutionProvider"])
    rows = [TEXT, TEXT[::-1]]
    embeds = np.stack([reference.embed(row).numpy() for row in rows])
    cos, sin = OnnxRuntimeEngine(opened, capacity=8)._angles.at(0, len(TEXT), len(TEXT))
    cache = np.zeros((2, decoder.num_key_value_heads, 16, decoder.head_dim), np.float32)
    feeds = {
        "inputs_embeds": embeds,
        "cos": np.stack([cos, cos]),
        "sin": np.stack([sin, sin]),
        "past_length": np.zeros(2, np.int64),
        "logits_to_keep": np.array([3], np.int64),
    } | {value.name: cache for value in session.get_inputs() if value.name.startswith("past_key_values")}
    logits = session.run(["logits"], feeds)[0]
    for row, got in zip(rows, logits, strict=True):
        np.testing.assert_allclose(got, reference.logits(row)[-3:].numpy(), atol=1e-4)


def test_eps_and_approximations_that_logits_cannot_show(tmp_path: Path) -> None:
    """A wrong eps of the tower or of mlp1 hides inside float32 noise; the graph says which is used."""
    for vision in ("300m", "6b"):
        bundle = export_bundle(tiny.write_checkpoint(tmp_path / vision, vision=vision), tmp_path / f"{vision}-bundle")
        graph = onnx.load(bundle / VISION, load_external_data=False).graph
        eps = {
            node.input[1]: next(a.f for a in node.attribute if a.name == "epsilon")
            for node in graph.node
            if node.op_type in ("LayerNormalization", "RMSNormalization")
        }
        assert eps.pop("projector.norm.weight") == pytest.approx(1e-5, rel=1e-6)
        assert len(eps) == (8 if vision == "6b" else 4)
        assert all(value == pytest.approx(1e-6, rel=1e-6) for value in eps.values())
        gelus = [node for node in graph.node if node.op_type == "Gelu"]
        assert len(gelus) == 3
        assert not any(attribute.name == "approximate" for node in gelus for attribute in node.attribute)
    for text, expected, count in (("qwen2", 1e-6, 5), ("internlm2", 1e-5, 5), ("qwen3", 1e-6, 9)):
        bundle = export_bundle(tiny.write_checkpoint(tmp_path / text, text=text), tmp_path / f"{text}-bundle")
        for name in DECODERS.values():
            graph = onnx.load(bundle / name, load_external_data=False).graph
            norms = [node for node in graph.node if node.op_type == "RMSNormalization"]
            assert len(norms) == count
            assert sum("_norm.weight" in node.input[1] for node in norms) == count - 5
            for node in norms:
                assert next(a.f for a in node.attribute if a.name == "epsilon") == pytest.approx(expected, rel=1e-6)


def test_dialects_share_one_weights_file_and_pass_the_checker(tmp_path: Path) -> None:
    bundle = export_bundle(tiny.write_checkpoint(tmp_path / "checkpoint"), tmp_path / "bundle")
    for name in (VISION, DECODERS["standard"]):
        onnx.checker.check_model(str(bundle / name), full_check=True)
    places = []
    for name in DECODERS.values():
        model = onnx_ir.load(bundle / name)
        weights = [
            v.const_value
            for v in model.graph.initializers.values()
            if isinstance(v.const_value, onnx_ir.ExternalTensor)
        ]
        places.append({t.name: (str(t.location), t.offset, t.length) for t in weights})
    assert places[0] == places[1]
    assert {location for location, _, _ in places[0].values()} == {"decoder.data"}


def test_the_standard_dialect_holds_only_what_tensorrt_takes(tmp_path: Path) -> None:
    bundle = export_bundle(tiny.write_checkpoint(tmp_path / "checkpoint"), tmp_path / "bundle")
    graph = onnx.load(bundle / DECODERS["standard"], load_external_data=False).graph
    assert {node.domain for node in graph.node} == {""}
    for node in graph.node:
        if node.op_type == "Attention":
            assert len([name for name in node.output if name]) == 1
            assert len(node.input) == 4  # q, k, v and an explicit mask; no past, no nonpad_kv_seqlen
            assert not any(attribute.name == "is_causal" for attribute in node.attribute)


@pytest.mark.parametrize(("dtype", "limit"), [("bfloat16", 0.05), ("float16", 0.008)])
def test_16_bit_weights_stay_close(tmp_path: Path, dtype: str, limit: float) -> None:
    checkpoint = tiny.write_checkpoint(tmp_path / "checkpoint", text="internlm2")
    reference = Reference(checkpoint)
    bundle = export_bundle(checkpoint, tmp_path / "bundle", dtype=dtype)
    opened = Bundle.open(bundle)
    assert opened.embeddings().dtype == dtype
    tiles = random_tiles(2, 56)
    expected = reference.extract_feature(tiles).numpy()
    for dialect in DECODERS:
        engine = engine_for(bundle, dialect)
        assert np.abs(engine.encode(tiles) - expected).max() < limit
        logits = engine.prefill(reference.embed(TEXT).numpy())
        np.testing.assert_allclose(
            logits, reference.logits(TEXT)[-1].numpy(), atol=1e-4
        )  # bf16 weights, kept as they are


def test_graphs_that_compute_in_bfloat16_are_neither_written_nor_run(tmp_path: Path) -> None:
    checkpoint = tiny.write_checkpoint(tmp_path / "checkpoint")
    with pytest.raises(EdgeError, match=r"^activations 'bfloat16' is not one of float32, float16$"):
        export_bundle(checkpoint, tmp_path / "refused", activations="bfloat16")
    assert not (tmp_path / "refused").exists()
    older = export_bundle(checkpoint, tmp_path / "older")
    change_manifest(older, lambda values: values.update(activations="bfloat16"))
    with pytest.raises(EngineError, match=r"^this bundle computes in bfloat16, which ONNX Runtime does not; export"):
        engine_for(older, "standard")


def test_float16_activations_run(tmp_path: Path) -> None:
    checkpoint = tiny.write_checkpoint(tmp_path / "checkpoint")
    reference = Reference(checkpoint)
    bundle = export_bundle(checkpoint, tmp_path / "bundle", dtype="float16", activations="float16")
    for dialect in DECODERS:
        logits = engine_for(bundle, dialect).prefill(reference.embed(TEXT).numpy())
        expected = reference.logits(TEXT)[-1].numpy()
        assert np.abs(logits - expected).max() < 0.02 * expected.std()
