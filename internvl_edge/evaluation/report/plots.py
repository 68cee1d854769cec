"""Draw the plots of a report as SVG that takes colors and typeface from the page around it, and so follows its theme.

Each plot is drawn once, for a width between that of a phone and that of a desk. The page scales it: text shrinks by a
tenth on a phone and grows by a quarter on a desk, where the style sheet limits the width. Needs matplotlib.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from internvl_edge.checkpoint.record import LinearReport

from ..divergence import DivergenceSummary, Histogram
from .meaning import LANDMARKS

# Colors that stand for the page's own until the SVG is written: what is drawn with -> CSS.
_INK, _QUIET, _GRID, _ACCENT = "#010101", "#020202", "#030303", "#040404"
_SERIES = tuple(f"#0505{number:02x}" for number in range(1, 9))
_CSS = {_INK: "var(--ink)", _QUIET: "var(--quiet)", _GRID: "var(--line)", _ACCENT: "var(--accent)"} | {
    color: f"var(--series-{number})" for number, color in enumerate(_SERIES, 1)
}
_MARKERS = "osD^vPX*"
# Inches at 72 dots.
_WIDTH = 5.6
# Keys are a closed set of the type checker's, which differs between versions.
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 11.5,
    "text.color": _INK,
    "axes.labelcolor": _QUIET,
    "axes.edgecolor": _GRID,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.linewidth": 0.8,
    "grid.color": _GRID,
    "grid.linewidth": 0.6,
    "xtick.color": _QUIET,
    "ytick.color": _QUIET,
    "xtick.major.pad": 5,
    "xtick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.major.size": 0,
    "ytick.minor.size": 0,
    "lines.linewidth": 1.4,
    "lines.markersize": 3.6,
    "legend.frameon": False,
}
_PLAIN = FuncFormatter(lambda value, place: f"{value:g}")


Value = Callable[[LinearReport], float | None]


@dataclass(frozen=True)
class Plot:
    """One plot: `svg` is an SVG element, and `description` says in words what it shows."""

    svg: str
    description: str


def divergence_plot(histogram: Histogram, summary: DivergenceSummary) -> Plot:
    """Plot how many tokens diverge by how much, with mean and 99th percentile."""

    def draw(axes: Axes) -> None:
        edges, counts = np.array(histogram.edges), np.array(histogram.counts)
        axes.bar(edges[:-1], counts, np.diff(edges), align="edge", color=_ACCENT, edgecolor="none", alpha=0.85)
        axes.set_xscale("log")
        values = [*edges[:-1][counts > 0], *edges[1:][counts > 0], summary.kl_mean, summary.kl_p99]
        shown = [value for value in values if math.isfinite(value)] or list(edges)
        axes.set_xlim(max(edges[0], min(shown) / 2), min(edges[-1], max(shown) * 2))
        axes.grid(axis="x", visible=False)
        for value, label in ((summary.kl_mean, "mean"), (summary.kl_p99, "99 %")):
            if edges[0] < value < edges[-1]:
                axes.axvline(value, color=_INK, linewidth=1, linestyle=(0, (3, 2)))
                axes.text(value, 1.02, label, transform=axes.get_xaxis_transform(), ha="center", va="bottom")
        axes.xaxis.set_major_formatter(_PLAIN)
        axes.set_xlabel("KL divergence at a token, nats")
        axes.set_ylabel("tokens")
        axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))

    described = f"Histogram of the divergence at {summary.positions} tokens; mean {summary.kl_mean:.4g} nats."
    return _plot("divergence", draw, described, height=2.9)


def scale_plot(kl: float) -> Plot | None:
    """Plot a mean divergence beside those of the demo readers; None where it is no number above zero."""
    if not math.isfinite(kl) or kl <= 0:
        return None

    def draw(axes: Axes) -> None:
        for row, mark in enumerate(reversed(LANDMARKS)):
            axes.barh(row, mark.most - mark.least, left=mark.least, height=0.34, color=_ACCENT, alpha=0.85)
            axes.text(0, row + 0.3, mark.kind, transform=axes.get_yaxis_transform(), color=_INK, va="bottom")
        axes.set_xscale("log")
        axes.set_xlim(min(1e-5, kl / 2), max(1, kl * 2))
        axes.set_ylim(-0.5, len(LANDMARKS) - 0.1)
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        axes.grid(axis="y", visible=False)
        axes.axvline(kl, color=_INK, linewidth=1, linestyle=(0, (3, 2)))
        axes.text(kl, 1.01, "this bundle", transform=axes.get_xaxis_transform(), ha="center", va="bottom")
        axes.xaxis.set_major_locator(LogLocator(10))
        axes.xaxis.set_major_formatter(_PLAIN)
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("mean KL divergence, nats")

    return _plot("scale", draw, f"Mean divergence of {kl:.3g} nats beside those of the demo readers.", height=2.6)


def size_plot(points: Sequence[tuple[str, int, float]]) -> Plot | None:
    """Plot (name, bytes on disk, mean divergence in nats) of bundles; None where fewer than two can be drawn."""
    points = [(name, size, kl) for name, size, kl in points if math.isfinite(kl) and kl > 0]
    if len(points) < 2:
        return None

    def draw(axes: Axes) -> None:
        for number, (name, size, kl) in enumerate(points):
            axes.plot(
                size / 1e6, kl, _MARKERS[number % len(_MARKERS)], color=_SERIES[number % len(_SERIES)], markersize=7
            )
            axes.annotate(name, (size / 1e6, kl), (7, 4), textcoords="offset points", color=_INK)
        axes.set_yscale("log")
        axes.set_xlim(0, 1.35 * max(size for _, size, _ in points) / 1e6)
        lowest, highest = min(kl for *_, kl in points), max(kl for *_, kl in points)
        axes.set_ylim(lowest / 3, highest * 3)
        axes.yaxis.set_major_locator(LogLocator(10, (1, 2, 5)))
        axes.yaxis.set_major_formatter(_PLAIN)
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("MB on disk")
        axes.set_ylabel("mean KL divergence, nats")

    return _plot("size", draw, f"Size and mean divergence of {len(points)} bundles.", height=2.9)


def layers_plot(linears: Sequence[LinearReport], value: Value, label: str) -> Plot | None:
    """Plot one line for each kind of linear over the layers; None where no value is known of two layers."""
    series = _by_kind(linears, value)
    if not series:
        return None

    def draw(axes: Axes) -> None:
        for number, (kind, points) in enumerate(series.items()):
            _line(axes, number, points, kind)
        axes.set_ylabel(label)
        _layers(axes, len(series))

    description = f"{label} of each of {len(linears)} linears, by layer."
    return _plot(f"{label} {linears[0].name}", draw, description, height=3.3)


def ranges_plot(linears: Sequence[LinearReport]) -> Plot | None:
    """Plot the largest input of each kind of linear by layer (or what int8 represents), and that of the median channel.

    Kinds that share their input share a line.
    """
    largest = _by_kind(linears, _largest)
    typical = _by_kind(linears, lambda linear: linear.inputs.typical if linear.inputs else None)
    together: dict[tuple[tuple[int, float], ...], list[str]] = {}
    for kind, points in largest.items():
        together.setdefault(tuple(points), []).append(kind)
    if not together:
        return None

    def draw(axes: Axes) -> None:
        for number, (points, kinds) in enumerate(together.items()):
            _line(axes, number, points, ", ".join(kinds))
            if kinds[0] in typical:
                axes.plot(*zip(*typical[kinds[0]], strict=True), ":", color=_SERIES[number % len(_SERIES)])
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(10, (1, 2, 5)))
        axes.yaxis.set_major_formatter(_PLAIN)
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_ylabel("largest |x|")
        _layers(axes, len(together))

    description = f"Ranges of the inputs of {len(linears)} linears, by layer."
    return _plot(f"ranges {linears[0].name}", draw, description, height=3.3)


def _largest(linear: LinearReport) -> float | None:
    return linear.inputs.largest or linear.inputs.clipped_at if linear.inputs else None


def _by_kind(linears: Sequence[LinearReport], value: Value) -> dict[str, list[tuple[int, float]]]:
    """Collect (layer, value) points by kind; nothing where no kind has two."""
    series: dict[str, list[tuple[int, float]]] = {}
    for linear in linears:
        found, (layer, kind) = value(linear), layer_and_kind(linear.name)
        if found is not None and layer is not None:
            series.setdefault(kind.removesuffix("_proj"), []).append((layer, found))
    longest = max(map(len, series.values()), default=0)
    return {kind: sorted(points) for kind, points in series.items()} if longest > 1 else {}


def layer_and_kind(name: str) -> tuple[int | None, str]:
    """Split a canonical name into layer and kind: (3, "down_proj"); no layer outside the towers' blocks."""
    found = re.search(r"\.layers\.(\d+)\.(?:.*\.)?(\w+)$", name)
    return (int(found[1]), found[2]) if found else (None, name)


def _line(axes: Axes, number: int, points: Sequence[tuple[int, float]], label: str) -> None:
    color, marker = _SERIES[number % len(_SERIES)], _MARKERS[number % len(_MARKERS)]
    axes.plot(*zip(*points, strict=True), color=color, marker=marker, label=label)


def _layers(axes: Axes, entries: int) -> None:
    """Set up the axis of layers, and the legend above the plot."""
    axes.set_xlabel("layer")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    spacing = {"borderaxespad": 0.2, "handlelength": 1.3, "columnspacing": 0.75}
    axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=min(entries, 7), **spacing)


def _plot(name: str, draw: Callable[[Axes], None], description: str, height: float) -> Plot:
    with mpl.rc_context({**_STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=(_WIDTH, height), layout="constrained")
        draw(figure.add_subplot())
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, dpi=72, metadata={"Date": None})
    return Plot(_inline(file.getvalue(), re.sub(r"\W+", "-", name)), description)


def _inline(svg: str, prefix: str) -> str:
    """Turn a matplotlib SVG into an element of a page: no document header, no metadata, own ids, the page's colors."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r' (?:xmlns:xlink|xmlns|version)="[^"]*"', "", svg)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*" height="[^"]*"|(<svg[^>]*?) height="[^"]*" width="[^"]*"', r"\1\2", svg)
    used = set(re.findall(r"#([\w.]+)[\")]", svg))
    svg = re.sub(r' id="([^"]*)"', lambda found: f' id="{prefix}-{found[1]}"' if found[1] in used else "", svg)
    svg = re.sub(r'(?:xlink:)?href="#', f'href="#{prefix}-', svg)
    svg = svg.replace("url(#", f"url(#{prefix}-")
    svg = re.sub(r"font-family: [^;\"]*;? ?", "", svg)
    svg = re.sub(r"\s*\n\s*", " ", svg)
    for color, css in _CSS.items():
        svg = svg.replace(color, css)
    return svg.strip()
