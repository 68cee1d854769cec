"""Answers in a given form: a grammar says which tokens can come next.

A compiled form (`Grammars.matcher`) belongs to one answer and follows its tokens. `Constrained` chooses them: where the
most probable token is allowed, it costs a question of a few microseconds and nothing else; only where it is refused, or
where tokens are drawn at random, all allowed tokens are computed. `ForcedTokens` guesses the tokens that a grammar
leaves no choice about, so that one step verifies several.

The grammar engine is llguidance. It reads the bundle's own tokenizer, because the tokens of a text must be those that
the model was trained with.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from internvl_edge.base.errors import EngineError, FormError, PromptError
from internvl_edge.base.extras import requires
from internvl_edge.base.text import one_line

from .answer_format import AnswerFormat
from .lookup import Guesser
from .ranking import adjustable
from .sampling import Sampler

# Whitespace between the parts of JSON: enough for an indented answer, too little to fill one.
_WHITESPACE = r"\n[ ]{0,8}|[ ]{1,8}"
# Compiled grammars that are kept.
_KEPT = 64
# The most tokens of a guess, as many as a step of an engine computes at once.
_MOST_GUESSED = 15


class Grammars:
    """Compiles the forms of answers for one tokenizer, and keeps the latest 64.

    Args:
        tokenizer: the `tokenizer.json` of the bundle. It is read when the first form is compiled: half a second for
            150,000 tokens.
        vocab_size: the number of logits.
        stop_ids: tokens that end an answer.
    """

    def __init__(self, tokenizer: Path, vocab_size: int, stop_ids: Collection[int]) -> None:
        self._path = tokenizer
        self._vocab_size = vocab_size
        self._stop_ids = list(stop_ids)
        self._tokenizer: Any = None
        self._compiled: OrderedDict[AnswerFormat, Any] = OrderedDict()
        self._lock = threading.Lock()

    def matcher(self, form: AnswerFormat) -> Any:
        """Return a new matcher of llguidance for one answer.

        Raises:
            PromptError: the form uses something that is not supported, or nothing satisfies it. The message names it.
            EngineError: llguidance is not installed, or cannot read the tokenizer.
        """
        with self._lock:
            if form not in self._compiled:
                self._compiled[form] = self._compile(form)
            self._compiled.move_to_end(form)
            while len(self._compiled) > _KEPT:
                self._compiled.popitem(last=False)
            return self._compiled[form].deep_copy()

    def _compile(self, form: AnswerFormat) -> Any:
        with requires("structured", "an answer in a given form", EngineError):
            from llguidance import LLMatcher, LLTokenizer
        if self._tokenizer is None:
            try:
                text = self._path.read_text(encoding="utf-8")
                self._tokenizer = LLTokenizer(text, n_vocab=self._vocab_size, eos_token=self._stop_ids)
            except Exception as error:  # llguidance raises ValueError and its own kinds
                raise EngineError(f"llguidance cannot read {self._path}: {one_line(str(error), 200)}") from None
        if form.kind == "regex":
            grammar = LLMatcher.grammar_from_regex(form.text)
        elif form.kind == "choice":
            grammar = LLMatcher.grammar_from_lark("start: " + " | ".join(map(json.dumps, json.loads(form.text))))
        else:
            spaces: Any = {"whitespace_flexible": False} if form.compact else {"whitespace_pattern": _WHITESPACE}
            grammar = LLMatcher.grammar_from_json_schema(form.text, overrides=spaces)
        matcher = LLMatcher(self._tokenizer, grammar, log_level=0)
        refused = matcher.get_error() or _dead_start(matcher.deep_copy())
        if refused:
            raise PromptError(f"{_NAMES[form.kind]} is not supported: {_reason(refused)}; change it or leave it out")
        return matcher


_NAMES = {"json_schema": "this JSON schema", "regex": "this regular expression", "choice": "this list of choices"}


def _dead_start(matcher: Any) -> str:
    """What is wrong where no answer can begin, which a grammar that is too complex shows only now; else ""."""
    begins = any(matcher.compute_bitmask())
    error = str(matcher.get_error())
    if begins and not error:
        return ""
    return "no answer satisfies it" if not error or error.startswith("NoExtension") else error


def _reason(error: str) -> str:
    """What is wrong, from a message of llguidance: its first line and, of a regular expression, the last "error:"."""
    lines = [line.strip() for line in error.splitlines() if line.strip()]
    found = [line for line in lines if line.startswith("error: ")]
    return one_line(" ".join([lines[0], *found[-1:]]).rstrip("."), 260)


class Constrained:
    """Chooses with a sampler among the tokens that a form allows.

    The sampler must be new. With equal logits it takes the token that it would take without the form, where the form
    allows that token and sampling is greedy.
    """

    def __init__(self, sampler: Sampler, matcher: Any, stop_ids: Collection[int]) -> None:
        self._sampler = sampler
        self._matcher = matcher
        self._stop_ids = list(stop_ids)

    @property
    def takes_the_best(self) -> bool:
        """Whether the engine may choose the most probable token, for `take` to allow or to refuse."""
        return self._sampler.takes_the_best

    def choose(self, logits: NDArray[np.float32]) -> int:
        """Return the next token for logits [vocab], and leave the logits unchanged.

        Raises:
            FormError: the form became too complex for llguidance, or no token can continue it.
        """
        if self._sampler.is_greedy and self.take(token := self._sampler.pick(logits)):
            return token
        masked = adjustable(logits)
        np.copyto(masked, -np.inf, where=~self._allowed(len(logits)))
        token = self._sampler.pick(masked)
        self._accept(token)
        return token

    def take(self, token: int) -> bool:
        """Make a token the next one of the answer if the form allows it, and return whether it does."""
        if not self.first_allowed([token]):
            return False
        self._accept(token)
        return True

    def first_allowed(self, tokens: list[int]) -> int:
        """Return how many of these tokens can come next, one after the other."""
        if self._matcher.is_stopped():  # then only the end is left, which llguidance no longer asks for
            return int(bool(tokens) and tokens[0] in self._stop_ids)
        return int(self._matcher.validate_tokens(tokens))

    def forced(self) -> list[int]:
        """Return the tokens that must come next, often none."""
        return [] if self._matcher.is_stopped() else list(self._matcher.compute_ff_tokens())

    def _accept(self, token: int) -> None:
        if not self._matcher.consume_token(token):
            raise self._failure("unknown")
        self._sampler.accept(token)

    def _allowed(self, vocab: int) -> NDArray[np.bool_]:
        """A mask [vocab] of the tokens that can come next."""
        if self._matcher.is_stopped() and not self._matcher.is_error():
            mask = np.zeros(vocab, np.bool_)
            mask[self._stop_ids] = True
        else:
            bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
            mask = np.unpackbits(bits, bitorder="little", count=vocab).view(np.bool_)
        if self._matcher.is_error() or not mask.any():
            raise self._failure("no token of this model continues it")
        return mask

    def _failure(self, otherwise: str) -> FormError:
        reason = _reason(self._matcher.get_error() or otherwise)
        return FormError(f"the form of this answer failed: {reason}; give a simpler one")


class ForcedTokens:
    """Guesses the tokens that a form forces; elsewhere what another guesser guesses, as far as the form allows it."""

    def __init__(self, constrained: Constrained, other: Guesser | None = None) -> None:
        self._constrained = constrained
        self._other = other
        self._forced = False

    def push(self, token: int) -> None:
        """See `Guesser`."""
        if self._other is not None:
            self._other.push(token)

    def guess(self, most: int) -> list[int]:
        """See `Guesser`. All tokens so far must have been chosen by the `Constrained`."""
        forced = self._constrained.forced()[: max(0, min(most, _MOST_GUESSED))]
        self._forced = bool(forced)
        if forced or self._other is None:
            return forced
        guess = self._other.guess(most)
        return guess[: self._constrained.first_allowed(guess)] if guess else []

    def judged(self, guessed: int, right: int) -> None:
        """See `Guesser`. Forced tokens say nothing about the other guesser."""
        if self._other is not None and not self._forced:
            self._other.judged(guessed, right)
