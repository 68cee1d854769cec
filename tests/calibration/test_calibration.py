"""Calibration sees what the device sees: statistics against a plain forward, data in every form, kills and damage."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from helpers.calibration_data import FLOAT32, write_data
from helpers.damage import poison
from helpers.killed_runs import contents, run_and_be_killed
from helpers.reference import Reference, tile_image
from helpers.reference_names import reference_name
from helpers.tiny import write_checkpoint
from internvl_edge.base.errors import EdgeError
from internvl_edge.base.progress import SILENT
from internvl_edge.calibration import CalibrationSet, DataOptions, calibrate
from internvl_edge.calibration.compute import is_finite
from internvl_edge.calibration.items import read_items
from internvl_edge.calibration.models import Decoder, Tower
from internvl_edge.calibration.statistics import InputStatistics, Observer, StatisticsRequest, symmetrize
from internvl_edge.calibration.stream import BlockStream
from internvl_edge.calibration.work import WorkFolder, checkpoint_identity, discard
from internvl_edge.checkpoint.reader import Checkpoint

KINDS: dict[str, dict[str, Any]] = {
    "qwen2": {},
    "internlm2 dynamic": {
        "text": "internlm2",
        "max_position_embeddings": 16,
        "rope_scaling": {"type": "dynamic", "factor": 2.0},
    },
    "internlm2 linear, v1": {
        "text": "internlm2",
        "bias": True,
        "ps_version": "v1",
        "rope_scaling": {"type": "linear", "factor": 4.0},
    },
    "qwen3, large eps": {"text": "qwen3", "head_dim": 24, "rms_norm_eps": 0.5},
    "qwen3 native, ties": {"text": "qwen3", "layout": "native", "num_key_value_heads": 1, "tie": True, "bias": True},
    "6b": {"vision": "6b", "text": "internlm2", "vision_hidden_size": 96, "vision_num_attention_heads": 6},
    "native llama": {"layout": "native", "text": "llama", "bias": True},
    "earlier layer": {"select_layer": -2, "vision_num_hidden_layers": 3},
}


class Recorder(Reference):
    """The reference, remembering the input of every linear layer."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, torch.float64)
        self.seen: dict[str, list[Tensor]] = {}

    def _linear(self, x: Tensor, name: str) -> Tensor:
        self.seen.setdefault(name, []).append(x.flatten(0, -2))
        return super()._linear(x, name)


def tiles_of(path: Path, max_tiles: int) -> dict[str, np.ndarray]:
    return {image.name: tile_image(Image.open(image), max_tiles, size=56) for image in path.parent.glob("*.png")}


@pytest.mark.parametrize("kind", KINDS)
def test_statistics_are_those_of_a_plain_forward(tmp_path: Path, kind: str) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint", **KINDS[kind])
    data = write_data(tmp_path / "data")
    made = calibrate(checkpoint, tmp_path / "stats", DataOptions(data, max_tiles=2), FLOAT32)
    recorder, tiles = Recorder(checkpoint), tiles_of(data, 2)
    ids = np.split(np.load(made.folder / "tokens.npy"), np.cumsum(made.lengths)[:-1])
    lines = [json.loads(line) for line in data.read_text().splitlines()]
    embeddings = []
    for name, sample in zip(made.names, ids, strict=True):
        images = lines[int(name.rpartition(":")[2]) - 1]["images"]
        pixels = tiles[images[0]] if images else None
        embeddings.append(recorder.embed(sample.tolist(), pixels))
        recorder.logits(sample.tolist(), pixels)
    torch.testing.assert_close(
        torch.from_numpy(np.array(made.embeddings())), torch.cat(embeddings).float(), atol=2e-5, rtol=1e-5
    )
    statistics = statistics_of(checkpoint, made, tmp_path / "work")
    same_input = (".k_proj", ".v_proj", ".up_proj", "lm_head")
    unused = "vision_model.encoder.layers.2."  # with select_layer -2 nothing depends on the third block
    expected = {name for name in recorder.seen if not name.endswith(same_input) and not name.startswith(unused)}
    assert {reference_name(name) for name in statistics} == expected
    for name, found in statistics.items():
        seen = torch.cat(recorder.seen[reference_name(name)]).abs()
        torch.testing.assert_close(found.mean_abs.double(), seen.mean(0), rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(found.max_abs.double(), seen.amax(0), rtol=1e-3, atol=1e-4)


def statistics_of(checkpoint: Path, made: CalibrationSet, work: Path) -> dict[str, InputStatistics]:
    """What passes through tower and decoder, by the canonical name of the linear that receives it."""
    source, found = Checkpoint(checkpoint), {}
    tower = Tower(source, FLOAT32, made.pixels(source.config.vision.image_size), made.tile_owners)
    for label, blocks, twice in (("tower", tower, False), ("decoder", Decoder(source, FLOAT32, made), True)):

        def keep(index: int, statistics: Any, blocks: Any = blocks) -> None:
            found.update({f"{blocks.names[index]}.{name}": inputs for name, inputs in statistics.items()})

        stream = BlockStream(WorkFolder(work / label, {}), label, blocks)
        stream.run(SILENT, "", keep, StatisticsRequest(), replaces=twice)
    return found


# ---- statistics ----


@pytest.mark.parametrize("width", [24, 600, 2100])
def test_gram_matrix_and_subset_are_those_of_the_inputs(width: int) -> None:
    x = torch.randn(70, width, generator=torch.Generator().manual_seed(0))
    observer = Observer("layer", 70, StatisticsRequest(gram=True, tokens=7))
    for start, stop in ((0, 30), (30, 31), (31, 70)):
        observer.begin(start, [("sample", stop - start)])
        observer("linear", x[start:stop])
    found = observer.inputs["linear"]
    assert found.gram is not None
    torch.testing.assert_close(symmetrize(found.gram), x.T @ x, rtol=1e-4, atol=1e-3)
    assert found.subset is not None
    assert torch.equal(found.subset, x[::10])
    assert found.count == 70


# ---- data ----


def calibrate_tiny(tmp_path: Path, data: Path | None, **options: Any) -> CalibrationSet:
    checkpoint = tmp_path / "checkpoint"
    if not checkpoint.exists():
        write_checkpoint(checkpoint)
    out = tmp_path / f"stats-{len(list(tmp_path.iterdir()))}"
    return calibrate(checkpoint, out, DataOptions(data, **({"max_tiles": 2} | options)), FLOAT32)


def test_answers_count_as_tokens(tmp_path: Path) -> None:
    data = write_data(tmp_path / "data", count=2)
    with_answer = calibrate_tiny(tmp_path, data)
    lines = [{k: v for k, v in json.loads(line).items() if k != "answer"} for line in data.read_text().splitlines()]
    data.write_text("\n".join(map(json.dumps, lines)))
    without = calibrate_tiny(tmp_path, data)
    lengths = [dict(zip(made.names, made.lengths, strict=True)) for made in (with_answer, without)]
    assert lengths[0]["data.jsonl:1"] == lengths[1]["data.jsonl:1"]
    assert lengths[0]["data.jsonl:2"] > lengths[1]["data.jsonl:2"] + 5


@pytest.mark.parametrize(
    ("config", "tiles"),
    [({}, 3), ({"max_dynamic_patch": 2}, 3), ({"max_dynamic_patch": 1}, 1), ({"dynamic_image_size": False}, 1)],
    ids=str,
)
def test_no_image_has_more_tiles_than_the_model_sees(tmp_path: Path, config: dict[str, Any], tiles: int) -> None:
    """Also where more are allowed: a model may have been trained with one tile per image."""
    checkpoint, data = write_checkpoint(tmp_path / "checkpoint", config=config), write_data(tmp_path / "data", count=2)
    Image.new("RGB", (112, 56)).save(data.parent / "0.png")
    made = calibrate(checkpoint, tmp_path / "out", DataOptions(data, max_tiles=2), FLOAT32)
    assert max(made.tiles) == tiles


def test_a_seed_decides_which_samples_and_their_order(tmp_path: Path) -> None:
    data = write_data(tmp_path / "data")
    names = [calibrate_tiny(tmp_path, data, samples=3, seed=seed).names for seed in (0, 0, 1)]
    assert names[0] == names[1] != names[2]
    assert len(names[0]) == 3


def test_what_is_not_read_does_not_change_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the state of the run itself, for an output inside the folder, nor how the path is written."""
    folder = write_data(tmp_path / "data").parent
    before = DataOptions(folder).describe()
    (folder / "out.partial").mkdir()
    (folder / "out.partial" / "run.json").write_text("{}")
    (folder / "._0.png").write_bytes(b"what macOS keeps beside a file")
    assert DataOptions(folder).describe() == before
    assert "._0.png" not in [item.name for item in read_items(folder)]
    monkeypatch.chdir(tmp_path)
    assert DataOptions(Path("data")).describe() == before
    assert DataOptions(Path("data/data.jsonl")).describe() == DataOptions(folder / "data.jsonl").describe()
    (folder / "0.png").write_bytes(b"another picture")
    assert DataOptions(folder).describe() != before


def test_every_tensor_tells_checkpoints_apart(tmp_path: Path) -> None:
    """A fine-tune has the sizes of its base, and here also the first and the last megabyte."""
    base = write_checkpoint(tmp_path / "base", hidden_size=256, intermediate_size=2048)
    tensors, tuned = load_file(base / "model.safetensors"), tmp_path / "tuned"
    tensors["language_model.model.layers.0.mlp.up_proj.weight"] *= 1.5
    shutil.copytree(base, tuned)
    save_file(tensors, tuned / "model.safetensors", metadata={"format": "pt"})
    contents = [(folder / "model.safetensors").read_bytes() for folder in (base, tuned)]
    assert [content[: 1 << 20] for content in contents] == [contents[0][: 1 << 20]] * 2
    assert [content[-(1 << 20) :] for content in contents] == [contents[0][-(1 << 20) :]] * 2
    assert checkpoint_identity(base) != checkpoint_identity(tuned)


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "generation_config.json", "merges.txt"])
def test_what_decides_tokens_tells_checkpoints_apart_and_a_report_does_not(tmp_path: Path, name: str) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint")
    before = checkpoint_identity(checkpoint)
    for report in ("report.json", "report.html", "quantization.json", "README.md"):
        (checkpoint / report).write_text("{}")
    assert checkpoint_identity(checkpoint) == before
    with (checkpoint / name).open("a") as file:
        file.write("\n")
    assert checkpoint_identity(checkpoint) != before


def test_a_folder_of_images_gets_prompts(tmp_path: Path) -> None:
    made = calibrate_tiny(tmp_path, write_data(tmp_path / "data").parent)
    assert sorted(made.names) == [f"{index}.png" for index in range(6)]
    assert all(tiles >= 1 for tiles in made.tiles)
    assert int(made.is_image.sum()) == 4 * sum(made.tiles)


def test_the_built_in_set_has_pictures_in_two_languages_and_text() -> None:
    pytest.importorskip("fontpkg_arimo")
    items = read_items(None)
    first = [next(items) for _ in range(40)]
    assert len({item.name for item in first}) == 40
    assert sum(not item.images for item in first) == 10
    assert any("\u4e00" <= character <= "\u9fff" for item in first for character in item.prompt)
    assert all(item.answer for item in first)
    again = read_items(None)
    assert [item.prompt for item in first] == [next(again).prompt for _ in range(40)]


BROKEN = [
    "{not json",
    '["a list"]',
    '{"prompt": "x", "image": "a.png"}',
    '{"images": "0.png", "prompt": "x"}',
    '{"images": ["missing.png"], "prompt": "x"}',
    '{"images": ["0.png", "1.png"], "prompt": "<image> but two images"}',
    '{"images": [], "prompt": "the <IMG_CONTEXT> itself"}',
    '{"images": [], "prompt": "x", "answer": "<IMG_CONTEXT>"}',
    '{"images": [], "prompt": " "}',
]


def test_broken_items_are_reported_and_skipped_up_to_the_limit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_data(tmp_path / "data")
    data.write_text("\n".join([*BROKEN, data.read_text()]), encoding="utf-8")
    made = calibrate_tiny(tmp_path, data, max_broken=len(BROKEN))
    assert len(made.names) == 6
    assert len(made.broken) == len(BROKEN)
    assert sorted(int(line.split(":")[1]) for line in made.broken) == list(range(1, len(BROKEN) + 1))
    assert capsys.readouterr().err.count("skipped data.jsonl:") == len(BROKEN)
    with pytest.raises(EdgeError, match=rf"{len(BROKEN)} broken .* limit is {len(BROKEN) - 1}"):
        calibrate_tiny(tmp_path, data, max_broken=len(BROKEN) - 1)


@pytest.mark.parametrize("name", ["absent.jsonl", "empty.jsonl", "folder"])
def test_data_that_is_not_there_is_one_line(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "folder").mkdir()
    with pytest.raises(EdgeError, match=name):
        calibrate_tiny(tmp_path, tmp_path / name)


# ---- damage ----


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_weight_that_is_not_finite_is_named(tmp_path: Path, value: float) -> None:
    poison(write_checkpoint(tmp_path / "checkpoint"), "vision_model.encoder.layers.1.mlp.fc1.weight", value)
    with pytest.raises(EdgeError, match=r"tensor vision\.layers\.1\.mlp\.fc1\.weight holds NaN or infinity in 1 "):
        calibrate_tiny(tmp_path, write_data(tmp_path / "data"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_one_value_that_is_not_finite_is_found_wherever_it_is(dtype: torch.dtype) -> None:
    tensor = torch.linspace(-3, 3, 3 * 67).to(dtype).reshape(3, 67)
    assert is_finite(tensor)
    assert is_finite(tensor[:0])
    for place in (0, 1, 31, 66, 100, -1):
        for value in (torch.nan, torch.inf, -torch.inf):
            bad = tensor.clone()
            bad.view(-1)[place] = value
            assert not is_finite(bad)
    assert not is_finite(torch.full((4,), torch.nan, dtype=dtype))


def test_activations_that_are_not_finite_name_layer_tensor_and_sample(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint", dtype="float32")
    # One token's embedding is damaged, and only one sample holds that token.
    made = calibrate_tiny(tmp_path, write_data(tmp_path / "data"))
    ids = np.split(np.load(made.folder / "tokens.npy"), np.cumsum(made.lengths)[:-1])
    own = {name: set(sample.tolist()) for name, sample in zip(made.names, ids, strict=True)}
    victim = next(name for name in own if own[name] - set().union(*(own[n] for n in own if n != name)))
    token = min(own[victim] - set().union(*(own[n] for n in own if n != victim)))
    tensors = load_file(checkpoint / "model.safetensors")
    tensors["language_model.model.embed_tokens.weight"][token, 3] = float("nan")
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(EdgeError, match=rf"layers.0: the input of self_attn.q_proj holds NaN .* sample {victim} "):
        statistics_of(checkpoint, calibrate_tiny(tmp_path, tmp_path / "data" / "data.jsonl"), tmp_path / "work")


# ---- kills ----

KILLED = """
import os, signal, sys
from pathlib import Path
from internvl_edge.calibration import DataOptions, calibrate, choose_compute, pipeline
from internvl_edge.calibration.work import WorkFolder
pipeline._WAVE_BYTES = 20_000
moment, checkpoint, data, out = sys.argv[1:]

if moment == "vision":  # image tokens of the second wave are computed, not written
    names = []
    write_arrays = WorkFolder.write_arrays
    def patched(self, file, arrays):
        names.append(file)
        if len(names) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        write_arrays(self, file, arrays)
    WorkFolder.write_arrays = patched
elif moment == "end":  # the set is complete, but not in its place
    Path.rename = lambda path, target: os.kill(os.getpid(), signal.SIGKILL)
else:  # the embeddings are written, the waves are still there
    WorkFolder.remove = lambda self, name: os.kill(os.getpid(), signal.SIGKILL)
calibrate(Path(checkpoint), Path(out), DataOptions(Path(data), max_tiles=2), choose_compute("cpu", "float32"))
"""


def test_a_killed_calibration_continues_to_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from internvl_edge.calibration import pipeline

    monkeypatch.setattr(pipeline, "_WAVE_BYTES", 20_000)
    checkpoint, data = write_checkpoint(tmp_path / "checkpoint"), write_data(tmp_path / "data")
    options = DataOptions(data, max_tiles=2)
    undisturbed = contents(calibrate(checkpoint, tmp_path / "whole", options, FLOAT32).folder)
    assert {"calibration.json", "embeddings.f32", "tiles.u8", "tokens.npy"} == set(undisturbed)
    out = tmp_path / "killed"
    for moment in ("vision", "commit", "end", "end"):  # each run continues the one killed before
        run_and_be_killed(KILLED, moment, checkpoint, data, out)
        assert not out.exists()
    continued = calibrate(checkpoint, out, options, FLOAT32)
    assert contents(continued.folder) == undisturbed
    assert not (tmp_path / "killed.partial").exists()


def test_another_run_does_not_continue_a_killed_one(tmp_path: Path) -> None:
    checkpoint, data = write_checkpoint(tmp_path / "checkpoint"), write_data(tmp_path / "data")
    run_and_be_killed(KILLED, "vision", checkpoint, data, tmp_path / "out")
    other = DataOptions(data, max_tiles=2, seed=5)
    with pytest.raises(EdgeError, match=r"another data; .*--restart"):
        calibrate(checkpoint, tmp_path / "out", other, FLOAT32)
    calibrate(checkpoint, tmp_path / "out", other, FLOAT32, restart=True)


def test_a_work_folder_half_removed_is_nobodys_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = WorkFolder(tmp_path / "work", {"data": "d"})
    work.write_json("state.json", {})

    def killed(path: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("shutil.rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        discard(work.path)
    with pytest.raises(EdgeError, match="no work folder"):
        WorkFolder(work.path, {"data": "d"})
