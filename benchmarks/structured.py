"""What answers in a given form cost: steps of the engine, and time for each token in the grammar.

    python benchmarks/structured.py BUNDLE [TOKENIZER]

Steps: the demo reader (BUNDLE) answers its questions in several forms, with forced tokens as guesses and without them.
Both answers have the same tokens. Only steps are counted, because they do not depend on the machine.

Grammar: microseconds of CPU time of one thread for a token, over the vocabulary of TOKENIZER (a `tokenizer.json` of
151,674 tokens, such as that of a random 1B bundle, or a bundle's own): whether a token is allowed, all allowed tokens,
and forced tokens, along one answer; choosing a token in all, where the best one is refused or sampling is on;
milliseconds to compile each form; seconds to read the tokenizer. The limit is 1000 microseconds for a token, as for
choosing one.

Writes results/structured.json.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from record import write_results

from internvl_edge import AnswerFormat, InternVL
from internvl_edge.demo import demo_questions
from internvl_edge.runtime.grammar import Constrained, ForcedTokens, Grammars
from internvl_edge.runtime.sampling import Sampler, Sampling

RECEIPT = {
    "type": "object",
    "properties": {
        "total": {"type": "string", "pattern": "^[0-9]{1,3}[.][0-9]{2}$"},
        "currency": {"enum": ["EUR", "USD"]},
        "paid": {"type": "boolean"},
    },
    "required": ["total", "currency", "paid"],
}
FORMS = {
    "json_schema, compact": AnswerFormat.json_schema(RECEIPT, compact=True),
    "json_schema": AnswerFormat.json_schema(RECEIPT),
    "regex": AnswerFormat.regex("[0-9]{1,3}[.][0-9]{2}"),
    "choice": AnswerFormat.choice(["red circle", "blue square", "green triangle"]),
}
ANSWERS = {
    "json_schema, compact": '{"total":"12.49","currency":"EUR","paid":true}',
    "json_schema": '{"total": "12.49", "currency": "EUR", "paid": true}',
    "json_object": '{"shop": "Bakery", "lines": [{"name": "Bagel", "price": 1.5}, {"name": "日本", "price": 20}]}',
    "regex": "12.49",
    "choice": "blue square",
}
LIMIT_US = 1000


def steps_of(model: InternVL, asked: Any, form: AnswerFormat) -> dict[str, int]:
    counts = {"decode": 0, "score": 0}
    engine = model.engine
    decode, score = engine.decode_rows, engine.score

    def counted(name: str, action: Any) -> Any:
        def call(*values: Any) -> Any:
            counts[name] += 1
            return action(*values)

        return call

    engine.decode_rows, engine.score = counted("decode", decode), counted("score", score)  # type: ignore[method-assign]
    try:
        reply = model.chat(asked.question, asked.image, answer_format=form, max_new_tokens=200)
    finally:
        engine.decode_rows, engine.score = decode, score  # type: ignore[method-assign]
    return counts | {"tokens": len(reply.output_ids), "hash": hash(tuple(reply.output_ids))}


def steps(folder: Path) -> dict[str, Any]:
    rows: dict[str, Any] = {}
    guess = ForcedTokens.guess
    with InternVL.load(folder, engine="onnxruntime", threads=1) as model:
        for name, form in FORMS.items():
            row = {"tokens": 0, "steps": 0, "steps_without_guesses": 0, "same_answer": True}
            for asked in demo_questions():
                found = steps_of(model, asked, form)
                ForcedTokens.guess = lambda *_: []  # type: ignore[method-assign]
                try:
                    plain = steps_of(model, asked, form)
                finally:
                    ForcedTokens.guess = guess  # type: ignore[method-assign]
                row["tokens"] += found["tokens"]
                row["steps"] += found["decode"] + found["score"]
                row["steps_without_guesses"] += plain["decode"] + plain["score"]
                row["same_answer"] &= found["hash"] == plain["hash"]
            row["share_of_steps_saved"] = round(1 - row["steps"] / row["steps_without_guesses"], 2)
            rows[name] = row
            print(name, row)
    return rows


def tokens(path: Path) -> dict[str, Any]:
    vocab = 1 + max(json.loads(path.read_text(encoding="utf-8"))["model"]["vocab"].values())
    vocab = max(vocab, 1 + max(token["id"] for token in json.loads(path.read_text("utf-8"))["added_tokens"]))
    made, began = Grammars(path, vocab, [vocab - 1]), time.thread_time()
    made.matcher(AnswerFormat.regex("a"))
    found: dict[str, Any] = {"vocab": vocab, "tokenizer_s": round(time.thread_time() - began, 2)}
    forms = FORMS | {"json_object": AnswerFormat.json_object()}
    for name, answer in ANSWERS.items():
        began = time.thread_time()
        made.matcher(forms[name])
        row: dict[str, Any] = {"compile_ms": round((time.thread_time() - began) * 1e3, 2)}
        times: dict[str, list[float]] = {"allowed": [], "mask": [], "forced": []}
        for _ in range(20):
            matcher = made.matcher(forms[name])
            ids = made._tokenizer.tokenize_str(answer)
            for token in ids:
                for kind, ask in (
                    ("allowed", lambda t=token, m=matcher: m.validate_tokens([t])),
                    ("mask", matcher.compute_bitmask),
                    ("forced", matcher.compute_ff_tokens),
                ):
                    began = time.thread_time()
                    ask()
                    times[kind].append((time.thread_time() - began) * 1e6)
                assert matcher.consume_token(token), (name, answer)
            assert matcher.is_accepting()
        for kind, values in times.items():
            row[f"{kind}_us"] = {
                "median": round(float(np.median(values)), 1),
                "p99": round(float(np.percentile(values, 99)), 1),
            }
        row["choose_us"] = choosing(made, forms[name], vocab)
        found[name] = row
        print(name, row)
    return found | {"limit_us": LIMIT_US}


def choosing(made: Grammars, form: AnswerFormat, vocab: int) -> dict[str, float]:
    """Median microseconds to choose a token in all, for logits whose best token is never allowed, and for sampling."""
    random = np.random.default_rng(0)
    logits = (random.standard_normal(vocab) * 2).astype(np.float32)
    logits[vocab - 2] = 30
    found = {}
    for name, options in (("greedy, refused", {}), ("top_p", {"temperature": 0.7, "top_p": 0.9, "seed": 0})):
        times = []
        for _ in range(10):
            constrained = Constrained(Sampler(Sampling(**options)), made.matcher(form), [vocab - 1])  # type: ignore[arg-type]
            for _ in range(8):
                began = time.thread_time()
                token = constrained.choose(logits)
                times.append((time.thread_time() - began) * 1e6)
                if token == vocab - 1:
                    break
        found[name] = round(float(np.median(times)), 1)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("tokenizer", type=Path, nargs="?")
    options = parser.parse_args()
    tokenizer = options.tokenizer or options.bundle / "tokenizer.json"
    write_results("structured", {"steps": steps(options.bundle), "grammar": tokens(tokenizer)})


if __name__ == "__main__":
    main()
