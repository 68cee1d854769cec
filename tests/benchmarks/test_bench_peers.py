"""`bench_peers.py` goes on without a peer that cannot be made, stops without our own parts, and repeats nothing."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest

from helpers.repository import REPOSITORY
from internvl_edge.base.errors import EdgeError

sys.path.insert(0, str(REPOSITORY / "benchmarks"))

import bench_peers
import cpu_peers
from bench_peers import Step

PEERS = REPOSITORY / "benchmarks" / "peers"


def shell(script: str) -> list[str]:
    return ["bash", "-c", script]


def test_a_peer_that_cannot_be_made_costs_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad, last = (tmp_path / name for name in ("good", "bad", "last"))
    plan = [
        Step("environment bad", (bad,), shell("echo first; echo no such package >&2; exit 3"), 0.1, 1, "bad"),
        Step("models bad", (tmp_path / "never",), shell(f"touch {tmp_path}/never"), 0.1, 1, "bad", (bad,)),
        Step("environment good", (good,), shell(f"echo note: built without it; touch {good}"), 0.1, 1, "good"),
        Step("models good", (last,), shell(f"touch {last}"), 0.1, 1, "good", (good,)),
    ]
    monkeypatch.setattr(bench_peers, "steps", lambda bench, labels: plan)
    bench_peers.prepare(tmp_path, [])
    lines = capsys.readouterr().err.splitlines()
    assert last.exists()
    assert not (tmp_path / "never").exists()
    failed = [line for line in lines if "environment bad: failed" in line]
    assert len(failed) == 1
    assert "status 3" in failed[0]
    assert failed[0].endswith("no such package")
    assert any(f"models bad: not made, {bad} is not there" in line for line in lines)
    assert any("note: built without it" in line for line in lines)

    good.unlink()
    bench_peers.prepare(tmp_path, [])
    repeated = [line for line in capsys.readouterr().err.splitlines() if line.endswith(" ...")]
    assert [line.split(": ")[1] for line in repeated] == ["environment bad ...", "environment good ..."]


def test_nothing_is_compared_without_our_own_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = [Step("bundle int4", (tmp_path / "int4",), shell("true"), 0.1, 1)]
    monkeypatch.setattr(bench_peers, "steps", lambda bench, labels: plan)
    with pytest.raises(EdgeError, match="bundle int4 could not be made"):
        bench_peers.prepare(tmp_path, [])


def test_too_little_room_is_said_before_anything_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**12, 0, 10**9))
    plan = [Step("checkpoint", (tmp_path / "made",), shell(f"touch {tmp_path}/made"), 5.0, 1)]
    monkeypatch.setattr(bench_peers, "steps", lambda bench, labels: plan)
    with pytest.raises(EdgeError, match=r"has 1\.0 GB free, expected 7\.0 GB"):
        bench_peers.prepare(tmp_path, [])
    assert not (tmp_path / "made").exists()


def test_the_steps_cover_what_the_peers_need(tmp_path: Path) -> None:
    found = bench_peers.steps(tmp_path, ["llama.cpp Q4_0, mmproj q8_0"])
    assert [step.name for step in found if step.peer] == [
        "environment transformers", "environment llama-cpp", "models llama-cpp",
    ]  # fmt: skip
    everything = bench_peers.steps(tmp_path, list(cpu_peers.PEERS))
    made = {path for step in everything for path in step.made}
    for environment, _, files in cpu_peers.PEERS.values():
        assert {tmp_path / "models" / name for name in files} <= made
        assert tmp_path / "peers" / environment / "versions.txt" in made
    for _, bundle, _ in bench_peers.OURS:
        assert tmp_path / bundle in made
    for step in everything:
        assert os.access(step.command[0], os.X_OK) or step.command[0] == "internvl-edge"


def test_a_peer_without_environment_or_model_is_left_out(tmp_path: Path) -> None:
    label = "onnxruntime-genai int4"
    assert cpu_peers.lacking(label, tmp_path, tmp_path) == "no environment onnxruntime-genai"
    (tmp_path / "onnxruntime-genai").mkdir()
    (tmp_path / "onnxruntime-genai" / "versions.txt").touch()
    assert cpu_peers.lacking(label, tmp_path, tmp_path) == "no model onnxruntime-genai-int4"
    (tmp_path / "onnxruntime-genai-int4").mkdir()
    assert cpu_peers.lacking(label, tmp_path, tmp_path) == ""


# How many bytes an instruction writes to the stack, by its mnemonic or the register that it reads.
STORES = {"movb": 1, "movw": 2, "movl": 4, "movq": 8, "%xmm": 16, "%ymm": 32, "%zmm": 64}
CONFIGURATION = """
#include <immintrin.h>
#include <string.h>
struct config { unsigned char palette, start, reserved[14]; unsigned short bytes[16]; unsigned char rows[16]; };
void load(void) {
  struct config config;
  memset(&config, 0, sizeof config);
  config.palette = 1;
  for (int i = 0; i < 8; i++) { config.rows[i] = 16; config.bytes[i] = 64; }
  _tile_loadconfig(&config);
}
"""


def test_the_tile_configuration_is_written_whole_before_it_is_read(tmp_path: Path) -> None:
    """What `amx_tile_config.h` is for: without it, GCC 12.2 stores 33 of these 64 bytes."""
    source = tmp_path / "config.c"
    source.write_text(CONFIGURATION)
    header = str(PEERS / "amx_tile_config.h")
    command = ["gcc", "-O3", "-march=sapphirerapids", "-include", header, "-S", str(source), "-o", "-"]
    try:
        ran = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("no gcc")
    if ran.returncode and "march" in ran.stderr:
        pytest.skip("gcc does not compile for AMX")
    assert ran.returncode == 0, ran.stderr
    before, _, _ = ran.stdout.partition("ldtilecfg")
    assert "ldtilecfg" in ran.stdout
    stores = [line for line in before.splitlines() if "mov" in line and line.rstrip().endswith("(%rsp)")]
    assert sum(size for line in stores for word, size in STORES.items() if word in line) >= 64


def test_bundles_of_other_names_are_not_made(tmp_path: Path) -> None:
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    tool = bin_folder / "internvl-edge"
    tool.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\nwhile [ "$1" != -o ]; do shift; done\nmkdir -p "$2"\n')
    tool.chmod(0o755)
    script = [str(PEERS / "cpu_bundles.sh"), "CHECKPOINT", str(tmp_path / "out"), "int4-prompts"]
    for _ in range(2):
        subprocess.run(script, env={"PATH": f"{bin_folder}:/usr/bin:/bin"}, check=True)
    calls = (tmp_path / "calls").read_text().splitlines()
    assert len(calls) == 2, "once, and what is there is left"
    assert "--int8-prompts" in calls[1]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["int4-prompts"]
