"""The text model of a remote-code InternVL checkpoint as a folder of its own: cpu_text_model.py CHECKPOINT OUT.

One-file safetensors with a Qwen2 text model; for peers that know no InternVL. Needs safetensors and torch.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file

PREFIX = "language_model."


def main() -> None:
    source, out = map(Path, sys.argv[1:3])
    out.mkdir(parents=True)
    with safe_open(source / "model.safetensors", "pt") as file:
        names = [name for name in file.keys() if name.startswith(PREFIX)]  # noqa: SIM118
        save_file(
            {n.removeprefix(PREFIX): file.get_tensor(n) for n in names}, out / "model.safetensors", {"format": "pt"}
        )
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))["llm_config"]
    (out / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    for path in source.glob("*token*.json"):
        shutil.copy(path, out)
    for name in ("vocab.json", "merges.txt", "generation_config.json"):
        if (source / name).exists():
            shutil.copy(source / name, out)


if __name__ == "__main__":
    main()
