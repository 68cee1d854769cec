"""`internvl-edge bench` in a fresh process, kept as `results/bench-NAME.json` with machine, versions and commit.

python benchmarks/bench_bundle.py BUNDLE [--repeat 5] [--threads 2] [--dialect standard]
"""

from __future__ import annotations

import json
import sys

from record import run_measured, write_results


def main() -> None:
    """Run the command with the arguments given here and record its JSON."""
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        sys.exit(f"usage: {(__doc__ or '').strip().splitlines()[-1].strip()}")
    program = [sys.executable, "-c", "from internvl_edge.cli import main; main()"]
    run = run_measured([*program, "bench", *sys.argv[1:], "--json"])
    report = json.loads(run.stdout)
    path = write_results(f"bench-{report['bundle']}", report | {"peak_anonymous_bytes": run.peak_anonymous})
    print(path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
