"""Does a rotation of the residual stream make SmolLM2 easier to quantize? Hadamard matrices, folded into the weights.

    python benchmarks/settled/rotations.py WORK [--row NAME ...]

WORK is the folder of `smollm_awq.py`. Norm weights go into the linears behind them; then the token table, the
projector's last linear, and the output of each block are multiplied by R, and what reads the stream by its inverse
(QuaRot; Ashkboos et al., 2024, arXiv:2404.00456). The values and the output projection of each head are rotated against
each other too. The float model stays the same, which the first row shows; no device computes anything more. The input
of down_proj cannot be rotated like that. Rows without a rotation are those of `smollm-learned.json` and
`smollm-precision.json`. Results: results/rotations.json.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import _path  # noqa: F401
import click
import numpy as np
from numpy.typing import NDArray
from record import run_measured, write_results
from smollm_awq import HERE, Bench, _write_calibration_set

from internvl_edge.checkpoint.reader import Checkpoint
from internvl_edge.checkpoint.tensor_files import OutTensor, open_tensor_files, write_file
from internvl_edge.model.config import DecoderConfig

Array = NDArray[np.float32]

ROWS: dict[str, dict[str, Any] | None] = {
    "float": None,
    "w4a16-awq": {"decoder": "w4a16-awq", "group_size": 64},
    "w4a16-awq, symmetric": {"decoder": "w4a16-awq", "group_size": 64, "symmetric": True},
    "w4a16-rtn": {"decoder": "w4a16-rtn", "group_size": 64},
    "w8a8, all": {"decoder": "w8a8", "decoder_int8": {"max_kl": 0.0}},
    "w8a8": {"decoder": "w8a8"},
}
# Paley's second construction makes a Hadamard matrix of order 36 of it.
_PRIME = 17
_NORMS = {"attention.wqkv": "attention_norm", "feed_forward.w1": "ffn_norm", "feed_forward.w3": "ffn_norm"}


def hadamard(size: int) -> NDArray[np.float64]:
    """An orthogonal matrix of equal magnitudes, [size, size]; the size is a power of two, or 36 times one."""
    if size % 36 == 0:
        squares = {value * value % _PRIME for value in range(1, _PRIME)}
        signs = [0, *(1 if value in squares else -1 for value in range(1, _PRIME))]
        conference = np.ones((_PRIME + 1, _PRIME + 1))
        conference[0, 0] = 0
        conference[1:, 1:] = [[signs[(a - b) % _PRIME] for b in range(_PRIME)] for a in range(_PRIME)]
        made = np.kron(conference, [[1, 1], [1, -1]]) + np.kron(np.eye(_PRIME + 1), [[1, -1], [-1, -1]])
    else:
        made = np.ones((1, 1))
    while len(made) < size:
        made = np.kron([[1, 1], [1, -1]], made)
    assert len(made) == size
    return made / np.sqrt(size)


def rotated(tensors: dict[str, Array], decoder: DecoderConfig) -> Iterator[tuple[str, Array]]:
    """The tensors of an InternLM2 layout, after the rotation."""
    signs = np.random.default_rng(0).choice([-1.0, 1.0], decoder.hidden_size)
    r, head = hadamard(decoder.hidden_size) * signs[:, None], hadamard(decoder.head_dim)
    for name, stored in tensors.items():
        values, kind = stored.astype(np.float64), name.removesuffix(".weight").rpartition(".")[2]
        if kind.endswith("norm"):
            values = np.ones_like(values)
        elif norm := _norm_before(name):
            values = values * tensors[norm] @ r
        elif kind in ("wo", "w2") or name == "mlp1.3.weight":
            values = r.T @ values
        elif kind == "tok_embeddings" or name == "mlp1.3.bias":
            values = values @ r
        if kind == "wqkv":
            parts = values.reshape(decoder.num_key_value_heads, -1, decoder.head_dim, decoder.hidden_size)
            parts[:, -1] = head.T @ parts[:, -1]
        elif kind == "wo":
            values = (values.reshape(len(values), -1, decoder.head_dim) @ head).reshape(values.shape)
        yield name, values.astype(np.float32)


def _norm_before(name: str) -> str | None:
    """The norm weight in front of a linear, or None."""
    if name == "language_model.output.weight":
        return "language_model.model.norm.weight"
    for kind, norm in _NORMS.items():
        if name.endswith(f".{kind}.weight"):
            return name.replace(kind, norm)
    return None


class RotatedBench(Bench):
    """`smollm_awq`'s folder, with a rotated checkpoint."""

    @property
    def rotated(self) -> Path:
        """The rotated checkpoint."""
        return self.work / "internlm2-rotated"

    def rotate(self) -> None:
        """Write the rotated checkpoint and its calibration set."""
        if self.rotated.exists():
            return
        new = self.rotated.with_suffix(".new")
        shutil.rmtree(new, ignore_errors=True)
        shutil.copytree(self.checkpoint, new, ignore=shutil.ignore_patterns("*.safetensors"))
        tensors = {name: stored.read() for name, stored in open_tensor_files(self.checkpoint).items()}
        decoder = Checkpoint(self.checkpoint).config.decoder
        write_file(new / "model.safetensors", [OutTensor.of(*pair) for pair in rotated(tensors, decoder)])
        new.rename(self.rotated)

    def row(self, name: str) -> dict[str, Any]:
        """Make a row's weights and their figures, or read what was found before."""
        brief = f"rotated-{name.replace(', ', '-')}"
        found, out = self.work / "figures" / f"{brief}.json", self.work / "weights" / brief
        if found.exists():
            return dict(json.loads(found.read_text(encoding="utf-8")))
        recipe, values = ROWS[name], dict[str, Any](name=name, recipe=ROWS[name])
        if recipe is not None:
            data, cost = self.work / "calibration-rotated", out.with_name(f"{out.name}.json")
            if not data.exists():
                _write_calibration_set(data, self.rotated, self.calibration_tokens())
            if not cost.exists():
                paths = [str(path) for path in (self.rotated, data, out)]
                command = [sys.executable, str(HERE / "peers" / "run_ours.py"), *paths, json.dumps(recipe)]
                cost.write_text(json.dumps({"cpu_s": round(run_measured(command, interval_s=0.5).cpu_s)}))
            said = json.loads(out.with_name(f"{out.name}.report.json").read_text(encoding="utf-8"))
            values |= {"predicted_kl": said["predicted_kl"], "cost": json.loads(cost.read_text())}
            kinds = [linear["scheme"] for linear in said["linears"]]
            values["int8_inputs"] = sum(bool(kind and kind["static_inputs"]) for kind in kinds)
        values |= self.figures(self.rotated if recipe is None else out)
        found.write_text(json.dumps(values, indent=1), encoding="utf-8")
        return values


@click.command()
@click.argument("work", type=click.Path(path_type=Path))
@click.option("--row", "names", multiple=True, help="Only these [default: all].")
def main(work: Path, names: tuple[str, ...]) -> None:
    """Measure all rows and write the results."""
    bench = RotatedBench(work.absolute(), None)
    bench.prepare()
    bench.rotate()
    for name in names or ROWS:
        figures = bench.row(name)["all"]
        click.echo(f"{name:24} KL {figures['kl_mean']:.5f}, p99 {figures['kl_p99']:.3f}")
    found = [bench.work / "figures" / f"rotated-{name.replace(', ', '-')}.json" for name in ROWS]
    rows = [json.loads(path.read_text(encoding="utf-8")) for path in found if path.exists()]
    write_results("rotations", {"calibration_tokens": int(bench.calibration_tokens().size), "results": rows})


if __name__ == "__main__":
    main()
