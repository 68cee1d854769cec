"""llama.cpp's own converter and quantizer: cpu_gguf.py SOURCES CHECKPOINT OUT.

SOURCES is the folder of llama.cpp inside llama-cpp-python's source distribution. The converter recognizes tokenizers by
a hash over their output; that of random checkpoints is made up, so it is told which one to take. It has no merges
either, without which llama.cpp loads no vocabulary, so it gets one.
"""

from __future__ import annotations

import subprocess
import sys
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


def convert(sources: Path, arguments: list[str]) -> None:
    subprocess.run([sys.executable, "-c", _TOLD.format(sources=str(sources), arguments=arguments)], check=True)


def main() -> None:
    sources, checkpoint, out = map(Path, sys.argv[1:4])
    out.mkdir(parents=True, exist_ok=True)
    convert(sources, [str(checkpoint), "--outtype", "f16", "--outfile", str(out / "text-f16.gguf")])
    for kind in ("f16", "q8_0"):
        convert(
            sources, [str(checkpoint), "--mmproj", "--outtype", kind, "--outfile", str(out / f"mmproj-{kind}.gguf")]
        )


if __name__ == "__main__":
    main()
