"""What JSON files may hold: everything else is one line that names the file, of the caller's kind, in no time."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from helpers.cpu_time import cpu_time_below
from internvl_edge.base import json_files
from internvl_edge.base.errors import BundleError, CheckpointError, EdgeError
from internvl_edge.base.json_files import MAX_DEPTH, MAX_DIGITS, parse, read, read_object

REFUSED = {
    "two equal names": (b'{"a": {"b": 1, "b": 2}}', "'b' stands twice"),
    "two equal names, one escaped": (b'{"b": 1, "\\u0062": 2}', "'b' stands twice"),
    "NaN": (b'{"eps": NaN}', "eps is NaN"),
    "infinity": (b'{"mean": [0.5, -Infinity]}', "mean is -Infinity"),
    "infinity in digits": (b'{"eps": 1e999}', "eps is 1e999, too large"),
    "an absurd integer": (b'{"size": ' + b"9" * 5000 + b"}", f"an integer of more than {MAX_DIGITS} digits"),
    "an integer beyond floats": (b'{"size": ' + b"9" * (MAX_DIGITS + 1) + b"}", "size is 999"),
    "a deep list": (b"[" * 100_000, "inside each other"),
    "a deep object": (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "inside each other"),
    "one list too deep": (b"[" * (MAX_DEPTH + 1) + b"]" * (MAX_DEPTH + 1), "inside each other"),
    "no UTF-8": (b'{"a": "\xff"}', "byte 7 is not UTF-8"),
    "a surrogate as UTF-8": (b'{"a": "\xed\xa0\x80"}', "is not UTF-8"),
    "half a pair": (b'{"a": "\\ud800"}', "half of a surrogate pair"),
    "half a pair in a name": (b'{"x": {"\\uDC00": 1}}', "half of a surrogate pair"),
    "halves in the wrong order": (b'["\\udc00\\ud800"]', "half of a surrogate pair"),
    "nothing": (b"", "Expecting value"),
    "half of it": (b'{"a": ', "Expecting value"),
    "more than one value": (b"{} {}", "Extra data"),
    "a control character": (b'{"a": "\x01"}', "control character"),
    "UTF-16": ('{"a": 1}'.encode("utf-16"), "not UTF-8"),
}


@pytest.mark.parametrize(("content", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_json_is_one_line_of_the_callers_kind(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "some.json"
    path.write_bytes(content)
    for kind in (CheckpointError, BundleError):
        with cpu_time_below(1), pytest.raises(kind) as raised:
            read(path, kind, "make it again")
        assert str(path) in str(raised.value)
        assert reason in str(raised.value)
        assert str(raised.value).endswith("; make it again")
        assert "\n" not in str(raised.value)
        assert len(str(raised.value)) <= 400


@pytest.mark.parametrize(
    "text",
    [
        '{"a": [1, -2.5, 1e3, true, null, "\u56fe \\ud83d\\ude00"]}',
        "[" * MAX_DEPTH + "]" * MAX_DEPTH,
        "9" * MAX_DIGITS,
        ' \n[{"a": {}}, {"a": {}}]\r\n',
    ],
)
def test_json_is_read_as_python_reads_it(text: str) -> None:
    assert parse(text) == parse(text.encode()) == json.loads(text)


def test_every_whole_number_fits_a_float() -> None:
    assert float(parse("9" * MAX_DIGITS)) < float("inf")


def test_what_is_no_object_is_named(tmp_path: Path) -> None:
    path = tmp_path / "list.json"
    path.write_text("[1]")
    with pytest.raises(CheckpointError, match=r"list\.json holds a list, expected an object; again"):
        read_object(path, CheckpointError, "again")


def test_files_beyond_the_size_are_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "large.json"
    with path.open("wb") as file:
        file.truncate(1 << 40)  # takes no room on the disk
    with pytest.raises(EdgeError, match=r"large\.json has more than 8 MiB"):
        read(path, EdgeError, "again")
    assert json_files.TOKENIZER_BYTES > json_files.FILE_BYTES


def test_what_is_no_file_is_one_line(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "nowhere", tmp_path / "pipe", Path("a\0b"), tmp_path / "two\nlines"):
        with pytest.raises(EdgeError, match=r"(is no file|cannot be read).*; again$") as raised:
            read(path, EdgeError, "again")
        assert "\n" not in str(raised.value)
