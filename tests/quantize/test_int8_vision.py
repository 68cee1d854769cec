"""Towers quantized to int8: checkpoints in every layout, graphs against the same integers in torch, kills, fallback."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from click.testing import CliRunner
from safetensors import safe_open
from torch import Tensor

from helpers.calibration_data import FLOAT32, write_data
from helpers.damage import poison
from helpers.engines import require_wide_sums_where_needed
from helpers.killed_runs import contents, run_and_be_killed
from helpers.recorded_progress import RecordedProgress
from helpers.reference import Reference, read_weights
from helpers.tiny import write_checkpoint
from internvl_edge.base.errors import EdgeError
from internvl_edge.bundle.bundle import Bundle
from internvl_edge.bundle.names import VISION
from internvl_edge.calibration import DataOptions, calibrate
from internvl_edge.calibration.stream import BlockStream
from internvl_edge.checkpoint.reader import Checkpoint
from internvl_edge.checkpoint.record import read_record
from internvl_edge.cli import cli
from internvl_edge.evaluation.report import checkpoint_report
from internvl_edge.evaluation.report.page import render
from internvl_edge.export import export_bundle
from internvl_edge.model.linear import W8A8
from internvl_edge.quantize import QuantizationReport, quantize_checkpoint, vision
from internvl_edge.recipe.recipe import Recipe, VisionInt8

KINDS: dict[str, dict[str, Any]] = {
    "300m": {},
    "6b": {"vision": "6b", "text": "internlm2", "vision_hidden_size": 96, "vision_num_attention_heads": 6},
    "native": {"layout": "native_prefixed"},
    "qwen3, 6b": {"text": "qwen3", "head_dim": 32, "vision": "6b", "downsample_ratio": 0.25},
    "native 6b": {"layout": "native", "vision": "6b", "text": "llama"},
    "earlier layer, v1, float16": {
        "select_layer": -2,
        "vision_num_hidden_layers": 3,
        "ps_version": "v1",
        "dtype": "float16",
        "shards": 2,
    },
}
ALL_INT8 = VisionInt8(cosine=0)
# The errors of the linears are measured, but none is so large that a linear stays float.
MEASURED = Recipe("fp", vision="int8", vision_int8=VisionInt8(cosine=0.5))


def quantize(checkpoint: Path, out: Path, recipe: Recipe | None = None, **more: Any) -> QuantizationReport:
    data = more.pop("data", None) or write_data(checkpoint.parent / "data")
    recipe = recipe or Recipe("fp", vision="int8", vision_int8=ALL_INT8)
    return quantize_checkpoint(checkpoint, out, recipe, data=DataOptions(data, max_tiles=2), compute=FLOAT32, **more)


class IntegerReference(Reference):
    """The reference with the integers that a quantized checkpoint stores; reads them with its own few lines."""

    def __init__(self, original: Path, quantized: Path) -> None:
        super().__init__(original, torch.float32)
        stored = read_weights(quantized)
        self.integers: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
        for name, tensor in stored.items():
            module, _, last = name.rpartition(".")
            if last == "input_scale":
                parts = stored[f"{module}.weight"].float(), stored[f"{module}.weight_scale"][:, 0], tensor
                self.integers[module] = parts
            elif (name in self.weights and ".norm" in name) or name.startswith("mlp1.0"):
                self.weights[name] = tensor.float()
        for name in [name for name in self.integers if name.endswith(".q_proj")]:
            q, k, v = (self.integers.pop(name.replace(".q_proj", f".{part}_proj")) for part in "qkv")
            assert q[2] == k[2] == v[2]
            joined = torch.cat([q[0], k[0], v[0]]), torch.cat([q[1], k[1], v[1]]), q[2]
            self.integers[name.replace(".q_proj", ".qkv")] = joined

    def _linear(self, x: Tensor, name: str) -> Tensor:
        if name not in self.integers:
            return super()._linear(x, name)
        values, scale, step = self.integers[name]
        y = torch.round(x / step).clamp(-128, 127) @ values.T * (scale * step)
        return y + self.weights.get(f"{name}.bias", torch.zeros(()))


def tiles(config_size: int, count: int = 7) -> np.ndarray:
    return np.random.default_rng(9).integers(0, 256, (count, config_size, config_size, 3), np.uint8)


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("kind", KINDS)
def test_the_graph_computes_with_the_integers_of_the_checkpoint(tmp_path: Path, kind: str) -> None:
    original = write_checkpoint(tmp_path / "checkpoint", **KINDS[kind])
    report = quantize(original, tmp_path / "int8")
    read = Checkpoint(tmp_path / "int8")
    assert report.vision is not None
    assert report.vision.floats == []
    assert set(read.schemes) == set(report.vision.layers) == set(report.errors)
    assert set(read.schemes.values()) == {W8A8}
    assert len(read.schemes) == 4 * read.config.vision_layers_used + 2
    reference, plain = IntegerReference(original, tmp_path / "int8"), Reference(original)
    pixels = tiles(read.config.vision.image_size)
    bundle = export_bundle(tmp_path / "int8", tmp_path / "bundle")
    found = embeddings(bundle, pixels)
    expected, floats = reference.extract_feature(pixels).numpy(), plain.extract_feature(pixels).numpy()
    # A value halfway between integers may be rounded to either, which spreads in its tile; most tiles have none.
    differences = [relative(*pair) for pair in zip(found, expected, strict=True)]
    assert np.median(differences) < 1e-6
    assert max(differences) < relative(expected, floats) < 0.05
    manifest = Bundle.open(bundle).manifest
    assert manifest.linears == read.schemes
    assert manifest.quantization is None


def embeddings(bundle: Path, pixels: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(str(bundle / VISION), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"pixels": pixels})[0])


def test_onnx_runtime_multiplies_integers(tmp_path: Path) -> None:
    original = write_checkpoint(tmp_path / "checkpoint")
    quantize(original, tmp_path / "int8")
    bundle = export_bundle(tmp_path / "int8", tmp_path / "bundle")
    graph = onnx.load(bundle / VISION, load_external_data=False).graph
    assert {node.domain for node in graph.node} == {""}
    biases = {node.output[0]: node for node in graph.node}
    for node in graph.node:  # nothing between a product and its bias
        if node.op_type == "Add" and any(".bias" in name for name in node.input):
            assert biases[node.input[0]].op_type == "MatMul"
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(str(bundle / VISION), options, providers=["CPUExecutionProvider"])
    count = Counter(
        node.op_type for node in onnx.load(tmp_path / "optimized.onnx", load_external_data=False).graph.node
    )
    assert count["MatMulIntegerToFloat"] == 10
    assert count["DequantizeLinear"] == 0
    assert count["MatMul"] + count["FusedMatMul"] == 1  # pixels


def test_cpus_that_saturate_add_in_32_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = write_checkpoint(tmp_path / "checkpoint")
    quantize(original, tmp_path / "int8")
    opened = Bundle.open(export_bundle(tmp_path / "int8", tmp_path / "bundle"))
    require_wide_sums_where_needed(opened, monkeypatch, lambda e: e._tower, lambda e: e.encode(tiles(56)), 1e-5)


@pytest.mark.parametrize("vision_kind", ["300m", "6b"])
def test_smoothing_moves_between_norm_and_weights_exactly(tmp_path: Path, vision_kind: str) -> None:
    original = write_checkpoint(tmp_path / "checkpoint", vision=vision_kind, dtype="bfloat16")
    exaggerate(original)
    report = quantize(original, tmp_path / "int8").vision
    assert report is not None
    source, read = Checkpoint(original), Checkpoint(tmp_path / "int8")
    strengths = []
    for norm, linear in (("norm1", "attn.qkv"), ("norm2", "mlp.fc1")):
        for block in ("vision.layers.0", "vision.layers.1"):
            strengths.append(report.layers[f"{block}.{linear}"]["strength"])
            names = [f"{block}.{norm}.{part}" for part in ("weight", "bias") if source.has(f"{block}.{norm}.{part}")]
            scale = source.tensor(names[0]).astype(np.float64) / read.tensor(names[0]).astype(np.float64)
            assert (np.unique(scale).size > 1) == (strengths[-1] > 0)
            for name in names:
                np.testing.assert_array_equal(read.tensor(name).astype(np.float64) * scale, source.tensor(name))
            packed = read.linear(f"{block}.{linear}")
            assert packed is not None
            missed = packed.dequantize() - source.tensor(f"{block}.{linear}.weight").astype(np.float64) * scale
            assert (np.abs(missed) <= 0.5001 * packed.scale).all()
    assert max(strengths) > 0


def exaggerate(checkpoint: Path) -> None:
    """Give some channels of norms large values, as trained towers have them."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(checkpoint / "model.safetensors")
    for name, tensor in tensors.items():
        if "vision_model" in name and name.endswith(("norm1.weight", "norm2.weight")):
            tensor[::7] *= 20
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})


def test_predicted_error_is_what_rounding_does(tmp_path: Path) -> None:
    original = write_checkpoint(tmp_path / "checkpoint", vision_num_hidden_layers=4)
    report = quantize(original, tmp_path / "int8", MEASURED).vision
    assert report is not None
    assert report.predicted_cosine is not None
    predicted, measured = 1 - report.predicted_cosine, 1 - report.cosine
    assert 0.4 * measured < predicted < 2.5 * measured


def test_gradients_in_bfloat16_predict_the_same_error(tmp_path: Path) -> None:
    """Each is an estimate, and bfloat16 also rounds other weights: single linears scatter, all of them together not."""
    original, data = (
        write_checkpoint(tmp_path / "checkpoint", vision_num_hidden_layers=4),
        write_data(tmp_path / "data"),
    )
    found = []
    for compute in (FLOAT32, replace(FLOAT32, dtype=torch.bfloat16)):
        options, out = DataOptions(data, max_tiles=2), tmp_path / str(compute.dtype)
        report = quantize_checkpoint(original, out, MEASURED, data=options, compute=compute).vision
        assert report is not None
        found.append(np.array([report.layers[name]["part"] for name in sorted(report.layers)]))
    assert 0.8 < found[1].sum() / found[0].sum() < 1.25
    assert (np.abs(np.log2(found[1] / found[0])) < 1.5).all()


def test_layers_keep_floats_until_the_cosine_is_reached(tmp_path: Path) -> None:
    original, data = write_checkpoint(tmp_path / "checkpoint"), write_data(tmp_path / "data")
    exaggerate(original)
    loose = quantize(original, tmp_path / "loose", MEASURED, data=data).vision
    assert loose is not None
    assert loose.predicted_cosine is not None
    assert loose.floats == []
    aim = 1 - (1 - loose.predicted_cosine) / 4
    recipe = Recipe("fp", vision="int8", vision_int8=VisionInt8(cosine=aim, keep=("projector.fc2",)))
    tight = quantize(original, tmp_path / "tight", recipe, data=data).vision
    assert tight is not None
    assert tight.predicted_cosine is not None
    assert tight.predicted_cosine >= aim > loose.predicted_cosine
    assert tight.cosine > loose.cosine
    assert "projector.fc2" in tight.floats
    assert 1 < len(tight.floats) < len(tight.layers)
    parts = {name: facts["part"] for name, facts in loose.layers.items()}
    chosen = [name for name in tight.floats if name != "projector.fc2"]
    assert max(parts, key=lambda name: parts[name] if name != "projector.fc2" else 0) in chosen
    assert tight.layers["projector.fc2"]["reason"] == "matches projector.fc2"
    assert all("of the" in tight.layers[name]["reason"] for name in chosen)
    read, source = Checkpoint(tmp_path / "tight"), Checkpoint(original)
    assert set(read.schemes) == set(tight.layers) - set(tight.floats)
    for name in tight.floats:
        np.testing.assert_array_equal(read.tensor(f"{name}.weight"), source.tensor(f"{name}.weight"))
    described = json.loads((tmp_path / "tight" / "config.json").read_text())["quantization_config"]
    assert any("mlp1" in pattern for pattern in described["ignore"])
    manifest = Bundle.open(export_bundle(tmp_path / "tight", tmp_path / "bundle")).manifest
    assert manifest.linears == read.schemes


def test_without_a_limit_of_the_cosine_no_gradient_is_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bytes, the patterns included, without the way back through the tower."""
    original, data = write_checkpoint(tmp_path / "checkpoint"), write_data(tmp_path / "data")
    loose, none = (
        Recipe("fp", vision="int8", vision_int8=VisionInt8(cosine=cosine, keep=("projector.fc2",)))
        for cosine in (0.5, 0)
    )
    measured = quantize(original, tmp_path / "loose", loose, data=data).vision
    monkeypatch.delattr(BlockStream, "back")
    progress = RecordedProgress()
    report = quantize(original, tmp_path / "none", none, data=data, progress=progress).vision
    assert report is not None
    assert measured is not None
    names = ("model.safetensors", "config.json")
    assert [(tmp_path / "none" / name).read_bytes() for name in names] == [
        (tmp_path / "loose" / name).read_bytes() for name in names
    ]
    assert report.floats == measured.floats == ["projector.fc2"]
    assert report.predicted_cosine is None
    assert {facts["part"] for facts in report.layers.values()} == {None}
    assert (report.cosine, report.lowest_cosine) == (measured.cosine, measured.lowest_cosine)
    assert progress._number == progress._expected == len(progress.steps)
    assert not any("sensitivity" in step.label for step in progress.steps)
    pages = {}
    for name in ("loose", "none"):
        record = read_record(tmp_path / name)
        assert record is not None
        pages[name] = render(checkpoint_report(tmp_path / name, record))
    assert {name: "was predicted" in text for name, text in pages.items()} == {"loose": True, "none": False}


def test_decoder_and_tower_in_one_checkpoint(tmp_path: Path) -> None:
    """The decoder is calibrated with the image tokens that the int8 tower gives."""
    original, data = write_checkpoint(tmp_path / "checkpoint", text="internlm2"), write_data(tmp_path / "data")
    four_bits: dict[str, Any] = {"decoder": "w4a16-awq", "group_size": 32}
    both = quantize(original, tmp_path / "both", Recipe(**four_bits, vision="int8", vision_int8=ALL_INT8), data=data)
    quantize(original, tmp_path / "alone", Recipe(**four_bits), data=data)
    tower = quantize(original, tmp_path / "tower", data=data).vision
    read, alone = Checkpoint(tmp_path / "both"), Checkpoint(tmp_path / "alone")
    assert both.vision is not None
    assert tower is not None
    # Of the calibration set's embeddings here, of a run of the tower alone there.
    np.testing.assert_allclose(
        [both.vision.cosine, both.vision.lowest_cosine], [tower.cosine, tower.lowest_cosine], 1e-6
    )
    assert Counter(scheme.bits for scheme in read.schemes.values()) == {8: 10, 4: 14}
    config = json.loads((tmp_path / "both" / "config.json").read_text())
    assert config["quantization_config"]["format"] == "mixed-precision"
    assert config["llm_config"]["quantization_config"] == config["quantization_config"]
    name = "decoder.layers.0.mlp.up_proj.weight"
    assert not np.array_equal(read.tensor(name), alone.tensor(name))
    assert relative(read.tensor(name), alone.tensor(name)) < 0.3
    manifest = Bundle.open(export_bundle(tmp_path / "both", tmp_path / "bundle")).manifest
    assert manifest.quantization is not None
    assert {scheme.bits for scheme in manifest.schemes("decoder.").values()} == {4}
    assert set(manifest.schemes("vision.").values()) == {W8A8}


def test_without_images_there_is_nothing_to_calibrate_with(tmp_path: Path) -> None:
    original = write_checkpoint(tmp_path / "checkpoint")
    data = tmp_path / "text.jsonl"
    data.write_text(json.dumps({"images": [], "prompt": "what is the number"}))
    with pytest.raises(EdgeError, match="int8 vision needs images"):
        quantize(original, tmp_path / "out", data=data)


@pytest.mark.parametrize("decoder", ["fp", "w4a16-awq"])
def test_a_calibration_set_with_a_cut_image_is_refused(tmp_path: Path, decoder: str) -> None:
    original, data = write_checkpoint(tmp_path / "checkpoint"), write_data(tmp_path / "data")
    recipe = Recipe(decoder, group_size=32, vision="int8", vision_int8=ALL_INT8)
    made = calibrate(original, tmp_path / "set", DataOptions(data, max_tiles=2), FLOAT32).folder
    (made / "tiles.u8").write_bytes((made / "tiles.u8").read_bytes()[:-1])
    with pytest.raises(EdgeError, match=r"tiles.u8 is damaged or was changed; make the calibration set again"):
        quantize_checkpoint(original, tmp_path / "c", recipe, calibration=made, compute=FLOAT32)


def test_an_infinite_weight_of_the_tower_is_named(tmp_path: Path) -> None:
    original = write_checkpoint(tmp_path / "checkpoint")
    poison(original, "vision_model.encoder.layers.1.mlp.fc1.weight", float("inf"))
    with pytest.raises(EdgeError, match=r"vision\.layers\.1\.mlp\.fc1\.weight holds NaN or infinity"):
        quantize(original, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_damaged_integers_are_named(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    quantize(write_checkpoint(tmp_path / "checkpoint"), tmp_path / "int8")
    path = tmp_path / "int8" / "model.safetensors"
    module = "vision_model.encoder.layers.0.attn.qkv"
    whole = load_file(path)
    for change, message in (
        ({f"{module}.input_scale": torch.tensor([0.0])}, "input_scale holds 0, expected a positive"),
        ({f"{module}.weight_scale": whole[f"{module}.weight_scale"][1:]}, r"weight_scale has the shape \[191, 1\]"),
        ({f"{module}.weight": whole[f"{module}.weight"].int()}, "weight has dtype I32"),
    ):
        save_file(whole | change, path)
        with pytest.raises(EdgeError, match=message):
            Checkpoint(tmp_path / "int8").linear("vision.layers.0.attn.qkv")
    save_file({name: tensor for name, tensor in whole.items() if name != f"{module}.input_scale"}, path)
    with pytest.raises(EdgeError, match=r"input_scale is missing"):
        Checkpoint(tmp_path / "int8")


KILLED = """
import os, signal, sys
from pathlib import Path
from internvl_edge.calibration import DataOptions, choose_compute
from internvl_edge.calibration.work import WorkFolder
from internvl_edge.quantize import quantize_checkpoint
from internvl_edge.recipe.recipe import Recipe, VisionInt8
from internvl_edge.runtime.engines import onnxruntime as engine_module
moment, checkpoint, data, out = sys.argv[1:]
name, values = {
    "float": ("tower-float.json", {"blocks": 2}),
    "back": ("tower-float-back.json", None),
    "choice": ("vision-choice.json", None),
    "int8": ("tower-int8.json", {"blocks": 2}),
}[moment]
write_json = WorkFolder.write_json

def kill_at(self, file, found):
    if file == name and (values is None or found == values):
        os.kill(os.getpid(), signal.SIGKILL)
    write_json(self, file, found)

WorkFolder.write_json = kill_at
recipe = Recipe("fp", vision="int8", vision_int8=VisionInt8(cosine=0.9999))
options, compute = DataOptions(Path(data), max_tiles=2), choose_compute("cpu", "float32")
quantize_checkpoint(checkpoint, out, recipe, data=options, compute=compute)
"""


@pytest.mark.slow
def test_a_killed_run_continues_to_the_same_bytes(tmp_path: Path) -> None:
    original, data = write_checkpoint(tmp_path / "checkpoint"), write_data(tmp_path / "data")
    recipe = Recipe("fp", vision="int8", vision_int8=VisionInt8(cosine=0.9999))
    whole = quantize(original, tmp_path / "whole", recipe, data=data)
    for moment in ("float", "back", "choice", "int8"):  # each run continues the one killed before
        run_and_be_killed(KILLED, moment, original, data, tmp_path / "killed")
        assert not (tmp_path / "killed").exists()
    continued = quantize(original, tmp_path / "killed", recipe, data=data)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert continued.vision == whole.vision
    assert not (tmp_path / "killed.partial").exists()


def test_one_block_is_in_memory_and_few_tiles_are_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vision, "_MOST_TILES", 3)
    monkeypatch.setattr(vision, "_PROBES", 2)
    original = write_checkpoint(tmp_path / "checkpoint")
    report = quantize(original, tmp_path / "int8").vision
    assert report is not None
    assert report.tiles == 3
    assert report.cosine > 0.99


def test_the_command_line(tmp_path: Path) -> None:
    original, data = write_checkpoint(tmp_path / "checkpoint"), write_data(tmp_path / "data")
    common = ["quantize", str(original), "--data", str(data), "--max-tiles", "2", "--dtype", "float32"]
    out = tmp_path / "out"
    arguments = [*common, "-o", str(out), "--vision", "int8", "--vision-float", "projector.*", "--json"]
    facts = json.loads(CliRunner().invoke(cli, arguments, catch_exceptions=False).stdout)
    assert (facts["recipe"]["decoder"], facts["recipe"]["vision"]) == ("fp", "int8")
    assert facts["vision"]["layers"]["projector.fc1"]["stored"] == "float"
    with safe_open(out / "model.safetensors", "np") as file:
        kinds = Counter(file.get_slice(name).get_dtype() for name in file.keys())  # noqa: SIM118
    assert kinds["I8"] == 8
    said = CliRunner().invoke(cli, ["export", str(out), "-o", str(tmp_path / "b")], catch_exceptions=False).stdout
    assert "8 linears of the tower in int8; floats in projector.fc1, projector.fc2" in said
    refused = CliRunner().invoke(cli, [*common, "-o", str(tmp_path / "no"), "--vision", "int4"])
    assert isinstance(refused.exception, EdgeError)
    assert "below 8 bits" in str(refused.exception)
