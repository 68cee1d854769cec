"""Majority votes: several sampled answers to one question, and the answer that most of them give.

Method: self-consistency (Wang et al., 2022), with the early end of Adaptive-Consistency (Aggarwal et al., 2023). The
instruction to reason, and where the answer stands in what follows it, are those of InternVL's own evaluation
(`internvl_chat/eval`, `--cot`). What holds no answer abstains; it is never guessed.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from internvl_edge.base.errors import PromptError
from internvl_edge.model.prompt import Text

from .answer_format import AnswerFormat
from .options import whole_number
from .reply import Reply, ReplyStream
from .request import Images

if TYPE_CHECKING:
    from .model import InternVL

MOST_VOTES = 64
# How votes are sampled, unless the caller says otherwise: as in VLMEvalKit's best of N.
SAMPLING = {"temperature": 0.6, "top_p": 0.95}
_REASONING = (
    "Your task is to answer the question below. Give step by step reasoning before you answer, and when you're ready "
    'to answer, please use the format "Final answer: .."\n\nQuestion:\n\n'
)
_CONCLUSION = "\nFinal answer: "
_MARKS = (
    re.compile(r"\\boxed\{(.*)\}"),
    re.compile(r"final answer\W{0,4}:\s*(.*)", re.IGNORECASE),
    re.compile(r"answer\W{0,4}:\s*(.*)", re.IGNORECASE),
)
_NUMBER = re.compile(r"(-|\+)?[$€£¥]?\s?(\d{1,3}(?:,\d{3})+|\d+)(\.\d+)?")
_QUOTES = "\"'`“”‘’«»*"
_YES_NO = {"yes": "yes", "yeah": "yes", "yep": "yes", "no": "no", "nope": "no"}


@dataclass(frozen=True)
class Vote:
    """The outcome of a vote.

    Attributes:
        answer: the answer with the most votes, as the first reply that gave it wrote it; None if every reply abstained.
        agreement: the share of the replies that gave this answer, abstentions included. It is a count, and not the
            probability that the answer is right.
        counts: votes of each answer, by its first spelling, the most votes first. The rest of the replies abstained.
        replies: the replies that were counted, in the order of their seeds. The first one is greedy.
        stopped_early: whether fewer replies were counted than asked for, because the outcome was certain.
    """

    answer: str | None
    agreement: float
    counts: Mapping[str, int]
    replies: Sequence[Reply]
    stopped_early: bool


def vote(
    model: InternVL,
    question: Text,
    images: Images,
    votes: int,
    reason: bool,
    choices: Sequence[str] | None,
    sure: float | None,
    options: Mapping[str, Any],
) -> Vote:
    """See `InternVL.vote`."""
    steps = vote_steps(model, question, images, votes, reason, choices, sure, options)
    try:
        while True:
            _ = next(steps).reply  # waits
    except StopIteration as end:
        outcome: Vote = end.value
        return outcome
    finally:
        steps.close()


def vote_steps(
    model: InternVL,
    question: Text,
    images: Images,
    votes: int,
    reason: bool,
    choices: Sequence[str] | None,
    sure: float | None,
    options: Mapping[str, Any],
    begin: Callable[[ReplyStream], None] = ReplyStream.begin,
) -> Generator[ReplyStream, None, Vote]:
    """Vote as `InternVL.vote` does, for callers that must not wait, such as an event loop.

    Each stream that is yielded must be finished before the next `next`. The result is the vote. Closing the generator
    ends all answers under way.

    Args:
        model, question, images, votes, reason, choices, sure, options: see `InternVL.vote`.
        begin: begins the computation of an answer.
    """
    if not 1 <= whole_number("votes", votes) <= MOST_VOTES:
        raise PromptError(f"votes is {votes}, expected 1 to {MOST_VOTES}")
    if sure is not None and not 0.5 < sure <= 1:
        raise PromptError(f"sure is {sure}, expected above 0.5 and at most 1")
    choices = checked_choices(choices)
    asked = reasoning_question(question) if reason else question
    settings = SAMPLING | dict(options) | {"logprobs": True}
    final: dict[str, Any] = {}
    if choices is not None:
        final = dict(options) | {"temperature": 0.0, "answer_format": AnswerFormat.choice(choices)}
    if not reason:
        settings |= final and {"answer_format": final["answer_format"]}
    streams = model.sample_streams(asked, images, votes, first_greedy=True, **settings)
    ballot = Ballot(votes, sure)
    try:
        for stream in streams:
            begin(stream)
        for stream in list(streams):
            yield stream
            answer = find_answer(stream.reply, reason, choices)
            if answer is None and choices is not None:  # only after reasoning, which may have ended without a choice
                final["answer_start"] = stream.reply.text + _CONCLUSION
                concluding = model.sample_streams(asked, images, 1, **final)[0]
                streams.append(concluding)
                begin(concluding)
                yield concluding
                answer = concluding.reply.text
            ballot.add(stream.reply, answer)
            if ballot.is_decided:
                break
    finally:
        for stream in streams:
            stream.close()
    return ballot.outcome()


def reasoning_question(question: Text) -> Text:
    """Return a question that asks for reasoning before the answer."""
    return _REASONING + question if isinstance(question, str) else [_REASONING, *question]


def checked_choices(choices: Sequence[str] | None) -> tuple[str, ...] | None:
    """Return choices as a tuple.

    Raises:
        PromptError: they are not at least two different texts.
    """
    if choices is None:
        return None
    if isinstance(choices, str) or not all(isinstance(choice, str) and choice.strip() for choice in choices):
        raise PromptError("choices holds something that is no text; give a list of two or more texts")
    if len({normalized(choice) for choice in choices}) < max(2, len(choices)):
        raise PromptError(f"choices has {len(choices)} texts, expected two or more that differ")
    return tuple(choices)


def find_answer(reply: Reply, reason: bool, choices: Sequence[str] | None = None) -> str | None:
    """Return the answer in a reply, or None where it has none.

    Thinking is left out. After reasoning the answer is in the last `\\boxed{}`, or behind the last "Final answer:" or
    "Answer:". A reply of one line without any of them is its own answer. With `choices` the answer is the choice that
    the text names.
    """
    text: str | None = reply.answer
    if reason:
        marked = (found[-1] for mark in _MARKS if (found := mark.findall(reply.answer)))
        is_short = reply.finish_reason == "stop" and "\n" not in reply.answer
        text = next(marked, reply.answer if is_short else None)
    if text is None or not normalized(text):
        return None
    return text.strip() if choices is None else _chosen(text, choices)


def _chosen(text: str, choices: Sequence[str]) -> str | None:
    """Return the choice that a text is, or the only one that it names."""
    for choice in choices:
        if normalized(text) == normalized(choice):
            return choice
    named = [choice for choice in choices if re.search(rf"(?<!\w){re.escape(choice)}(?!\w)", text)]
    return named[0] if len(named) == 1 else None


def normalized(answer: str) -> str:
    """Return the form in which answers are compared: without case, quotes, end stop and thousands separators.

    Numbers are equal if their values are ("19.50" and "19.5"). Units stay.
    """
    text = " ".join(unicodedata.normalize("NFKC", answer).casefold().split())
    text = text.strip(_QUOTES + " ").rstrip(".!?。 ").strip(_QUOTES + " ")
    word = re.match(r"\w+", text)
    if word and word[0] in _YES_NO and re.match(r"\W*$|\s*[,;.:!]", text[word.end() :]):
        return _YES_NO[word[0]]
    has_one_number = len(_NUMBER.findall(text)) == 1
    return _NUMBER.sub(_value, text) if has_one_number else text


def _value(number: re.Match[str]) -> str:
    value = Decimal(number[2].replace(",", "") + (number[3] or ""))
    sign = "-" if number[1] == "-" and value else ""
    return sign + f"{value.normalize():f}"


@dataclass
class Ballot:
    """The votes so far, of `votes` that may be cast.

    `sure` ends the vote as soon as the leader is the majority's answer with this probability, from the votes of the two
    best answers alone; None ends it when nothing can change the outcome.
    """

    votes: int
    sure: float | None = None
    replies: list[Reply] = field(default_factory=list)
    _spellings: dict[str, str] = field(default_factory=dict)
    _scores: dict[str, list[float]] = field(default_factory=dict)

    def add(self, reply: Reply, answer: str | None) -> None:
        """Count a reply's answer; None abstains."""
        self.replies.append(reply)
        if answer is not None:
            key = normalized(answer)
            self._spellings.setdefault(key, answer)
            self._scores.setdefault(key, []).append(_mean_logprob(reply))

    @property
    def is_decided(self) -> bool:
        """Whether the remaining votes cannot change the outcome, or as good as."""
        first, second = [*sorted(map(len, self._scores.values()), reverse=True), 0, 0][:2]
        if first > second + self.votes - len(self.replies):
            return True
        return self.sure is not None and first > second and _leads(first, second) >= self.sure

    def outcome(self) -> Vote:
        """Return the outcome. Of answers with equal votes, the one with the higher mean log probability wins."""
        ranked = sorted(self._scores.items(), key=lambda item: (-len(item[1]), -sum(item[1]) / len(item[1])))
        counts = {self._spellings[key]: len(scores) for key, scores in ranked}
        answer = next(iter(counts), None)
        agreement = counts[answer] / len(self.replies) if answer is not None else 0.0
        return Vote(answer, agreement, counts, tuple(self.replies), len(self.replies) < self.votes)


def _leads(first: int, second: int) -> float:
    """Return P(p > 1/2) for p ~ Beta(first + 1, second + 1), as a sum of binomial terms."""
    trials = first + second + 1
    return float(sum(math.comb(trials, k) for k in range(first + 1)) / 2**trials)


def _mean_logprob(reply: Reply) -> float:
    logprobs = [token.logprob for token in reply.logprobs or ()]
    return sum(logprobs) / len(logprobs) if logprobs else 0.0
