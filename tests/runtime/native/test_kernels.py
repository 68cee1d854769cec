"""The kernels alone: under sanitizers, and for 64-bit Arm in an emulator."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from internvl_edge.base.machine import cpu_features
from internvl_edge.runtime.native import build
from internvl_edge.runtime.native.build import LEVELS, NativeError

PROGRAM = Path(__file__).with_name("check_kernels.cpp")
SANITIZERS = ("-g", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")
# The Linux name of the CPU feature that a level of x86 needs beside those of the levels before it.
FEATURES = {"avx2": "fma", "avx512": "avx512dq", "avx512_bf16": "avx512_bf16"}


def compiled(compiler: list[str], levels: dict[str, tuple[str, ...]], folder: Path, *flags: str) -> Path:
    """Compile the program with the kernels of some levels; `flags` come last and win."""
    objects = []
    for name, own in levels.items():
        level = [*build._FLAGS, *own, *flags, f"-DINTERNVL_EDGE_LEVEL={name}"]
        objects.append(str(folder / f"{name}.o"))
        subprocess.run(
            [
                *compiler,
                *level,
                "-Wall",
                "-Wextra",
                "-Werror",
                "-c",
                str(build._SOURCES / "kernels.cpp"),
                "-o",
                objects[-1],
            ],
            check=True,
        )
    table = f"-DINTERNVL_EDGE_LEVELS(each)={' '.join(f'each({name})' for name in levels)}"
    program = folder / "check"
    subprocess.run(
        [
            *compiler,
            "-std=c++17",
            "-O2",
            f"-I{build._SOURCES}",
            *flags,
            table,
            str(PROGRAM),
            *objects,
            "-o",
            str(program),
        ],
        check=True,
    )
    return program


def checked(command: list[str], levels: dict[str, tuple[str, ...]]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert [line.split(":")[0] for line in done.stdout.splitlines()] == list(levels)


@pytest.mark.slow
def test_no_access_is_out_of_bounds_and_nothing_is_undefined(tmp_path: Path) -> None:
    try:
        compiler, levels = build.find_compiler(), LEVELS[build.machine_kind()]
    except NativeError as error:
        pytest.skip(str(error))
    here = {name: flags for name, flags in levels.items() if FEATURES.get(name, "") in {"", *cpu_features()}}
    checked([str(compiled(compiler, here, tmp_path, *SANITIZERS))], here)


@pytest.mark.slow
def test_the_kernels_of_64_bit_arm(tmp_path: Path) -> None:
    """Emulated: QEMU computes what the instructions mean, so this shows nothing about speed."""
    compiler, emulator = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64-static")
    if compiler is None or emulator is None:
        pytest.skip(
            "needs aarch64-linux-gnu-g++ and qemu-aarch64-static (Debian: g++-aarch64-linux-gnu, qemu-user-static)"
        )
    program = compiled([compiler], LEVELS["aarch64"], tmp_path, "-static")
    checked([emulator, "-cpu", "max", str(program)], LEVELS["aarch64"])
