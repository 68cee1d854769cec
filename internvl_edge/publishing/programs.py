"""Which other programs load a quantized checkpoint, the command for each, and why one does not load it.

What is said of vLLM was tried on a CPU (docs/quality.md, "Loaded by vLLM"), except for 4-bit heads and what only GPUs
compute, which was read in vLLM's source. What is said of LMDeploy was read in the source of its TurboMind engine, which
runs on NVIDIA GPUs only, and not tried.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass

from internvl_edge.model.linear import Scheme

Schemes = Mapping[str, Scheme | None]

# Linears that servers join to one, which needs one scheme for all of them.
_JOINED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
# Group sizes that LMDeploy reads: with zero points (AutoAWQ's format), and without (compressed-tensors).
_LMDEPLOY_GROUPS = {False: (128,), True: (32, 128)}


@dataclass(frozen=True)
class Program:
    """A program and a checkpoint.

    Attributes:
        name: of the program.
        command: serves the checkpoint.
        obstacles: why it is not loaded anywhere, one reason each; empty where nothing is known that prevents it.
        only_gpu: why a CPU does not load it although an NVIDIA GPU may; "" for nothing.
        tried: False where the program's source says that it loads such a checkpoint, but nobody here has tried it.
    """

    name: str
    command: str
    obstacles: tuple[str, ...] = ()
    only_gpu: str = ""
    tried: bool = True


def programs(schemes: Schemes, layout: str, *place: str) -> tuple[Program, ...]:
    """Return what is known of other programs and a checkpoint.

    Args:
        schemes: the scheme of each quantized linear by canonical name, None or absent for floats.
        layout: of the checkpoint, as in `ModelConfig`. All but that of transformers need the original's Python files.
        place: how commands name the checkpoint: words of a command line.
    """
    return vllm(schemes, layout, *place), lmdeploy(schemes, layout, *place)


def vllm(schemes: Schemes, layout: str, *place: str) -> Program:
    """Return what is known of vLLM and a checkpoint; for the arguments, see `programs`."""
    obstacles, own_code = [], layout != "native"
    if any(name.startswith("projector.") and scheme for name, scheme in schemes.items()):
        obstacles.append("its projector is quantized, and vLLM builds the projector from plain linears")
    if not own_code and any(name.startswith("vision.") and scheme for name, scheme in schemes.items()):
        obstacles.append("its tower is quantized, and vLLM builds the tower of transformers' layout from plain linears")
    if any(_differ(name, schemes) for name in schemes):
        obstacles.append("linears that vLLM joins (q, k and v; gate and up) have different schemes")
    wide = sorted(name for name, scheme in schemes.items() if scheme and scheme.bits == 8 and not scheme.static_inputs)
    only_gpu = f"{len(wide)} linear{'s have' if len(wide) > 1 else ' has'} 8-bit weights with float inputs"
    command = shlex.join(["vllm", "serve", *place, *(["--trust-remote-code"] if own_code else [])])
    head = schemes.get("decoder.lm_head")
    tried = not wide and (head is None or head.bits == 8)
    return Program("vLLM", command, tuple(obstacles), only_gpu if wide else "", tried)


def lmdeploy(schemes: Schemes, layout: str, *place: str) -> Program:
    """Return what LMDeploy's source says of a checkpoint; for the arguments, see `programs`."""
    obstacles = []
    found = {name: scheme for name, scheme in schemes.items() if scheme}
    kinds = set(found.values())
    if layout == "native":
        obstacles.append("LMDeploy's TurboMind reads the layout of the original's own code alone")
    if any(not name.startswith("decoder.layers.") for name in found):
        obstacles.append("LMDeploy reads quantized weights in the decoder's layers alone")
    elif len(kinds) > 1 or any(_differ(name, schemes) for name in schemes):
        obstacles.append("LMDeploy reads one scheme for all linears of the decoder's layers")
    elif any(scheme.bits != 4 for scheme in kinds):
        obstacles.append("LMDeploy reads 4-bit weights alone")
    elif any(scheme.group_size not in _LMDEPLOY_GROUPS[scheme.symmetric] for scheme in kinds):
        sizes = {symmetric: " or ".join(map(str, each)) for symmetric, each in _LMDEPLOY_GROUPS.items()}
        obstacles.append(f"LMDeploy reads groups of {sizes[False]} with zero points, and of {sizes[True]} without")
    command = shlex.join(["lmdeploy", "serve", "api_server", *place, "--backend", "turbomind"])
    return Program("LMDeploy", command, tuple(obstacles), "it runs on NVIDIA GPUs alone", tried=False)


def _differ(name: str, schemes: Schemes) -> bool:
    """Return whether a linear's scheme is another than that of the linears that servers join it with."""
    layer, _, own = name.rpartition(".")
    for group in _JOINED:
        if own in group:
            return len({schemes.get(f"{layer}.{other}") for other in group}) > 1
    return False
