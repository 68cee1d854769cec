"""Give every reader mutants, a million in all: each is read, or refused by one line. Everything else is a bug.

    python tests/fuzz.py WORK [--inputs 1000000] [--seed 0]

WORK keeps counts and bugs, and a run continues where it was. An input follows from seed, parser and number alone; a
bug's file in WORK holds its parts and the traceback. Results: benchmarks/results/fuzz.json, for each parser how many
were read and refused, the bugs, the mean and the slowest time, and the input after which the peak of memory rose most.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import sys
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

from record import write_results

from helpers.mutations import memory_folder, outcome, peak_mb
from helpers.parsers import PARSERS, Files, Parser

# Shares of the inputs, in thousandths.
SHARES = {
    "config.json": 150,
    "safetensors header": 220,
    "safetensors index": 90,
    "manifest.json": 100,
    "images": 90,
    "engine.json": 80,
    "tokenizer files": 10,
    "recipe TOML": 70,
    "device TOML": 30,
    "calibration JSONL": 40,
    "suites": 30,
    "batch table": 20,
    "batch journal": 20,
    "arguments": 10,
    "work state": 40,
}
SAVED_EVERY = 2000
KEPT_BUGS = 20


def main() -> None:
    """Run the rest of the inputs and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--inputs", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    warnings.simplefilter("ignore")
    state = options.work / f"seed-{options.seed}.json"
    rows: dict[str, dict[str, Any]] = json.loads(state.read_text(encoding="utf-8")) if state.exists() else {}
    for name in PARSERS:
        count = options.inputs * SHARES[name] // sum(SHARES.values())
        row = rows.setdefault(name, {"inputs": 0, "read": 0, "refused": 0, "bugs": 0, "cpu_s": 0.0})
        with memory_folder() as folder:
            made = PARSERS[name](folder)
            while row["inputs"] < count:
                last = min(count, row["inputs"] + SAVED_EVERY)
                for number in range(row["inputs"], last):
                    attempt(made, name, number, options.seed, row, options.work)
                row["inputs"] = last
                state.write_text(json.dumps(rows), encoding="utf-8")
        print(name, json.dumps(row), flush=True)
    total = sum(row["inputs"] for row in rows.values())
    bugs = sum(row["bugs"] for row in rows.values())
    write_results("fuzz", {"seed": options.seed, "inputs": total, "bugs": bugs, "parsers": rows})
    sys.exit(bool(bugs))


def attempt(parser: Parser, name: str, number: int, seed: int, row: dict[str, Any], work: Path) -> None:
    """Make one mutant and read it."""
    files = parser.mutant(random.Random(f"{seed}/{name}/{number}"))
    peak, started = peak_mb(), time.process_time()
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
            _, line = outcome(lambda: parser.read(files), parser.seconds, parser.memory_mb)
        row["read" if line is None else "refused"] += 1
    except (Exception, SystemExit):
        row["bugs"] += 1
        if row["bugs"] <= KEPT_BUGS:
            keep(work, name, number, files)
    took = time.process_time() - started
    rose = peak_mb() - peak
    size = sum(len(content or b"") for content in files.values())
    row["cpu_s"] = round(row["cpu_s"] + took, 6)
    for kind, value in (("slowest_ms", round(1000 * took, 3)), ("most_memory_mb", round(rose, 1))):
        if value > row.get(kind, {"value": 0})["value"]:
            row[kind] = {"value": value, "number": number, "bytes": size}


def keep(work: Path, name: str, number: int, files: Files) -> None:
    """Write the parts of an input and what it raised."""
    parts = "".join(f"{part}: {content!r}\n" for part, content in files.items())
    (work / f"{name.replace(' ', '-')}-{number}.txt").write_text(f"{traceback.format_exc()}\n{parts}", encoding="utf-8")


if __name__ == "__main__":
    main()
