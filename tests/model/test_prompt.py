"""Prompts are the original's, character for character, and an image's tokens cannot be miscounted."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from internvl_edge.base.errors import CheckpointError, PromptError
from internvl_edge.base.jsonable import decode, dumps, encode
from internvl_edge.model.prompt import build_prompt, video_question
from internvl_edge.model.template import TEMPLATES, PromptTemplate, template_for

REMOTE = template_for("internvl2_5")
NATIVE = template_for("internvl_native")
CONTEXT = REMOTE.image_context


def prompt(question: str, tiles: list[int] | None = None, template: PromptTemplate = REMOTE, **options: Any) -> str:
    return build_prompt(template, question, tiles or [], tokens_per_tile=256, **options)


def user_turn(text: str) -> str:
    return f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"


def run(tiles: int) -> str:
    return "<img>" + CONTEXT * (256 * tiles) + "</img>"


def compact(text: str) -> str:
    """The goldens' short form: a run of image tokens as `<IMG_CONTEXT>*n`."""
    head, *rest = text.split("<img>")
    short = [head]
    for part in rest:
        inside, after = part.split("</img>")
        count = inside.count(CONTEXT)
        assert inside == CONTEXT * count
        short.append(f"<img>{CONTEXT}*{count}</img>{after}")
    return "".join(short)


# Against the goldens


@pytest.mark.parametrize("checkpoint", ["internvl2_5-internlm2-tiny", "internvl2_5-qwen2-tiny"])
def test_prompts_are_the_originals(oracle: Path, checkpoint: str) -> None:
    golden = json.loads((oracle / checkpoint / "golden.json").read_text())
    for case in golden["cases"]:
        expected = case["expected"]
        tiles = expected["tiles_per_image"] or []
        batch = case["kind"] == "batch_chat"
        for row, question in enumerate(case["questions"] if batch else [case["question"]]):
            images = tiles[row : row + 1] if batch else tiles
            if len(images) > 1 and not case.get("pass_num_patches_list"):
                images = [sum(images)]  # the original takes them as one; here they are one group
            text = prompt(question, images, history=[(q, a) for q, a in case.get("history") or []])
            assert compact(text) == expected["prompt_compact"][row], case["id"]
            assert hashlib.sha256(text.encode()).hexdigest() == expected["prompt_expanded_sha256"][row], case["id"]


def test_native_prompts_follow_their_own_chat_template(oracle: Path) -> None:
    """Messages are replayed as (question, answer) pairs; an image item stands for a mark and a newline."""
    golden = json.loads((oracle / "internvl-hf-qwen2-tiny" / "golden.json").read_text())
    for case in golden["cases"]:
        texts = {"system": [], "user": [], "assistant": []}  # type: dict[str, list[str]]
        for message in case["messages"]:
            parts = ["<image>\n" if item["type"] == "image" else item["text"] for item in message["content"]]
            texts[message["role"]].append("".join(parts))
        tiles = {"multi": [1, 4], "text_only": []}.get(case["id"], [case["expected"]["n_tiles_total"]])
        *asked, question = texts["user"]
        options: dict[str, Any] = {
            "history": list(zip(asked, texts["assistant"], strict=True)),
            "system": texts["system"][0] if texts["system"] else None,
        }
        text = prompt(question, tiles, NATIVE, **options)
        head, *rest = case["expected"]["prompt_template_text"].split(CONTEXT)
        assert text == head + "".join(run(count) + part for count, part in zip(tiles, rest, strict=True))
        if not asked:  # the same without marks: images in front, one item each
            assert prompt(question.replace("<image>\n", ""), tiles, NATIVE, **options) == text


def test_bare_question_has_the_default_system_message(oracle: Path) -> None:
    rows = json.loads((oracle / "tokenizer_goldens.json").read_text())
    for name in ("public/internvl2_5-qwen2-tiny", "public/internvl2_5-internlm2-tiny"):
        assert prompt("Hi") == rows[name]["template_prompt_Hi"]


# The system message


def test_system_message_of_checkpoint_and_caller() -> None:
    own = template_for("internvl2_5", "Be brief.")
    assert prompt("Hi", template=own) == "<|im_start|>system\nBe brief.<|im_end|>\n" + user_turn("Hi")
    assert prompt("Hi", template=own, system="Rhyme.") == "<|im_start|>system\nRhyme.<|im_end|>\n" + user_turn("Hi")
    assert prompt("Hi", template=own, system="") == user_turn("Hi")
    assert prompt("Hi", template=NATIVE) == user_turn("Hi")
    assert prompt("Hi", template=NATIVE, system="Rhyme.") == "<|im_start|>system\nRhyme.<|im_end|>\n" + user_turn("Hi")
    # An empty message in the configuration is a message to the original, which still writes the turn.
    assert prompt("Hi", template=template_for("internvl2_5", "")).startswith("<|im_start|>system\n<|im_end|>\n")


# Marks and images


def test_unmarked_images_share_one_mark_like_in_the_original() -> None:
    assert prompt("Hi", [2, 3], system="") == user_turn(run(5) + "\nHi")


def test_marks_are_filled_in_order_history_first() -> None:
    text = prompt("c <image> d", [1, 2, 3], history=[("<image> a <image>", "<image> is no mark here")], system="")
    assert compact(text) == compact(
        f"<|im_start|>user\n{run(1)} a {run(2)}<|im_end|>\n<|im_start|>assistant\n<image> is no mark here<|im_end|>\n"
        + user_turn(f"c {run(3)} d")
    )


def test_empty_turns_of_history_are_written_as_their_role_only() -> None:
    assert prompt("Hi", history=[("", "")], system="") == "<|im_start|>user\n<|im_start|>assistant\n" + user_turn("Hi")


def test_images_after_a_history_need_a_mark() -> None:
    with pytest.raises(PromptError, match=r"^0 <image> marks .* 1 images"):
        prompt("Hi", [1], history=[("a", "b")])


@pytest.mark.parametrize(("question", "tiles"), [("<image> <image>", [1]), ("<image>", [1, 1]), ("<image>", [])])
def test_marks_must_match_images(question: str, tiles: list[int]) -> None:
    with pytest.raises(PromptError, match=rf"^{question.count('<image>')} <image> marks .* {len(tiles)} images"):
        prompt(question, tiles)


@pytest.mark.parametrize("question", ["", " \n"])
def test_empty_question_is_refused(question: str) -> None:
    with pytest.raises(PromptError, match="question is empty"):
        prompt(question, [1])


@pytest.mark.parametrize(
    ("question", "options"),
    [
        (f"a {CONTEXT}", {}),
        ("a", {"history": [(CONTEXT, "b")]}),
        ("a", {"history": [("b", CONTEXT)]}),
        ("a", {"system": CONTEXT}),
    ],
)
def test_literal_image_token_is_refused_wherever_it_stands(question: str, options: dict[str, Any]) -> None:
    with pytest.raises(PromptError, match=CONTEXT):
        prompt(question, **options)


def test_malformed_history_and_tile_counts_are_refused() -> None:
    with pytest.raises(PromptError, match="pairs"):
        prompt("Hi", history=[("only a question",)])
    with pytest.raises(PromptError, match="0 tiles"):
        prompt("Hi", [0])


texts = st.text(st.sampled_from("ab <>\n我|imge"), max_size=12).filter(lambda text: "<image>" not in text)


@given(st.lists(st.tuples(texts, st.integers(1, 4)), max_size=5), texts, st.data())
def test_image_tokens_are_counted_and_everything_else_is_kept(
    parts: list[tuple[str, int]], last: str, data: st.DataObject
) -> None:
    """Marked text spread over history and question: undoing the expansion gives the text back."""
    split = data.draw(st.integers(0, len(parts)))
    earlier = "".join(text + "<image>" for text, _ in parts[:split])
    question = "".join(text + "<image>" for text, _ in parts[split:]) + last + "?"
    tiles = [count for _, count in parts]
    history = [(earlier, "yes")] if split else []
    text = build_prompt(REMOTE, question, tiles, tokens_per_tile=3, history=history, system="")
    assert text.count(CONTEXT) == 3 * sum(tiles)
    for count in tiles:
        text = text.replace("<img>" + CONTEXT * (3 * count) + "</img>", "<image>", 1)
    before = f"<|im_start|>user\n{earlier}<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>\n" if history else ""
    assert text == before + user_turn(question)


# Video and the manifest


def test_video_frames_are_numbered_lines_before_the_question() -> None:
    assert video_question("What happens?", 2) == "Frame1: <image>\nFrame2: <image>\nWhat happens?"
    assert prompt(video_question("Why?", 2), [1, 1], system="") == user_turn(
        f"Frame1: {run(1)}\nFrame2: {run(1)}\nWhy?"
    )


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=lambda template: template.name)
def test_template_survives_the_manifest(template: PromptTemplate) -> None:
    assert decode(PromptTemplate, json.loads(dumps(template)), strict=True) == template


@pytest.mark.parametrize("change", [{"extra": "x"}, {"turn_end": 3}, {"merges_unmarked_images": "yes"}, {"name": None}])
def test_damaged_template_is_refused_by_field(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(change))):
        decode(PromptTemplate, encode(REMOTE) | change, strict=True)


def test_unknown_template_is_refused() -> None:
    with pytest.raises(
        CheckpointError, match="'vicuna', supported: internvl2_5, Hermes-2, internlm2-chat, internvl_native"
    ):
        template_for("vicuna")
