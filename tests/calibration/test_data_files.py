"""Files of calibration data and of its state: what cannot be understood is one line that says where."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from helpers.calibration_data import FLOAT32, write_data
from helpers.tiny import write_checkpoint
from internvl_edge.base.errors import EdgeError
from internvl_edge.calibration import DataOptions, calibrate
from internvl_edge.calibration.dataset import CalibrationSet
from internvl_edge.calibration.items import read_items
from internvl_edge.calibration.work import WorkFolder
from internvl_edge.quantize import quantize_checkpoint
from internvl_edge.recipe.recipe import Recipe, VisionInt8


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint and a calibration set of it."""
    folder = tmp_path_factory.mktemp("calibrated")
    checkpoint, data = write_checkpoint(folder / "checkpoint"), DataOptions(write_data(folder / "data"), max_tiles=2)
    return checkpoint, calibrate(checkpoint, folder / "set", data, FLOAT32).folder


BROKEN = {
    b'{"prompt": "a", "prompt": "b"}': "'prompt' stands twice",
    b'{"prompt": NaN}': "prompt is NaN",
    b'{"prompt": "\\ud800"}': "half of a surrogate pair",
    b'{"prompt": "caf\xe9"}': "is not UTF-8",
    b"[" * 100_000: "inside each other",
    b'{"prompt": ' + b"9" * 5000 + b"}": "more than 308 digits",
    b'{"prompt": 3}': "prompt or answer is not a text",
    b'{"prompt": "a", "images": ["\\u0000"]}': "images is not a list of file names",
    b'{"prompt": "a", "images": "x"}': "images is not a list of file names",
    b'{"prompt": "a", "imag\\nes": []}': "unknown field 'imag\\nes'",
    b'{"prompt": "' + b"a" * (9 << 20) + b'"}': "a line of more than 8 MiB",
    b"[]": "a list, expected an object",
    b"{": "not JSON",
}


@pytest.mark.parametrize(("line", "problem"), BROKEN.items(), ids=BROKEN.values())
def test_a_line_that_cannot_be_understood_is_a_problem_of_its_own(tmp_path: Path, line: bytes, problem: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"prompt": "first"}\r\n\n' + line + b'\n{"prompt": "last"}')
    items = {item.name: item for item in read_items(path)}
    assert items["data.jsonl:1"].prompt == "first"
    assert items["data.jsonl:4"].prompt == "last"
    assert problem in items["data.jsonl:3"].problem
    assert "\n" not in items["data.jsonl:3"].problem


def test_line_separators_inside_a_text_do_not_end_the_line(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"prompt": "a\u2028b\u0085c\x0bd"}, ensure_ascii=False) + "\n", encoding="utf-8")
    (item,) = read_items(path)
    assert item.prompt == "a\u2028b\u0085c\x0bd"
    assert not item.problem


SET: dict[str, Any] = {
    "checkpoint": "c",
    "names": ["a"],
    "lengths": [3],
    "tiles": [0],
    "broken": [],
    "image_token": 7,
    "hidden_size": 4,
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lengths": [10**300]}, "missing or incomplete"),
        ({"lengths": [3, 3]}, "not of the same samples"),
        ({"lengths": ["3"]}, r"lengths\[0\] is '3'"),
        ({"tiles": [-1]}, "a number is negative"),
        ({"names": "a"}, "names is 'a', expected a list"),
        ({"hidden_size": None}, "hidden_size is None"),
        ({"hidden_size": True}, "hidden_size is True"),
        ({"wings": 2}, "wings is not known"),
    ],
)
def test_a_damaged_set_is_one_line(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    (tmp_path / "calibration.json").write_text(json.dumps(SET | changes))
    with pytest.raises(EdgeError, match=message) as raised:
        CalibrationSet.open(tmp_path)
    assert "\n" not in str(raised.value)
    assert "make the calibration set again" in str(raised.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("samples", value) for value in (0, "4", True)),
        *(("max_tiles", value) for value in (0, 129)),
        *(("max_tokens", 0), ("max_broken", -1), ("seed", 0.5), ("source", 3)),
    ],
)
def test_options_that_cannot_be_are_refused(name: str, value: Any) -> None:
    with pytest.raises(EdgeError, match=r"at least 1 sample|expected (int|Path \| None)"):
        DataOptions(**{name: value})


def test_arguments_of_another_type_are_refused(tmp_path: Path) -> None:
    assert DataOptions("data.jsonl") == DataOptions(Path("data.jsonl"))  # type: ignore[arg-type]
    refused: list[tuple[Callable[..., Any], dict[str, Any], str]] = [
        (quantize_checkpoint, {"recipe": "cpu"}, "recipe is 'cpu', expected a Recipe: .*read_recipe"),
        (quantize_checkpoint, {"data": "b.jsonl"}, "data is 'b.jsonl', expected a DataOptions"),
        (quantize_checkpoint, {"compute": "cpu"}, "compute is 'cpu', expected a Compute"),
        (calibrate, {"options": "b.jsonl"}, "options is 'b.jsonl', expected a DataOptions"),
    ]
    for call, wrong, message in refused:
        with pytest.raises(EdgeError, match=message):
            call("a", tmp_path / "out", **wrong)


@pytest.mark.parametrize("vision", ["fp", "int8"])
@pytest.mark.parametrize("name", ["calibration.json", "tokens.npy", "tiles.u8", "embeddings.f32"])
def test_a_set_with_one_changed_byte_is_refused(
    calibrated: tuple[Path, Path], tmp_path: Path, name: str, vision: str
) -> None:
    """Where what changed is read: without an int8 tower the tiles are not, and with one the embeddings are not."""
    checkpoint, made = calibrated
    folder = tmp_path / "set"
    shutil.copytree(made, folder)
    recipe, out = Recipe("w4a16-awq", 32, vision=vision, vision_int8=VisionInt8(cosine=0)), tmp_path / "out"
    content = bytearray((folder / name).read_bytes())
    content[-20] ^= 4  # in calibration.json, a digit of its own SHA-256
    (folder / name).write_bytes(content)
    if name != {"fp": "tiles.u8", "int8": "embeddings.f32"}[vision]:
        with pytest.raises(EdgeError, match=f"{name} is damaged .*; make the calibration set again"):
            quantize_checkpoint(checkpoint, out, recipe, calibration=folder, compute=FLOAT32)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["set"]
        shutil.copyfile(made / name, folder / name)
    quantize_checkpoint(checkpoint, out, recipe, calibration=folder, compute=FLOAT32)


def test_a_set_without_checksums_is_that_of_an_earlier_version(calibrated: tuple[Path, Path], tmp_path: Path) -> None:
    """It is not used, but it reads as a set, so that --force may replace it."""
    checkpoint, folder = calibrated[0], tmp_path / "set"
    shutil.copytree(calibrated[1], folder)
    values = json.loads((folder / "calibration.json").read_text(encoding="utf-8"))
    (folder / "calibration.json").write_text(json.dumps(values | {"sha256": None, "files": {}}), encoding="utf-8")
    with pytest.raises(EdgeError, match=r"tokens\.npy is damaged or was changed; make the calibration set again"):
        quantize_checkpoint(checkpoint, tmp_path / "out", Recipe("w8a16"), calibration=folder, compute=FLOAT32)
    data = DataOptions(write_data(tmp_path / "data"), max_tiles=2)
    calibrate(checkpoint, folder, data, FLOAT32, force=True)


@pytest.mark.parametrize("text", ["", "{", "[" * 9000, "[]", "3", '{"a": NaN}', '{"a": 1, "a": 1}'])
def test_damaged_state_is_one_line_and_says_restart(tmp_path: Path, text: str) -> None:
    WorkFolder(tmp_path / "work", {"data": "d"})
    (tmp_path / "work" / "run.json").write_text(text)
    with pytest.raises(EdgeError, match=r"run\.json .*--restart"):
        WorkFolder(tmp_path / "work", {"data": "d"})
    WorkFolder(tmp_path / "work", {"data": "d"}, restart=True)
