"""Compare freshly built engines with ONNX Runtime on the CPU, before they are left in a bundle.

The input is a picture that comes with this package, a question about it, and the answer that ONNX Runtime gives: the
same for every build of a bundle. Tiles, the prompt in all its steps, several tokens at once and single tokens are
compared; of engines for several rows, those of the last row and of a copy of it in the first, decoded together. The
comparison finds what a compiler got wrong: weights, positions, masks, fusions. It does not show how good a quantized
model is.

Where nothing can be compared (no GPU for these engines, no ONNX Runtime, too little memory for its weights), the
reason is recorded.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from internvl_edge.base import machine
from internvl_edge.base.errors import EngineError, PromptError
from internvl_edge.base.progress import SILENT, Progress
from internvl_edge.base.units import size
from internvl_edge.bundle import names
from internvl_edge.bundle.bundle import Bundle
from internvl_edge.demo import demo_questions
from internvl_edge.model.tokenizer import Tokenizer

from ...request import Request, RequestBuilder
from ..onnxruntime import OnnxRuntimeEngine
from .cuda import Cuda
from .engine import TensorRTEngine
from .flavour import Flavour
from .record import EngineRecord

# The least cosine of image tokens, and of logits. Over a fake GPU, float16 engines of the demo model, also with an int8
# tower and an int8 cache, are above 0.9997; bfloat16 has eight times their rounding. A wrong weight, position or mask
# is far below.
LEAST_COSINE = 0.98
ANSWER_TOKENS = 6
# The first tokens of the answer are computed in one step, as guessed tokens are.
_TOGETHER = 2
# The picture in two tiles and a thumbnail makes a prompt of more than one step; in one tile it fits short contexts.
_TILE_LIMITS = (2, 1)
# Memory that ONNX Runtime needs for each byte of weights: it holds 16-bit floats in 32 bits.
_FLOAT_BYTES, _PACKED_BYTES = 3.0, 1.5


@dataclass(frozen=True)
class _Numbers:
    """Image tokens [tiles, tokens_per_tile, hidden], and logits [1 + answer, vocab] after the prompt and each token."""

    image_embeds: NDArray[np.float32]
    logits: NDArray[np.float32]


def check_engines(
    opened: Bundle,
    record: EngineRecord,
    folder: Path,
    *,
    progress: Progress = SILENT,
    cuda: Cuda | None = None,
    flavour: Flavour | None = None,
) -> dict[str, Any]:
    """Compare engines in a folder with ONNX Runtime.

    Args:
        opened: the bundle that they were built from.
        record: their record.
        folder: where their files lie.
        progress: shows the two runs.
        cuda, flavour: replacements for the installed libraries, for tests.

    Returns:
        `vision_cosine` and `logits_cosine`, each the least of its rows, and `tokens`, the length of prompt and answer;
        or `skipped`, the reason why nothing was compared.

    Raises:
        EngineError: the engines cannot be loaded, or compute something else.
    """
    if reason := _obstacle(opened, record, cuda):
        return {"skipped": reason}
    request = _request(opened, record.options.capacity)
    if request is None:
        return {"skipped": f"a context of {record.options.capacity} tokens has no room for the question"}
    with progress.phase("ONNX Runtime"):
        expected, embeds, answer = _expected(opened, request)
    with (
        progress.phase("TensorRT"),
        TensorRTEngine(
            opened, built=(record, folder), rows=record.options.rows, warm=False, cuda=cuda, flavour=flavour
        ) as engine,
    ):
        image_embeds = engine.encode(np.concatenate(request.tiles))
        answers = _answers(engine, embeds, answer)
    figures: dict[str, Any] = {
        "vision_cosine": _least_cosine(image_embeds, expected.image_embeds),
        "logits_cosine": min(_least_cosine(logits, expected.logits) for logits in answers),
    }
    for name, what in (("vision_cosine", "image tokens"), ("logits_cosine", "logits")):
        if not figures[name] >= LEAST_COSINE:  # NaN is not
            raise EngineError(
                f"the engines for {record.target} compute wrong {what} on this GPU (cosine with ONNX Runtime "
                f"{figures[name]:.3f}, expected {LEAST_COSINE} or more), so none were kept; try another --dtype or "
                f"version of {record.flavour}, and report this"
            )
    return figures | {"tokens": len(embeds) + len(answer)}


def _answers(
    engine: TensorRTEngine, embeds: NDArray[np.float32], answer: NDArray[np.float32]
) -> list[NDArray[np.float32]]:
    """Return the logits after the prompt and each token of its answer, of the last row and of a copy of it."""
    last = engine.cache.rows - 1
    rows = sorted({0, last})
    first = [engine.prefill(embeds, last)[None].copy(), engine.score(answer[:_TOGETHER], last)]
    if last:
        engine.copy(last, 0, engine.cache.length(last))
    found = [list(first) for _ in rows]
    for token in answer[_TOGETHER:]:
        for logits, those in zip(engine.decode_rows(np.stack([token] * len(rows)), rows), found, strict=True):
            those.append(logits[None].copy())
    return [np.concatenate(those) for those in found]


def _obstacle(opened: Bundle, record: EngineRecord, cuda: Cuda | None) -> str:
    """Return why nothing can be compared here, "" where it can."""
    try:
        there = cuda or Cuda()
        present = there.compute_capability()
        if cuda is None:
            there.close()
    except EngineError as error:
        return f"no GPU: {error}"
    if present not in record.compute_capabilities:
        return f"the GPU here has compute capability {present / 10:.1f}"
    try:
        import onnxruntime  # noqa: F401
    except ImportError:
        return "ONNX Runtime is not installed"
    if opened.manifest.activations == "bfloat16":
        return "ONNX Runtime does not compute in bfloat16"
    floats = not opened.manifest.is_quantized
    needed = sum(opened.manifest.files[name].bytes for name in ("vision.data", "decoder.data"))
    needed = int(needed * (_FLOAT_BYTES if floats else _PACKED_BYTES))
    available = machine.memory("MemAvailable")
    if available is not None and needed > available:
        return f"ONNX Runtime needs about {size(needed)} of memory, {size(available)} are available"
    return ""


def _request(opened: Bundle, capacity: int) -> Request | None:
    """Return the question about the picture, None where the context is too short for it."""
    manifest, asked = opened.manifest, demo_questions()[0]
    tokenizer = Tokenizer(opened.path(names.TOKENIZER))
    builder = RequestBuilder(manifest.model, manifest.template, tokenizer, manifest.tokens.image, capacity)
    for tiles in _TILE_LIMITS:
        try:
            options = {"max_tiles": tiles, "max_new_tokens": ANSWER_TOKENS}
            return builder.build(asked.question, [asked.image], options)
        except PromptError:
            continue
    return None


def _expected(opened: Bundle, request: Request) -> tuple[_Numbers, NDArray[np.float32], NDArray[np.float32]]:
    """Return ONNX Runtime's numbers, and the embeddings of the prompt and of its answer, which both engines get."""
    table = opened.embeddings()
    engine = OnnxRuntimeEngine(opened, capacity=len(request.prompt_ids) + ANSWER_TOKENS)
    try:
        image_embeds = engine.encode(np.concatenate(request.tiles))
        embeds = table[request.prompt_ids]
        embeds[request.is_image] = image_embeds.reshape(-1, embeds.shape[1])
        logits = [np.array(engine.prefill(embeds))]
        answer = []
        for _ in range(ANSWER_TOKENS):
            answer.append(table[int(logits[-1].argmax())])
            logits.append(np.array(engine.decode(answer[-1])))
    finally:
        engine.close()
    return _Numbers(image_embeds, np.stack(logits)), embeds, np.stack(answer)


def _least_cosine(found: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    """Return the least cosine between rows: image tokens of a tile are one row, and so are the logits of a token."""
    a, b = (each.reshape(len(each), -1).astype(np.float64) for each in (found, expected))
    cosines = (a * b).sum(axis=1) / np.maximum(np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1), 1e-30)
    return round(float(cosines.min()), 6)
