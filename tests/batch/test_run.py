"""Many items through one model: right answers, one row each, errors that are rows, and work that is shared."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from helpers.photographs import sideways
from internvl_edge import InternVL
from internvl_edge.base.errors import EdgeError, EngineError
from internvl_edge.batch.inputs import read_items
from internvl_edge.batch.items import Ask, Item
from internvl_edge.batch.journal import open_journal, rows_of
from internvl_edge.batch.rows import Row, answer
from internvl_edge.batch.run import READ_AHEAD, Summary, answers, run
from internvl_edge.demo import demo_questions
from internvl_edge.runtime.answer_format import AnswerFormat

QUESTIONS = demo_questions()
ASK = Ask(options={"max_new_tokens": 24})


def picture_item(name: str, **values: Any) -> Item:
    asked = QUESTIONS[0]
    ask = Ask(asked.question, options={"max_new_tokens": 24}, **values)
    return Item(name, name, ask, (asked.image,), (str(asked.image),))


def run_on(model: InternVL, items: list[Item], path: Path, **options: Any) -> Summary:
    with open_journal(path, {}) as journal:
        return run(lambda: nullcontext(model), items, journal, **options)


def rows_in(path: Path) -> dict[str, dict[str, Any]]:
    found = [row for _, row in rows_of(path)]
    assert len({row["id"] for row in found}) == len(found)
    return {row["id"]: row for row in found}


def test_every_row_has_the_answer_to_its_own_question(model: InternVL, table: Path, tmp_path: Path) -> None:
    items = read_items(table, ASK).items
    done = run_on(model, items, tmp_path / "out.jsonl")
    rows = rows_in(tmp_path / "out.jsonl")
    assert (done.items, done.answered, done.failed, done.earlier, done.stopped) == (12, 12, 0, 0, "")
    assert done.output_tokens == sum(row["output_tokens"] for row in rows.values())
    assert {name: row["answer"] for name, row in rows.items()} == {
        item.id: QUESTIONS[int(item.id[0])].expected for item in items
    }
    alone = model.chat(QUESTIONS[0].question, [QUESTIONS[0].image], max_new_tokens=24)
    row = rows["0-0"]
    assert (row["prompt_tokens"], row["image_tokens"]) == (len(alone.prompt_ids), alone.image_tokens)
    assert (row["output_tokens"], row["tiles"]) == (len(alone.output_ids), alone.tiles)
    assert (row["finish_reason"], row["error"], row["agreement"], row["replies"]) == ("stop", None, None, 1)
    assert set(row["timings"]) == {"preprocess_s", "waiting_s", "vision_s", "prefill_s", "decode_s"}


def test_equal_items_share_the_vision_work_and_have_a_row_each(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with InternVL.load(bundle, engine="onnxruntime", rows=4, threads=1) as model:
        encoded: list[int] = []
        encode = model._engine.encode
        monkeypatch.setattr(model._engine, "encode", lambda tiles: encoded.append(len(tiles)) or encode(tiles))
        run_on(model, [picture_item(str(number)) for number in range(6)], tmp_path / "out.jsonl")
    assert sum(encoded) == 3
    assert {row["answer"] for row in rows_in(tmp_path / "out.jsonl").values()} == {QUESTIONS[0].expected}


def test_photographs_are_turned_upright_on_request(model: InternVL, tmp_path: Path) -> None:
    asked = QUESTIONS[0]
    photo = sideways(asked.image, tmp_path / "photo.png")
    rows: list[dict[str, Any]] = [{"id": "upright", "exif": True}, {"id": "stored"}]
    path = tmp_path / "table.jsonl"
    path.write_text("".join(json.dumps({**row, "images": photo.name, "prompt": asked.question}) + "\n" for row in rows))
    run_on(model, read_items(path, ASK).items, tmp_path / "out.jsonl")
    answers = {name: row["answer"] for name, row in rows_in(tmp_path / "out.jsonl").items()}
    reply = model.chat(asked.question, [photo], max_new_tokens=24, exif=True)
    assert answers["upright"] == asked.expected == reply.text
    assert answers["stored"] != asked.expected


def test_what_goes_wrong_with_an_item_is_its_row(model: InternVL, tmp_path: Path) -> None:
    (tmp_path / "damaged.png").write_bytes(QUESTIONS[0].image.read_bytes()[:2000])
    (tmp_path / "text.png").write_text("no image")
    path = tmp_path / "table.jsonl"
    rows = [
        {"id": "good", "images": str(QUESTIONS[0].image), "prompt": QUESTIONS[0].question},
        {"id": "damaged", "images": "damaged.png"},
        {"id": "text", "images": ["text.png"]},
        {"id": "absent", "images": "absent.png"},
        {"id": "web", "images": "https://host/a.png"},
        {"id": "marks", "prompt": "<image> and <image>?", "images": str(QUESTIONS[0].image)},
        {"id": "long", "prompt": "Why?", "max_new_tokens": 10_000_000},
        {"id": "regex", "prompt": "Why?", "regex": "("},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = run_on(model, read_items(path, Ask("What?", options=ASK.options)).items, tmp_path / "out.jsonl")
    found = rows_in(tmp_path / "out.jsonl")
    assert (done.answered, done.failed) == (1, 7)
    assert found.pop("good")["answer"] == QUESTIONS[0].expected
    errors = {name: row["error"] for name, row in found.items()}
    assert all(row["answer"] is None and row["finish_reason"] is None for row in found.values())
    assert all(error and "\n" not in error for error in errors.values())
    for name, part in {"absent": "No such file", "web": "is an address", "long": "exceed the context"}.items():
        assert part in errors[name]


@pytest.mark.parametrize(("most", "rows"), [(0, 1), (2, 3), (None, 10)])
def test_too_many_errors_stop_the_run(model: InternVL, tmp_path: Path, most: int | None, rows: int) -> None:
    items = [Item(str(number), "x", Ask("What?"), (tmp_path / "absent",)) for number in range(10)]
    done = run_on(model, items, tmp_path / "out.jsonl", max_errors=most)
    assert len(rows_in(tmp_path / "out.jsonl")) == done.failed == rows
    assert bool(done.stopped) == (most is not None)
    again = run_on(model, items, tmp_path / "out.jsonl", max_errors=most)
    assert (again.failed, again.earlier) == (rows, rows)
    assert bool(again.stopped) == (most is not None)


def test_a_form_gives_values(model: InternVL, tmp_path: Path) -> None:
    schema = {"type": "object", "properties": {"total": {"enum": [1950, 3]}}, "required": ["total"]}
    form = AnswerFormat.json_schema(schema, compact=True)
    items = [
        picture_item("json", answer_format=form),
        Item("cut", "x", Ask("What?", answer_format=form, options={"max_new_tokens": 2})),
        picture_item("choice", choices=("19.50", "3")),
        picture_item("regex", answer_format=AnswerFormat.regex("[a-z]{4}")),
    ]
    run_on(model, items, tmp_path / "out.jsonl")
    rows = rows_in(tmp_path / "out.jsonl")
    assert rows["json"]["json"]["total"] in (1950, 3)
    assert rows["json"]["json"] == json.loads(rows["json"]["answer"])
    assert rows["cut"]["json"] is None
    assert "ended by max_new_tokens; raise it" in rows["cut"]["error"]
    assert (rows["choice"]["answer"], rows["choice"]["json"]) == ("19.50", None)
    assert len(rows["regex"]["answer"]) == 4


def test_votes_count_replies(model: InternVL, tmp_path: Path) -> None:
    items = [picture_item(str(number), votes=number) for number in (1, 3, 9)]
    items.append(picture_item("choice", votes=3, choices=("19.50", "20.00")))
    items.append(picture_item("reason", reason=True, choices=("19.50", "20.00")))
    run_on(model, items, tmp_path / "out.jsonl")
    rows = rows_in(tmp_path / "out.jsonl")
    assert {rows[name]["answer"] for name in ("1", "3", "9", "choice")} == {QUESTIONS[0].expected}
    assert rows["reason"]["answer"] in ("19.50", "20.00")
    assert rows["1"]["replies"] == 1
    assert 1 < rows["9"]["replies"] <= 9
    assert all(0 < row["agreement"] <= 1 for row in rows.values())
    assert rows["3"]["output_tokens"] > rows["1"]["output_tokens"]


def test_no_more_items_are_under_way_than_rows_and_those_read_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """Items are taken when there is room for them, and one with votes counts as so many."""
    running, most, lock = [0], [0], threading.Lock()

    def slow(model: InternVL, item: Item) -> Row:
        with lock:
            running[0] += item.ask.votes or 1
            most[0] = max(most[0], running[0])
        time.sleep(0.005)
        with lock:
            running[0] -= item.ask.votes or 1
        return Row(item.id)

    taken: list[str] = []

    def source() -> Iterator[Item]:
        for number in range(60):
            taken.append(str(number))
            yield Item(str(number), "x", Ask("?", votes=3 if number % 3 == 0 else None))

    class Model:
        rows = 4

    monkeypatch.setattr("internvl_edge.batch.run.answer", slow)
    found = [row.id for _, row in answers(Model(), source())]  # type: ignore[arg-type]
    assert sorted(found, key=int) == taken == [str(number) for number in range(60)]
    assert 4 <= most[0] <= 4 + READ_AHEAD


def test_stopping_early_takes_no_more_items(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    monkeypatch.setattr("internvl_edge.batch.run.answer", lambda model, item: Row(item.id))

    class Model:
        rows = 2

    def source() -> Iterator[Item]:
        for number in range(10_000):
            taken.append(number)
            yield Item(str(number), "x", Ask("?"))

    with closing(answers(Model(), source())) as results:  # type: ignore[arg-type]
        next(results)
    time.sleep(0.5)
    assert len(taken) < 50
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("item-")]


def test_a_failing_engine_ends_the_run_and_keeps_the_rows(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    items = [picture_item(str(number)) for number in range(8)]
    with InternVL.load(bundle, engine="onnxruntime", rows=2, threads=1) as model:
        for_rows, calls = model._engine.decode_rows, [0]

        def failing(*arguments: Any) -> list[np.ndarray]:
            calls[0] += 1
            if calls[0] == 20:
                raise EngineError("the device is gone")
            return for_rows(*arguments)

        monkeypatch.setattr(model._engine, "decode_rows", failing)
        with pytest.raises(EngineError, match="the device is gone"):
            run_on(model, items, tmp_path / "out.jsonl")
    kept = rows_in(tmp_path / "out.jsonl")
    assert 0 < len(kept) < 8
    with InternVL.load(bundle, engine="onnxruntime", rows=2, threads=1) as model:
        done = run_on(model, items, tmp_path / "out.jsonl")
    assert (done.earlier, done.answered) == (len(kept), 8)


def test_a_full_disk_ends_the_run_and_keeps_the_rows(
    model: InternVL, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    items = [picture_item(str(number)) for number in range(6)]
    with open_journal(tmp_path / "out.jsonl", {}) as journal:
        written, write = [], journal.write

        def full(row: Row) -> None:
            if len(written) == 3:
                raise EdgeError("the disk is full")
            write(row)
            written.append(row.id)

        monkeypatch.setattr(journal, "write", full)
        with pytest.raises(EdgeError, match="the disk is full"):
            run(lambda: nullcontext(model), items, journal)
    assert list(rows_in(tmp_path / "out.jsonl")) == written
    assert run_on(model, items, tmp_path / "out.jsonl").answered == 6


def test_nothing_is_loaded_where_nothing_is_to_do(model: InternVL, tmp_path: Path) -> None:
    items = [picture_item("a")]
    run_on(model, items, tmp_path / "out.jsonl")
    with open_journal(tmp_path / "out.jsonl", {}) as journal:
        done = run(lambda: pytest.fail("loaded"), items, journal)
    assert (done.items, done.earlier, done.answered) == (1, 1, 1)


def test_prompts_first_changes_no_answer(bundle: Path, model: InternVL, tmp_path: Path) -> None:
    pictures = np.random.default_rng(3).integers(0, 256, (8, 100, 150, 3), dtype=np.uint8)
    items = [
        Item(
            str(number),
            "x",
            Ask(f"What is {number}?", options={"max_new_tokens": 10 + number}),
            (Image.fromarray(each),),
        )
        for number, each in enumerate(pictures)
    ]
    with InternVL.load(bundle, engine="onnxruntime", rows=4, threads=1) as fair:
        found = [{row.id: row.answer for _, row in answers(each, items)} for each in (model, fair)]
        found.append({item.id: answer(fair, item).answer for item in items})
    assert found[0] == found[1] == found[2]
    assert len(set(found[0].values())) > 1
