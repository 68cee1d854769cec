"""The program as a user runs it: a subprocess, its output, its exit status; and every mistake as one line."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
from PIL import Image

from helpers import tiny
from helpers.commands import assert_one_line, internvl_edge
from internvl_edge.base.progress import SILENT
from internvl_edge.bundle.names import MANIFEST
from internvl_edge.cli import cli, main, options
from internvl_edge.model.preprocess import load_image
from internvl_edge.runtime.engines.device import DeviceChoice


def test_export_then_run_answers_with_the_promised_json(bundle: Path, photo: Path) -> None:
    result = internvl_edge("run", bundle, "--image", photo, "What is this?", "--max-new-tokens", 6, "--json")
    assert result.returncode == 0, result.stderr
    reply = json.loads(result.stdout)
    assert set(reply) == {
        *("text", "output_ids", "prompt_tokens", "image_tokens", "tiles", "finish_reason", "timings"),
    }
    assert len(reply["output_ids"]) == 6
    assert reply["finish_reason"] == "length"
    assert reply["tiles"] == [7]  # 600x400: 3 x 2 tiles and the thumbnail
    assert reply["image_tokens"] == 7 * 4
    assert reply["prompt_tokens"] > reply["image_tokens"]


def test_streamed_text_is_the_text(bundle: Path, photo: Path) -> None:
    arguments = ("run", bundle, "--image", photo, "What is this?", "--max-new-tokens", 12, "--max-tiles", 1)
    streamed = internvl_edge(*arguments)
    assert streamed.returncode == 0, streamed.stderr
    assert streamed.stdout.rstrip("\n") == json.loads(internvl_edge(*arguments, "--json").stdout)["text"]


def test_both_dialects_and_seeds_repeat(bundle: Path) -> None:
    ids = {
        internvl_edge("run", bundle, "Hello", "--max-new-tokens", 8, "--dialect", dialect, "--json", *sampling).stdout[
            :60
        ]
        for dialect in ("standard", "onnxruntime")
        for sampling in ((), ("--temperature", 0.0))
    }
    assert len(ids) == 1
    sampled = [
        json.loads(internvl_edge("run", bundle, "Hello", "--temperature", 1.5, "--seed", seed, "--json").stdout)[
            "output_ids"
        ]
        for seed in (7, 7, 8)
    ]
    assert sampled[0] == sampled[1] != sampled[2]


def test_inspect_shows_checkpoint_and_bundle(checkpoint: Path, bundle: Path) -> None:
    for path, kind in ((checkpoint, "checkpoint"), (bundle, "bundle")):
        assert internvl_edge("inspect", path).stdout.splitlines()[0].split() == ["kind", kind]
        facts = json.loads(internvl_edge("inspect", path, "--json").stdout)
        assert facts["kind"] == kind
        assert facts["config"]["decoder"]["hidden_size"] == 64


def test_no_command_shows_the_help() -> None:
    bare = internvl_edge()
    assert (bare.returncode, bare.stderr) == (0, "")
    assert bare.stdout == internvl_edge("--help").stdout


def test_help_names_every_command_and_does_not_import_engines() -> None:
    assert all(name in internvl_edge("--help").stdout for name in ("inspect", "export", "run", "chat", "doctor"))
    code = "import sys, internvl_edge.cli; sys.exit(bool({'onnxruntime', 'numpy', 'torch'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# -- mistakes ----------------------------------------------------------------------------------------------------------


def test_not_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert_one_line(internvl_edge("export", tmp_path / "empty", "-o", tmp_path / "out"), "config.json")
    assert_one_line(internvl_edge("export", tmp_path / "nowhere", "-o", tmp_path / "out"), "does not exist")
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs a file that the system refuses to read")
def test_a_file_that_the_system_refuses_to_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").symlink_to("/proc/self/mem")
    assert_one_line(internvl_edge("inspect", tmp_path), "Input/output error")


def test_the_file_that_the_system_refuses_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(**options: object) -> None:
        raise PermissionError(13, "Permission denied", "model/config.json")

    monkeypatch.setattr(cli, "main", refused)
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "internvl-edge: error: model/config.json: Permission denied\n"


def test_half_downloaded_shard(tmp_path: Path) -> None:
    folder = tiny.write_checkpoint(tmp_path / "checkpoint", shards=3)
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    shard.rename(tmp_path / "elsewhere")
    assert_one_line(internvl_edge("export", folder, "-o", tmp_path / "out"), shard.name, "download it again")
    shard.write_bytes((tmp_path / "elsewhere").read_bytes()[:-100])
    assert_one_line(internvl_edge("export", folder, "-o", tmp_path / "out"), shard.name, "truncated")


def test_truncated_and_scrambled_safetensors(tmp_path: Path) -> None:
    folder = tiny.write_checkpoint(tmp_path / "checkpoint")
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    for damaged, fragment in (
        (whole[:-1], "truncated"),
        (whole[:4], "truncated"),
        (b"", "truncated"),
        (b"\xff" * 64, "truncated"),
        (whole[:8] + b"x" * (len(whole) - 8), "damaged"),
    ):
        weights.write_bytes(damaged)
        assert_one_line(internvl_edge("inspect", folder), "model.safetensors", fragment)


def test_wrong_dtype(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = tiny.write_checkpoint(tmp_path / "checkpoint")
    tensors = load_file(folder / "model.safetensors")
    tensors["mlp1.1.weight"] = tensors["mlp1.1.weight"].char()
    save_file(tensors, folder / "model.safetensors")
    assert_one_line(internvl_edge("inspect", folder), "mlp1.1.weight", "I8", "BF16")


def test_unknown_template(tmp_path: Path) -> None:
    folder = tiny.write_checkpoint(tmp_path / "checkpoint", config={"template": "vicuna_v1"})
    assert_one_line(internvl_edge("inspect", folder), "template", "vicuna_v1", "internvl2_5")


def test_weights_beyond_float16_are_named(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = tiny.write_checkpoint(tmp_path / "checkpoint", dtype="float32")
    for value, fragment in ((7e4, "7e+04"), (float("nan"), "NaN")):
        tensors = load_file(folder / "model.safetensors")
        tensors["language_model.model.layers.1.mlp.up_proj.weight"][3, 5] = value
        save_file(tensors, folder / "model.safetensors")
        result = internvl_edge("export", folder, "-o", tmp_path / "out", "--dtype", "float16")
        assert_one_line(result, "decoder.layers.1.mlp.up_proj.weight", fragment)
        assert ("try another --dtype" in result.stderr) == (value == 7e4)  # no other type helps against NaN
        assert list(tmp_path.iterdir()) == [folder]


def test_bad_images(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "text.jpg").write_text("no image")
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "bomb.png").write_bytes(bomb(50000, 50000))
    (tmp_path / "zero.png").write_bytes(bomb(0, 10))
    Image.new("RGB", (640, 480)).save(tmp_path / "whole.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:900])
    for name, fragment in (
        ("text.jpg", "not an image"),
        ("empty.png", "empty"),
        ("bomb.png", "50000x50000"),
        ("zero.png", "pixels"),
        ("cut.jpg", "cut.jpg"),
        ("missing.jpg", "No such file"),
    ):
        assert_one_line(internvl_edge("run", bundle, "--image", tmp_path / name, "What?"), name, fragment)


def bomb(width: int, height: int) -> bytes:
    """A small, well-formed PNG file that claims this size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 2, 0, 0, 0])
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def test_questions_that_cannot_be_asked(bundle: Path, photo: Path) -> None:
    image = ("--image", photo)
    assert_one_line(internvl_edge("run", bundle, *image, "  "), "question is empty")
    assert_one_line(internvl_edge("run", bundle, *image, "<image> <image> which?"), "2 <image> marks", "1 images")
    assert_one_line(internvl_edge("run", bundle, *image, *image, "<image> which?"), "1 <image> marks", "2 images")
    assert_one_line(internvl_edge("run", bundle, "<image> which?"), "1 <image> marks", "0 images")
    assert_one_line(internvl_edge("run", bundle, *image, "x", "--context", 64), "context of 64", "tokens")
    assert_one_line(internvl_edge("run", bundle, *image, "x", "--max-tiles", 0), "tile limits", "0")
    assert_one_line(
        internvl_edge("run", bundle, *image, "x", "--max-tiles", 1, "--max-tiles", 2), "max_tiles", "1 images"
    )
    assert_one_line(internvl_edge("run", bundle, "x", "--temperature", -1), "temperature")
    assert_one_line(internvl_edge("run", bundle, "x", "--top-p", 0), "top_p")
    assert_one_line(internvl_edge("run", bundle, "x", "--seed", -1), "seed is -1")
    assert_one_line(internvl_edge("run", bundle, "x", "--max-new-tokens", 0), "max_new_tokens")
    assert_one_line(internvl_edge("run", bundle, "x", "--stop", ""), "stop string is empty")


def test_devices_and_words_that_do_not_exist(bundle: Path) -> None:
    assert_one_line(internvl_edge("run", bundle, "x", "--device", "cuda"), "cuda", "CPUExecutionProvider")
    assert_one_line(internvl_edge("run", bundle, "x", "--device", "abacus"), "abacus")
    assert_one_line(internvl_edge("rum", bundle), "rum")
    assert_one_line(internvl_edge("run"), "run --help")


def test_an_image_with_damaged_metadata_is_answered_without_lines_of_pillow(bundle: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    Image.new("RGB", (60, 60)).save(path, tiffinfo={270: "x" * 50})
    content = path.read_bytes()
    entry = struct.pack("<HHL", 270, 2, 51)
    assert content.count(entry) == 1
    path.write_bytes(content.replace(entry, struct.pack("<HHL", 270, 2, 10**6)))
    with pytest.warns(UserWarning, match="Tag data larger than file|orrupt EXIF"):
        load_image(path)
    result = internvl_edge("run", bundle, "What?", "--image", path, "--max-new-tokens", 2, "--quiet")
    assert (result.returncode, result.stderr) == (0, "")


def test_auto_says_once_which_device_it_took_and_why(bundle: Path) -> None:
    line = "device: cpu (the bundle has no TensorRT engines; this ONNX Runtime has no CUDA)"
    result = internvl_edge("run", bundle, "x", "--max-new-tokens", 1)
    assert (result.returncode, result.stderr.splitlines().count(line)) == (0, 1)
    assert "device:" not in internvl_edge("run", bundle, "x", "--max-new-tokens", 1, "--quiet").stderr
    assert "device:" not in internvl_edge("run", bundle, "x", "--max-new-tokens", 1, "--device", "cpu").stderr


def test_there_are_as_many_rows_as_the_device_has(monkeypatch: pytest.MonkeyPatch, bundle: Path) -> None:
    loaded: list[tuple[str, int]] = []
    monkeypatch.setattr(options.InternVL, "load", lambda folder, device, rows, **further: loaded.append((device, rows)))
    built = {"tensorrt": 3, "cuda": 1, "cpu": 64}
    monkeypatch.setattr(options, "most_rows", lambda opened, device: built[device])
    given = dict.fromkeys(options.LOADING_NAMES) | {"engine": "auto", "exact": False}
    for device in ("tensorrt", "cuda", "cpu"):
        monkeypatch.setattr(options, "choose_device", lambda *_, device=device, **__: DeviceChoice(device, "a reason"))
        options.load_model(bundle, given | {"device": "auto"}, SILENT, rows=4)
    options.load_model(bundle, given | {"device": "cpu"}, SILENT, rows=4)
    assert loaded == [("tensorrt", 3), ("cuda", 1), ("cpu", 4), ("cpu", 4)]


def test_damaged_bundles(bundle: Path, tmp_path: Path) -> None:
    assert_one_line(internvl_edge("run", tmp_path, "x"), "not a bundle", MANIFEST)
    for name in ("decoder.data", "vision.onnx", "tokenizer.json", "embeddings.bin"):
        copy = copy_of(bundle, tmp_path / name)
        data = bytearray((copy / name).read_bytes())
        data[len(data) // 2] ^= 1
        (copy / name).write_bytes(data)
        assert_one_line(internvl_edge("run", copy, "x"), name, "SHA-256")
        (copy / name).write_bytes(data[:-1])
        assert_one_line(internvl_edge("run", copy, "x"), name, "bytes")
        (copy / name).unlink()
        assert_one_line(internvl_edge("run", copy, "x"), name, "missing")


def test_bundle_of_a_newer_format(bundle: Path, tmp_path: Path) -> None:
    copy = copy_of(bundle, tmp_path / "newer")
    values = json.loads((copy / MANIFEST).read_text())
    (copy / MANIFEST).write_text(json.dumps(values | {"format_version": values["format_version"] + 1}))
    assert_one_line(internvl_edge("run", copy, "x"), "format 3", "update internvl-edge")
    (copy / MANIFEST).write_text("{}")
    assert_one_line(internvl_edge("run", copy, "x"), "damaged", "format_version")


def copy_of(bundle: Path, folder: Path) -> Path:
    folder.mkdir()
    for path in bundle.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def test_outputs_that_exist_are_kept_unless_forced(checkpoint: Path, bundle: Path, tmp_path: Path) -> None:
    assert_one_line(internvl_edge("export", checkpoint, "-o", bundle), "exists", "--force")
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("years of work")
    assert_one_line(internvl_edge("export", checkpoint, "-o", precious, "--force"), "not a bundle")
    assert (precious / "thesis.txt").read_text() == "years of work"
    replaced = copy_of(bundle, tmp_path / "replaced")
    assert internvl_edge("export", checkpoint, "-o", replaced, "--force").returncode == 0
    assert internvl_edge("inspect", replaced).returncode == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["precious", "replaced"]
