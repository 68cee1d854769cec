"""Files of calibration data and of its state: what cannot be understood is one line that says where."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from internvl_edge.base.errors import EdgeError
from internvl_edge.calibration.dataset import CalibrationSet
from internvl_edge.calibration.items import read_items
from internvl_edge.calibration.work import WorkFolder

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


@pytest.mark.parametrize("text", ["", "{", "[" * 9000, "[]", "3", '{"a": NaN}', '{"a": 1, "a": 1}'])
def test_damaged_state_is_one_line_and_says_restart(tmp_path: Path, text: str) -> None:
    WorkFolder(tmp_path / "work", {"data": "d"})
    (tmp_path / "work" / "run.json").write_text(text)
    with pytest.raises(EdgeError, match=r"run\.json .*--restart"):
        WorkFolder(tmp_path / "work", {"data": "d"})
    WorkFolder(tmp_path / "work", {"data": "d"}, restart=True)
