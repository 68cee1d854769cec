"""The demo answers its own questions, with both text models, from an installed package's files alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from helpers.repository import REPOSITORY
from internvl_edge.base.errors import EdgeError
from internvl_edge.cli import cli
from internvl_edge.demo import CHECKPOINT, demo_questions

INTERNLM2 = REPOSITORY / "examples" / "reader" / "internlm2"


@pytest.mark.parametrize("checkpoint", [CHECKPOINT, INTERNLM2], ids=["qwen2", "internlm2"])
def test_the_small_model_reads_the_shipped_pictures(checkpoint: Path) -> None:
    done = CliRunner().invoke(cli, ["demo", "--checkpoint", str(checkpoint), "--json"])
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


def test_without_a_choice_the_shipped_checkpoint_answers(tmp_path: Path) -> None:
    done = CliRunner().invoke(cli, ["demo", "--json"])
    assert json.loads(done.stdout)["checkpoint"] == str(CHECKPOINT)


def test_a_checkpoint_that_does_not_exist_is_one_line(tmp_path: Path) -> None:
    done = CliRunner().invoke(cli, ["demo", "--checkpoint", str(tmp_path / "none")])
    assert isinstance(done.exception, EdgeError)
