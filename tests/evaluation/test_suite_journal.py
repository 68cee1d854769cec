"""A suite that is interrupted continues: answers that are finished are not asked again, and none of another bundle."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from helpers import tiny
from helpers.commands import assert_one_line, internvl_edge
from internvl_edge import EdgeError, InternVL, evaluate, export_bundle
from internvl_edge.evaluation import EvaluationSettings, SuiteResult, evaluator
from internvl_edge.evaluation.suite import remove_answers

COUNT = 7


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    return export_bundle(tiny.write_checkpoint(folder / "checkpoint", dtype="float32"), folder / "bundle")


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    lines = []
    for number in range(COUNT):
        Image.fromarray(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(tmp_path / f"{number}.png")
        question = {"id": f"q{number}", "images": [f"{number}.png"], "prompt": f"What is {number}?", "answer": "x"}
        lines.append(question | {"tags": ["even" if number % 2 == 0 else "odd"]})
    path = tmp_path / "own.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    return path


class Asked:
    """Counts the questions that reach a model, and can fail at one of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.questions: list[str] = []
        self.fail_at: int | None = None
        real: Callable[..., Any] = InternVL.chat

        def chat(model: InternVL, question: str, *arguments: Any, **options: Any) -> Any:
            self.questions.append(question)
            if len(self.questions) == self.fail_at:
                raise KeyboardInterrupt
            return real(model, question, *arguments, **options)

        monkeypatch.setattr(InternVL, "chat", chat)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    return Asked(monkeypatch)


def _settings(bundle: Path, suite: Path, **more: Any) -> EvaluationSettings:
    settings: dict[str, Any] = {"suite": str(suite), "max_new_tokens": 4, "threads": 1, "rows": 1, "max_tiles": 1}
    return EvaluationSettings(bundle, **settings | {"answers": suite.parent / "kept"} | more)


def _same(one: SuiteResult | None, other: SuiteResult | None) -> bool:
    assert one is not None
    assert other is not None
    return (one.total, one.tags, one.mistakes) == (other.total, other.tags, other.mistakes)


def test_an_interrupted_suite_asks_only_what_is_left(bundle: Path, suite: Path, asked: Asked) -> None:
    whole = evaluate(_settings(bundle, suite, answers=None))
    assert sorted(asked.questions) == [f"What is {number}?" for number in range(COUNT)]
    for fail_at in (5, 6):  # three are asked at a time, so two are finished by then
        asked.questions.clear()
        asked.fail_at = fail_at
        with pytest.raises(KeyboardInterrupt):
            evaluate(_settings(bundle, suite))
        (journal,) = (suite.parent / "kept").glob("answers-bundle-*.jsonl")
        finished = {json.loads(line)["id"] for line in journal.read_text(encoding="utf-8").splitlines()}
        assert 0 < len(finished) < COUNT
        with journal.open("a", encoding="utf-8") as file:
            file.write('{"id": "q5", "ans')  # half a row, of a process that was killed
        asked.questions.clear()
        asked.fail_at = None
        again = evaluate(_settings(bundle, suite))
        assert sorted(asked.questions) == sorted(f"What is {n}?" for n in range(COUNT) if f"q{n}" not in finished)
        assert _same(again.suite, whole.suite)
        remove_answers(suite.parent / "kept")
        assert not [path for path in (suite.parent / "kept").iterdir() if path.name.startswith("answers-")]


def test_answers_of_the_reference_are_kept_too(bundle: Path, suite: Path, asked: Asked) -> None:
    data = suite.parent / "data.jsonl"
    data.write_text(json.dumps({"images": [], "prompt": "Why?"}), encoding="utf-8")
    settings = _settings(bundle, suite, reference=str(bundle), data=str(data))
    first = evaluate(settings)
    assert len(asked.questions) == 2 * COUNT
    asked.questions.clear()
    second = evaluate(settings)
    assert asked.questions == []
    assert _same(first.suite, second.suite)
    assert first.suite is not None
    loss = first.suite.total["anls"].loss
    assert loss is not None
    assert (loss.value, loss.low, loss.high) == (0, 0, 0), "a bundle loses nothing against itself"


@pytest.mark.parametrize("change", ["bundle", "tokens", "seed", "image", "rows", "prompt"])
def test_answers_to_anything_else_are_not_continued(
    bundle: Path, suite: Path, tmp_path: Path, asked: Asked, change: str
) -> None:
    evaluate(_settings(bundle, suite))
    asked.questions.clear()
    more: dict[str, Any] = {"tokens": {"max_new_tokens": 3}, "seed": {"seed": 1}, "rows": {"rows": 2}}.get(change, {})
    if change == "bundle":
        other = tiny.write_checkpoint(tmp_path / "other", dtype="float32", seed=5)
        bundle = export_bundle(other, tmp_path / "other-bundle")
    elif change == "image":
        os.utime(suite.parent / "3.png", (1, 1))
    elif change == "prompt":
        suite.write_text(suite.read_text(encoding="utf-8").replace("What is 2?", "What is two?"), encoding="utf-8")
    evaluate(_settings(bundle, suite, **more))
    assert len(asked.questions) == COUNT


def test_several_rows_give_the_answers_of_one(bundle: Path, suite: Path) -> None:
    alone, together = (evaluate(_settings(bundle, suite, rows=rows, answers=None)).suite for rows in (2, 4))
    assert _same(alone, together), "an answer does not depend on what is asked beside it"


def test_a_damaged_image_ends_the_evaluation_by_name_and_keeps_the_other_answers(
    bundle: Path, suite: Path, asked: Asked
) -> None:
    good = (suite.parent / "4.png").read_bytes()
    (suite.parent / "4.png").write_bytes(good[:30])
    with pytest.raises(EdgeError, match=r"q4: .*; mend it and repeat the command"):
        evaluate(_settings(bundle, suite))
    (journal,) = (suite.parent / "kept").glob("answers-bundle-*.jsonl")
    rows = [json.loads(line) for line in journal.read_text(encoding="utf-8").splitlines()]
    answered = {row["id"] for row in rows if row["error"] is None}
    assert answered
    asked.questions.clear()
    with pytest.raises(EdgeError, match="q4: "):
        evaluate(_settings(bundle, suite))
    assert "What is 4?" in asked.questions, "what failed is asked again"
    assert not {f"q{question[8:-1]}" for question in asked.questions} & answered


def test_the_command_keeps_answers_in_the_report_until_it_is_written(
    bundle: Path, suite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied = shutil.copytree(bundle, tmp_path / "bundle")
    (suite.parent / "6.png").write_bytes(b"")
    common = ("evaluate", copied, "--suite", suite, "--max-new-tokens", 3, "--threads", 1, "--max-tiles", 1)
    assert_one_line(internvl_edge(*common), "q6: ", "mend it and repeat the command")
    report = tmp_path / "bundle.report"
    assert len(list(report.glob("answers-bundle-*.jsonl"))) == 1
    Image.new("RGB", (9, 9)).save(suite.parent / "6.png")
    found = internvl_edge(*common)
    assert found.returncode == 0, found.stderr
    assert sorted(path.name for path in report.iterdir() if not path.name.endswith(".html")) == ["report.json"]
    refused = suite.parent / "file"
    refused.write_text("x", encoding="utf-8")
    assert_one_line(internvl_edge(*common, "--replace", "--report", refused / "below"), "below", "--report")


def test_a_gpu_has_one_row(bundle: Path, suite: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[int] = []

    def load(folder: Path, device: str, **options: Any) -> InternVL:
        loaded.append(options["rows"])
        raise EdgeError("no more")

    monkeypatch.setattr(evaluator.InternVL, "load", load)
    for device in ("cuda", "cpu"):
        with pytest.raises(EdgeError, match="no more"):
            evaluate(_settings(bundle, suite, device=device, rows=8))
    assert loaded == [1, 8]
