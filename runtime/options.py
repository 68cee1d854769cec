"""The options of a question, checked where they enter: an unknown name or a wrong type is one line.

None stands for an option's default, as the model cards write it. Numbers may be numpy's.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any, TypedDict, TypeGuard

from internvl_edge.base.errors import PromptError
from internvl_edge.base.text import shown
from internvl_edge.model.prompt import ImagePlace, Text

from .answer_format import AnswerFormat
from .thinking import thinking_options


class ChatOptions(TypedDict, total=False):
    """The options of a request, beside question and images. None is the same as leaving an option out.

    Attributes:
        max_tiles: the most tiles of an image, one number or one per image; the default, and None, is the checkpoint's
            own limit.
        history: earlier turns as (question, answer). Their `<image>` marks take the first images.
        system: system text instead of the checkpoint's; "" leaves the system turn out.
        think: ask for thinking before the answer, with the system text that InternVL3.5 was trained with and a
            temperature of 0.6 unless another is given. `Reply.thinking` and `Reply.answer` tell the two apart.
        max_new_tokens: the most tokens of the answer; the default is 1024.
        temperature, top_k, top_p, min_p, repetition_penalty, frequency_penalty, presence_penalty, logit_bias, seed: see
            `Sampling`; the default is greedy.
        answer_start: text that the answer goes on from, as if the model had written it. The reply does not have it.
        logprobs: put the log probability of each token into the reply (see `Reply`).
        top_logprobs: 0 to 20; with `logprobs`, so many of the most probable tokens at each place too.
        answer_format: the form that the answer must have (see `AnswerFormat`). The model is not told of it; ask for it.
        stop: strings that end the answer and are not part of it.
        speculate: guess tokens from the prompt and verify several in one step (see `lookup`). The answer is the same.
        exif: turn images upright as their EXIF orientation says. By default they are not, as in the original code.
        background: a color to put behind transparent pixels ("white", "#fafafa"). By default transparency is dropped,
            as in the original code, which usually leaves black.
        plain_text: read special tokens (`<|im_end|>`) and `<image>` marks in question, history and system text as plain
            text, for texts that somebody else writes. The places of images are then `IMAGE` in a list (see
            `model.prompt`). By default they keep their meaning, as in the original code.
        keep_special: keep special tokens such as `<box>` in the text of the answer. The original code drops them.
    """

    max_tiles: int | Sequence[int | None] | None
    history: Sequence[tuple[Text, str]] | None
    system: str | None
    think: bool | None
    max_new_tokens: int | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    frequency_penalty: float | None
    presence_penalty: float | None
    logit_bias: Mapping[int, float] | None
    seed: int | None
    answer_start: str | None
    logprobs: bool | None
    top_logprobs: int | None
    answer_format: AnswerFormat | None
    stop: str | Sequence[str] | None
    speculate: bool | None
    exif: bool | None
    background: str | None
    keep_special: bool | None
    plain_text: bool | None


# How other programs name our options, or what to use instead of theirs.
_MEANT = {
    "enable_thinking": "think",
    "do_sample": "temperature: 0 is greedy",
    "generation_config": "its fields as options: max_new_tokens=..., temperature=...",
    "grammar": "answer_format=AnswerFormat.regex(...)",
    "guided_choice": "answer_format=AnswerFormat.choice([...])",
    "guided_json": "answer_format=AnswerFormat.json_schema({...})",
    "guided_regex": "answer_format=AnswerFormat.regex(...)",
    "image": "images=[...]",
    "max_completion_tokens": "max_new_tokens",
    "max_length": "max_new_tokens",
    "max_num": "max_tiles",
    "max_tokens": "max_new_tokens",
    "messages": "history=[(question, answer), ...]",
    "n_predict": "max_new_tokens",
    "num_patches_list": "images=[[...], [...]], one list for each <image> mark",
    "pixel_values": "images=[...]",
    "prompt": "the first argument, question",
    "repeat_penalty": "repetition_penalty",
    "response_format": "answer_format=AnswerFormat.json_schema({...})",
    "return_history": "a Conversation, which keeps its history",
    "stop_strings": "stop",
    "stop_words": "stop",
    "system_message": "system",
    "system_prompt": "system",
}


def checked_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that are given, as plain Python values; those that are None are left out.

    `think` becomes the options that it stands for.

    Raises:
        PromptError: an option that does not exist, or a value of another type; the right one is named.
    """
    for name in options:
        if name not in _CHECKS:
            raise PromptError(_unknown(name))
    return thinking_options({name: _CHECKS[name](name, value) for name, value in options.items() if value is not None})


def _unknown(name: str) -> str:
    near = [_MEANT[name]] if name in _MEANT else get_close_matches(name, _CHECKS, n=1, cutoff=0.6)
    hint = f"did you mean {near[0]}?" if near else f"options are {', '.join(_CHECKS)}"
    return f"there is no option {shown(name)}; {hint}"


def whole_number(name: str, value: Any) -> int:
    """Return a whole number as int. Raises PromptError for anything else, also for True and False."""
    try:
        if not isinstance(value, bool):
            return operator.index(value)
    except TypeError:
        pass
    raise PromptError(f"{name} is {shown(value)}, expected a whole number")


def _number(name: str, value: Any) -> float:
    try:
        if not isinstance(value, (bool, str, bytes)) and math.isfinite(number := float(value)):
            return number
    except (TypeError, ValueError, OverflowError):
        pass
    raise PromptError(f"{name} is {shown(value)}, expected a finite number")


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise PromptError(f"{name} is {shown(value)}, expected a text")
    return value


def _flag(name: str, value: Any) -> bool:
    if type(value).__name__ not in ("bool", "bool_"):
        raise PromptError(f"{name} is {shown(value)}, expected True or False")
    return bool(value)


def _tiles(name: str, value: Any) -> int | list[int | None]:
    if isinstance(value, (str, bytes, Mapping)) or not getattr(value, "shape", (1,)) or not hasattr(value, "__iter__"):
        return whole_number(name, value)  # numpy's scalars and arrays without an axis are single numbers
    return [None if each is None else whole_number(name, each) for each in value]


def _texts(name: str, value: Any) -> tuple[str, ...]:
    values = (value,) if isinstance(value, str) else value
    if isinstance(values, (bytes, Mapping)) or not hasattr(values, "__iter__"):
        raise PromptError(f"{name} is {shown(value)}, expected a text or a list of texts")
    return tuple(_text(name, each) for each in values)


def _biases(name: str, value: Any) -> dict[int, float]:
    if not isinstance(value, Mapping):
        raise PromptError(f"{name} is {shown(value)}, expected a mapping of token ids to numbers: {{id: bias}}")
    pairs = value.items()
    return {whole_number(f"{name}: a token id", token): _number(f"{name}: a bias", bias) for token, bias in pairs}


def _answer_format(name: str, value: Any) -> AnswerFormat:
    if not isinstance(value, AnswerFormat):
        raise PromptError(
            f"{name} is {shown(value)}, expected an AnswerFormat, such as AnswerFormat.json_schema({{...}})"
        )
    return value


def is_text(value: Any) -> TypeGuard[Text]:
    """Whether a value is a text, or a list of texts and places of images."""
    if isinstance(value, (tuple, list)):
        return all(isinstance(part, (str, ImagePlace)) for part in value)
    return isinstance(value, str)


def _history(name: str, value: Any) -> list[tuple[Text, str]]:
    if isinstance(value, (str, bytes, Mapping)) or not hasattr(value, "__iter__"):
        raise PromptError(f"{name} is a {type(value).__name__}, expected a list of (question, answer) pairs")
    turns = list(value)
    for turn in turns:
        if not isinstance(turn, (tuple, list)) or len(turn) != 2 or not (is_text(turn[0]) and isinstance(turn[1], str)):
            raise PromptError(
                f"{name} has a turn that is no pair of texts (question, answer) but {shown(turn)}; "
                "write earlier turns as [(question, answer), ...]"
            )
    return [(question, answer) for question, answer in turns]


_CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "max_tiles": _tiles,
    "history": _history,
    "system": _text,
    "think": _flag,
    "max_new_tokens": whole_number,
    "temperature": _number,
    "top_k": whole_number,
    "top_p": _number,
    "min_p": _number,
    "repetition_penalty": _number,
    "frequency_penalty": _number,
    "presence_penalty": _number,
    "logit_bias": _biases,
    "seed": whole_number,
    "answer_start": _text,
    "logprobs": _flag,
    "top_logprobs": whole_number,
    "answer_format": _answer_format,
    "stop": _texts,
    "speculate": _flag,
    "exif": _flag,
    "background": _text,
    "keep_special": _flag,
    "plain_text": _flag,
}
