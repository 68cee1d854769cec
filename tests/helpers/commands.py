"""Run the command line as a user does, and check the one line of its error messages."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = [sys.executable, "-c", "from internvl_edge.cli import main; main()"]


def internvl_edge(*arguments: object, stdin: str = "") -> subprocess.CompletedProcess[str]:
    command = [*PROGRAM, *map(str, arguments)]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=120, check=False)


def assert_one_line(result: subprocess.CompletedProcess[str], *fragments: str) -> None:
    """Check for exit status 2, no standard output, and one line on standard error that holds the fragments."""
    assert (result.returncode, result.stdout) == (2, ""), result.stderr
    assert result.stderr.count("\n") == 1, result.stderr
    assert result.stderr.startswith("internvl-edge: error: ")
    for fragment in fragments:
        assert fragment in result.stderr
