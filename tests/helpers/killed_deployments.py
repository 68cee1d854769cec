"""Deployments of one checkpoint that are killed at chosen moments, in processes that share one import of torch.

A moment is a file or a folder that gets its name: "checkpoint#1" is the first time that this name is given, and
"-checkpoint#1" is just before it. The run record is constant here, so that two runs make equal bytes.

    python killed_deployments.py CHECKPOINT DATA FOLDER MOMENT...

prints one line of JSON: the moments of an uninterrupted run, and for each MOMENT (all without any) what differs after a
kill and a second start.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from internvl_edge.base import folders
from internvl_edge.base.run_record import RunRecord
from internvl_edge.calibration import DataOptions
from internvl_edge.deployment import Request, Stage, deploy
from internvl_edge.evaluation import evaluator
from internvl_edge.recipe.files import make_recipe

RECIPE = {"decoder": "w4a16-awq", "group_size": 32, "lm_head": "int8", "vision": "int8"}


def request(checkpoint: Path, data: Path, output: Path) -> Request:
    recipe = make_recipe(RECIPE)
    return Request(str(checkpoint), output, "cpu", recipe=recipe, data=DataOptions(data, max_tiles=2))


def contents(folder: Path) -> dict[str, bytes]:
    """Every file by its path. What a stage took is not part of what it made."""
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    found = {name: path.read_bytes() for name, path in files.items()}
    state = json.loads(found["deployment.json"])
    for entry in state["stages"].values():
        entry |= {"seconds": 0, "before": ""}
    return found | {"deployment.json": json.dumps(state).encode()}


def main() -> None:
    checkpoint, data, folder, *moments = sys.argv[1:]
    _freeze()
    whole = Path(folder, "whole")
    seen: list[str] = []
    _watch(seen.append)
    stages: list[Stage] = []
    deploy(request(Path(checkpoint), Path(data), whole), said=lambda number, stage: stages.append(stage))
    expected, names = contents(whole), list(seen)
    counted = [f"{name}#{names[: index + 1].count(name)}" for index, name in enumerate(names)]
    results: dict[str, Any] = {}
    for text in moments or [sign + moment for moment in counted for sign in ("-", "")]:
        number = counted.index(text.removeprefix("-")) + 1
        out = Path(folder, f"killed{text}")
        killed = _in_child(partial(_killed, checkpoint, data, out, -number if text.startswith("-") else number))
        finished = _in_child(partial(_finished, checkpoint, data, out))
        after = contents(out) if finished == 0 else {}
        different = sorted(name for name in {**expected, **after} if expected.get(name) != after.get(name))
        beside = sorted(path.name for path in Path(folder).iterdir() if path.name.startswith(f".killed{text}"))
        kept = json.loads(Path(folder, "kept.json").read_text()) if finished == 0 else []
        results[text] = {
            "killed": killed == -signal.SIGKILL,
            "finished": finished == 0,
            "different": different,
            "beside": beside,
            "kept": kept,
        }
    print(json.dumps({"moments": counted, "stages": [stage.name for stage in stages], "results": results}))


def _killed(checkpoint: str, data: str, out: Path, moment: int) -> None:
    count = 0

    def at(name: str) -> None:
        nonlocal count
        count += name != "before"
        if count == abs(moment) - (moment < 0) and (name == "before") == (moment < 0):
            os.kill(os.getpid(), signal.SIGKILL)

    _watch(at, before=lambda: at("before"))
    deploy(request(Path(checkpoint), Path(data), out))


def _finished(checkpoint: str, data: str, out: Path) -> None:
    stages: list[Stage] = []
    deploy(request(Path(checkpoint), Path(data), out), said=lambda number, stage: stages.append(stage))
    Path(out.parent, "kept.json").write_text(json.dumps([stage.name for stage in stages if stage.kept]))


def _watch(after: Callable[[str], object], before: Callable[[], object] = lambda: None) -> None:
    """Call back around each step that gives a file or a folder its name."""

    def watched(function: Any) -> Any:
        def wrapper(one: Any, other: Any) -> Any:
            before()
            result = function(one, other)
            after(Path(other).name)
            return result

        return wrapper

    for owner, name in ((Path, "replace"), (Path, "rename"), (folders, "exchange")):
        original = getattr(getattr(owner, name), "__wrapped__", getattr(owner, name))
        wrapper = watched(original)
        wrapper.__wrapped__ = original
        setattr(owner, name, wrapper)


def _freeze() -> None:
    record = RunRecord("2026-01-02 03:04", 1.0, 1, "a machine", {})
    for name in ("internvl_edge.evaluation.compare", "internvl_edge.quantize.pipeline"):
        vars(importlib.import_module(name))["run_record"] = lambda seconds: record
    evaluator._CASES = 2


def _in_child(run: Callable[[], None]) -> int:
    """Run something in a process of its own; return its exit status, or minus the signal that ended it."""
    process = os.fork()
    if not process:
        status = 1
        try:
            run()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


if __name__ == "__main__":
    main()
