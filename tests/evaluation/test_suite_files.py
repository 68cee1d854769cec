"""Files of questions: own ones and the public formats, and each mistake in one as one line that names the entry."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from helpers.parsers import SuiteData, outcomes
from internvl_edge import EdgeError
from internvl_edge.evaluation import read_suite
from internvl_edge.evaluation.suite_files import FORMATS, read_suite_file

SHORT = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."


def _picture(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8)).save(path)
    return path


def _write(path: Path, entries: Any) -> Path:
    text = "\n".join(map(json.dumps, entries)) if path.suffix == ".jsonl" else json.dumps(entries)
    path.write_text(text, encoding="utf-8")
    return path


# Entries as the data sets' own files have them (documents of each are named in `FORMATS`).
DOCVQA = {
    "dataset_name": "docvqa",
    "dataset_split": "val",
    "dataset_version": "1.0",
    "data": [
        {
            "questionId": 49153,
            "question": "What is the actual value per 1000?",
            "question_types": ["figure/diagram", "form"],
            "image": "documents/pybv0228_81.png",
            "docId": 14465,
            "ucsf_document_id": "pybv0228",
            "ucsf_document_page_no": "81",
            "answers": ["0.28", "0.28 "],
            "data_split": "val",
        }
    ],
}
CHARTQA = [
    {"imgname": "3887.png", "query": "What's the color of the graph with the highest value?", "label": "Blue"},
    {"imgname": "3887.png", "query": "What is the max value?", "label": "0.72"},
]
OCRBENCH = [
    {
        "dataset_name": "IIIT5K",
        "id": 2843,
        "image_path": "IIIT5K/test/918_1.png",
        "question": "what is written in the image?",
        "answers": "CENTRE",
        "type": "Regular Text Recognition",
    },
    {
        "dataset_name": "HME100k",
        "id": 2843,
        "image_path": "HME100k/1.jpg",
        "question": "Please write out the expression of the formula in the image using LaTeX format.",
        "answers": ["x ^ { 2 }"],
        "type": "Handwritten Mathematical Expression Recognition",
    },
]
MMMU = [
    {
        "id": "validation_Art_Theory_1",
        "question": "<image 2> Which of these is like <image 1>?",
        "options": "['<image 3>', 'it\\'s none', 'Ionic']",
        "explanation": "",
        **{f"image_{number}": f"art/{number}.png" if number < 4 else None for number in range(1, 8)},
        "answer": "B",
        "question_type": "multiple-choice",
    },
    {
        "id": "validation_Math_22",
        "question": "How many edges?",
        "options": [],
        "image_1": "math/22.png",
        "answer": ["12", "twelve"],
        "question_type": "open",
    },
]


def test_docvqa_is_read_as_its_authors_write_it(tmp_path: Path) -> None:
    picture = _picture(tmp_path / "documents" / "pybv0228_81.png")
    (case,), metric = read_suite_file(_write(tmp_path / "val_v1.0.json", DOCVQA))
    assert (case.name, case.question) == ("49153", f"What is the actual value per 1000? {SHORT}")
    assert (case.images, case.answers, case.tags) == ((picture,), ("0.28", "0.28 "), ("figure/diagram", "form"))
    assert metric == "anls"


def test_infographicvqa_has_other_fields(tmp_path: Path) -> None:
    picture = _picture(tmp_path / "35984.jpeg")
    entry = {
        "questionId": 98313,
        "question": "Which one?",
        "image_local_name": "35984.jpeg",
        "answers": ["x"],
        "answer_type": ["single span"],
    }
    (case,), metric = read_suite_file(_write(tmp_path / "info.json", {"data": [entry]}))
    assert (case.images, case.tags, metric) == ((picture,), ("single span",), "anls")


@pytest.mark.parametrize("folder", ["spdocvqa_images", "qas/spdocvqa_images", "qas/documents", "elsewhere"])
def test_docvqa_is_found_in_every_layout_of_its_downloads(tmp_path: Path, folder: str) -> None:
    """Today's images have no folder "documents", as the entries say; the questions have a folder of their own."""
    picture = _picture(tmp_path / folder / "pybv0228_81.png")
    (tmp_path / "qas").mkdir(exist_ok=True)
    data = _write(tmp_path / "qas" / "val_v1.0_withQT.json", DOCVQA)
    if folder == "elsewhere":
        with pytest.raises(EdgeError, match=r"documents/pybv0228_81.png for one; give their folder with --images"):
            read_suite_file(data)
    (case,), _ = read_suite_file(data, picture.parent if folder == "elsewhere" else None)
    assert [image.resolve() for image in case.images if isinstance(image, Path)] == [picture]


@pytest.mark.parametrize("folder", ["infographicsvqa_images", "qas/infographicsvqa_images"])
def test_infographicvqa_is_found_in_every_layout_of_its_downloads(tmp_path: Path, folder: str) -> None:
    picture = _picture(tmp_path / folder / "35984.jpeg")
    (tmp_path / "qas").mkdir(exist_ok=True)
    entry = {"questionId": 98313, "question": "Which one?", "image_local_name": "35984.jpeg", "answers": ["x"]}
    (case,), _ = read_suite_file(_write(tmp_path / "qas" / "val.json", {"data": [entry]}))
    assert [image.resolve() for image in case.images if isinstance(image, Path)] == [picture]


@pytest.mark.parametrize("folder", ["png", "."])
def test_chartqa_has_its_images_in_a_folder_beside_it(tmp_path: Path, folder: str) -> None:
    picture = _picture(tmp_path / folder / "3887.png")
    cases, metric = read_suite_file(_write(tmp_path / "test_human.json", CHARTQA))
    assert [case.name for case in cases] == ["test_human.json:1", "test_human.json:2"]
    assert [case.answers for case in cases] == [("Blue",), ("0.72",)]
    assert {case.images for case in cases} == {(picture,)}
    assert cases[1].question == f"What is the max value? {SHORT}"
    assert metric == "relaxed_accuracy"


INTERNVL = [
    {"image": "data/docvqa/val/1.png", "question": "what is the date?", "question_id": 7, "answer": ["May 2", "2 May"]},
    {
        "image": "data/docvqa/val/1.png",
        "question": "Which one?\nA. a\nB. b\nAnswer with the option's letter from the given choices directly.",
        "question_id": 7,
        "answer": "B",
    },
]


def test_files_of_internvls_own_evaluation_have_images_below_the_folder_of_their_data(tmp_path: Path) -> None:
    picture = _picture(tmp_path / "data/docvqa/val/1.png")
    cases, metric = read_suite_file(_write(tmp_path / "data/docvqa/val.jsonl", INTERNVL))
    assert [case.name for case in cases] == ["val.jsonl:1", "val.jsonl:2"]
    assert [case.answers for case in cases] == [("May 2", "2 May"), ("B",)]
    assert [case.question for case in cases] == [f"what is the date? {SHORT}", INTERNVL[1]["question"]]
    assert {image.resolve() for case in cases for image in case.images} == {picture}
    assert metric == "normalized_match"
    secret = [{key: value for key, value in entry.items() if key != "answer"} for entry in INTERNVL]
    with pytest.raises(EdgeError, match=r"test.jsonl:1: there is no answer; those of a test split are not public"):
        read_suite_file(_write(tmp_path / "data/docvqa/test.jsonl", secret))


@pytest.mark.parametrize("folder", ["", "OCRBench"])
def test_ocrbench_names_are_unique_with_their_data_set_and_formulas_are_known(tmp_path: Path, folder: str) -> None:
    """The authors have the file in a folder beside that of the images."""
    (tmp_path / folder).mkdir(exist_ok=True)
    for entry in OCRBENCH:
        _picture(tmp_path / "OCRBench_Images" / str(entry["image_path"]))
    cases, metric = read_suite_file(_write(tmp_path / folder / "OCRBench.json", OCRBENCH))
    assert [case.name for case in cases] == ["IIIT5K 2843", "HME100k 2843"]
    assert [case.answers for case in cases] == [("CENTRE",), ("x ^ { 2 }",)]
    assert [case.is_formula for case in cases] == [False, True]
    assert cases[0].question == "what is written in the image?"
    assert cases[0].tags == ("Regular Text Recognition",)
    assert metric == "contains"


@pytest.mark.parametrize("name", ["mmmu.json", "mmmu.jsonl"])
def test_mmmu_places_images_where_its_marks_are(tmp_path: Path, name: str) -> None:
    pictures = {number: _picture(tmp_path / f"art/{number}.png") for number in (1, 2, 3)}
    edges = _picture(tmp_path / "math/22.png")
    cases, metric = read_suite_file(_write(tmp_path / name, MMMU))
    assert cases[0].question == (
        f"<image> Which of these is like <image>?\nA. <image>\nB. it's none\nC. Ionic\n{LETTER}"
    )
    assert cases[0].images == (pictures[2], pictures[1], pictures[3])
    assert (cases[0].choices, cases[0].answer) == (("<image 3>", "it's none", "Ionic"), "B")
    assert cases[0].tags == ("Art_Theory", "choices")
    assert (cases[1].question, cases[1].images) == (f"How many edges?\n{SHORT}", (edges,))
    assert (cases[1].answers, cases[1].choices, cases[1].tags) == (("12", "twelve"), (), ("Math", "open"))
    assert metric == "choice_accuracy"


def test_mmmu_has_several_right_answers_as_python_text_and_spaces_that_do_not_count(tmp_path: Path) -> None:
    """As the published records have them; the original evaluation strips questions and options."""
    entries = [
        {"id": "validation_Math_15", "question": " What? ", "options": "[]", "answer": "['24/7', '3.429']"},
        {"id": "validation_Math_16", "question": "What?", "options": "[]", "answer": "[1, 2)"},
        {"id": "validation_Math_17", "question": "What?", "options": "[' a ', 'b']", "answer": "B"},
    ]
    cases, _ = read_suite_file(_write(tmp_path / "mmmu.jsonl", entries))
    assert [case.answers for case in cases] == [("24/7", "3.429"), ("[1, 2)",), ("B",)]
    assert cases[0].question == f"What?\n{SHORT}"
    assert (cases[2].question, cases[2].choices) == (f"What?\nA. a\nB. b\n{LETTER}", ("a", "b"))


def test_own_questions_have_ids_answers_choices_and_tags(tmp_path: Path) -> None:
    picture = _picture(tmp_path / "a.png")
    entries = [
        {"id": 7, "images": ["a.png"], "prompt": "Total?", "answer": ["12", "12.00"], "tags": "receipts"},
        {"prompt": "Which?", "answer": "red", "choices": ["red", "blue"], "tags": ["x", "y"]},
        {"messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}], "tags": ["z"]},
        {"id": "c", "conversations": [{"from": "human", "value": "Who?"}], "answer": "me"},
    ]
    cases, metric = read_suite_file(_write(tmp_path / "own.jsonl", entries))
    assert [case.name for case in cases] == ["7", "own.jsonl:2", "own.jsonl:3", "c"]
    assert [case.answers for case in cases] == [("12", "12.00"), ("red",), ("So.",), ("me",)]
    assert [case.question for case in cases] == ["Total?", "Which?", "Why?", "Who?"]
    assert [case.tags for case in cases] == [("receipts",), ("x", "y"), ("z",), ()]
    assert cases[0].images == (picture,)
    assert (cases[1].choices, metric) == (("red", "blue"), "exact_match")
    _write(tmp_path / "own.jsonl", [entries[1]])
    assert read_suite_file(tmp_path / "own.jsonl")[1] == "choice_accuracy", "all questions have choices"


def test_images_lie_where_the_user_says(tmp_path: Path) -> None:
    picture = _picture(tmp_path / "elsewhere" / "3887.png")
    data = _write(tmp_path / "test.json", CHARTQA)
    with pytest.raises(EdgeError, match=r"2 images of .*test.json are not there, .*3887.png for one; .*--images"):
        read_suite_file(data)
    assert read_suite_file(data, picture.parent)[0][0].images == (picture,)
    absolute = _write(tmp_path / "own.jsonl", [{"images": [str(picture)], "prompt": "?", "answer": "x"}])
    assert read_suite_file(absolute)[0][0].images == (picture,)


def test_a_seed_chooses_a_part_in_the_order_of_the_file(tmp_path: Path) -> None:
    data = _write(tmp_path / "own.jsonl", [{"prompt": "?", "answer": str(number)} for number in range(50)])
    for seed in (0, 1):
        cases, _ = read_suite_file(data, count=9, seed=seed)
        assert [int(case.answer) for case in cases] == sorted(random.Random(seed).sample(range(50), 9))
    assert len(read_suite_file(data, count=60)[0]) == 50


def test_a_metric_that_cannot_judge_a_suite_is_refused(tmp_path: Path) -> None:
    data = _write(tmp_path / "own.jsonl", [{"prompt": "?", "answer": "x"}])
    suite = read_suite(str(data), metric="anls")
    assert (suite.name, suite.metrics[0]) == ("own.jsonl", "anls")
    assert "choice_accuracy" not in suite.metrics
    with pytest.raises(EdgeError, match="no question has choices"):
        read_suite(str(data), metric="choice_accuracy")


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([], "holds no questions"),
        ([3], "own.json:1: a int, expected an object"),
        ([{"prompt": "?", "answer": "x"}, {"answer": "x"}], "own.json:2: there is no"),
        (
            [{"imgname": "x", "query": "?", "label": "x"}, {"query": "?", "label": "x"}],
            "own.json:2: there is no imgname",
        ),
        ([{"imgname": "x" * 5000, "query": "?", "label": "x"}], "1 images of"),
        ([{"text": "?"}], "no known format; they need the fields of one of these: docvqa: image, question"),
        ([{"prompt": "?"}], "own.json:1: the question has no right answer"),
        ([{"prompt": "?", "answer": " "}], "no right answer"),
        ([{"prompt": "?", "answer": ["x", ""]}], "no right answer"),
        ([{"prompt": "?", "answer": 3}], "answer is 3, expected a text or a list of texts"),
        ([{"prompt": 3, "answer": "x"}], "not a text"),
        ([{"prompt": "?", "answer": "x", "label": "x"}], "unknown field 'label', expected images, prompt, id, answer"),
        ([{"prompt": "?", "answer": "x", "tags": {"a": 1}}], "tags is"),
        ([{"prompt": "?", "answer": "x", "id": True}], "id is True"),
        ([{"prompt": "?", "answer": "x", "choices": ["x"]}], "1 choices, expected 2 to 26"),
        ([{"prompt": "?", "answer": "x", "choices": ["y", "z"]}], "answer 'x' is none of the choices"),
        ([{"prompt": "?", "answer": "C", "choices": ["y", "z"]}], "answer 'C' is none of the choices"),
        (
            [{"prompt": "?", "answer": "x", "id": "1"}, {"prompt": "?", "answer": "x", "id": 1}],
            "two questions with the id",
        ),
        ([{"questionId": 1, "question": "?", "image": "x.png"}], "no answers; those of a test split are not public"),
        ([{"question": "?", "options": "['a', 'b']", "answer": "?"}], "the answer is unknown; those of a test split"),
        ([{"question": "?", "options": "[]", "answer": "[]"}], "no right answer"),
        ([{"imgname": "x.png", "query": "?", "label": None}], "label is None"),
        ([{"question": "?", "options": "__import__('os')", "answer": "A"}], "options is not a list of texts"),
        ([{"question": "?", "options": "[" * 9999, "answer": "A"}], "options is not a list of texts"),
        ([{"question": "<image 1>", "options": [], "answer": "A"}], "images is not a list of file names"),
    ],
)
def test_mistakes_in_a_file_are_one_line_that_names_the_entry(tmp_path: Path, entries: list[Any], message: str) -> None:
    with pytest.raises(EdgeError) as raised:
        read_suite_file(_write(tmp_path / "own.json", entries))
    assert message in str(raised.value)
    assert "own.json" in str(raised.value)


def test_files_that_are_no_suite_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"prompt": "?", "answer": "x"}\n{"prompt"', encoding="utf-8")
    (tmp_path / "x.json").write_text('{"prompt": "?"}', encoding="utf-8")
    for name, message in (("x.jsonl", "x.jsonl:2: not JSON"), ("x.json", "holds a dict"), ("none", "cannot be read")):
        with pytest.raises(EdgeError, match=message):
            read_suite_file(tmp_path / name)


def test_mutants_of_every_format_are_scored_or_refused() -> None:
    read = 0
    for _, scores, line in outcomes(SuiteData, 1000):
        if line is None:
            read += 1
            assert all(0 <= score <= 1 for found in scores for score in found.values())
        else:
            assert "data.json" in line
    assert 100 < read < 900


def test_every_format_says_who_describes_it() -> None:
    assert all(known.source for known in FORMATS.values())
