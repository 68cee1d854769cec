"""`run` with a form of the answer: what it prints, and mistakes in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from helpers.commands import assert_one_line, internvl_edge
from internvl_edge import export_bundle
from internvl_edge.demo import CHECKPOINT, demo_questions

pytest.importorskip("llguidance")


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_bundle(CHECKPOINT, tmp_path_factory.mktemp("reader") / "bundle")


def test_a_schema_a_regular_expression_and_choices(reader: Path, tmp_path: Path) -> None:
    asked = demo_questions()[0]
    schema = tmp_path / "schema.json"
    schema.write_text('{"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}', "utf-8")
    ask = ("run", reader, asked.question, "--image", asked.image, "--engine", "onnxruntime")
    for options, check in (
        (("--json-schema", schema), lambda text: isinstance(json.loads(text)["n"], int)),
        (("--regex", "[0-9]+[.][0-9]{2}"), lambda text: text == asked.expected + "\n"),
        (("--choice", "cheap", "--choice", "dear"), lambda text: text in ("cheap\n", "dear\n")),
    ):
        done = internvl_edge(*ask, *options)
        assert done.returncode == 0, done.stderr
        assert check(done.stdout), done.stdout


def test_mistakes_are_one_line(reader: Path, tmp_path: Path) -> None:
    broken, latin, list_ = tmp_path / "broken.json", tmp_path / "latin.json", tmp_path / "list.json"
    broken.write_text('{"type": ', "utf-8")
    latin.write_bytes(b'{"const": "caf\xe9"}')
    list_.write_text("[]", "utf-8")
    unsupported = tmp_path / "unsupported.json"
    unsupported.write_text('{"type": "array", "uniqueItems": true}', "utf-8")
    for options, named in (
        (("--json-schema", tmp_path / "none.json"), "none.json cannot be read"),
        (("--json-schema", broken), "not valid JSON"),
        (("--json-schema", latin), "not UTF-8"),
        (("--json-schema", list_), "expected an object"),
        (("--json-schema", unsupported), "uniqueItems"),
        (("--regex", "("), "unclosed group"),
        (("--choice", ""), "a choice is ''"),
        (("--regex", "a", "--choice", "b"), "--regex and --choice cannot be combined"),
        (("--regex", "a", "--json-schema", broken), "--json-schema and --regex cannot be combined"),
    ):
        assert_one_line(internvl_edge("run", reader, "x", *options), named)
