"""A bar chart of one run of cpu_peers.py: cpu_peers_chart.py NAME OUT.svg

One panel for each figure: a bar for each program, as its ratio to the best peer (above 1 is ahead, in times and sizes,
too). The dashed line is the best peer, the dotted one the goal. Colors follow the light or dark scheme of the viewer.
"""

from __future__ import annotations

import sys
from html import escape
from pathlib import Path

from cpu_peers import PEERS
from cpu_peers_table import SIZES, SPEED, Facts, Measure, best_peer, limits_line, read

COLUMNS = 2
# A panel: names, bars and figures side by side.
NAMES, BARS, FIGURES = 262, 150, 88
WIDTH, LINE = NAMES + BARS + FIGURES, 17
GAP, TOP = 24, 70
# Bars end here; what is longer says so by its figure.
MOST = 2.0
STYLE = """
text { font: 11px system-ui, sans-serif; fill: #24292f; }
.title { font-weight: 600; font-size: 13px; } .small { font-size: 10px; fill: #57606a; }
.page { fill: #ffffff; } .ours { fill: #0969da; } .peer { fill: #afb8c1; }
.best { stroke: #24292f; stroke-dasharray: 4 3; } .goal { stroke: #cf222e; stroke-dasharray: 1 3; stroke-width: 2; }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3; } .small { fill: #9198a1; } .page { fill: #0d1117; } .ours { fill: #1f6feb; }
  .peer { fill: #484f58; } .best { stroke: #e6edf3; } .goal { stroke: #ff7b72; }
}
"""


def chart(report: Facts) -> str:
    """The drawing as SVG."""
    measures = [measure for measure in (*SPEED, *SIZES) if best_peer(report, measure)]
    height = 26 + LINE * len(report["programs"])
    rows = -(-len(measures) // COLUMNS)
    width, whole = COLUMNS * (WIDTH + GAP) + GAP, TOP + rows * (height + GAP)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{whole}" viewBox="0 0 {width} {whole}">',
        f"<style>{STYLE}</style>",
        f'<rect class="page" width="{width}" height="{whole}"/>',
        text(GAP, 22, f"Ratio to the best peer, {report['date']}: more is better", "title"),
        text(GAP, 38, f"{report['machine']['cpu']}, {report['threads']} threads; {limits_line(report)}", "small"),
        text(
            GAP,
            52,
            "Blue: this project. Grey: peers. Dashed: the best peer. Dotted: the goal, where it is another.",
            "small",
        ),
    ]
    for index, measure in enumerate(measures):
        line, column = divmod(index, COLUMNS)
        parts += panel(report, measure, GAP + column * (WIDTH + GAP), TOP + line * (height + GAP))
    return "\n".join([*parts, "</svg>\n"])


def panel(report: Facts, measure: Measure, left: int, top: int) -> list[str]:
    """The bars of one figure, our programs first."""
    best = best_peer(report, measure)
    assert best is not None
    parts = [text(left, top + 12, measure.title, "title")]
    start = left + NAMES
    for number, (label, facts) in enumerate(report["programs"].items()):
        y, value = top + 20 + number * LINE, measure.of(facts)
        ratio = measure.ratio(value, best[1]) if value else 0.0
        kind = "peer" if label in PEERS else "ours"
        length = BARS * min(ratio, MOST) / MOST
        said = f"{measure.shown(value)} ({ratio:.2f})" if value else "-"
        parts.append(f'<rect class="{kind}" x="{start}" y="{y}" width="{length:.1f}" height="{LINE - 3}"/>')
        parts.append(text(left, y + 11, label))
        parts.append(text(left + WIDTH, y + 11, said, end=True))
    bottom = top + 20 + LINE * len(report["programs"])
    lines = {"best": 1.0} if measure.absolute else {"best": 1.0, "goal": measure.goal}
    for kind, at in lines.items():
        if kind == "goal" and at == 1.0:
            continue
        x = start + BARS * at / MOST
        parts.append(f'<line class="{kind}" x1="{x:.1f}" x2="{x:.1f}" y1="{top + 18}" y2="{bottom}"/>')
    return parts


def text(x: float, y: float, words: str, kind: str = "", end: bool = False) -> str:
    anchor = ' text-anchor="end"' if end else ""
    return f'<text x="{x:.0f}" y="{y:.0f}" class="{kind}"{anchor}>{escape(words)}</text>'


def main() -> None:
    name, out = sys.argv[1:3]
    Path(out).write_text(chart(read(name)), encoding="utf-8")


if __name__ == "__main__":
    main()
