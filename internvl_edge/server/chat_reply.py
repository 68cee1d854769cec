"""What is sent back: the objects of a complete answer and of a stream, from the replies of the runtime."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from internvl_edge.runtime.logprobs import Logprob, TokenLogprob
from internvl_edge.runtime.reply import Reply
from internvl_edge.runtime.voting import Vote

DONE = b"data: [DONE]\n\n"
WAITING = b": waiting\n\n"
# What the timings of a reply are called that are passed on, in seconds and tokens/s.
_TIMINGS = ("preprocess_s", "waiting_s", "vision_s", "prefill_s", "decode_s", "first_token_s")
_RATES = ("prefill_tokens_per_s", "decode_tokens_per_s")


@dataclass(frozen=True)
class ReplyWriter:
    """Writes the objects of one request.

    Attributes:
        number: of the request.
        created: seconds since 1970.
        model: the name that is served.
        stop_ids: tokens that end an answer, which have no log probability in it.
    """

    number: str
    created: int
    model: str
    stop_ids: Collection[int]

    def complete(self, replies: Sequence[Reply], preprocess_s: float) -> dict[str, Any]:
        """Return the body of a request that is answered at once."""
        choices = [
            self._choice(index, reply.text, reply.finish_reason, self.logprobs(reply.logprobs))
            for index, reply in enumerate(replies)
        ]
        return self._object("chat.completion", choices) | {
            "usage": usage(replies),
            "timings": timings(replies[0], preprocess_s),
        }

    def vote(self, vote: Vote, preprocess_s: float) -> dict[str, Any]:
        """Return the body for a vote: one choice with the answer, and how the replies voted beside it."""
        choice = self._choice(0, vote.answer, vote_finish(vote), None)
        return self._object("chat.completion", [choice]) | {
            "vote": vote_facts(vote),
            "usage": usage(vote.replies),
            "timings": timings(vote.replies[0], preprocess_s),
        }

    def chunk(
        self,
        index: int,
        delta: Mapping[str, Any],
        finish_reason: str | None = None,
        logprobs: Mapping[str, Any] | None = None,
        **further: Any,
    ) -> bytes:
        """Return one event of a stream."""
        choice = {"index": index, "delta": dict(delta), "logprobs": logprobs, "finish_reason": finish_reason}
        return event(self._object("chat.completion.chunk", [choice]) | further)

    def usage_chunk(self, replies: Sequence[Reply]) -> bytes:
        """Return the event that says what a stream has used."""
        return event(self._object("chat.completion.chunk", []) | {"usage": usage(replies)})

    def logprobs(self, tokens: Sequence[TokenLogprob] | None) -> dict[str, Any] | None:
        """Return log probabilities as the interface has them; None where they were not asked for."""
        if tokens is None:
            return None
        content = [
            _logprob(token) | {"top_logprobs": [_logprob(top) for top in token.top]}
            for token in tokens
            if token.token not in self.stop_ids
        ]
        return {"content": content, "refusal": None}

    def _choice(self, index: int, text: str | None, finish_reason: str, logprobs: Any) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": finish_reason}

    def _object(self, kind: str, choices: list[Any]) -> dict[str, Any]:
        return {"id": self.number, "object": kind, "created": self.created, "model": self.model, "choices": choices}


def event(values: Mapping[str, Any]) -> bytes:
    """Return one event of a stream that holds an object."""
    return f"data: {json.dumps(values, ensure_ascii=False, separators=(',', ':'))}\n\n".encode()


def usage(replies: Sequence[Reply]) -> dict[str, Any]:
    """Return the tokens of a request. Its prompt counts once, however many answers it has."""
    prompt = len(replies[0].prompt_ids)
    answers = sum(len(reply.output_ids) for reply in replies)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": answers,
        "total_tokens": prompt + answers,
        "prompt_tokens_details": {"cached_tokens": cached_tokens(replies)},
    }


def cached_tokens(replies: Sequence[Reply]) -> int:
    """Return how many tokens of the prompt were not computed for this request."""
    return max(0, len(replies[0].prompt_ids) - int(sum(reply.timings["prefill_tokens"] for reply in replies)))


def timings(reply: Reply, preprocess_s: float) -> dict[str, Any]:
    """Return what an answer took: seconds, tokens/s and tiles. `preprocess_s` is from the request to its prompt."""
    found: dict[str, Any] = {name: reply.timings[name] for name in (*_TIMINGS, *_RATES)}
    first_token_s = preprocess_s + sum(found[name] for name in ("waiting_s", "vision_s", "prefill_s"))
    found |= {"preprocess_s": preprocess_s, "first_token_s": round(first_token_s, 4), "tiles": list(reply.tiles)}
    return found


def vote_facts(vote: Vote) -> dict[str, Any]:
    """Return how the replies of a vote voted."""
    return {
        "answer": vote.answer,
        "agreement": vote.agreement,
        "votes": len(vote.replies),
        "counts": dict(vote.counts),
        "stopped_early": vote.stopped_early,
    }


def vote_finish(vote: Vote) -> str:
    """Return why the answer of a vote ended: "length" where no reply came to an answer because none was complete."""
    ended = any(reply.finish_reason == "stop" for reply in vote.replies)
    return "stop" if ended or vote.answer is not None else "length"


def _logprob(found: Logprob) -> dict[str, Any]:
    # JSON has no infinity; a token that cannot come has what OpenAI writes for "very improbable".
    return {"token": found.text, "logprob": max(found.logprob, -9999.0), "bytes": list(found.bytes)}
