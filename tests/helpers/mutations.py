"""Mutators of what others write: values of JSON, texts, bytes; and what must come of every mutant.

A mutant is read, or it is refused by one line of an `EdgeError`, within a bound of CPU time. Everything else is a bug.
"""

from __future__ import annotations

import copy
import gc
import random
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from internvl_edge.base.errors import EdgeError
from internvl_edge.base.text import MESSAGE_LENGTH

# What stands in files that were cut, edited by hand, made by other programs or by somebody who means harm.
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, 2, 3, 4, 5, 7, 8, 16, 64, 128, 700, -1, -2, 10**6, 10**9, 3 * 10**6, 2**31, 2**33),
    *(2**63, 2**64 - 1, 2**64, 10**40, 10**300, 10**400, 0.5, 1.0, 2.5, 256.0, 1e-300, 1e300, 5e-324, -0.0),
    *(float("nan"), float("inf"), float("-inf"), "", "4", "x", "../x", "a" * 5000, "\ud800", "\u56fe", "\n" * 500),
    *("default", "gelu", "re:(", "re:a{99999999999999}", "<|im_end|>", "F32", "float16", [], [1], [4, 4], [448, 448]),
    *([1, 2], [[]], [None], ["a"], [10**9], ["full_attention", 3], {}, {"a": 1}, {"x": []}, {"a": {"b": []}}),
    *({"type": "dynamic", "factor": 1e308}, {"rope_type": []}, {"content": 3}, {"content": "<s>", "special": 1}),
)
# What stands in texts that are no JSON, no TOML and no UTF-8.
PIECES = (
    *("[", "]", "{", "}", ",", ":", '"', "'", "=", "#", "\n", " ", "\t", "0", "9", "-", ".", "e1", "NaN", "1e999"),
    *("-0", "01", "\0", "\ufeff", "/**/", "[" * 300, "{" * 2000, "9" * 400, '"\\ud800"', '"\\ud83d\\ude00"', "true"),
)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every member."""
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield (*path, key)
        yield from places(value[key], (*path, key))


def mutate_values(rng: random.Random, values: Any, more: tuple[Any, ...] = ()) -> None:
    """Change, remove, rename, repeat or add one member anywhere; `more` are values that are apt for this format."""
    found = list(places(values))
    if not found:
        return
    *path, last = rng.choice(found)
    parent: Any = values
    for key in path:
        parent = parent[key]
    kind, old = rng.randrange(8), parent[last]
    if kind == 0:
        del parent[last]
    elif kind == 1 and type(old) in (int, float) and abs(old) < 1e300:
        parent[last] = old * rng.choice([-1, 0, 0.5, 2, 1.0, 1e9, 1e-9])
    elif kind == 2:
        parent[last] = copy.deepcopy(rng.choice(list(values.values() if isinstance(values, dict) else values)))
    elif kind == 3 and isinstance(parent, dict):
        parent[rng.choice(["x", "", "-1", "99999999999", "\u56fe", "a b"])] = parent.pop(last)
    elif kind == 4:
        parent[last] = [copy.deepcopy(old)] if rng.random() < 0.5 else {"x": copy.deepcopy(old)}
    else:
        parent[last] = copy.deepcopy(rng.choice(more if more and rng.random() < 0.4 else VALUES))


def mutate_text(rng: random.Random, text: str) -> str:
    """Change, remove, repeat or add a piece of a text."""
    place = rng.randrange(len(text) + 1)
    kind = rng.randrange(5)
    if kind == 0:
        return text[:place] + text[place + rng.randrange(1, 9) :]
    if kind == 1:
        other = rng.randrange(len(text) + 1)
        return text[:place] + text[other : other + rng.randrange(1, 60)] + text[place:]
    if kind == 2:
        return text[:place]
    return text[:place] + rng.choice(PIECES) + text[place + (kind == 3) :]


def mutate_bytes(rng: random.Random, data: bytes) -> bytes:
    """Flip a bit, change, remove, repeat, zero or add some bytes, or cut the rest off."""
    found = bytearray(data)
    place = rng.randrange(len(found) + 1)
    kind = rng.randrange(7)
    if kind == 0 and place < len(found):
        found[place] ^= 1 << rng.randrange(8)
    elif kind == 1 and place < len(found):
        found[place] = rng.choice([0, 1, 127, 128, 255, rng.randrange(256)])
    elif kind == 2:
        del found[place : place + rng.randrange(1, 9)]
    elif kind == 3:
        del found[place:]
    elif kind == 4:
        other = rng.randrange(len(found) + 1)
        found[place:place] = found[other : other + rng.randrange(1, 60)]
    elif kind == 5:
        size = rng.choice([1, 2, 4, 8, 64])
        found[place : place + size] = bytes([rng.choice([0, 255])]) * len(found[place : place + size])
    else:
        found[place:place] = rng.randbytes(rng.randrange(1, 9))
    return bytes(found)


def outcome(read: Callable[[], Any], seconds: float, memory_mb: float) -> tuple[Any, str | None]:
    """Return what a mutant is read as, and the line that refuses it.

    Raises:
        AssertionError: the line is none or too long; or reading takes more CPU time, or raises the peak of memory by
            more.
        Exception: what is raised in place of an `EdgeError`.
    """
    started, peak = time.process_time(), peak_mb()
    result, line = None, None
    try:
        result = read()
    except EdgeError as error:
        line = str(error)
        assert len(line.splitlines()) == 1, line
        assert len(line) <= MESSAGE_LENGTH, line
    took = time.process_time() - started
    assert took < seconds, f"it took {took:.2f} s, expected less than {seconds} s"
    rise = peak_mb() - peak
    assert rise < memory_mb, f"the peak of memory rose by {rise:.0f} MB, expected less than {memory_mb} MB"
    return result, line


def peak_mb() -> float:
    """Return the peak of this process's resident memory."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000


@contextmanager
def memory_folder() -> Iterator[Path]:
    """A folder in memory where the system has one, because mutants are written by the ten thousand.

    What other tests left is not collected meanwhile, so that bounds of time hold.
    """
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared if shared.is_dir() else None) as folder:
        gc.collect()
        gc.freeze()
        try:
            yield Path(folder)
        finally:
            gc.unfreeze()
