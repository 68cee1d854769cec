"""The storage that `plan` and `bench` count with: of each part its own, in checkpoints, bundles and both dialects."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
from click.testing import CliRunner

from helpers.kv_scales import write_scales
from helpers.quantizing import quantize
from helpers.tiny import write_checkpoint
from helpers.tiny_quantized import write_quantized
from internvl_edge.bundle.bundle import Bundle
from internvl_edge.bundle.manifest import Manifest
from internvl_edge.bundle.names import DECODERS
from internvl_edge.checkpoint.config_reader import read_config
from internvl_edge.checkpoint.reader import Checkpoint
from internvl_edge.cli.inspect import command as inspect_command
from internvl_edge.cli.plan import command as plan_command
from internvl_edge.export import export_bundle
from internvl_edge.model.linear import W8A8, Scheme
from internvl_edge.planning.devices import Devices
from internvl_edge.planning.footprint import Footprint, Storage
from internvl_edge.planning.planner import predict
from internvl_edge.planning.storage import bundle_storage, checkpoint_storage
from internvl_edge.recipe.recipe import INT8, DecoderInt8, Recipe, VisionInt8
from internvl_edge.runtime import limits
from internvl_edge.runtime.bench import bundle_footprint
from internvl_edge.runtime.engines.onnxruntime import OnnxRuntimeEngine

TOWER: dict[str, Any] = {"vision": "int8", "vision_int8": VisionInt8(cosine=0, keep=("projector.*",))}
W8A8_DECODER = Recipe("w8a8", decoder_int8=DecoderInt8(max_kl=0))
RECIPES = {
    "float decoder, int8 tower": Recipe("fp", **TOWER),
    "orin with a float head": Recipe("w4a16-rtn", group_size=32, symmetric=True, **TOWER),
    "as the presets": Recipe("w4a16-rtn", group_size=32, lm_head="int8", **TOWER),
    "head alone": Recipe("fp", lm_head="int8"),
    "floats between": Recipe("w4a16-rtn", group_size=32, layers=(("*.o_proj", "fp"),)),
    "awq": Recipe("w4a16-rtn", group_size=32),
    "w8a8": W8A8_DECODER,
}
PUBLISHED = [{"method": "awq"}, {}, {"place": "both", "head": INT8}, {"body": None, "head": INT8}]
LAYOUTS: dict[str, dict[str, Any]] = {
    "remote": {"text": "internlm2"},
    "native": {"layout": "native_prefixed"},
}


def planned(folder: Path) -> Storage:
    found = checkpoint_storage(folder, read_config(folder))
    assert found is not None
    return found


def assert_is_what_is_stored(folder: Path) -> None:
    """Each linear has the scheme that its stored tensors have; config.json alone is enough to know."""
    stored, found = Checkpoint(folder), planned(folder)
    by_part = {"decoder.layers.": found.body, "decoder.lm_head.": found.head}
    by_part |= {"vision.layers.": found.vision, "projector.": found.vision}
    for name, shape in stored.shapes.items():
        part = next((part for part in by_part if name.startswith(part)), None)
        if part and len(shape) == 2:
            linear = name.removesuffix(".weight")
            assert (None if linear in found.floats else by_part[part]) == stored.schemes.get(linear), linear


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_every_part_of_a_checkpoint_is_planned_as_it_is_stored(tmp_path: Path, layout: str, recipe: Recipe) -> None:
    quantize(write_checkpoint(tmp_path / "checkpoint", **LAYOUTS[layout]), tmp_path / "out", recipe)
    assert_is_what_is_stored(tmp_path / "out")


@pytest.mark.parametrize("listed", [True, False])
@pytest.mark.parametrize("choices", PUBLISHED)
def test_published_configurations_with_and_without_ignore(
    tmp_path: Path, choices: dict[str, Any], listed: bool
) -> None:
    source = write_checkpoint(tmp_path / "checkpoint")
    choices = {"method": "compressed-tensors", "listed": listed, **choices}
    folder, _ = write_quantized(source, tmp_path / "made", **choices)
    assert_is_what_is_stored(folder)


# -- bundles -----------------------------------------------------------------------------------------------------------


def test_a_bundle_with_a_quantized_head_alone_has_a_float_body(tmp_path: Path) -> None:
    quantize(write_checkpoint(tmp_path / "checkpoint"), tmp_path / "out", RECIPES["head alone"])
    bundle = Bundle.open(export_bundle(tmp_path / "out", tmp_path / "bundle"))
    found = bundle_storage(bundle.manifest)
    assert (found.body, found.head) == (None, INT8)
    result = CliRunner().invoke(plan_command, [str(bundle.folder), "--json"], catch_exceptions=False)
    assert {plan["recipe"] for plan in json.loads(result.output)["plans"]} == {"as it is"}


def test_a_head_does_not_outvote_the_layers(tmp_path: Path) -> None:
    recipe = Recipe("fp", lm_head="int8", layers=(("layers.1.mlp.down_proj", "w4a16-rtn-g32"),))
    quantize(write_checkpoint(tmp_path / "checkpoint"), tmp_path / "out", recipe)
    manifest = Bundle.open(export_bundle(tmp_path / "out", tmp_path / "bundle")).manifest
    assert manifest.quantization is not None
    found = bundle_storage(manifest)
    assert (found.body, found.head) == (Scheme(4, 32, symmetric=False), INT8)


def test_a_decoder_in_int8_is_not_taken_for_a_tower(tmp_path: Path) -> None:
    quantize(write_checkpoint(tmp_path / "checkpoint"), tmp_path / "out", W8A8_DECODER)
    manifest = Bundle.open(export_bundle(tmp_path / "out", tmp_path / "bundle")).manifest
    assert not manifest.schemes("vision.")
    found = bundle_storage(manifest)
    assert (found.body, found.vision) == (W8A8, None)


@pytest.mark.parametrize("dialect", DECODERS)
def test_counted_bytes_are_those_of_the_dialect(tmp_path: Path, dialect: str) -> None:
    source = write_checkpoint(tmp_path / "plain", hidden_size=128)
    checkpoint, _ = write_quantized(source, tmp_path / "made")
    bundle = Bundle.open(export_bundle(checkpoint, tmp_path / "bundle"))
    counted = Footprint(bundle.manifest.model, bundle_storage(bundle.manifest, dialect)).weights
    graph = ir.load(bundle.path(DECODERS[dialect])).graph
    tensors = [value.const_value for value in graph.initializers.values()]
    stored = sum(tensor.nbytes for tensor in tensors if isinstance(tensor, ir.ExternalTensor))
    assert counted.decoder + counted.head == pytest.approx(stored, rel=0.02)


# -- speeds and what this machine reads --------------------------------------------------------------------------------


def test_prompts_of_an_int8_decoder_are_bound_by_the_int8_rate(tmp_path: Path) -> None:
    config = read_config(write_checkpoint(tmp_path / "checkpoint"))
    board = replace(Devices().device("orin-nano-8gb"), bandwidth_gbs=1e9)
    times = {body: predict(Footprint(config, Storage(body=body)), board, 1).prefill_s for body in (W8A8, INT8, None)}
    assert times[INT8] == times[None]
    assert times[W8A8] == pytest.approx(times[None] * board.tflops / board.int8_tops)


@pytest.mark.parametrize("threads", [1, 3, 12, 14])
def test_bandwidth_is_measured_with_any_number_of_threads(monkeypatch: pytest.MonkeyPatch, threads: int) -> None:
    monkeypatch.setattr(limits, "_STREAM_BYTES", 8 << 20)
    assert limits.read_bandwidth(threads) > 0


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Bundles by what their cache holds."""
    folder = tmp_path_factory.mktemp("caches")
    source = write_checkpoint(folder / "checkpoint")
    made = {
        "float32": export_bundle(source, folder / "float32"),
        "float16": export_bundle(source, folder / "float16", "float16", "float16"),
    }
    shutil.copytree(source, folder / "rounded")
    write_scales(folder / "rounded")
    return made | {"int8": export_bundle(folder / "rounded", folder / "int8")}


@pytest.mark.parametrize("kind", ["float32", "float16", "int8"])
def test_bench_counts_the_cache_that_the_engine_holds(caches: dict[str, Path], kind: str) -> None:
    engine = OnnxRuntimeEngine(Bundle.open(caches[kind]), capacity=64)
    footprint = bundle_footprint(Manifest.read(caches[kind]), engine.dialect)
    assert footprint.cache_bytes(64) == sum(array.nbytes for array in engine._buffers.arrays.values())


@pytest.mark.parametrize("dialect", DECODERS)
def test_bench_counts_the_dialect_that_runs(caches: dict[str, Path], dialect: str) -> None:
    bundle = Bundle.open(caches["float32"])
    engine = OnnxRuntimeEngine(bundle, capacity=64, dialect=dialect)
    assert bundle_footprint(bundle.manifest, engine.dialect).storage.dialect == dialect


@pytest.mark.parametrize(("kind", "width"), [("float32", 4), ("float16", 2), ("int8", 1)])
def test_inspect_shows_the_cache_of_the_bundle(caches: dict[str, Path], kind: str, width: int) -> None:
    shown = CliRunner().invoke(inspect_command, [str(caches[kind])], catch_exceptions=False).stdout
    decoder = Manifest.read(caches[kind]).model.decoder
    size = 2 * decoder.num_hidden_layers * decoder.num_key_value_heads * decoder.head_dim * width
    line = next(line for line in shown.splitlines() if line.startswith("KV cache"))
    assert line.endswith(f"{size} B per token in {kind}"), line
