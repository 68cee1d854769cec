"""Libraries must not tell their makers what a user runs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SESSION = """
import sys
sys.path.insert(0, sys.argv[1])
{first}
import onnxruntime
from internvl_edge.runtime.engines.device import IDENTITY
onnxruntime.InferenceSession(IDENTITY, providers=["CPUExecutionProvider"])
"""


@pytest.mark.parametrize("first", ["import internvl_edge", "import internvl_edge.runtime.engines.onnxruntime"])
def test_onnxruntime_starts_without_its_telemetry(first: str, tmp_path: Path) -> None:
    """It keeps a device id and a database of events in the cache folder, unless telemetry is off."""
    unset = {"ORT_DISABLE_TELEMETRY", "CI", "GITHUB_ACTIONS", "TF_BUILD", "ORT_RUNNING_UNIT_TESTS"}
    kept = {name: value for name, value in os.environ.items() if name not in unset}
    environment = kept | {"HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path)}
    root = str(Path(__file__).parents[2])
    command = [sys.executable, "-c", SESSION.format(first=first), root]
    subprocess.run(command, env=environment, check=True, timeout=60)
    assert list(tmp_path.iterdir()) == []


def test_a_value_of_the_users_own_stays() -> None:
    code = (
        "import os, internvl_edge; print(os.environ['ORT_DISABLE_TELEMETRY'], os.environ['HF_HUB_DISABLE_TELEMETRY'])"
    )
    for given, expected in (({}, "1 1"), ({"ORT_DISABLE_TELEMETRY": "0"}, "0 1")):
        kept = {name: value for name, value in os.environ.items() if not name.endswith("_DISABLE_TELEMETRY")}
        result = subprocess.run(
            [sys.executable, "-c", code], env=kept | given, capture_output=True, text=True, check=True
        )
        assert result.stdout.strip() == expected
