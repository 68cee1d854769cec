"""Options of `internvl-edge quantize` that choose a recipe or replace single fields of one; mistakes are one line."""

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
    ("layout", "options", "said"),
    [
        ("remote", [], ["vLLM loads it: vllm serve {out} --trust-remote-code", "LMDeploy loads it (not tried; "]),
        (
            "native",
            [],
            ["vLLM loads it: vllm serve {out}\n", "LMDeploy does not load it: LMDeploy's TurboMind reads"],
        ),
        ("remote", ["--layer", "*.gate_proj=w8a16"], ["vLLM does not load it: linears that vLLM joins"]),
        ("remote", ["--lm-head", "int8"], ["vLLM loads it (not tried; not on a CPU: 1 linear has 8-bit weights"]),
    ],
)
def test_the_end_says_which_programs_load_the_result(
    tmp_path: Path, layout: str, options: list[str], said: list[str]
) -> None:
    checkpoint, data = write_checkpoint(tmp_path / "checkpoint", layout=layout), write_data(tmp_path / "data")
    out = tmp_path / "out"
    arguments = [str(checkpoint), "--data", str(data), "--max-tiles", "2", "-o", str(out), "--dtype", "float32"]
    recipe = ["--recipe", "vllm", "--group-size", "32", *options]
    printed = CliRunner().invoke(cli, ["quantize", *arguments, *recipe], catch_exceptions=False).stdout
    for text in said:
        assert text.format(out=out) in printed
    facts = json.loads(quantize(*arguments, *recipe, "--force", "--restart").stdout)
    assert [(program["name"], not program["obstacles"]) for program in facts["programs"]] == [
        (name, f"{name} loads it" in printed) for name in ("vLLM", "LMDeploy")
    ]


def test_a_set_and_its_data_are_used_as_they_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is skipped is counted, the next command is whole, and options that a set has decided are refused."""
    checkpoint, data = write_checkpoint(tmp_path / "checkpoint"), write_data(tmp_path / "data")
    data.write_text(data.read_text(encoding="utf-8") + "\n{}\n{}", encoding="utf-8")
    small = ["--data", str(data), "--max-tiles", "2", "--dtype", "float32"]
    monkeypatch.setattr("internvl_edge.cli.calibrate.resolve_checkpoint", lambda name, revision: checkpoint)
    arguments = ["calibrate", "me/model", "--revision", "v2", *small, "-o", str(tmp_path / "set")]
    made = CliRunner().invoke(cli, arguments, catch_exceptions=False)
    assert f"internvl-edge quantize me/model --revision v2 --calibration {tmp_path / 'set'} -o OUT" in made.stdout
    assert "2 broken items skipped" in made.stdout
    out = [str(checkpoint), "-o", str(tmp_path / "out"), "--group-size", "32"]
    for option, value in (("--data", str(data)), ("--samples", "3"), ("--max-tiles", "2"), ("--seed", "0")):
        refused = quantize(*out, "--calibration", str(tmp_path / "set"), option, value)
        assert f"{option} and --calibration cannot be combined" in str(refused.exception)
    done = CliRunner().invoke(cli, ["quantize", *out, *small], catch_exceptions=False)
    assert "2 broken items skipped" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--layer", "layers.0"], "is not PATTERN=SCHEME"),
        (["--target-bits", "4.5", "--max-kl", "0.1"], "one of the two"),
        (["--scheme", "w8a16", "--no-compensate", "--data", "pictures"], "nothing in this recipe looks at data"),
        (["--recipe", ""], "recipe '' is not known; presets: "),
        (["--recipe", "jetson"], "presets: cpu, rtx, orin, thor, best, vllm"),
        (
            ["--vision", "int8", "--group-size", "32"],
            "--group-size is for 4-bit weights, which this recipe does not have",
        ),
        (["--scheme", "w8a16", "--zero-points"], "--zero-points is for 4-bit weights"),
        (["--scheme", "fp", "--lm-head", "int8", "--symmetric"], "--symmetric is for 4-bit weights"),
        (["--scheme", "w8a8", "--symmetric", "--negative-scales", "--max-kl", "0"], "--symmetric is for 4-bit"),
        (["--scheme", "w4a16-rtn", "--compensate"], "--compensate is for weights of w4a16-awq or w8a16"),
        (["--group-size", "32", "--calibrator", "mse"], "--calibrator is for int8 inputs"),
        (["--group-size", "32", "--smooth"], "--smooth is for int8 inputs"),
        (["--scheme", "w8a8", "--vision-cosine", "0"], "--vision-cosine is for an int8 vision tower"),
        (["--recipe", "thor", "--vision-float", "projector.*"], "--vision-float is for an int8 vision tower"),
        (["--recipe", "cpu", "--group-size", "32", "--layer", "*.gate=w8a16"], "near: "),
    ],
)
def test_mistakes_are_one_line(tmp_path: Path, arguments: list[str], message: str) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint")
    done = quantize(str(checkpoint), "-o", str(tmp_path / "out"), *arguments)
    assert isinstance(done.exception, EdgeError)
    assert message in str(done.exception)
    assert "\n" not in str(done.exception)


@pytest.mark.parametrize("option", ["--data", "--calibration"])
def test_an_empty_path_is_not_the_present_folder(tmp_path: Path, option: str) -> None:
    """It is what a script gives whose variable was not set."""
    done = quantize(str(tmp_path), "-o", str(tmp_path / "out"), option, "")
    assert done.exit_code == 2
    assert f"Invalid value for '{option}': it is empty, expected a path" in done.stderr


def test_zero_points_replace_the_negative_scales_of_a_recipe(tmp_path: Path) -> None:
    checkpoint, recipe = write_checkpoint(tmp_path / "checkpoint"), tmp_path / "mine.toml"
    recipe.write_text("decoder = 'w4a16-rtn'\ngroup_size = 32\nsymmetric = true\nnegative_scales = true\n")
    for option, negative in {"--symmetric": True, "--positive-scales": False, "--zero-points": False}.items():
        done = quantize(str(checkpoint), "--recipe", str(recipe), option, "-o", str(tmp_path / option))
        assert done.exit_code == 0, done.exception
        assert json.loads(done.stdout)["recipe"]["negative_scales"] == negative
        linear = Checkpoint(tmp_path / option).linear("decoder.layers.0.mlp.up_proj")
        assert linear is not None
        assert bool((linear.scale < 0).any()) == negative


def test_options_that_turn_off_what_is_not_there_are_taken(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint")
    off = ("--no-compensate", "--no-smooth", "--positive-scales")
    done = quantize(str(checkpoint), "-o", str(tmp_path / "out"), "--scheme", "w4a16-rtn", "--group-size", "32", *off)
    assert done.exit_code == 0, done.exception
