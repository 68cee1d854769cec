"""Time and memory of `internvl-edge export` on a checkpoint, against the limits the project set itself.

    python benchmarks/export_memory.py CHECKPOINT [--dtype float16] [--limit-seconds 60] [--limit-anonymous-gb 1.5]

Anonymous memory is what a machine must really have free; mapped pages of the checkpoint can be dropped at any time.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path

from record import run_measured, write_results


def main() -> None:
    """Export once and write `results/export-NAME-DTYPE.json`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--dtype", default="float16")
    parser.add_argument("--limit-seconds", type=float)
    parser.add_argument("--limit-anonymous-gb", type=float)
    parser.add_argument("--keep", type=Path, help="keep the bundle here")
    arguments = parser.parse_args()
    scratch = Path(tempfile.mkdtemp(dir=arguments.checkpoint.resolve().parent))
    out = arguments.keep or scratch / "bundle"
    program = [sys.executable, "-c", "from internvl_edge.cli import main; main()"]
    try:
        run = run_measured(
            [*program, "export", str(arguments.checkpoint), "-o", str(out), "--dtype", arguments.dtype, "--json"]
        )
    finally:
        shutil.rmtree(scratch)
    figures = {
        "checkpoint": arguments.checkpoint.name,
        "dtype": arguments.dtype,
        "bundle_bytes": json.loads(run.stdout)["bytes"],
        "wall_s": round(run.wall_s, 2),
        "cpu_s": round(run.cpu_s, 2),
        "peak_rss": run.peak_rss,
        "peak_anonymous": run.peak_anonymous,
        "limit_seconds": arguments.limit_seconds,
        "limit_anonymous": arguments.limit_anonymous_gb and int(arguments.limit_anonymous_gb * 1e9),
    }
    path = write_results(f"export-{arguments.checkpoint.name}-{arguments.dtype}", figures)
    print(f"{path}: {run.wall_s:.1f} s, {run.peak_anonymous / 1e9:.2f} GB anonymous")


if __name__ == "__main__":
    main()
