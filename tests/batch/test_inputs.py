"""What a batch asks: every form of input, and one line that names the place of each mistake."""

from __future__ import annotations

import csv
import errno
import json
import os
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from internvl_edge.base.errors import ImageError, PromptError
from internvl_edge.batch.inputs import COLUMNS, read_items
from internvl_edge.batch.items import ROW_OPTIONS, Ask, Item, grouped
from internvl_edge.model.preprocess import load_image
from internvl_edge.runtime.answer_format import AnswerFormat
from internvl_edge.runtime.options import ChatOptions

ASK = Ask("What is it?")


def jsonl(folder: Path, *rows: Any, name: str = "table.jsonl") -> Path:
    path = folder / name
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def read(path: str | Path, ask: Ask = ASK, keep: Sequence[str] = (), limit: int | None = None) -> list[Item]:
    return read_items(path, ask, keep=keep, limit=limit).items


def picture(path: Path, colour: str = "red") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), colour).save(path)
    return path


# ---- folders and patterns ----


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("b.png", "a/2.JPG", "a/10.jpg", ".hidden/x.png", ".y.png"):
        picture(tmp_path / "scans" / name)
    (tmp_path / "scans" / "notes.txt").write_text("no image")
    return tmp_path / "scans"


def test_a_folder_gives_its_images_by_their_paths(folder: Path) -> None:
    items = read(folder)
    assert [item.id for item in items] == ["b.png", "a/10.jpg", "a/2.JPG"]
    assert [item.images for item in items] == [(folder / item.id,) for item in items]
    assert {item.ask.prompt for item in items} == {"What is it?"}


def test_a_pattern_gives_ids_below_its_fixed_part(folder: Path) -> None:
    assert [item.id for item in read(f"{folder}/**/*.jpg")] == ["a/10.jpg"]
    assert [item.id for item in read(f"{folder}/a/*")] == ["10.jpg", "2.JPG"]
    assert [item.id for item in read(f"{folder}/?.png")] == ["b.png"]


def test_one_image_is_an_input(folder: Path) -> None:
    assert [(item.id, item.images) for item in read(folder / "b.png")] == [("b.png", (folder / "b.png",))]


def test_a_limit_takes_the_first_rows(folder: Path, tmp_path: Path) -> None:
    assert [item.id for item in read(folder, limit=2)] == ["b.png", "a/10.jpg"]
    assert [item.id for item in read(jsonl(tmp_path, {"id": "x"}, {"id": "y"}, "damaged"), limit=1)] == ["x"]


def test_a_name_that_is_no_utf_8_becomes_an_id(tmp_path: Path) -> None:
    name = b"caf\xe9.png".decode("utf-8", "surrogateescape")
    picture(tmp_path / "scans" / "a.png").rename(tmp_path / "scans" / name)
    (item,) = read(tmp_path / "scans")
    assert item.id == "caf\\xe9.png"
    assert item.id.encode()
    assert len(item.request) == 16
    assert load_image(item.images[0]).size == (8, 8)


def test_two_names_that_become_one_id_are_refused(tmp_path: Path) -> None:
    picture(tmp_path / "a.png").rename(tmp_path / b"\xe9.png".decode("utf-8", "surrogateescape"))
    picture(tmp_path / "\\xe9.png")
    with pytest.raises(PromptError, match="have the same id"):
        read(tmp_path)


def test_what_cannot_be_listed_is_said_and_links_to_nothing_are_rows(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "a" / "lost.png").symlink_to("nowhere.png")
    assert [item.id for item in read(f"{folder}/**/*.png")] == ["a/lost.png", "b.png"]
    assert "a/lost.png" in [item.id for item in read(folder)]
    listed = os.scandir

    def scandir(path: Any) -> Any:
        if Path(path).name == "a":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return listed(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(PromptError, match=r"the folder .*scans/a cannot be read \(Permission denied\)"):
        read(folder)


def test_a_pattern_of_tables_is_refused(folder: Path) -> None:
    jsonl(folder, {"image": "b.png"})
    with pytest.raises(PromptError, match=r"matches the table .*table\.jsonl.*; give one table at a time"):
        read(f"{folder}/*")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("absent", "does not exist; give a folder, a pattern or a table (.csv, .jsonl, .ndjson, .parquet)"),
        ("notes.txt", "is no image and no table"),
        ("*.nothing", "no file matches the pattern"),
        ("empty", "holds no images"),
    ],
)
def test_what_gives_no_image_is_one_line(tmp_path: Path, source: str, message: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("text")
    with pytest.raises(PromptError, match=message.replace("(", r"\(").replace(")", r"\)")):
        read(f"{tmp_path}/{source}")


def test_images_alone_ask_nothing(folder: Path) -> None:
    with pytest.raises(PromptError, match="give --prompt"):
        read(folder, Ask())
    with pytest.raises(PromptError, match="images have no columns to keep"):
        read(folder, keep=["label"])


# ---- tables ----

ROW = {
    "id": "7",
    "images": ["a.png", "b.png"],
    "prompt": 'Compare <image> with <image>, "please".\nNow.',
    "choices": ["same", "different"],
    "votes": 3,
    "sure": 0.95,
    "max_tiles": 2,
    "temperature": 0.5,
    "exif": True,
    "system": "",
    "label": "x",
}


def as_csv(folder: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path = folder / "table.csv"
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        for row in rows:
            texts = {name: json.dumps(value) if not isinstance(value, str) else value for name, value in row.items()}
            writer.writerow({name: "" if text == "null" else text for name, text in texts.items()})
    return path


def as_parquet(folder: Path, rows: Sequence[dict[str, Any]]) -> Path:
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    parquet.write_table(pyarrow.Table.from_pylist(list(rows)), folder / "table.parquet", row_group_size=2)
    return folder / "table.parquet"


@pytest.mark.parametrize("write", [lambda folder, rows: jsonl(folder, *rows), as_csv, as_parquet])
def test_every_kind_of_table_says_the_same(tmp_path: Path, write: Any) -> None:
    row = {name: value for name, value in ROW.items() if write is not as_csv or name != "system"}
    path = write(tmp_path, [row, dict.fromkeys(row) | {"id": "8", "prompt": "Why?"}])
    first, second = read(path, Ask("What?", options={"seed": 5}), keep=["label"])
    assert (first.id, first.kept, first.ask.prompt) == ("7", {"label": "x"}, ROW["prompt"])
    assert first.images == (tmp_path / "a.png", tmp_path / "b.png")
    assert (first.ask.choices, first.ask.votes, first.ask.sure) == (("same", "different"), 3, 0.95)
    expected = {"max_tiles": 2, "temperature": 0.5, "exif": True, "seed": 5}
    assert first.ask.options == (expected if write is as_csv else expected | {"system": ""})
    assert (second.ask, second.images) == (Ask("Why?", options={"seed": 5}), ())


def test_a_row_says_the_form_of_its_own_answer(tmp_path: Path) -> None:
    schema = {"type": "object", "properties": {"total": {"type": "number"}}}
    rows = [{"json_schema": schema}, {"json_schema": json.dumps(schema)}, {"regex": "[0-9]+"}, {}]
    ask = Ask("Which?", choices=("a", "b"))
    forms = [item.ask.form for item in read(jsonl(tmp_path, *rows), ask)]
    assert forms[0] == forms[1] == AnswerFormat.json_schema(schema)
    assert forms[2:] == [AnswerFormat.regex("[0-9]+"), AnswerFormat.choice(["a", "b"])]


def test_rows_without_an_id_are_numbered(tmp_path: Path) -> None:
    path = jsonl(tmp_path, {"prompt": "a"}, "", {"prompt": "b"}, {"id": 17, "prompt": "c"})
    assert [(item.id, item.place) for item in read(path)] == [("1", "line 1"), ("2", "line 3"), ("17", "line 4")]


def test_columns_without_a_meaning_are_named_and_left_out(tmp_path: Path) -> None:
    rows = [{"image": "a", "label": 1, "split": 2}, {"image": "b", "date": 3, "path": "b"}]
    found = read_items(jsonl(tmp_path, *rows), ASK, keep=["split"])
    assert found.unused == ("label", "date", "path"), "path is no mistake beside image"
    assert [dict(item.kept) for item in found.items] == [{"split": 2}, {}]


def test_all_options_of_a_question_can_be_columns_but_those_for_programs() -> None:
    programs = {"history", "logit_bias", "logprobs", "top_logprobs", "answer_format"}
    assert set(ROW_OPTIONS) == set(ChatOptions.__annotations__) - programs
    assert set(ROW_OPTIONS) < set(COLUMNS)


def test_addresses_stay_what_they_are(tmp_path: Path) -> None:
    names = ["data:image/png;base64,aaaa", "http://host/a.png", "sub/a.png", str(tmp_path / "b.png")]
    (item,) = read(jsonl(tmp_path, {"images": names}))
    assert item.images == (names[0], names[1], tmp_path / "sub/a.png", tmp_path / "b.png")


@pytest.mark.parametrize("shape", ["bytes", "struct", "list"])
def test_images_inside_of_parquet_are_read_when_they_are_needed(tmp_path: Path, shape: str) -> None:
    colours = ["red", "lime", "blue", "white", "black"]
    rows: list[dict[str, Any]] = []
    for number, colour in enumerate(colours):
        data = picture(tmp_path / "one.png", colour).read_bytes()
        value = {"bytes": data, "struct": {"bytes": data, "path": None}, "list": [{"bytes": data, "path": None}]}
        rows.append({"id": str(number), "image": value[shape]})
    items = read(as_parquet(tmp_path, rows))
    found = [load_image(item.images[0]).getpixel((0, 0)) for item in reversed(items)]
    expected = [Image.new("RGB", (1, 1), colour).getpixel((0, 0)) for colour in reversed(colours)]
    assert found == expected
    assert len({item.request for item in items}) == len(colours)
    assert items[0].request == read(as_parquet(tmp_path, rows))[0].request


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["{"], "line 1 is no JSON"),
        ([{"id": "a"}, "", "[1]"], "line 3 is a list, expected an object"),
        ([{"id": "a"}, {"id": "b"}, {"id": "a"}], "line 1 and line 3 have the same id 'a'"),
        ([{"id": "2"}, {}], "line 1 and line 2 have the same id '2'"),
        ([{"id": ""}], "line 1: its id is ''"),
        ([{"id": 1.5}], "line 1: its id is 1.5"),
        ([{"promt": "x"}], "line 1: there is no column 'promt'; did you mean prompt"),
        ([{"id": "a"}, {"max_tokens": 5}], "line 2: there is no column 'max_tokens'; did you mean max_new_tokens"),
        ([{"path": "a.png"}], "did you mean images"),
        ([{"img": "a.png", "prompt": "?"}], "there is no column 'img'; did you mean images"),
        ([{"image": "a"}, {"id": "b"}], "line 2 has neither an image nor a prompt of its own, as other rows have"),
        ([{"image": "a"}, {"image": None}], "line 2 has neither an image nor a prompt"),
        ([{"image": "a"}, {"image": []}], "line 2 has neither an image nor a prompt"),
        ([{"receipt": "a.png"}], "line 1 has neither an image nor a prompt of its own, and its columns 'receipt' have"),
        ([{"prompt": 5}], "line 1: prompt is 5, expected a text"),
        ([{"prompt": "  "}], "line 1: the prompt is empty"),
        ([{"image": "a", "images": ["a"]}], "there are two columns for images"),
        ([{"images": [3]}], "line 1: images has 3"),
        ([{"images": {"a": 1}}], "line 1: images has"),
        ([{"votes": 0}], "line 1: votes is 0"),
        ([{"votes": True}], "line 1: votes is True"),
        ([{"sure": 0.9}], "sure is for votes"),
        ([{"votes": 3, "sure": 0.2}], "sure is 0.2"),
        ([{"reason": "yes"}], "reason is 'yes', expected true or false"),
        ([{"reason": True, "regex": "a"}], "reason asks for free text first"),
        ([{"regex": "a", "choices": ["a"]}], "regex and choices cannot be combined"),
        ([{"choices": "a"}], "line 1: the choices are 'a'"),
        ([{"choices": []}], "there are 0 choices"),
        ([{"json_schema": 5}], "line 1: the JSON schema is a int"),
        ([{"json_schema": "{"}], "the JSON schema is not valid JSON"),
        ([{"max_tiles": "two"}], "max_tiles is 'two', expected a whole number"),
        ([{"temperature": "hot"}], "temperature is 'hot', expected a finite number"),
        ([], "has no rows"),
    ],
)
def test_a_mistake_in_a_row_names_its_line(tmp_path: Path, rows: list[Any], message: str) -> None:
    with pytest.raises(PromptError) as raised:
        read(jsonl(tmp_path, *rows))
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"id,prompt\na,b,c\n", "line 2 has 3 cells, the heading has 2"),
        (b'id,prompt\na,"x\ny"\nb\n', "line 4 has 1 cells"),
        (b"id,id\n", "the name 'id' twice"),
        (b"id,\n", "a column without a name"),
        (b"id,votes\na,many\n", "line 2: votes is 'many', expected a number, true or false"),
        (b"id,images\na,[1\n", "line 2"),
        (b'id,prompt\na,"b\n', "line 2 is no CSV"),
        (b"id,prompt\na,\xff\n", "is not UTF-8"),
        (b"", "has no rows"),
        (b"id,prompt\n", "has no rows"),
        (b"id;image\na;b\n", "one column 'id;image', separated with ';'; separate columns with commas"),
        (b"id\timage\na\tb\n", "separate columns with commas"),
    ],
)
def test_a_mistake_in_a_csv_file_names_its_line(tmp_path: Path, text: bytes, message: str) -> None:
    path = tmp_path / "table.csv"
    path.write_bytes(text)
    with pytest.raises(PromptError) as raised:
        read(path)
    assert message in str(raised.value)


@pytest.mark.parametrize("ends", ["\n", "\r\n", "\r"])
def test_csv_as_spreadsheets_write_it(tmp_path: Path, ends: str) -> None:
    """A byte order mark, any end of line, and images as long data: addresses."""
    data = "data:image/png;base64," + "A" * 500_000
    table = ends.join(["id,image,prompt", "a,x.png,Why?", f'b,"{data}",', 'c,y.png,"two', 'lines"', ""])
    (tmp_path / "table.csv").write_bytes(b"\xef\xbb\xbf" + table.encode())
    items = read(tmp_path / "table.csv")
    assert [(item.id, item.ask.prompt) for item in items] == [
        ("a", "Why?"),
        ("b", ASK.prompt),
        ("c", f"two{ends}lines"),
    ]
    assert [item.images for item in items] == [(tmp_path / "x.png",), (data,), (tmp_path / "y.png",)]


@pytest.mark.parametrize("name", ["table.csv", "table.jsonl"])
def test_a_line_that_is_too_long_is_refused_before_it_is_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr("internvl_edge.batch.tables.MOST_LINE_BYTES", 1 << 20)
    begin = b'{"prompt": "' if name.endswith("jsonl") else b"id,prompt\na,"
    (tmp_path / name).write_bytes(begin + b"x" * (20 << 20))
    tracemalloc.start()
    with pytest.raises(PromptError, match=r"line [12] has more than 1 MiB; give paths of images"):
        read(tmp_path / name)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 8 << 20


def test_columns_of_parquet_that_are_not_needed_may_hold_anything(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    columns = {
        "image": ["a.png", "b.png"],
        "bad text": pyarrow.Array.from_buffers(pyarrow.string(), 2, pyarrow.array([b"a", b"\xff"]).buffers()),
        "late": pyarrow.array([1 << 62, 0], pyarrow.timestamp("us")),
        "exact": pyarrow.array([1, 2], pyarrow.timestamp("ns")),
        "vector": [[0.5] * 64] * 2,
    }
    parquet.write_table(pyarrow.table(columns), tmp_path / "table.parquet")
    found = read_items(tmp_path / "table.parquet", ASK)
    assert (len(found.items), found.unused) == (2, ("bad text", "late", "exact", "vector"))
    for name in ("bad text", "late"):
        with pytest.raises(PromptError, match=rf"rows 1 to 2: a value of the column '{name}' cannot be read \(.*\);"):
            read(tmp_path / "table.parquet", keep=[name])
    table = pyarrow.table([["a.png"], ["b.png"]], names=["image", "image"])
    parquet.write_table(table, tmp_path / "table.parquet")
    with pytest.raises(PromptError, match="has the name 'image' twice"):
        read(tmp_path / "table.parquet")


def test_ids_of_parquet_may_be_null_and_must_differ(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"id": None, "image": "a"}, {"id": "x", "image": "b"}, {"id": None, "image": "c"}]
    assert [item.id for item in read(as_parquet(tmp_path, rows))] == ["1", "x", "3"]
    with pytest.raises(PromptError, match="row 2 and row 3 have the same id '3'"):
        read(as_parquet(tmp_path, [rows[0], {"id": "3", "image": "b"}, rows[2]]))


def test_kept_values_are_what_json_can_hold(tmp_path: Path) -> None:
    score = [float("nan"), float("inf"), 1.5]
    rows = [{"image": "a.png", "score": value, "list": [{"x": value}]} for value in score]
    kept = [item.kept for item in read(as_parquet(tmp_path, rows), keep=["score", "list"])]
    assert kept == [{"score": value, "list": [{"x": value}]} for value in (None, None, 1.5)]
    data = picture(tmp_path / "one.png").read_bytes()
    path = as_parquet(tmp_path, [{"image": data, "raw": b"x"}])
    for name in ("raw", "image"):
        with pytest.raises(PromptError, match=f"row 1: the column '{name}' holds bytes, which the output cannot keep"):
            read(path, keep=[name])


@pytest.mark.parametrize("change", ["others", "fewer", "no column", "no file"])
def test_a_parquet_file_that_is_changed_under_way_gives_no_other_image(tmp_path: Path, change: str) -> None:
    rows = [{"image": picture(tmp_path / "one.png", colour).read_bytes()} for colour in ("red", "lime", "blue")]
    items = read(as_parquet(tmp_path, rows))
    assert load_image(items[2].images[0]).size == (8, 8)
    new = {"others": rows[::-1], "fewer": rows[1:2], "no column": [{"picture": "x"}] * 3, "no file": rows}[change]
    path = as_parquet(tmp_path, new)
    if change == "no file":
        path.unlink()
    with pytest.raises(ImageError, match=r"table\.parquet.* was changed|No such file"):
        load_image(items[0].images[0])


def test_a_damaged_parquet_file_is_one_line(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    (tmp_path / "table.parquet").write_bytes(b"PAR1" + bytes(50) + b"PAR1")
    with pytest.raises(PromptError, match="cannot be read as Parquet"):
        read(tmp_path / "table.parquet")


@pytest.mark.parametrize(("name", "message"), [("error", "output has a column of this name"), ("x", "no column 'x'")])
def test_a_column_that_cannot_be_kept_is_refused(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(PromptError, match=message):
        read(jsonl(tmp_path, {"id": "a", "error": "z"}), keep=[name])


def test_a_row_takes_about_a_kilobyte_of_memory(tmp_path: Path) -> None:
    """docs/batch.md and docs/scale.md say so."""
    rows = ({"id": f"scan-{number:08d}", "images": f"2026/11/29/{number:08d}.jpg"} for number in range(5000))
    path = jsonl(tmp_path, *rows)
    tracemalloc.start()
    items = read(path)
    taken, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert 500 < taken / len(items) < 1500


# ---- what items are ----


def test_a_request_is_all_that_is_asked_and_nothing_else(tmp_path: Path) -> None:
    same = [{"id": "a", "images": "x.png", "label": 1}, {"id": "b", "image": ["x.png"], "label": 2}]
    other = [
        {"images": "y.png"},
        {"images": "x.png", "prompt": "Why?"},
        {"images": "x.png", "seed": 1},
        {"images": "x.png", "votes": 1},
        {"images": "x.png", "choices": ["a"]},
        {"images": ["x.png", "x.png"]},
        {"images": "x.png", "reason": True},
    ]
    requests = [item.request for item in read(jsonl(tmp_path, *same, *other))]
    assert requests[0] == requests[1]
    assert len(set(requests)) == 1 + len(other)


def test_items_about_the_same_images_follow_each_other(tmp_path: Path) -> None:
    images = ["a", "b", None, "a", "c", "b", "a", None]
    rows = [{"id": f"{n}", **({"images": name} if name else {"prompt": "Why?"})} for n, name in enumerate(images)]
    assert [item.id for item in grouped(read(jsonl(tmp_path, *rows)))] == ["0", "3", "6", "1", "5", "2", "4", "7"]
