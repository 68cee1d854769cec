"""Everything that a comparison with the peers on this CPU needs, from nothing, and the comparison: `make bench-peers`.

    python benchmarks/bench_peers.py BENCH [--only PATTERN]... [--name NAME] [--rows ROWS] [--repeat 3] [--prepare]

BENCH becomes a folder with the peers' environments, a random 1B checkpoint, our bundles of it and the peers' models.
What is there already is left as it is, so a stopped run continues. What is needed is said before anything begins. A
peer whose environment or model cannot be made is left out, with one line that says why; what its tools said is in
BENCH/logs. The end is one run of `cpu_peers.py` (results/cpu-peers-NAME.json; the default name says whether the CPU has
AMX), a summary on the terminal, the same with all tables in BENCH/cpu-peers-NAME.md, and a bar chart beside it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import click
from cpu_peers import PEERS, ROWS
from cpu_peers_chart import chart
from cpu_peers_table import document, read, terminal

from internvl_edge.base.errors import EdgeError
from internvl_edge.base.machine import multiplies_int8_tiles

HERE = Path(__file__).parent
# Our forms: label, bundle of peers/cpu_bundles.sh, and how it is loaded.
OURS = (
    ("int4, int8 head and tower", "int4", "engine=onnxruntime"),
    ("int4, int8 tower and prompts", "int4-prompts", "engine=onnxruntime"),
    ("int4, int8 head and tower, engine openvino", "int4", "engine=openvino"),
)
INT4 = ("*Q4_0*", "*int4*", "transformers*")
# GB on disk and minutes on two cores, as measured.
ENVIRONMENTS = {
    "transformers": (1.0, 2),
    "llama-cpp": (0.5, 12),
    "openvino-genai": (1.4, 3),
    "onnxruntime-genai": (1.1, 2),
}
MODELS = {
    "transformers": (1.3, 1),
    "llama-cpp": (3.6, 3),
    "openvino-genai": (1.5, 5),
    "openvino-genai-int8": (1.3, 3),
    "onnxruntime-genai": (0.9, 3),
}
BUNDLES = {"int4": (1.0, 8), "int4-prompts": (1.3, 8)}
MEASURING_MINUTES = 22
SPARE_GB = 2.0


@dataclass(frozen=True)
class Step:
    """One thing to make, which is there when all of `made` exist; `peer` is the one that cannot go on without it."""

    name: str
    made: tuple[Path, ...]
    command: list[str]
    gigabytes: float
    minutes: float
    peer: str = ""
    needs: tuple[Path, ...] = ()

    @property
    def is_done(self) -> bool:
        return all(path.exists() for path in self.made)


def model_name(label: str) -> str:
    """What peers/cpu_models.sh calls the models of one of PEERS."""
    environment, _, files = PEERS[label]
    return "openvino-genai-int8" if "openvino-int8" in files else environment


def steps(bench: Path, labels: list[str]) -> list[Step]:
    """All steps for some peers, in order. llama.cpp's converter runs in transformers' environment."""
    peers, models, checkpoint, vision = (
        bench / "peers",
        bench / "models",
        bench / "checkpoint",
        bench / "float/vision.onnx",
    )
    found = [
        Step(
            "checkpoint",
            (checkpoint,),
            [sys.executable, str(HERE / "random_checkpoint.py"), "1B", str(checkpoint)],
            1.9,
            1,
        )
    ]
    for name, (gigabytes, minutes) in BUNDLES.items():
        command = [str(HERE / "peers/cpu_bundles.sh"), str(checkpoint), str(bench), name]
        found.append(Step(f"bundle {name}", (bench / name,), command, gigabytes, minutes))
    export = ["internvl-edge", "export", str(checkpoint), "-o", str(vision.parent), "--dialect", "onnxruntime"]
    found.append(Step("bundle float", (vision,), export, 1.9, 1))
    environments = {PEERS[label][0] for label in labels}
    environments |= {"transformers"} if "llama-cpp" in environments else set()
    for name in (each for each in ENVIRONMENTS if each in environments):
        command = [str(HERE / "peers/make_env.sh"), name, str(peers / name)]
        found.append(Step(f"environment {name}", (peers / name / "versions.txt",), command, *ENVIRONMENTS[name], name))
    for name in (each for each in MODELS if each in map(model_name, labels)):
        of_name = [PEERS[label] for label in labels if model_name(label) == name]
        made = tuple(models / file for _, _, files in of_name for file in files)
        command = [str(HERE / "peers/cpu_models.sh"), *map(str, (checkpoint, vision, peers, models)), name]
        used = {of_name[0][0]} | ({"transformers"} if name == "llama-cpp" else set())
        needs = tuple(peers / each / "versions.txt" for each in sorted(used))
        found.append(Step(f"models {name}", made, command, *MODELS[name], name, needs))
    return found


def announce(bench: Path, todo: list[Step]) -> None:
    """Say what will be made, and what that needs.

    Raises:
        EdgeError: there is not so much room.
    """
    free = shutil.disk_usage(bench).free / 1e9
    needed = sum(step.gigabytes for step in todo)
    for step in todo:
        say(f"to do: {step.name}, {step.gigabytes:.1f} GB, about {step.minutes:g} min")
    minutes = sum(step.minutes for step in todo)
    say(f"needs {needed:.1f} GB in {bench} ({free:.1f} GB are free) and about {minutes:g} min")
    say(f"measuring all rows takes about {MEASURING_MINUTES} min, on a machine that does nothing else")
    if needed + SPARE_GB > free:
        expected = f"expected {needed + SPARE_GB:.1f} GB"
        raise EdgeError(f"{bench} has {free:.1f} GB free, {expected}; free some, or choose a folder with BENCH=DIR")


def make(step: Step, logs: Path) -> bool:
    """Run one step; False where it failed, and then a line has been said."""
    absent = [path for path in step.needs if not path.exists()]
    log = logs / f"{step.name.replace(' ', '-')}.log"
    if absent:
        say(f"{step.name}: not made, {absent[0]} is not there")
        return False
    say(f"{step.name} ...")
    # `internvl-edge` and `python3` of the environment that runs this.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    with log.open("w", encoding="utf-8") as lines:
        status = subprocess.run(
            step.command,
            stdin=subprocess.DEVNULL,
            stdout=lines,
            stderr=lines,
            env={**os.environ, "PATH": path},
            check=False,
        ).returncode
    said = log.read_text(encoding="utf-8", errors="replace").splitlines()
    for line in said:
        if line.startswith("note: "):
            say(line)
    if status == 0 and step.is_done:
        return True
    last = next((line.strip() for line in reversed(said) if line.strip()), "it said nothing")
    say(f"{step.name}: failed with status {status}, see {log}: {last[:200]}")
    return False


def say(line: str) -> None:
    print(f"bench-peers: {line}", file=sys.stderr, flush=True)


def prepare(bench: Path, labels: list[str]) -> None:
    """Make what is missing.

    Raises:
        EdgeError: too little room, or a step failed that is not a peer's.
    """
    bench.mkdir(parents=True, exist_ok=True)
    logs = bench / "logs"
    logs.mkdir(exist_ok=True)
    announce(bench, todo := [step for step in steps(bench, labels) if not step.is_done])
    for step in todo:
        if not make(step, logs) and not step.peer:
            raise EdgeError(f"{step.name} could not be made, see {logs}; nothing can be compared without it")


@click.command()
@click.argument("bench", type=click.Path(path_type=Path))
@click.option("--only", multiple=True, default=INT4, show_default=True, help="Pattern of the peers; may be repeated.")
@click.option("--name", default="amx" if multiplies_int8_tiles() else "no-amx", show_default=True)
@click.option("--rows", default=",".join(ROWS), show_default=True)
@click.option("--repeat", type=click.IntRange(min=1), default=3, show_default=True)
@click.option("--prepare", "only_prepare", is_flag=True, help="Make everything, measure nothing.")
def main(bench: Path, only: tuple[str, ...], name: str, rows: str, repeat: int, only_prepare: bool) -> None:
    """Make what is missing, measure, and show the comparison."""
    bench = bench.absolute()
    os.environ.pop(
        "OMP_NUM_THREADS", None
    )  # `make` sets it for tests; here every program says how many threads it takes
    chosen = [label for label in PEERS if any(fnmatch(label, pattern) for pattern in only)]
    try:
        prepare(bench, chosen)
    except EdgeError as error:
        raise click.UsageError(str(error)) from None
    if only_prepare:
        return
    command = [sys.executable, str(HERE / "cpu_peers.py"), str(bench / "peers"), str(bench / "models"), name]
    command += ["--rows", rows, "--repeat", str(repeat)]
    for label, bundle, keyword in OURS:
        command += ["--ours", f"{label}={bench / bundle},{keyword}"]
    for label in chosen:
        command += ["--only", label]
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
    results = f"cpu-peers-{name}"
    report = read(results)
    (bench / f"{results}.md").write_text(document(results, report), encoding="utf-8")
    (bench / f"{results}.svg").write_text(chart(report), encoding="utf-8")
    print(f"{terminal(report)}\n{bench / results}.md, {bench / results}.svg")


if __name__ == "__main__":
    main()
