"""`doctor` names what this machine has, and never ends because a library or a program does."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from helpers.commands import assert_one_line, internvl_edge
from internvl_edge.base import machine, user_folders
from internvl_edge.bundle.bundle import Bundle
from internvl_edge.bundle.manifest import FileEntry
from internvl_edge.cli import doctor, probes
from internvl_edge.runtime.engines.choice import choose
from internvl_edge.runtime.engines.tensorrt.record import BuildOptions, EngineRecord, graph_inputs

CARD: dict[str, Any] = {
    "name": "NVIDIA GeForce RTX 4060",
    "compute_capability": "8.9",
    "driver": "590.44",
    "memory": 8188 * 2**20,
    "free": 7700 * 2**20,
}
CPU_ONLY = {"onnxruntime": {"version": "1.32.0", "providers": {"CPUExecutionProvider": "works"}}}
RTX = CPU_ONLY | {"tensorrt_rtx": {"version": "1.7.1"}, "cuda": {"runtime": "13.5", "gpus": [CARD]}}
NO_DRIVER = {"runtime": "13.5", "gpus": [], "error": "CUDA driver version is insufficient for CUDA runtime version"}


@pytest.fixture
def examine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str, dict[str, Any]]]:
    """Runs doctor on a machine with these packages, answers of libraries, and graphics cards of the driver."""

    def run(
        packages: list[str], answers: dict[str, Any], gpus: list[Any] | str = "nvidia-smi is not installed"
    ) -> tuple[int, str, dict[str, Any]]:
        monkeypatch.setattr(doctor, "_version", lambda name: "1.0" if name in packages else None)
        monkeypatch.setattr(doctor, "present", lambda: list(answers))
        monkeypatch.setattr(doctor, "probe", lambda names: answers)
        monkeypatch.setattr(doctor, "nvidia_smi", lambda: ([], gpus) if isinstance(gpus, str) else (gpus, ""))
        told, listed = (CliRunner().invoke(doctor.command, options) for options in ([], ["--json"]))
        assert told.exit_code == listed.exit_code
        facts: dict[str, Any] = json.loads(listed.stdout)
        assert ("no problems found" in told.stdout) == (facts["problems"] == []) == (told.exit_code == 0)
        return told.exit_code, told.stdout, facts

    return run


def test_this_machine_is_described() -> None:
    result = internvl_edge("doctor", "--json")
    facts = json.loads(result.stdout)
    assert facts["onnxruntime providers"]["CPUExecutionProvider"] == "works"
    assert facts["packages"]["numpy"] == np.__version__
    assert facts["memory"]["total"] == machine.memory("MemTotal")
    assert 0 < facts["disk"]["free here"] <= shutil.disk_usage(".").total
    assert facts["disk"]["cache"].endswith("internvl-edge")
    told = internvl_edge("doctor")
    assert told.returncode == result.returncode == bool(facts["problems"])
    for name in ("cpu kind", "memory", "disk", "cache folder", "gpu", "onnxruntime providers"):
        assert f"\n{name} " in told.stdout
    assert told.stderr == ""


# ---- problems ----


def test_a_cpu_is_enough(examine: Any) -> None:
    status, told, facts = examine(["onnxruntime"], CPU_ONLY)
    assert (status, facts["problems"], facts["gpus"]) == (0, [], [])
    assert "none (nvidia-smi is not installed)" in told


def test_rtx_without_a_gpu_is_a_problem(examine: Any) -> None:
    packages = ["onnxruntime", "tensorrt-rtx-cu13", "cuda-bindings"]
    status, told, facts = examine(packages, RTX | {"cuda": NO_DRIVER})
    assert status == 1
    assert "no problems found" not in told
    (problem,) = facts["problems"]
    assert problem.startswith("[rtx] is installed, but no NVIDIA GPU was found (nvidia-smi is not installed; CUDA: ")


def test_rtx_with_a_gpu_is_sound(examine: Any) -> None:
    status, told, facts = examine(["onnxruntime", "tensorrt-rtx-cu13", "cuda-bindings"], RTX, [CARD])
    assert (status, facts["problems"], facts["gpus"]) == (0, [], [CARD])
    assert "NVIDIA GeForce RTX 4060, compute capability 8.9, 8.59 GB, 8.07 GB free, driver 590.44" in told


def test_a_driver_that_is_too_old_is_a_problem(examine: Any) -> None:
    _, _, facts = examine(["onnxruntime", "tensorrt-rtx-cu13"], RTX | {"cuda": NO_DRIVER}, [CARD])
    assert facts["problems"] == [
        "CUDA cannot use the GPU: CUDA driver version is insufficient for CUDA runtime version; update the driver"
    ]


@pytest.mark.parametrize("gpus", [[CARD], "no driver"])
def test_cuda_that_does_not_start_is_a_problem(examine: Any, gpus: Any) -> None:
    states = {"CUDAExecutionProvider": "does not start: libcublasLt.so.13 is missing", "CPUExecutionProvider": "works"}
    _, _, facts = examine(["onnxruntime-gpu"], {"onnxruntime": {"version": "1.31.1", "providers": states}}, gpus)
    (problem,) = facts["problems"]
    assert ("libcublasLt.so.13" if gpus == [CARD] else "[gpu] is installed, but no NVIDIA GPU") in problem


def test_a_board_that_answers_through_tensorrt_needs_no_onnxruntime(examine: Any) -> None:
    """On JetPack 6, no release of ONNX Runtime for its Python can read the graphs."""
    answers = {"tensorrt": {"version": "10.3.0"}, "cuda": {"runtime": "12.6", "gpus": [CARD]}}
    assert examine(["cuda-bindings"], answers, [CARD])[2]["problems"] == []
    without_driver = answers | {"cuda": NO_DRIVER}
    problems = examine(["cuda-bindings"], without_driver)[2]["problems"]
    assert "no bundle can run here" in problems[0]
    assert problems[1].startswith("tensorrt is installed, but no NVIDIA GPU was found")


@pytest.mark.parametrize(
    ("packages", "answers", "problem"),
    [
        ([], {}, "no bundle can run here: onnxruntime is not installed; pip install 'internvl-edge[cpu]'"),
        (["onnxruntime"], {"onnxruntime": {"error": "no answer in 30 s"}}, "onnxruntime no answer in 30 s"),
        (["onnxruntime", "onnxruntime-gpu"], CPU_ONLY, "overwrite each other"),
        (["openvino"], CPU_ONLY | {"openvino": {"error": "release 2025.1 cannot"}}, "openvino cannot be used: release"),
    ],
)
def test_what_is_missing_or_damaged_is_a_problem(
    examine: Any, packages: list[str], answers: dict[str, Any], problem: str
) -> None:
    assert any(problem in found for found in examine(packages, answers)[2]["problems"])


def test_a_cache_folder_that_cannot_be_written_is_a_problem(
    examine: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    (problem,) = examine(["onnxruntime"], CPU_ONLY)[2]["problems"]
    assert problem.startswith("the cache folder cannot be written")
    assert "XDG_CACHE_HOME" in problem


def test_a_user_without_a_home_has_no_folders(
    monkeypatch: pytest.MonkeyPatch, examine: Any, bundle: Path, tmp_path: Path
) -> None:
    def nowhere() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for variable in ("XDG_CACHE_HOME", "XDG_CONFIG_HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(Path, "home", nowhere)
    assert user_folders.cache_folder() is user_folders.config_folder() is None
    assert "there is no home" in examine(["onnxruntime"], CPU_ONLY)[2]["problems"][0]
    assert Bundle.open(bundle).folder == bundle
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert user_folders.cache_folder() == tmp_path / "internvl-edge"


# ---- the driver's program ----


def program(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder / "nvidia-smi"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


def test_cards_are_read_off_the_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = "NVIDIA GeForce RTX 4060, 590.44, 8188, 7700, 8.9\nNVIDIA Thor, 580.0, [N/A], [N/A], 11.0"
    program(tmp_path, f"cat <<'END'\n{lines}\nEND", monkeypatch)
    thor = {"name": "NVIDIA Thor", "compute_capability": "11.0", "driver": "580.0", "memory": None, "free": None}
    assert probes.nvidia_smi() == ([CARD, thor], "")
    assert doctor._gpu(thor) == "NVIDIA Thor, compute capability 11.0, unknown, unknown free, driver 580.0"


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        (
            "echo 'NVIDIA-SMI has failed because it could not talk to the driver'; exit 9",
            "could not talk to the driver",
        ),
        ("sleep 20", "gave no answer in 0.5 s"),
        ("printf '\\377\\376'", ""),
        ("kill -SEGV $$", "nvidia-smi: SIGSEGV"),
        ("exit 3", "nvidia-smi: exit status 3"),
        ("echo garbage", ""),
    ],
)
def test_a_driver_that_does_not_answer_is_a_reason(
    script: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probes, "_DRIVER_SECONDS", 0.5)
    program(tmp_path, script, monkeypatch)
    gpus, found = probes.nvidia_smi()
    assert gpus == []
    assert reason in found


def test_no_driver_is_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert probes.nvidia_smi() == ([], "nvidia-smi is not installed")


# ---- libraries ----


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("import time; time.sleep(60)", "no answer in 3 s"),
        ("import os; os.kill(os.getpid(), 11)", "it ended its process (SIGSEGV)"),
        ("import os; os._exit(7)", "it ended its process (exit status 7)"),
        ("raise OSError('libx.so: cannot open')", "OSError: libx.so: cannot open"),
        ("raise SystemExit(3)", "it ended its process (exit status 3)"),
        ("__version__ = '2024.1'", "release 2024.1 cannot read the graphs; 2026.3 can"),
        ("__version__ = None", "TypeError: "),
    ],
)
def test_a_library_that_hangs_or_crashes_is_an_answer(
    code: str, error: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "openvino.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert error in probes.probe(["openvino"], 3 if "sleep" in code else 60)["openvino"]["error"]


def test_what_a_library_prints_is_not_its_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    core = "Core = lambda: type('', (), {'available_devices': ['CPU']})()"
    (tmp_path / "openvino.py").write_text(f"__version__ = '2026.3'\nprint('hello {{}}')\n{core}")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert probes.probe(["openvino"])["openvino"] == {"version": "2026.3", "devices": ["CPU"]}


def test_only_installed_libraries_are_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("cuda", "cuda.bindings", "tensorrt", "tensorrt_rtx", "openvino"):
        monkeypatch.setitem(sys.modules, module, None)
    assert probes.present() == ["onnxruntime"]
    assert probes.probe([]) == {}


# ---- a bundle ----


def test_a_bundle_shows_its_engines_and_what_auto_takes(bundle: Path, tmp_path: Path) -> None:
    there = tmp_path / "bundle"
    shutil.copytree(bundle, there)
    opened = Bundle.open(there)
    files = {"vision.engine": vars(FileEntry(3, "0" * 64)), "decoder.engine": vars(FileEntry(3, "0" * 64))}
    for name, inputs in (("rtx", graph_inputs(opened)), ("old", {"vision.onnx": "1" * 64})):
        folder = there / "engines" / name
        folder.mkdir(parents=True)
        for file in files:
            (folder / file).write_bytes(b"abc")
        EngineRecord(name, "tensorrt_rtx", "1.7.1", (86, 89), BuildOptions("float16"), inputs, files).write(folder)
    shutil.copytree(there / "engines" / "rtx", there / "engines" / ".rtx.partial")
    (there / "engines" / "broken").mkdir()
    (there / "engines" / "broken" / "engine.json").write_text("{}")
    facts = json.loads(internvl_edge("doctor", there, "--json").stdout)
    assert facts["engines"].keys() == {"rtx", "old", "broken"}
    assert facts["engines"]["rtx"] == "tensorrt_rtx 1.7.1, compute capability 8.6, 8.9"
    assert facts["engines"]["old"].endswith("; built from other files, build it again")
    assert "damaged" in facts["engines"]["broken"]
    assert facts["auto"]["--engine auto"].split()[0] == choose(opened.manifest).engine
    assert facts["auto"]["--device auto"].startswith(("cpu (", "tensorrt ("))
    told = internvl_edge("doctor", there).stdout
    assert "engines rtx" in told
    assert "--device auto" in told
    assert "engines                none" in internvl_edge("doctor", bundle).stdout


def test_a_damaged_bundle_is_one_line(bundle: Path, tmp_path: Path) -> None:
    assert_one_line(internvl_edge("doctor", tmp_path), "is not a bundle")
    there = tmp_path / "bundle"
    shutil.copytree(bundle, there)
    (there / "vision.onnx").write_bytes(b"")
    assert_one_line(internvl_edge("doctor", there), "vision.onnx")
