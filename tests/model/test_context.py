"""How long a context may be: what the configuration says, a warning beyond what was trained, a refusal beyond sense."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path

import pytest

from helpers import tiny
from helpers.commands import assert_one_line, internvl_edge
from internvl_edge import InternVL, export_bundle
from internvl_edge.base.errors import ContextWarning, EngineError, PromptError
from internvl_edge.checkpoint.config_reader import read_config
from internvl_edge.demo import CHECKPOINT
from internvl_edge.model.config import DecoderConfig, RopeConfig
from internvl_edge.model.context import checked_context, longest_context, trained_context

PLAIN = read_config(CHECKPOINT).decoder
LINEAR = replace(PLAIN, rope=RopeConfig(1e6, "linear", 2.0))
DYNAMIC = replace(PLAIN, rope=RopeConfig(1e6, "dynamic", 2.0))
SMALL = replace(PLAIN, max_position_embeddings=1024)


@pytest.mark.parametrize(
    ("decoder", "trained", "longest"),
    [(PLAIN, 32768, 131072), (LINEAR, 65536, 262144), (DYNAMIC, 32768, 262144), (SMALL, 1024, 4096)],
    ids=["plain", "linear", "dynamic", "small"],
)
def test_the_bounds_are_those_of_the_configuration(decoder: DecoderConfig, trained: int, longest: int) -> None:
    assert (trained_context(decoder), longest_context(decoder)) == (trained, longest)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert checked_context(decoder, trained) == trained
        assert checked_context(decoder, None) == min(32768, longest)
        assert checked_context(decoder, None, 512) == 512
    with pytest.warns(ContextWarning, match=rf"more than the {trained} that the model was trained on"):
        assert checked_context(decoder, longest) == longest
    for context in (longest + 1, 10**9, 10**30):
        with pytest.raises(EngineError, match=rf"trained on {trained} .*, and at most {longest} are accepted"):
            checked_context(decoder, context)


def test_commands_warn_and_refuse_in_one_line(tmp_path: Path) -> None:
    checkpoint = tiny.write_checkpoint(tmp_path / "checkpoint", max_position_embeddings=512)
    bundle = export_bundle(checkpoint, tmp_path / "bundle")
    for command in (("run", bundle, "x"), ("bench", bundle), ("plan", bundle), ("plan", checkpoint)):
        assert_one_line(internvl_edge(*command, "--context", 10**9), "a context of 1000000000 tokens", "at most 2048")
    warned = internvl_edge("run", bundle, "x", "--context", 600, "--max-new-tokens", 1, "--quiet")
    assert warned.returncode == 0
    assert warned.stderr.count("\n") == 1
    assert warned.stderr.startswith("internvl-edge: warning: a context of 600 tokens is more than the 512")
    with InternVL.load(bundle) as model:
        assert model.engine.cache.capacity == 2048


def test_a_prompt_beyond_what_was_trained_warns_once(tmp_path: Path) -> None:
    checkpoint = tiny.write_checkpoint(tmp_path / "checkpoint", max_position_embeddings=200)
    with InternVL.load(export_bundle(checkpoint, tmp_path / "bundle"), threads=1) as model:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model.chat("Hello", max_new_tokens=1)
        with pytest.warns(ContextWarning, match=r"a prompt of \d+ tokens is longer than the 200") as caught:
            _ = [model.chat("Hello " * 30, max_new_tokens=1) for _ in range(3)]
        assert len(caught) == 1
        with pytest.raises(PromptError, match="exceed the context of 800"):
            model.chat("Hello", max_new_tokens=900)
