"""The terminal conversation: paths as people write them, mistakes that do not end it, and the options of an answer."""

from __future__ import annotations

import os
import re
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from helpers.commands import internvl_edge
from internvl_edge.cli.chat import completions, typed_paths
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
    command = [sys.executable, "-m", "internvl_edge", "chat", str(bundle), "--max-new-tokens", "2", "--quiet"]
    result = subprocess.run(command, input=lines, capture_output=True, timeout=120)
    errors, printed = result.stderr.decode(), result.stdout.decode()
    assert result.returncode == 0, errors
    assert [line[:6] for line in errors.splitlines()] == ["error:", "error:"]
    assert "is no character" in errors.splitlines()[0]
    assert "nowhere at all.png cannot be read" in errors.splitlines()[1]
    assert "did you mean /image?" in printed
    assert "> Hello" in printed


def test_every_option_of_an_answer_is_on_the_command_line() -> None:
    """`answer_format` has three options of `run`."""
    for_programs = {"history", "logit_bias", "logprobs", "top_logprobs", "answer_format", "answer_start"}
    names = {option.name for option in run_command.params}
    assert set(ChatOptions.__annotations__) - for_programs | {"json_schema", "regex", "choices"} <= names


@pytest.mark.skipif(os.name == "nt", reason="a shell's rules differ there")
def test_commands_and_file_names_are_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "pictures").mkdir()
    for name in ("photo.png", "my photo (1).png", ".hidden.png", "pictures/cat.png"):
        (tmp_path / name).touch()
    assert completions("/im") == ("/im", ["/image "])
    assert completions("/") == ("/", ["/image ", "/clear ", "/history ", "/quit "])
    assert completions("/image p") == ("p", ["photo.png", "pictures/"])
    assert completions("/image pictures/") == ("pictures/", ["pictures/cat.png"])
    assert completions("/image ~/ph") == ("~/ph", ["~/photo.png"])
    assert completions(r"/image photo.png my\ ph") == (r"my\ ph", [r"my\ photo\ \(1\).png"])
    assert completions("/image .h") == (".h", [".hidden.png"])
    assert ".hidden.png" not in completions("/image ")[1]
    assert completions("/image nowhere/x") == ("nowhere/x", [])
    assert completions("What is p") == ("", [])
    for typed in ("/image ", "/image pictures/"):  # what is completed is what the command reads
        word, whole = completions(typed)
        assert all(os.path.exists(typed_paths(each)[0]) for each in whole)
        assert all(each.startswith(word) for each in whole)


# Waits at the first token of an answer, having said so, until it is interrupted.
SLOW_ANSWERS = """
import sys, time
from internvl_edge.cli import main
from internvl_edge.runtime import conversation
stream = conversation.Conversation.stream

def slow(self, question, *images):
    pieces = stream(self, question, *images)
    yield next(pieces)
    if "slowly" in question:
        print("half way", file=sys.stderr, flush=True)
        time.sleep(60)
    yield from pieces

conversation.Conversation.stream = slow
main()
"""


@pytest.mark.skipif(os.name == "nt", reason="signals differ there")
def test_ctrl_c_stops_an_answer_and_the_conversation_goes_on(bundle: Path, photo: Path) -> None:
    command = [sys.executable, "-c", SLOW_ANSWERS, "chat", str(bundle), "--quiet", "--max-new-tokens", "3"]
    with subprocess.Popen(command, stdin=-1, stdout=-1, stderr=-1, text=True) as process:
        assert process.stdin is not None
        assert process.stderr is not None
        process.stdin.write(f"/image {photo}\nTell it slowly\n")
        process.stdin.flush()
        assert process.stderr.readline() == "half way\n"
        process.send_signal(signal.SIGINT)
        printed, errors = process.communicate("And now?\n/history\n/quit\n", timeout=60)
    assert (process.returncode, errors) == (0, "")
    assert "(stopped; question and answer are not kept)" in printed
    history = printed.rpartition("> And now?")
    assert "> <image>\n" in printed  # the image waits for the next question
    assert "slowly" not in history[0].partition("stopped")[2]


@pytest.mark.skipif(os.name == "nt", reason="there is no pseudo-terminal")
def test_ctrl_c_clears_the_line_and_a_second_one_ends(bundle: Path) -> None:
    import pty

    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "internvl_edge", "chat", str(bundle), "--max-new-tokens", "2"]
    environment = {**os.environ, "TERM": "xterm"}
    with subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment, start_new_session=True, close_fds=True
    ) as process:
        os.close(theirs)
        written = b""

        def arrives(text: bytes, count: int, seconds: float) -> bool:
            nonlocal written
            deadline = time.monotonic() + seconds
            while written.count(text) < count:
                if not select.select([ours], [], [], max(0.0, deadline - time.monotonic()))[0]:
                    return False
                written += os.read(ours, 65536)
            return True

        def until(text: bytes, count: int = 1) -> None:
            assert arrives(text, count, 60), written

        def press_ctrl_c(typed: bytes, count: int) -> None:
            os.write(ours, typed)
            until(typed)
            # Python sees no signal between readline's echo and its waiting, a moment that no person can hit. The next
            # signal then ends the wait, and both are one interrupt.
            for _ in range(3):
                time.sleep(0.3)
                process.send_signal(signal.SIGINT)
                if arrives(b"Ctrl-C again", count, 10):
                    return

        until(b"> ")
        press_ctrl_c(b"a line that nobody wants", 1)
        until(b"Ctrl-C again")
        until(b"> ", 2)
        os.write(ours, b"Hello\n")
        until(b"first token after")
        until(b"> ", 3)
        press_ctrl_c(b"another line", 2)
        until(b"Ctrl-C again", 2)
        until(b"> ", 4)
        os.write(ours, b"the last line")
        until(b"the last line")
        for _ in range(3):
            time.sleep(0.3)
            process.send_signal(signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=20)
                break
        assert process.returncode == 0
    os.close(ours)
    assert re.search(rb"first token after [\d.]+ s(, then [\d.,]+ tokens/s)?; \d tokens?", written)
