"""Mixed precision and int8 inputs in the decoder: checkpoints, graphs in both dialects, TensorRT, facts."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from helpers.engines import TEXT, require_wide_sums_where_needed, run
from helpers.quantizing import quantize
from helpers.reference import Reference
from helpers.reference_names import text_name
from helpers.tiny import write_checkpoint
from internvl_edge.base.errors import EdgeError
from internvl_edge.bundle.bundle import Bundle
from internvl_edge.bundle.names import DECODERS
from internvl_edge.checkpoint.reader import Checkpoint
from internvl_edge.export import export_bundle
from internvl_edge.model.linear import W8A8
from internvl_edge.quantize.plan import plan_decoder
from internvl_edge.recipe.files import combine, make_recipe, presets
from internvl_edge.recipe.recipe import DecoderInt8, Recipe, VisionInt8
from internvl_edge.runtime.engines import onnxruntime as engine_module

ALL_INT8 = DecoderInt8(max_kl=0)
LAYOUTS: dict[str, dict[str, Any]] = {
    "qwen2": {},
    "internlm2": {"text": "internlm2", "bias": True, "shards": 2, "dtype": "float16"},
    "native": {"layout": "native_prefixed"},
}
MIXED: dict[str, Recipe] = {
    "4 and 8 bits": Recipe(group_size=32, layers=(("layers.0.*", "w8a16"), ("*.down_proj", "w4a16-awq-g64"))),
    "symmetric, floats between": Recipe(
        group_size=32, symmetric=True, lm_head="int8", layers=(("*.o_proj", "fp"), ("layers.1.mlp.*", "fp"))
    ),
    "floats below scaled norms": Recipe(
        group_size=64, layers=(("*.up_proj", "fp"), ("layers.0.self_attn.*", "fp"), ("*.o_proj", "w4a16-awq"))
    ),
    "int8 inputs": Recipe("w8a8", lm_head="int8", decoder_int8=ALL_INT8),
    "some int8 inputs": Recipe(group_size=32, layers=(("*.self_attn.*", "w8a8"), ("*.gate_proj", "w8a8"))),
    "without data": Recipe("w4a16-rtn", group_size=32, layers=(("layers.1.*", "w8a16"), ("layers.0.mlp.*", "fp"))),
}


class IntegerText(Reference):
    """The reference of the original with the text model of a quantized checkpoint, rounded inputs included."""

    def __init__(self, original: Path, quantized: Path, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(original, dtype)
        read = Checkpoint(quantized)
        self.integers: dict[str, tuple[Tensor, Tensor, float]] = {}
        for name in read.shapes:
            if name.startswith("decoder."):
                self.weights[text_name(name)] = torch.from_numpy(read.tensor(name).astype(np.float32)).to(dtype)
        for name, scheme in read.schemes.items():
            if scheme == W8A8:
                linear = read.linear(name)
                assert linear is not None
                assert linear.input_scale is not None
                values, scale = (
                    torch.from_numpy(linear.values).to(dtype),
                    torch.from_numpy(linear.scale[:, 0]).to(dtype),
                )
                self.integers[text_name(f"{name}.weight").removesuffix(".weight")] = values, scale, linear.input_scale

    def _linear(self, x: Tensor, name: str) -> Tensor:
        if name not in self.integers:
            return super()._linear(x, name)
        values, scale, step = self.integers[name]
        y = torch.round(x / step).clamp(-128, 127) @ values.T * (scale * step)
        return y + self.weights.get(f"{name}.bias", torch.zeros(()))


def known(logits: np.ndarray, expected: Tensor) -> np.ndarray:
    """Differences of the logits of tokens that the tokenizer has; others are pushed down."""
    return (logits - expected.numpy())[np.abs(logits) < 1e3]


@pytest.mark.usefixtures("float_activations")
@pytest.mark.parametrize("recipe", MIXED.values(), ids=MIXED)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_both_dialects_compute_what_the_checkpoint_says(tmp_path: Path, layout: str, recipe: Recipe) -> None:
    original = write_checkpoint(tmp_path / "checkpoint", **LAYOUTS[layout])
    quantize(original, tmp_path / "out", recipe)
    read, plan = Checkpoint(tmp_path / "out"), plan_decoder(Checkpoint(original), recipe)
    found = {name: read.schemes.get(name) for name in plan}
    assert found == {name: choice.precision.scheme for name, choice in plan.items()}
    bundle = export_bundle(tmp_path / "out", tmp_path / "bundle")
    reference = IntegerText(original, tmp_path / "out")
    expected = reference.generate(TEXT, max_new_tokens=3)
    floats = Reference(original).generate(TEXT, max_new_tokens=1).prefill_logits
    lost = float((floats - expected.prefill_logits).square().mean().sqrt())
    for dialect in DECODERS:
        error = np.abs(known(run(bundle, dialect, reference, 3)[0], expected.prefill_logits)).max()
        # Inputs halfway between integers may be rounded to either.
        assert error < (0.3 * lost if reference.integers else 1e-4)
    assert 1e-3 < lost < 0.5 * float(floats.std())
    manifest = Bundle.open(bundle).manifest
    assert manifest.quantization is not None
    counts = Counter(str(scheme) for scheme in read.schemes.values())
    assert Counter(map(str, manifest.linears.values())) == counts


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sizes_are_those_of_the_files_where_most_float_tensors_are_scales(tmp_path: Path, layout: str) -> None:
    """Linears with int8 inputs have two float32 tensors each, which are more than the other floats of a model."""
    original = write_checkpoint(tmp_path / "checkpoint", **LAYOUTS[layout])
    report = quantize(original, tmp_path / "out", Recipe("w8a8", vision="int8", lm_head="int8", decoder_int8=ALL_INT8))
    assert Checkpoint(tmp_path / "out").float_type() == Checkpoint(original).float_type()
    assert sum(part.bytes for part in report.record.components) == pytest.approx(report.bytes, rel=0.02)
    floats = {linear.dtype for linear in report.record.linears}
    assert floats == {stored.dtype for part in report.record.components for stored in part.stored}


@pytest.mark.parametrize("layout", ["qwen2", "internlm2"])
def test_int8_inputs_are_exact_in_float64_logic(tmp_path: Path, layout: str) -> None:
    """Scales that smoothing moves are powers of two: floats with them are the original's, so rounding alone is lost."""
    original = write_checkpoint(tmp_path / "checkpoint", **LAYOUTS[layout])
    recipe = Recipe("w8a8", decoder_int8=ALL_INT8, layers=(("*.mlp.*", "fp"), ("*.o_proj", "fp")))
    quantize(original, tmp_path / "out", recipe)
    before, after = Checkpoint(original), Checkpoint(tmp_path / "out")
    for n in range(2):
        norm = f"decoder.layers.{n}.input_layernorm.weight"
        scale = before.tensor(norm).astype(np.float64) / after.tensor(norm).astype(np.float64)
        assert np.array_equal(np.exp2(np.round(np.log2(scale))), scale)
        for name in ("mlp.gate_proj", "mlp.down_proj", "self_attn.o_proj"):
            tensor = f"decoder.layers.{n}.{name}.weight"
            assert np.array_equal(before.tensor(tensor), after.tensor(tensor))


def test_floats_beside_scaled_inputs_stay_exact(tmp_path: Path) -> None:
    """A float linear that shares its input with 4-bit ones, and one that feeds them, change by powers of two alone."""
    original = write_checkpoint(tmp_path / "checkpoint")
    quantize(original, tmp_path / "out", Recipe(group_size=32, layers=(("*.up_proj", "fp"),)))
    before, after = Checkpoint(original), Checkpoint(tmp_path / "out")
    changed = 0
    for n in range(2):
        name = f"decoder.layers.{n}.mlp.up_proj.weight"
        ratio = before.tensor(name).astype(np.float64) / after.tensor(name).astype(np.float64)
        assert np.array_equal(np.exp2(np.round(np.log2(np.abs(ratio)))), ratio)
        changed += int((ratio != 1).sum())
    assert changed


def test_floats_that_scales_would_push_beyond_their_type_are_refused_by_name(tmp_path: Path) -> None:
    original = write_checkpoint(tmp_path / "checkpoint", dtype="float16")
    tensors = load_file(original / "model.safetensors")
    for name in (name for name in tensors if name.endswith("up_proj.weight")):
        tensors[name] = (tensors[name].float() * (6e4 / float(tensors[name].abs().max()))).half()
    save_file(tensors, original / "model.safetensors")
    with pytest.raises(EdgeError, match=r"layers\.0\.mlp\.up_proj stays float16, which cannot hold .* bfloat16"):
        quantize(original, tmp_path / "out", Recipe(group_size=32, layers=(("*.up_proj", "fp"),)))


def test_cpus_that_saturate_add_in_32_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = write_checkpoint(tmp_path / "checkpoint")
    quantize(original, tmp_path / "out", Recipe("w8a8", decoder_int8=ALL_INT8))
    opened = Bundle.open(export_bundle(tmp_path / "out", tmp_path / "bundle"))
    embeds = np.random.default_rng(0).standard_normal((9, opened.manifest.model.decoder.hidden_size)).astype(np.float32)
    require_wide_sums_where_needed(opened, monkeypatch, lambda e: e._text, lambda e: e.prefill(embeds), 1e-4)


def test_onnx_runtime_multiplies_integers_and_tensorrt_reads_signed_ones(tmp_path: Path) -> None:
    original = write_checkpoint(tmp_path / "checkpoint")
    quantize(original, tmp_path / "out", Recipe("w8a8", decoder_int8=ALL_INT8))
    bundle = export_bundle(tmp_path / "out", tmp_path / "bundle")
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    for key, value in engine_module._CONFIG.items():
        options.add_session_config_entry(key, value)
    own = str(bundle / DECODERS["onnxruntime"])
    onnxruntime.InferenceSession(own, options, providers=["CPUExecutionProvider"])
    graph = onnx.load(options.optimized_model_filepath, load_external_data=False).graph
    count = Counter(node.op_type for node in graph.node)
    assert (count["MatMulIntegerToFloat"], count["DequantizeLinear"]) == (14, 0)
    for dialect, kind in (("onnxruntime", np.uint8), ("standard", np.int8)):
        graph = onnx.load(bundle / DECODERS[dialect], load_external_data=False).graph
        constants = {tensor.name: tensor for tensor in graph.initializer}
        rounding = [node for node in graph.node if node.op_type == "QuantizeLinear"]
        assert len(rounding) == 8  # four inputs a layer
        for node in rounding:
            zero = onnx.numpy_helper.to_array(constants[node.input[2]])
            assert (zero.dtype, int(zero)) == (kind, 128 if kind is np.uint8 else 0)
    assert not (bundle / "decoder.onnxruntime.data").exists()  # one form serves both


def test_smoothing_spares_outlier_channels(tmp_path: Path) -> None:
    """A channel 64 times larger than the others costs all others their precision, unless it is divided before."""
    original = write_checkpoint(tmp_path / "checkpoint", dtype="float32")
    enlarge(original, "input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"))
    errors = {}
    for smoothing in (False, True):
        recipe = Recipe("w8a8", decoder_int8=DecoderInt8(smoothing=smoothing, max_kl=0))
        report = quantize(original, tmp_path / f"{smoothing}", recipe)
        errors[smoothing] = report.errors["decoder.layers.1.self_attn.q_proj"]
        facts = next(facts for facts in report.record.linears if facts.name == "decoder.layers.1.self_attn.q_proj")
        assert facts.inputs is not None
        assert facts.inputs.channels[0][0] in (5, 21)
        assert facts.inputs.largest is not None
        assert facts.inputs.typical is not None
        assert facts.inputs.largest > 8 * facts.inputs.typical
    assert errors[True] < 0.3 * errors[False]


def enlarge(checkpoint: Path, norm: str, linears: tuple[str, ...]) -> None:
    """Make some channels of a norm larger and their weights smaller: the same function, with outliers."""
    from safetensors.torch import load_file, save_file

    path = checkpoint / "model.safetensors"
    tensors = load_file(path)
    for name, tensor in tensors.items():
        if ".layers." in name and f"{norm}.weight" in name:
            tensor[[5, 21]] *= 64
        if any(f"{linear}.weight" in name for linear in linears) and "language_model" in name:
            tensor[:, [5, 21]] /= 64
    save_file(tensors, path, metadata={"format": "pt"})


# ---- facts ----


def test_the_report_says_of_every_linear_what_it_got_and_why(tmp_path: Path) -> None:
    original = write_checkpoint(tmp_path / "checkpoint")
    report = quantize(original, tmp_path / "out", MIXED["some int8 inputs"])
    facts = {linear.name.removeprefix("decoder.layers."): linear for linear in report.record.linears}
    assert len(facts) == 14
    assert facts["0.self_attn.q_proj"].scheme == W8A8
    assert facts["0.self_attn.q_proj"].reason == "matches *.self_attn.*"
    assert facts["0.mlp.up_proj"].reason == ""
    for linear in facts.values():
        assert linear.error is not None
        assert linear.cosine is not None
        assert linear.sqnr_db == pytest.approx(-20 * np.log10(linear.error))
        # |Y' - Y|^2 = |Y|^2 + |Y'|^2 - 2 Y Y', so an error of e leaves a cosine of about 1 - e^2 / 2.
        assert 1 - linear.cosine == pytest.approx(linear.error**2 / 2, rel=0.3, abs=2e-6)
        assert linear.inputs is not None
        assert linear.inputs.largest == linear.inputs.channels[0][1]
        assert linear.inputs.p9999 is not None
        assert linear.inputs.p9999 <= linear.inputs.largest * (1 + 1e-6)
        assert (linear.inputs.clipped_at is not None) == (linear.scheme == W8A8)
    bits = sum(linear.bits_per_weight for linear in facts.values()) / 14
    assert 4 < report.record.bits_per_weight < 8.5
    assert 4 < bits < 8.5


def test_patterns_keep_floats_in_the_tower(tmp_path: Path) -> None:
    original = write_checkpoint(tmp_path / "checkpoint")
    recipe = Recipe("fp", vision="int8", vision_int8=VisionInt8(cosine=0), layers=(("vision.layers.1.*", "fp"),))
    report = quantize(original, tmp_path / "out", recipe)
    assert report.vision is not None
    assert len(report.vision.floats) == 4
    assert all(name.startswith("vision.layers.1.") for name in report.vision.floats)
    assert set(report.vision.layers) - set(report.vision.floats) == set(Checkpoint(tmp_path / "out").schemes)


# ---- formats ----


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_module_has_one_target(tmp_path: Path, layout: str) -> None:
    """Readers of compressed-tensors match module names by pattern: each must be found once, in targets or in ignore."""
    original = write_checkpoint(tmp_path / "checkpoint", **LAYOUTS[layout])
    recipe = MIXED["symmetric, floats between"]
    quantize(original, tmp_path / "out", recipe)
    described = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert described["format"] == "pack-quantized"
    targets = [target for group in described["config_groups"].values() for target in group["targets"]]
    patterns = [*targets, *described["ignore"]]
    assert all(pattern.startswith("re:") for pattern in patterns)
    index = [name for path in (tmp_path / "out").glob("*.safetensors") for name in stored_names(path)]
    modules = {name.rpartition(".")[0] for name in index if ".layers." in name and "norm" not in name}
    packed = {name.rpartition(".")[0] for name in index if name.endswith("weight_packed")}
    for module in modules - {name for name in modules if "vision" in name}:
        matching = [pattern for pattern in patterns if re.match(pattern.removeprefix("re:"), module)]
        assert len(matching) == 1, module
        assert (matching[0] in targets) == (module in packed)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("vision", ["fp", "int8"])
def test_targets_match_linears_and_nothing_else(tmp_path: Path, layout: str, vision: str) -> None:
    """transformers quantizes whatever module a target matches, and refuses a whole layer or an activation function."""
    original = write_checkpoint(tmp_path / "checkpoint", **LAYOUTS[layout])
    recipe = Recipe(group_size=32, symmetric=True, vision=vision, vision_int8=VisionInt8(cosine=0), lm_head="int8")
    quantize(original, tmp_path / "out", recipe)
    described = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    targets = [
        target.removeprefix("re:") for group in described["config_groups"].values() for target in group["targets"]
    ]
    index = [name for path in (tmp_path / "out").glob("*.safetensors") for name in stored_names(path)]
    linears = {name.rpartition(".")[0] for name in index if name.endswith(".weight_scale")}
    outer = {module.rsplit(".", count)[0] for module in linears for count in range(1, module.count(".") + 1)}
    beside = {f"{module}.{name}" for module in outer for name in ("act_fn", "rotary_emb", "act")}
    norms = {name.rpartition(".")[0] for name in index if "norm" in name}
    for module in linears | outer | beside | norms:
        assert any(re.match(target, module) for target in targets) == (module in linears), module


def stored_names(path: Path) -> list[str]:
    from safetensors import safe_open

    with safe_open(path, "np") as file:
        return list(file.keys())


# ---- presets ----


@pytest.mark.usefixtures("float_activations")
@pytest.mark.parametrize("text", ["qwen2", "internlm2"])
@pytest.mark.parametrize("name", sorted(presets()))
def test_every_preset_runs_in_both_dialects(tmp_path: Path, name: str, text: str) -> None:
    original = write_checkpoint(tmp_path / "checkpoint", text=text)
    recipe = make_recipe(combine(presets()[name], {"group_size": 32, "vision_int8": {"cosine": 0}}))
    report = quantize(original, tmp_path / "out", recipe)
    assert (report.vision is not None) == (recipe.vision == "int8")
    # The reference reads the checkpoint's own token table.
    bundle = export_bundle(tmp_path / "out", tmp_path / "bundle", dtype="float16", token_table="float")
    manifest = Bundle.open(bundle).manifest
    assert (manifest.kv_cache == "int8") == (recipe.kv_cache == "int8")
    assert manifest.quantization is not None
    assert ("decoder.lm_head" in manifest.linears) == (recipe.lm_head == "int8")
    reference = IntegerText(original, tmp_path / "out")
    if (scales := Checkpoint(tmp_path / "out").kv_scales) is not None:
        reference.kv_scales = torch.from_numpy(scales.key), torch.from_numpy(scales.value)
    expected = reference.generate(TEXT, max_new_tokens=1).prefill_logits
    for dialect in DECODERS:
        assert np.abs(known(run(bundle, dialect, reference, 3)[0], expected)).max() < 1e-4


@pytest.mark.parametrize("name", ["w8a8", "mixed", "orin", "rtx"])
def test_int8_graphs_build_in_tensorrt(tmp_path: Path, name: str) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed (pip install tensorrt-rtx-cu13)")
    from internvl_edge.compiler import build_engines
    from internvl_edge.compiler.bundle_engines import options_for
    from internvl_edge.planning.devices import Devices

    # Blocks of 64 are the smallest that TensorRT documents.
    recipe = {
        "w8a8": Recipe("w8a8", lm_head="int8", decoder_int8=ALL_INT8),
        "mixed": Recipe(group_size=64, symmetric=True, layers=(("layers.0.*", "w8a8"), ("*.down_proj", "w8a16"))),
    }.get(name) or make_recipe(combine(presets()[name], {"group_size": 64, "vision_int8": {"cosine": 0}}))
    original = write_checkpoint(tmp_path / "checkpoint")
    quantize(original, tmp_path / "out", recipe)
    bundle = Bundle.open(export_bundle(tmp_path / "out", tmp_path / "bundle", dtype="float16"))
    rtx = Devices().target("rtx")
    assert build_engines(bundle, rtx, options_for(rtx, capacity=256, chunk=64, tiles=2))[1]
