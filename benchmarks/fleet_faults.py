"""Kill workers, a node and the driver of a batch on a Ray cluster, and count what the output then holds.

    python benchmarks/fleet_faults.py BUNDLE WORK [--images 2000] [--damaged 6]

Ray's own cluster of several nodes runs on this machine: a head and two nodes, each with two logical CPUs. In one run
over generated images, the last node joins, two workers get SIGKILL, a node is removed, and the driver gets SIGKILL; the
same command then runs again at once, and a worker is killed once more. Before that, the head alone is asked, which has
no spare CPU, and more workers than fit. WORK must be empty.
Results: benchmarks/results/fleet-faults.json: rows, distinct ids, errors, rows that were computed in all and those
computed again, and how often the command went on by itself after Ray had lost something.
"""

from __future__ import annotations

import json
import os
import random
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click
import numpy as np
from PIL import Image
from record import write_results

NODES, CPUS, WORKERS = 3, 2, "2:4"
# Shares of the images after which a node joins and something is killed, in the first run and in the second.
NODE_JOINS = 0.05
WORKER_KILLS, NODE_REMOVED, DRIVER_KILLED, SECOND_RUN_KILL = (0.1, 0.25), 0.4, 0.55, 0.75
PATIENCE_S = 1800.0
NODE: dict[str, Any] = {"num_cpus": CPUS, "object_store_memory": 100 << 20}
# Where Ray puts its sockets. Their paths have 60 characters more, and 107 in all are allowed.
SOCKETS = "/tmp"


def draw(folder: Path, count: int, damaged: int) -> set[str]:
    """Write images, of which some end in the middle of their file. Returns the names of these."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    broken = {f"{number:05}.png" for number in random.Random(0).sample(range(count), damaged)}
    for number in range(count):
        path = folder / f"{number:05}.png"
        Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)).save(path)
        if path.name in broken:
            path.write_bytes(path.read_bytes()[:60])
    return broken


class Run:
    """One process of the command `batch`, and what its workers reported so far."""

    def __init__(self, command: list[str], output: Path, log: Path) -> None:
        self._work = output / "_batch" / "computed"
        self._before = set(self._reports())
        with log.open("w") as file:
            self.process = subprocess.Popen(command, stdout=file, stderr=file)

    def _reports(self) -> list[Path]:
        return sorted(self._work.glob("*.json"))

    def reports(self) -> list[dict[str, Any]]:
        """Return what workers of this run reported, one for each block."""
        new = [path for path in self._reports() if path not in self._before]
        return [json.loads(path.read_text(encoding="utf-8")) for path in new]

    def wait_for(self, rows: int) -> None:
        """Wait until so many rows are computed, or the command has ended."""
        ends = time.monotonic() + PATIENCE_S
        while self.process.poll() is None and sum(each["items"] for each in self.reports()) < rows:
            if time.monotonic() > ends:
                raise TimeoutError(f"{rows} rows were not reached")
            time.sleep(0.5)

    def workers(self) -> int:
        """Return how many workers that reported still live."""
        return sum(map(is_ray_worker, {pid_of(each) for each in self.reports()}))

    def kill_worker(self) -> str:
        """Send SIGKILL to the worker that reported last and still lives."""
        while self.process.poll() is None:
            for each in reversed(self.reports()):
                if is_ray_worker(pid_of(each)):
                    os.kill(pid_of(each), signal.SIGKILL)
                    return str(each["worker"])
            time.sleep(0.5)
        raise LookupError("the command ended before a worker could be killed; see the logs in WORK")


def pid_of(report: dict[str, Any]) -> int:
    """Return the process of the worker that wrote a report."""
    return int(report["worker"].rsplit("-", 1)[1])


def is_ray_worker(pid: int) -> bool:
    """Whether a process is an actor of Ray Data."""
    try:
        return b"MapWorker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def output_counts(output: Path) -> dict[str, Any]:
    """Count the rows of an output, the ids, and the ids with errors; a block that is not committed has no rows."""
    from pyarrow import parquet

    files = sorted(output.glob("*.parquet"))
    pending = tuple(path.name.split(".")[0] for path in (output / "_batch" / "checkpoint").glob("*.pending.parquet"))
    files = [path for path in files if not path.name.startswith(pending)]
    tables = [parquet.read_table(path, columns=["id", "error"]) for path in files]
    rows = [row for table in tables for row in table.to_pylist()]
    counts = Counter(row["id"] for row in rows)
    return {
        "files": len(tables),
        "rows": len(rows),
        "distinct_ids": len(counts),
        "ids_more_than_once": sum(count > 1 for count in counts.values()),
        "errors": sorted(row["id"] for row in rows if row["error"] is not None),
    }


def refusal(command: list[str]) -> dict[str, Any]:
    """Run a command that must be refused. Returns its exit status, what it said and how long it took."""
    began = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=PATIENCE_S)
    return {"exit": done.returncode, "said": done.stderr.strip(), "seconds": time.monotonic() - began}


def faults(bundle: Path, work: Path, images: int, damaged: int, add_cluster: Callable[[], Any]) -> dict[str, Any]:
    """Run the batch with all faults, and return the counts."""
    broken = draw(work / "images", images, damaged)
    output = work / "out"
    with ExitStack() as stack:
        cluster = add_cluster()
        stack.callback(cluster.shutdown)

        def begin(name: str) -> Run:
            run = Run(command, output, work / f"{name}.log")
            stack.callback(run.process.kill)
            return run

        command = [sys.executable, "-m", "internvl_edge", "batch", str(bundle), str(work / "images")]
        command += ["-o", str(output), "--prompt", "What is this?", "--max-new-tokens", "4", "--max-tiles", "1"]
        command += ["--ray", cluster.address, "--quiet", "--json"]
        refused = {"no spare CPU": refusal(command)}
        for _ in range(NODES - 2):
            cluster.add_node(**NODE)
        refused["more workers than fit"] = refusal([*command, "--workers", str(NODES * CPUS)])

        command += ["--workers", WORKERS]
        killed: list[str] = []
        first = begin("first")
        first.wait_for(int(NODE_JOINS * images))
        workers = {"before a node joined": first.workers()}
        joined = cluster.add_node(**NODE)
        for share in WORKER_KILLS:
            first.wait_for(int(share * images))
            killed.append(first.kill_worker())
        first.wait_for(int(NODE_REMOVED * images))
        workers["before a node was removed"] = first.workers()
        cluster.remove_node(joined, allow_graceful=False)
        first.wait_for(int(DRIVER_KILLED * images))
        first.process.kill()
        first.process.wait()
        computed = {"first run": sum(each["items"] for each in first.reports())}
        after_kill = output_counts(output)

        second = begin("second")
        second.wait_for(int(SECOND_RUN_KILL * images) - computed["first run"])
        killed.append(second.kill_worker())
        second.process.wait(PATIENCE_S)
        computed["second run"] = sum(each["items"] for each in second.reports())
        said = (work / "second.log").read_text(encoding="utf-8")

        third = begin("third")
        third.process.wait(PATIENCE_S)
        computed["third run"] = sum(each["items"] for each in third.reports())
    counts = output_counts(output)
    summary = {name: value for name, value in json.loads(said.splitlines()[-1]).items() if name != "output"}
    return {
        "images": images,
        "damaged": sorted(broken),
        "cluster": {"nodes": NODES, "cpus_per_node": CPUS, "workers": WORKERS},
        "killed": {"workers": len(killed), "nodes": 1, "drivers": 1},
        "refused": refused,
        "workers_alive": workers,
        "after_the_driver_was_killed": {name: after_kill[name] for name in ("files", "rows", "distinct_ids")},
        "computed": computed,
        "computed_again": sum(computed.values()) - images,
        "output": counts,
        "errors_are_the_damaged": counts["errors"] == sorted(broken),
        "exit_of_second_run": second.process.returncode,
        "second_run_said": summary,
        "exit_of_third_run": third.process.returncode,
    }


def patient(get_node: Callable[..., Any]) -> Callable[..., Any]:
    """Wait longer for a node that begins: Ray takes one for lost that did not register within 30 seconds."""

    def get(*arguments: Any, **options: Any) -> Any:
        ends = time.monotonic() + PATIENCE_S
        while True:
            try:
                return get_node(*arguments, **options)
            except RuntimeError:
                if time.monotonic() > ends:
                    raise
                time.sleep(0.5)

    return get


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path, exists=True))
@click.argument("work", type=click.Path(path_type=Path))
@click.option("--images", default=2000)
@click.option("--damaged", default=6)
@click.option("--results", type=click.Path(path_type=Path), help="File of the results.  [default: beside the others]")
def main(bundle: Path, work: Path, images: int, damaged: int, results: Path | None) -> None:
    """Run all faults and write the counts."""
    work = work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    os.environ |= {"XDG_CACHE_HOME": str(work / "cache"), "OMP_NUM_THREADS": "1"}
    # The cluster listens on an address of this machine that others may reach, so it asks for a token.
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_USAGE_STATS_ENABLED": "0"}
    # Workers and nodes start slowly if all nodes are one machine.
    os.environ |= {"RAY_worker_register_timeout_seconds": "600", "RAY_agent_register_timeout_ms": "600000"}
    with tempfile.TemporaryDirectory(prefix="ray-", dir=SOCKETS, ignore_cleanup_errors=True) as sockets:
        os.environ["RAY_TMPDIR"] = sockets  # before Ray is imported
        from ray._private import services
        from ray.cluster_utils import Cluster

        services.get_node = patient(services.get_node)

        def add_cluster() -> Any:
            return Cluster(initialize_head=True, head_node_args={**NODE, "include_dashboard": False})

        found = faults(bundle.resolve(), work, images, damaged, add_cluster)
    if results:
        results.write_text(json.dumps(found, indent=2), encoding="utf-8")
    else:
        write_results("fleet-faults", found)
    counts = found["output"]
    if not found["errors_are_the_damaged"] or not counts["rows"] == counts["distinct_ids"] == images:
        raise click.ClickException("the output is not what it must be; see the results")


if __name__ == "__main__":
    main()
