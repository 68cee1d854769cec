"""Recipes: presets and files, single options on top, patterns of exceptions, and what is refused in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from helpers.calibration_data import write_data
from helpers.tiny import write_checkpoint
from internvl_edge.base.errors import EdgeError
from internvl_edge.checkpoint.reader import Checkpoint
from internvl_edge.cli import cli
from internvl_edge.quantize import check_recipe
from internvl_edge.quantize.plan import decoder_linears, plan_decoder
from internvl_edge.recipe.files import combine, make_recipe, presets, read_recipe
from internvl_edge.recipe.recipe import Automatic, DecoderInt8, Recipe


def test_presets_are_recipes_that_differ_where_devices_do() -> None:
    made = {name: make_recipe(values) for name, values in presets().items()}
    assert set(made) == {"cpu", "rtx", "orin", "thor"}
    assert {name for name, recipe in made.items() if not recipe.symmetric} == {"cpu"}
    assert {name for name, recipe in made.items() if recipe.kv_cache == "int8"} == {"orin"}
    assert all(recipe.group_size in (64, 128) for recipe in made.values())  # TensorRT's sizes
    assert all(recipe.lm_head == "int8" for recipe in made.values())
    orin = made["orin"]
    assert (orin.decoder, orin.vision, orin.kv_cache) == ("w4a16-awq", "int8", "int8")


def test_a_file_starts_from_a_preset_and_says_the_rest(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(
        'base = "orin"\ngroup_size = 64\n[layers]\n"layers.0.*" = "w8a16"\n"*.down_proj" = "w4a16-awq-g32"\n'
        "[vision_int8]\ncosine = 0.9\n"
    )
    recipe = make_recipe(read_recipe(str(path)))
    assert recipe.layers == (("layers.0.*", "w8a16"), ("*.down_proj", "w4a16-awq-g32"))
    assert (recipe.group_size, recipe.lm_head, recipe.vision_int8.cosine) == (64, "int8", 0.9)
    again = make_recipe(combine(read_recipe(str(path)), {"vision_int8": {"smoothing": False}}))
    assert (again.vision_int8.cosine, again.vision_int8.smoothing) == (0.9, False)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("group_size = 64\n[", "not valid TOML"),
        ('base = "jetson"', "base is 'jetson', expected one of cpu, rtx, orin, thor"),
        ("groupsize = 64", "groupsize is not known; did you mean group_size?"),
        ('group_size = "64"', "group_size is '64', expected a number"),
        ("symmetric = 1", "symmetric is 1, expected true or false"),
        ("lm_head = true", "lm_head is True, expected text"),
        ("[vision_int8]\nkeep = [1]", r"vision_int8: keep is \[1\], expected a list of text"),
        ("[automatic]\ntarget = 4.5", "automatic: target is not known; did you mean target_bits?"),
        ("layers = 3", "layers is no table"),
        ("vision_int8 = 3", "vision_int8 is 3, expected a table"),
    ],
)
def test_files_that_are_no_recipe_are_refused_by_name(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(EdgeError, match=message) as error:
        read_recipe(str(path))
    assert str(path) in str(error.value)


def test_names_that_are_neither_preset_nor_file_get_near_ones(tmp_path: Path) -> None:
    with pytest.raises(EdgeError, match="'orni' is not known; did you mean orin"):
        read_recipe("orni")
    with pytest.raises(EdgeError, match="cannot be read"):
        read_recipe(str(tmp_path / "absent.toml"))


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"kv_cache": "int4"}, "kv_cache 'int4' is not one of fp, int8"),
        ({"layers": (("*", "w3a16"),)}, "scheme 'w3a16' is not supported"),
        ({"layers": (("*", "w4a16-awq-g48"),)}, "group size 48 is not one of 32, 64, 128"),
        ({"layers": (("*", "w8a16-g64"),)}, "only w4a16-awq and w4a16-rtn have groups; write w8a16"),
        ({"decoder": "fp", "automatic": Automatic(target_bits=5)}, "give a decoder scheme below fp"),
        ({"decoder": "w8a8", "automatic": Automatic(target_bits=9)}, "give max_kl"),
        ({"decoder_int8": DecoderInt8(max_kl=0), "kv_cache": "int2"}, "kv_cache 'int2'"),
        ({"decoder": "fp", "layers": (("*", "fp"),)}, "quantize at least one"),
    ],
)
def test_choices_that_cannot_be_are_refused(choices: dict[str, Any], message: str) -> None:
    with pytest.raises(EdgeError, match=message):
        Recipe(**choices)


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({}, "one of the two"),
        ({"target_bits": 5, "max_kl": 0.1}, "one of the two"),
        ({"target_bits": 3.9}, "more than 4"),
        ({"max_kl": 0}, "above 0"),
    ],
)
def test_limits_that_cannot_be_are_refused(limits: dict[str, Any], message: str) -> None:
    with pytest.raises(EdgeError, match=message):
        Automatic(**limits)


# ---- patterns ----


def planned(checkpoint: Checkpoint, *layers: tuple[str, str]) -> dict[str, str]:
    plan = plan_decoder(checkpoint, Recipe(group_size=32, layers=layers))
    return {name.removeprefix("decoder.layers."): str(choice.precision) for name, choice in plan.items()}


def test_the_last_pattern_that_matches_holds(tmp_path: Path) -> None:
    checkpoint = Checkpoint(write_checkpoint(tmp_path / "checkpoint"))
    found = planned(
        checkpoint, ("layers.0.*", "w8a16"), ("*.down_proj", "fp"), ("decoder.layers.0.mlp.up_proj", "w8a8")
    )
    assert len(found) == len(decoder_linears(checkpoint)) == 14
    assert found["0.self_attn.q_proj"] == found["0.mlp.gate_proj"] == "w8a16"
    assert found["0.mlp.down_proj"] == found["1.mlp.down_proj"] == "fp"
    assert found["0.mlp.up_proj"] == "w8a8"
    assert found["1.mlp.up_proj"] == "w4a16-awq-g32"


def test_a_pattern_that_is_given_again_counts_where_it_was_given_last(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text('[layers]\n"layers.0.*" = "w8a16"\n"*.down_proj" = "fp"\n', encoding="utf-8")
    again = combine(read_recipe(str(file)), {"layers": {"layers.0.*": "w4a16-awq"}})
    assert list(again["layers"].items()) == [("*.down_proj", "fp"), ("layers.0.*", "w4a16-awq")]


@pytest.mark.parametrize(
    ("pattern", "precision", "message"),
    [
        ("*.downproj", "w8a16", r"'\*.downproj' matches no linear of this model; near: \*.down_proj"),
        ("layers.7.*", "w8a16", r"matches no linear of this model; near: layers\.[01]"),
        ("lm_head", "w8a16", "the head has a field of its own, lm_head"),
        ("*.fc2", "w8a16", r"matches vision.layers.0.mlp.fc2; linears of tower and projector can only be kept as fp"),
    ],
)
def test_patterns_that_match_nothing_or_too_much_are_refused(
    tmp_path: Path, pattern: str, precision: str, message: str
) -> None:
    checkpoint = Checkpoint(write_checkpoint(tmp_path / "checkpoint"))
    with pytest.raises(EdgeError, match=message):
        check_recipe(checkpoint, Recipe(group_size=32, layers=((pattern, precision),)))


def test_parts_of_one_stored_tensor_stay_together(tmp_path: Path) -> None:
    split = Recipe(group_size=32, layers=(("*.v_proj", "w8a16"),))
    check_recipe(Checkpoint(write_checkpoint(tmp_path / "qwen2")), split)
    with pytest.raises(EdgeError, match=r"q_proj would be w4a16-awq-g32 and .*v_proj w8a16, .* one tensor"):
        check_recipe(Checkpoint(write_checkpoint(tmp_path / "internlm2", text="internlm2")), split)


def test_group_sizes_of_exceptions_and_candidates_must_divide(tmp_path: Path) -> None:
    checkpoint = Checkpoint(write_checkpoint(tmp_path / "checkpoint"))
    with pytest.raises(EdgeError, match="64 inputs, which groups of 128 do not divide"):
        check_recipe(checkpoint, Recipe("w8a16", layers=(("layers.0.*", "w4a16-awq-g128"),)))
    among = Automatic(target_bits=6, among=("w4a16-awq-g128", "w8a16"))
    with pytest.raises(EdgeError, match="groups of 128"):
        check_recipe(checkpoint, Recipe(group_size=32, automatic=among))


def test_int8_inputs_are_limited_unless_told_otherwise() -> None:
    assert Recipe("w8a8").choice == Automatic(max_kl=0.02)
    assert Recipe("w8a8", decoder_int8=DecoderInt8(max_kl=0)).choice is None
    assert Recipe("w8a8", automatic=Automatic(max_kl=0.1)).choice == Automatic(max_kl=0.1)
    assert Recipe("w8a16").choice is None


# ---- command line ----


def quantize(*arguments: str) -> Any:
    return CliRunner().invoke(cli, ["quantize", *arguments, "--dtype", "float32", "--json"])


def test_options_replace_single_fields_of_a_recipe(tmp_path: Path) -> None:
    checkpoint, data = write_checkpoint(tmp_path / "checkpoint"), write_data(tmp_path / "data")
    common = [str(checkpoint), "--data", str(data), "--max-tiles", "2", "-o", str(tmp_path / "out"), "--recipe", "orin"]
    refused = quantize(*common)
    assert "groups of 128 do not divide; sizes that fit all layers: 32, 64" in str(refused.exception)
    arguments = [*common, "--group-size", "32", "--vision", "fp", "--layer", "*.down_proj=w8a16", "--no-compensate"]
    done = quantize(*arguments)
    assert done.exit_code == 0, done.exception
    recipe = json.loads(done.stdout)["recipe"]
    assert (recipe["group_size"], recipe["vision"], recipe["error_compensation"]) == (32, "fp", False)
    assert (recipe["symmetric"], recipe["lm_head"], recipe["kv_cache"]) == (True, "int8", "int8")
    schemes = Checkpoint(tmp_path / "out").schemes
    assert {schemes[name].bits for name in schemes if name.endswith("down_proj")} == {8}
    assert {schemes[name].bits for name in schemes if name.endswith("q_proj")} == {4}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--layer", "layers.0"], "is not PATTERN=SCHEME"),
        (["--target-bits", "4.5", "--max-kl", "0.1"], "one of the two"),
        (["--scheme", "w8a16", "--no-compensate", "--data", "pictures"], "nothing in this recipe looks at data"),
        (["--recipe", "jetson"], "presets: cpu, rtx, orin, thor"),
        (["--recipe", "cpu", "--group-size", "32", "--layer", "*.gate=w8a16"], "near: "),
    ],
)
def test_mistakes_are_one_line(tmp_path: Path, arguments: list[str], message: str) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint")
    done = quantize(str(checkpoint), "-o", str(tmp_path / "out"), *arguments)
    assert isinstance(done.exception, EdgeError)
    assert message in str(done.exception)
    assert "\n" not in str(done.exception)
