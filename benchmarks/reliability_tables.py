"""The tables of docs/reliability.md from what fuzz.py, kills.py, soak.py and warm_cold.py wrote.

python benchmarks/reliability_tables.py
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import Any

from record import RESULTS

COUNTS = ("inputs", "read", "refused", "bugs")


def main() -> None:
    """Print a table for each result that is there."""
    for name, rows in TABLES.items():
        path = RESULTS / f"{name}.json"
        if path.exists():
            report = json.loads(path.read_text(encoding="utf-8"))
            print(f"{name}, commit {report['commit']}, {report['date']}\n\n{markdown(rows(report))}\n")


def markdown(rows: Iterable[list[Any]]) -> str:
    head, *body = rows
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in (head, ["---"] * len(head), *body))


def fuzz(report: dict[str, Any]) -> Iterable[list[Any]]:
    yield ["reader", "inputs", "read", "refused", "bugs", "mean, ms", "slowest, ms", "largest rise of the peak, MB"]
    for name, row in report["parsers"].items():
        mean = f"{1000 * row['cpu_s'] / row['inputs']:.2f}"
        most = row.get("most_memory_mb", {"value": 0})["value"]
        counts = [f"{row[kind]:,}" for kind in COUNTS]
        yield [name, *counts, mean, f"{row['slowest_ms']['value']:.0f}", most]
    counts = [f"{sum(row[kind] for row in report['parsers'].values()):,}" for kind in COUNTS]
    yield ["all", *counts, "", "", ""]


def kills(report: dict[str, Any]) -> Iterable[list[Any]]:
    yield ["command", "SIGKILL", "SIGTERM", "left: nothing", "left: the old one", "left: the whole new one", "wrong"]
    for name, row in report["commands"].items():
        signals = [row["kills"].get(kind, 0) for kind in ("SIGKILL", "SIGTERM")]
        left = [row["left_under_the_name"].get(kind, 0) for kind in ("nothing", "the old one", "the new one")]
        yield [name, *signals, *left, len(row["differences"])]


def soak(report: dict[str, Any]) -> Iterable[list[Any]]:
    yield [
        "engine",
        "minutes",
        "requests",
        "wrong",
        "MB, warm",
        "MB at the end",
        "growth, MB",
        "descriptors",
        "threads",
    ]
    for name, row in report["engines"].items():
        warm = next(one for one in row["samples"] if one["seconds"] >= 12 * row["minutes"])
        ends = [" to ".join(map(str, row[kind])) for kind in ("descriptors", "threads")]
        total = f"{sum(row['requests'].values()):,}"
        memory = [warm["rss_mb"], row["samples"][-1]["rss_mb"], row["growth_mb"]]
        yield [name, f"{row['minutes']:g}", total, row["wrong"], *memory, *ends]


def warm_cold(report: dict[str, Any]) -> Iterable[list[Any]]:
    yield [
        "engine and bundle",
        "conversations",
        "turns",
        "other tokens",
        "other logits",
        "largest difference",
        "used again",
    ]
    for name, row in report["rows"].items():
        different = [row["turns_with_other_tokens"], row["turns_with_other_logits"]]
        largest = f"{row['largest_difference_of_first_logits']:.2g}"
        yield [name, row["conversations"], f"{row['turns']:,}", *different, largest, f"{row['share_used_again']:.0%}"]


TABLES: dict[str, Callable[[dict[str, Any]], Iterable[list[Any]]]] = {
    "fuzz": fuzz,
    "kills": kills,
    "soak": soak,
    "warm-cold": warm_cold,
}

if __name__ == "__main__":
    main()
