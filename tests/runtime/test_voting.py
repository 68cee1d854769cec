"""Votes: what counts as the same answer, where an answer stands, and when the outcome is certain."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from internvl_edge import InternVL, export_bundle
from internvl_edge.base.errors import PromptError
from internvl_edge.demo import CHECKPOINT, demo_questions
from internvl_edge.runtime.logprobs import TokenLogprob
from internvl_edge.runtime.reply import Reply
from internvl_edge.runtime.voting import Ballot, checked_choices, find_answer, normalized


def reply(text: str, logprob: float = -1.0, finish_reason: str = "stop") -> Reply:
    return Reply(text, [1], [1], 0, [], finish_reason, {}, [TokenLogprob(1, text, text.encode(), logprob, ())])


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("19.50", "19.5"),
        ("$1,234.00", "1234"),
        ("007", "7"),
        ("-0", "0"),
        ("Yes.", "yes"),
        ("Yes, it is", "YES"),
        ("No!", "nope"),
        ('"Müller"', "müller."),
        ("12 kg", "12.0 KG"),
        ("ＡＢＣ", "abc"),
        ("50 %", "50.0 %"),
        ("“quoted”", "quoted"),
        ("**42**", "42"),
    ],
)
def test_spellings_of_one_answer_are_one_answer(one: str, other: str) -> None:
    assert normalized(one) == normalized(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("19.50", "19.05"),
        ("12 kg", "12 g"),
        ("1.234", "1234"),
        ("yes", "no"),
        ("none", "no"),
        ("Yesterday", "yes"),
        ("-5", "5"),
        ("2024-01-05", "2024-1-5"),
        ("10:30", "10:3"),
        ("3.10 and 3.1", "3.1 and 3.10"),
    ],
)
def test_different_answers_stay_different(one: str, other: str) -> None:
    assert normalized(one) != normalized(other)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("The sum is 3.\n\nFinal answer: 19.50", "19.50"),
        ("**Final Answer:** 7", "7"),
        ("Answer: 1\nNo, wait.\nAnswer: 2", "2"),
        ("Final answer: 1\nAnswer: 2", "1"),
        (r"So it is \boxed{42}.", "42"),
        ("19.50", "19.50"),
        ("First I read the sign.\nThen I gave up.", None),
        ("Final answer: ", None),
    ],
)
def test_the_answer_after_reasoning(text: str, answer: str | None) -> None:
    found = find_answer(reply(text), reason=True)
    assert found is None if answer is None else found is not None and found.strip("* ") == answer


def test_a_reply_that_was_cut_off_abstains() -> None:
    assert find_answer(reply("I see a long", finish_reason="length"), reason=True) is None
    assert find_answer(reply("I see a long", finish_reason="length"), reason=False) == "I see a long"


@pytest.mark.parametrize(
    ("text", "chosen"), [("B", "B"), ("(B)", "B"), ("b.", "B"), ("B. a cat", "B"), ("A or B", None), ("D", None)]
)
def test_a_choice_is_the_only_one_named(text: str, chosen: str | None) -> None:
    assert find_answer(reply(text), reason=False, choices=("A", "B", "C")) == chosen


@pytest.mark.parametrize("choices", ["AB", ["A"], ["A", "a"], ["A", ""], [], ["A", 1]])
def test_choices_that_are_none_are_refused(choices: object) -> None:
    with pytest.raises(PromptError, match="choices"):
        checked_choices(choices)  # type: ignore[arg-type]


@given(st.lists(st.sampled_from(["1", "2", "3", None]), min_size=1, max_size=16), st.lists(st.floats(-9, 0)))
def test_ending_early_never_changes_the_winner(answers: list[str | None], logprobs: list[float]) -> None:
    scores = [*logprobs, *[-1.0] * 16][: len(answers)]
    early, whole = Ballot(len(answers)), Ballot(len(answers))
    for answer, score in zip(answers, scores, strict=True):
        whole.add(reply("", score), answer)
        if not early.is_decided:
            early.add(reply("", score), answer)
    assert early.outcome().answer == whole.outcome().answer
    assert early.outcome().stopped_early == (len(early.replies) < len(answers))


def test_ties_go_to_the_more_probable_answer_and_abstentions_count() -> None:
    ballot = Ballot(5)
    for answer, score in (("7", -2.0), ("8", -0.5), (None, 0.0), ("7.0", -2.0), ("8", -0.7)):
        ballot.add(reply("", score), answer)
    outcome = ballot.outcome()
    assert outcome.answer == "8"
    assert outcome.counts == {"8": 2, "7": 2}
    assert outcome.agreement == 2 / 5


def test_being_sure_needs_fewer_votes() -> None:
    """P(p > 1/2) after 4:0 is 1 - 2^-5 = 0.969, after 3:0 it is 0.9375."""
    ballot = Ballot(16, sure=0.95)
    for count in range(1, 5):
        assert not ballot.is_decided, count
        ballot.add(reply(""), "yes")
    assert ballot.is_decided
    assert not Ballot(16, sure=0.5001).is_decided


def test_nobody_answers() -> None:
    ballot = Ballot(2)
    ballot.add(reply("x"), None)
    assert ballot.outcome().answer is None
    assert ballot.outcome().agreement == 0


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_bundle(CHECKPOINT, tmp_path_factory.mktemp("votes") / "bundle")


@pytest.fixture(scope="module")
def model(bundle: Path) -> Iterator[InternVL]:
    with InternVL.load(bundle, engine="onnxruntime", rows=4, threads=1) as loaded:
        yield loaded


def test_votes_are_samples_of_one_prompt(model: InternVL) -> None:
    asked = demo_questions()[0]
    outcome = model.vote(asked.question, [asked.image], 8, seed=1)
    assert outcome.answer == asked.expected
    assert outcome.stopped_early
    assert outcome.replies[0].output_ids == model.chat(asked.question, [asked.image]).output_ids
    assert [reply.timings["prefill_tokens"] > 0 for reply in outcome.replies[1:]].count(True) == 0
    again = model.vote(asked.question, [asked.image], 8, seed=1)
    assert [reply.output_ids for reply in again.replies] == [reply.output_ids for reply in outcome.replies]


def test_samples_are_the_answers_of_their_seeds(model: InternVL) -> None:
    asked = demo_questions()[1]
    options = {"temperature": 3.0, "max_new_tokens": 12}
    samples = model.samples(asked.question, [asked.image], 6, seed=20, **options)  # type: ignore[arg-type]
    alone = [model.chat(asked.question, [asked.image], seed=20 + k, **options) for k in range(6)]  # type: ignore[arg-type]
    assert [each.output_ids for each in samples] == [each.output_ids for each in alone]
    assert len({tuple(each.output_ids) for each in samples}) > 1


def test_one_row_gives_the_samples_one_after_the_other(bundle: Path) -> None:
    asked = demo_questions()[1]
    with InternVL.load(bundle, engine="onnxruntime", threads=1) as single:
        samples = single.samples(asked.question, [asked.image], 3, temperature=3.0, seed=5, max_new_tokens=8)
        assert [each.timings["prefill_tokens"] > 0 for each in samples] == [True, False, False]
        alone = single.chat(asked.question, [asked.image], temperature=3.0, seed=7, max_new_tokens=8)
        assert samples[2].output_ids == alone.output_ids


def test_an_abandoned_vote_frees_the_model(model: InternVL) -> None:
    streams = model.sample_streams("Tell me everything", count=8, max_new_tokens=20_000, temperature=1.0)
    for stream in streams:
        stream.begin()
    del streams, stream
    asked = demo_questions()[2]
    assert model.chat(asked.question, [asked.image]).text == asked.expected


def test_what_is_no_vote_is_refused(model: InternVL) -> None:
    for use, message in (
        (lambda: model.vote("x", votes=0), "votes is 0, expected 1 to 64"),
        (lambda: model.vote("x", sure=0.4), r"sure is 0.4, expected above 0.5"),
        (lambda: model.samples("x", count=65), "count is 65, expected 1 to 64"),
    ):
        with pytest.raises(PromptError, match=message):
            use()


def test_choices_after_reasoning_are_chosen_where_the_reasoning_names_none(model: InternVL) -> None:
    """The demo model never learned to reason: whatever it writes, one of the choices comes out."""
    pytest.importorskip("llguidance")
    asked = demo_questions()[0]
    outcome = model.vote(asked.question, [asked.image], 2, reason=True, choices=["19.50", "7.20"], max_new_tokens=8)
    assert outcome.answer in ("19.50", "7.20")
    assert sum(outcome.counts.values()) == len(outcome.replies)
    plain = model.vote(asked.question, [asked.image], 3, choices=["19.50", "7.20"])
    assert plain.answer == asked.expected
    assert {reply.text for reply in plain.replies} <= {"19.50", "7.20"}


def test_an_answer_goes_on_from_its_start(model: InternVL) -> None:
    asked = demo_questions()[0]
    whole = model.chat(asked.question, [asked.image])
    rest = model.chat(asked.question, [asked.image], answer_start=whole.text[:2])
    assert whole.text[:2] + rest.text == whole.text
