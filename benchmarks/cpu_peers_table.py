"""The tables of docs/performance.md from what cpu_peers.py wrote: cpu_peers_table.py NAME... | --docs

NAME is a results file without its suffix, such as cpu-peers-int4. `--docs` writes the tables into the page, between
`<!-- cpu-peers: NAME -->` and `<!-- end -->`.

A figure stands with half the range of its runs, in per cent, and with its ratio to the best peer of the same run in
brackets: above 1 is ahead, in times and sizes, too. Quality is looked up by the form of a bundle in what
`reader_quality.py`, `int8_prompts.py` and `smollm_precision.py` wrote.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from cpu_peers import PEERS
from cpu_peers_quality import LAYOUTS, exact_match, quality_source, smollm_kl
from record import RESULTS

Facts = dict[str, Any]
PAGE = RESULTS.parents[1] / "docs" / "performance.md"
_REGION = re.compile(r"(<!-- cpu-peers: (cpu-peers-[\w-]+) -->).*?(<!-- end -->)", re.DOTALL)
# What a question needs: later rows need a longer cache or several of them.
_QUESTION = ("after prefill", "after decode", "after vision", "after first_token")


def _text(facts: Facts) -> float | None:
    """The peak of resident memory before the first tile, in bytes."""
    found: float | None = facts["memory"].get("after decode", {}).get("resident")
    return found


def _all(facts: Facts) -> float | None:
    """The peak of resident memory after tiles; None for a program that has no tower."""
    peaks = [peak["resident"] for name, peak in facts["memory"].items() if name in _QUESTION]
    return max(peaks) if peaks and _has_tower(facts) else None


def _has_tower(facts: Facts) -> bool:
    return "vision 1" in facts["rows"] or "first_token 7" in facts["rows"]


@dataclass(frozen=True)
class Measure:
    """One figure of a program: its name in results, its title, how it reads, and what the project wants of it.

    `heading` is the title where the column before it says the rest. `goal` is a ratio to the best peer, or the figure
    itself where `absolute`.
    """

    name: str
    title: str
    heading: str
    of: Callable[[Facts], float | None]
    more_is_better: bool
    goal: float
    absolute: bool = False
    digits: int = 2
    scale: float = 1.0

    def ratio(self, value: float, best: float) -> float:
        return value / best if self.more_is_better else best / value

    def best(self, values: list[float]) -> float:
        return max(values) if self.more_is_better else min(values)

    def shown(self, value: float) -> str:
        value *= self.scale
        return f"{value:.0f}" if value >= 100 else f"{value:.{self.digits}f}"


def _rate(name: str, title: str, heading: str, goal: float) -> Measure:
    def of(facts: Facts) -> float | None:
        return facts["rows"].get(name, {}).get("tokens_per_s")

    return Measure(name, f"{title}, tokens/s", heading, of, True, goal, digits=1)


def _time(name: str, title: str) -> Measure:
    return Measure(name, title, title, lambda facts: facts["rows"].get(name, {}).get("s"), False, 1.0)


def _size(name: str, title: str, heading: str, of: Callable[[Facts], float | None]) -> Measure:
    return Measure(name, title, heading, of, False, 1.0, scale=1e-9)


SPEED = (
    _rate("prefill 300", "prefill of 300", "prefill 300, tokens/s", 1.3),
    _rate("prefill 1800", "prefill of 1800", "1800", 1.3),
    _rate("decode 300", "decode at 300", "decode at 300, tokens/s", 1.25),
    _rate("decode 2000", "decode at 2000", "at 2000", 1.25),
    _rate("decode 8000", "decode at 8000", "at 8000", 1.25),
    _rate("rows 4", "decode, 4 rows at 300", "4 rows at 300", 1.25),
    _time("vision 1", "tile, s"),
    _time("first_token 7", "7 tiles + 300 tokens, s"),
)
SIZES = (
    Measure("load", "load, s", "load, s", lambda facts: facts["load_s"]["median"], False, 0.5, absolute=True),
    _size("memory text", "memory, text, GB", "memory, text, GB", _text),
    _size("memory all", "memory with tiles, GB", "with tiles, GB", _all),
    _size("disk", "on disk, GB", "on disk, GB", lambda facts: facts["disk_bytes"] if _has_tower(facts) else None),
)


def best_peer(report: Facts, measure: Measure) -> tuple[str, float] | None:
    """The peer that is best at something, and its figure."""
    values = {label: measure.of(facts) for label, facts in report["programs"].items() if label in PEERS}
    known = {label: value for label, value in values.items() if value}
    if not known:
        return None
    best = measure.best(list(known.values()))
    return next(label for label, value in known.items() if value == best), best


def table(report: Facts) -> str:
    """Markdown: one program a line, all figures with their ratio, and what the dashes mean."""
    programs = report["programs"]
    measures = [m for m in (*SPEED, *SIZES) if any(m.of(facts) for facts in programs.values())]
    best = {measure.name: best_peer(report, measure) for measure in measures}
    has_forms = any("form" in facts for facts in programs.values())
    quality = [f"exact answers, {' / '.join(LAYOUTS)}", "KL of SmolLM2"] if has_forms else []
    head = ["program", *(measure.heading for measure in measures), *quality]
    lines = [head, ["---"] * len(head)]
    for label, facts in programs.items():
        cells = [_cell(facts, measure, best[measure.name]) for measure in measures]
        known = [exact_match(facts["form"]), smollm_kl(facts["form"])] if "form" in facts else ["-", "-"]
        lines.append([_name(label, facts), *cells, *(known if has_forms else [])])
    return "\n\n".join(part for part in (markdown(lines), notes(report), limit_table(report)) if part)


def _name(label: str, facts: Facts) -> str:
    return f"{label} (failed at {facts['failed']})" if "failed" in facts else label


def _cell(facts: Facts, measure: Measure, best: tuple[str, float] | None) -> str:
    value = measure.of(facts)
    if not value:
        return "-"
    row = facts["rows"].get(measure.name)
    spread = f" ± {row['spread']:.0%}" if row else ""
    ratio = f" ({measure.ratio(value, best[1]):.2f})" if best else ""
    return f"{measure.shown(value)}{spread}{ratio}"


def limit_table(report: Facts) -> str:
    """Shares of what the machine allows."""
    head = ["share of the limit", "decode at 300", "at 2000", "at 8000", "prefill 300: int8 / float32", "1800", "tile"]
    lines = [head, ["---"] * len(head)]
    work = next((facts["operations"] for facts in report["programs"].values() if "operations" in facts), {})
    for label, facts in report["programs"].items():
        cells = [_decode_share(report, facts, f"decode {count}") for count in (300, 2000, 8000)]
        cells += [
            _matrix_share(report, facts, name, work.get(name)) for name in ("prefill 300", "prefill 1800", "vision 1")
        ]
        lines.append([label, *cells])
    return markdown(lines) if work else ""


def _decode_share(report: Facts, facts: Facts, name: str) -> str:
    rate, read = facts["rows"].get(name, {}).get("tokens_per_s"), facts.get("token_bytes", {}).get(name)
    return f"{rate * read / report['read_bandwidth']:.0%}" if rate and read else "-"


def _matrix_share(report: Facts, facts: Facts, name: str, operations: float | None) -> str:
    row = facts["rows"].get(name)
    if not row or not operations:
        return "-"
    seconds = row.get("s") or int(name.split()[1]) / row["tokens_per_s"]
    rates = [report[kind] for kind in ("int8_matrix_rate", "float32_matrix_rate") if kind in report]
    return " / ".join(f"{operations / seconds / rate:.0%}" for rate in rates)


def notes(report: Facts) -> str:
    """Where the quality comes from, and why something is missing: one line each."""
    found = [f"{label}: quality of {quality_source(facts['form'])}." for label, facts in report["programs"].items()
             if "form" in facts]  # fmt: skip
    found += [f"{label}: {facts['cannot']}." for label, facts in report["programs"].items() if facts.get("cannot")]
    found += [f"{label} was left out: {why}." for label, why in report.get("missing", {}).items()]
    return "\n".join(f"* {line}" for line in found)


def summary(report: Facts) -> list[list[str]]:
    """One measure a line: the best peer, the ratio of each of our programs to it, and the goal."""
    ours = {label: facts for label, facts in report["programs"].items() if label not in PEERS}
    lines = [["measure", "best peer", "its figure", *ours, "goal"]]
    for measure in (*SPEED, *SIZES):
        if (best := best_peer(report, measure)) is None:
            continue
        cells = []
        for facts in ours.values():
            value = measure.of(facts)
            cells.append(f"{measure.ratio(value, best[1]):.2f} ({measure.shown(value)})" if value else "-")
        goal = f"{measure.goal:g} s" if measure.absolute else f"{measure.goal:g}"
        lines.append([measure.title, best[0], measure.shown(best[1]), *cells, goal])
    return lines


def limits_line(report: Facts) -> str:
    """What the machine was measured to do at best."""
    rates = {"float32_matrix_rate": "TFLOP/s in float32", "int8_matrix_rate": "TOP/s in int8"}
    found = [f"reads {report['read_bandwidth'] / 1e9:.1f} GB/s"]
    found += [f"multiplies {report[name] / 1e12:.2f} {unit}" for name, unit in rates.items() if name in report]
    return ", ".join(found)


def markdown(lines: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def terminal(report: Facts) -> str:
    """The summary for a terminal: columns of equal width, our programs by number."""
    (*first, last), *body = summary(report)
    ours = first[3:]
    numbers = [f"[{number}]" for number in range(1, len(ours) + 1)]
    legend = [f"{number} {label}" for number, label in zip(numbers, ours, strict=True)]
    return "\n".join([f"It {limits_line(report)}.", *legend, _aligned([[*first[:3], *numbers, last], *body])])


def _aligned(lines: list[list[str]]) -> str:
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def read(name: str) -> Facts:
    found: Facts = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return found


def document(name: str, report: Facts) -> str:
    """Everything about one run, in Markdown."""
    head, *body = summary(report)
    short = markdown([head, ["---"] * len(head), *body])
    link = f"[{name}.json](../benchmarks/results/{name}.json)"
    machine = f"{report['machine']['cpu']}, {report['threads']} threads; it {limits_line(report)}"
    return f"Results: {link} of {report['date']}, commit {report['commit']}. {machine}.\n\n{short}\n\n{table(report)}\n"


def with_tables(page: str) -> str:
    """A page with the tables of the results that its comments name."""
    return _REGION.sub(lambda found: f"{found[1]}\n\n{document(found[2], read(found[2]))}\n{found[3]}", page)


def main() -> None:
    if sys.argv[1:] == ["--docs"]:
        PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
        return
    for name in sys.argv[1:]:
        print(document(name, read(name)))


if __name__ == "__main__":
    main()
