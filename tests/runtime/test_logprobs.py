"""Log probabilities of an answer against a plain softmax, and the options that ask for them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from internvl_edge import InternVL, export_bundle
from internvl_edge.base.errors import PromptError
from internvl_edge.demo import CHECKPOINT, demo_questions
from internvl_edge.runtime.ranking import log_probabilities

LOGITS = arrays.arrays(np.float32, st.integers(1, 60), elements=st.floats(-40, 40, width=32, allow_nan=False))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[InternVL]:
    bundle = export_bundle(CHECKPOINT, tmp_path_factory.mktemp("logprobs") / "bundle")
    with InternVL.load(bundle, engine="onnxruntime", threads=1) as loaded:
        yield loaded


def log_softmax(logits: np.ndarray) -> np.ndarray:
    exact = logits.astype(np.float64) - logits.max()
    return exact - np.log(np.exp(exact).sum())


@given(LOGITS)
def test_log_probabilities_are_those_of_a_softmax(logits: np.ndarray) -> None:
    found = log_probabilities(logits, np.arange(len(logits)))
    np.testing.assert_allclose(found, log_softmax(logits), atol=2e-5)
    assert abs(np.exp(found).sum() - 1) < 1e-5


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.9, "seed": 4, "logit_bias": {40: 5.0}, "frequency_penalty": 1.0}]
)
def test_each_token_has_the_log_probability_that_the_model_gave_it(model: InternVL, options: dict[str, Any]) -> None:
    """Before any option changed the logits: those that a trace of the same tokens records."""
    asked = demo_questions()[0]
    reply = model.chat(asked.question, asked.image, logprobs=True, top_logprobs=5, **options)
    logits = model.trace(asked.question, asked.image, answer=reply.output_ids).logits
    assert reply.logprobs is not None
    assert [entry.token for entry in reply.logprobs] == reply.output_ids
    for entry, row in zip(reply.logprobs, logits, strict=True):
        exact = log_softmax(row)
        assert entry.logprob == pytest.approx(exact[entry.token], abs=1e-3)
        assert [each.token for each in entry.top] == np.argsort(-row, kind="stable")[:5].tolist()
        np.testing.assert_allclose([each.logprob for each in entry.top], exact[[e.token for e in entry.top]], atol=1e-3)
    text = b"".join(entry.bytes for entry in reply.logprobs[:-1]).decode()
    assert text.strip() == reply.text
    assert reply.logprobs[-1].text in ("<|im_end|>", "<|endoftext|>")


def test_recording_changes_no_answer_and_is_off_by_default(model: InternVL) -> None:
    for asked in demo_questions():
        reply = model.chat(asked.question, asked.image, logprobs=True)
        assert reply.text == asked.expected
        assert [entry.top for entry in reply.logprobs or ()] == [[]] * len(reply.output_ids)
        assert model.chat(asked.question, asked.image).logprobs is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_logprobs": 3}, "top_logprobs needs logprobs=True"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs is 21, expected 0 to 20"),
        ({"logprobs": True, "top_logprobs": -1}, "top_logprobs is -1"),
        ({"logit_bias": {10**6: 1.0}}, "logit_bias has token 1000000, but the model has"),
    ],
)
def test_mistakes_are_one_line(model: InternVL, options: dict[str, Any], message: str) -> None:
    with pytest.raises(PromptError, match=message):
        model.stream("x", **options)
