"""A whole answer through the TensorRT engine's host side over a fake GPU: the same tokens as on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from helpers import tiny
from helpers.fake_gpu import FakeCuda, FakeTensorRT
from helpers.tensorrt_engines import open_engine, write_engines
from internvl_edge import AnswerFormat, InternVL, export_bundle
from internvl_edge.base.errors import EngineError
from internvl_edge.bundle.bundle import Bundle


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("model")
    opened = Bundle.open(export_bundle(tiny.write_checkpoint(folder / "checkpoint"), folder / "bundle", "float16"))
    write_engines(opened, "tensorrt")
    return opened


def load(bundle: Bundle, cuda: FakeCuda) -> tuple[InternVL, FakeTensorRT]:
    engine, api = open_engine(bundle, cuda)
    return InternVL(bundle, engine), api


def test_answers_are_the_cpus_and_only_tokens_come_back(bundle: Bundle) -> None:
    """The answer is short: float16 and float32 may part where two tokens are nearly as probable."""
    options = {"system": "", "max_new_tokens": 8}
    expected = InternVL.load(bundle.folder).chat("Hello", **options)
    cuda = FakeCuda()
    model, _ = load(bundle, cuda)
    assert model.chat("Hello", **options).output_ids == expected.output_ids
    vocabulary = 4 * bundle.manifest.model.decoder.vocab_size
    # One row of logits after the prompt; a few bytes for every later token.
    assert vocabulary < cuda.copied["to host"] < 2 * vocabulary
    sampled = model.chat("Hello", temperature=1.0, seed=3, **options)
    again = InternVL.load(bundle.folder).chat("Hello", temperature=1.0, seed=3, **options)
    assert len(sampled.output_ids) == len(again.output_ids)
    model.close()
    assert cuda.leaks == {}


def test_without_engines_or_gpu_loading_is_one_line(tmp_path: Path, bundle: Bundle) -> None:
    with pytest.raises(EngineError) as error:
        InternVL.load(bundle.folder, "tensorrt")
    assert "\n" not in str(error.value)


def test_a_form_copies_logits_only_where_the_best_token_is_refused(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("llguidance")
    form = AnswerFormat.regex("[0-9]{4}|[a-z]{4}")
    cuda = FakeCuda()
    model, _ = load(bundle, cuda)
    engine: Any = model.engine
    refused: list[int] = []
    last_logits = engine.last_logits
    monkeypatch.setattr(engine, "last_logits", lambda: (refused.append(1), last_logits())[1])
    before = cuda.copied["to host"]
    reply = model.chat("Hello", max_new_tokens=8, system="", answer_format=form)
    assert len(reply.text) == 4
    assert reply.text.isdigit() or reply.text.isalpha()
    assert reply.finish_reason == "stop"
    rows = (cuda.copied["to host"] - before) // (4 * bundle.manifest.model.decoder.vocab_size)
    # One row after the prompt; the random model wants none of the allowed tokens.
    assert rows == 1 + len(refused)
    assert 1 <= len(refused) < len(reply.output_ids)
    model.close()
    assert cuda.leaks == {}
