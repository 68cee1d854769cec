"""Learned rounding: nearer to the float model, on the same grids, the same for a seed, and resumable."""

from __future__ import annotations

import json
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch

from helpers.calibration_data import FLOAT32, write_data
from helpers.killed_runs import contents, run_and_be_killed, run_to_the_end
from helpers.reference import Reference
from helpers.reference_names import text_name
from helpers.tiny import write_checkpoint
from internvl_edge.base.errors import EdgeError
from internvl_edge.calibration import DataOptions, calibrate
from internvl_edge.calibration.models import Decoder
from internvl_edge.checkpoint.reader import Checkpoint
from internvl_edge.model.linear import Scheme
from internvl_edge.quantize import QuantizationReport, quantize_checkpoint
from internvl_edge.quantize.block import Latent, QuantizedBlock
from internvl_edge.quantize.learned import Learned, RoundingLearner, _Moving, batches
from internvl_edge.quantize.rounding import Grid
from internvl_edge.recipe.files import make_recipe
from internvl_edge.recipe.recipe import Automatic, LearnedRounding, Recipe

COMPUTED = Recipe(group_size=32)
LEARNED = Recipe(group_size=32, rounding="learned", learning=LearnedRounding(tokens=60))
WORDS = (
    "the",
    "number",
    "of",
    "pictures",
    "on",
    "this",
    "page",
    "is",
    "what",
    "we",
    "ask",
    "for",
    "and",
    "a",
    "total",
    "say",
)


def write_texts(folder: Path) -> Path:
    """Ten prompts of different length, of words that the tiny tokenizers know."""
    folder.mkdir()
    random = np.random.default_rng(0)
    prompts = (" ".join(random.choice(WORDS, random.integers(8, 30))) for _ in range(10))
    path = folder / "data.jsonl"
    path.write_text("\n".join(json.dumps({"images": [], "prompt": prompt}) for prompt in prompts))
    return path


def quantize(checkpoint: Path, out: Path, recipe: Recipe) -> QuantizationReport:
    data = checkpoint.parent / "data"
    path = data / "data.jsonl" if data.exists() else write_texts(data)
    return quantize_checkpoint(checkpoint, out, recipe, data=DataOptions(path), compute=FLOAT32)


def changed(original: Path, quantized: Path) -> Reference:
    """Return the reference with the weights of the quantized decoder, and its own tower."""
    made, read = Reference(original), Checkpoint(quantized)
    for name in read.shapes:
        if name.startswith("decoder."):
            made.weights[text_name(name)] = torch.from_numpy(read.tensor(name).astype(np.float32))
    return made


def divergence(original: Path, quantized: Path, sequences: list[list[int]]) -> float:
    """Mean KL divergence of the reference with the quantized weights from the one with the original weights."""
    base, other = Reference(original), changed(original, quantized)
    return float(torch.cat([kl(base.logits(ids), other.logits(ids)) for ids in sequences]).mean())


def kl(expected: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    """Return the divergence at each position, [tokens]."""
    expected, found = expected.log_softmax(-1), found.log_softmax(-1)
    return (expected.exp() * (expected - found)).sum(-1)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("kind", [{}, {"text": "internlm2", "bias": True, "dtype": "float16"}], ids=str)
def test_learned_integers_come_nearer_to_the_float_model_on_the_same_grids(
    tmp_path: Path, kind: dict[str, object], symmetric: bool
) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint", **kind)
    computed = Recipe(group_size=32, symmetric=symmetric)
    learned = Recipe(group_size=32, symmetric=symmetric, rounding="learned", learning=LearnedRounding(tokens=60))
    plain, report = (quantize(checkpoint, tmp_path / n, r) for n, r in (("computed", computed), ("learned", learned)))
    made = calibrate(checkpoint, tmp_path / "set", DataOptions(tmp_path / "data" / "data.jsonl"), FLOAT32)
    ids = np.split(np.load(made.folder / "tokens.npy"), np.cumsum(made.lengths)[:-1])
    sequences = [each.tolist() for each in ids]
    before, after = (divergence(checkpoint, tmp_path / name, sequences) for name in ("computed", "learned"))
    assert after < 0.8 * before
    # The first layer's inputs are the same for both, and so is all but its integers.
    old, new = Checkpoint(tmp_path / "computed"), Checkpoint(tmp_path / "learned")
    for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"):
        one, other = (read.linear(f"decoder.layers.0.{name}") for read in (old, new))
        assert one is not None
        assert other is not None
        np.testing.assert_array_equal(one.scale, other.scale)
        np.testing.assert_array_equal(one.zero_point, other.zero_point)
        steps = np.abs(one.values.astype(int) - other.values)
        assert 0 < (steps > 0).mean() < 0.3
        assert steps.max() == 1
    assert plain.learned is None
    assert report.learned is not None
    assert report.learned.after < report.learned.before
    assert 0 < report.learned.changed < 0.3
    # The report tells the errors of the integers that are stored.
    errors = {linear.name: linear.error for linear in report.record.linears}
    assert errors != {linear.name: linear.error for linear in plain.record.linears}
    assert all(error is not None and error > 0 for error in errors.values())


def test_layers_that_learning_makes_worse_keep_their_computed_rounding(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint")
    wild = Recipe(group_size=32, rounding="learned", learning=LearnedRounding(steps=3, tokens=1, rate=0.5))
    quantize(checkpoint, tmp_path / "computed", COMPUTED)
    report = quantize(checkpoint, tmp_path / "learned", wild)
    assert report.learned is not None
    assert report.learned.after == report.learned.before
    assert report.learned.changed == 0
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("computed", "learned")]
    assert weights[0] == weights[1]


def test_wider_linears_take_smaller_steps() -> None:
    """A step of Adam has the same length for every gradient, so the first one shows it."""
    for inputs, expected in ((256, 0.01), (1536, 0.01), (3072, 0.0025)):
        scheme = Scheme(4, 64, symmetric=False)
        grid = Grid(scheme, torch.ones(2, inputs // 64), torch.full((2, inputs // 64), 8.0))
        latent = Latent(torch.full((2, inputs), 3.0), grid, None, torch.empty(0, inputs))
        moving = _Moving(latent, np.full((2, inputs), 3, np.uint8))
        moving.weight = moving.rounded(torch.float32).requires_grad_()
        moving.weight.sum().backward()
        moving.step(1, 0.01)
        torch.testing.assert_close(latent.values, torch.full((2, inputs), 3 - expected))


@pytest.mark.parametrize("text", ["qwen2", "internlm2"])
def test_image_tokens_and_text_tokens_both_come_nearer(tmp_path: Path, text: str) -> None:
    checkpoint, data = write_checkpoint(tmp_path / "checkpoint", text=text), write_data(tmp_path / "data", count=8)
    for name, recipe in (("computed", COMPUTED), ("learned", LEARNED)):
        quantize_checkpoint(checkpoint, tmp_path / name, recipe, data=DataOptions(data), compute=FLOAT32)
    made = calibrate(checkpoint, tmp_path / "set", DataOptions(data), FLOAT32)
    samples = np.split(np.load(made.folder / "tokens.npy"), np.cumsum(made.lengths)[:-1])
    tiles = np.split(made.pixels(Checkpoint(checkpoint).config.vision.image_size), np.cumsum(made.tiles)[:-1])
    is_image = torch.from_numpy(made.is_image)
    assert 50 < int(is_image.sum()) < len(is_image) / 2
    base, means = Reference(checkpoint), []
    for name in ("computed", "learned"):
        other = changed(checkpoint, tmp_path / name)
        each = [(ids.tolist(), part) for ids, part in zip(samples, tiles, strict=True)]
        found = torch.cat([kl(base.logits(*one), other.logits(*one)) for one in each])
        means.append((float(found[is_image].mean()), float(found[~is_image].mean())))
    (image_before, text_before), (image_after, text_after) = means
    assert image_after < 0.85 * image_before
    assert text_after < 0.85 * text_before


def test_one_layer_is_in_memory_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint", num_hidden_layers=4)
    load, learn, loaded, seen = Decoder.load, RoundingLearner.learn, dict[int, list[weakref.ref[object]]](), []

    def loading(self: Decoder, index: int, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
        tensors = load(self, index, dtype)
        kept = loaded.setdefault(index, [])
        kept += [weakref.ref(tensor) for name, tensor in tensors.items() if name.endswith("proj.weight")]
        return tensors

    def learning(self: RoundingLearner, index: int, block: QuantizedBlock) -> Learned | None:
        found = learn(self, index, block)
        alive = {number for number, kept in loaded.items() if any(each() is not None for each in kept)}
        seen.append(alive - {index})
        return found

    monkeypatch.setattr(Decoder, "load", loading)
    monkeypatch.setattr(RoundingLearner, "learn", learning)
    quantize(checkpoint, tmp_path / "out", LEARNED)
    assert sorted(loaded) == [0, 1, 2, 3]
    assert seen == [set()] * 4


def test_a_seed_decides_the_integers(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint")
    other = Recipe(group_size=32, rounding="learned", learning=LearnedRounding(tokens=60, seed=1))
    for name, recipe in (("a", LEARNED), ("b", LEARNED), ("c", other)):
        quantize(checkpoint, tmp_path / name, recipe)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in "abc"]
    assert weights[0] == weights[1] != weights[2]


def test_every_sample_comes_before_any_comes_again() -> None:
    lengths = [10, 20, 30, 40, 5]
    made = list(batches(lengths, 50, 30, (7, 0)))
    assert made == list(batches(lengths, 50, 30, (7, 0))) != list(batches(lengths, 50, 30, (7, 1)))
    assert all(sum(lengths[item] for item in batch) >= 50 for batch in made)
    order = [item for batch in made for item in batch]
    for start in range(0, len(order) - 5, 5):
        assert sorted(order[start : start + 5]) == [0, 1, 2, 3, 4]
    assert next(batches([3, 3], 1000, 2, (0, 0))) in ([0, 1], [1, 0])  # never more than there is


KILLED = """
import os, signal, sys
from pathlib import Path
from internvl_edge.calibration import DataOptions, choose_compute
from internvl_edge.calibration.work import WorkFolder
from internvl_edge.quantize import learned, quantize_checkpoint
from internvl_edge.recipe.recipe import LearnedRounding, Recipe
moment, vision, checkpoint, data, out = sys.argv[1:]
write_json, step = WorkFolder.write_json, learned._Moving.step

def kill(*ignored):
    os.kill(os.getpid(), signal.SIGKILL)

if moment == "steps":  # in the middle of the first layer
    learned._Moving.step = lambda self, number, rate: kill() if number == 9 else step(self, number, rate)
at = {  # state that is about to be written
    "reference": ("decoder-reference.json", {"blocks": 2}),
    "learned": ("learned-001.json", None),
    "commit": ("decoder.json", {"blocks": 2}),
}.get(moment, ("", None))
WorkFolder.write_json = lambda self, name, values: (
    kill() if name == at[0] and at[1] in (None, values) else write_json(self, name, values)
)
recipe = Recipe(group_size=32, rounding="learned", learning=LearnedRounding(tokens=60), vision=vision)
quantize_checkpoint(checkpoint, out, recipe, data=DataOptions(Path(data)), compute=choose_compute("cpu", "float32"))
"""


@pytest.mark.slow
@pytest.mark.parametrize("vision", ["fp", "int8"])
def test_killed_learning_continues_to_the_same_bytes(tmp_path: Path, vision: str) -> None:
    """With floats, the samples are texts; with an int8 tower, they have image tokens that it computed."""
    checkpoint = write_checkpoint(tmp_path / "checkpoint", text="internlm2")
    data = write_texts(tmp_path / "data") if vision == "fp" else write_data(tmp_path / "data")
    run_to_the_end(KILLED, "never", vision, checkpoint, data, tmp_path / "whole")
    for moment in ("steps", "reference", "learned", "commit"):  # each run continues the one killed before
        run_and_be_killed(KILLED, moment, vision, checkpoint, data, tmp_path / "killed")
        assert not (tmp_path / "killed").exists()
    run_to_the_end(KILLED, "never", vision, checkpoint, data, tmp_path / "killed")
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert not (tmp_path / "killed.partial").exists()


def test_a_choice_may_leave_nothing_to_learn(tmp_path: Path) -> None:
    recipe = Recipe(group_size=32, rounding="learned", automatic=Automatic(max_kl=1e-9))
    report = quantize(write_checkpoint(tmp_path / "checkpoint"), tmp_path / "out", recipe)
    assert {linear.scheme for linear in report.record.linears} == {None}
    assert report.learned is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rounding": "guessed"}, "rounding 'guessed' is not one of computed, learned"),
        ({"decoder": "w8a16", "rounding": "learned"}, "only the rounding of w4a16-awq is learned"),
        ({"rounding": "learned", "learning": {"steps": 0}}, "1 to 100000 steps"),
        ({"rounding": "learned", "learning": {"rate": 1.5}}, "a rate of 1.5 is not possible"),
        ({"rounding": "learned", "learning": {"step": 4}}, "did you mean steps"),
    ],
)
def test_recipes_that_learn_nothing_are_refused(fields: dict[str, object], message: str, tmp_path: Path) -> None:
    with pytest.raises(EdgeError, match=message):
        make_recipe(fields) if "step" not in fields.get("learning", {}) else read(fields, tmp_path)


def read(fields: dict[str, object], folder: Path) -> None:
    from internvl_edge.recipe.files import read_recipe

    (folder / "mine.toml").write_text('rounding = "learned"\n[learning]\nstep = 4\n')
    read_recipe(str(folder / "mine.toml"))
