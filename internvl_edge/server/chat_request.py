"""Read a chat request: from the bytes of a body to messages, images and options, each checked before any work starts.

This module knows the interface. It does not know the model, except for the most tiles that an image can have.
"""

from __future__ import annotations

import binascii
import re
from base64 import b64decode
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote_to_bytes

from internvl_edge.base.errors import PromptError
from internvl_edge.base.json_files import parse
from internvl_edge.base.text import one_line, shown
from internvl_edge.runtime.answer_format import AnswerFormat
from internvl_edge.runtime.messages import Role

from .errors import ApiError, from_edge, invalid
from .fields import check, read_fields
from .settings import Limits, Settings

# How `detail` says the most tiles of an image. None stands for the server's own limit.
_DETAILS = {"low": 1, "auto": None, "medium": None, "high": "checkpoint", "original": "checkpoint"}
_REFUSED_PARTS = "input_audio", "file", "video_url", "refusal", "tool_use", "tool_result"
_ROLES: dict[str, Role] = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
# What clients send back with an answer of the assistant, and nobody needs.
_QUIET_IN_MESSAGES = {"name", "refusal", "audio", "annotations", "id", "type", "status", "reasoning_content"}
# Fields that are options of the runtime, with the same name and meaning.
_SAME_OPTIONS = (
    "temperature",
    "top_p",
    "min_p",
    "stop",
    "logprobs",
    "top_logprobs",
    "frequency_penalty",
    "presence_penalty",
    "repetition_penalty",
)
_SPACES = (b"\n", b"\r", b"\t", b" ")


@dataclass(frozen=True)
class ImageRef:
    """An image of a request that is not read yet: the bytes of its file, or an address to fetch.

    Attributes:
        param: where in the request it is.
        max_tiles: the most tiles that it may get.
    """

    param: str
    max_tiles: int
    data: bytes | None = None
    url: str | None = None


@dataclass(frozen=True)
class ChatMessage:
    """A message with images that are not read yet."""

    role: Role
    parts: Sequence[str | ImageRef]


@dataclass(frozen=True)
class ChatRequest:
    """A checked request.

    Attributes:
        options: for `InternVL.sample_streams`.
        samples: answers that are wanted (`n`).
        votes: replies that vote for one answer, or None.
        choices: the possible answers, where `structured_outputs` gives them.
        unknown: fields that nobody knows.
    """

    messages: Sequence[ChatMessage]
    options: Mapping[str, Any] = field(default_factory=dict)
    samples: int = 1
    votes: int | None = None
    reason: bool = False
    choices: Sequence[str] | None = None
    stream: bool = False
    include_usage: bool = False
    unknown: Sequence[str] = ()

    @property
    def images(self) -> list[ImageRef]:
        """All images, in their order."""
        return [part for message in self.messages for part in message.parts if isinstance(part, ImageRef)]


def read_json(body: bytes, limits: Limits) -> dict[str, Any]:
    """Return the object that a body holds.

    Raises:
        ApiError: 400, not JSON, not an object, or of more values than the limit, which would take much memory.
    """
    if sum(map(body.count, (b",", b"[", b"{"))) > limits.values:
        raise invalid(None, f"the body holds more than {limits.values} values; send less text or fewer parts")
    try:
        values = parse(body)
    except ValueError as error:
        reason = "" if type(error) is not ValueError else f" ({error})"
        raise invalid(None, f"the body is not valid JSON{reason}; send one JSON object", code="invalid_json") from None
    if not isinstance(values, dict):
        raise invalid(None, f"the body is a {type(values).__name__}, expected one JSON object", code="invalid_json")
    return values


def read_chat(values: Mapping[str, Any], settings: Settings, checkpoint_tiles: int) -> ChatRequest:
    """Check the values of a chat request.

    Args:
        values: the JSON object.
        settings: of the server.
        checkpoint_tiles: the most tiles of an image by the checkpoint.

    Raises:
        ApiError: 400 that names the field, or 404 for another model.
    """
    used, unknown = read_fields(values)
    check_model(used, settings)
    if "messages" not in used:
        raise invalid("messages", "there are no messages; give at least one of the user")
    reader = _Messages(settings, checkpoint_tiles, used.get("max_tiles"))
    messages = reader.read(used["messages"])
    unknown += reader.unknown
    refuse_unknown(unknown, settings)
    form, choices = _form(used)
    votes, samples = used.get("votes"), used.get("n", 1)
    for name, count in (("n", samples), ("votes", votes or 1)):
        if count > settings.limits.samples:
            raise invalid(name, f"{name} is {count}, expected 1 to {settings.limits.samples}")
    reason = "reasoning" in used
    if reason and choices and votes is None:
        votes = 1  # the reasoning is free, and what follows it is one of the choices
    _check_vote(used, votes, samples, reason, form if choices is None else None)
    options = _options(used)
    if form is not None and (votes is None or choices is None):
        options["answer_format"] = form
    return ChatRequest(
        messages,
        options,
        samples,
        votes,
        reason,
        choices if votes is not None else None,
        used.get("stream", False),
        bool((used.get("stream_options") or {}).get("include_usage")),
        unknown,
    )


def check_model(values: Mapping[str, Any], settings: Settings) -> None:
    """Refuse another model than the one that is served.

    Raises:
        ApiError: 404.
    """
    model = values.get("model") or settings.model
    if model != settings.model:
        raise ApiError(
            404,
            f"there is no model {shown(model)} here; this server has {shown(settings.model)}",
            code="model_not_found",
            param="model",
        )


def refuse_unknown(unknown: Sequence[str], settings: Settings) -> None:
    """Refuse fields that nobody knows, where the server is strict.

    Raises:
        ApiError: 400.
    """
    if unknown and settings.strict_fields:
        raise invalid(unknown[0], f"there is no field {shown(unknown[0])}; leave it out", code="unknown_parameter")


def _check_vote(used: Mapping[str, Any], votes: int | None, samples: int, reason: bool, form: Any) -> None:
    if reason and form is not None:
        raise invalid(
            "reasoning", "reasoning is free text before the answer; leave out the form, or give it as a choice"
        )
    if votes is None:
        return
    if samples > 1:
        raise invalid("n", "votes gives one answer, n asks for several; leave one of them out")
    if used.get("logprobs"):
        raise invalid("logprobs", "the answer of votes has no log probabilities; leave logprobs or votes out")


def _options(used: Mapping[str, Any]) -> dict[str, Any]:
    """The options of the runtime."""
    options = {name: used[name] for name in _SAME_OPTIONS if name in used}
    if "top_logprobs" in options and not options.get("logprobs"):
        raise invalid("top_logprobs", "top_logprobs needs logprobs: true; set both, or leave it out")
    if "top_k" in used:
        options["top_k"] = max(0, used["top_k"])  # -1 is what others write for all
    if "seed" in used:
        options["seed"] = used["seed"] % (1 << 64)
    if "logit_bias" in used:
        options["logit_bias"] = {_token(key): _bias(key, value) for key, value in used["logit_bias"].items()}
    most = used.get("max_completion_tokens", used.get("max_tokens"))
    if most is not None:
        options["max_new_tokens"] = most
    return options


def _token(key: str) -> int:
    if not re.fullmatch(r"[0-9]{1,9}", key):
        raise invalid("logit_bias", f"logit_bias has the name {shown(key, 40)}, expected the id of a token")
    return int(key)


def _bias(key: str, value: Any) -> float:
    check(value, {"type": "number", "minimum": -100, "maximum": 100}, f"logit_bias.{key}")
    return float(value)


def _form(used: Mapping[str, Any]) -> tuple[AnswerFormat | None, list[str] | None]:
    """The form of the answer, and the choices where it is one of them."""
    wanted = used.get("response_format") or {}
    outputs = {name: value for name, value in (used.get("structured_outputs") or {}).items() if value is not None}
    kind = wanted.get("type", "text")
    if outputs and kind != "text":
        raise invalid("structured_outputs", "response_format and structured_outputs both give a form; leave one out")
    known = [name for name in ("json", "regex", "choice") if name in outputs]
    if outputs and (len(known) != 1 or len(outputs) > 1):
        raise invalid(
            "structured_outputs",
            f"structured_outputs has {shown(sorted(outputs))}, expected one of json, regex, choice",
        )
    param = "structured_outputs" if outputs else "response_format"
    try:
        if outputs:
            return _OUTPUTS[known[0]](outputs[known[0]]), outputs.get("choice")
        return _FORMATS[kind](wanted), None
    except PromptError as error:
        raise from_edge(error, param) from None


def _schema_of(wanted: Mapping[str, Any]) -> AnswerFormat:
    if wanted.get("json_schema") is None:
        raise invalid("response_format.json_schema", "response_format has no json_schema; give it")
    return AnswerFormat.json_schema(wanted["json_schema"]["schema"])


_OUTPUTS: dict[str, Callable[[Any], AnswerFormat]] = {
    "json": AnswerFormat.json_schema,
    "regex": AnswerFormat.regex,
    "choice": AnswerFormat.choice,
}
_FORMATS: dict[str, Callable[[Mapping[str, Any]], AnswerFormat | None]] = {
    "text": lambda wanted: None,
    "json_object": lambda wanted: AnswerFormat.json_object(),
    "json_schema": _schema_of,
    "regex_schema": lambda wanted: AnswerFormat.regex(wanted.get("regex_schema") or ""),
}


class _Messages:
    """Reads the messages of one request."""

    def __init__(self, settings: Settings, checkpoint_tiles: int, max_tiles: int | None) -> None:
        self.unknown: list[str] = []
        self._limits = settings.limits
        self._default = settings.max_tiles if max_tiles is None else max_tiles
        self._checkpoint = checkpoint_tiles
        self._most = max(checkpoint_tiles, settings.max_tiles)
        self._images = 0
        if self._default > self._most:
            raise invalid("max_tiles", f"max_tiles is {self._default}, expected 1 to {self._most}")

    def read(self, messages: Sequence[Mapping[str, Any]]) -> list[ChatMessage]:
        return [self._message(message, f"messages[{index}]") for index, message in enumerate(messages)]

    def _message(self, message: Mapping[str, Any], where: str) -> ChatMessage:
        name = message.get("role")
        role = _ROLES.get(name) if isinstance(name, str) else None
        if role is None:
            known = ", ".join(_ROLES)
            raise invalid(f"{where}.role", f"{where}.role is {shown(name, 40)}, expected one of {known}")
        for key in ("tool_calls", "function_call"):
            if message.get(key):
                raise invalid(f"{where}.{key}", f"{where}.{key} is not supported; send texts and images alone")
        self._note(message, {"role", "content", "tool_calls", "function_call"} | _QUIET_IN_MESSAGES, "messages")
        content = message.get("content")
        if isinstance(content, str):
            return ChatMessage(role, [content])
        if isinstance(content, list) and content:
            return ChatMessage(
                role, [self._part(part, role, f"{where}.content[{index}]") for index, part in enumerate(content)]
            )
        found = "an empty list" if content == [] else shown(content, 40)
        raise invalid(f"{where}.content", f"{where}.content is {found}, expected a text or a list of parts")

    def _part(self, part: Any, role: Role, where: str) -> str | ImageRef:
        if not isinstance(part, dict):
            raise invalid(where, f"{where} is {shown(part, 40)}, expected an object with a type")
        kind = part.get("type")
        if kind == "text":
            text = part.get("text")
            if not isinstance(text, str):
                raise invalid(f"{where}.text", f"{where}.text is {shown(text, 40)}, expected a text")
            self._note(part, {"type", "text", "annotations", "cache_control"}, "messages.content")
            return text
        if kind == "image_url":
            if role != "user":
                raise invalid(where, f"{where} is an image of the {role}; only the user shows images")
            self._note(part, {"type", "image_url", "detail", "cache_control"}, "messages.content")
            return self._image(part, f"{where}.image_url")
        advice = "is not supported" if kind in _REFUSED_PARTS else "is not known"
        raise invalid(f"{where}.type", f"{where}.type {shown(kind, 40)} {advice}; send text and image_url")

    def _image(self, part: Mapping[str, Any], where: str) -> ImageRef:
        self._images += 1
        if self._images > self._limits.images:
            raise invalid(where, f"there are more than {self._limits.images} images, this server's limit; send fewer")
        value = part.get("image_url")
        image = {"url": value, "detail": part.get("detail")} if isinstance(value, str) else value
        if not isinstance(image, dict) or not isinstance(image.get("url"), str):
            raise invalid(where, f"{where} is {shown(value, 40)}, expected {{url, detail}} or a text")
        self._note(image, {"url", "detail", "max_dynamic_patch"}, "messages.content.image_url")
        tiles = self._tiles(image, where)
        url = image["url"]
        scheme = url[:8].partition(":")[0].lower()
        if scheme == "data":
            return ImageRef(where, tiles, data=_data(url, where))
        if scheme in ("http", "https"):
            return ImageRef(where, tiles, url=url)
        raise invalid(where, f"{where} begins with {shown(url[:20])}, expected data:image/...;base64,... or an address")

    def _tiles(self, image: Mapping[str, Any], where: str) -> int:
        patches, detail = image.get("max_dynamic_patch"), image.get("detail")
        if patches is not None:
            check(patches, {"type": "integer", "minimum": 1, "maximum": self._most}, f"{where}.max_dynamic_patch")
            return int(patches)
        if detail is None:
            return self._default
        if not isinstance(detail, str) or detail not in _DETAILS:
            expected = ", ".join(_DETAILS)
            raise invalid(f"{where}.detail", f"{where}.detail is {shown(detail, 40)}, expected one of {expected}")
        wanted = _DETAILS[detail]
        return wanted if isinstance(wanted, int) else self._default if wanted is None else self._checkpoint

    def _note(self, found: Mapping[str, Any], known: set[str], where: str) -> None:
        self.unknown += [f"{where}.{name}" for name in found if name not in known]


def _data(url: str, where: str) -> bytes:
    """The bytes of a `data:` address."""
    header, comma, data = url.partition(",")
    if not comma:
        raise invalid(where, f"{where} is a data: address without a comma, expected data:image/...;base64,...")
    media = header[5:].partition(";")[0].strip().lower()
    if media and not media.startswith("image/") and media != "application/octet-stream":
        raise invalid(where, f"{where} is {one_line(shown(media), 60)}, expected data:image/...;base64,...")
    if ";base64" not in header.lower():
        return unquote_to_bytes(data)
    try:
        raw = unquote_to_bytes(data) if "%" in data else data.encode("ascii")
        if any(space in raw for space in _SPACES):  # line breaks, as mail has them
            raw = b"".join(raw.split())
        return b64decode(raw, validate=True)
    except (ValueError, binascii.Error):
        raise invalid(where, f"{where} is a data: address whose base64 is not valid; encode the file again") from None
