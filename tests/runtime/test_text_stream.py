"""A reply grows in pieces that are never taken back and together are exactly the final text."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.tiny import write_checkpoint
from internvl_edge.base.errors import PromptError
from internvl_edge.checkpoint.config_reader import read_config
from internvl_edge.checkpoint.tokenizer_files import build_tokenizer
from internvl_edge.model.tokenizer import Tokenizer
from internvl_edge.runtime.text_stream import TextStream

KINDS = ("qwen2", "internlm2")
# Stop strings that overlap, contain each other, end in whitespace and begin like much other text.
STOPS = ("ab", "abc", "bcd", "b", " a", "\n\n", "aaab", "你好", "é!", "Hello", "the end")


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    """A byte-level and a byte-fallback vocabulary of a few hundred tokens."""
    opened = {}
    for kind in KINDS:
        folder = write_checkpoint(tmp_path_factory.mktemp(kind), text=kind)
        path = folder / "tokenizer.json"
        path.write_bytes(build_tokenizer(folder, read_config(folder)))
        opened[kind] = Tokenizer(path)
    return opened


def final_text(text: str, stops: list[str]) -> str:
    """The specification: cut where the stop string that is complete first begins, then strip."""
    for end in range(len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)].strip()
    return text.strip()


def pieces_of(tokenizer: Tokenizer, ids: list[int], stops: list[str]) -> tuple[list[str], TextStream]:
    stream = TextStream(tokenizer, stops)
    pieces = [stream.push(token_id) for token_id in ids]
    return [*pieces, stream.finish()], stream


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_pieces_join_to_the_final_text(tokenizers: dict[str, Tokenizer], kind: str, data: st.DataObject) -> None:
    """Any tokens: words, single bytes of broken characters, special tokens, whitespace."""
    tokenizer = tokenizers[kind]
    written = st.text("ab cdelHothn你好é!\n😀", max_size=4).map(tokenizer.encode)
    anything = st.integers(0, tokenizer.vocab_size).map(lambda token_id: [token_id])
    runs = data.draw(st.lists(st.one_of(written, anything), max_size=25))
    stops = data.draw(st.lists(st.sampled_from(STOPS), max_size=3))
    ids = [token_id for run in runs for token_id in run]
    pieces, stream = pieces_of(tokenizer, ids, stops)
    expected = final_text(tokenizer.decode(ids), stops)
    assert "".join(pieces) == expected
    assert stream.text == expected
    assert stream.stopped == any(stop in tokenizer.decode(ids) for stop in stops)


@pytest.mark.parametrize("kind", KINDS)
@given(text=st.text(max_size=30))
def test_no_piece_holds_half_a_character(tokenizers: dict[str, Tokenizer], kind: str, text: str) -> None:
    pieces, _ = pieces_of(tokenizers[kind], tokenizers[kind].encode(text), [])
    replacements = tokenizers[kind].decode(tokenizers[kind].encode(text)).count("\ufffd")
    assert "".join(pieces).count("\ufffd") == replacements
    assert "".join(pieces) == tokenizers[kind].decode(tokenizers[kind].encode(text)).strip()


@pytest.mark.parametrize("kind", KINDS)
def test_characters_appear_as_soon_as_they_are_whole(tokenizers: dict[str, Tokenizer], kind: str) -> None:
    stream = TextStream(tokenizers[kind])
    ids = tokenizers[kind].encode("😀x")
    shown = [stream.push(token_id) for token_id in ids]
    assert shown[-2:] == ["😀", "x"]
    assert set(shown[:-2]) == {""}


def test_whitespace_is_held_until_something_follows(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["qwen2"]
    (space,), (a,), (b,) = tokenizer.encode(" "), tokenizer.encode("a"), tokenizer.encode("b")
    stream = TextStream(tokenizer)
    assert [stream.push(token_id) for token_id in (space, a, space, space, b, space)] == ["", "a", "", "", "  b", ""]
    assert stream.finish() == ""


def test_text_that_only_begins_like_a_stop_string_is_released(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["qwen2"]
    a, b, c = (tokenizer.encode(letter)[0] for letter in "abc")
    stream = TextStream(tokenizer, ["abcd"])
    assert [stream.push(token_id) for token_id in (a, b, c, c, a)] == ["", "", "", "abcc", ""]
    assert stream.finish() == "a"
    assert not stream.stopped


def test_stop_string_that_begins_anew_inside_itself_is_not_shown(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["qwen2"]
    a, b = (tokenizer.encode(letter)[0] for letter in "ab")
    stream = TextStream(tokenizer, ["aaab"])
    assert [stream.push(token_id) for token_id in (a, a, a, a, b)] == ["", "", "", "a", ""]
    assert stream.stopped


@pytest.mark.parametrize(("stops", "text"), [(["ello", "l"], "He"), (["o", "llo"], "He"), (["lo", "Hello"], "")])
def test_stop_string_that_is_complete_first_wins_then_the_longer(
    tokenizers: dict[str, Tokenizer], stops: list[str], text: str
) -> None:
    (hello,) = tokenizers["qwen2"].encode("Hello")
    stream = TextStream(tokenizers["qwen2"], stops)
    assert stream.push(hello) == text
    assert stream.stopped


def test_nothing_follows_a_stop_string(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["qwen2"]
    a, b = (tokenizer.encode(letter)[0] for letter in "ab")
    stream = TextStream(tokenizer, "b")
    assert [stream.push(token_id) for token_id in (a, b, a)] == ["a", "", ""]
    assert stream.stopped
    assert stream.finish() == ""
    assert stream.text == "a"


def test_end_of_turn_token_is_no_text(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["internlm2"]
    ids = [*tokenizer.encode("Hello"), tokenizer.token_id("<|im_end|>")]
    assert "".join(pieces_of(tokenizer, ids, [])[0]) == "Hello"


@pytest.mark.parametrize("stop", ["", ["x", ""]])
def test_empty_stop_string_is_refused(tokenizers: dict[str, Tokenizer], stop: str | list[str]) -> None:
    with pytest.raises(PromptError, match="stop string is empty"):
        TextStream(tokenizers["qwen2"], stop)
