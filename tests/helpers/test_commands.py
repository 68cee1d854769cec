"""A program that is forked does what one that is started does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.commands import run_code

PROGRAMS = {
    "both streams": "import sys; print('out'); print('said', file=sys.stderr)",
    "what it is given": "import os, sys; print(sys.argv, sys.path[0], sys.stdin.read(), __name__, os.getcwd())",
    "its environment": "import os; print(sorted(os.environ.items()))",
    "a status": "raise SystemExit(3)",
    "a text as status": "raise SystemExit('words')",
    "an exception": "def fail():\n    return 1 / 0\nfail()",
    "a signal": "import os; os.kill(os.getpid(), 9)",
    "the end": "import atexit; atexit.register(print, 'late'); print('early')",
    "a thread": "import threading, time; threading.Thread(target=lambda: (time.sleep(0.1), print('done'))).start()",
    "signals": "import signal; print([signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGPIPE)])",
    "nothing of this package": "import sys; print([name for name in sys.modules if name.startswith('internvl')])",
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_forked_program_does_what_a_started_one_does(tmp_path: Path, name: str) -> None:
    environment, words = {**os.environ, "ONE_MORE": "value"}, ("one", "two words", "\u56fe")
    started = subprocess.run(
        [sys.executable, "-c", PROGRAMS[name], *words],
        input="typed\n\u56fe",
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    forked = run_code(PROGRAMS[name], *words, stdin="typed\n\u56fe", environment=environment, directory=tmp_path)
    assert (forked.returncode, forked.stdout) == (started.returncode, started.stdout)
    assert forked.stderr.splitlines()[-1:] == started.stderr.splitlines()[-1:]
