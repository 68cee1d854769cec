"""The plan of a decoder: which pattern of a recipe holds for a linear, and what is refused in one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.tiny import write_checkpoint
from internvl_edge.base.errors import EdgeError
from internvl_edge.checkpoint.reader import Checkpoint
from internvl_edge.quantize.plan import plan_decoder
from internvl_edge.recipe.recipe import Automatic, Recipe, VisionInt8


def planned(checkpoint: Checkpoint, *layers: tuple[str, str]) -> dict[str, str]:
    plan = plan_decoder(checkpoint, Recipe(group_size=32, layers=layers))
    return {name.removeprefix("decoder.layers."): str(choice.precision) for name, choice in plan.items()}


def test_the_last_pattern_that_matches_holds(tmp_path: Path) -> None:
    checkpoint = Checkpoint(write_checkpoint(tmp_path / "checkpoint"))
    found = planned(
        checkpoint, ("layers.0.*", "w8a16"), ("*.down_proj", "fp"), ("decoder.layers.0.mlp.up_proj", "w8a8")
    )
    assert len(found) == 14
    assert found["0.self_attn.q_proj"] == found["0.mlp.gate_proj"] == "w8a16"
    assert found["0.mlp.down_proj"] == found["1.mlp.down_proj"] == "fp"
    assert found["0.mlp.up_proj"] == "w8a8"
    assert found["1.mlp.up_proj"] == "w4a16-awq-g32"


@pytest.mark.parametrize(
    ("pattern", "precision", "message"),
    [
        ("*.downproj", "w8a16", r"'\*.downproj' matches no linear of this model; near: \*.down_proj"),
        ("layers.7.*", "w8a16", r"matches no linear of this model; near: layers\.[01]"),
        ("lm_head", "w8a16", "the head has a field of its own, lm_head"),
        ("*.fc2", "w8a16", r"matches vision.layers.0.mlp.fc2; linears of tower and projector can only be kept as fp"),
    ],
)
def test_patterns_that_match_nothing_or_too_much_are_refused(
    tmp_path: Path, pattern: str, precision: str, message: str
) -> None:
    checkpoint = Checkpoint(write_checkpoint(tmp_path / "checkpoint"))
    with pytest.raises(EdgeError, match=message):
        plan_decoder(checkpoint, Recipe(group_size=32, layers=((pattern, precision),)))


def test_parts_of_one_stored_tensor_stay_together(tmp_path: Path) -> None:
    split = Recipe(group_size=32, layers=(("*.v_proj", "w8a16"),))
    plan_decoder(Checkpoint(write_checkpoint(tmp_path / "qwen2")), split)
    with pytest.raises(EdgeError, match=r"q_proj would be w4a16-awq-g32 and .*v_proj w8a16, .* one tensor"):
        plan_decoder(Checkpoint(write_checkpoint(tmp_path / "internlm2", text="internlm2")), split)


def test_patterns_that_leave_nothing_to_quantize_are_refused(tmp_path: Path) -> None:
    checkpoint = Checkpoint(write_checkpoint(tmp_path / "checkpoint"))
    with pytest.raises(EdgeError, match="quantize at least one"):
        planned(checkpoint, ("layers.*", "fp"))
    plan_decoder(checkpoint, Recipe(group_size=32, lm_head="int8", layers=(("layers.*", "fp"),)))


def test_patterns_that_leave_nothing_to_learn_are_refused(tmp_path: Path) -> None:
    checkpoint = Checkpoint(write_checkpoint(tmp_path / "checkpoint"))
    with pytest.raises(EdgeError, match="only the rounding of w4a16-awq is learned, and no linear here is"):
        plan_decoder(checkpoint, Recipe(group_size=32, rounding="learned", layers=(("layers.*", "w8a16"),)))


@pytest.mark.parametrize(
    ("pattern", "near"),
    [
        ("projectr.*", r"near: projector\.\*"),
        ("vision.layers.9.*", r"near: vision\.layers\."),
        ("head", "names are like vis"),
    ],
)
def test_patterns_of_the_tower_that_match_nothing_are_refused(tmp_path: Path, pattern: str, near: str) -> None:
    checkpoint = Checkpoint(write_checkpoint(tmp_path / "checkpoint"))
    kept = VisionInt8(keep=("projector.*", pattern))
    with pytest.raises(EdgeError, match=f"matches no linear of tower and projector, to be kept as fp; {near}"):
        plan_decoder(checkpoint, Recipe("fp", vision="int8", vision_int8=kept))
    plan_decoder(checkpoint, Recipe(group_size=32, vision_int8=kept))  # nothing reads them for a float tower


def test_too_few_bits_are_refused_before_anything_is_measured(tmp_path: Path) -> None:
    checkpoint = Checkpoint(write_checkpoint(tmp_path / "checkpoint"))
    for bits, layers in ((4.6, ()), (5.2, (("*.down_proj", "fp"),))):
        with pytest.raises(EdgeError, match=f"at least .* bits per weight .* --target-bits asks for {bits}"):
            plan_decoder(checkpoint, Recipe(group_size=32, layers=layers, automatic=Automatic(target_bits=bits)))
    plan_decoder(checkpoint, Recipe(group_size=32, automatic=Automatic(target_bits=4.625)))


def test_group_sizes_of_exceptions_and_candidates_must_divide(tmp_path: Path) -> None:
    checkpoint = Checkpoint(write_checkpoint(tmp_path / "checkpoint"))
    with pytest.raises(EdgeError, match="64 inputs, which groups of 128 do not divide"):
        plan_decoder(checkpoint, Recipe("w8a16", layers=(("layers.0.*", "w4a16-awq-g128"),)))
    among = Automatic(target_bits=6, among=("w4a16-awq-g128", "w8a16"))
    with pytest.raises(EdgeError, match="groups of 128"):
        plan_decoder(checkpoint, Recipe(group_size=32, automatic=among))
