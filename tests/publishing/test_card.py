"""The card says what the record and the manifest say, and what others wrote in them stays text."""

from __future__ import annotations

import math
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from helpers.reports import HOSTILE, full_report, quantization_record
from helpers.tiny import write_checkpoint
from internvl_edge.base.hub import HubSource
from internvl_edge.base.jsonable import encode
from internvl_edge.bundle.manifest import Manifest
from internvl_edge.checkpoint.license import License
from internvl_edge.export import export_bundle
from internvl_edge.model.linear import Scheme
from internvl_edge.publishing.card import Place, bundle_card, checkpoint_card, recipe_toml
from internvl_edge.recipe.files import make_recipe, presets, read_recipe
from internvl_edge.recipe.recipe import Automatic, Recipe

INT4 = Scheme(4, 128, symmetric=True)
HUB = HubSource("org/model", "0123456789" * 4)
RECIPES = [
    *(make_recipe(values) for values in presets().values()),
    Recipe(layers=(("layers.0.*", "w8a16"), ("*.down_proj", "w4a16-awq-g32")), automatic=Automatic(max_kl=0.02)),
    Recipe(decoder="w8a8", automatic=Automatic(max_kl=0.5, among=("w8a8", "fp"))),
]


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    folder = tmp_path_factory.mktemp("card")
    return Manifest.read(export_bundle(write_checkpoint(folder / "checkpoint"), folder / "bundle"))


def front_matter(card: str) -> dict[str, Any]:
    values: dict[str, Any] = yaml.safe_load(card.split("---\n")[1])
    return values


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_the_recipe_of_a_card_is_a_recipe_file(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text(recipe_toml(encode(asdict(recipe))), encoding="utf-8")
    assert make_recipe(read_recipe(str(tmp_path / "recipe.toml"))) == recipe


def test_a_pattern_that_comes_twice_keeps_its_last_place(tmp_path: Path) -> None:
    recipe = Recipe(layers=(("layers.0.*", "w8a16"), ("*.up_proj", "fp"), ("layers.0.*", "w4a16-rtn")))
    (tmp_path / "recipe.toml").write_text(recipe_toml(encode(asdict(recipe))), encoding="utf-8")
    assert make_recipe(read_recipe(str(tmp_path / "recipe.toml"))).layers == recipe.layers[1:]


def test_errors_are_those_of_quantized_linears(manifest: Manifest) -> None:
    """A linear of the tower may stay float because its error as int8 would be the largest of all."""
    worst, *others = quantization_record().linears
    kept = replace(worst, scheme=None, error=7.5)
    record = replace(quantization_record(), linears=(kept, *others))
    assert kept.name not in record.errors
    for card in (checkpoint_card(record, "remote"), bundle_card(manifest, record)):
        assert f"{max(record.errors.values()):.3g}" in card
        assert "7.5" not in card


def test_figures_are_shown_with_what_they_come_from(manifest: Manifest) -> None:
    quality = full_report().quality
    assert quality is not None
    card = bundle_card(replace(manifest, quality=replace(quality, files=manifest.fingerprint)))
    assert "| `exact_match` | 95.00% |" in card
    assert "500 questions of reader, onnxruntime on cpu" in card
    assert "Conditions: failed" in card
    other = bundle_card(replace(manifest, quality=quality))  # of other files, so nobody's
    assert "Nobody has measured" in other
    assert "exact_match" not in other


def test_what_others_wrote_stays_text(manifest: Manifest) -> None:
    quality = full_report().quality
    assert quality is not None
    hostile = "x](javascript:alert(1)) <script>\n# heading\n---\n|a|b|" + HOSTILE
    record = replace(quantization_record(), checkpoint=hostile, hub=HubSource(hostile, hostile))
    known = replace(quality, files=manifest.fingerprint, accepted=hostile)
    measured = {name: replace(each, data=hostile) for name, each in quality.measured.items()}
    shown = replace(manifest, source=hostile, hub=record.hub, quality=replace(known, measured=measured))
    for card in (checkpoint_card(record, "remote", License("other", "n", "LICENSE")), bundle_card(shown, record)):
        assert "\u202e" not in card
        outside = re.sub(r"(?ms)^```.*?^```$", "", card)  # a block of code is text, whatever stands in it
        assert "How it is stored" in outside
        assert all(markup not in outside for markup in ("<script", "<img", "](javascript", "\n# heading"))
        assert "base_model" not in front_matter(card)
        assert front_matter(card)["pipeline_tag"] == "image-text-to-text"


def test_the_front_matter_names_the_original() -> None:
    record = replace(quantization_record(), hub=HUB)
    found = front_matter(checkpoint_card(record, "remote", License("other", "qwen", "https://example.com/x")))
    assert found["base_model"] == "org/model"
    assert found["base_model_relation"] == "quantized"
    assert (found["license"], found["license_name"], found["license_link"]) == (
        "other",
        "qwen",
        "https://example.com/x",
    )
    assert "license" not in front_matter(checkpoint_card(record, "remote"))


@pytest.mark.parametrize(
    ("place", "command"),
    [
        (Place(), "internvl-edge export FOLDER -o bundle"),
        (Place("me/model"), "internvl-edge export me/model -o bundle"),
        (Place("me/model", "0" * 40), f"internvl-edge export me/model --revision {'0' * 40} -o bundle"),
    ],
)
def test_commands_name_the_place(place: Place, command: str) -> None:
    assert command in checkpoint_card(quantization_record(), "remote", place=place)


def test_a_card_knows_the_layout() -> None:
    record = quantization_record()
    tower = [linear for linear in record.linears if linear.name.startswith("vision.")]
    text = replace(record, linears=tuple(linear for linear in record.linears if linear not in tower))
    assert "--trust-remote-code" in checkpoint_card(text, "remote")
    assert "--trust-remote-code" not in checkpoint_card(text, "native")
    assert "vLLM does not load" not in checkpoint_card(record, "remote")
    assert "vLLM does not load" in checkpoint_card(record, "native")
    assert "LMDeploy does not load" in checkpoint_card(text, "native")


def test_an_error_that_is_no_number_does_not_break_a_card() -> None:
    record = quantization_record()
    linears = (replace(record.linears[0], error=math.nan), *record.linears[1:])
    assert "How it is stored" in checkpoint_card(replace(record, linears=linears), "remote")
