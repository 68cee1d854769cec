"""The journal: rows survive, half rows do not, one process writes, and nothing is mixed."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from internvl_edge.base.errors import EdgeError
from internvl_edge.batch.items import Ask, Item
from internvl_edge.batch.journal import line_of, open_journal, record_path, rows_of
from internvl_edge.batch.rows import Row

RECORD = {
    "bundle": "b" * 64,
    "engine": "onnxruntime",
    "prompt": "What?",
    "options": {"seed": 1},
    "versions": {"a": "1"},
}


def items(count: int, prompt: str = "What?") -> list[Item]:
    return [Item(str(number), f"line {number + 1}", Ask(prompt)) for number in range(count)]


def row(item: Item, **values: Any) -> Row:
    return Row(item.id, request=item.request, **({"answer": f"a{item.id}"} | values))


def write(path: Path, count: int, **values: Any) -> list[Item]:
    asked = items(count)
    with open_journal(path, RECORD) as journal:
        for item in journal.unfinished(asked):
            journal.write(row(item, **values))
    return asked


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "out.jsonl"


def test_what_is_finished_is_not_asked_again(path: Path) -> None:
    write(path, 3)
    with open_journal(path, RECORD) as journal:
        assert [item.id for item in journal.unfinished(items(5))] == ["3", "4"]
    lines = path.read_text().splitlines()
    assert [json.loads(line)["answer"] for line in lines] == ["a0", "a1", "a2"]
    assert [entry["id"] for _, entry in rows_of(path)] == ["0", "1", "2"]
    assert sorted(each.name for each in path.parent.iterdir()) == ["out.jsonl", "out.jsonl.batch.json"]


@pytest.mark.parametrize(
    "tail",
    [b"{", b'{"id": "2", "answer": "half', bytes(4096), b"\n", b'{"id": "9"}\n', '{"id": "\u00e9'.encode()[:-1]],
)
def test_half_a_row_at_the_end_is_cut_off(path: Path, tail: bytes) -> None:
    asked = write(path, 2)
    whole = path.read_bytes()
    path.write_bytes(whole + tail)
    with open_journal(path, RECORD) as journal:
        assert path.read_bytes() == whole
        assert [item.id for item in journal.unfinished(items(3))] == ["2"]
        journal.write(row(asked[0].__class__("2", "line 3", Ask("What?"))))
    assert [json.loads(line)["id"] for line in path.read_text().splitlines()] == ["0", "1", "2"]


def test_every_cut_of_the_file_leaves_whole_rows(path: Path) -> None:
    """Whatever part of the file a kill or a power failure leaves, the rows before it count, and the rest is asked."""
    write(path, 3)
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with open_journal(path, RECORD) as journal:
            left = journal.unfinished(items(3))
            assert len(left) == 3 - whole[:length].count(b"\n")
            for item in left:
                journal.write(row(item))
        assert path.read_bytes() == whole


def test_a_damaged_row_before_the_end_is_refused(path: Path) -> None:
    write(path, 3)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + lines[1][:20] + b"\n" + lines[2])
    before = path.read_bytes()
    with pytest.raises(EdgeError, match="line 2 is no row of a batch"), open_journal(path, RECORD):
        pass
    assert path.read_bytes() == before


@pytest.mark.parametrize("content", [b"my notes", b'{"id": "1"}\n', b"a\nb\n"])
def test_another_file_is_never_touched(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(EdgeError, match="exists and is no batch that could go on"), open_journal(path, RECORD):
        pass
    assert path.read_bytes() == content
    assert not record_path(path).exists()


def test_a_folder_is_no_output(path: Path) -> None:
    path.mkdir()
    with pytest.raises(EdgeError, match="is no file"), open_journal(path, RECORD):
        pass
    with pytest.raises(EdgeError, match="is no folder"), open_journal(path.parent / "absent" / "x.jsonl", RECORD):
        pass


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bundle": "c" * 64}, "was begun with bundle 'bbb"),
        ({"engine": "openvino"}, "was begun with engine 'onnxruntime', and not 'openvino'"),
        ({"prompt": "Why?"}, "was begun with prompt 'What?', and not 'Why?'"),
        ({"options": {"seed": 2}}, "was begun with seed 1, and not 2"),
        ({"options": {}}, "was begun with seed 1, and not None"),
        ({"votes": 3}, "was begun with votes None, and not 3"),
    ],
)
def test_another_batch_is_not_mixed_in(path: Path, change: dict[str, Any], message: str) -> None:
    write(path, 1)
    before = path.read_bytes(), record_path(path).read_bytes()
    with pytest.raises(EdgeError) as raised, open_journal(path, RECORD | change):
        pass
    assert message in str(raised.value)
    assert (path.read_bytes(), record_path(path).read_bytes()) == before


def test_an_answer_to_another_question_is_refused(path: Path) -> None:
    write(path, 2)
    with (
        open_journal(path, RECORD) as journal,
        pytest.raises(EdgeError, match="has an answer for '0' to another prompt"),
    ):
        journal.unfinished(items(3, prompt="Why?"))


def test_a_batch_without_a_finished_row_may_begin_otherwise(path: Path) -> None:
    write(path, 0)
    with open_journal(path, RECORD | {"prompt": "Why?"}):
        assert json.loads(record_path(path).read_text())["prompt"] == "Why?"


def test_other_versions_are_said_and_not_refused(path: Path) -> None:
    write(path, 1)
    with open_journal(path, RECORD | {"versions": {"a": "2"}}) as journal:
        assert journal.changed == {"a": "1"}
    with open_journal(path, RECORD) as journal:
        assert not journal.changed


def test_rows_without_a_record_are_not_continued(path: Path) -> None:
    write(path, 1)
    record_path(path).unlink()
    with pytest.raises(EdgeError, match=r"it has no record out\.jsonl\.batch\.json"), open_journal(path, RECORD):
        pass


def test_failed_rows_can_be_dropped(path: Path) -> None:
    asked = items(4)
    with open_journal(path, RECORD) as journal:
        for item in asked[:3]:
            journal.write(row(item, error="damaged" if item.id == "1" else None))
        assert journal.failed == {"1"}
    with open_journal(path, RECORD) as journal:
        assert journal.failed == {"1"}
        journal.drop_failed()
        assert [item.id for item in journal.unfinished(asked)] == ["1", "3"]
        journal.write(row(asked[1]))
    assert [json.loads(line)["id"] for line in path.read_text().splitlines()] == ["0", "2", "1"]
    with open_journal(path, RECORD) as journal:
        assert (journal.failed, set(journal.finished)) == (set(), {"0", "1", "2"})


def test_any_text_is_one_line(path: Path) -> None:
    texts = ["a\nb", "\u2028\x85\r", "\ud800 half", "\u56fe \U0001f600", '"\\', "\0"]
    with open_journal(path, RECORD) as journal:
        for number, text in enumerate(texts):
            journal.write(Row(str(number), answer=text, request="r", kept={"date": date(2026, 1, 2)}))
    found = [entry for _, entry in rows_of(path)]
    assert path.read_bytes().count(b"\n") == len(texts)
    assert [entry["answer"] for entry in found] == [*texts[:2], "? half", *texts[3:]]
    assert found[0]["date"] == "2026-01-02"


def test_one_process_writes(path: Path) -> None:
    with open_journal(path, RECORD):
        script = (
            "import sys; from pathlib import Path; from internvl_edge.batch.journal import open_journal\n"
            "from internvl_edge.base.errors import EdgeError\n"
            "try:\n    open_journal(Path(sys.argv[1]), {}).__enter__()\n"
            "except EdgeError as error:\n    print(error)"
        )
        done = subprocess.run([sys.executable, "-c", script, path], capture_output=True, text=True, check=True)
    assert f"another process (pid {os.getpid()}) writes" in done.stdout
    write(path, 1)


# ---- what the disk refuses ----


def test_a_full_disk_keeps_the_rows_and_leaves_no_half_one(path: Path) -> None:
    """RLIMIT_FSIZE refuses as a full disk does: part of a line is written first."""
    asked = write(path, 2)
    whole = path.read_bytes()
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    third = Item("2", "line 3", Ask("What?"))
    try:
        with open_journal(path, RECORD) as journal:
            resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + 25, limits[1]))
            with pytest.raises(EdgeError, match="finished rows were kept; make room") as raised:
                journal.write(row(third))
            assert path.read_bytes() == whole
            assert "2" not in journal.finished
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            journal.write(row(third))  # the same process may go on
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, previous)
    assert "\n" not in str(raised.value)
    assert path.read_bytes() == whole + line_of(row(third))
    assert [item.id for item in asked] == ["0", "1"]


@pytest.mark.parametrize(
    ("call", "number", "message"),
    [
        ("fsync", errno.ENOSPC, "is full"),
        ("write", errno.ENOSPC, "is full"),
        ("write", errno.EDQUOT, "is full"),
        ("write", errno.EROFS, "cannot write to"),
    ],
)
def test_a_row_that_was_refused_is_not_counted(
    path: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int, message: str
) -> None:
    write(path, 1)
    whole = path.read_bytes()
    with open_journal(path, RECORD) as journal:
        with monkeypatch.context() as patched:
            patched.setattr(f"internvl_edge.batch.journal.os.{call}", refusing(number))
            with pytest.raises(EdgeError, match=message):
                journal.write(row(items(2)[1]))
        assert path.read_bytes() == whole
        assert [item.id for item in journal.unfinished(items(2))] == ["1"]


def test_a_folder_that_cannot_be_written_is_one_line(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = os.open

    def open_(name: Any, flags: int, *rest: Any, **more: Any) -> int:
        if flags & os.O_CREAT:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), name)
        return opened(name, flags, *rest, **more)

    monkeypatch.setattr(os, "open", open_)
    expected = r"cannot write to .*out\.jsonl \(Read-only file system\); give another --output"
    with pytest.raises(EdgeError, match=expected), open_journal(path, RECORD):
        pass


def refusing(number: int) -> Callable[..., Any]:
    def refuse(*arguments: Any) -> Any:
        raise OSError(number, os.strerror(number))

    return refuse
