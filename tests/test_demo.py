"""The demo answers its own questions, with both text models, from an installed package's files alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from internvl_edge.cli import cli
from internvl_edge.demo import TEXT_MODELS, demo_checkpoint, demo_questions
from internvl_edge.errors import EdgeError


@pytest.mark.parametrize("text_model", TEXT_MODELS)
def test_the_small_model_reads_the_shipped_pictures(text_model: str) -> None:
    done = CliRunner().invoke(cli, ["demo", "--text-model", text_model, "--json"])
    assert done.exit_code == 0, done.output
    answers = json.loads(done.stdout)["answers"]
    assert [answer["answer"] for answer in answers] == [answer["expected"] for answer in answers]


def test_the_table_shows_picture_question_answer_and_what_was_expected(tmp_path: Path) -> None:
    done = CliRunner().invoke(cli, ["demo", "-o", str(tmp_path / "bundle")])
    assert done.exit_code == 0, done.output
    for asked in demo_questions():
        line = next(line for line in done.stdout.splitlines() if asked.image.name in line)
        assert asked.question in line
        assert line.count(asked.expected) == 2
    assert (tmp_path / "bundle" / "manifest.json").exists()


def test_only_two_text_models_are_shipped() -> None:
    with pytest.raises(EdgeError, match="'phi' is not one of qwen2, internlm2"):
        demo_checkpoint("phi")
