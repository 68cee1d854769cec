"""What is left where a command was killed at a random moment, and what repeating it makes of that.

    python benchmarks/kills.py WORK [--kills 200] [--seed 0] [--command NAME ...]

Each command runs once undisturbed, which gives its duration and the SHA-256 of every file it makes. Then it is started
again and again with the demo model and stopped by SIGKILL or SIGTERM at a random moment. Under the final name there
must then be nothing, or the old artifact, or the whole new one. The command is repeated, in one case of four killed
once more on the way, until it succeeds. Its files must have the same SHA-256, and nothing else may lie beside them.

What holds times is left out: report.json, report.html, the run in quantization.json, the date of an evaluation and
with it the digest of a manifest, and the times of entries in zip files. WORK must be empty. Results:
results/kills.json.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import numpy as np
from record import RESULTS, write_results

from internvl_edge.demo import CHECKPOINT

TIMED = ("report.json", "report.html")
TIMED_FIELDS = {"quantization.json": ("run",), "manifest.json": ("date",)}
LIMIT_S = 600
DATA = ("--samples", "4", "--max-tiles", "1")
AWQ = ("quantize", str(CHECKPOINT), "--group-size", "64", *DATA)
INT8 = ("quantize", str(CHECKPOINT), "--scheme", "w8a8", "--vision", "int8", "--kv-cache", "int8", *DATA)


@dataclass(frozen=True)
class Command:
    """A command whose output is `out`, and how many of the kills it gets.

    With `old`, something made by this other command is there before.
    """

    name: str
    arguments: tuple[str, ...]
    share: int
    old: tuple[str, ...] | None = None
    in_place: bool = False
    beside: tuple[str, ...] = ()

    def line(self, out: Path) -> list[str]:
        output = (str(out),) if self.in_place else ("-o", str(out))
        name, *rest = self.arguments
        words = [name, *output, *rest] if self.in_place else [name, *rest, *output]
        return [sys.executable, "-m", "internvl_edge", *words]


EXPORT = ("export", str(CHECKPOINT), "--dtype", "float16")
OTHER_EXPORT = ("export", str(CHECKPOINT), "--dtype", "float32")
COMMANDS = [
    Command("export", EXPORT, 60),
    Command("export --force over a bundle", (*EXPORT, "--force"), 50, old=OTHER_EXPORT),
    Command("calibrate", ("calibrate", str(CHECKPOINT), *DATA), 30),
    Command("quantize, w4a16-awq", AWQ, 20),
    Command("quantize, w8a8 with int8 vision and cache", INT8, 10),
    Command(
        "evaluate",
        ("evaluate", "--reference", str(CHECKPOINT), "--samples", "4", "--max-new-tokens", "8"),
        30,
        old=EXPORT,
        in_place=True,
        beside=("out.report",),
    ),
]


@dataclass
class Tally:
    """What happened to one command."""

    seconds: float
    kills: Counter[str] = field(default_factory=Counter)
    left: Counter[str] = field(default_factory=Counter)
    repeats: int = 0
    differences: list[str] = field(default_factory=list)


@click.command()
@click.argument("work", type=click.Path(path_type=Path))
@click.option("--kills", default=200, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--command", "chosen", multiple=True, type=click.Choice([command.name for command in COMMANDS]))
def main(work: Path, kills: int, seed: int, chosen: tuple[str, ...]) -> None:
    """Kill, repeat, compare, and write `results/kills.json`; with --command, its other rows stay."""
    work.mkdir(parents=True, exist_ok=True)
    if any(work.iterdir()):
        sys.exit(f"{work} is not empty")
    there = RESULTS / "kills.json"
    rows: dict[str, Any] = json.loads(there.read_bytes())["commands"] if chosen and there.exists() else {}
    shares = sum(command.share for command in COMMANDS)
    for command in COMMANDS:
        if chosen and command.name not in chosen:
            continue
        tally = try_command(
            command, work, round(kills * command.share / shares), random.Random(f"{seed}/{command.name}")
        )
        rows[command.name] = {
            "undisturbed_s": round(tally.seconds, 1),
            "kills": dict(tally.kills),
            "left_under_the_name": dict(tally.left),
            "repeats": tally.repeats,
            "differences": tally.differences,
        }
        print(command.name, json.dumps(rows[command.name]), flush=True)
        write_results(
            "kills",
            {
                "seed": seed,
                "kills": sum(sum(row["left_under_the_name"].values()) for row in rows.values()),
                "commands": rows,
            },
        )


def try_command(command: Command, work: Path, count: int, chance: random.Random) -> Tally:
    folder = work / "here"
    out = folder / "out"
    old = None
    if command.old is not None:
        made = work / "old"
        shutil.rmtree(made, ignore_errors=True)
        run(Command("old", command.old, 0).line(made))
        old = made
    prepare(folder, old)
    before = digests(out)
    began = time.monotonic()
    run(command.line(out))
    tally = Tally(time.monotonic() - began)
    whole = digests(out)
    assert whole
    assert whole != before
    number = 0
    while tally.kills["SIGKILL"] + tally.kills["SIGTERM"] < count:
        number += 1
        prepare(folder, old)
        finished = False
        for attempt in range(2 if chance.random() < 0.25 else 1):
            name = chance.choice(["SIGKILL", "SIGKILL", "SIGTERM"])
            finished = kill(command.line(out), name, chance.uniform(0.2, 1.05) * tally.seconds)
            tally.kills["finished before" if finished else name] += 1
            found = digests(out)
            state = "the new one" if found == whole else "nothing" if not found else "the old one"
            if found not in ({}, before, whole):
                state = "something else"
                tally.differences.append(f"{number}.{attempt} {name}: {state}: {differing(found, whole)}")
            if finished:
                break
            tally.left[state] += 1
        if not finished:
            repeat(command, out, tally, number)
        if (found := digests(out)) != whole:
            tally.differences.append(f"{number}: after repeating: {differing(found, whole)}")
        if (beside := sorted(os.listdir(folder))) != ["out", *command.beside]:
            tally.differences.append(f"{number}: beside it: {beside}")
    shutil.rmtree(folder)
    return tally


def repeat(command: Command, out: Path, tally: Tally, number: int) -> None:
    """Repeat a command until it succeeds. Where the killed one had come to its end, that it exists is also success."""
    tally.repeats += 1
    done = run(command.line(out), check=False)
    if done.returncode and not (command.old is None and "exists" in done.stderr):
        tally.differences.append(f"{number}: repeating fails: {done.stderr.strip()[-300:]}")


def prepare(folder: Path, old: Path | None) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    if old is not None:
        shutil.copytree(old, folder / "out")


def run(line: list[str], check: bool = True) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(line, capture_output=True, text=True, check=False, timeout=LIMIT_S)
    if check and done.returncode:
        raise RuntimeError(f"{' '.join(line)} failed: {done.stderr}")
    return done


def kill(line: list[str], name: str, after: float) -> bool:
    """Start a command and send it a signal after so many seconds; return whether it had finished before."""
    with subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            process.wait(after)
        except subprocess.TimeoutExpired:
            process.send_signal(getattr(signal, name))
            process.wait(LIMIT_S)
            return False
        return True


def digests(folder: Path) -> dict[str, str]:
    """Return a SHA-256 for each file, of what does not depend on the time."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in TIMED)
    return {str(path.relative_to(folder)): digest(path) for path in files}


def digest(path: Path) -> str:
    found = hashlib.sha256()
    if path.suffix == ".npz":
        with np.load(path) as arrays:
            for name in sorted(arrays.files):
                found.update(f"{name} {arrays[name].dtype} {arrays[name].shape}".encode() + arrays[name].tobytes())
    elif path.name in TIMED_FIELDS:
        values = json.loads(path.read_bytes())
        if path.name == "manifest.json":
            del values["sha256"]  # its own; those of the files stay
        found.update(json.dumps(without(values, TIMED_FIELDS[path.name])).encode())
    else:
        found.update(path.read_bytes())
    return found.hexdigest()


def without(values: Any, names: tuple[str, ...]) -> Any:
    """Return JSON values without the members of these names, at any depth."""
    if isinstance(values, dict):
        return {name: without(value, names) for name, value in values.items() if name not in names}
    return [without(value, names) for value in values] if isinstance(values, list) else values


def differing(found: dict[str, str], expected: dict[str, str]) -> list[str]:
    return sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))[:8]


if __name__ == "__main__":
    main()
