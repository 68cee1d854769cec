"""How many tokens a model can hold together, from its configuration: what it was trained on, and where we refuse.

`max_position_embeddings` (M) is what the published checkpoints were trained on. Linear scaling by a factor f is trained
too, to M x f. Dynamic NTK is not: it changes the rotary base beyond M, so that longer prompts degrade slowly and not at
once (https://arxiv.org/abs/2309.00071). Without scaling, positions beyond M are unknown to the model. The original code
computes both without a limit. Here `BEYOND` times M x f is the limit (f is 1 without scaling): what is asked for beyond
that is a mistake, and a KV cache of any size must not be allocated for it.
"""

from __future__ import annotations

import warnings

from internvl_edge.base.errors import ContextWarning, EngineError

from .config import DecoderConfig

BEYOND = 4
# Tokens of prompt and answer where nobody says otherwise. Pages of the KV cache that are not touched use no memory.
DEFAULT_CONTEXT = 32768


def trained_context(decoder: DecoderConfig) -> int:
    """Return the tokens that the model was trained on."""
    factor = decoder.rope.factor if decoder.rope.scaling == "linear" else 1.0
    return int(decoder.max_position_embeddings * factor)


def longest_context(decoder: DecoderConfig) -> int:
    """Return the most tokens that a context may have."""
    return int(BEYOND * decoder.max_position_embeddings * max(1.0, decoder.rope.factor))


def checked_context(decoder: DecoderConfig, context: int | None, default: int = DEFAULT_CONTEXT) -> int:
    """Return the capacity of a KV cache: the context that is asked for, or the default as far as the model has it.

    Raises:
        EngineError: no room for anything, or more than `longest_context`.

    Warns:
        ContextWarning: more is asked for than the model was trained on.
    """
    trained, most = trained_context(decoder), longest_context(decoder)
    if context is None:
        return min(default, most)
    if context < 2:
        raise EngineError(f"a context of {context} tokens has no room for a question and an answer; give more")
    if context > most:
        raise EngineError(
            f"a context of {context} tokens is more than this model can use: it was trained on {trained} "
            f"(max_position_embeddings), and at most {most} are accepted"
        )
    if context > trained:
        warnings.warn(
            f"a context of {context} tokens is more than the {trained} that the model was trained on "
            "(max_position_embeddings); answers to prompts beyond that can be wrong",
            ContextWarning,
            stacklevel=3,
        )
    return context
