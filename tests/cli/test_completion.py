"""Shells complete names and files, mistyped commands are pointed to the right one, commands to copy are quoted."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from helpers.commands import PROGRAM, assert_one_line, internvl_edge
from internvl_edge.base.text import command_line
from internvl_edge.planning.devices import Devices


def completed(*words: str) -> list[tuple[str, str]]:
    """(kind, value) of what bash is offered for the last word."""
    environment = {
        **os.environ,
        "_INTERNVL_EDGE_COMPLETE": "bash_complete",
        "COMP_WORDS": command_line(*words[:-1]) + f" {words[-1]}",
        "COMP_CWORD": str(len(words)),
    }
    result = internvl_edge(environment=environment)
    assert result.returncode == 0, result.stderr
    pairs = [line.partition(",") for line in result.stdout.splitlines()]
    return [(kind, value) for kind, _, value in pairs]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("quan",), ["quantize"]),
        (("quantize", "x", "--recipe", ""), ["cpu", "rtx", "orin", "thor", "best", "vllm"]),
        (("quantize", "x", "--recipe", "or"), ["orin"]),
        (("quantize", "x", "--scheme", "w8"), ["w8a16", "w8a8"]),
        (("quantize", "x", "--device", ""), ["auto", "cpu", "cuda"]),
        (("plan", "x", "--device", "rtx-50"), ["rtx-5080", "rtx-5090"]),
        (("plan", "x", "--device", "or"), ["orin", *(name for name in Devices().all if name.startswith("orin"))]),
        (("build", "x", "--device", "thor"), ["thor-t4000", "thor"]),
        (("run", "x", "--device", "ten"), ["tensorrt"]),
        (("evaluate", "x", "--fail-if", "kl_"), ["kl_p99", "kl_max"]),
        (("run", "x", "--plain"), ["--plain-text"]),
    ],
)
def test_names_are_completed(words: tuple[str, ...], expected: list[str]) -> None:
    assert [value for kind, value in completed(*words) if kind == "plain"] == expected


@pytest.mark.parametrize(
    "words",
    [
        ("run", "b", "--image", "pho"),
        ("inspect", "pho"),
        ("export", "pho"),
        ("evaluate", "b", "--reference", "pho"),
        ("quantize", "x", "--recipe", "my-"),
        ("quantize", "x", "--data", "pho"),
    ],
)
def test_files_are_left_to_the_shell(words: tuple[str, ...]) -> None:
    assert completed(*words) == [("file", words[-1])]


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
def test_the_line_of_the_readme_sets_bash_up(tmp_path: Path) -> None:
    program = tmp_path / "internvl-edge"
    program.write_text(f'#!/bin/sh\nexec {command_line(*PROGRAM).removeprefix("internvl-edge ")} "$@"\n')
    program.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    line = 'eval "$(_INTERNVL_EDGE_COMPLETE=bash_source internvl-edge)"; complete -p internvl-edge'
    result = subprocess.run(["bash", "-c", line], env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.rstrip().endswith("internvl-edge")


@pytest.mark.parametrize(
    ("typed", "meant"), [("quanti" + "se", "quantize"), ("runn", "run"), ("eval", "evaluate"), ("benchmark", "bench")]
)
def test_a_mistyped_command_is_pointed_to_the_right_one(typed: str, meant: str) -> None:
    assert_one_line(internvl_edge(typed, "x"), f"there is no command '{typed}'", f"did you mean {meant}")


def test_a_command_like_no_other_lists_them() -> None:
    assert_one_line(internvl_edge("xyzzy"), "commands are inspect, calibrate, quantize, export")
    assert_one_line(internvl_edge("x" * 5000), "there is no command")


def test_commands_to_copy_are_quoted(checkpoint: Path, tmp_path: Path) -> None:
    assert command_line("run", "a b", "it's") == """internvl-edge run 'a b' 'it'"'"'s'"""
    assert command_line("run", Path("-odd")) == "internvl-edge run ./-odd"
    out = tmp_path / "dir with späces"
    result = internvl_edge("export", checkpoint, "-o", out)
    hints = [line for line in result.stdout.splitlines() if line.startswith("Try: ")]
    assert hints == [f"Try: internvl-edge run '{out}' --image PHOTO.jpg 'What is this?'"]
