"""What a vote is worth: the reader suite answered greedily, by one sample, and by votes of eight samples.

    python benchmarks/votes.py BUNDLE [--questions 200] [--seed 1]

All at temperature 0.6 and top_p 0.95, with one model of eight rows. Writes results/votes.json: exact answers, replies
that were computed, and seconds per question of each way, and whether ending a vote early ever changed its answer (the
same votes are counted to the end).
"""

from __future__ import annotations

import argparse
import itertools
import time
from dataclasses import dataclass, field
from pathlib import Path

from record import write_results

from internvl_edge import InternVL
from internvl_edge.evaluation.cases import SUITES, Case
from internvl_edge.runtime.voting import SAMPLING, Ballot, find_answer, normalized

VOTES = 8


@dataclass
class Way:
    """What one way of answering gave so far."""

    right: int = 0
    replies: int = 0
    seconds: float = 0.0
    stopped_early: int = 0
    agreements: list[tuple[float, bool]] = field(default_factory=list)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    asked = parser.parse_args()
    ways = {name: Way() for name in ("greedy", "one sample", "8 votes", "8 votes, sure 0.95")}
    changed = 0
    with InternVL.load(asked.bundle, engine="onnxruntime", rows=VOTES, threads=asked.threads) as model:
        for number, case in enumerate(itertools.islice(SUITES["reader"](asked.seed), asked.questions)):
            seed = 1000 * number
            _chat(model, case, ways["greedy"], {})
            _chat(model, case, ways["one sample"], SAMPLING | {"seed": seed})
            answer = _vote(model, case, ways["8 votes"], seed, None)
            _vote(model, case, ways["8 votes, sure 0.95"], seed, 0.95)
            changed += answer != _to_the_end(model, case, seed)
    rows = {
        name: {
            "exact_match": round(way.right / asked.questions, 4),
            "replies_per_question": round(way.replies / asked.questions, 3),
            "seconds_per_question": round(way.seconds / asked.questions, 4),
            "stopped_early": way.stopped_early,
            **_agreement(way),
        }
        for name, way in ways.items()
    }
    settings = {"bundle": asked.bundle.name, "questions": asked.questions, "seed": asked.seed, "threads": asked.threads}
    print(write_results("votes", settings | {"ways": rows, "answers_changed_by_ending_early": changed}))


def _chat(model: InternVL, case: Case, way: Way, options: dict[str, float]) -> None:
    started = time.perf_counter()
    reply = model.chat(case.question, list(case.images), **options)  # type: ignore[arg-type]
    way.seconds += time.perf_counter() - started
    way.replies += 1
    way.right += reply.text == case.answer.strip()


def _vote(model: InternVL, case: Case, way: Way, seed: int, sure: float | None) -> str | None:
    started = time.perf_counter()
    vote = model.vote(case.question, list(case.images), VOTES, sure=sure, seed=seed)
    way.seconds += time.perf_counter() - started
    way.replies += len(vote.replies)
    way.stopped_early += vote.stopped_early
    right = vote.answer == case.answer.strip()
    way.right += right
    way.agreements.append((vote.agreement, right))
    return None if vote.answer is None else normalized(vote.answer)


def _to_the_end(model: InternVL, case: Case, seed: int) -> str | None:
    """Return the answer of the same votes when all are counted."""
    ballot = Ballot(VOTES)
    options = SAMPLING | {"seed": seed, "logprobs": True}
    for stream in model.sample_streams(case.question, list(case.images), VOTES, first_greedy=True, **options):
        ballot.add(stream.reply, find_answer(stream.reply, reason=False))
    answer = ballot.outcome().answer
    return None if answer is None else normalized(answer)


def _agreement(way: Way) -> dict[str, float]:
    """The mean agreement of votes whose answer is right, and of those whose answer is wrong."""
    means = {}
    for name, wanted in (("agreement_when_right", True), ("agreement_when_wrong", False)):
        found = [agreement for agreement, right in way.agreements if right == wanted]
        if found:
            means[name] = round(sum(found) / len(found), 3)
    return means


if __name__ == "__main__":
    main()
