"""`internvl-edge batch`: the output in each form, exit statuses, continuing, and what is refused in one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from helpers.commands import assert_one_line, internvl_edge
from internvl_edge import export_bundle
from internvl_edge.demo import CHECKPOINT, demo_questions

QUESTIONS = demo_questions()
BASE = ("--max-new-tokens", 24, "--threads", 1, "--engine", "onnxruntime", "--quiet")

LONG = ("--max-new-tokens", 300)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_bundle(CHECKPOINT, tmp_path_factory.mktemp("batch") / "bundle")


@pytest.fixture
def table(tmp_path: Path) -> Path:
    rows: list[dict[str, Any]] = [
        {"id": f"q{turn}-{number}", "images": each.image.name, "prompt": each.question, "page": number}
        for turn in range(2)
        for number, each in enumerate(QUESTIONS)
    ]
    for each in QUESTIONS:
        shutil.copy(each.image, tmp_path)
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


EXPECTED = {f"q{turn}-{number}": each.expected for turn in range(2) for number, each in enumerate(QUESTIONS)}


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_table_is_answered_and_continued(bundle: Path, table: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    done = internvl_edge("batch", bundle, table, "-o", out, "--limit", 4, *BASE)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"{out}: 4 of 4 rows answered; ")
    done = internvl_edge("batch", bundle, table, "-o", out, "--json", *BASE)
    found = json.loads(done.stdout)
    assert (found["items"], found["answered"], found["earlier"], found["failed"]) == (6, 6, 4, 0)
    assert {row["id"]: row["answer"] for row in lines(out)} == EXPECTED
    assert len(lines(out)) == len(EXPECTED)
    again = internvl_edge("batch", bundle, table, "-o", out, *BASE)
    assert again.stdout == f"{out}: 6 of 6 rows answered, 6 of them earlier\n"


def test_ordered_output_is_in_the_order_of_the_input(bundle: Path, table: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    done = internvl_edge("batch", bundle, table, "-o", out, "--ordered", "--keep", "page", *BASE)
    assert done.returncode == 0, done.stderr
    assert [(row["id"], row["page"]) for row in lines(out)] == [(name, int(name[-1])) for name in EXPECTED]
    assert_one_line(internvl_edge("batch", bundle, table, "-o", out, *BASE), "was begun with --ordered")


def test_parquet_output_has_the_same_rows(bundle: Path, table: Path, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    out = tmp_path / "out.parquet"
    schema = tmp_path / "schema.json"
    schema.write_text('{"type": "object", "properties": {"x": {"enum": [1, 2]}}, "required": ["x"]}')
    done = internvl_edge("batch", bundle, table, "-o", out, "--keep", "page", *BASE, "--json-schema", schema, *LONG)
    assert done.returncode == 0, done.stderr
    rows = parquet.read_table(out).to_pylist()
    journal = {row["id"]: row for row in lines(tmp_path / "out.parquet.journal")}
    assert [row["id"] for row in rows] == list(EXPECTED)
    for row in rows:
        kept = journal[row["id"]]
        assert json.loads(row.pop("json")) == kept.pop("json") == json.loads(row["answer"])
        assert row.pop("page") == str(kept.pop("page"))
        assert row == kept


def test_a_folder_with_a_damaged_image(bundle: Path, table: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"nothing")
    out = tmp_path / "out.jsonl"
    asked = tmp_path / "prompt.txt"
    asked.write_text(f"{QUESTIONS[0].question}\n")
    command = ("batch", bundle, tmp_path, "-o", out, "--prompt", f"@{asked}", *BASE)
    done = internvl_edge(*command)
    assert done.returncode == 1
    assert "3 of 4 rows answered, 1 have errors" in done.stdout
    rows = {row["id"]: row for row in lines(out)}
    assert rows[QUESTIONS[0].image.name]["answer"] == QUESTIONS[0].expected
    assert "broken.png" in rows["broken.png"]["error"]
    assert internvl_edge(*command).returncode == 1
    shutil.copy(QUESTIONS[0].image, tmp_path / "broken.png")
    mended = internvl_edge(*command, "--retry-errors")
    assert (mended.returncode, "4 of 4 rows answered, 3 of them earlier" in mended.stdout) == (0, True)
    assert {row["id"] for row in lines(out)} == set(rows)


def test_too_many_errors_stop_and_keep_the_rows(bundle: Path, tmp_path: Path) -> None:
    table = tmp_path / "in.csv"
    table.write_text("images\n" + "absent.png\n" * 20)
    out = tmp_path / "out.parquet" if _has_pyarrow() else tmp_path / "out.jsonl"
    done = internvl_edge("batch", bundle, table, "-o", out, "--prompt", "What?", "--max-errors", 3, *BASE)
    assert done.returncode == 1
    assert done.stderr == "stopped: 4 rows have errors, more than --max-errors 3; finished rows are kept\n"
    assert out.exists() == (out.suffix == ".jsonl")


def test_votes_and_forms_of_the_command_line(bundle: Path, table: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    choices = ("--choice", "19.50", "--choice", "25", "--choice", "MUSEUM GATE 28")
    done = internvl_edge("batch", bundle, table, "-o", out, "--votes", 3, "--limit", 3, *choices, *BASE)
    assert done.returncode == 0, done.stderr
    assert [row["answer"] for row in sorted(lines(out), key=lambda row: row["id"])] == [q.expected for q in QUESTIONS]
    assert {row["agreement"] for row in lines(out)} == {1.0}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--max-new-tokens", 25), "was begun with max_new_tokens 24, and not 25"),
        (("--prompt", "What is it?"), "was begun with prompt None, and not 'What is it?'"),
        (("--regex", "[0-9]"), "was begun with form None, and not "),
        (("--rows", 1), "was begun with several_rows True, and not False"),
        (("--exact",), "was begun with exact False, and not True"),
        (("--dialect", "standard"), "was begun with dialect None, and not 'standard'"),
    ],
)
def test_another_batch_is_not_mixed_into_the_output(
    bundle: Path, begun: Path, options: tuple[Any, ...], message: str
) -> None:
    before = begun.read_bytes()
    done = internvl_edge("batch", bundle, begun.with_name("in.jsonl"), "-o", begun, *BASE, *options)
    assert_one_line(done, message)
    assert begun.read_bytes() == before


def test_another_bundle_and_another_question_are_not_mixed_in(bundle: Path, begun: Path, tmp_path: Path) -> None:
    other = export_bundle(CHECKPOINT, tmp_path / "other", dtype="float16")
    table = begun.with_name("in.jsonl")
    assert_one_line(internvl_edge("batch", other, table, "-o", begun, *BASE), "was begun with bundle")
    changed = tmp_path / "in.jsonl"
    changed.write_text(table.read_text().replace("Bagel", "Juice"))
    assert_one_line(internvl_edge("batch", bundle, changed, "-o", begun, *BASE), "an answer for 'q0-0' to another")


@pytest.fixture(scope="module")
def begun(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output with one row."""
    folder = tmp_path_factory.mktemp("begun")
    asked = QUESTIONS[0]
    shutil.copy(asked.image, folder)
    row = {"id": "q0-0", "images": asked.image.name, "prompt": asked.question}
    (folder / "in.jsonl").write_text(json.dumps(row) + "\n")
    done = internvl_edge("batch", bundle, folder / "in.jsonl", "-o", folder / "out.jsonl", *BASE)
    assert done.returncode == 0, done.stderr
    return folder / "out.jsonl"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("in.jsonl", "in.jsonl", "-o", "o.jsonl"), "2 inputs were given, expected one; quote a pattern"),
        (("in.jsonl", "-o", "o.txt"), "has no known ending"),
        (("absent", "-o", "o.jsonl"), "does not exist"),
        (("in.jsonl", "-o", "absent/o.jsonl"), "absent is no folder; make it"),
        (("in.jsonl", "-o", "o.jsonl", "--prompt", "@absent"), "absent cannot be read"),
        (("in.jsonl", "-o", "o.jsonl", "--sure", 0.9), "sure is for votes"),
        (("in.jsonl", "-o", "o.jsonl", "--regex", "a", "--choice", "b"), "--regex and --choice cannot be combined"),
        (("in.jsonl", "-o", "o.jsonl", "--keep", "nothing"), "has no column 'nothing' to keep"),
        (("in.jsonl", "-o", "o.jsonl", "--temperature", "nan"), "temperature is nan"),
        (("in.jsonl", "-o", "/sys/o.jsonl"), "cannot write to /sys/o.jsonl"),
        (("in.jsonl", "-o", "notes.jsonl"), "exists and is no batch that could go on"),
    ],
)
def test_mistakes_are_one_line(
    bundle: Path, table: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[Any, ...], message: str
) -> None:
    monkeypatch.chdir(table.parent)
    Path("notes.jsonl").write_text("mine\n")
    assert_one_line(internvl_edge("batch", bundle, *arguments, *BASE), message)
    assert Path("notes.jsonl").read_text() == "mine\n"


def test_progress_says_rate_and_failures(bundle: Path, table: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"nothing")
    loud = [each for each in BASE if each != "--quiet"]
    done = internvl_edge("batch", bundle, tmp_path, "-o", tmp_path / "o.jsonl", "--prompt", "What?", *loud)
    assert "[2 of 2] answering, 4 items" in done.stderr
    assert "broken.png: " in done.stderr
    assert "items/s" in done.stdout


def _has_pyarrow() -> bool:
    try:
        import pyarrow  # noqa: F401
    except ImportError:
        return False
    return True
