"""The terminal conversation: paths as people write them, mistakes that do not end it, and the options of an answer."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.commands import internvl_edge
from internvl_edge.cli.chat import typed_paths
from internvl_edge.cli.run import command as run_command
from internvl_edge.runtime.options import ChatOptions


@pytest.mark.parametrize(
    ("typed", "paths"),
    [
        ("photo.png", ["photo.png"]),
        ("~/photo.png", ["{home}/photo.png"]),
        ("$HOME/photo.png", ["{home}/photo.png"]),
        ("'/tmp/my photo.png'", ["/tmp/my photo.png"]),
        ('"/tmp/my photo.png"', ["/tmp/my photo.png"]),
        (r"/tmp/my\ photo\ \(1\).png", ["/tmp/my photo (1).png"]),
        ("/tmp/a.png '/tmp/b c.png'", ["/tmp/a.png", "/tmp/b c.png"]),
        ("file:///tmp/my%20photo.png", ["file:///tmp/my%20photo.png"]),
        ("it's.png", ["it's.png"]),
        ("", [""]),
        ("x" * 5000, ["x" * 5000]),
    ],
)
@pytest.mark.skipif(os.name == "nt", reason="a shell's rules differ there")
def test_paths_are_expanded_as_a_shell_does(
    typed: str, paths: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert typed_paths(typed) == [path.format(home=tmp_path) for path in paths]


def test_a_file_with_that_very_name_is_taken_as_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a b.png", "$HOME.png", r"back\slash.png"):
        (tmp_path / name).touch()
        assert typed_paths(name) == [name]


def test_chat_keeps_history_and_survives_mistakes(bundle: Path, photo: Path) -> None:
    lines = f"/image {photo}\nWhat is this?\n/image nowhere.jpg\nAnd now?\n/history\n/clear\n/history\n/quit\n"
    result = internvl_edge("chat", bundle, "--max-new-tokens", 4, "--max-tiles", 1, stdin=lines)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("error:") == 1
    assert "nowhere.jpg" in result.stderr
    history = result.stdout.split("cleared")[0]
    assert "> <image>\nWhat is this?" in history
    assert "> And now?" in history


def test_bytes_that_are_not_text_and_unknown_commands_do_not_end_the_conversation(bundle: Path) -> None:
    lines = b"caf\xe9\n/imgae x.png\n/image 'nowhere at all.png'\nHello\n/history\n/quit\n"
    command = [sys.executable, "-m", "internvl_edge", "chat", str(bundle), "--max-new-tokens", "2", "--device", "cpu"]
    result = subprocess.run(command, input=lines, capture_output=True, timeout=120)
    errors, printed = result.stderr.decode(), result.stdout.decode()
    assert result.returncode == 0, errors
    assert [line[:6] for line in errors.splitlines()] == ["error:", "error:"]
    assert "is no character" in errors.splitlines()[0]
    assert "nowhere at all.png cannot be read" in errors.splitlines()[1]
    assert "did you mean /image?" in printed
    assert "> Hello" in printed


def test_every_option_of_an_answer_is_on_the_command_line() -> None:
    assert set(ChatOptions.__annotations__) - {"history"} <= {option.name for option in run_command.params}
