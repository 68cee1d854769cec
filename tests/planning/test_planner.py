"""Plans: bytes against bundles that were really written, tiles against the real cutter, advice that really helps."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx_ir as ir
import pytest
from click.testing import CliRunner
from PIL import Image

from helpers import tiny
from helpers.commands import run_script
from helpers.repository import REPOSITORY
from helpers.tiny_quantized import write_quantized
from internvl_edge import export_bundle
from internvl_edge.base.errors import EdgeError
from internvl_edge.bundle.bundle import Bundle
from internvl_edge.bundle.names import EMBEDDINGS
from internvl_edge.checkpoint.config_reader import read_config
from internvl_edge.checkpoint.reader import Checkpoint
from internvl_edge.cli import plan as plan_cli
from internvl_edge.cli.plan import command
from internvl_edge.model.config import ModelConfig
from internvl_edge.model.linear import Scheme
from internvl_edge.model.preprocess import tile_image
from internvl_edge.planning.devices import Device, Devices
from internvl_edge.planning.footprint import INT4, RECIPES, Footprint, Storage
from internvl_edge.planning.planner import IMAGE_SIZES, TILE_LIMITS, make_plan, memory_of, predict, tile_table, tiles_of
from internvl_edge.planning.programs import Programs, reads_whole
from internvl_edge.planning.storage import bundle_storage
from internvl_edge.recipe.files import read_recipe

# The published configurations, sizes alone: variant -> fields of the decoder. The tower is InternViT-300M.
PUBLISHED = {
    "1B": {"hidden_size": 896, "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2}
    | {"head_dim": 64, "intermediate_size": 4864, "vocab_size": 151674, "qkv_bias": True, "architecture": "qwen2"},
    "2B": {"hidden_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 16, "num_key_value_heads": 8}
    | {"head_dim": 128, "intermediate_size": 8192, "vocab_size": 92553}
    | {"qkv_bias": False, "architecture": "internlm2"},
    "8B": {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8}
    | {
        "head_dim": 128,
        "intermediate_size": 14336,
        "vocab_size": 92553,
        "qkv_bias": False,
        "architecture": "internlm2",
    },
}
INT8_TOWER = REPOSITORY / "benchmarks" / "int8_tower.py"
TOWER = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_checkpoint(tmp_path_factory.mktemp("planned") / "checkpoint")


@pytest.fixture(scope="module")
def published(checkpoint: Path) -> dict[str, ModelConfig]:
    config = read_config(checkpoint)
    tower = replace(config.vision, **TOWER, image_size=448, patch_size=14)
    return {
        name: replace(config, vision=tower, decoder=replace(config.decoder, **fields), max_tiles=12)
        for name, fields in PUBLISHED.items()
    }


def device(name: str, **changes: Any) -> Device:
    return replace(Devices().device(name), **changes)


@pytest.mark.parametrize("text", ["qwen2", "internlm2"])
@pytest.mark.parametrize("vision", ["300m", "6b"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_counted_bytes_are_those_of_a_written_bundle(tmp_path: Path, text: str, vision: str, dtype: str) -> None:
    folder = tiny.write_checkpoint(tmp_path / "checkpoint", text=text, vision=vision)
    bundle = Bundle.open(export_bundle(folder, tmp_path / "bundle", dtype))
    storage = bundle_storage(bundle.manifest)
    weights = Footprint(bundle.manifest.model, storage).weights
    assert weights.embeddings == bundle.path(EMBEDDINGS).stat().st_size
    for counted, name in ((weights.vision, "vision.data"), (weights.decoder + weights.head, "decoder.data")):
        stored = bundle.path(name).stat().st_size
        # Every tensor starts on a page, which only models as small as this one notice.
        tensors = len(Checkpoint(folder).shapes)
        assert counted <= stored <= counted + 4096 * tensors


@pytest.mark.parametrize("kind", ["int4, zero points", "int4 and int8 head", "int8 tower"])
def test_counted_bytes_are_those_of_a_quantized_bundle(tmp_path: Path, kind: str) -> None:
    source = tiny.write_checkpoint(tmp_path / "plain", hidden_size=128, vision_hidden_size=128)
    if kind == "int8 tower":
        checkpoint = tmp_path / "int8"
        assert run_script(INT8_TOWER, source, checkpoint).returncode == 0
    else:
        symmetric = {"method": "compressed-tensors", "body": Scheme(4, 32, True), "head": Scheme(8, None, True)}
        checkpoint, _ = write_quantized(source, tmp_path / "made", **({} if "zero" in kind else symmetric))
    bundle = Bundle.open(export_bundle(checkpoint, tmp_path / "bundle", "float16"))
    weights = Footprint(bundle.manifest.model, bundle_storage(bundle.manifest)).weights
    for counted, name in ((weights.vision, "vision.data"), (weights.decoder + weights.head, "decoder.data")):
        assert counted == pytest.approx(_used_bytes(bundle.path(name.replace("data", "onnx"))), rel=0.05)


def _used_bytes(header: Path) -> int:
    """Bytes of the tensors a graph keeps in its data file, without what aligns them."""
    initializers = ir.load(header).graph.initializers.values()
    tensors = (value.const_value for value in initializers)
    return sum(tensor.nbytes for tensor in tensors if isinstance(tensor, ir.ExternalTensor))


def test_cache_is_what_the_engine_allocates(checkpoint: Path, tmp_path: Path) -> None:
    from internvl_edge.runtime.engines.onnxruntime import OnnxRuntimeEngine

    bundle = Bundle.open(export_bundle(checkpoint, tmp_path / "bundle"))
    engine = OnnxRuntimeEngine(bundle, capacity=64)
    allocated = sum(array.nbytes for array in engine._buffers.arrays.values())
    assert Footprint(bundle.manifest.model, Storage(cache_bytes=4)).cache_bytes(64) == allocated


def test_published_sizes(published: dict[str, ModelConfig]) -> None:
    """Bytes per token and per model as known for the published models, in 1e6 bytes or KiB."""
    expected = {"1B": (185, 272, 12), "2B": (779, 379, 96), "8B": (3599, 758, 128)}
    for name, (body, head, cache) in expected.items():
        footprint = Footprint(published[name], Storage(body=INT4))
        assert footprint.weights.decoder / 1e6 == pytest.approx(body, rel=0.01)
        assert footprint.weights.head / 1e6 == pytest.approx(head, rel=0.01)
        assert footprint.cache_bytes(1) == cache * 1024


def test_vision_operations_are_those_of_the_tower(published: dict[str, ModelConfig]) -> None:
    assert Footprint(published["1B"], Storage()).vision_operations(1) / 1e12 == pytest.approx(0.72, rel=0.05)


def test_predictions_are_the_roofline(published: dict[str, ModelConfig]) -> None:
    """With the cache left aside, published tables of bytes per token give these speeds."""
    footprint = Footprint(published["2B"], Storage(body=INT4))
    speed = predict(footprint, device("orin-nano-8gb"), tiles=1)
    assert speed.decode_tokens_per_s == pytest.approx(59, rel=0.05)
    faster = predict(footprint, device("orin-nano-8gb", tflops=20.4), tiles=1)
    assert faster.vision_s == pytest.approx(speed.vision_s / 2)
    assert faster.decode_tokens_per_s == speed.decode_tokens_per_s


def test_what_does_not_fit_is_told_what_would(published: dict[str, ModelConfig]) -> None:
    """8B in 16 bits is twice the memory of an 8 GB board; the advised recipe fits and is the first that does."""
    board = device("orin-nano-8gb")
    config = published["8B"]
    plan = make_plan(config, board, "fp16", RECIPES["fp16"], context=4096, max_tiles=12)
    assert not plan.fits
    fitting = [name for name, storage in RECIPES.items() if _fits(config, board, storage, 4096)]
    assert any(advice.startswith(f"recipe {fitting[0]} ") for advice in plan.advice)
    long = make_plan(config, board, "w4a16", RECIPES["w4a16"], context=32768, max_tiles=12)
    assert not long.fits
    context = int(long.advice[0].split()[1])
    assert _fits(config, board, RECIPES["w4a16"], context)
    assert not _fits(config, board, RECIPES["w4a16"], context + 512)
    hopeless = make_plan(config, replace(board, memory_gib=4), "fp16", RECIPES["fp16"], context=4096, max_tiles=12)
    assert hopeless.advice == ("a smaller variant of the model, or a device with more memory",)


def _fits(config: ModelConfig, board: Device, storage: Storage, context: int) -> bool:
    return memory_of(Footprint(config, storage), context, board.flavour).total <= board.usable_memory


def test_scores_of_attention_count_where_it_is_not_one_kernel(published: dict[str, ModelConfig]) -> None:
    """JetPack 6.2: heads x rows x slots of the decoder, heads x patches x patches of the tower, in 16 bits, twice."""
    footprint = Footprint(published["8B"], RECIPES["w4a16"])
    decoder, vision = published["8B"].decoder, published["8B"].vision
    fused = footprint.activation_bytes(4, 512)
    apart = footprint.activation_bytes(4, 512, slots=4096)
    scores = 32 * 512 * (4096 + 512) * 2
    tower = 4 * 16 * 1025**2 * 2
    assert (decoder.num_attention_heads, vision.num_attention_heads, vision.grid_size) == (32, 16, 32)
    assert fused < 2 * min(scores, tower)
    assert apart > fused + 2 * min(scores, tower)
    assert apart > footprint.activation_bytes(4, 512, slots=1024)
    on_board, on_card = (memory_of(footprint, 4096, flavour) for flavour in ("tensorrt", "tensorrt_rtx"))
    assert on_board.activations == apart
    assert on_card.activations == fused
    assert on_board.workspace == on_card.workspace


def test_boards_have_the_memory_that_they_report(published: dict[str, ModelConfig]) -> None:
    """An Orin Nano of 8 GiB reports 7619 MiB (see devices.toml), of which the system takes its part."""
    board = device("orin-nano-8gb")
    assert board.usable_memory == (7619 - 1536) * 2**20
    assert replace(board, reported_mib=0).usable_memory == (8192 - 1536) * 2**20
    assert replace(board, memory_gib=4).usable_memory == (4096 - 1536) * 2**20
    for name in ("orin-nx-16gb", "agx-orin-32gb", "agx-orin-64gb"):
        assert 0.9 * device(name).memory < device(name).reported_mib * 2**20 < device(name).memory


def test_separate_programs_are_planned_where_they_fit(published: dict[str, ModelConfig]) -> None:
    """Floats are held twice and integers once; an 8B in int4 has room for neither twice on a board of 8 GB."""
    plans = {
        (size, recipe, name): make_plan(
            published[size], device(name), recipe, RECIPES[recipe], context=4096, max_tiles=6
        )
        for size, recipe, name in (
            *(("1B", "fp16", "rtx-4060"), ("1B", "w4a16, int8 head", "rtx-4060"), ("2B", "fp16", "rtx-4050-laptop")),
            *(("1B", "w4a16", "orin-nano-8gb"), ("8B", "w4a16, int8 head", "orin-nano-8gb")),
        )
    }
    chosen = {key: plan.programs for key, plan in plans.items()}
    assert list(chosen.values()) == [Programs.WHOLE, Programs.WHOLE, Programs.ONE, Programs.STEP, Programs.ONE]
    floats, integers, large, *_ = plans.values()
    assert floats.memory.programs > floats.memory.decoder
    assert floats.build_bytes > large.build_bytes / 2 > integers.build_bytes
    assert integers.memory.programs < 0.1 * (integers.memory.decoder + integers.memory.head)
    assert large.fits
    assert large.memory.programs == 0
    assert any(advice.startswith("one program serves prompts and steps") for advice in large.advice)
    assert large.to_dict()["programs"] == 1


@pytest.mark.parametrize("name", ["orin-nano-8gb", "rtx-4060"])
def test_rows_count_in_memory_and_in_speed(published: dict[str, ModelConfig], name: str) -> None:
    """Each row has a cache of its own with some slots more; a step reads the weights once, and all slots."""
    config, board, int4 = published["1B"], device(name), RECIPES["w4a16, int8 head and vision"]
    footprint = Footprint(config, int4)
    one, four, many = (make_plan(config, board, "", int4, context=2048, max_tiles=1, rows=rows) for rows in (1, 4, 64))
    token = footprint.cache_bytes(1)
    assert (one.rows, one.memory.kv_cache) == (1, 2048 * token)
    assert (four.rows, four.memory.kv_cache) == (4, 4 * 2176 * token)
    assert four.programs == Programs.STEP
    read = footprint.weights.decoder + footprint.weights.head + 4 * 2176 * token
    assert four.speed.decode_tokens_per_s == pytest.approx(4 * board.bandwidth_gbs * 1e9 / read)
    assert one.speed.decode_tokens_per_s < four.speed.decode_tokens_per_s < 4 * one.speed.decode_tokens_per_s
    assert (four.speed.vision_s, four.speed.prefill_s) == (one.speed.vision_s, one.speed.prefill_s)
    most = 64 * board.tflops * 1e12 / (64 * footprint.prefill_operations(1))
    assert many.speed.decode_tokens_per_s <= most
    # Before TensorRT 10.15, keys and values of all rows are repeated for the query heads.
    repeated = 64 * 4 * config.decoder.num_attention_heads * (2176 + 512) * config.decoder.head_dim
    assert (many.memory.activations > repeated) == (board.flavour == "tensorrt")
    assert four.to_dict()["rows"] == 4


def test_too_many_rows_are_told_how_many_fit(published: dict[str, ModelConfig]) -> None:
    config, board, storage = published["8B"], device("orin-nx-16gb"), RECIPES["w4a16, int8 head and vision"]
    plan = make_plan(config, board, "", storage, context=8192, max_tiles=1, rows=32)
    assert not plan.fits
    rows = int(plan.advice[0].removeprefix("--rows "))
    footprint = Footprint(config, storage)
    fits = [memory_of(footprint, 8192, board.flavour, rows=n).total <= board.usable_memory for n in (rows, rows + 1)]
    assert fits == [True, False]
    context = int(next(text for text in plan.advice if text.startswith("--context")).split()[1])
    assert memory_of(footprint, context, board.flavour, rows=32).total <= board.usable_memory


def test_a_step_reads_what_moves_fewer_bytes() -> None:
    """Copying a window moves it three times. From a third of the cache on, reading all of it in place is less."""
    capacity = 4096
    moved = {window: min(3 * window, capacity) for window in range(1, capacity + 1)}
    for window, least in moved.items():
        assert (capacity if reads_whole(window, capacity) else 3 * window) == least


def test_a_context_too_short_for_the_tiles_is_said(published: dict[str, ModelConfig]) -> None:
    plan = make_plan(published["1B"], device("rtx-4090"), "fp16", Storage(), context=2048, max_tiles=12)
    assert plan.fits
    assert "13 are 3408 tokens" in plan.advice[0]


def test_a_board_too_small_to_build_on_is_told(published: dict[str, ModelConfig]) -> None:
    """8B in int4 fits 8 GB, building its engine does not; cards take engines built elsewhere."""
    plans = {
        name: make_plan(published["8B"], device(name), "w4a16", RECIPES["w4a16"], context=4096, max_tiles=12)
        for name in ("orin-nano-8gb", "rtx-4060", "agx-orin-32gb")
    }
    assert all(plan.fits for plan in plans.values())
    told = {name: any("add swap" in advice for advice in plan.advice) for name, plan in plans.items()}
    assert told == {"orin-nano-8gb": True, "rtx-4060": False, "agx-orin-32gb": False}


def test_tile_table_is_what_the_cutter_does(published: dict[str, ModelConfig]) -> None:
    table = {row["image"]: row for row in tile_table(published["1B"])}
    assert table["VGA camera"]["tiles"] == {1: 1, 2: 1, 4: 1, 6: 7, 9: 7, 12: 13}
    for label, (width, height) in IMAGE_SIZES.items():
        small = Image.fromarray(np.zeros((height, width, 3), np.uint8))
        for limit in TILE_LIMITS[:3]:
            assert len(tile_image(small, max_tiles=limit)) == table[label]["tiles"][limit]
    assert [tiles_of(published["1B"], limit) for limit in (1, 6, 12)] == [1, 7, 13]


# -- the command -------------------------------------------------------------------------------------------------------


def test_plan_from_a_configuration_alone(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((checkpoint / "config.json").read_bytes())
    for path in (tmp_path, tmp_path / "config.json"):
        result = CliRunner().invoke(command, [str(path), "--json"])
        assert result.exit_code == 0, result.output
        plans = json.loads(result.output)["plans"]
        assert {plan["device"] for plan in plans} == set(Devices().all)
        assert all(plan["fits"] and plan["prediction"]["method"] == "roofline bound" for plan in plans)


def test_rows_are_planned_by_the_command(checkpoint: Path) -> None:
    arguments = [str(checkpoint), "--device", "rtx-3060", "--context", "1024", "--rows", "4"]
    shown = CliRunner().invoke(command, arguments)
    assert shown.exit_code == 0, shown.output
    assert "tokens/s of 4 rows" in shown.output
    assert "4 contexts of 1024 tokens" in shown.output
    plan = json.loads(CliRunner().invoke(command, [*arguments, "--json"]).output)["plans"][0]
    assert (plan["rows"], plan["programs"]) == (4, 2)
    single = json.loads(CliRunner().invoke(command, [*arguments[:-2], "--json"]).output)["plans"][0]
    assert plan["memory"]["kv_cache"] == single["memory"]["kv_cache"] // 1024 * 1152 * 4
    overview = CliRunner().invoke(command, [str(checkpoint), "--rows", "2", "--context", "512"])
    assert "GB of memory for 2 contexts of 512 tokens" in overview.output
    assert CliRunner().invoke(command, [*arguments[:-1], "65"]).exit_code == 2


def test_plan_of_a_bundle_shows_stored_and_counted(checkpoint: Path, tmp_path: Path) -> None:
    bundle = export_bundle(checkpoint, tmp_path / "bundle")
    result = CliRunner().invoke(command, [str(bundle), "--device", "orin-nx-16gb"])
    assert result.exit_code == 0, result.output
    assert "stored" in result.output
    assert "640x480" in result.output
    assert "predictions" in result.output


def test_presets_and_recipe_files_can_be_planned(checkpoint: Path, tmp_path: Path) -> None:
    def plan(recipe: str, device: str) -> dict[str, Any]:
        arguments = [str(checkpoint), "--device", device, "--recipe", recipe, "--json"]
        result = CliRunner().invoke(command, arguments, catch_exceptions=False)
        plan: dict[str, Any] = json.loads(result.output)["plans"][0]
        return plan

    def planned(recipe: str, device: str = "rtx-3060") -> dict[str, Any]:
        memory: dict[str, Any] = plan(recipe, device)["memory"]
        return memory

    orin, floats = planned("orin"), planned("fp16")
    assert orin["kv_cache"] == floats["kv_cache"] / 2
    assert orin["vision"] < 0.8 * floats["vision"]
    own = tmp_path / "own.toml"
    own.write_text('base = "orin"\nkv_cache = "fp"\n')
    wide = planned(str(own))
    program = wide["programs"] - orin["programs"]  # one more, which reads the whole cache in place
    assert program > 0
    assert wide == orin | {
        "kv_cache": floats["kv_cache"],
        "programs": wide["programs"],
        "total": orin["total"] + orin["kv_cache"] + program,
    }
    board = plan("orin", "orin-nano-8gb")
    assert board["memory"]["kv_cache"] == floats["kv_cache"]
    assert any("the int8 KV cache takes 16 bits" in advice for advice in board["advice"])
    own.write_text('base = "orin"\n[layers]\n"layers.0.*" = "w8a16"\n')
    with pytest.raises(EdgeError, match="decides layer by layer"):
        planned(str(own))
    with pytest.raises(EdgeError, match="did you mean orin"):
        planned("oron")


def test_the_overview_is_one_screen_with_figures_for_people(
    published: dict[str, ModelConfig], checkpoint: Path
) -> None:
    for config in (*published.values(), read_config(checkpoint)):
        plans = [
            make_plan(config, board, label, storage, context=4096, max_tiles=12)
            for board in Devices().all.values()
            for label, storage in RECIPES.items()
        ]
        for shown in (plans, [plan for plan in plans if plan.device.name == "orin-nano-8gb"]):
            text = capture(plan_cli._print_overview if shown is plans else plan_cli._print_plans, shown)
            assert "0.00" not in text
            assert not re.search(r"\d{6}|e[+-]\d\d", text)
            if shown is plans:
                lines = text.splitlines()
                assert len(lines) < 40
                assert max(map(len, lines)) <= 80
                assert "Jetson, with the TensorRT of JetPack:" in lines
                assert sum(line.split()[0] in Devices().all for line in lines) == len(Devices().all)
    board = next(line for line in capture(plan_cli._print_overview, plans).splitlines() if line.startswith("rtx-4060 "))
    assert board.split()[1] == "fp16"  # the first recipe that fits


def capture(show: Any, plans: list[Any]) -> str:
    return CliRunner().invoke(click.Command("show", callback=lambda: show(plans)), []).output


def test_a_family_of_devices_is_planned_together(checkpoint: Path) -> None:
    def planned(name: str) -> set[str]:
        result = CliRunner().invoke(command, [str(checkpoint), "--device", name, "--json"], catch_exceptions=False)
        return {plan["device"] for plan in json.loads(result.output)["plans"]}

    assert planned("rtx") == {name for name in Devices().all if name.startswith("rtx-")}
    assert planned("orin") == {name for name in Devices().all if "orin-" in name}
    assert planned("jetson") == planned("orin") | {"thor", "thor-t4000"}
    assert planned("thor") == {"thor"}
    with pytest.raises(EdgeError, match="did you mean orin"):
        planned("orinn")


def test_a_recipe_of_another_name_is_pointed_to_the_preset() -> None:
    for name, meant in (("jetson", r"orin \(for Jetson Orin\) or thor"), ("GPU", "rtx"), ("orin-nano-8gb", "orin")):
        with pytest.raises(EdgeError, match=f"did you mean {meant}"):
            read_recipe(name)
