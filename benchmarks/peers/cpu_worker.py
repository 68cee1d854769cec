"""What every program measured by `cpu_peers.py` speaks: JSON lines, one request in, one answer out.

A worker says what it can do and how long loading took, then waits. `{"do": "prefill", "count": 300}` is answered by
`{"seconds": 0.4}`. It lives in its peer's own environment, so only the standard library and numpy are used here.

    prefill N        an empty cache, N prompt tokens, the logits after the last
    decode C         STEPS further tokens one by one, C are in the cache already (not timed); the same again with the
                     same C goes back to them where the program can, so that a long prompt is computed once
    rows N           STEPS further tokens of N sequences together, TEXT tokens of each are in the cache already
    vision N         N tiles of 448 x 448 pixels -> image tokens
    first_token N    N tiles, then their tokens and 300 of text as one prompt, up to the logits
    memory           peak so far: {"resident": bytes, "anonymous": bytes} instead of seconds
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

THREADS = 2
STEPS = 32
TEXT = 300
# Tokens that the cache has room for; what is longer gets a cache of its own, so that all other figures are of this one.
CONTEXT = 4096
LONG_CONTEXT = 8192
TILE_TOKENS = 256
TILE = 448
# A token of every vocabulary here.
TOKEN = 100

Action = Callable[[int], float]


def context_for(tokens: int) -> int:
    """The smaller of the two caches that has room for so many tokens and STEPS further ones, twice."""
    return CONTEXT if tokens + 2 * STEPS <= CONTEXT else LONG_CONTEXT


def serve(load: Callable[[], dict[str, Action]], cannot: str = "") -> None:
    """Load, then answer requests until standard input ends; `load` imports nothing large itself.

    `cannot` says why what is missing among the actions is missing.
    """
    # Whatever a library prints goes to standard error; the protocol keeps a descriptor of its own.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    anonymous = _AnonymousPeak()
    started = time.perf_counter()
    actions = load()
    hello = {"load_s": time.perf_counter() - started, "can": sorted(actions), "cannot": cannot}
    print(json.dumps(hello), file=answers)
    for line in sys.stdin:
        request: dict[str, Any] = json.loads(line)
        if request["do"] == "memory":
            answer = {"resident": _status("VmHWM"), "anonymous": max(anonymous.peak, _status("RssAnon"))}
        else:
            answer = {"seconds": actions[request["do"]](request["count"])}
        print(json.dumps(answer), file=answers)
    os._exit(0)  # some peers crash when Python takes their objects apart


def timed(action: Callable[[], object]) -> float:
    """Seconds that an action takes."""
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


class _AnonymousPeak:
    """The largest RssAnon, looked at twenty times a second: the system keeps a peak of all resident memory only."""

    def __init__(self) -> None:
        self.peak = 0
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            self.peak = max(self.peak, _status("RssAnon"))
            time.sleep(0.05)
