"""Progress on a terminal and in a log: what is written, when, and that nothing of it is left where it is not wanted."""

from __future__ import annotations

import io
import re
import time
from typing import Any

import pytest

from internvl_edge.base import progress as module
from internvl_edge.base.progress import Progress, Step, as_progress, fitting, note
from internvl_edge.base.units import duration, size


class Clock:
    """Time that only moves when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "monotonic", clock)
    monkeypatch.setattr(module, "_TICK", 3600)  # ticks are called by the tests
    return clock


def tick(progress: Any) -> None:
    """What the thread does, without the thread."""
    if progress._terminal:
        progress._draw()
    elif time.monotonic() - progress._began >= module._PATIENCE:
        progress._release()
        progress._each_minute()


def test_a_log_gets_one_line_per_phase_and_one_per_minute(clock: Clock) -> None:
    log = io.StringIO()
    with Progress(log) as progress:
        progress.expect(2)
        with progress.phase("preparing", 8, "samples") as advance:
            for _ in range(8):
                clock.now += 1
                advance(1)
        with progress.phase("quantizing", 2400, "layers", 24) as advance:
            for _ in range(2400):
                clock.now += 0.1
                advance(1)
                tick(progress)
    lines = log.getvalue().splitlines()
    assert lines[:2] == [
        "internvl-edge: [1 of 2] preparing, 8 samples",
        "internvl-edge: [2 of 2] quantizing, 24 layers",
    ]
    assert lines[2] == "internvl-edge: [2 of 2] quantizing: 25%, 3 min 0 s left, 6 of 24 layers"
    assert len(lines) in (2 + 3, 2 + 4)  # 240 seconds
    assert "\r" not in log.getvalue()


def fail(log: io.StringIO, clock: Clock, seconds: float) -> None:
    with Progress(log) as progress, progress.phase("loading"):
        clock.now += seconds
        tick(progress)
        raise ValueError("wrong")


def test_a_mistake_that_is_found_at_once_is_the_only_line(clock: Clock) -> None:
    log = io.StringIO()
    with pytest.raises(ValueError, match="wrong"):
        fail(log, clock, 1)
    assert log.getvalue() == ""
    with pytest.raises(ValueError, match="wrong"):
        fail(log, clock, 3)
    assert log.getvalue() == "internvl-edge: loading\n"


def test_a_long_phase_without_a_report_is_said_while_it_lasts(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the real thread: nothing reports anything, and still the line comes."""
    monkeypatch.setattr(module, "_PATIENCE", 0.05)
    monkeypatch.setattr(module, "_TICK", 0.02)
    log = io.StringIO()
    with Progress(log) as progress, progress.phase("loading"):
        for _ in range(500):
            if log.getvalue():
                break
            time.sleep(0.01)
        assert log.getvalue() == "internvl-edge: loading\n"
    assert progress._ticker is None or not progress._ticker.is_alive()


def test_a_terminal_line_is_rewritten_and_erased(clock: Clock) -> None:
    terminal = Terminal()
    with Progress(terminal) as progress, progress.phase("writing", 4_000_000, "bytes") as advance:
        for _ in range(8):
            clock.now += 1
            advance(500_000)
        progress.note("a warning")
    text = terminal.getvalue()
    drawn = [part for part in re.split(r"\r\x1b\[K", text) if part]
    assert drawn[0] == "writing  0%, 0 B of 4 MB"
    assert drawn[4] == "writing  50%, 4 s left, 2 MB of 4 MB"
    assert drawn[-1] == "a warning\n"
    assert text.count("\n") == 1
    assert text.endswith("a warning\n")


def test_each_drawing_fits_a_narrow_terminal(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    for columns in (1, 2, 10, 20, 40, 80):
        terminal = Terminal()
        monkeypatch.setattr(Progress, "_columns", lambda self, columns=columns: columns)
        with Progress(terminal) as progress:
            progress.expect(12)
            with progress.phase("測量測量測量 the sensitivity of the tower", 1000, "blocks", 24) as advance:
                for _ in range(1000):
                    clock.now += 0.5
                    advance(1)
        drawn = re.split(r"\r\x1b\[K", terminal.getvalue())
        assert max(map(module._width, drawn)) < max(columns, 2)
        assert "\n" not in terminal.getvalue()


def test_a_dumb_terminal_gets_plain_lines(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    terminal = Terminal()
    with Progress(terminal) as progress, progress.phase("loading"):
        pass
    assert terminal.getvalue() == "internvl-edge: loading\n"


def test_the_time_left_knows_nothing_of_what_an_earlier_run_did(clock: Clock) -> None:
    step = Step("quantizing", 100)
    step(50)  # done by the run before
    assert step.seconds_left(clock.now) is None
    clock.now += 10
    step(5)
    assert step.seconds_left(clock.now) == pytest.approx(90)  # 45 steps of 2 seconds
    assert step.seconds_left(clock.now + 30) == pytest.approx(60)
    assert step.seconds_left(clock.now + 500) == 0


def test_silence_is_silent_but_for_warnings(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(None) as progress, progress.phase("loading"):
        progress.remark("engine: onnxruntime")
        note("skipped line 3")
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "skipped line 3\n")


def test_a_phase_of_another_command_is_a_part_and_numbers_are_the_callers(clock: Clock) -> None:
    log = io.StringIO()
    with Progress(log) as progress:
        progress.expect(3)
        with progress.phase("first"):
            pass
        progress.expect(9)  # what the called command would say for itself
        with progress.phase("second"), progress.phase("a part"):
            pass
        progress.skip(1)
    assert log.getvalue().splitlines() == [
        "internvl-edge: [1 of 3] first",
        "internvl-edge: [2 of 3] second",
        "internvl-edge: [2 of 3] second: a part",
    ]


def test_a_closed_standard_error_does_not_end_the_work(clock: Clock) -> None:
    log = io.StringIO()
    log.close()
    with pytest.raises(ValueError, match="closed"):
        log.write("x")

    class Gone(Terminal):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    with Progress(Gone()) as progress, progress.phase("loading", 3) as advance:
        advance(3)
    assert advance.done == 3


def test_arguments_of_the_library() -> None:
    progress = Progress(None)
    assert as_progress(progress) is progress
    assert as_progress(False) is module.SILENT
    assert as_progress(True)._stream is not None


@pytest.mark.parametrize(
    ("columns", "line"),
    [
        (60, "quantizing  37%, 3 s left, 9 of 24 layers"),
        (30, "quantizing  37%, 3 s left"),
        (16, "quantizing  37%"),
        (14, "quantizi…  37%"),
        (10, "quantizing"),
        (5, "quan…"),
    ],
)
def test_what_matters_most_is_what_fits(columns: int, line: str) -> None:
    assert fitting("quantizing", ["37%", "3 s left", "9 of 24 layers"], columns) == line


def test_units_for_people() -> None:
    assert [duration(seconds) for seconds in (0.25, 5.4, 59.9, 200, 7500)] == [
        "0.25 s",
        "5 s",
        "1 min 0 s",
        "3 min 20 s",
        "2 h 5 min",
    ]
    assert [size(count) for count in (12, 999_700, 999_999_999, 1.88e9)] == ["12 B", "1 MB", "1.00 GB", "1.88 GB"]


def test_what_is_waited_for_is_said_on_a_terminal_alone(clock: Clock) -> None:
    for stream, expected in ((Terminal(), "\r\x1b[Kloading torch\r\x1b[K"), (io.StringIO(), "")):
        with Progress(stream) as progress, progress.waiting("loading torch"):
            clock.now += 9
        assert stream.getvalue() == expected
