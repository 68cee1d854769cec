"""Answers in a given form, on both demo models: what comes out, what it costs, and what is refused."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers.repository import REPOSITORY
from internvl_edge import AnswerFormat, InternVL, export_bundle
from internvl_edge.base.errors import EngineError, PromptError
from internvl_edge.bundle import names
from internvl_edge.bundle.bundle import Bundle
from internvl_edge.demo import CHECKPOINT, demo_questions
from internvl_edge.runtime import grammar
from internvl_edge.runtime.decoding import Decoding
from internvl_edge.runtime.grammar import Constrained, ForcedTokens, Grammars
from internvl_edge.runtime.sampling import Sampler, Sampling

jsonschema = pytest.importorskip("jsonschema")
pytest.importorskip("llguidance")

CHECKPOINTS = {"qwen2": CHECKPOINT, "internlm2": REPOSITORY / "examples" / "reader" / "internlm2"}
SCHEMAS: dict[str, Any] = json.loads((REPOSITORY / "tests" / "data" / "answer_schemas.json").read_text("utf-8"))
RECEIPT = {
    "type": "object",
    "properties": {"total": {"type": "string", "maxLength": 12}, "currency": {"enum": ["EUR", "USD"]}},
    "required": ["total", "currency"],
}


@pytest.fixture(scope="module", params=list(CHECKPOINTS))
def text(request: pytest.FixtureRequest) -> str:
    """The text model: byte-level tokens of Qwen2, byte fallback of InternLM2."""
    return str(request.param)


@pytest.fixture(scope="module")
def folder(text: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_bundle(CHECKPOINTS[text], tmp_path_factory.mktemp(text) / "bundle")


@pytest.fixture(scope="module")
def model(folder: Path) -> Iterator[InternVL]:
    with InternVL.load(folder, engine="onnxruntime", threads=1) as loaded:
        yield loaded


def validate(schema: Any, text: str) -> None:
    """By another library, formats included."""
    kind = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
    kind(schema, format_checker=kind.FORMAT_CHECKER).validate(json.loads(text))


# -- what comes out ----------------------------------------------------------------------------------------------------


def test_the_schemas_are_many_and_of_many_kinds() -> None:
    assert len(SCHEMAS) >= 200
    assert len({name.rsplit(" ", 1)[0] for name in SCHEMAS}) >= 20


def test_answers_are_valid_by_their_schema(model: InternVL, text: str) -> None:
    """Half of the schemas on each model here; the slow test takes all, with spaces and with sampling."""
    half = list(SCHEMAS.items())[text == "qwen2" :: 2]
    for name, schema in half:
        reply = model.chat("Answer.", answer_format=AnswerFormat.json_schema(schema, compact=True), max_new_tokens=900)
        assert reply.finish_reason == "stop", (name, reply.text)
        validate(schema, reply.text)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "top_p": 0.95, "seed": 3, "speculate": True}])
def test_all_answers_are_valid_by_their_schema(model: InternVL, options: dict[str, Any]) -> None:
    for name, schema in SCHEMAS.items():
        reply = model.chat("Answer.", answer_format=AnswerFormat.json_schema(schema), max_new_tokens=2500, **options)
        assert reply.finish_reason == "stop", (name, reply.text)
        validate(schema, reply.text)


@pytest.mark.parametrize(
    "form",
    [
        AnswerFormat.regex(r"[0-9]+([.][0-9][0-9])?|[A-Z]+ [A-Z]+ [0-9]+"),
        AnswerFormat.regex(r"(?s:.*)"),
        AnswerFormat.choice([asked.expected for asked in demo_questions()]),
    ],
    ids=["regex", "anything", "choice"],
)
def test_an_answer_that_has_the_form_anyway_is_unchanged(model: InternVL, form: AnswerFormat) -> None:
    for asked in demo_questions():
        free = model.chat(asked.question, asked.image)
        assert free.text == asked.expected
        assert model.chat(asked.question, asked.image, answer_format=form).output_ids == free.output_ids


def test_json_that_the_model_would_write_anyway_is_unchanged(model: InternVL) -> None:
    """The demo models never write JSON by themselves, so biases make them: the same ones with and without a form."""
    plain = "12"
    ids = model.answer_ids(plain)[:-1]
    bias = dict.fromkeys(ids, 30.0) | {model._stop_ids[0]: 25.0}
    penalty: dict[str, Any] = {"logit_bias": bias, "frequency_penalty": 2.0, "presence_penalty": 2.0}
    free = model.chat("Count.", max_new_tokens=12, **penalty)
    assert free.text.isdigit()
    schema = {"type": "integer"}
    assert model.chat("Count.", answer_format=AnswerFormat.json_schema(schema), **penalty).output_ids == free.output_ids


def test_a_choice_is_all_that_comes_out(model: InternVL) -> None:
    choices = ["yes", "no", 'perhaps "not"', "日本\n中国", "ja/nein \\"]
    found = set()
    for seed in range(30):
        reply = model.chat("Well?", answer_format=AnswerFormat.choice(choices), temperature=3.0, seed=seed)
        assert reply.finish_reason == "stop"
        found.add(reply.text)
    assert found <= set(choices)
    assert len(found) >= 3


def test_an_answer_that_is_cut_off_says_so(model: InternVL) -> None:
    reply = model.chat("Answer.", answer_format=AnswerFormat.json_schema(RECEIPT), max_new_tokens=4)
    assert reply.finish_reason == "length"
    assert len(reply.output_ids) == 4


def test_seeds_repeat_and_log_probabilities_are_the_models_own(model: InternVL) -> None:
    form = AnswerFormat.json_schema(RECEIPT, compact=True)
    options: dict[str, Any] = {"temperature": 1.0, "seed": 5, "logprobs": True, "max_new_tokens": 60}
    one, two = (model.chat("Answer.", answer_format=form, **options) for _ in range(2))
    assert one.output_ids == two.output_ids
    assert [entry.token for entry in one.logprobs or ()] == one.output_ids
    assert min(entry.logprob for entry in one.logprobs or ()) < -3  # the model never wrote JSON


# -- what it costs -----------------------------------------------------------------------------------------------------


def steps(model: InternVL, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of tokens of each step of the engine from now on."""
    found: list[int] = []
    engine = model.engine
    decode, score = engine.decode_rows, engine.score
    monkeypatch.setattr(engine, "decode_rows", lambda embeds, rows: (found.append(1), decode(embeds, rows))[1])
    monkeypatch.setattr(engine, "score", lambda embeds, row: (found.append(len(embeds)), score(embeds, row))[1])
    return found


@pytest.mark.parametrize("options", [{}, {"temperature": 0.8, "seed": 1}, {"speculate": True}])
def test_forced_tokens_save_steps_and_change_no_token(
    model: InternVL, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    form = AnswerFormat.json_schema(RECEIPT, compact=True)
    question = "Read total and currency. total 12.49 EUR total 12.49 EUR"
    with monkeypatch.context() as patch:
        patch.setattr(ForcedTokens, "guess", lambda *_: [])
        one_by_one = steps(model, patch)
        plain = model.chat(question, answer_format=form, **options)
    with monkeypatch.context() as patch:
        several = steps(model, patch)
        guessed = model.chat(question, answer_format=form, **options)
    assert guessed.output_ids == plain.output_ids
    assert max(one_by_one) == 1
    assert len(several) <= len(one_by_one) - 8


def test_each_token_is_chosen_once_and_in_order(model: InternVL, monkeypatch: pytest.MonkeyPatch) -> None:
    """So the grammar never has to go back, whatever was guessed."""
    accepted: list[int] = []
    accept = Constrained._accept
    monkeypatch.setattr(Constrained, "_accept", lambda self, token: (accepted.append(token), accept(self, token))[1])
    for compact in (False, True):
        accepted.clear()
        form = AnswerFormat.json_schema(RECEIPT, compact=compact)
        reply = model.chat("Read.", answer_format=form, speculate=True, max_new_tokens=80)
        assert accepted == reply.output_ids


@pytest.mark.parametrize("form", [AnswerFormat.json_schema(RECEIPT), AnswerFormat.regex("[0-9]+[.][0-9][0-9]")])
def test_logits_leave_the_device_only_where_the_best_token_is_refused(model: InternVL, form: AnswerFormat) -> None:
    asked = demo_questions()[0]
    expected = model.chat(asked.question, asked.image, answer_format=form, max_new_tokens=60)
    refused = np.count_nonzero(
        model.trace(asked.question, asked.image, answer=expected.output_ids).logits.argmax(1) != expected.output_ids
    )
    constrained = Constrained(Sampler(Sampling()), model._grammars.matcher(form), model._stop_ids)
    decoding = Decoding(constrained, model._stop_ids, 60, lambda _: False)
    asked_for: list[int] = []

    def logits(row: np.ndarray) -> np.ndarray:
        asked_for.append(len(decoding.tokens))
        return row

    rows = iter(model.trace(asked.question, asked.image, answer=expected.output_ids).logits)
    decoding.begin(next(rows))
    while not decoding.finished:
        assert len(decoding.next_tokens()) == 1
        row = next(rows)
        decoding.advance_to(int(row.argmax()), lambda row=row: logits(row))
    assert decoding.tokens == expected.output_ids
    assert len(asked_for) <= refused < len(decoding.tokens)


# -- one token ---------------------------------------------------------------------------------------------------------


def grammars(folder: Path) -> Grammars:
    manifest = Bundle.open(folder).manifest
    return Grammars(folder / names.TOKENIZER, manifest.model.decoder.vocab_size, manifest.tokens.stop)


def test_sampling_draws_from_the_allowed_tokens_alone(folder: Path, model: InternVL) -> None:
    """The distribution of what the form allows, renormalized."""
    vocab, random = model.config.decoder.vocab_size, np.random.default_rng(0)
    logits = (random.standard_normal(vocab) * 2).astype(np.float32)
    made, form = grammars(folder), AnswerFormat.regex("[0-9]")
    allowed = [token for token in range(vocab) if model._tokenizer.token_bytes(token) in [b"%d" % d for d in range(10)]]
    expected = np.exp(logits[allowed].astype(np.float64))
    expected /= expected.sum()
    counts = np.zeros(vocab)
    sampler = Sampler(Sampling(temperature=1.0, seed=0))
    for _ in range(3000):
        counts[Constrained(sampler, made.matcher(form), model._stop_ids).choose(logits)] += 1
    assert counts.sum() == counts[allowed].sum()
    np.testing.assert_allclose(counts[allowed] / 3000, expected, atol=0.04)


def test_a_dead_end_is_an_error_and_not_an_endless_answer(folder: Path, model: InternVL) -> None:
    class Stuck:
        def is_stopped(self) -> bool:
            return False

        def is_error(self) -> bool:
            return True

        def get_error(self) -> str:
            return "too many states\nmore"

        def validate_tokens(self, tokens: list[int]) -> int:
            return 0

        def compute_bitmask(self) -> bytes:
            return bytes(4 * (model.config.decoder.vocab_size // 32 + 1))

    constrained = Constrained(Sampler(Sampling()), Stuck(), model._stop_ids)
    with pytest.raises(EngineError, match="the form of this answer failed: too many states; give a simpler one"):
        constrained.choose(np.zeros(model.config.decoder.vocab_size, np.float32))


def test_compiled_forms_are_kept_and_bounded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[str] = []
    compile_one = Grammars._compile
    monkeypatch.setattr(
        Grammars, "_compile", lambda self, form: (compiled.append(form.text), compile_one(self, form))[1]
    )
    made = grammars(folder)
    for _ in range(3):
        made.matcher(AnswerFormat.regex("a"))
    assert compiled == ["a"]
    for number in range(grammar._KEPT):
        made.matcher(AnswerFormat.regex(f"b{number}"))
    assert len(made._compiled) == grammar._KEPT
    made.matcher(AnswerFormat.regex(f"b{number}"))
    made.matcher(AnswerFormat.regex("a"))
    assert compiled.count("a") == 2
    assert len(compiled) == grammar._KEPT + 2


def test_matchers_of_one_form_are_independent(folder: Path, model: InternVL) -> None:
    made, form = grammars(folder), AnswerFormat.choice(["ab", "cd"])
    one, two = made.matcher(form), made.matcher(form)
    assert one.consume_token(model.answer_ids("a")[0])
    assert two.validate_tokens([model.answer_ids("c")[0]]) == 1


# -- bounds ------------------------------------------------------------------------------------------------------------


def accepts(made: Grammars, form: AnswerFormat, text: str) -> bool:
    """Whether a text has a form, by its bytes: each byte is a token, so the way of splitting it does not matter."""
    matcher = made.matcher(form)
    tokens = made._tokenizer.tokenize_str(text)
    return bool(matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting())


@pytest.mark.parametrize(
    ("schema", "right", "wrong"),
    [
        ({"type": "string"}, ['""', '"' + "x" * 1000 + '"'], ['"' + "x" * 1001 + '"']),
        ({"type": "number"}, ["0", "-1.5", "123456789012345.123456789"], ["1234567890123456", "0.1234567891", "1e5"]),
        ({"type": "integer"}, ["-999999999999999"], ["1000000000000000"]),
        (
            {"type": "array", "items": {"type": "null"}},
            ["[]", "[" + "null," * 255 + "null]"],
            ["[" + "null," * 256 + "null]"],
        ),
        ({"type": "object"}, ['{"a":{"b":[1,"x",null]}}', '{"' + "k" * 64 + '":1}'], ['{"' + "k" * 65 + '":1}', "[1]"]),
        ({"type": "object"}, ['{"a":[[[[1]]]]}'], ['{"a":[[[[[1]]]]]}']),
        ({}, ["1", '"x"', "[1]", '{"a":1}', "null"], ["", "x", '"' + "x" * 1001 + '"']),
        (
            {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
            ['{"a":1}', '{ "a" : 1 }', '{\n  "a": 1\n}', '{\n        "a":1}'],
            ['{"a":1,"b":2}', '{\n\n"a":1}', '{         "a":1}', '{\t"a":1}', ' {"a":1}', '{"a":1} '],
        ),
        ({"type": "object", "properties": {"a": {}}, "additionalProperties": True}, ['{"a":1,"b":2}'], ["{"]),
        ({"type": "string", "maxLength": 2000}, ['"' + "x" * 2000 + '"'], ['"' + "x" * 2001 + '"']),
        ({"type": "string", "minLength": 1500}, ['"' + "x" * 1500 + '"'], ['"x"']),
        ({"type": "number", "minimum": 5}, ["5.25"], ["4", "1000000000000000"]),
        ({"type": "integer", "minimum": 5 * 10**15}, ["5000000000000000"], ["4999999999999999"]),
        ({"format": "date"}, ['"2024-02-29"', '"2000-12-31"'], ['"2023-02-29"', '"1900-02-29"', '"2024-04-31"']),
        ({"type": "string", "format": "date-time"}, ['"2024-02-29T23:59:59Z"'], ['"2024-02-30T00:00:00Z"']),
        ({"type": "string", "format": "time"}, ['"23:59:59Z"'], ['"23:58:60Z"']),
        ({"properties": {"a": {}, "b": {"$id": "https://example.com/b"}}}, ['{"a":[[1]]}'], ['{"a":[[[1]]]}']),
        ({"type": "number", "minimum": 1, "maximum": 1}, ["1"], ["2"]),
        ({"const": "x" * 3000}, ['"' + "x" * 3000 + '"'], ['""']),
        (
            {"allOf": [{"properties": {"a": {"const": 1}}}, {"properties": {"b": {"const": 2}}}], "type": "object"},
            ['{"a":1,"b":2}', "{}"],
            ['{"a":2}'],
        ),
        (
            {
                "$ref": "#/$defs/both",
                "$defs": {
                    "one": {"type": "object", "properties": {"a": {"const": 1}}},
                    "both": {"allOf": [{"$ref": "#/$defs/one"}, {"properties": {"b": {"const": 2}}}]},
                },
            },
            ['{"a":1,"b":2}'],
            ['{"a":2,"b":2}'],
        ),
        (
            {"anyOf": [{"type": "object", "properties": {"a": {"const": 1}}}, {"type": "null"}]},
            ['{"a":1}'],
            ['{"b":1}'],
        ),
        ({"type": "string", "maxLength": 1500, "anyOf": [{"pattern": "^x*$"}]}, ['"' + "x" * 1500 + '"'], ['"y"']),
    ],
)
def test_what_a_schema_leaves_open_is_bounded(folder: Path, schema: Any, right: list[str], wrong: list[str]) -> None:
    made, form = grammars(folder), AnswerFormat.json_schema(schema)
    assert [text for text in right if not accepts(made, form, text)] == []
    assert [text for text in wrong if accepts(made, form, text)] == []
    for text in right:
        validate(schema, text)


def test_compact_json_has_no_spaces(folder: Path) -> None:
    made, form = grammars(folder), AnswerFormat.json_object(compact=True)
    assert accepts(made, form, '{"a":[1,2]}')
    assert not accepts(made, form, '{"a": [1,2]}')


def test_text_is_split_as_the_model_splits_it(folder: Path, model: InternVL) -> None:
    made = grammars(folder)
    made.matcher(AnswerFormat.regex("a"))
    for text in ("MUSEUM GATE 28", '{"total": "12.49"}', "日本 naïve 😀"):
        assert made._tokenizer.tokenize_str(text)[-8:] == model.answer_ids(text)[:-1][-8:]


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schema", "named"),
    [
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"not": {"type": "null"}}, "not"),
        ({"if": {}, "then": {}}, "if"),
        ({"type": "object", "dependentRequired": {"a": ["b"]}}, "dependentRequired"),
        ({"type": "object", "propertyNames": {"maxLength": 3}}, "propertyNames"),
        ({"type": "array", "contains": {"const": 1}}, "contains"),
        ({"type": "string", "format": "iri-reference-x"}, "iri-reference-x"),
        ({"$ref": "https://example.com/other"}, "example.com/other"),
        ({"$ref": "#/$defs/missing"}, "missing"),
        ({"type": "string", "pattern": "(?=a)b"}, "look-around"),
        ({"type": "strin"}, "strin"),
        ({"enum": []}, "Unsatisfiable"),
        (False, "Unsatisfiable"),
        ({"type": "integer", "minimum": 5, "maximum": 4}, "Unsatisfiable"),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}, "no answer satisfies it"),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "oneOf"),
        ({"type": "object", "properties": {"deep": {"items": {"type": "array", "uniqueItems": True}}}}, "uniqueItems"),
        ({"type": "object", "properties": 5}, "properties"),
        ({"anyOf": 5}, "anyOf"),
        ({"type": "string", "maxLength": "x"}, "maxLength"),
    ],
)
def test_what_is_not_supported_is_named_before_any_work(model: InternVL, schema: Any, named: str) -> None:
    """Before the image is even looked for."""
    with pytest.raises(PromptError, match=named) as caught:
        model.chat("x", ["nowhere.png"], answer_format=AnswerFormat.json_schema(schema))
    assert "this JSON schema is not supported" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) <= 400


@pytest.mark.parametrize("pattern", ["(", "(?<=a)b", r"\bfoo", "[z-a]"])
def test_regular_expressions_that_are_not_supported_are_one_line(model: InternVL, pattern: str) -> None:
    with pytest.raises(PromptError, match="this regular expression is not supported") as caught:
        model.stream("x", answer_format=AnswerFormat.regex(pattern))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AnswerFormat.json_schema("{"), "is not valid JSON"),
        (lambda: AnswerFormat.json_schema("[1]"), "is a list, expected an object"),
        (lambda: AnswerFormat.json_schema({"const": float("nan")}), "is no JSON"),
        (lambda: AnswerFormat.json_schema({"const": {1, 2}}), "is no JSON"),  # type: ignore[dict-item]
        (lambda: AnswerFormat.json_schema('{"a": 1, "a": 2}'), "twice"),
        (lambda: AnswerFormat.json_schema({"const": "x" * 70_000}), "expected at most 65536"),
        (lambda: AnswerFormat.json_schema({"const": "\ud800"}), "surrogate"),
        (lambda: AnswerFormat.json_schema("[" * 100_000), "expected at most 65536"),
        (lambda: AnswerFormat.json_schema('{"items":' * 100 + "{}" + "}" * 100), "has 101 objects and lists"),
        (lambda: AnswerFormat.json_schema('{"items":' * 3000 + "{}" + "}" * 3000), "inside each other"),
        (lambda: AnswerFormat.regex(3), "expected a text"),  # type: ignore[arg-type]
        (lambda: AnswerFormat.regex("x" * 70_000), "expected at most 65536"),
        (lambda: AnswerFormat.choice([]), "0 choices"),
        (lambda: AnswerFormat.choice("yes"), "expected a list of texts"),
        (lambda: AnswerFormat.choice(["a", ""]), "a choice is ''"),
        (lambda: AnswerFormat.choice([" a"]), "has no space at its ends"),
        (lambda: AnswerFormat.choice([1]), "a choice is 1"),  # type: ignore[list-item]
        (lambda: AnswerFormat.choice([["a"], "b"]), r"a choice is \['a'\]"),  # type: ignore[list-item]
    ],
)
def test_mistakes_in_a_form_are_one_line(make: Any, message: str) -> None:
    with pytest.raises(PromptError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) <= 400


def test_trace_refuses_a_form(model: InternVL) -> None:
    with pytest.raises(PromptError, match="trace follows the model"):
        model.trace("x", answer_format=AnswerFormat.regex("a"))


def test_a_missing_package_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(EngineError, match=r"needs the package llguidance: pip install 'internvl-edge\[structured\]'"):
        grammars(folder).matcher(AnswerFormat.regex("a"))
