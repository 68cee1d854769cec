"""The synthetic pictures: the same everywhere, splits that share nothing, answers that agree with what is drawn."""

from __future__ import annotations

import random
import re

import pytest

from internvl_edge.base.errors import EdgeError
from internvl_edge.calibration.synthetic import SPLITS, TASKS, SyntheticSample, draw_picture, fonts, sample, words

COUNT = 30
HELD_OUT = [("train", "validation"), ("train", "test"), ("validation", "test")]


def stream(split: str, task: str) -> list[SyntheticSample]:
    return [sample(split, i, tasks=[task]) for i in range(COUNT)]


@pytest.mark.parametrize("task", TASKS)
def test_a_sample_is_a_function_of_its_arguments(task: str) -> None:
    first, again = stream("test", task), stream("test", task)
    for a, b in zip(first, again, strict=True):
        assert (a.question, a.answer, a.task) == (b.question, b.answer, task)
        assert a.image.tobytes() == b.image.tobytes()


def test_seed_index_and_split_each_change_the_sample() -> None:
    base = sample("train", 0).image.tobytes()
    for other in (sample("train", 1), sample("train", 0, seed=1), sample("test", 0)):
        assert other.image.tobytes() != base


@pytest.mark.parametrize(("one", "other"), HELD_OUT)
def test_splits_share_no_font_file(one: str, other: str) -> None:
    for table in (fonts.LATIN, fonts.CHINESE):
        assert set(table[one]).isdisjoint(table[other])
    families = [{face.distribution for face in fonts.LATIN[split]} for split in (one, other)]
    assert families[0].isdisjoint(families[1])


@pytest.mark.parametrize(("one", "other"), HELD_OUT)
def test_splits_share_no_listed_word(one: str, other: str) -> None:
    for name in ("items", "places", "names", "items-zh", "places-zh"):
        assert words.pool(name, one)
        assert set(words.pool(name, one)).isdisjoint(words.pool(name, other))


@pytest.mark.parametrize("split", SPLITS)
def test_invented_words_belong_to_the_split_that_asked(split: str) -> None:
    rng = random.Random(0)
    for _ in range(200):
        assert words.split_of(words.invented_word(rng, split, 9)) == split
        assert words.split_of(words.invented_chinese(rng, split, 4)) == split
        assert words.split_of(words.code(rng, split, 6)) == split


@pytest.mark.parametrize("split", SPLITS)
def test_item_names_on_receipts_are_words_of_the_split(split: str) -> None:
    asked = [re.fullmatch(r"How much is the (\w+)\?", s.question) for s in stream(split, "receipt")]
    names = [match[1] for match in asked if match]
    assert len(names) > 5
    assert {words.split_of(name) for name in names} == {split}


def test_every_task_occurs_in_the_stream_and_chinese_is_the_smaller_share() -> None:
    tasks = [sample("test", i).task for i in range(300)]
    assert set(tasks) == set(TASKS)
    assert sum(task.endswith("-zh") for task in tasks) < 100


@pytest.mark.parametrize("task", ["receipt", "receipt-zh"])
def test_the_total_is_the_sum_and_the_dearest_item_has_the_highest_price(task: str) -> None:
    rng = random.Random(1)
    for _ in range(COUNT):
        picture, _ = draw_picture(rng, "train", [task])
        answers = [answer for _, answer in picture.questions]
        prices = [round(float(answer) * 100) for answer in answers[2:]]
        assert round(float(answers[0]) * 100) == sum(prices)
        dearest = picture.questions[2 + prices.index(max(prices))][0]
        assert answers[1] in dearest
        assert prices.count(max(prices)) == 1


def test_the_tallest_and_the_shortest_bar_follow_from_the_values() -> None:
    rng = random.Random(2)
    for _ in range(COUNT):
        picture, _ = draw_picture(rng, "train", ["chart"])
        values = {question[len("What is the value of ") : -1]: int(a) for question, a in picture.questions[:-2]}
        assert picture.questions[-2:] == (
            ("Which bar is the tallest?", max(values, key=values.__getitem__)),
            ("Which bar is the shortest?", min(values, key=values.__getitem__)),
        )
        assert picture.transcript.splitlines() == [f"{name} {value}" for name, value in values.items()]


def test_the_counts_of_a_scene_do_not_exceed_its_shapes() -> None:
    rng = random.Random(3)
    for _ in range(COUNT):
        picture, _ = draw_picture(rng, "train", ["scene"])
        answers = dict(picture.questions)
        total = int(answers["How many shapes are there?"])
        assert 1 <= total <= 6
        assert all(int(a) <= total for q, a in picture.questions if q.startswith("How many"))
        assert len(picture.transcript.splitlines()) == total


def test_neither_yes_nor_no_is_the_usual_answer() -> None:
    answers = [
        s.answer for i in range(1500) if (s := sample("train", i, tasks=["scene"])).question.startswith("Is there")
    ]
    assert 0.35 < answers.count("yes") / len(answers) < 0.65


@pytest.mark.parametrize("task", TASKS)
def test_no_picture_is_so_large_that_tiling_cuts_it_up(task: str) -> None:
    for s in stream("train", task):
        columns, rows = sorted(max(1, round(side / min(s.image.size))) for side in s.image.size)
        assert s.image.width * s.image.height <= 2 * 112 * 112 * columns * rows


def test_questions_can_be_answered_only_by_reading_what_is_drawn() -> None:
    rng = random.Random(4)
    for _ in range(COUNT):
        picture, _ = draw_picture(rng, "train", ["sign", "page", "label", "meter", "sign-zh"])
        text = picture.transcript
        for _, answer in picture.questions:
            assert answer.replace(" ", "") in text.replace("\n", "").replace(" ", "")


def test_an_unknown_split_or_task_is_named() -> None:
    with pytest.raises(EdgeError, match="unknown split 'dev'"):
        sample("dev", 0)
    with pytest.raises(EdgeError, match="poem"):
        sample("test", 0, tasks=["poem"])


def test_a_missing_font_package_says_what_to_install() -> None:
    with pytest.raises(EdgeError, match=r"font package no-such-font.*internvl-edge\[synthetic\]"):
        fonts.font_path(fonts.Face("no-such-font", "no_such_font", "files/A.ttf"))
