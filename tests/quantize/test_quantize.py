"""Quantized checkpoints: every scheme in every layout reads back and answers like what was rounded; kills; refusals."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors import safe_open

from helpers.calibration_data import FLOAT32, write_data
from helpers.damage import poison
from helpers.killed_runs import contents, run_and_be_killed, run_to_the_end
from helpers.reference import Cache, Reference
from helpers.reference_names import text_name
from helpers.tiny import write_checkpoint
from internvl_edge.base.errors import EdgeError
from internvl_edge.calibration import DataOptions, calibrate
from internvl_edge.calibration.stream import BlockStream
from internvl_edge.checkpoint.reader import Checkpoint
from internvl_edge.checkpoint.record import RECORD, REPORTS
from internvl_edge.cli import cli
from internvl_edge.export import export_bundle
from internvl_edge.quantize import pipeline, quantize_checkpoint
from internvl_edge.recipe.files import combine, make_recipe, presets
from internvl_edge.recipe.recipe import Recipe

KINDS: dict[str, dict[str, Any]] = {
    "qwen2": {},
    "internlm2": {"text": "internlm2", "bias": True, "shards": 2, "dtype": "float16"},
    "qwen3": {"text": "qwen3", "head_dim": 32, "padding_rows": 5, "shards": 2},
    "qwen3 native": {"text": "qwen3", "head_dim": 24, "layout": "native", "num_attention_heads": 8, "shards": 2},
    "native": {"layout": "native_prefixed"},
}
RECIPES: dict[str, Recipe] = {
    "awq": Recipe(group_size=32),
    "awq without compensation": Recipe(group_size=64, error_compensation=False),
    "awq symmetric": Recipe(group_size=32, symmetric=True),
    "awq, negative scales": Recipe(group_size=32, symmetric=True, negative_scales=True),
    "awq, int8 head": Recipe(group_size=32, lm_head="int8"),
    "awq, int4 head": Recipe(group_size=32, lm_head="int4"),
    "rtn": Recipe("w4a16-rtn", group_size=32),
    "rtn, int4 head": Recipe("w4a16-rtn", group_size=32, lm_head="int4"),
    "rtn, negative scales": Recipe("w4a16-rtn", group_size=32, symmetric=True, negative_scales=True),
    "w8a16": Recipe("w8a16", lm_head="int8"),
    "w8a16, rounded": Recipe("w8a16", lm_head="int8", error_compensation=False),
}
# Mean KL divergence from the float model that a random one of this size may lose.
LIMITS = {4: 0.6, 8: 0.01}
IDS = list(range(40, 100))


def quantize(checkpoint: Path, out: Path, recipe: Recipe, data: Path | None = None) -> Any:
    options = DataOptions(data or write_data(checkpoint.parent / "data"), max_tiles=2) if recipe.needs_data else None
    return quantize_checkpoint(checkpoint, out, recipe, data=options, compute=FLOAT32)


def dequantized(original: Path, quantized: Path) -> Reference:
    """The reference of the original with the text model that the quantized checkpoint stands for."""
    model, read = Reference(original), Checkpoint(quantized)
    for name in read.shapes:
        if name.startswith("decoder."):
            model.weights[text_name(name)] = torch.from_numpy(read.tensor(name).astype(np.float32))
    return model


def divergence(original: Path, quantized: Path) -> float:
    base = Reference(original).logits(IDS).log_softmax(-1)
    found = dequantized(original, quantized).logits(IDS).log_softmax(-1)
    return float((base.exp() * (base - found)).sum(-1).mean())


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_scheme_reads_back_near_the_original(tmp_path: Path, kind: str, recipe: Recipe) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint", **KINDS[kind])
    report = quantize(checkpoint, tmp_path / "out", recipe)
    read = Checkpoint(tmp_path / "out")
    head = {"fp": 0, "int8": 1, "int4": 1}[recipe.lm_head]
    packed = [name for name in read.shapes if name.endswith(".weight") and read.linear(name.removesuffix(".weight"))]
    assert len(packed) == 14 + head
    linear = read.linear("decoder.layers.1.mlp.down_proj")
    assert linear is not None
    bits = 8 if recipe.decoder == "w8a16" else 4
    assert (linear.bits, linear.zero_point is None) == (bits, recipe.symmetric or bits == 8)
    assert bool((linear.scale < 0).any()) == recipe.negative_scales
    assert divergence(checkpoint, tmp_path / "out") < LIMITS[bits]
    assert bool(report.errors) == recipe.needs_data
    assert not (tmp_path / "out.partial").exists()


def test_compensation_brings_8_bit_weights_nearer(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint")
    total = {}
    for compensated in (False, True):
        # The cache asks for data in both cases, and with data come the errors of outputs.
        recipe = Recipe("w8a16", kv_cache="int8", error_compensation=compensated)
        total[compensated] = sum(quantize(checkpoint, tmp_path / str(compensated), recipe).errors.values())
    assert total[True] < 0.8 * total[False]


@pytest.mark.parametrize("kind", ["internlm2", "qwen3", "qwen3 native"])
def test_scales_of_the_cache_are_those_of_what_the_cache_holds(tmp_path: Path, kind: str) -> None:
    """Also where a norm stands between the projection of keys and the cache. A rotation changes no pair's length."""
    checkpoint = write_checkpoint(tmp_path / "checkpoint", **KINDS[kind] | {"dtype": "float32"})
    data = DataOptions(write_data(tmp_path / "data"), max_tiles=2)
    quantize_checkpoint(checkpoint, tmp_path / "out", Recipe("fp", kv_cache="int8"), data=data, compute=FLOAT32)
    made = calibrate(checkpoint, tmp_path / "stats", data, FLOAT32)
    reference, scales = Reference(checkpoint), Checkpoint(tmp_path / "out").kv_scales
    assert scales is not None
    embeddings = torch.from_numpy(np.array(made.embeddings())).split(list(made.lengths))
    largest: tuple[list[torch.Tensor], list[torch.Tensor]] = [], []
    for sample in embeddings:
        cache = Cache()
        with torch.no_grad():
            reference._decoder(sample, cache)
        halves = [torch.stack(cache.keys).chunk(2, dim=-1)[half] for half in (0, 1)]
        largest[0].append(torch.hypot(*halves).amax(2))
        largest[1].append(torch.stack(cache.values).abs().amax(2))
    keys, values = (torch.stack(parts).amax(0) / 127 for parts in largest)
    torch.testing.assert_close(torch.from_numpy(scales.key), torch.cat([keys, keys], dim=-1), rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(torch.from_numpy(scales.value), values, rtol=1e-3, atol=1e-6)


def test_files_of_an_earlier_run_are_not_carried_over(tmp_path: Path) -> None:
    """A checkpoint with an int8 cache and float weights can be quantized; the recipe decides about its cache."""
    checkpoint, floats = write_checkpoint(tmp_path / "checkpoint"), tmp_path / "floats"
    quantize(checkpoint, floats, Recipe("fp", kv_cache="int8"))
    for name in REPORTS:
        (floats / name).write_text("of the earlier run")
    quantize(floats, tmp_path / "out", Recipe("w4a16-rtn", 32))
    assert Checkpoint(floats).kv_scales is not None
    assert Checkpoint(tmp_path / "out").kv_scales is None
    assert not {*REPORTS, "kv_cache_scales.npz"} & {path.name for path in (tmp_path / "out").iterdir()}


def test_what_is_not_the_decoder_is_carried_over_bit_for_bit(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint")
    (checkpoint / "modeling_internvl_chat.py").write_text("raise SystemExit")
    pickles = {"inputs_stats.pth", "last.ckpt", "__0_0.distcp", "scaler.joblib", "state.pickle", "losses.npy"}
    for pickle in pickles:
        (checkpoint / pickle).write_bytes(b"pickle")
    quantize(checkpoint, tmp_path / "out", RECIPES["awq"])
    before, after = Checkpoint(checkpoint), Checkpoint(tmp_path / "out")
    same = [n for n in before.shapes if not n.startswith("decoder.") or "embed" in n or "lm_head" in n]
    assert len(same) > 30
    for name in same:
        assert after.tensor(name).dtype == before.tensor(name).dtype
        assert np.array_equal(after.tensor(name), before.tensor(name))
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {path.name for path in checkpoint.iterdir()} - pickles | {RECORD, "README.md"}
    carried = (
        "vocab.json",
        "merges.txt",
        "tokenizer_config.json",
        "generation_config.json",
        "modeling_internvl_chat.py",
    )
    for name in carried:  # the code is never run: it would end this process
        assert (tmp_path / "out" / name).read_bytes() == (checkpoint / name).read_bytes()


@pytest.mark.parametrize(("kind", "section"), [("qwen2", "llm_config"), ("internlm2", "llm_config")])
def test_autoawq_is_written_as_published(tmp_path: Path, kind: str, section: str) -> None:
    quantize(write_checkpoint(tmp_path / "checkpoint", **KINDS[kind]), tmp_path / "out", RECIPES["awq"])
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    described = config["quantization_config"]
    assert described == config[section]["quantization_config"]
    assert {key: described[key] for key in ("quant_method", "version", "bits", "group_size", "zero_point")} == {
        "quant_method": "awq",
        "version": "gemm",
        "bits": 4,
        "group_size": 32,
        "zero_point": True,
    }
    with safe_open(next((tmp_path / "out").glob("*.safetensors")), "np") as file:
        names = set(file.keys())
    layer = "language_model.model.layers.1."
    modules = (
        ["attention.wqkv", "attention.wo", *(f"feed_forward.w{n}" for n in (1, 2, 3))]
        if kind == "internlm2"
        else [*(f"self_attn.{x}_proj" for x in "qkvo"), *(f"mlp.{x}_proj" for x in ("gate", "up", "down"))]
    )
    expected = {f"{layer}{module}.{part}" for module in modules for part in ("qweight", "qzeros", "scales")}
    assert {name for name in names if name.startswith(layer) and name.endswith(("qweight", "qzeros", "scales"))} == (
        expected
    )


def test_a_recipe_that_autoawq_cannot_say_becomes_compressed_tensors(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint")
    quantize(checkpoint, tmp_path / "out", RECIPES["awq, int8 head"])
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    weights = [group["weights"] for group in config["quantization_config"]["config_groups"].values()]
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    assert [(w["num_bits"], w["strategy"], w["symmetric"]) for w in weights] == [
        (4, "group", False),
        (8, "channel", True),
    ]


@pytest.mark.parametrize("name", ["awq", "awq symmetric", "awq, int8 head", "w8a16"])
@pytest.mark.parametrize("kind", ["qwen2", "internlm2"])
def test_quantized_checkpoints_export(tmp_path: Path, kind: str, name: str) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint", **KINDS[kind])
    quantize(checkpoint, tmp_path / "out", RECIPES[name])
    bundle = export_bundle(tmp_path / "out", tmp_path / "bundle", dtype="float16")
    assert (bundle / "manifest.json").is_file()


# What each preset and each way through the quantizer asks of the data: tokens, tiles, embeddings, ranges of the cache.
SMALL = {"group_size": 32, "vision_int8": {"cosine": 0.5}}
LEARNED = {"rounding": "learned", "learning": {"steps": 20, "tokens": 60}}
SERVED: dict[str, dict[str, Any]] = {
    **{name: combine(preset, SMALL) for name, preset in presets().items()},
    "learned": SMALL | LEARNED,
    "learned, int8 tower and cache": combine(presets()["orin"], SMALL | LEARNED),
    "5 bits": SMALL | {"automatic": {"target_bits": 5.0}},
    "limited divergence, int8 tower": combine(presets()["rtx"], SMALL | {"automatic": {"max_kl": 0.05}}),
    "w8a8": SMALL | {"decoder": "w8a8"},
    "int8 cache alone": {"decoder": "fp", "kv_cache": "int8"},
    "int8 tower alone": SMALL | {"decoder": "fp", "vision": "int8"},
}


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, DataOptions, Path]:
    """A checkpoint, its data, and what `calibrate` makes of them."""
    folder = tmp_path_factory.mktemp("calibrated")
    checkpoint, data = write_checkpoint(folder / "checkpoint"), DataOptions(write_data(folder / "data"), max_tiles=2)
    return checkpoint, data, calibrate(checkpoint, folder / "set", data, FLOAT32).folder


@pytest.mark.parametrize("fields", SERVED.values(), ids=SERVED)
def test_a_calibration_set_serves_every_recipe(
    calibrated: tuple[Path, DataOptions, Path], tmp_path: Path, fields: dict[str, Any]
) -> None:
    """To the last byte as the data itself does."""
    checkpoint, data, made = calibrated
    recipe = make_recipe(fields)
    quantize_checkpoint(checkpoint, tmp_path / "data", recipe, data=data, compute=FLOAT32)
    before = contents(made)
    quantize_checkpoint(checkpoint, tmp_path / "set", recipe, calibration=made, compute=FLOAT32)
    expected = contents(tmp_path / "data")
    assert contents(tmp_path / "set") == expected
    assert ("kv_cache_scales.npz" in expected) == (recipe.kv_cache == "int8")
    assert contents(made) == before


def test_a_calibration_set_of_another_checkpoint_is_refused(
    calibrated: tuple[Path, DataOptions, Path], tmp_path: Path
) -> None:
    other = write_checkpoint(tmp_path / "other", seed=1)
    with pytest.raises(EdgeError, match="another checkpoint"):
        quantize_checkpoint(other, tmp_path / "out", RECIPES["awq"], calibration=calibrated[2], compute=FLOAT32)


@pytest.mark.parametrize("name", ["tokens.npy", "embeddings.f32"])
def test_a_calibration_set_that_lacks_a_file_is_refused_before_a_layer_is_quantized(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    checkpoint, data = write_checkpoint(tmp_path / "checkpoint"), write_data(tmp_path / "data")
    made = calibrate(checkpoint, tmp_path / "stats", DataOptions(data, max_tiles=2), FLOAT32)
    monkeypatch.setattr(BlockStream, "run", lambda *arguments: pytest.fail("work was done"))
    whole = (made.folder / name).read_bytes()
    for content in (whole[:-4], whole[:20], b"", None):
        (made.folder / name).unlink() if content is None else (made.folder / name).write_bytes(content)
        with pytest.raises(EdgeError, match=f"{name} is missing or incomplete"):
            quantize_checkpoint(checkpoint, tmp_path / "out", RECIPES["awq"], calibration=made.folder, compute=FLOAT32)


# ---- kills ----

KILLED = """
import os, signal, sys
from pathlib import Path
from internvl_edge.calibration import DataOptions, choose_compute
from internvl_edge.calibration.work import WorkFolder
from internvl_edge.quantize import pipeline, quantize_checkpoint
from internvl_edge.quantize.layer import BlockQuantizer
from internvl_edge.recipe.recipe import Recipe
moment, checkpoint, data, out = sys.argv[1:]

def kill(*ignored, **also):
    os.kill(os.getpid(), signal.SIGKILL)

write_json, layer = WorkFolder.write_json, BlockQuantizer.layer
if moment == "layer":  # in the second layer, before its result is stored
    BlockQuantizer.layer = lambda self, n, *rest, **also: kill() if n == 1 else layer(self, n, *rest, **also)
elif moment == "commit":  # the second layer's result and hidden states are stored, the state is not
    WorkFolder.write_json = lambda self, name, values: (
        kill() if (name, values) == ("decoder.json", {"blocks": 2}) else write_json(self, name, values)
    )
elif moment == "write":  # all layers are done, the new checkpoint is half written
    pipeline.write_shards = kill
options = DataOptions(Path(data), max_tiles=2)
recipe = Recipe(group_size=32, lm_head="int4")
quantize_checkpoint(checkpoint, out, recipe, data=options, compute=choose_compute("cpu", "float32"))
"""


def test_a_killed_quantization_continues_to_the_same_bytes(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint", text="internlm2")
    data = write_data(tmp_path / "data")
    run_to_the_end(KILLED, "never", checkpoint, data, tmp_path / "whole")
    for moment in ("layer", "commit", "write"):  # each run continues the one killed before
        run_and_be_killed(KILLED, moment, checkpoint, data, tmp_path / "killed")
        assert not (tmp_path / "killed").exists()
    run_to_the_end(KILLED, "never", checkpoint, data, tmp_path / "killed")
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


# ---- refusals ----


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"decoder": "w2a16-awq"}, "2-bit"),
        ({"decoder": "w4a4"}, "w4a16-awq, w4a16-rtn, w8a16"),
        ({"vision": "int4"}, "below 8 bits"),
        ({"group_size": 48}, "32, 64, 128"),
        ({"lm_head": "int2"}, "fp, int8, int4"),
    ],
)
def test_recipes_that_do_not_work_are_refused(choices: dict[str, Any], message: str) -> None:
    with pytest.raises(EdgeError, match=message):
        Recipe(**choices)


def test_a_group_size_that_does_not_divide_names_the_layer_and_sizes_that_fit(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint")
    with pytest.raises(EdgeError, match=r"decoder.layers.0.self_attn.q_proj has 64 inputs, .* fit all layers: 32, 64$"):
        quantize(checkpoint, tmp_path / "out", Recipe("w4a16-rtn", group_size=128))
    assert not (tmp_path / "out.partial").exists()


def test_a_quantized_checkpoint_is_not_quantized_again(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint")
    quantize(checkpoint, tmp_path / "out", RECIPES["rtn"])
    with pytest.raises(EdgeError, match="quantized already"):
        quantize(tmp_path / "out", tmp_path / "again", RECIPES["rtn"])
    with pytest.raises(EdgeError, match="quantized already"):  # no recipe could use the set
        calibrate(tmp_path / "out", tmp_path / "set")


def test_a_head_that_is_the_token_table_keeps_its_floats(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint", layout="native", tie=True)
    with pytest.raises(EdgeError, match="--lm-head fp"):
        quantize(checkpoint, tmp_path / "out", Recipe("w4a16-rtn", group_size=32, lm_head="int8"))
    quantize(checkpoint, tmp_path / "out", RECIPES["rtn"])
    assert divergence(checkpoint, tmp_path / "out") < LIMITS[4]


@pytest.mark.parametrize("recipe", ["awq", "rtn", "w8a16"])
def test_an_infinite_weight_is_named_and_nothing_is_left_at_the_output(tmp_path: Path, recipe: str) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint")
    poison(checkpoint, "language_model.model.layers.1.self_attn.o_proj.weight", float("inf"))
    with pytest.raises(EdgeError, match=r"decoder.layers.1.self_attn.o_proj.weight holds NaN or infinity"):
        quantize(checkpoint, tmp_path / "out", RECIPES[recipe])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("number", "message"), [(errno.ENOSPC, "make room and repeat"), (errno.EROFS, "--output")])
def test_what_the_disk_refuses_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, message: str
) -> None:
    def refuse(*ignored: Any, **also: Any) -> None:
        raise OSError(number, "refused")

    checkpoint, data = write_checkpoint(tmp_path / "checkpoint"), write_data(tmp_path / "data")
    with monkeypatch.context() as patched:
        patched.setattr(pipeline, "write_shards", refuse)
        with pytest.raises(EdgeError, match=message):
            quantize(checkpoint, tmp_path / "out", RECIPES["awq"], data)
    quantize(checkpoint, tmp_path / "out", RECIPES["awq"], data)  # continues
    Checkpoint(tmp_path / "out")


# ---- command line ----


def test_the_commands_print_json(tmp_path: Path) -> None:
    checkpoint, data = write_checkpoint(tmp_path / "checkpoint"), write_data(tmp_path / "data")
    common = ["--dtype", "float32", "--json"]
    stats = str(tmp_path / "stats")
    arguments = ["calibrate", str(checkpoint), "--data", str(data), "-o", stats, "--max-tiles", "2", *common]
    done = CliRunner().invoke(cli, arguments, catch_exceptions=False)
    facts = json.loads(done.stdout)
    assert (facts["samples"], facts["broken"]) == (6, [])
    assert 0 < facts["image_tokens"] < facts["tokens"]
    out = str(tmp_path / "out")
    arguments = ["quantize", str(checkpoint), "--calibration", stats, "--group-size", "32", "-o", out, *common]
    facts = json.loads(CliRunner().invoke(cli, arguments, catch_exceptions=False).stdout)
    assert facts["recipe"]["decoder"] == "w4a16-awq"
    assert facts["samples"] == 6
    assert len(facts["relative_output_errors"]) == 14
    Checkpoint(tmp_path / "out")


@pytest.mark.parametrize(
    "arguments",
    [
        ["quantize", "CHECKPOINT", "-o", "OUT", "--scheme", "w2"],
        ["quantize", "CHECKPOINT", "-o", "OUT", "--data", "absent.jsonl"],
        ["quantize", "CHECKPOINT", "-o", "OUT", "--device", "cuda:9"],
        ["calibrate", "CHECKPOINT", "-o", "CHECKPOINT"],
    ],
)
def test_mistakes_are_one_line(tmp_path: Path, arguments: list[str]) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint")
    places = {"CHECKPOINT": str(checkpoint), "OUT": str(tmp_path / "out")}
    done = CliRunner().invoke(cli, [places.get(argument, argument) for argument in arguments])
    assert isinstance(done.exception, EdgeError)
    assert "\n" not in str(done.exception)
