"""Training data of InternVL ("conversations") and of ms-swift ("messages") as calibration data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from helpers import tiny
from helpers.commands import internvl_edge
from internvl_edge.calibration.items import CalibrationItem, read_items
from internvl_edge.calibration.samples import SampleBuilder
from internvl_edge.checkpoint.reader import Checkpoint
from internvl_edge.checkpoint.tokenizer_files import build_tokenizer
from internvl_edge.evaluation import read_cases


def human(text: str) -> dict[str, str]:
    return {"from": "human", "value": text}


def gpt(text: str) -> dict[str, str]:
    return {"from": "gpt", "value": text}


def said(role: str, text: Any) -> dict[str, Any]:
    return {"role": role, "content": text}


PICTURE = {"type": "image", "image": "a.png"}


def item(tmp_path: Path, values: Any) -> CalibrationItem:
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(values) + "\n", encoding="utf-8")
    (found,) = read_items(path)
    return found


# What a training file holds -> prompt, images, answer, history, system text.
READ: list[tuple[dict[str, Any], tuple[str, list[str], str, list[tuple[str, str]], str | None]]] = [
    (
        {"id": 0, "image": "a.png", "width": 3, "height": 4, "conversations": [human("<image>\nWhat?"), gpt("A cat.")]},
        ("<image>\nWhat?", ["a.png"], "A cat.", [], None),
    ),
    ({"image": "a.png", "conversations": [human("What?"), gpt("X")]}, ("<image>\nWhat?", ["a.png"], "X", [], None)),
    (
        {"image": ["a.png", "b/c.png"], "conversations": [human("Compare <image> with <image>."), gpt("Equal.")]},
        ("Compare <image> with <image>.", ["a.png", "b/c.png"], "Equal.", [], None),
    ),
    (
        {"image": ["a.png", "b.png"], "conversations": [human("Both?"), gpt("Yes."), human("Why?"), gpt("So.")]},
        ("Why?", ["a.png", "b.png"], "So.", [("<image>\n<image>\nBoth?", "Yes.")], None),
    ),
    ({"id": 1, "conversations": [human("Hello"), gpt("Hi")]}, ("Hello", [], "Hi", [], None)),
    ({"image": None, "images": None, "conversations": [human("Hello")]}, ("Hello", [], "", [], None)),
    (
        {
            "messages": [said("system", "Be short."), said("user", "<image>Q"), said("assistant", "A")],
            "images": ["a.png"],
        },
        ("<image>Q", ["a.png"], "A", [], "Be short."),
    ),
    (
        {"messages": [said("user", "<image>1"), said("assistant", "a"), said("user", "<image>2")]}
        | {"images": [{"path": "a.png", "bytes": None}, "b.png"]},
        ("<image>2", ["a.png", "b.png"], "", [("<image>1", "a")], None),
    ),
    (
        {
            "messages": [
                said("user", [PICTURE, {"type": "text", "text": "What does it say?"}]),
                {**said("assistant", [{"type": "text", "text": "46.09"}]), "loss": 1.0},
                said("user", "And now?"),
                said("assistant", "Nothing."),
            ],
            "channel": "vqa",
        },
        ("And now?", ["a.png"], "Nothing.", [("<image>What does it say?", "46.09")], None),
    ),
    (
        {
            "messages": [said("user", "<image>Find <ref-object>."), said("assistant", "At <bbox>.")],
            "images": ["a b.png"],
            "objects": {"ref": ["cat"], "bbox": [[1, 2, 3, 4]]},
        },
        ("<image>Find <ref-object>.", ["a b.png"], "At <bbox>.", [], None),
    ),
]


def test_null_is_absent_in_every_form(tmp_path: Path) -> None:
    """As tables write it that are saved as JSON Lines."""
    nothing = {"images": None, "image": None, "conversations": None, "messages": None, "prompt": None, "answer": None}
    mine = item(tmp_path, {"prompt": "Hello", "images": None, "answer": None})
    for values in ({"conversations": [human("Hello")]}, {"messages": [said("user", "Hello")]}):
        assert item(tmp_path, nothing | values) == mine
    assert not mine.problem
    assert item(tmp_path, {"prompt": None}).problem == "prompt or answer is not a text"


def test_files_written_on_windows_are_read(tmp_path: Path) -> None:
    """A mark of the byte order before the first line, and lines that end with two characters."""
    path = tmp_path / "data.jsonl"
    lines = [json.dumps({"id": n, "conversations": [human("Hello"), gpt("Hi")]}) for n in range(2)]
    path.write_bytes("\ufeff".encode() + "\r\n".join(lines).encode())
    assert [(found.problem, found.answer) for found in read_items(path)] == [("", "Hi")] * 2


@pytest.mark.parametrize(("values", "expected"), READ)
def test_both_forms_are_read(tmp_path: Path, values: dict[str, Any], expected: Any) -> None:
    prompt, images, answer, history, system = expected
    found = item(tmp_path, values)
    assert not found.problem
    assert (found.prompt, found.answer, list(found.history), found.system) == (prompt, answer, history, system)
    assert list(found.images) == [tmp_path / name for name in images]


def test_file_addresses_are_paths(tmp_path: Path) -> None:
    found = item(tmp_path, {"image": "file:///pictures/a%20b.png", "conversations": [human("x")]})
    assert found.images == (Path("/pictures/a b.png"),)


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"conversations": []}, "conversations holds no question"),
        ({"conversations": "x"}, "conversations[0] is None"),
        ({"conversations": [gpt("x")]}, "conversations[0] is of assistant out of turn"),
        ({"messages": [said("user", "a"), said("user", "b")]}, "messages[1] is of user out of turn"),
        ({"messages": [said("tool", "a")]}, "messages[0] is {'role': 'tool'"),
        ({"messages": [said("user", [{"type": "text"}])]}, "a part of a message is {'type': 'text'}"),
        ({"messages": [said("user", [{"type": "video", "video": "a.mp4"}])]}, "a part of a message is {'type': 'vid"),
        ({"messages": [said("user", [{"type": "image"}])]}, "images is not a list of file names"),
        ({"messages": [said("user", [PICTURE])], "images": ["b.png"]}, "beside the messages and inside them"),
        ({"conversations": [{"from": "human", "value": [PICTURE]}]}, "value, a text"),
        ({"image": "https://example.com/a.png", "conversations": [human("x")]}, "is an address, only files are read"),
        ({"messages": [said("user", [{"type": "image", "image": "data:image/png;base64,"}])]}, "is an address"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "one of user, human, assistant, gpt, system"),
        ({"messages": [said("user", "a"), said("system", "b")]}, "messages[1] is of system out of turn"),
        ({"video": "a.mp4", "conversations": [human("x")]}, "video is not read"),
        ({"image": 3, "conversations": [human("x")]}, "images is not a list of file names"),
        ({"image": ["a", 3], "conversations": [human("x")]}, "images is not a list of file names"),
        (
            {"query": "x", "response": "y"},
            "unknown field 'query', expected images, prompt and answer; or ",
        ),
    ],
)
def test_what_is_of_no_form_is_a_problem(tmp_path: Path, values: dict[str, Any], problem: str) -> None:
    found = item(tmp_path, values)
    assert problem in found.problem
    assert "\n" not in found.problem
    assert len(found.problem) < 400


def test_a_sample_is_the_whole_conversation_as_the_model_sees_it(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tiny.write_checkpoint(tmp_path / "checkpoint"))
    (tmp_path / "tokenizer.json").write_bytes(build_tokenizer(checkpoint.folder, checkpoint.config))
    Image.fromarray(np.zeros((56, 56, 3), np.uint8)).save(tmp_path / "a.png")
    builder = SampleBuilder(checkpoint.config, tmp_path / "tokenizer.json", max_tiles=1)
    turns = [human("One?"), gpt("1."), human("Two?"), gpt("2.")]
    sample = builder.build(item(tmp_path, {"image": "a.png", "conversations": turns}))
    text = builder._tokenizer.decode(sample.ids.tolist(), skip_special=False)
    head, _, rest = text.partition("<img>")
    assert head.endswith("<|im_start|>user\n")
    assert rest.partition("</img>")[2] == (
        "\nOne?<|im_end|>\n<|im_start|>assistant\n1.<|im_end|>\n<|im_start|>user\nTwo?<|im_end|>\n"
        "<|im_start|>assistant\n2.<|im_end|>\n"
    )
    assert len(sample.tiles) == 1


def test_calibrate_and_evaluate_take_such_files_and_an_unknown_form_is_said_once(tmp_path: Path) -> None:
    checkpoint = tiny.write_checkpoint(tmp_path / "checkpoint")
    Image.fromarray(np.zeros((56, 56, 3), np.uint8)).save(tmp_path / "a.png")
    lines: list[dict[str, Any]] = [
        {"image": "a.png", "conversations": [human("One?"), gpt("1."), human("Two?"), gpt("2.")]},
        {"messages": [said("user", "Hello"), said("assistant", "Hi")]},
    ]
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, lines)) + "\n")
    (first,) = (case for case in read_cases(data, 2) if case.images)
    history = (("<image>\nOne?", "1."),)
    assert first.options({"max_tiles": 1}) == {"max_tiles": 1, "history": history, "system": None}
    with data.open("a") as file:
        file.write(5 * (json.dumps({"query": "x"}) + "\n"))
    made = internvl_edge("calibrate", checkpoint, "--data", data, "--max-tiles", 1, "-o", tmp_path / "set", "--json")
    assert made.returncode == 0, made.stderr
    facts = json.loads(made.stdout)
    assert (facts["samples"], len(facts["broken"])) == (2, 5)
    assert made.stderr.count("skipped data.jsonl") == 1
