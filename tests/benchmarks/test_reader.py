"""The demo model's training code: what it computes and writes is what the product reads, in both layouts."""

from __future__ import annotations

import importlib
import random
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.repository import REPOSITORY
from internvl_edge import InternVL, export_bundle
from internvl_edge.calibration.synthetic import draw_picture, sample

EXAMPLE = REPOSITORY / "examples" / "reader"
QUESTIONS = 8
NEW_TOKENS = 16


class Example:
    """The example's modules as attributes; they are scripts that import one another by name."""

    def __getattr__(self, name: str) -> Any:
        return importlib.import_module(name)


@pytest.fixture(scope="module")
def example() -> Iterator[Example]:
    sys.path.insert(0, str(EXAMPLE))
    yield Example()
    sys.path.remove(str(EXAMPLE))


def random_weights(example: Example, layout: str) -> dict[str, Tensor]:
    """A reader that has learned nothing, biases included."""
    torch.manual_seed(3)
    reader = example.model.Reader(example.export_reader.layout_config(layout))
    with torch.no_grad():
        for name, p in reader.named_parameters():
            if name.endswith("_proj.bias"):
                p.normal_()
    return dict(reader.named_parameters())


@pytest.mark.parametrize("layout", ["qwen2", "internlm2"])
def test_torch_and_bundle_agree_token_for_token(example: Example, layout: str, tmp_path: Path) -> None:
    weights = random_weights(example, layout)
    example.checkpoint.write_checkpoint(
        weights, example.export_reader.layout_config(layout), layout, tmp_path / "checkpoint"
    )
    export_bundle(tmp_path / "checkpoint", tmp_path / "bundle", dtype="float32")
    bundle, reader = InternVL.load(tmp_path / "bundle"), example.export_reader.rounded_reader(weights, layout)
    assert all(example.agree.agrees(bundle, reader, layout, sample("test", i), NEW_TOKENS) for i in range(QUESTIONS))
    other = example.export_reader.rounded_reader({n: w * 1.5 for n, w in weights.items() if "o_proj" in n}, layout)
    assert not all(example.agree.agrees(bundle, other, layout, sample("test", i), NEW_TOKENS) for i in range(QUESTIONS))


def test_the_two_tokenizers_cut_every_question_and_answer_at_the_same_places(example: Example, tmp_path: Path) -> None:
    import sentencepiece

    example.internlm2_vocabulary.write_internlm2(tmp_path)
    other = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    rows = example.internlm2_vocabulary.internlm2_row_sources()
    rng = random.Random(0)
    role = example.batches.ASK.removeprefix("<|im_end|>\n<|im_start|>")
    texts = ["system\nRead the picture.", "user\n", role]
    for _ in range(300):
        picture, _ = draw_picture(rng, "test")
        texts += [text for pair in picture.questions for text in pair] + [picture.transcript]
    for text in texts:
        assert [rows[i] for i in other.encode(text)] == example.batches.encode(text), text


def test_questions_that_share_a_picture_do_not_see_one_another(example: Example) -> None:
    student = example.train.Student(0.5, "trunk")
    student.reader = example.export_reader.rounded_reader(random_weights(example, "internlm2"), "internlm2")
    picture, _ = draw_picture(random.Random(5), "train", ["receipt"])
    triples = [(question, answer, "receipt") for question, answer in picture.questions[:3]]
    pixels = example.pages.tiles(picture.image)
    together = student.answers(example.batches.join([example.batches.make_row(pixels, triples)], []), bf16=False)
    alone = [
        student.answers(example.batches.join([example.batches.make_row(pixels, [triple])], []), bf16=False)
        for triple in triples
    ]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-4, rtol=1e-4)
    assert example.batches.attention_bias(torch.tensor([[0, 1, 2]]))[0, 2].tolist() == [0.0, -30000.0, 0.0]


@pytest.mark.parametrize("task", ["chart", "receipt"])
def test_bonds_are_in_the_tokens_of_names_and_say_what_belongs_to_them(example: Example, task: str) -> None:
    rng = random.Random(2)
    seen = 0
    for _ in range(20):
        picture, _ = draw_picture(rng, "train", [task])
        labels = example.bonds.bond_labels(picture, len(example.pages.tiles(picture.image)))
        partners = [line.split()[-1] for line in picture.transcript.splitlines()]
        characters = ["", *example.dense.CHARACTERS]
        said = [characters[first] + characters[second] for _, first, second in labels]
        each = 2 if task == "chart" else 1  # the name of a bar may lie in two tokens
        if labels:  # none where a receipt's names and prices are in different tiles
            assert said == [text[:2] for text in partners for _ in range(each)]
            rows = [token // 4 for token, _, _ in labels]
            assert all(row % 4 == 3 for row in rows) if task == "chart" else rows == sorted(rows)
            seen += 1
    assert seen > 5


def test_more_layers_than_a_checkpoint_has_answer_as_it_does(example: Example, tmp_path: Path) -> None:
    config = example.export_reader.layout_config("qwen2")
    weights = random_weights(example, "qwen2")
    example.checkpoint.write_checkpoint(weights, config, "qwen2", tmp_path)
    deeper = replace(config, layers=config.layers + 2)
    student = example.train.Student(0.5, "qwen2")
    student.reader = example.model.Reader(deeper)
    student.reader.load_state_dict(example.checkpoint.starting_weights(tmp_path, deeper), strict=False)
    rows = example.judge.validation_rows(4, "test")
    found = student.answers(rows[0], bf16=False)
    student.reader = example.export_reader.rounded_reader(weights, "qwen2")
    torch.testing.assert_close(found, student.answers(rows[0], bf16=False))
    trunk = example.checkpoint.starting_weights(tmp_path, replace(deeper, qkv_bias=False))
    assert not [name for name in trunk if "_proj.bias" in name]


@pytest.mark.parametrize(
    ("question", "answer", "place"),
    [
        ("What is the value of Bo?", "17", 1),
        ("How much is the Ada?", "9", 0),
        ("Bo多少钱？", "17", 1),
        ("What is the value of Bo?", "9", None),
        ("What is the value of bar 2?", "17", None),
        ("Which bar is the tallest?", "Bo", 1),
        ("What does the sign say?", "Bo 17", None),
    ],
)
def test_a_question_about_one_line_has_its_place(
    example: Example, question: str, answer: str, place: int | None
) -> None:
    assert example.batches.place_of(question, answer, "Ada 9\nBo 17\nCy 30") == place


def test_a_name_that_two_lines_share_has_no_place(example: Example) -> None:
    assert example.batches.place_of("What colour is the star?", "red", "red square\nred star") is None
