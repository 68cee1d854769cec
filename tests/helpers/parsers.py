"""Everything that reads what others write, each with a maker of mutants: for the property tests and for `fuzz.py`.

A parser writes mutants into a folder of its own. `mutant` depends on the random numbers alone, so an input is made
again from its seed.
"""

from __future__ import annotations

import contextlib
import copy
import csv
import io
import json
import os
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
from PIL import Image
from safetensors.numpy import save_file

from helpers import tiny
from helpers.mutations import memory_folder, mutate_bytes, mutate_text, mutate_values, outcome
from helpers.repository import REPOSITORY
from helpers.tiny_config import Tiny, native_config, remote_config, side_files
from helpers.tiny_tokenizers import Vocabulary
from internvl_edge.base.errors import EdgeError
from internvl_edge.batch import inputs
from internvl_edge.batch.items import Ask, Item
from internvl_edge.batch.journal import open_journal
from internvl_edge.batch.rows import Row
from internvl_edge.bundle.manifest import DIGEST, Manifest, manifest_digest
from internvl_edge.bundle.names import MANIFEST
from internvl_edge.calibration.items import read_items
from internvl_edge.calibration.samples import SampleBuilder, good_samples
from internvl_edge.calibration.work import WorkFolder
from internvl_edge.checkpoint import layouts
from internvl_edge.checkpoint.codecs import autoawq, compressed_tensors
from internvl_edge.checkpoint.config_reader import read_config
from internvl_edge.checkpoint.json_files import read_json
from internvl_edge.checkpoint.quantization import read_quantization
from internvl_edge.checkpoint.safetensors_header import BITS, read_header
from internvl_edge.checkpoint.tensor_files import open_tensor_files
from internvl_edge.checkpoint.tokenizer_files import build_tokenizer, end_tokens, token_ids
from internvl_edge.evaluation import SCORES, read_suite
from internvl_edge.model import tokenizer as runtime
from internvl_edge.model.config import ModelConfig
from internvl_edge.model.linear import W8A8, Scheme
from internvl_edge.model.preprocess import load_image
from internvl_edge.planning.devices import Devices
from internvl_edge.planning.storage import checkpoint_storage
from internvl_edge.recipe.files import make_recipe, presets, read_recipe
from internvl_edge.runtime.engines.tensorrt.record import ENGINES, BuildOptions, EngineRecord

# The files of a mutant; None for one that is absent.
Files = dict[str, bytes | None]

VOCABULARY = Vocabulary(
    size=600, ids=dict.fromkeys(("<|endoftext|>", "<|im_end|>", "<s>", "</s>", "<IMG_CONTEXT>", "<|im_start|>"), 7)
)
LAYOUTS = (
    Tiny(),
    Tiny(text="internlm2", vision="6b", rope_scaling={"type": "dynamic", "factor": 2.0}),
    Tiny(layout="native"),
    Tiny(layout="native", transformers=4, text="llama", rope_scaling={"type": "linear", "factor": 2.0}),
    Tiny(layout="native", text="llama", vision="6b", rope_scaling={"type": "dynamic", "factor": 4.0}),
)
QUANTIZATIONS = (
    None,
    autoawq.configuration(32, ["vision_model", "mlp1"]),
    compressed_tensors.configuration({Scheme(4, 32, False): ["Linear"], W8A8: ["re:.*mlp.*"]}, ["lm_head"]),
)


class Parser(Protocol):
    """One reader, its mutants, and the seconds of CPU time and the MB of memory that one of them may take."""

    seconds: float
    memory_mb: float

    def mutant(self, rng: random.Random) -> Files:
        """Make the files of a mutant."""

    def read(self, files: Files) -> Any:
        """Read a mutant. EdgeError refuses it."""


def _json_text(rng: random.Random, values: Any, damaged: float = 0.1) -> bytes:
    """Values as JSON, with a share of texts that are damaged."""
    text = json.dumps(values)
    return (mutate_text(rng, text) if rng.random() < damaged else text).encode("utf-8", "surrogatepass")


def _write(folder: Path, files: Files) -> None:
    for name, content in files.items():
        path = folder / name
        if content is None:
            path.unlink(missing_ok=True)
        else:
            path.write_bytes(content)


class Config:
    """`config.json` with `quantization_config`, and the files of the processor beside it."""

    seconds = 0.2
    memory_mb = 50.0
    _NAMES = ("config.json", "processor_config.json", "preprocessor_config.json")
    _MORE = ("pad2square", "head_dim", "rope_parameters", "layer_types", "bnb_4bit", "config_groups", "image_size")

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._originals = [
            (remote_config if one.layout == "remote" else native_config)(one, VOCABULARY) for one in LAYOUTS
        ]
        self._sides = [side_files(one, VOCABULARY) for one in LAYOUTS]

    def mutant(self, rng: random.Random) -> Files:
        number = rng.randrange(len(LAYOUTS))
        files = copy.deepcopy({"config.json": self._originals[number]} | self._sides[number])
        if quantization := rng.choice(QUANTIZATIONS):
            section = rng.choice([files["config.json"], files["config.json"].get("llm_config", files["config.json"])])
            section["quantization_config"] = copy.deepcopy(quantization)
        for _ in range(rng.choice([1, 1, 1, 2, 3])):
            mutate_values(rng, files.get("config.json") if rng.random() < 0.9 else files)
        if rng.random() < 0.1 and isinstance(files.get("config.json"), dict):
            files["config.json"][rng.choice(self._MORE)] = rng.choice([None, True, 3, [], {}, {"type": []}])
        return {name: _json_text(rng, files[name], 0.05) if name in files else None for name in self._NAMES}

    def read(self, files: Files) -> ModelConfig:
        _write(self._folder, files)
        return read_whole_config(self._folder)


def read_whole_config(folder: Path) -> ModelConfig:
    """Everything that is read from a configuration before any tensor is."""
    config = read_config(folder)
    if layouts.supported(config):
        layouts.tensor_shapes(config)
        checkpoint_storage(folder, config)
    read_quantization(read_json(folder / "config.json"), config.vision)
    return config


class Header:
    """The header of a safetensors file."""

    seconds = 0.2
    memory_mb = 50.0
    _VALUES: tuple[Any, ...] = (
        *(16, 22, 23, 24, 25, [0], [0, 24], [24, 0], [0, 0], [2, 2, 1], [2**32, 2**32, 0], [0, 2**32, 2**32], [[1]]),
        *([1.0], ["1"], "I16", "F8_E4M3", "F4", "f32", [0, 1, 2], *BITS),
    )

    def __init__(self, folder: Path) -> None:
        self._path = folder / "x.safetensors"

    def mutant(self, rng: random.Random) -> Files:
        header: dict[str, Any] = {
            "__metadata__": {"format": "pt"},
            "a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
            "b": {"dtype": "BF16", "shape": [3], "data_offsets": [16, 22]},
            "c": {"dtype": "U8", "shape": [], "data_offsets": [22, 23]},
            "d": {"dtype": "F64", "shape": [4, 0], "data_offsets": [23, 23]},
            "e": {"dtype": "I8", "shape": [1], "data_offsets": [23, 24]},
        }
        for _ in range(rng.choice([0, 1, 1, 1, 2, 3])):
            mutate_values(rng, header, self._VALUES)
        text = _json_text(rng, header, 0.3)
        for _ in range(rng.choice([0, 0, 0, 1, 2])):
            text = mutate_bytes(rng, text)
        data = bytes(24 if rng.random() < 0.9 else rng.randrange(40))
        content = len(text).to_bytes(8, "little") + text + data
        return {self._path.name: content if rng.random() < 0.95 else mutate_bytes(rng, content)}

    def read(self, files: Files) -> Any:
        _write(self._path.parent, files)
        return read_header(self._path)


class Index:
    """`model.safetensors.index.json` over two shards."""

    seconds = 0.2
    memory_mb = 50.0
    _NAME = "model.safetensors.index.json"

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._shards = [f"model-{number:05}-of-00002.safetensors" for number in (1, 2)]
        for number, shard in enumerate(self._shards):
            save_file({f"{number}.{name}": np.zeros(3, np.float32) for name in "abc"}, folder / shard)

    def mutant(self, rng: random.Random) -> Files:
        values: dict[str, Any] = {"metadata": {"total_size": 72}}
        values["weight_map"] = {f"{n}.{name}": shard for n, shard in enumerate(self._shards) for name in "abc"}
        for _ in range(rng.choice([1, 1, 2])):
            mutate_values(rng, values, (*self._shards, "../x", "/etc/passwd", "0.a", "\0", ".", "a/b"))
        return {self._NAME: _json_text(rng, values, 0.2)}

    def read(self, files: Files) -> Any:
        _write(self._folder, files)
        return open_tensor_files(self._folder)


class BundleManifest:
    """`manifest.json` of both formats; its digest is made again for most mutants."""

    seconds = 0.2
    memory_mb = 50.0

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        old = [path.read_text(encoding="utf-8") for path in (REPOSITORY / "tests/data/format-1").glob("*.json")]
        self._originals = [json.loads(text) for text in sorted(old)]
        for text in sorted(old):
            _write(folder, {MANIFEST: text.encode()})
            Manifest.read(folder).write(folder)
            self._originals.append(json.loads((folder / MANIFEST).read_bytes()))

    def mutant(self, rng: random.Random) -> Files:
        values = copy.deepcopy(rng.choice(self._originals))
        for _ in range(rng.choice([1, 1, 1, 2])):
            mutate_values(rng, values)
        if DIGEST in values and "format_version" in values and rng.random() < 0.95:
            version = values.pop("format_version")
            del values[DIGEST]
            with contextlib.suppress(UnicodeEncodeError):
                values = {DIGEST: manifest_digest(values), **values}
            values = {"format_version": version, **values}
        return {MANIFEST: _json_text(rng, values, 0.05)}

    def read(self, files: Files) -> Manifest:
        _write(self._folder, files)
        return Manifest.read(self._folder)


class Images:
    """Images of every format that is read, in several of its forms."""

    seconds = 5.0
    memory_mb = 1500.0  # 100 million pixels, decoded, converted and cut

    def __init__(self, folder: Path) -> None:
        del folder
        pixels = np.random.default_rng(0).integers(0, 256, (24, 40, 4), np.uint8)
        rgba = Image.fromarray(pixels)
        rgb, grey = rgba.convert("RGB"), rgba.convert("L")
        deep = Image.fromarray((pixels[..., 0].astype(np.uint16) << 8) + pixels[..., 1])
        forms: list[tuple[Image.Image, str, dict[str, Any]]] = [
            *((rgb, "PNG", {}), (rgba, "PNG", {}), (grey, "PNG", {}), (deep, "PNG", {}), (rgb.convert("P"), "PNG", {})),
            *((rgb, "JPEG", {}), (rgb, "JPEG", {"progressive": True}), (rgb.convert("CMYK"), "JPEG", {})),
            *((rgb, "WEBP", {}), (rgba, "WEBP", {"lossless": True}), (rgb, "BMP", {}), (rgb.convert("1"), "BMP", {})),
            *((rgb, "GIF", {}), (grey, "GIF", {"save_all": True, "append_images": [grey.rotate(90)]})),
            *((rgb, "TIFF", {}), (rgb, "TIFF", {"compression": "tiff_lzw"}), (deep, "TIFF", {})),
            *((rgb, "TIFF", {"compression": "jpeg"}), (rgb.convert("1"), "TIFF", {"compression": "group4"})),
            *((rgb, "PPM", {}), (grey, "PPM", {}), (rgb, "AVIF", {}), (rgb, "JPEG2000", {})),
        ]
        self._originals: list[bytes] = []
        for image, kind, options in forms:
            file = io.BytesIO()
            with contextlib.suppress(KeyError, OSError):  # a Pillow without this format
                image.save(file, kind, **options)
                self._originals.append(file.getvalue())

    def mutant(self, rng: random.Random) -> Files:
        data = rng.choice(self._originals)
        for _ in range(rng.choice([1, 1, 1, 2, 3, 8])):
            if rng.random() < 0.5:  # headers are short beside the pixels
                size = min(len(data), 128)
                data = mutate_bytes(rng, data[:size]) + data[size:]
            else:
                data = mutate_bytes(rng, data)
        return {"image": data}

    def read(self, files: Files) -> Image.Image:
        return load_image(files["image"] or b"")


class Record:
    """`engine.json` of a folder of TensorRT engines."""

    seconds = 0.2
    memory_mb = 50.0
    _NAME = "engine.json"

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "fake"
        self._folder.mkdir()
        for name in ENGINES.values():
            (self._folder / name).write_bytes(b"engine")
        files = {name: {"bytes": 6, "sha256": "0" * 64} for name in ENGINES.values()}
        EngineRecord(
            "fake", "tensorrt_rtx", "1.7.1", (86, 89), BuildOptions("float16"), {"vision.onnx": "0" * 64}, files
        ).write(self._folder)
        self._original = json.loads((self._folder / self._NAME).read_bytes())

    def mutant(self, rng: random.Random) -> Files:
        values = copy.deepcopy(self._original)
        for _ in range(rng.choice([1, 1, 2])):
            mutate_values(rng, values)
        return {self._NAME: _json_text(rng, values, 0.1)}

    def read(self, files: Files) -> EngineRecord:
        _write(self._folder, files)
        return EngineRecord.read(self._folder)


class TokenizerFiles:
    """The tokenizer files of the three layouts, and the `tokenizer.json` that is made of them."""

    seconds = 2.0
    memory_mb = 50.0
    _FILES: ClassVar = {
        "qwen2": (
            *("tokenizer_config.json", "added_tokens.json", "special_tokens_map.json", "vocab.json", "merges.txt"),
        ),
        "internlm2": ("tokenizer_config.json", "added_tokens.json", "special_tokens_map.json", "tokenizer.model"),
        "native": ("tokenizer.json", "tokenizer_config.json", "generation_config.json"),
    }

    def __init__(self, folder: Path) -> None:
        self._made = folder / "tokenizer.json"
        self._folders: dict[str, tuple[Path, ModelConfig, dict[str, bytes]]] = {}
        for kind, names in self._FILES.items():
            choices: dict[str, Any] = {"layout": "native"} if kind == "native" else {"text": kind}
            made = tiny.write_checkpoint(folder / kind, **choices)
            self._folders[kind] = made, read_config(made), {name: (made / name).read_bytes() for name in names}

    def mutant(self, rng: random.Random) -> Files:
        kind = rng.choice(list(self._FILES))
        name = rng.choice(self._FILES[kind])
        original = self._folders[kind][2][name]
        if not name.endswith(".json") or rng.random() < 0.1:
            return {f"{kind}/{name}": mutate_bytes(rng, original)}
        values = json.loads(original)
        for _ in range(rng.choice([1, 1, 2])):
            mutate_values(rng, values)
        return {f"{kind}/{name}": _json_text(rng, values, 0.05)}

    def read(self, files: Files) -> Any:
        (place,) = files
        kind, _, name = place.partition("/")
        folder, config, originals = self._folders[kind]
        _write(folder, {name: files[place]})
        try:
            made = build_tokenizer(folder, config)
            token_ids(made, end_tokens(folder, config))
            self._made.write_bytes(made)
            return runtime.Tokenizer(self._made).encode("Hello <img> \u56fe")
        finally:
            _write(folder, {name: originals[name]})


_DEVICES = (REPOSITORY / "internvl_edge/planning/devices.toml").read_text(encoding="utf-8")


class _Toml:
    """A file in TOML, whose mutants are texts."""

    seconds = 0.5
    memory_mb = 50.0
    _ORIGINALS: tuple[str, ...]

    def __init__(self, folder: Path) -> None:
        self._path = folder / "x.toml"

    def mutant(self, rng: random.Random) -> Files:
        text = rng.choice(self._ORIGINALS)
        for _ in range(rng.choice([1, 1, 2, 3])):
            lines = text.split("\n")
            place = rng.randrange(len(lines))
            if rng.random() < 0.5 and "=" in lines[place]:
                values = ("1", "-1", "0", "true", '""', '"x"', "[]", "{}", "nan", "inf", "9" * 400, "1e400", '["a"]')
                lines[place] = f"{lines[place].partition('=')[0]}= {rng.choice(values)}"
                text = "\n".join(lines)
            elif rng.random() < 0.2:
                lines.insert(rng.randrange(len(lines)), lines[place])
                text = "\n".join(lines)
            else:
                text = mutate_text(rng, text)
        data = text.encode("utf-8", "surrogatepass")
        return {self._path.name: mutate_bytes(rng, data) if rng.random() < 0.1 else data}


class RecipeToml(_Toml):
    """A recipe."""

    _ORIGINALS = (
        'base = "cpu"\ndecoder = "w4a16-awq"\ngroup_size = 64\nsymmetric = true\nlm_head = "int8"\nkv_cache = "int8"\n',
        'decoder = "w8a8"\nvision = "int8"\n\n[decoder_int8]\nmax_kl = 0.02\n[vision_int8]\ncalibrator = "best"\n'
        "smoothing = true\n"
        'cosine = 0.9997\nkeep = ["projector.*"]\n[layers]\n"layers.0.*" = "w8a16"\n"*.down_proj" = "fp"\n',
        'decoder = "w4a16-rtn"\nerror_compensation = false\n[automatic]\ntarget_bits = 5.0\n',
    )

    def read(self, files: Files) -> Any:
        _write(self._path.parent, files)
        presets()
        return make_recipe(read_recipe(str(self._path)))


class DevicesToml(_Toml):
    """A table of devices of the user's own."""

    _ORIGINALS = ("[devices." + "[devices.".join(_DEVICES.rsplit("[devices.", 4)[1:]), _DEVICES)

    def read(self, files: Files) -> Any:
        _write(self._path.parent, files)
        devices = Devices(self._path)
        return devices.all, devices.groups


class CalibrationData:
    """JSON Lines of calibration data, read and made into tokens and tiles."""

    seconds = 2.0
    memory_mb = 50.0
    _NAME = "data.jsonl"

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        checkpoint = tiny.write_checkpoint(folder / "checkpoint")
        config = read_config(checkpoint)
        made = folder / "tokenizer.json"
        made.write_bytes(build_tokenizer(checkpoint, config))
        self._builder = SampleBuilder(config, made, 1, 512)
        Image.new("RGB", (20, 10)).save(folder / "0.png")

    def mutant(self, rng: random.Random) -> Files:
        lines = []
        for number in range(rng.randrange(1, 5)):
            values: dict[str, Any] = {"images": ["0.png"] * (number % 2), "prompt": f"what is {number}", "answer": "a"}
            if rng.random() < 0.7:
                more = ("<image>", "<image><image>", "<IMG_CONTEXT>", "0.png", ["0.png"], ["absent.png"], ["\0"], ["."])
                mutate_values(rng, values, more)
            lines.append(_json_text(rng, values, 0.2))
        text = b"\n".join(lines)
        return {self._NAME: mutate_bytes(rng, text) if rng.random() < 0.1 else text}

    def read(self, files: Files) -> Any:
        _write(self._folder, files)
        items = read_items(self._folder / self._NAME)
        return list(good_samples(items, self._builder, 8, 1, lambda line: None))


class SuiteData:
    """Questions of a suite in each format, read with their images and scored."""

    seconds = 1.0
    memory_mb = 50.0
    _ENTRIES: ClassVar[list[dict[str, Any]]] = [
        {"images": ["0.png"], "prompt": "what", "answer": ["a", "b"], "tags": ["x"], "choices": ["a", "b"], "id": 3},
        {"messages": [{"role": "user", "content": "what"}, {"role": "assistant", "content": "3"}], "id": "m"},
        {"questionId": 3, "question": "what", "image": "0.png", "answers": ["12%"], "question_types": ["form"]},
        {"imgname": "0.png", "query": "how many", "label": "12.5"},
        {
            "dataset_name": "HME100k",
            "id": 1,
            "image_path": "0.png",
            "question": "what",
            "answers": "x ^ 2",
            "type": "f",
        },
        {"id": "val_Art_1", "question": "<image 1>?", "options": "['a', 'b']", "image_1": "0.png", "answer": "B"},
    ]

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        Image.new("RGB", (20, 10)).save(folder / "0.png")

    def mutant(self, rng: random.Random) -> Files:
        name = rng.choice(["data.json", "data.jsonl"])
        chosen = rng.choice(self._ENTRIES)
        entries = [copy.deepcopy(chosen) for _ in range(rng.randrange(1, 4))]
        for entry in entries:
            if rng.random() < 0.5:
                mutate_values(rng, entry, ("0.png", ["0.png"], ["absent.png"], "[" * 99, "A", ["a"] * 30, "<image 9>"))
        if name == "data.jsonl":
            text = b"\n".join(_json_text(rng, entry) for entry in entries)
        else:
            text = _json_text(rng, {"data": entries} if rng.random() < 0.5 else entries)
        text = mutate_bytes(rng, text) if rng.random() < 0.1 else text
        return {"data.json": None, "data.jsonl": None} | {name: text}

    def read(self, files: Files) -> Any:
        _write(self._folder, files)
        name = next(name for name, content in files.items() if content is not None)
        suite = read_suite(str(self._folder / name))
        answers = ("B", "12.4", "what", *(case.answer for case in suite.cases))
        return [
            {metric: SCORES[metric].of(answer, case) for metric in suite.metrics if SCORES[metric].applies(case)}
            for answer in answers
            for case in suite.cases
        ]


class Arguments:
    """Arguments of the command line, run in this process; what they name is absent, empty or a configuration."""

    seconds = 20.0
    memory_mb = 500.0  # commands import what they need
    _COMMANDS = (
        "inspect",
        "calibrate",
        "quantize",
        "export",
        "devices",
        "plan",
        "build",
        "run",
        "chat",
        "batch",
        "evaluate",
        "bench",
    )
    _WORDS = (
        *("ckpt", "empty", "absent", "text.txt", "out", "-", "--", "", " ", "\udcff", "\u56fe", "a" * 3000, "[", "%s"),
        *("-h", "--help", "--json", "--version", "-o", "--output", "--device", "--engine", "--recipe", "--threads"),
        *("--context", "--image", "--data", "--samples", "--seed", "--scheme", "--group-size", "--set", "--devices"),
        *("--max-new-tokens", "--temperature", "--stop", "--layer", "--dtype", "--dialect", "--fail-if", "--nonsense"),
        *("--suite", "--metric", "--images", "anls", "anls<0.5"),
        *("0", "1", "-1", "64", "1e9", "9" * 40, "nan", "inf", "cpu", "tensorrt", "float16", "w8a8", "kl>0.05", "a=b"),
        *("rtx-4060", "orin", "x.toml", "layers.*=w8a16", "onnxruntime"),
    )

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        (folder / "empty").mkdir()
        (folder / "ckpt").mkdir()
        (folder / "text.txt").write_text("text")
        (folder / "ckpt" / "config.json").write_text(json.dumps(remote_config(Tiny(), VOCABULARY)))

    def mutant(self, rng: random.Random) -> Files:
        words = [rng.choice(self._COMMANDS)] if rng.random() < 0.95 else []
        words += rng.choices(self._WORDS, k=rng.randrange(7))
        if rng.random() < 0.1:
            words = [mutate_text(rng, word).replace("/", "") for word in words]
        return {
            "arguments": "\n".join(word.replace("\n", "").replace("\0", "") for word in words).encode(
                "utf-8", "surrogateescape"
            )
        }

    def read(self, files: Files) -> str:
        from internvl_edge import cli

        words = (files["arguments"] or b"").decode("utf-8", "surrogateescape").split("\n")
        out, error = io.StringIO(), io.StringIO()
        argv, stdin, here = sys.argv, sys.stdin, Path.cwd()
        sys.argv, sys.stdin = ["internvl-edge", *words], io.StringIO()
        try:
            os.chdir(self._folder)
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
                status = cli._status()
        finally:
            sys.argv, sys.stdin = argv, stdin
            os.chdir(here)
        said = error.getvalue()
        if status == 2:
            assert said.count("\n") == 1, said
            assert said.startswith("internvl-edge: error: "), said
            raise EdgeError(said.removeprefix("internvl-edge: error: ").rstrip("\n"))
        assert status == 0, (status, said)
        return out.getvalue()


class BatchTable:
    """A table of questions, as JSONL or as CSV."""

    seconds = 0.5
    memory_mb = 50.0
    _ROW: ClassVar = {
        "id": "1",
        "images": ["0.png"],
        "prompt": "What?",
        "choices": ["a", "b"],
        "votes": 3,
        "sure": 0.9,
        "max_tiles": 2,
        "max_new_tokens": 5,
        "temperature": 0.5,
        "stop": ["x"],
        "exif": True,
        "label": "z",
    }
    _MORE = ("id", "image", "regex", "json_schema", {"type": "object"}, "(", ["a", "a"], [""], "promt", "[1", "true")

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def mutant(self, rng: random.Random) -> Files:
        rows: list[dict[str, Any]] = []
        for number in range(rng.randrange(1, 4)):
            rows.append(copy.deepcopy(self._ROW) | {"id": str(number)})
            if rng.random() < 0.7:
                mutate_values(rng, rows[-1], self._MORE)
        if rng.random() < 0.5:
            return {"table.csv": None, "table.jsonl": b"\n".join(_json_text(rng, row) for row in rows)}
        out = io.StringIO()
        writer = csv.writer(out)
        writer.writerow(rows[0])
        for row in rows:
            writer.writerow([each if isinstance(each, str) else json.dumps(each) for each in row.values()])
        text = out.getvalue().encode("utf-8", "surrogatepass")
        return {"table.jsonl": None, "table.csv": mutate_bytes(rng, text) if rng.random() < 0.5 else text}

    def read(self, files: Files) -> list[Item]:
        _write(self._folder, files)
        (name,) = [name for name, content in files.items() if content is not None]
        return inputs.read_items(self._folder / name, Ask("What?")).items


class BatchJournal:
    """The journal of an unfinished batch, and its record. Rows that are read are those that were written."""

    seconds = 0.5
    memory_mb = 50.0
    _RECORD: ClassVar = {"bundle": "0" * 64, "prompt": "What?", "options": {"seed": 1}, "versions": {"numpy": "2"}}
    _NAME = "out.jsonl"

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._items = [Item(str(number), f"line {number}", Ask("What?")) for number in range(4)]
        with open_journal(folder / self._NAME, self._RECORD) as journal:
            for item in self._items[:3]:
                journal.write(Row(item.id, "answer", request=item.request))
        self._originals = {path.name: path.read_bytes() for path in folder.iterdir()}
        self._lines = self._originals[self._NAME].splitlines()

    def mutant(self, rng: random.Random) -> Files:
        files: Files = dict(self._originals)
        for _ in range(rng.choice([1, 1, 2])):
            name = rng.choice(list(files))
            files[name] = None if rng.random() < 0.1 else mutate_bytes(rng, files[name] or b"")
        return files

    def read(self, files: Files) -> int:
        _write(self._folder, files)
        with open_journal(self._folder / self._NAME, self._RECORD) as journal:
            left = journal.unfinished(self._items)
            for item in left:
                journal.write(Row(item.id, "answer", request=item.request))
        lines = (self._folder / self._NAME).read_bytes().splitlines()
        assert sorted(set(journal.finished) & {item.id for item in self._items}) == ["0", "1", "2", "3"]
        assert len(lines) == len(journal.finished)
        return len(left)


class State:
    """The work folder of an unfinished run. What is read must be what was written."""

    seconds = 0.5
    memory_mb = 50.0
    _RUN: ClassVar = {"version": 1, "checkpoint": "0" * 64, "recipe": {"decoder": "w8a16"}}

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "work"
        with WorkFolder(self._folder, self._RUN) as work:
            work.write_json("decoder.json", {"block": 3, "choices": {"a": [1, 2, 3]}})
            work.write_arrays("statistics.npz", {"a": np.arange(12, dtype=np.float32)})
            with work.writing("hidden.f32") as path:
                path.write_bytes(np.arange(40, dtype=np.float32).tobytes())
        self._originals = {path.name: path.read_bytes() for path in self._folder.iterdir()}
        self._expected = self._values(WorkFolder(self._folder, self._RUN))

    def mutant(self, rng: random.Random) -> Files:
        files: Files = dict(self._originals)
        for _ in range(rng.choice([1, 1, 2])):
            name = rng.choice(list(files))
            files[name] = None if rng.random() < 0.2 else mutate_bytes(rng, files[name] or b"")
        return files

    def read(self, files: Files) -> Any:
        self._folder.mkdir(exist_ok=True)
        _write(self._folder, files)
        values = self._values(WorkFolder(self._folder, self._RUN))
        wrong = [name for name, value in values.items() if value is not None and value != self._expected[name]]
        assert not wrong, f"{wrong} are read as something else than was written"
        return values

    @staticmethod
    def _values(work: WorkFolder) -> dict[str, Any]:
        arrays = work.read_arrays("statistics.npz")
        return {
            "json": work.read_json("decoder.json"),
            "arrays": None if arrays is None else {name: array.tolist() for name, array in arrays.items()},
            "other": work.need("hidden.f32").read_bytes() if work.has("hidden.f32") else None,
        }


def outcomes(make: Callable[[Path], Parser], count: int, seed: int = 0) -> Iterator[tuple[Files, Any, str | None]]:
    """Read so many mutants; yield each with what it is read as, and with the line that refuses it.

    Raises:
        AssertionError: an input breaks a bound (see `outcome`). It is printed, as for anything else that is raised.
    """
    with memory_folder() as folder:
        parser = make(folder)
        for number in range(count):
            files = parser.mutant(random.Random(f"{seed}/{number}"))
            try:
                result, line = outcome(lambda: parser.read(files), parser.seconds, parser.memory_mb)  # noqa: B023
            except BaseException:
                print(f"mutant {number}: {str(files)[:6000]}")
                raise
            yield files, result, line


PARSERS: dict[str, Callable[[Path], Parser]] = {
    "config.json": Config,
    "safetensors header": Header,
    "safetensors index": Index,
    "manifest.json": BundleManifest,
    "images": Images,
    "engine.json": Record,
    "tokenizer files": TokenizerFiles,
    "recipe TOML": RecipeToml,
    "device TOML": DevicesToml,
    "calibration JSONL": CalibrationData,
    "suites": SuiteData,
    "batch table": BatchTable,
    "batch journal": BatchJournal,
    "arguments": Arguments,
    "work state": State,
}
