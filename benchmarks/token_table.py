"""What the form of the token table costs: divergence on SmolLM2, exact answers of the demo readers, and bytes.

    python benchmarks/smollm_checkpoint.py CHECKPOINT --layout internlm2
    python benchmarks/token_table.py CHECKPOINT WORK

One decoder reads its embeddings from one table after the other, so that nothing else differs. SmolLM2 runs with float
weights and with 4-bit weights and an int8 head (groups of 64, rounded to nearest), over the texts of `int8_prompts.py`;
every table is compared with the float32 one before the same decoder. The readers have such 4-bit weights, too, and
answer the suite. Bytes are those of a 1B. WORK keeps what was made. Results: results/token-table.json.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import int8_prompts
import numpy as np
from record import write_results

from internvl_edge import InternVL, export_bundle
from internvl_edge.bundle.bundle import Bundle
from internvl_edge.evaluation import QuestionSettings, read_suite, run_suite
from internvl_edge.runtime.engines.onnxruntime import OnnxRuntimeEngine

ROOT = Path(__file__).resolve().parent.parent
READERS = {"qwen2": ROOT / "internvl_edge/demo/qwen2", "internlm2": ROOT / "examples/reader/internlm2"}
QUESTIONS, ANSWER_TOKENS = 500, 64
# Rows and columns of the table of a 1B.
SIZE_1B = (151674, 896)
Table = np.ndarray[Any, Any]


def float16(table: Table) -> Table:
    """Round to float16."""
    return table.astype(np.float16).astype(np.float32)


def int8_rows(table: Table) -> Table:
    """Round to int8 with one float32 scale for each row, as `export` does."""
    scale = np.maximum(np.abs(table).max(axis=1, keepdims=True), 1e-30) / np.float32(127)
    return np.asarray(np.rint(table / scale) * scale, np.float32)


def int4_groups(table: Table, width: int = 32) -> Table:
    """Round to 4 bits with a float16 scale and a 4-bit zero point for each group of 32 columns."""
    groups = table.reshape(len(table), -1, width)
    low, high = np.minimum(groups.min(-1, keepdims=True), 0), np.maximum(groups.max(-1, keepdims=True), 0)
    scale = np.maximum((high - low) / 15, 1e-7).astype(np.float16).astype(np.float32)
    zero = np.clip(np.rint(-low / scale), 0, 15)
    rounded = (np.clip(np.rint(groups / scale) + zero, 0, 15) - zero) * scale
    return np.asarray(rounded.reshape(table.shape), np.float32)


# How each table is rounded, and its bytes for a table of so many rows and columns.
FORMS: dict[str, tuple[Callable[[Table], Table], Callable[[int, int], float]]] = {
    "float16": (float16, lambda rows, width: 2 * rows * width),
    "int8, a scale per token": (int8_rows, lambda rows, width: rows * (width + 4)),
    "int4, groups of 32": (int4_groups, lambda rows, width: rows * width * (4 + (16 + 4) / 32) / 8),
}
# Those that the readers are asked with: SmolLM2 shows already what 4 bits cost.
READER_FORMS = ("float16", "int8, a scale per token")


def main() -> None:
    """Measure all forms and write the results."""
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    checkpoint, work = map(Path, sys.argv[1:3])
    work.mkdir(exist_ok=True)
    smollm = kept(work / "smollm.json", lambda: smollm_figures(checkpoint, work))
    readers = {name: reader_figures(folder, work / name) for name, folder in READERS.items()}
    sizes = {name: round(count(*SIZE_1B)) for name, (_, count) in FORMS.items()}
    values = {"bytes_1B": sizes, "smollm": smollm, "questions": QUESTIONS, "readers": readers}
    print(write_results("token-table", values).read_text(encoding="utf-8"))


def kept(path: Path, measure: Callable[[], Any]) -> Any:
    """Return what was measured earlier, or measure it now."""
    if not path.exists():
        path.write_text(json.dumps(measure()), encoding="utf-8")
    return json.loads(path.read_text(encoding="utf-8"))


def smollm_figures(checkpoint: Path, work: Path) -> dict[str, Any]:
    """Divergence of every form from the float32 table before the same decoder, and the perplexity."""
    quantized = int8_prompts.quantize(checkpoint, work / "w4a16-rtn", "w4a16-rtn")
    bundles = {"float": checkpoint, "4 bits, int8 head": quantized}
    found: dict[str, Any] = {}
    for name, source in bundles.items():
        bundle = export_once(source, work / f"smollm-{name[0]}")
        texts = int8_prompts.chapters(bundle)
        answers = [ids[int8_prompts.PROMPT :] for ids in texts]
        table = whole_table(bundle)
        expected = following(bundle, texts, table)
        found[name] = {
            form: int8_prompts.compare(following(bundle, texts, rounded(table)), expected, answers)
            for form, (rounded, _) in FORMS.items()
        }
    return found


def export_once(source: Path, out: Path) -> Path:
    """Export with a float32 table, once."""
    if not out.is_dir():
        export_bundle(source, out, "float32", dialects=("onnxruntime",), token_table="float")
    return out


def whole_table(bundle: Path) -> Table:
    """Return the token table [vocab, hidden] as float32."""
    opened = Bundle.open(bundle)
    return opened.embeddings()[np.arange(opened.manifest.model.decoder.vocab_size)]


def following(bundle: Path, texts: list[list[int]], table: Table) -> list[Table]:
    """For each text the logits after each token behind the prompt, all embeddings taken from a table."""
    engine = OnnxRuntimeEngine(Bundle.open(bundle), capacity=int8_prompts.PROMPT + int8_prompts.FOLLOWING)
    found = []
    for ids in texts:
        engine.cache.reset()
        engine.prefill(table[ids[: int8_prompts.PROMPT]])
        found.append(engine.score(table[ids[int8_prompts.PROMPT :]]))
    return found


def reader_figures(source: Path, work: Path) -> dict[str, float]:
    """Exact answers of a reader with 4-bit weights and an int8 head, for each form of its token table."""
    work.mkdir(exist_ok=True)
    quantized = int8_prompts.quantize(source, work / "checkpoint", "w4a16-rtn")
    bundle = export_once(quantized, work / "bundle")
    table, found = whole_table(bundle), {}

    for form in READER_FORMS:
        rounded, _ = FORMS[form]
        found[form] = kept(work / f"{form.partition(',')[0]}.json", partial(exact_match, bundle, rounded(table)))
        print(work.name, form, found[form], flush=True)
    return found


def exact_match(bundle: Path, table: Table) -> float:
    """The share of the suite's questions that a bundle answers exactly with this token table."""

    def load() -> InternVL:
        with patch.object(Bundle, "embeddings", lambda self: table):
            return InternVL.load(bundle, device="cpu", engine="onnxruntime")

    suite, settings = read_suite("reader", QUESTIONS), QuestionSettings("reader", max_new_tokens=ANSWER_TOKENS)
    return round(run_suite(load, suite, settings).total["exact_match"].bundle.value, 4)


if __name__ == "__main__":
    main()
