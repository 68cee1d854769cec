"""What commands say while they work: on a terminal (a real pseudo-terminal), in a log, and with --quiet."""

from __future__ import annotations

import os
import re
import struct
import subprocess
from pathlib import Path

import pytest

from helpers.calibration_data import write_data
from helpers.commands import PROGRAM, internvl_edge

pty = pytest.importorskip("pty")
PHASE = re.compile(r"internvl-edge: (\[\d+ of \d+\] )?[a-z].*")


def on_a_terminal(columns: int, *arguments: object) -> tuple[int, str, str]:
    """The status, standard output (a pipe) and all that was written on the terminal behind standard error."""
    import fcntl
    import termios

    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    environment = {**os.environ, "TERM": "xterm"}
    command = [*PROGRAM, *map(str, arguments)]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=-1, stderr=theirs, env=environment) as process:
        os.close(theirs)
        written = b""
        while True:
            try:
                data = os.read(ours, 65536)
            except OSError:  # Linux: nobody has the other end any more
                break
            if not data:
                break
            written += data
        assert process.stdout is not None
        output = process.stdout.read().decode()
    os.close(ours)
    return process.returncode, output, written.decode()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


def lines_of(checkpoint: Path, bundle: Path, data: Path, out: Path) -> dict[str, tuple[object, ...]]:
    small = ("--data", data, "--samples", 2, "--max-tiles", 1)
    unwritten = ("--no-record", "--no-report", "--max-new-tokens", 2)
    return {
        "run": ("run", bundle, "Hello", "--max-new-tokens", 3),
        "export": ("export", checkpoint, "-o", out / "bundle"),
        "calibrate": ("calibrate", checkpoint, "-o", out / "set", *small),
        "quantize": ("quantize", checkpoint, "-o", out / "quantized", *small, "--group-size", 32),
        "evaluate": ("evaluate", bundle, "--reference", bundle, *small, *unwritten),
    }


PHASES = {
    "run": ["loading", "reading the question"],
    "export": ["writing the graphs", "writing the weights, .*B"],
    "calibrate": [
        "preparing the calibration data, 2 samples",
        "encoding the images",
    ],
    "quantize": ["preparing the calibration data", "encoding the images", "quantizing the decoder", "writing"],
    "evaluate": ["loading the bundle", "answering with the reference, 2 questions", "answering with the bundle"],
}


@pytest.mark.parametrize("name", PHASES)
def test_a_log_has_a_line_for_each_phase_and_output_has_the_result_alone(
    name: str, checkpoint: Path, bundle: Path, data: Path, tmp_path: Path
) -> None:
    line = lines_of(checkpoint, bundle, data, tmp_path)[name]
    result = internvl_edge(*line)
    assert result.returncode == 0, result.stderr
    shown = [line for line in result.stderr.splitlines() if PHASE.fullmatch(line)]
    assert len(shown) == len(PHASES[name]), result.stderr
    for number, (found, expected) in enumerate(zip(shown, PHASES[name], strict=True), start=1):
        assert re.match(rf"internvl-edge: \[{number} of {len(shown)}\] {expected}", found), found
    assert "internvl-edge: [" not in result.stdout
    assert not re.search(r"\d+\.\d+k?/\d", result.stderr)


@pytest.mark.parametrize("name", PHASES)
def test_quiet_says_nothing(name: str, checkpoint: Path, bundle: Path, data: Path, tmp_path: Path) -> None:
    result = internvl_edge(*lines_of(checkpoint, bundle, data, tmp_path)[name], "--quiet")
    assert result.returncode == 0
    assert [line for line in result.stderr.splitlines() if not line.startswith("report: ")] == []
    assert "Next: " not in result.stdout
    assert "Try: " not in result.stdout


@pytest.mark.parametrize("columns", [24, 80])
@pytest.mark.parametrize("name", ["run", "export", "quantize", "evaluate"])
def test_a_terminal_of_any_width_keeps_one_line(
    name: str, columns: int, checkpoint: Path, bundle: Path, data: Path, tmp_path: Path
) -> None:
    status, output, written = on_a_terminal(columns, *lines_of(checkpoint, bundle, data, tmp_path)[name])
    assert status == 0, written
    drawn = [part for part in written.split("\r\x1b[K") if "\n" not in part]
    assert len(drawn) >= 2
    assert max(map(len, drawn)) < columns
    assert any(line.startswith("[1 of ") for line in drawn)
    lines = written.count("\n")
    assert lines <= 3, written  # the engine, the report, the timing
    assert "[1 of" not in output


def test_the_engine_is_named_with_its_reason(bundle: Path) -> None:
    result = internvl_edge("run", bundle, "Hello", "--max-new-tokens", 1)
    named = [line for line in result.stderr.splitlines() if line.startswith("engine: ")]
    assert len(named) == 1
    assert re.fullmatch(r"engine: onnxruntime \(the bundle computes in float32, .*\)", named[0])
    asked = internvl_edge("run", bundle, "Hello", "--max-new-tokens", 1, "--engine", "onnxruntime")
    assert "engine:" not in asked.stderr
