"""Run the command line as a user does, and check the one line of its error messages."""

from __future__ import annotations

import atexit
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping
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
_one_at_a_time = threading.Lock()


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
    command = [sys.executable, "-c", code, *map(str, arguments)]
    program = {"code": code, "arguments": command[3:], "environment": dict(environment)}
    program["directory"] = str(directory or Path.cwd())
    with _one_at_a_time, TemporaryFile() as given, TemporaryFile() as output, TemporaryFile() as error:
        given.write(stdin.encode())
        given.seek(0)
        server = _server()
        socket.send_fds(server, [json.dumps(program).encode()], [given.fileno(), output.fileno(), error.fileno()])
        process = int(server.recv(64))
        overdue = threading.Timer(_LONGEST, os.kill, (process, signal.SIGKILL))
        overdue.daemon = True
        overdue.start()
        status = int(server.recv(64))
        overdue.cancel()
        return subprocess.CompletedProcess(command, status, _text(output), _text(error))


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
