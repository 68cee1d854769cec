"""The fields of a chat request as a table: what each one is, and whether it is used, ignored or refused.

The same table checks requests (`read_fields`), describes them (`openapi.py`) and is compared with docs/serve.md by a
test. A schema here is JSON Schema with the few keywords that `_check` knows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from internvl_edge.base.text import one_line, shown

from .errors import invalid

Use = Literal["used", "ignored", "refused"]


@dataclass(frozen=True)
class Field:
    """One field of a request.

    Attributes:
        name: of the field.
        use: "used", "ignored" in silence, or "refused".
        schema: of its values, apart from null, which is the same as leaving a field out.
        advice: what to do instead of a refused field.
        harmless: values of a refused field that ask for nothing, and are ignored.
    """

    name: str
    use: Use
    schema: Mapping[str, Any] = field(default_factory=dict)
    advice: str = ""
    harmless: tuple[Any, ...] = ()


_FLAG = {"type": "boolean"}
_TEXT = {"type": "string"}
_PENALTY = {"type": "number", "minimum": -2, "maximum": 2}
_COUNT = {"type": "integer", "minimum": 1}
MOST_STOPS, MOST_STOP_CHARACTERS = 16, 1000
MOST_BIASES = 300
SEED = 1 << 63

_ASK_JSON = "ask for JSON with response_format, and call the function yourself"
_TEMPLATE = "the template is the checkpoint's; leave it out"
_FORM = "use structured_outputs: {json, regex or choice}"

FIELDS: tuple[Field, ...] = (
    Field("messages", "used", {"type": "array", "minItems": 1, "maxItems": 1000, "items": {"type": "object"}}),
    Field("model", "used", _TEXT),
    Field("max_completion_tokens", "used", _COUNT),
    Field("max_tokens", "used", _COUNT),
    Field("temperature", "used", {"type": "number", "minimum": 0, "maximum": 2}),
    Field("top_p", "used", {"type": "number", "exclusiveMinimum": 0, "maximum": 1}),
    Field("top_k", "used", {"type": "integer", "minimum": -1}),
    Field("min_p", "used", {"type": "number", "minimum": 0, "maximum": 1}),
    Field("seed", "used", {"type": "integer", "minimum": -SEED, "maximum": SEED - 1}),
    Field(
        "stop",
        "used",
        {
            "type": ["string", "array"],
            "minLength": 1,
            "maxLength": MOST_STOP_CHARACTERS,
            "maxItems": MOST_STOPS,
            "items": {"type": "string", "minLength": 1, "maxLength": MOST_STOP_CHARACTERS},
        },
    ),
    Field("n", "used", _COUNT),
    Field("stream", "used", _FLAG),
    Field(
        "stream_options",
        "used",
        {"type": "object", "properties": {"include_usage": _FLAG, "include_obfuscation": _FLAG}},
    ),
    Field("logprobs", "used", _FLAG),
    Field("top_logprobs", "used", {"type": "integer", "minimum": 0, "maximum": 20}),
    Field(
        "response_format",
        "used",
        {
            "type": "object",
            "required": ["type"],
            "properties": {
                "type": {"type": "string", "enum": ["text", "json_object", "json_schema", "regex_schema"]},
                "json_schema": {
                    "type": "object",
                    "required": ["schema"],
                    "properties": {"name": _TEXT, "strict": _FLAG, "schema": {"type": ["object", "boolean"]}},
                },
                "regex_schema": _TEXT,
            },
        },
    ),
    Field(
        "structured_outputs",
        "used",
        {
            "type": "object",
            "properties": {
                "json": {"type": ["object", "boolean", "string"]},
                "regex": _TEXT,
                "choice": {"type": "array", "minItems": 1, "maxItems": 1000, "items": _TEXT},
            },
        },
    ),
    Field("frequency_penalty", "used", _PENALTY),
    Field("presence_penalty", "used", _PENALTY),
    Field("repetition_penalty", "used", {"type": "number", "exclusiveMinimum": 0, "maximum": 100}),
    Field("logit_bias", "used", {"type": "object", "maxProperties": MOST_BIASES}),
    Field("max_tiles", "used", _COUNT),
    Field("votes", "used", _COUNT),
    Field("reasoning", "used", {"type": "string", "enum": ["cot"]}),
    *(
        Field(name, "ignored")
        for name in (
            "user",
            "metadata",
            "store",
            "service_tier",
            "safety_identifier",
            "prompt_cache_key",
            "prompt_cache_retention",
            "prompt_cache_options",
            "prompt_cache_breakpoint",
            "parallel_tool_calls",
            "verbosity",
            "reasoning_effort",
            "prediction",
            "moderation",
        )
    ),
    Field("tools", "refused", advice=_ASK_JSON, harmless=([],)),
    Field("tool_choice", "refused", advice=_ASK_JSON, harmless=("none", "auto")),
    Field("functions", "refused", advice=_ASK_JSON, harmless=([],)),
    Field("function_call", "refused", advice=_ASK_JSON, harmless=("none", "auto")),
    Field("audio", "refused", advice="answers are texts; leave it out"),
    Field("modalities", "refused", advice='answers are texts; leave it out, or give ["text"]', harmless=(["text"],)),
    Field("web_search_options", "refused", advice="this server searches nothing; leave it out"),
    Field("chat_template", "refused", advice=_TEMPLATE),
    Field("chat_template_kwargs", "refused", advice=_TEMPLATE, harmless=({},)),
    Field("continue_final_message", "refused", advice="end with a message of the user", harmless=(False,)),
    Field("add_generation_prompt", "refused", advice="leave it out", harmless=(True,)),
    Field("use_beam_search", "refused", advice="use votes or n", harmless=(False,)),
    Field("best_of", "refused", advice="use votes or n", harmless=(1,)),
    Field("prompt_logprobs", "refused", advice="logprobs gives those of the answer", harmless=(False, 0)),
    Field("ignore_eos", "refused", advice="leave it out", harmless=(False,)),
    Field("skip_special_tokens", "refused", advice="answers have none; leave it out", harmless=(True,)),
    *(
        Field(name, "refused", advice=_FORM)
        for name in (
            "guided_json",
            "guided_regex",
            "guided_choice",
            "guided_grammar",
            "guided_decoding_backend",
            "grammar",
            "regex",
            "json_schema",
        )
    ),
)
BY_NAME = {each.name: each for each in FIELDS}


def read_fields(values: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return the fields of a request that are used and not null, and the names of those that nobody knows.

    Raises:
        ApiError: 400 for a refused field or a wrong value; it names the field.
    """
    used: dict[str, Any] = {}
    unknown: list[str] = []
    for name, value in values.items():
        known = BY_NAME.get(name)
        if known is None:
            unknown.append(name)
        elif value is None or known.use == "ignored":
            continue
        elif known.use == "refused":
            if not any(type(value) is type(harmless) and value == harmless for harmless in known.harmless):
                raise invalid(name, f"{name} is not supported; {known.advice}", code="unsupported_parameter")
        else:
            check(value, known.schema, name)
            used[name] = value
    return used, unknown


_TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "object": (dict,),
    "array": (list,),
}
_WORDS = {
    "string": "a text",
    "integer": "a whole number",
    "number": "a number",
    "boolean": "true or false",
    "object": "an object",
    "array": "a list",
}


def check(value: Any, schema: Mapping[str, Any], name: str) -> None:
    """Check a value of JSON.

    Raises:
        ApiError: 400 that names the field, says what was found and what was expected.
    """
    kinds = schema.get("type")
    if kinds is None:
        return
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if not any(_has_type(value, kind) for kind in kinds):
        raise _wrong(name, value, " or ".join(_WORDS[kind] for kind in kinds))
    if "enum" in schema and value not in schema["enum"]:
        raise _wrong(name, value, " or ".join(map(repr, schema["enum"])))
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        _check_number(value, schema, name)
    elif isinstance(value, str):
        _check_length(len(value), "characters", schema.get("minLength"), schema.get("maxLength"), name)
    elif isinstance(value, list):
        _check_length(len(value), "entries", schema.get("minItems"), schema.get("maxItems"), name)
        for index, item in enumerate(value):
            check(item, schema.get("items", {}), f"{name}[{index}]")
    elif isinstance(value, dict):
        _check_object(value, schema, name)


def _check_object(value: Mapping[str, Any], schema: Mapping[str, Any], name: str) -> None:
    _check_length(len(value), "entries", None, schema.get("maxProperties"), name)
    for required in schema.get("required", ()):
        if value.get(required) is None:
            raise invalid(f"{name}.{required}", f"{name} has no {required}; give it")
    for key, part in schema.get("properties", {}).items():
        if value.get(key) is not None:
            check(value[key], part, f"{name}.{key}")


def _check_number(value: float, schema: Mapping[str, Any], name: str) -> None:
    least, above, most = schema.get("minimum"), schema.get("exclusiveMinimum"), schema.get("maximum")
    fits = (
        (isinstance(value, int) or math.isfinite(value))
        and (least is None or value >= least)
        and (above is None or value > above)
        and (most is None or value <= most)
    )
    if not fits:
        low = f"at least {least}" if least is not None else f"above {above}" if above is not None else ""
        raise _wrong(name, value, " and ".join(part for part in (low, f"at most {most}" if most else "") if part))


def _check_length(length: int, unit: str, least: int | None, most: int | None, name: str) -> None:
    if (least is not None and length < least) or (most is not None and length > most):
        expected = f"{least or 0} to {most}" if most is not None else f"at least {least}"
        raise invalid(name, f"{name} has {length} {unit}, expected {expected}")


def _has_type(value: Any, kind: str) -> bool:
    return isinstance(value, _TYPES[kind]) and (kind == "boolean" or not isinstance(value, bool))


def _wrong(name: str, value: Any, expected: str) -> Exception:
    return invalid(name, f"{one_line(name, 100)} is {shown(value, 60)}, expected {expected}")
