"""Read a suite from a file of the user's: own questions as JSON Lines, or a public format as its authors give it.

`FORMATS` is the table of formats, and an entry's fields tell which one a file has. A file is JSON Lines (`.jsonl`), or
JSON that holds a list of entries, also under "data". Images are files, relative to the file of the suite or to a folder
that is given. The words after a public question are those of InternVL's own evaluation (`internvl_chat/eval`).
"""

from __future__ import annotations

import ast
import os
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from internvl_edge.base import json_files
from internvl_edge.base.errors import EdgeError
from internvl_edge.base.text import shown
from internvl_edge.calibration.items import DATA_BYTES, parse_line, read_images, read_item, read_lines
from internvl_edge.model.prompt import IMAGE_MARK

from .cases import Case
from .metrics import right_choice

_SHORT = "Answer the question using a single word or phrase."
_LETTER = "Answer with the option's letter from the given choices directly."
_NOT_PUBLIC = "those of a test split are not public, so take the validation split"
_ADVICE = "expected JSON Lines, or JSON with a list of entries"
# Fields of an own question beside those of calibration data.
_OWN = ("id", "answer", "choices", "tags")
_PROMPTED = ("images", "prompt", *_OWN)
_MMMU_IMAGES = 7
_MOST_CHOICES = 26
# Longer texts of options are nothing that somebody wrote for a question.
_OPTIONS_LENGTH = 1 << 16

Entry = dict[str, Any]


@dataclass(frozen=True)
class SuiteFormat:
    """A format of labeled questions.

    Attributes:
        forms: the fields that every entry of a form of it has. A file is of the first format of which its first entry
            has all fields of a form.
        metric: the usual metric, by its name in `SCORES`.
        case: makes a case of an entry's name, the entry, and the folder of the images. It raises ValueError for an
            entry of another form.
        folders: where the images usually lie, from the folder of the file.
        moved: a folder in the names of images that those folders do not have.
        source: who describes the format.
    """

    forms: tuple[frozenset[str], ...]
    metric: str
    case: Callable[[str, Entry, Path], Case]
    folders: tuple[str, ...] = ()
    moved: str = ""
    source: str = ""


def read_suite_file(
    path: Path, images: Path | None = None, count: int | None = None, seed: int = 0
) -> tuple[list[Case], str]:
    """Read the cases of a file.

    Args:
        path: JSON Lines or JSON of any format in `FORMATS`.
        images: folder of the images; None is that of the file, or where the format usually has them.
        count: only so many cases, chosen by the seed; None is all.
        seed: which ones. Their order is that of the file.

    Returns:
        The cases, whose names are unique, and the usual metric of the format.

    Raises:
        EdgeError: no such file, an entry that cannot be understood (named), a question without a right answer, two
            entries with one id, or images that are not there.
    """
    entries = _entries(path)
    chosen = _format(path, entries[0][1])
    folder = images or path.parent
    cases = []
    for name, entry in entries:
        try:
            _require_fields(chosen, entry)
            cases.append(_checked(chosen.case(name, entry, folder)))
        except ValueError as problem:
            raise EdgeError(f"{name}: {problem}; mend or remove it") from None
    _require_different_names(path, cases)
    if count is not None and count < len(cases):
        kept = sorted(random.Random(seed).sample(range(len(cases)), count))
        cases = [cases[place] for place in kept]
    return _with_images(path, cases, chosen, folder), _metric(chosen, cases)


def _entries(path: Path) -> list[tuple[str, Entry]]:
    """Return the entries of a file with their names (FILE:NUMBER); there is at least one."""
    found: list[tuple[str, Any]]
    if path.suffix == ".jsonl":
        found = []
        for name, line in read_lines(path):
            try:
                found.append((name, parse_line(line)))
            except ValueError as problem:
                raise EdgeError(f"{name}: {problem}; mend or remove it") from None
    else:
        values = json_files.read(path, EdgeError, _ADVICE, limit=DATA_BYTES)
        if isinstance(values, dict) and isinstance(values.get("data"), list):
            values = values["data"]
        if not isinstance(values, list):
            raise EdgeError(f"{path} holds a {type(values).__name__}; {_ADVICE}")
        found = [(f"{path.name}:{number}", entry) for number, entry in enumerate(values, start=1)]
    if not found:
        raise EdgeError(f"{path} holds no questions; {_ADVICE}")
    for name, entry in found:
        if not isinstance(entry, dict):
            raise EdgeError(f"{name}: a {type(entry).__name__}, expected an object; mend or remove it")
    return found


def _format(path: Path, entry: Entry) -> SuiteFormat:
    for known in FORMATS.values():
        if any(form <= entry.keys() for form in known.forms):
            return known
    fields = "; ".join(f"{name}: {', '.join(sorted(known.forms[0]))}" for name, known in FORMATS.items())
    raise EdgeError(f"{path} has entries of no known format; they need the fields of one of these: {fields}")


def _require_fields(known: SuiteFormat, entry: Entry) -> None:
    lacks = [sorted(form - entry.keys()) for form in known.forms]
    if all(lacks):
        raise ValueError(f"there is no {min(lacks, key=len)[0]}, which an entry of such a file needs")


def _checked(case: Case) -> Case:
    if not all(text.strip() for text in case.answers):
        raise ValueError("the question has no right answer")
    if case.choices and any(right_choice(text, case.choices) is None for text in case.answers):
        raise ValueError(f"answer {shown(case.answer)} is none of the choices, and not the letter of one")
    if len(case.choices) == 1 or len(case.choices) > _MOST_CHOICES:
        raise ValueError(f"the question has {len(case.choices)} choices, expected 2 to {_MOST_CHOICES}")
    return case


def _require_different_names(path: Path, cases: Sequence[Case]) -> None:
    seen: set[str] = set()
    for case in cases:
        if case.name in seen:
            raise EdgeError(f"{path} has two questions with the id {shown(case.name)}; give each its own")
        seen.add(case.name)


def _with_images(path: Path, cases: Sequence[Case], known: SuiteFormat, folder: Path) -> list[Case]:
    """Return the cases with images where they are: in the folder, or in one of those that the format usually has.

    All are looked for now, and not when the model comes to them after hours.
    """
    tried = [folder, *(folder / name for name in known.folders)]
    missing: list[Path] = []

    def find(image: Path) -> Path:
        name = image.relative_to(folder) if image.is_relative_to(folder) else image
        names = [name, name.relative_to(known.moved)] if known.moved and name.is_relative_to(known.moved) else [name]
        places = (each / one for one in names for each in tried)
        there = next((place for place in places if os.path.isfile(place)), None)
        if there is None:
            missing.append(image)
        return there or image

    found = [
        replace(case, images=tuple(find(image) for image in case.images if isinstance(image, Path))) for case in cases
    ]
    if missing:
        raise EdgeError(
            f"{len(missing)} images of {path} are not there, {missing[0]} for one; give their folder with --images"
        )
    return found


def _metric(known: SuiteFormat, cases: Sequence[Case]) -> str:
    """Return the usual metric of a format; for own questions that all have choices, it is that of choices."""
    return "choice_accuracy" if known is FORMATS["own"] and all(case.choices for case in cases) else known.metric


def _own(name: str, entry: Entry, folder: Path) -> Case:
    """Read one own question: an item of calibration data, and beside it `id`, `choices`, `tags`, several answers."""
    answers = _texts(entry, "answer", default=())
    if "prompt" in entry and (unknown := sorted(entry.keys() - set(_PROMPTED))):
        raise ValueError(f"unknown field {shown(unknown[0])}, expected {', '.join(_PROMPTED)}")
    rest = {key: value for key, value in entry.items() if key not in _OWN}
    item = read_item(folder, name, rest)
    if not answers and item.answer:  # the last turn of a conversation
        answers = (item.answer,)
    return Case(
        _id(entry, "id", name),
        item.prompt,
        item.images,
        *_split(answers),
        choices=_texts(entry, "choices", default=()),
        tags=_texts(entry, "tags", default=()),
        history=item.history,
        system=item.system,
    )


def _docvqa(name: str, entry: Entry, folder: Path) -> Case:
    if "answers" not in entry:
        raise ValueError(f"there are no answers; {_NOT_PUBLIC}")
    return Case(
        _id(entry, "questionId", name),
        f"{_text(entry, 'question')} {_SHORT}",
        read_images(folder, entry.get("image", entry.get("image_local_name"))),
        *_split(_texts(entry, "answers")),
        tags=_texts(entry, "question_types" if "question_types" in entry else "answer_type", default=()),
    )


def _chartqa(name: str, entry: Entry, folder: Path) -> Case:
    return Case(
        name,
        f"{_text(entry, 'query')} {_SHORT}",
        read_images(folder, entry["imgname"]),
        *_split(_texts(entry, "label")),
    )


def _internvl(name: str, entry: Entry, folder: Path) -> Case:
    """Read one question of the files that InternVL's own evaluation converts public sets to."""
    if entry.get("answer") is None:
        raise ValueError(f"there is no answer; {_NOT_PUBLIC}")
    question = _text(entry, "question")
    # In AI2D's file the question holds its options and these words already.
    text = question if _LETTER.lower() in question.lower() else f"{question} {_SHORT}"
    # Not the question's id, which is the image's in some of these sets.
    return Case(name, text, read_images(folder, entry["image"]), *_split(_texts(entry, "answer")))


def _ocrbench(name: str, entry: Entry, folder: Path) -> Case:
    data = _text(entry, "dataset_name")
    return Case(
        f"{data} {_id(entry, 'id', name)}",
        _text(entry, "question"),
        read_images(folder, entry["image_path"]),
        *_split(_texts(entry, "answers")),
        tags=_texts(entry, "type", default=()),
        is_formula=data == "HME100k",
    )


def _mmmu(name: str, entry: Entry, folder: Path) -> Case:
    """Read one MMMU question: images are named by marks (`<image 1>`) in the question and in its options."""
    if entry["answer"] == "?":
        raise ValueError(f"the answer is unknown; {_NOT_PUBLIC}")
    choices = _options(entry["options"])
    # Several right answers of an open question are a list, which the data set itself writes as Python text.
    answers = None if choices else _python_list(entry["answer"])
    lines = [
        _text(entry, "question").strip(),
        *(f"{chr(ord('A') + place)}. {text}" for place, text in enumerate(choices)),
    ]
    text = "\n".join([*lines, _LETTER if choices else _SHORT])
    numbers = re.findall(r"<image (\d)>", text)
    fields = [f"image_{number}" for number in numbers or range(1, _MMMU_IMAGES + 1)]
    names = [entry.get(field) for field in fields if numbers or entry.get(field) is not None]
    subject = re.fullmatch(r"[a-z]+_(\w+)_\d+", str(entry.get("id")))
    return Case(
        _id(entry, "id", name),
        re.sub(r"<image \d>", IMAGE_MARK, text),
        read_images(folder, names),
        *_split(_texts(entry, "answer") if answers is None else answers),
        choices=choices,
        tags=tuple(filter(None, (subject and subject[1], "choices" if choices else "open"))),
    )


def _options(value: Any) -> tuple[str, ...]:
    """Return MMMU's options: a list of texts, or one written as Python text, as the data set itself has them."""
    if isinstance(value, list) and all(isinstance(each, str) for each in value):
        found: tuple[str, ...] | None = tuple(value)
    else:
        found = _python_list(value)
    if found is None or not all(each.strip() for each in found):
        raise ValueError("options is not a list of texts")
    return tuple(each.strip() for each in found)


def _python_list(value: Any) -> tuple[str, ...] | None:
    """Return the texts of a list that is written as Python text; None for anything else."""
    if not isinstance(value, str) or len(value) > _OPTIONS_LENGTH:
        return None
    try:
        values = ast.literal_eval(value.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None
    is_list = isinstance(values, list) and all(isinstance(each, str) for each in values)
    return tuple(values) if is_list else None


def _id(entry: Entry, field: str, name: str) -> str:
    value = entry.get(field, name)
    if isinstance(value, bool) or not isinstance(value, (str, int)) or value == "":
        raise ValueError(f"{field} is {shown(value)}, expected a text or a whole number")
    return str(value)


def _text(entry: Entry, field: str) -> str:
    value = entry[field]
    if not isinstance(value, str):
        raise ValueError(f"{field} is {shown(value)}, expected a text")
    return value


def _texts(entry: Entry, field: str, default: tuple[str, ...] | None = None) -> tuple[str, ...]:
    """Return one text or a list of texts."""
    value = entry.get(field) if default is not None else entry[field]
    if value is None and default is not None:
        return default
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list) or not all(isinstance(each, str) for each in values):
        raise ValueError(f"{field} is {shown(value)}, expected a text or a list of texts")
    return tuple(values)


def _split(answers: tuple[str, ...]) -> tuple[str, tuple[str, ...]]:
    """Return the first right answer and the others, as `Case` has them."""
    return (answers[0], answers[1:]) if answers else ("", ())


FORMATS = {
    "docvqa": SuiteFormat(
        (frozenset({"questionId", "question", "image"}), frozenset({"questionId", "question", "image_local_name"})),
        "anls",
        _docvqa,
        # Downloads of today have the images beside the folder of the questions, those of the older page below it.
        ("../spdocvqa_images", "spdocvqa_images", "../infographicsvqa_images", "infographicsvqa_images"),
        moved="documents",
        source="DocVQA, val_v1.0.json (Mathew et al., 2021), and InfographicVQA, whose images have another field",
    ),
    "chartqa": SuiteFormat(
        (frozenset({"imgname", "query", "label"}),),
        "relaxed_accuracy",
        _chartqa,
        ("png",),
        source="ChartQA, test_human.json and test_augmented.json (Masry et al., 2022)",
    ),
    "internvl": SuiteFormat(
        (frozenset({"question_id", "question", "image"}),),
        "normalized_match",
        _internvl,
        # Names begin at the folder that holds `data/`, and the files lie in `data/NAME/`.
        ("../..",),
        source="internvl_chat/eval/vqa/evaluate_vqa.py, whose sets have different metrics",
    ),
    "ocrbench": SuiteFormat(
        (frozenset({"dataset_name", "image_path", "question", "answers"}),),
        "contains",
        _ocrbench,
        ("OCRBench_Images", "../OCRBench_Images"),
        source="OCRBench.json (Liu et al., 2024)",
    ),
    "mmmu": SuiteFormat(
        (frozenset({"question", "options", "answer"}),),
        "choice_accuracy",
        _mmmu,
        source="records of MMMU (Yue et al., 2024) whose images are names of files",
    ),
    "own": SuiteFormat(
        tuple(frozenset({form}) for form in ("prompt", "conversations", "messages")),
        "exact_match",
        _own,
        source="docs/evaluate.md",
    ),
}
