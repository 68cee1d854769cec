"""Recipes: presets and files, single choices on top, and what is refused in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from internvl_edge.base.errors import EdgeError
from internvl_edge.recipe.files import combine, make_recipe, presets, read_recipe
from internvl_edge.recipe.recipe import Automatic, DecoderInt8, LearnedRounding, Recipe, VisionInt8


def test_presets_are_recipes_that_differ_where_devices_do() -> None:
    made = {name: make_recipe(values) for name, values in presets().items()}
    assert set(made) == {"cpu", "rtx", "orin", "thor", "best", "vllm"}
    assert {name for name, recipe in made.items() if not recipe.symmetric} == {"cpu", "best"}
    assert {name for name, recipe in made.items() if recipe.rounding == "learned"} == {"best"}
    assert {name for name, recipe in made.items() if recipe.kv_cache == "int8"} == {"orin"}
    assert all(recipe.group_size in (64, 128) for recipe in made.values())  # TensorRT's sizes
    assert {name for name, recipe in made.items() if recipe.lm_head != "int8"} == {"vllm"}
    served = make_recipe(combine(presets()["vllm"], {"vision": "int8"}))
    assert (served.lm_head, served.vision_int8.keep) == ("fp", ("projector.*",))
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
        ('base = "jetson"', "base is 'jetson', expected one of cpu, rtx, orin, thor, best, vllm"),
        ("groupsize = 64", "groupsize is not known; did you mean group_size?"),
        ('group_size = "64"', "group_size is '64', expected a number"),
        ("symmetric = 1", "symmetric is 1, expected true or false"),
        ("lm_head = true", "lm_head is True, expected text"),
        ("[vision_int8]\nkeep = [1]", r"vision_int8: keep is \[1\], expected a list of text"),
        ("[automatic]\ntarget = 4.5", "automatic: target is not known; did you mean target_bits?"),
        ("layers = 3", "layers is no table"),
        ("vision_int8 = 3", "vision_int8 is 3, expected a table"),
        ("base = []", r"base is \[\], expected one of"),
        ("group_size = 64.0", "group_size is 64.0, expected a number without a fraction"),
        ("[vision_int8]\ncosine = nan", "vision_int8.cosine is nan, expected a finite number"),
        ("[decoder_int8]\nmax_kl = inf", "decoder_int8.max_kl is inf, expected a finite number"),
        ("[automatic]\nmax_kl = " + "9" * 400, "automatic.max_kl is an integer beyond all limits"),
        ("group_size = " + "9" * 5000, "not valid TOML"),
        ("layers = " + "[" * 9000, "not valid TOML"),
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
        ({"automatic": Automatic(max_kl=0.1, among=("fp",))}, "among fp alone; give at least one other"),
        ({"decoder": "w8a8", "automatic": Automatic(target_bits=16, among=("fp", "fp"))}, "among fp alone"),
        ({"decoder_int8": DecoderInt8(max_kl=0), "kv_cache": "int2"}, "kv_cache 'int2'"),
        ({"decoder": "fp", "layers": (("*", "fp"),)}, "quantize at least one"),
        ({"negative_scales": True}, "negative scales are for weights without zero points; use symmetric or positive"),
    ],
)
def test_choices_that_cannot_be_are_refused(choices: dict[str, Any], message: str) -> None:
    with pytest.raises(EdgeError, match=message):
        Recipe(**choices)


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (Recipe, {"decoder": None}, "decoder is None, expected str"),
        (Recipe, {"group_size": "64"}, "group_size is '64', expected int"),
        (Recipe, {"group_size": 64.0}, "group_size is 64.0, expected int"),
        (Recipe, {"symmetric": "no"}, "symmetric is 'no', expected bool"),
        (Recipe, {"layers": {"layers.0.*": "fp"}}, r"layers is .*, expected tuple\[tuple\[str, str\], \.\.\.\]"),
        (Recipe, {"layers": (("layers.0.*", 8),)}, "layers is"),
        (Recipe, {"layers": ("layers.0.*",)}, "layers is"),
        (Recipe, {"automatic": {"target_bits": 5}}, "automatic is .*, expected Automatic | None"),
        (Recipe, {"learning": None}, "learning is None, expected LearnedRounding"),
        (Automatic, {"target_bits": "5"}, "target_bits is '5', expected float | None"),
        (Automatic, {"max_kl": 0.1, "among": "w8a16"}, "among is 'w8a16', expected tuple"),
        (DecoderInt8, {"max_kl": True}, "max_kl is True, expected float"),
        (VisionInt8, {"keep": "projector.*"}, r"keep is 'projector\.\*', expected tuple"),
        (LearnedRounding, {"steps": 1.5}, "steps is 1.5, expected int"),
    ],
)
def test_values_of_another_type_are_refused(kind: Any, values: dict[str, Any], message: str) -> None:
    with pytest.raises(EdgeError, match=message):
        kind(**values)


def test_lists_and_whole_numbers_are_taken_as_they_are_meant() -> None:
    assert Recipe(layers=[("layers.0.*", "w8a16")]).layers  # type: ignore[arg-type]
    assert Automatic(target_bits=5).target_bits == 5


def test_a_file_written_on_windows_is_read(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_bytes("\ufeff".encode() + b"group_size = 64\r\nsymmetric = true\r\n")
    assert read_recipe(str(tmp_path / "mine.toml")) == {"group_size": 64, "symmetric": True}


@pytest.mark.parametrize("name", [".", "quantization.json"])
def test_a_quantized_checkpoint_is_no_recipe_but_has_one(tmp_path: Path, name: str) -> None:
    (tmp_path / "quantization.json").write_text("{}")
    with pytest.raises(EdgeError, match=r"is no recipe in TOML; README\.md of a quantized checkpoint holds the one"):
        read_recipe(str(tmp_path / name))


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({}, "one of the two"),
        ({"target_bits": 5, "max_kl": 0.1}, "one of the two"),
        ({"target_bits": 3.9}, "more than 4"),
        ({"max_kl": 0}, "above 0"),
        ({"max_kl": float("inf")}, "above 0"),
        ({"max_kl": float("nan")}, "above 0"),
        ({"target_bits": float("nan")}, "more than 4"),
    ],
)
def test_limits_that_cannot_be_are_refused(limits: dict[str, Any], message: str) -> None:
    with pytest.raises(EdgeError, match=message):
        Automatic(**limits)


def test_a_pattern_that_is_given_again_counts_where_it_was_given_last(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text('[layers]\n"layers.0.*" = "w8a16"\n"*.down_proj" = "fp"\n', encoding="utf-8")
    again = combine(read_recipe(str(file)), {"layers": {"layers.0.*": "w4a16-awq"}})
    assert list(again["layers"].items()) == [("*.down_proj", "fp"), ("layers.0.*", "w4a16-awq")]


def test_int8_inputs_are_limited_unless_told_otherwise() -> None:
    assert Recipe("w8a8").choice == Automatic(max_kl=0.02)
    assert Recipe("w8a8", decoder_int8=DecoderInt8(max_kl=0)).choice is None
    assert Recipe("w8a8", automatic=Automatic(max_kl=0.1)).choice == Automatic(max_kl=0.1)
    assert Recipe("w8a16").choice is None


def test_absurd_group_sizes_and_files_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(EdgeError, match="is not supported"):
        Recipe(layers=(("*", "w4a16-awq-g" + "9" * 5000),))
    path = tmp_path / "mine.toml"
    path.write_bytes(b"\xff")
    with pytest.raises(EdgeError, match="is not UTF-8"):
        read_recipe(str(path))
    with path.open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(EdgeError, match="more than 8 MiB"):
        read_recipe(str(path))
