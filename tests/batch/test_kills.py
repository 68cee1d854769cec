"""A batch that is killed at random moments, with half lines appended: complete in the end, and nothing done twice.

A row is counted as computed when its item reaches the engine's answer, in a file of its own that is synced before the
row is written. So a row that was in the journal when a process began must not be computed by it.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from internvl_edge.demo import demo_questions

RUN = """
import os, sys, threading
from internvl_edge.batch import run
from internvl_edge.cli import main

log = os.open(sys.argv.pop(1), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
answer = run.answer

def counted(model, item):
    os.write(log, (item.id + "\\n").encode())
    return answer(model, item)

run.answer = counted
sys.argv[0] = "internvl-edge"
main()
"""
HALVES = (b'{"id": "0", "answer": "ha', b"{", bytes(64), b'{"id": "')
ITEMS = 60


class Batch:
    """One batch over pictures of the demo, a few of them damaged, run again and again until it is complete."""

    def __init__(self, bundle: Path, folder: Path) -> None:
        self.folder = folder
        self.out = folder / "out.jsonl"
        self.expected: dict[str, str | None] = {}
        questions = demo_questions()
        rows: list[dict[str, Any]] = []
        (folder / "damaged.png").write_bytes(b"no image")
        for number in range(ITEMS):
            asked = questions[number % len(questions)]
            damaged = number % 17 == 5
            image = "damaged.png" if damaged else str(asked.image)
            rows.append({"id": f"item {number}", "images": image, "prompt": f"{asked.question}"})
            self.expected[f"item {number}"] = None if damaged else asked.expected
        (folder / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        self.command = ["batch", str(bundle), str(folder / "in.jsonl"), "-o", str(self.out), "--rows", "3"]
        self.command += ["--threads", "1", "--engine", "onnxruntime", "--max-new-tokens", "16", "--quiet"]

    def finished(self) -> list[str]:
        """Ids of the whole rows, in their order."""
        if not self.out.exists():
            return []
        lines = self.out.read_bytes().splitlines(keepends=True)
        return [json.loads(line)["id"] for line in lines if line.endswith(b"\n")]

    def start(self, number: int) -> tuple[subprocess.Popen[bytes], Path]:
        log = self.folder / f"computed-{number}"
        return subprocess.Popen([sys.executable, "-c", RUN, str(log), *self.command], stderr=subprocess.PIPE), log

    def check_run(self, before: list[str], log: Path) -> None:
        """No row that was finished when a process began is computed by it, and none is lost."""
        computed = log.read_text().split("\n")[:-1] if log.exists() else []
        assert not set(before) & set(computed)
        assert self.finished()[: len(before)] == before

    def check_complete(self) -> None:
        rows = [json.loads(line) for line in self.out.read_text().splitlines()]
        assert sorted(row["id"] for row in rows) == sorted(self.expected)
        assert {row["id"]: row["answer"] for row in rows} == self.expected
        assert {row["id"] for row in rows if row["error"]} == {name for name, text in self.expected.items() if not text}


def kill_at_random(batch: Batch, kills: int, seed: int) -> None:
    """Kill the process at a random row and a random moment after it, add half a line, and go on."""
    choice = random.Random(seed)
    for number in range(kills):
        before = batch.finished()
        process, log = batch.start(number)
        rows = len(before) + choice.choice([0, 0, 1, 1, 2, 3])
        deadline = time.monotonic() + 60
        while process.poll() is None and len(batch.finished()) < rows and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(choice.random() * (2.0 if rows == len(before) else 0.1))
        process.kill()
        process.communicate()
        batch.check_run(before, log)
        if batch.out.exists() and choice.random() < 0.6:
            with batch.out.open("ab") as file:
                file.write(choice.choice(HALVES))
    before = batch.finished()
    process, log = batch.start(kills)
    _, said = process.communicate(timeout=200)
    assert process.returncode == 1, said  # some rows have errors, and they are said
    batch.check_run(before, log)
    batch.check_complete()


def test_two_kills_lose_and_repeat_nothing(bundle: Path, tmp_path: Path) -> None:
    kill_at_random(Batch(bundle, tmp_path), kills=2, seed=1)


@pytest.mark.slow
def test_thirty_kills_lose_and_repeat_nothing(bundle: Path, tmp_path: Path) -> None:
    kill_at_random(Batch(bundle, tmp_path), kills=30, seed=2)


def test_sigterm_keeps_what_is_finished(bundle: Path, tmp_path: Path) -> None:
    batch = Batch(bundle, tmp_path)
    process, log = batch.start(0)
    deadline = time.monotonic() + 100
    while process.poll() is None and len(batch.finished()) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.terminate()
    _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (130, b"interrupted; finished rows are kept; repeat the command to continue\n")
    before = batch.finished()
    assert 4 <= len(before) < ITEMS
    process, log = batch.start(1)
    process.communicate(timeout=200)
    batch.check_run(before, log)
    batch.check_complete()


def test_the_rows_that_are_counted_are_those_that_reach_the_model(bundle: Path, tmp_path: Path) -> None:
    """What the other tests count is counted."""
    batch = Batch(bundle, tmp_path)
    process, log = batch.start(0)
    process.communicate(timeout=200)
    assert sorted(log.read_text().split("\n")[:-1]) == sorted(batch.expected)
    assert os.stat(log).st_size
