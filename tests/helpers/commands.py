"""Run the command line as a user does, and check the one line of its error messages."""

from __future__ import annotations

import atexit
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any

MAIN = "from internvl_edge.cli import main; main()"
PROGRAM = [sys.executable, "-c", MAIN]
# Seconds until a program is killed.
_LONGEST = 400
_SCRIPT = """
import os, runpy, sys
sys.argv = sys.argv[1:]
sys.path[0] = os.path.dirname(sys.argv[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def internvl_edge(*arguments: object, stdin: str = "", **place: Any) -> subprocess.CompletedProcess[str]:
    """Run a command in a process of its own, where nothing but libraries is imported already; `place` as below."""
    return run_code(MAIN, *arguments, stdin=stdin, **place)


def run_script(script: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a Python file, as `run_code` runs code."""
    return run_code(_SCRIPT, script, *arguments)


def run_code(
    code: str,
    *arguments: object,
    stdin: str = "",
    environment: Mapping[str, str] = os.environ,
    directory: Path | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run Python code as `python -c` does, in a process that `fork_server.py` forks. Its streams are files."""
    words = [*map(str, arguments)]
    with TemporaryFile() as given, TemporaryFile() as output, TemporaryFile() as error:
        given.write(stdin.encode())
        given.seek(0)
        process = Forked(code, words, [given, output, error], environment, directory or Path.cwd())
        try:
            status = process.wait(_LONGEST)
        finally:
            process.kill()
        return subprocess.CompletedProcess([sys.executable, "-c", code, *words], status, _text(output), _text(error))


@contextmanager
def start_code(code: str, *arguments: object) -> Iterator[Started]:
    """Start Python code as `run_code` runs it; what it is told and what it prints are pipes. It ends with the block."""
    (given, to), (output, printed) = os.pipe(), os.pipe()
    with ExitStack() as open_files:
        theirs = [open_files.enter_context(os.fdopen(given, "rb")), open_files.enter_context(os.fdopen(printed, "wb"))]
        error = open_files.enter_context(TemporaryFile())
        process = Forked(code, [*map(str, arguments)], [*theirs, error], os.environ, Path.cwd())
        for file in theirs:
            file.close()
        told, said = open_files.enter_context(os.fdopen(to, "w")), open_files.enter_context(os.fdopen(output))
        try:
            yield Started(process, told, said, error)
        finally:
            process.kill()


class Forked:
    """A program in a forked process."""

    def __init__(
        self,
        code: str,
        arguments: list[str],
        streams: Sequence[IO[Any]],
        environment: Mapping[str, str],
        directory: Path,
    ) -> None:
        program = {"code": code, "arguments": arguments, "environment": dict(environment), "directory": str(directory)}
        self._answers, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            descriptors = [*(file.fileno() for file in streams), theirs.fileno()]
            socket.send_fds(_server(), [json.dumps(program).encode()], descriptors)
        self.pid = int(self._answers.recv(64))
        self.returncode: int | None = None

    def wait(self, timeout: float) -> int:
        """Return the exit status; minus the signal, where one ended it."""
        if self.returncode is None:
            self._answers.settimeout(timeout)
            self.returncode = int(self._answers.recv(64))
            self._answers.close()
        return self.returncode

    def kill(self) -> None:
        """End it, if it has not ended."""
        if self.returncode is None:
            os.kill(self.pid, signal.SIGKILL)
            self.wait(60)


@dataclass
class Started:
    """A program that `start_code` started, with its streams."""

    process: Forked
    stdin: IO[str]
    stdout: IO[str]
    stderr: IO[bytes]

    def communicate(self, text: str = "") -> tuple[int, str, str]:
        """Give it a text and wait for its end; return its exit status, and the rest that it printed."""
        with suppress(BrokenPipeError):
            self.stdin.write(text)
            self.stdin.close()
        status = self.process.wait(60)
        return status, self.stdout.read(), _text(self.stderr)


def _text(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode().replace("\r\n", "\n")


@cache
def _server() -> socket.socket:
    """Start the process that forks; it ends with this one."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    script = Path(__file__).with_name("fork_server.py")
    with theirs:
        process = subprocess.Popen([sys.executable, str(script), str(theirs.fileno())], pass_fds=[theirs.fileno()])
    atexit.register(process.wait)
    atexit.register(ours.close)
    return ours


def assert_one_line(result: subprocess.CompletedProcess[str], *fragments: str) -> None:
    """Check for exit status 2, no standard output, and one line on standard error that holds the fragments."""
    assert (result.returncode, result.stdout) == (2, ""), result.stderr
    assert result.stderr.count("\n") == 1, result.stderr
    assert result.stderr.startswith("internvl-edge: error: ")
    for fragment in fragments:
        assert fragment in result.stderr
