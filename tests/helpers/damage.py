"""Damage to the weights of a checkpoint, and to the state of an unfinished run."""

from __future__ import annotations

from pathlib import Path
from random import Random

from safetensors.torch import load_file, save_file


def poison(checkpoint: Path, name: str, value: float) -> None:
    """Replace one number of a stored tensor."""
    tensors = load_file(checkpoint / "model.safetensors")
    tensors[name].view(-1)[5] = value
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})


def damage_state(folder: Path, random: Random) -> str:
    """Do one thing to one file of a work folder that a power failure, a disk or a user might do; says which."""
    path = random.choice(sorted(path for path in folder.rglob("*") if path.is_file()))
    kinds = ("truncate", "zero", "flip", "remove") if path.stat().st_size else ("remove",)
    kind = random.choice(kinds)
    if kind == "remove":
        path.unlink()
        return f"{path.name}: removed"
    data = bytearray(path.read_bytes())
    place = random.randrange(len(data))
    if kind == "truncate":
        del data[place:]
    elif kind == "zero":
        data[place : place + 512] = bytes(len(data[place : place + 512]))
    else:
        data[place] ^= 1 << random.randrange(8)
    path.write_bytes(data)
    return f"{path.name}: {kind} at {place}"
