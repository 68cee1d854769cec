"""What `plan` says about the published sizes on Jetson boards and RTX cards: memory, what fits, what a build needs.

    python benchmarks/plan_table.py

Counts from shapes alone, for a context of 4096 tokens and 12 tiles; nothing is measured. Writes results/plan-table.json
and prints the tables of docs/jetson.md and docs/rtx.md.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from checkpoint_variants import VARIANTS
from record import write_results
from tensorrt_host_path import configuration

from internvl_edge.planning.devices import Devices
from internvl_edge.planning.footprint import RECIPES
from internvl_edge.planning.planner import make_plan

SIZES = ("1B", "2B", "4B", "8B")
RECIPES_SHOWN = ("w4a16, int8 head and vision", "w8a16", "fp16")
BOARDS = ("orin-nano-8gb", "orin-nx-16gb", "agx-orin-32gb", "thor")
CARDS = ("rtx-4050-laptop", "rtx-4060", "rtx-3060", "rtx-4090")
CONTEXT, TILES = 4096, 12


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        configs = {size: configuration(size, Path(folder) / size) for size in SIZES if size in VARIANTS}
    rows = []
    for size, config in configs.items():
        for recipe in RECIPES_SHOWN:
            for name in (*BOARDS, *CARDS):
                device = Devices().device(name)
                plan = make_plan(config, device, recipe, RECIPES[recipe], context=CONTEXT, max_tiles=TILES)
                memory = plan.memory
                rows.append(
                    {
                        "model": size,
                        "recipe": recipe,
                        "device": name,
                        "bytes": memory.total,
                        "usable": device.usable_memory,
                        "fits": plan.fits,
                        "build_bytes": plan.build_bytes,
                    }
                )
    write_results("plan-table", {"context": CONTEXT, "tiles": TILES, "rows": rows})
    for devices in (BOARDS, CARDS):
        print_table(rows, devices)


def print_table(rows: list[dict[str, Any]], devices: tuple[str, ...]) -> None:
    """Markdown: GB on the device, bold where it does not fit, and GB for a build."""
    usable = {row["device"]: row["usable"] / 1e9 for row in rows}
    heads = [f"{name} ({usable[name]:.1f} GB)" for name in devices]
    print(f"\n| model | recipe | {' | '.join(heads)} | build |")
    print("|---|---|" + "---|" * (len(devices) + 1))
    for size in SIZES:
        for recipe in RECIPES_SHOWN:
            found = {row["device"]: row for row in rows if (row["model"], row["recipe"]) == (size, recipe)}
            if not found:
                continue
            cells = [_cell(found[name]) for name in devices]
            builds = [found[name]["build_bytes"] / 1e9 for name in devices if found[name]["fits"]] or [0.0]
            low, high = f"{min(builds):.1f}", f"{max(builds):.1f}"
            build = f"{low} GB" if low == high else f"{low} to {high} GB"
            print(f"| {size} | {recipe} | {' | '.join(cells)} | {build} |")


def _cell(row: dict[str, Any]) -> str:
    text = f"{row['bytes'] / 1e9:.1f} GB"
    return text if row["fits"] else f"**no**, {text}"


if __name__ == "__main__":
    main()
