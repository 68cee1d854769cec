"""The tables of docs/performance.md from what cpu_peers.py wrote: cpu_peers_table.py [NAME]..., default all.

A figure stands with half the range of its runs, in per cent.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from record import RESULTS

COLUMNS = {
    "prefill 300": "prefill 300, tokens/s",
    "prefill 1800": "1800",
    "decode 300": "decode at 300, tokens/s",
    "decode 2000": "at 2000",
    "vision 1": "tile, s",
    "first_token 7": "7 tiles + 300 tokens, s",
}


def table(report: dict[str, Any]) -> str:
    """Markdown, one program a line."""
    programs = report["programs"]
    names = [name for name in COLUMNS if any(name in facts["rows"] for facts in programs.values())]
    head = ["program", *(COLUMNS[name] for name in names), "load, s", "memory, text / all", "on disk"]
    lines = [head, ["---"] * len(head)]
    for label, facts in programs.items():
        label = f"{label} (failed at {facts['failed']})" if "failed" in facts else label
        lines.append([label, *(figure(facts["rows"].get(name)) for name in names), *sizes(facts)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def figure(row: dict[str, Any] | None) -> str:
    if row is None:
        return "-"
    value = row.get("tokens_per_s") or row["s"]
    return f"{value:.0f} ± {row['spread']:.0%}" if value >= 30 else f"{value:.2f} ± {row['spread']:.0%}"


def sizes(facts: dict[str, Any]) -> list[str]:
    """Loading, resident memory at its peak before and after tiles, bytes on disk."""
    peaks = [peak["resident"] / 1e9 for name, peak in facts["memory"].items()]
    text = facts["memory"].get("after decode", {}).get("resident")
    before = f"{text / 1e9:.2f}" if text else "-"
    load = facts["load_s"]["median"]
    return [
        "-" if load is None else f"{load:.2f}",
        f"{before} / {max(peaks):.2f} GB" if peaks else "-",
        f"{facts['disk_bytes'] / 1e9:.2f} GB",
    ]


def main() -> None:
    for name in sys.argv[1:] or sorted(path.stem for path in RESULTS.glob("cpu-peers-*.json")):
        report = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
        print(f"{name}: reads {report['read_bandwidth'] / 1e9:.1f} GB/s\n\n{table(report)}\n")


if __name__ == "__main__":
    main()
