"""Commands that are stopped, started twice, pointed at what exists, or not listened to: one line, nothing is lost."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from helpers.calibration_data import write_data
from helpers.commands import PROGRAM, Started, assert_one_line, internvl_edge, start_code
from helpers.killed_runs import contents
from helpers.tiny import write_checkpoint
from internvl_edge.checkpoint.record import read_record

# Waits for a line, having said so, where it would write the file argv[1] of its state or output.
WAITING = """
import sys
from internvl_edge.base import files
from internvl_edge.cli import main
name = sys.argv.pop(1)
replacing = files.replacing

def slow(path, **options):
    if path.name == name:
        print("half way", flush=True)
        sys.stdin.readline()
    return replacing(path, **options)

files.replacing = slow
main()
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


@contextmanager
def half_way(code: str, *arguments: object) -> Iterator[Started]:
    """A command that waits for a line half way."""
    with start_code(code, *arguments) as started:
        assert started.stdout.readline() == "half way\n", started.communicate()
        yield started


# What each command writes on its way.
STATE = {"calibrate": "embeddings.f32.sha256", "quantize": "decoder.json", "export": "manifest.json"}


def command_line(name: str, checkpoint: Path, data: Path, out: Path) -> tuple[object, ...]:
    recipe = ("--group-size", 32) if name == "quantize" else ()
    return (name, checkpoint, "-o", out, "--data", data, "--max-tiles", 1, *recipe)


# ---- stopped ----


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("name", ["calibrate", "quantize"])
def test_a_stopped_command_says_that_it_continues(
    checkpoint: Path, data: Path, tmp_path: Path, name: str, number: signal.Signals
) -> None:
    line = command_line(name, checkpoint, data, tmp_path / "out")
    with half_way(WAITING, STATE[name], *line) as started:
        os.kill(started.process.pid, number)
        status, _, error = started.communicate()
    assert status == 130
    assert error.splitlines()[-1] == "interrupted; repeat the command to continue"
    assert os.listdir(tmp_path) == ["out.partial"]
    assert internvl_edge(*line).returncode == 0
    assert os.listdir(tmp_path) == ["out"]


def test_a_quantize_that_is_stopped_at_its_report_says_that_the_checkpoint_is_complete(
    checkpoint: Path, data: Path, tmp_path: Path
) -> None:
    line = command_line("quantize", checkpoint, data, tmp_path / "out")
    with half_way(WAITING, "report.json", *line) as started:
        os.kill(started.process.pid, signal.SIGTERM)
        status, _, error = started.communicate()
    assert status == 130
    assert error.splitlines()[-1] == f"interrupted; {tmp_path / 'out'} is complete, only its report is not"
    assert os.listdir(tmp_path) == ["out"]
    assert read_record(tmp_path / "out") is not None


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_export_is_one_line_and_leaves_nothing(
    checkpoint: Path, tmp_path: Path, number: signal.Signals
) -> None:
    with half_way(WAITING, "manifest.json", "export", checkpoint, "-o", tmp_path / "out") as started:
        os.kill(started.process.pid, number)
        status, _, error = started.communicate()
    assert status == 130
    assert error.splitlines()[-1] == "interrupted"
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("content", ["", "not JSON\n", '{"images": ["absent.png"], "prompt": "x"}\n' * 9])
@pytest.mark.parametrize("name", ["calibrate", "quantize"])
def test_data_that_fail_leave_nothing(checkpoint: Path, tmp_path: Path, name: str, content: str) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text(content)
    assert internvl_edge(*command_line(name, checkpoint, data, tmp_path / "out")).returncode == 2
    assert os.listdir(tmp_path) == ["data.jsonl"]


# ---- started twice ----


@pytest.mark.parametrize("name", ["calibrate", "quantize", "export"])
def test_a_second_process_is_refused_and_the_first_one_finishes(
    checkpoint: Path, data: Path, tmp_path: Path, name: str
) -> None:
    line = command_line(name, checkpoint, data, tmp_path / "out")
    line = line[:4] if name == "export" else line
    with half_way(WAITING, STATE[name], *line) as started:
        pid, second = started.process.pid, internvl_edge(*line)
        assert_one_line(second, f"(pid {pid}) writes {tmp_path}/out; wait for it or choose another --output")
        assert started.communicate("\n" * 9)[0] == 0
    assert os.listdir(tmp_path) == ["out"]
    whole = command_line(name, checkpoint, data, tmp_path / "whole")
    assert internvl_edge(*(whole[:4] if name == "export" else whole)).returncode == 0
    ours, theirs = contents(tmp_path / "out"), contents(tmp_path / "whole")
    names = ours.keys() - {"report.json", "report.html"}
    assert {name: ours[name] for name in names} == {name: theirs[name] for name in names}


# ---- pointed at what exists ----


@pytest.mark.parametrize("name", ["calibrate", "quantize"])
def test_force_replaces_what_the_same_command_made_and_nothing_else(
    checkpoint: Path, data: Path, tmp_path: Path, name: str
) -> None:
    out = tmp_path / "out"
    line = command_line(name, checkpoint, data, out)
    assert internvl_edge(*line).returncode == 0
    before, folder = {path.name: path.stat().st_ino for path in out.iterdir()}, out.stat().st_ino
    assert_one_line(internvl_edge(*line), f"{out} exists; choose another --output or pass --force to replace it")
    (out / "notes.txt").write_text("years of work")
    assert_one_line(
        internvl_edge(*line, "--force"), f"{out}/notes.txt is not part of it; remove that file or choose another --out"
    )
    assert {path.name: path.stat().st_ino for path in out.iterdir() if path.name != "notes.txt"} == before
    (out / "notes.txt").unlink()
    assert internvl_edge(*line, "--force").returncode == 0
    assert {path.name for path in out.iterdir()} == before.keys()
    assert out.stat().st_ino != folder
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("name", ["calibrate", "quantize"])
def test_force_keeps_folders_that_only_look_like_ours(checkpoint: Path, data: Path, tmp_path: Path, name: str) -> None:
    out = tmp_path / "out"
    line = command_line(name, checkpoint, data, out)
    assert internvl_edge(*line).returncode == 0
    weights = out / ("model.safetensors" if name == "quantize" else "embeddings.f32")
    with weights.open("ab") as file:
        file.write(b"more")
    before = contents(out)
    assert_one_line(internvl_edge(*line, "--force"), "--force replaces", f"remove {out} or choose another --output")
    assert_one_line(internvl_edge(*command_line(name, checkpoint, data, checkpoint), "--force"), "--force replaces")
    assert contents(out) == before


def test_what_a_killed_replacement_moved_aside_is_put_back_by_the_next_command(
    checkpoint: Path, data: Path, tmp_path: Path
) -> None:
    made = tmp_path / "made"
    shutil.copytree(checkpoint, made / "checkpoint")
    assert internvl_edge("export", checkpoint, "-o", made / "bundle").returncode == 0
    assert internvl_edge(*command_line("calibrate", checkpoint, data, made / "set")).returncode == 0
    for name, line in (
        ("bundle", ("inspect", made / "bundle")),
        ("bundle", ("plan", made / "bundle")),
        ("bundle", ("run", made / "bundle", "x", "--max-new-tokens", 1)),
        ("checkpoint", ("inspect", made / "checkpoint")),
        ("set", ("quantize", checkpoint, "--calibration", made / "set", "-o", tmp_path / "q", "--group-size", 32)),
        ("bundle", ("export", checkpoint, "-o", made / "bundle", "--force")),
    ):
        (made / name).rename(made / f".{name}.partial-0123abcd.old")
        result = internvl_edge(*line)
        assert result.returncode == 0, (line, result.stderr)
        assert result.stderr.count(f"warning: a process was killed while it replaced {made / name}; the old one") == 1
    assert sorted(os.listdir(made)) == ["bundle", "checkpoint", "set"]


# ---- not listened to ----

QUIET = [("devices",), ("devices", "--json"), ("--help",), ("export", "--help"), ("--version",), ("plan", "CHECKPOINT")]


@pytest.mark.parametrize("arguments", QUIET, ids=" ".join)
def test_a_pipe_that_nobody_reads_ends_a_command_like_any_other(checkpoint: Path, arguments: tuple[str, ...]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [*PROGRAM, *(str(checkpoint) if word == "CHECKPOINT" else word for word in arguments)]
    result = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, check=False)
    assert (result.returncode, result.stderr) == (141, b"")
    both = subprocess.run(command, stdout=writer, stderr=writer, check=False)
    assert both.returncode == 141
    mistake = subprocess.run([*PROGRAM, "run", "nowhere", "x"], stderr=writer, check=False)
    assert mistake.returncode == 141
    os.close(writer)


def test_a_full_disk_behind_the_output_is_one_line() -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    with Path("/dev/full").open("w") as full:
        result = subprocess.run([*PROGRAM, "devices"], stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (result.returncode, result.stderr) == (2, "internvl-edge: error: No space left on device\n")


# Waits for a line, having said so, before the bundle answers its first question.
SLOW_EVALUATION = """
import sys
from internvl_edge.cli import main
import internvl_edge.evaluation
compare = sys.modules["internvl_edge.evaluation.compare"]
follow = compare._follow

def slow(*arguments):
    print("half way", flush=True)
    sys.stdin.readline()
    return follow(*arguments)

compare._follow = slow
main()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_evaluation_records_nothing_and_says_so(
    checkpoint: Path, data: Path, tmp_path: Path, number: signal.Signals
) -> None:
    bundle = tmp_path / "bundle"
    assert internvl_edge("export", checkpoint, "-o", bundle).returncode == 0
    before = contents(bundle)
    line = ("evaluate", bundle, "--reference", bundle, "--data", data, "--samples", 2, "--max-tiles", 1)
    with half_way(SLOW_EVALUATION, *line, "--max-new-tokens", 2, "--quiet") as started:
        os.kill(started.process.pid, number)
        status, printed, error = started.communicate()
    assert (status, printed) == (130, "")
    assert error == "interrupted; nothing is recorded; repeat the command to measure again\n"
    assert contents(bundle) == before
    assert os.listdir(tmp_path) == ["bundle"]


def test_an_evaluation_that_is_stopped_at_its_report_says_that_the_figures_are_recorded(
    checkpoint: Path, data: Path, tmp_path: Path
) -> None:
    bundle = tmp_path / "bundle"
    assert internvl_edge("export", checkpoint, "-o", bundle).returncode == 0
    line = ("evaluate", bundle, "--reference", bundle, "--data", data, "--samples", 2, "--max-tiles", 1)
    with start_code(WAITING, "report.json", *line, "--max-new-tokens", 2) as started:
        assert "half way\n" in iter(started.stdout.readline, "")  # the figures are printed before
        os.kill(started.process.pid, signal.SIGTERM)
        status, _, error = started.communicate()
    assert status == 130
    assert error.splitlines()[-1] == "interrupted; the figures are recorded, the report is not written"
    assert "quality" in (bundle / "manifest.json").read_text()
