"""llama.cpp's own converter and quantizer: cpu_gguf.py SOURCES CHECKPOINT OUT.

SOURCES is the folder of llama.cpp inside llama-cpp-python's source distribution. The converter recognizes tokenizers by
a hash over their output; that of random checkpoints is made up, so it is told which one to take. It has no merges
either, without which llama.cpp loads no vocabulary, so it gets one. The converter reads the configuration without the
names of its Python classes: transformers would ask whether to run them.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

_TOLD = """
import runpy, sys
sys.path.insert(0, {sources!r}); sys.path.insert(1, {sources!r} + "/gguf-py")
from conversion.base import TextModel
import gguf
TextModel.get_vocab_base_pre = lambda self, tokenizer: "qwen2"
add = gguf.SpecialVocab.add_to_gguf
def with_merges(self, *arguments, **keywords):
    self.merges = self.merges or ["a b"]
    add(self, *arguments, **keywords)
gguf.SpecialVocab.add_to_gguf = with_merges
sys.argv = ["convert_hf_to_gguf.py"] + {arguments!r}
runpy.run_path({sources!r} + "/convert_hf_to_gguf.py", run_name="__main__")
"""


def convert(sources: Path, arguments: list[str], target: Path) -> None:
    part = target.with_name(f"part-{target.name}")
    arguments = [*arguments, "--outfile", str(part)]
    subprocess.run([sys.executable, "-c", _TOLD.format(sources=str(sources), arguments=arguments)], check=True)
    part.replace(target)


def main() -> None:
    sources, checkpoint, out = map(Path, sys.argv[1:4])
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        # The converter names what it writes after the folder.
        plain = without_classes(checkpoint, Path(folder) / checkpoint.name)
        convert(sources, [str(plain), "--outtype", "f16"], out / "text-f16.gguf")
        for kind in ("f16", "q8_0"):
            convert(sources, [str(plain), "--mmproj", "--outtype", kind], out / f"mmproj-{kind}.gguf")


def without_classes(checkpoint: Path, folder: Path) -> Path:
    """A folder with links to the files of a checkpoint, and its configuration without `auto_map`."""
    folder.mkdir()
    for path in checkpoint.resolve().iterdir():
        (folder / path.name).symlink_to(path)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        part.pop("auto_map", None)
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


if __name__ == "__main__":
    main()
