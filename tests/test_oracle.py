"""The committed oracle is complete and unchanged, and only a request makes the absence of the full one a failure."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REMOTE = ("internvl2_5-qwen2-tiny", "internvl2_5-internlm2-tiny")
NOT_SUMMED = {"SHA256SUMS", "README.md", "make.py"}


def test_committed_files_are_those_of_the_sums(small_oracle: Path) -> None:
    lines = (small_oracle / "SHA256SUMS").read_text(encoding="utf-8").splitlines()
    sums = {name: digest for digest, name in (line.split("  ") for line in lines)}
    found = {path for path in small_oracle.rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    assert {path.relative_to(small_oracle).as_posix() for path in found} - NOT_SUMMED == set(sums)
    for name, expected in sums.items():
        assert hashlib.sha256((small_oracle / name).read_bytes()).hexdigest() == expected, name


@pytest.mark.parametrize("name", REMOTE)
def test_python_inputs_are_those_of_the_goldens(oracle: Path, name: str) -> None:
    entries = json.loads((oracle / "python_inputs.json").read_text(encoding="utf-8"))["entries"]
    entry = next(entry for entry in entries if entry["name"] == name)
    config = json.loads((oracle / name / "checkpoint" / "config.json").read_text(encoding="utf-8"))
    assert entry["text"].items() <= config["llm_config"].items()
    golden = json.loads((oracle / name / "golden.json").read_text(encoding="utf-8"))
    for case, expected in zip(entry["cases"], golden["cases"], strict=True):
        assert case["id"] == expected["id"]
        assert case["expect"]["output_ids"] == expected["expected"]["output_ids"]


@pytest.mark.parametrize("required", [False, True])
def test_absent_full_oracle_is_a_skip_unless_it_is_required(tmp_path: Path, required: bool) -> None:
    """On CI, too, and the small oracle is tested all the same."""
    environment = os.environ | {"CI": "true", "INTERNVL_EDGE_ORACLE": str(tmp_path / "absent")}
    environment["INTERNVL_EDGE_REQUIRE_ORACLE"] = "1" if required else "0"
    command = [sys.executable, "-m", "pytest", __file__, "-p", "no:cacheprovider", "-k", "python_inputs"]
    made = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert f"no full reference checkpoints at {tmp_path / 'absent'}; set INTERNVL_EDGE_ORACLE" in made.stdout
    assert "2 passed" in made.stdout
    assert ("2 errors" if required else "2 skipped") in made.stdout
    assert made.returncode == int(required)
