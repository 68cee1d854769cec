"""Bundles against the goldens of the original code: prompts, features, logits and greedy tokens, in both dialects."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from internvl_edge import InternVL, Reply, export_bundle
from internvl_edge.bundle.bundle import Bundle
from internvl_edge.bundle.names import DECODERS, TOKENIZER
from internvl_edge.model.preprocess import load_image, tile_image
from internvl_edge.model.tokenizer import Tokenizer
from internvl_edge.runtime.engines.onnxruntime import OnnxRuntimeEngine

REMOTE = ("internvl2_5-qwen2-tiny", "internvl2_5-internlm2-tiny")
NATIVE = "internvl-hf-qwen2-tiny"
CASES = (
    *("single_implicit", "single_explicit_tiled", "multi_separate", "multi_combined", "history_image_turn2"),
    *("text_only", "text_history_zh", "batch_two"),
)
FEATURES = ("wide_2000x800.jpg@max6", "square_448.png@max12", "gray_800x2000.png@max4")
NATIVE_CASES = ("single", "tiled", "multi", "text_only", "system_history")


class Golden:
    """One reference checkpoint with its goldens and bundles exported from it."""

    def __init__(self, oracle: Path, name: str, scratch: Path) -> None:
        self.images = oracle / "images"
        self.cases = json.loads((oracle / name / "golden.json").read_text(encoding="utf-8"))
        self.arrays = np.load(oracle / name / "golden.npz")
        self._checkpoint = oracle / name / "checkpoint"
        self._scratch = scratch / Path(name).name

    def bundle(self, dtype: str = "float32") -> Path:
        folder = self._scratch / dtype
        return folder if folder.exists() else export_bundle(self._checkpoint, folder, dtype=dtype)

    def case(self, name: str) -> dict[str, Any]:
        return next(case for case in self.cases["cases"] if case["id"] == name)


@pytest.fixture(scope="module")
def goldens(oracle: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Golden]:
    scratch = tmp_path_factory.mktemp("bundles")
    return {name: Golden(oracle, name, scratch) for name in REMOTE}


@pytest.fixture(scope="module")
def native(small_oracle: Path, tmp_path_factory: pytest.TempPathFactory) -> Golden:
    """The committed checkpoint; that of the full oracle is the same."""
    return Golden(small_oracle, NATIVE, tmp_path_factory.mktemp("bundles"))


@pytest.fixture(scope="module")
def family_golden(family: Path, tmp_path_factory: pytest.TempPathFactory) -> Golden:
    return Golden(family.parents[1], f"families/{family.name}", tmp_path_factory.mktemp("family"))


def model_for(golden: Golden, dialect: str, dtype: str = "float32") -> InternVL:
    return InternVL.load(golden.bundle(dtype), dialect=dialect, context=4096, threads=1)


def ask(golden: Golden, model: InternVL, case: dict[str, Any]) -> list[Reply]:
    """The replies of one golden case; a batch is asked one by one."""
    images = [str(golden.images / image["file"]) for image in case.get("images", [])]
    limits = [image.get("max_num", 12) for image in case.get("images", [])]
    if case["kind"] == "batch_chat":
        rows = zip(case["questions"], images, limits, strict=True)
        return [model.chat(q, [image], max_tiles=limit, max_new_tokens=24) for q, image, limit in rows]
    # Without num_patches_list the original gives all tiles to one mark.
    combined = len(images) > 1 and not case.get("pass_num_patches_list")
    history = [(question, answer) for question, answer in case.get("history") or []]
    entries = [images] if combined else images
    return [model.chat(case["question"], entries, max_tiles=limits, history=history, max_new_tokens=24)]


@pytest.mark.parametrize("dialect", DECODERS)
@pytest.mark.parametrize("name", REMOTE)
def test_every_case_gives_the_tokens_of_the_original(goldens: dict[str, Golden], name: str, dialect: str) -> None:
    golden = goldens[name]
    with model_for(golden, dialect) as model:
        for case_id in CASES:
            case = golden.case(case_id)
            expected = case["expected"]
            ids, mask = golden.arrays[f"{case_id}/input_ids"], golden.arrays[f"{case_id}/attention_mask"]
            replies = ask(golden, model, case)
            for row, reply in enumerate(replies):
                prompt = np.atleast_2d(ids)[row][np.atleast_2d(mask)[row] == 1]
                assert reply.prompt_ids == prompt.tolist(), case_id
                assert reply.output_ids == expected["output_ids"][row], case_id
            if expected["tiles_per_image"] is not None:
                assert [tiles for reply in replies for tiles in reply.tiles] == expected["tiles_per_image"]


@pytest.mark.parametrize("dialect", DECODERS)
def test_every_family_gives_the_tokens_of_its_oracle(family_golden: Golden, dialect: str) -> None:
    """InternVL3.5 in both layouts, InternVL3 and InternVL2, with the tiles of the original in all of them."""
    golden = family_golden
    with model_for(golden, dialect) as model:
        for case in golden.cases["cases"]:
            images = [str(golden.images / image["file"]) for image in case.get("images", [])]
            limits = [image["max_num"] for image in case.get("images", [])]
            if "messages" in case:
                question, history, system = turns(case["messages"])
            else:
                question, system = case["question"], case.get("system")
                history = [(asked, answer) for asked, answer in case.get("history") or []]
            reply = model.chat(
                question, images, max_tiles=limits or None, history=history, system=system, max_new_tokens=24
            )
            assert reply.prompt_ids == golden.arrays[f"{case['id']}/input_ids"][0].tolist(), case["id"]
            assert reply.output_ids == case["expected"]["output_ids"][0], case["id"]


@pytest.mark.parametrize("name", REMOTE)
def test_last_logits_are_those_of_the_original(goldens: dict[str, Golden], name: str) -> None:
    """From the golden's own token ids, so that a prompt mistake cannot hide a graph mistake or the reverse."""
    golden = goldens[name]
    engines = {dialect: open_engine(golden, dialect) for dialect in DECODERS}
    for case_id in CASES:
        case = golden.case(case_id)
        tiles = case_tiles(golden, case)
        rows = np.atleast_2d(golden.arrays[f"{case_id}/input_ids"])
        masks = np.atleast_2d(golden.arrays[f"{case_id}/attention_mask"])
        references = golden.arrays[f"{case_id}/last_logits"].reshape(len(rows), -1)
        per_row = [[image] for image in tiles] if case["kind"] == "batch_chat" else [tiles]
        for ids, mask, images, reference in zip(rows, masks, per_row, references, strict=True):
            # The dialects share the vision graph.
            embeds = embed(engines["standard"], ids[mask == 1], images, golden)
            for dialect, engine in engines.items():
                np.testing.assert_allclose(
                    prefill(engine, embeds), reference, atol=1e-4, err_msg=f"{case_id} {dialect}"
                )


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("name", REMOTE)
def test_image_features_are_those_of_the_original(goldens: dict[str, Golden], name: str, feature: str) -> None:
    golden = goldens[name]
    engine = open_engine(golden, "onnxruntime")
    image, limit = feature.split("@max")
    features = engine.encode(tile_image(load_image(golden.images / image), image_size=448, max_tiles=int(limit)))
    full = golden.cases["extract_feature"][feature]["full_tiles_saved"]
    key = f"feat/{image}/max{limit}"
    np.testing.assert_allclose(features[full], golden.arrays[f"{key}/tiles"], atol=2e-4)
    np.testing.assert_allclose(features[:, ::16], golden.arrays[f"{key}/stride"], atol=2e-4)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", REMOTE)
def test_16_bit_bundles_stay_within_the_original_in_bfloat16(goldens: dict[str, Golden], name: str, dtype: str) -> None:
    """The original itself moves by these figures when it computes in bfloat16 instead of float32."""
    golden = goldens[name]
    engine = open_engine(golden, "onnxruntime", dtype)
    allowed = golden.cases["extract_feature"]["bf16_vs_fp32_extract_feature"]
    tiles = tile_image(load_image(golden.images / allowed["image"]), image_size=448, max_tiles=6)
    difference = np.abs(engine.encode(tiles)[[0, 3]] - golden.arrays["feat/wide_2000x800.jpg/max6/tiles"])
    assert difference.max() <= allowed["max_abs"]
    assert difference.mean() <= allowed["mean_abs"]
    for figures in golden.cases["bf16"]:
        case = golden.case(figures["case"])
        reference = golden.arrays[f"{figures['case']}/last_logits"].reshape(-1)
        ids = golden.arrays[f"{figures['case']}/input_ids"].reshape(-1)
        logits = prefill(engine, embed(engine, ids, case_tiles(golden, case), golden))
        assert np.abs(logits - reference).max() <= figures["last_logits_max_abs"], figures["case"]
        assert logits.argmax() == reference.argmax()


@pytest.mark.parametrize("dialect", DECODERS)
@pytest.mark.parametrize("case_id", NATIVE_CASES)
def test_native_checkpoint_follows_its_own_template(native: Golden, case_id: str, dialect: str) -> None:
    """Exact where the image needs no resizing; elsewhere transformers' other resize filter moves features a little."""
    case = native.case(case_id)
    expected = case["expected"]
    question, history, system = turns(case["messages"])
    images = [str(native.images / image) for image in case.get("images", [])]
    limit = case.get("max_patches", 12)
    with model_for(native, dialect) as model:
        reply = model.chat(question, images, max_tiles=limit, history=history, system=system, max_new_tokens=24)
    assert len(reply.prompt_ids) == expected["n_prompt_tokens"]
    assert sum(reply.tiles) == expected.get("n_tiles_total", 0)
    if case_id in ("single", "text_only"):
        assert reply.output_ids == expected["output_ids"][0]


@pytest.mark.parametrize("dialect", DECODERS)
@pytest.mark.parametrize("case_id", ["single", "text_only"])
def test_native_logits_are_exact_where_no_image_is_resized(native: Golden, case_id: str, dialect: str) -> None:
    engine = open_engine(native, dialect)
    case = native.case(case_id)
    images = [{"file": name} for name in case.get("images", [])]
    ids = native.arrays[f"{case_id}/input_ids"][0]
    logits = prefill(engine, embed(engine, ids, case_tiles(native, {"images": images}), native))
    np.testing.assert_allclose(logits, native.arrays[f"{case_id}/last_logits"][0], atol=1e-4)


@pytest.mark.parametrize(
    ("case_id", "skipped", "largest", "mean"),
    [("single", 0, 2e-4, 2e-5), ("tiled", 0, 0.02, 2e-3), ("multi", 1, 0.05, 5e-3), ("system_history", 0, 0.02, 2e-3)],
)
def test_native_features_differ_only_by_the_resize_filter(
    native: Golden, case_id: str, skipped: int, largest: float, mean: float
) -> None:
    """Pixels differ by up to 2/255 (7/255 in a grey image); the first image of "multi" has alpha, which transformers
    puts on white and the original drops.
    """
    engine = open_engine(native, "onnxruntime")
    case = native.case(case_id)
    images = [{"file": name, "max_num": case.get("max_patches", 12)} for name in case["images"]]
    tiles = np.concatenate(case_tiles(native, {"images": images}))[skipped:]
    reference = native.arrays[f"{case_id}/image_features_stride16"][skipped:]
    difference = np.abs(engine.encode(tiles)[:, ::16] - reference)
    assert difference.max() < largest
    assert difference.mean() < mean


def turns(messages: list[dict[str, Any]]) -> tuple[str, list[tuple[str, str]], str | None]:
    """The golden's messages as question, history and system text, with a mark where the template puts an image."""
    texts = [
        "".join("<image>\n" if item["type"] == "image" else item["text"] for item in message["content"])
        for message in messages
    ]
    system = texts.pop(0) if messages[0]["role"] == "system" else None
    return texts[-1], list(zip(texts[:-1:2], texts[1:-1:2], strict=True)), system


def open_engine(golden: Golden, dialect: str, dtype: str = "float32") -> OnnxRuntimeEngine:
    return OnnxRuntimeEngine(Bundle.open(golden.bundle(dtype)), dialect=dialect, capacity=4096, threads=1)


def case_tiles(golden: Golden, case: dict[str, Any]) -> list[np.ndarray]:
    return [
        tile_image(load_image(golden.images / image["file"]), image_size=448, max_tiles=image.get("max_num", 12))
        for image in case.get("images", [])
    ]


def embed(engine: OnnxRuntimeEngine, ids: np.ndarray, tiles: list[np.ndarray], golden: Golden) -> np.ndarray:
    """The decoder's input for the prompt `ids`: rows of the float32 token table, image tokens taken from `tiles`."""
    embeds = np.array(Bundle.open(golden.bundle("float32")).embeddings()[ids], np.float32)
    if tiles:
        image_token = Tokenizer(golden.bundle("float32") / TOKENIZER).token_id("<IMG_CONTEXT>")
        embeds[ids == image_token] = engine.encode(np.concatenate(tiles)).reshape(-1, embeds.shape[1])
    return embeds


def prefill(engine: OnnxRuntimeEngine, embeds: np.ndarray) -> np.ndarray:
    """Logits after a whole prompt."""
    engine.cache.reset()
    return engine.prefill(embeds)
