"""What a command needs is said before it starts: every package that is missing, and one command that installs all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import tiny_quantized
from helpers.calibration_data import write_data
from helpers.commands import assert_one_line
from internvl_edge.base.errors import EdgeError
from internvl_edge.base.extras import missing_modules, require_extras

BLOCKED = """
import sys
for name in sys.argv.pop(1).split(","):
    sys.modules[name] = None
from internvl_edge.cli import main
main()
"""
EXPORT = "ml_dtypes,onnx,onnx_ir,google.protobuf,sentencepiece,tqdm"
FONTS = "fontpkg_arimo,cvttf_NotoSansCJK_Medium"


def without(packages: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a command in a process that cannot import these packages."""
    command = [sys.executable, "-c", BLOCKED, packages, *map(str, arguments)]
    return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


def test_all_that_is_missing_is_one_line(checkpoint: Path, bundle: Path, data: Path, tmp_path: Path) -> None:
    out = ("-o", tmp_path / "out")
    for packages, command, fragments in (
        (f"{EXPORT},torch,{FONTS}", ("calibrate", checkpoint, *out), ("torch", "'internvl-edge[quantize,synthetic]'")),
        (f"torch,{FONTS}", ("quantize", checkpoint, *out), ("torch, fontpkg_arimo", "[quantize,synthetic]'")),
        (f"torch,{FONTS}", ("quantize", checkpoint, *out, "--data", data), ("package torch", "[quantize]'")),
        (f"torch,{FONTS}", ("quantize", checkpoint, *out, "--scheme", "w8a16", "--no-compensate"), ("[quantize]'",)),
        (EXPORT, ("export", checkpoint, *out), ("ml_dtypes, onnx, onnx_ir, google.protobuf, sentencepiece",)),
        (f"{EXPORT},onnxruntime", ("demo", *out), ("onnxruntime, ml_dtypes", "'internvl-edge[cpu,export]'")),
        ("onnxruntime", ("run", bundle, "x"), ("onnxruntime", "[cpu]'")),
        ("onnxruntime,av", ("run", bundle, "x", "--video", "film.mp4"), ("onnxruntime, av", "[cpu,video]'")),
        ("onnxruntime", ("chat", bundle), ("[cpu]'",)),
        ("onnxruntime,matplotlib", ("bench", bundle, "--plot", tmp_path / "x.png"), ("[cpu,report]'",)),
        (FONTS, ("evaluate", bundle, "--suite", "reader"), ("fontpkg_arimo", "[synthetic]'")),
        (FONTS, ("evaluate", bundle, "--reference", bundle), ("[synthetic]'",)),
        (f"onnxruntime,{EXPORT}", ("evaluate", bundle, "--reference", checkpoint, "--data", data), ("[cpu,export]'",)),
        ("jinja2", ("evaluate", bundle, "--reference", bundle, "--report", tmp_path / "r"), ("jinja2", "[report]'")),
    ):
        assert_one_line(without(packages, *command), *fragments)
    assert os.listdir(tmp_path) == []


def test_what_is_not_needed_is_not_asked_for(bundle: Path, data: Path) -> None:
    line = ("evaluate", bundle, "--reference", bundle, "--data", data, "--samples", 1, "--max-new-tokens", 1)
    result = without(f"{FONTS},{EXPORT},torch", *line, "--no-record", "--no-report", "--max-tiles", 1)
    assert result.returncode == 0, result.stderr


def test_a_missing_page_is_said_before_the_work_and_an_older_one_stays(
    bundle: Path, data: Path, tmp_path: Path
) -> None:
    line = ("evaluate", bundle, "--reference", bundle, "--data", data, "--samples", 1, "--max-new-tokens", 1)
    line = (*line, "--no-record", "--max-tiles", 1)
    report = bundle.with_name(f"{bundle.name}.report")
    assert without("nothing", *line).returncode == 0
    page = (report / "report.html").read_bytes()
    again = without("jinja2", *line)
    assert again.returncode == 0, again.stderr
    assert again.stderr.startswith("report.html will not be written, report.json will: it needs jinja2: pip install")
    assert again.stderr.rstrip().endswith(f"{report / 'report.html'} is of an earlier run")
    assert (report / "report.html").read_bytes() == page


@pytest.mark.parametrize("quantization", [None, "autoawq"])
def test_a_checkpoint_is_inspected_with_what_runs_bundles(
    checkpoint: Path, tmp_path: Path, quantization: str | None
) -> None:
    folder = checkpoint if quantization is None else tiny_quantized.write_quantized(checkpoint, tmp_path / "awq")[0]
    result = without(f"{EXPORT},torch,openvino,jinja2,matplotlib,{FONTS}", "inspect", folder, "--json")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["kind"] == "checkpoint"


def test_the_list_of_modules_is_that_of_the_extras(monkeypatch: pytest.MonkeyPatch) -> None:
    assert missing_modules("export") == []
    monkeypatch.setitem(sys.modules, "onnx", None)
    assert missing_modules("export") == ["onnx"]
    with pytest.raises(EdgeError, match=r"^x needs the package onnx: pip install 'internvl-edge\[export\]', or y$"):
        require_extras("x", "export", "cpu", advice="or y")
