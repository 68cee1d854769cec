"""`InternVL`: a loaded bundle that answers questions about images.

This module connects the request, the engine, the caches and the text stream.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from internvl_edge.base import machine
from internvl_edge.base.errors import EngineError, QualityWarning
from internvl_edge.bundle import names
from internvl_edge.bundle.bundle import Bundle
from internvl_edge.bundle.quality_record import quality_warning
from internvl_edge.model.rope import RotaryAngles
from internvl_edge.model.tokenizer import Tokenizer

from .engines import Engine
from .engines.choice import cpu_engine
from .engines.device import DEVICES, DeviceChoice, choose_device, require_cuda, require_unused
from .engines.onnxruntime import OnnxRuntimeEngine
from .generate import generate
from .image_cache import ImageCache, pixel_key
from .lookup import PromptLookup
from .options import ChatOptions, checked_options
from .reply import Reply, ReplyStream
from .request import Images, Request, RequestBuilder
from .sampling import Chooser, Sampler, Sampling
from .session import Session, image_keys
from .text_stream import TextStream
from .trace import Recorder, Trace
from .turns import Turns

if TYPE_CHECKING:
    from typing_extensions import Unpack

Progress = Callable[[str, int, int], None]
# Most tokens of prompt and answer together. Pages of the KV cache that are not touched use no memory.
DEFAULT_CONTEXT = 32768


class InternVL:
    """A model on a device.

    It computes one answer at a time, and threads wait for each other. For answers side by side, load one model per
    thread.

    Attributes:
        config: what the model is.
        choice: the device that "auto" took and why; None where the device was given.
    """

    def __init__(self, opened: Bundle, engine: Engine, choice: DeviceChoice | None = None) -> None:
        manifest = opened.manifest
        self.config = manifest.model
        self.choice = choice
        self._tokenizer = Tokenizer(opened.path(names.TOKENIZER))
        self._requests = RequestBuilder(
            self.config, manifest.template, self._tokenizer, manifest.tokens.image, capacity=engine.capacity
        )
        self._stop_ids = manifest.tokens.stop
        self._table = opened.embeddings()
        self._images = ImageCache(engine.encode)
        self._session = Session(engine, self.config.decoder)
        self._turns = Turns()
        self._source = manifest.source

    @classmethod
    def load(
        cls,
        folder: str | Path,
        device: str = "auto",
        *,
        engine: str = "auto",
        dialect: str | None = None,
        context: int | None = None,
        threads: int | None = None,
        progress: Progress | None = None,
    ) -> InternVL:
        """Open, verify and load a bundle.

        Args:
            folder: the bundle.
            device: "cpu", "cuda" (ONNX Runtime, for bundles that compute in float16), "tensorrt" (engines that `build`
                made), or "auto": the first of "tensorrt", "cuda" and "cpu" that can run this bundle here (see
                `choose_device`, which says why).
            engine: on the CPU, "onnxruntime", "openvino" (OpenVINO for tiles and prompts, ONNX Runtime for decode) or
                "auto", which is the faster one.
            dialect: the decoder graph to run, "onnxruntime" or "standard"; the default is the fastest that the bundle
                has.
            context: the most tokens that prompt and answer may have together; the default is 32768, and for TensorRT
                what the engines were built for, which is also the most there.
            threads: CPU threads; the default is all available cores.
            progress: called while TensorRT warms up, with a phase, the steps done, and all steps.

        Raises:
            BundleError: the bundle is damaged or too new.
            EngineError: the device is not available, cannot run the bundle, or does not use one of the arguments.

        Warns:
            QualityWarning: the bundle failed its quality gate.
        """
        if device not in DEVICES:
            raise EngineError(f"device {device!r} is not one of {', '.join(DEVICES)}")
        if context is not None and context < 2:
            raise EngineError(f"a context of {context} tokens has no room for a question and an answer; give more")
        most = max(64, 4 * machine.cores())
        if threads is not None and not 1 <= threads <= most:
            raise EngineError(f"threads is {threads}, expected 1 to {most}; this machine has {machine.cores()} cores")
        opened = Bundle.open(Path(folder))
        choice = None
        if device == "auto":
            choice = choose_device(opened, engine=engine, dialect=dialect, context=context, threads=threads)
            device = choice.device
        if warning := quality_warning(Path(folder), opened.manifest):
            warnings.warn(warning, QualityWarning, stacklevel=2)
        loaded = _engine(opened, device, engine, dialect, context, threads, progress)
        return cls(opened, loaded, choice)

    def chat(self, question: str, images: Images = (), **options: Unpack[ChatOptions]) -> Reply:
        """Answer a question.

        Args:
            question: it may have `<image>` marks; without marks, images go in front of it.
            images: paths, bytes or Pillow images, one per `<image>` mark of history and question, in order; a list of
                images shares one mark.
            options: see `ChatOptions`.

        Raises:
            PromptError: question, images, options and context do not fit together. It is raised before any work starts.
            ImageError: an image cannot be read or exceeds a limit.
        """
        return self.stream(question, images, **options).reply

    def stream(self, question: str, images: Images = (), **options: Unpack[ChatOptions]) -> ReplyStream:
        """Answer a question as `chat` does, and return an iterator over pieces of the text.

        Its `reply` is the finished answer. The request is checked at once; vision and prefill run when the first piece
        is requested.
        """
        checked = checked_options(options)
        request = self._requests.build(question, images, checked)
        sampling = Sampling(**{name: checked[name] for name in Sampling.__dataclass_fields__ if name in checked})
        counted = request.prompt_ids.tolist() if self.config.layout == "native" else ()
        text = TextStream(self._tokenizer, self._stop_texts(checked), checked.get("keep_special", False))
        lookup = self._lookup(request) if checked.get("speculate") else None
        return ReplyStream(self._answer(request, Sampler(sampling, counted), text, lookup), self._turns)

    @property
    def engine(self) -> Engine:
        """The engine that executes the graphs. Direct use of it breaks the reuse of the KV cache between prompts."""
        return self._session.engine

    def trace(
        self, question: str, images: Images = (), answer: Sequence[int] | None = None, **options: Unpack[ChatOptions]
    ) -> Trace:
        """Answer greedily, or follow the tokens of a given answer, and keep the logits before each token.

        Args:
            question, images, options: as for `chat`, but sampling and stop strings have no effect.
            answer: tokens to take instead of the most probable ones. A stop token in it ends the answer.

        Raises:
            PromptError, ImageError: as `chat`.
        """
        if answer is not None:
            options["max_new_tokens"] = len(answer)
        request = self._requests.build(question, images, checked_options(options))
        recorder = Recorder(answer)
        pieces = self._answer(request, recorder, TextStream(self._tokenizer), None)
        reply = ReplyStream(pieces, self._turns).reply
        return Trace(reply, recorder.logits)

    def answer_ids(self, text: str) -> list[int]:
        """Return the tokens of an answer with this text, the stop token included."""
        start = len(self._tokenizer.encode(""))  # InternLM2 puts <s> in front of everything
        return [*self._tokenizer.encode(text)[start:], self._stop_ids[0]]

    def close(self) -> None:
        """Release the engine. A later question raises EngineError. A second call does nothing."""
        self._turns.close()
        if hasattr(self, "_session"):
            self.engine.close()
            del self._session, self._images

    def __repr__(self) -> str:
        engine = type(self._session.engine).__name__ if hasattr(self, "_session") else "closed"
        return f"<InternVL {self._source}, {engine}>"

    def __enter__(self) -> InternVL:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _answer(
        self, request: Request, sampler: Chooser, text: TextStream, lookup: PromptLookup | None
    ) -> Generator[str | Reply, None, None]:
        clock = _Clock()
        image_embeds = [self._images.encode(tiles).reshape(-1, self._table.shape[1]) for tiles in request.tiles]
        clock.lap("vision_s")
        embeds = self._table[request.prompt_ids]
        if image_embeds:
            embeds[request.is_image] = np.concatenate(image_embeds)
        logits, computed = self._session.prefill(self._keys(request), lambda start: embeds[start:])
        clock.lap("prefill_s")
        output_ids: list[int] = []
        tokens = generate(self.engine, logits, self._row, sampler, self._stop_ids, request.max_new_tokens, lookup)
        try:
            for token in tokens:
                output_ids.append(token)
                if token not in self._stop_ids and (piece := text.push(token)):
                    yield piece
                if text.stopped:
                    break
        finally:
            self._session.extend(output_ids)
        if piece := text.finish():
            yield piece
        clock.lap("decode_s")
        stopped = text.stopped or output_ids[-1] in self._stop_ids
        yield Reply(
            text=text.text,
            output_ids=output_ids,
            prompt_ids=request.prompt_ids.tolist(),
            image_tokens=int(request.is_image.sum()),
            tiles=[len(tiles) for tiles in request.tiles],
            finish_reason="stop" if stopped else "length",
            timings=clock.timings(request.seconds, computed, len(output_ids)),
        )

    def _stop_texts(self, options: Mapping[str, Any]) -> list[str]:
        """The stop strings, without the names of tokens that end an answer anyway."""
        ends = {self._tokenizer.decode([token], skip_special=False) for token in self._stop_ids}
        return [text for text in options.get("stop", ()) if text not in ends]

    def _lookup(self, request: Request) -> PromptLookup | None:
        """Return a lookup for the request, or None where guessing would change the answer.

        With dynamic NTK, several tokens in one step get another rotary base than the same tokens one by one.
        """
        longest = len(request.prompt_ids) + request.max_new_tokens
        if RotaryAngles(self.config.decoder).scales_at(longest):
            return None
        image_ids = set(request.prompt_ids[request.is_image].tolist())
        return PromptLookup(request.prompt_ids.tolist(), excluded=image_ids)

    def _keys(self, request: Request) -> NDArray[np.int64]:
        keys = request.prompt_ids.copy()
        if request.tiles:
            per_tile = self.config.tokens_per_tile
            keys[request.is_image] = np.concatenate(
                [image_keys(pixel_key(tiles), len(tiles) * per_tile) for tiles in request.tiles]
            )
        return keys

    def _row(self, token: int) -> NDArray[np.float32]:
        return self._table[token]


def _engine(
    opened: Bundle,
    device: str,
    engine: str,
    dialect: str | None,
    context: int | None,
    threads: int | None,
    progress: Progress | None,
) -> Engine:
    """Load the engine of a device. Arguments are those of `InternVL.load`; none is ignored."""
    if device == "tensorrt":
        require_unused(device, engine, dialect=None if dialect == "standard" else dialect, threads=threads)
        from .engines.tensorrt.engine import TensorRTEngine

        return TensorRTEngine(opened, capacity=context, progress=progress)
    capacity = DEFAULT_CONTEXT if context is None else context
    if device == "cuda":
        require_unused(device, engine)
        require_cuda(opened)
        return OnnxRuntimeEngine(opened, device=device, dialect=dialect, capacity=capacity, threads=threads)
    return cpu_engine(opened, engine, dialect=dialect, capacity=capacity, threads=threads)


class _Clock:
    def __init__(self) -> None:
        self._laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self._laps[name] = now - self._last
        self._last = now

    def timings(self, preprocess_s: float, prefill_tokens: int, output_tokens: int) -> dict[str, float]:
        laps = {"preprocess_s": preprocess_s, **self._laps}
        rates = {
            "first_token_s": laps["preprocess_s"] + laps["vision_s"] + laps["prefill_s"],
            "prefill_tokens": prefill_tokens,
            "prefill_tokens_per_s": prefill_tokens / max(laps["prefill_s"], 1e-9),
            "decode_tokens_per_s": (output_tokens - 1) / max(laps["decode_s"], 1e-9),
        }
        return {name: round(value, 4) for name, value in (laps | rates).items()}
