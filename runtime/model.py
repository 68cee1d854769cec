"""`InternVL`: a loaded bundle that answers questions about images.

This module connects the request, the engine, the caches and the text stream.
"""

from __future__ import annotations

import warnings
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from internvl_edge.base.errors import PromptError, QualityWarning
from internvl_edge.base.progress import Progress, as_progress
from internvl_edge.bundle import names
from internvl_edge.bundle.bundle import Bundle
from internvl_edge.bundle.quality_record import quality_warning
from internvl_edge.model.prompt import Text
from internvl_edge.model.rope import RotaryAngles
from internvl_edge.model.tokenizer import Tokenizer
from internvl_edge.planning import programs

from .decoding import Decoding
from .engines import Engine
from .engines.device import DeviceChoice, check_loading, choose_device, load_engine
from .find import find_bundle
from .grammar import Constrained, ForcedTokens, Grammars
from .image_cache import ImageCache
from .logprobs import LogprobRecorder, TokenLogprob, recorded
from .lookup import Guesser, PromptLookup
from .options import ChatOptions, checked_options, whole_number
from .prefixes import Prompt
from .reply import Reply, ReplyStream, timings
from .request import Images, Request, RequestBuilder
from .sampling import Chooser, Sampler, Sampling
from .scheduler import MOST_WAITING, Load, Scheduler, Task
from .text_stream import TextStream
from .trace import Recorder, Trace
from .voting import Vote, vote

if TYPE_CHECKING:
    from typing_extensions import Unpack

MOST_ROWS = programs.MOST_ROWS
MOST_SAMPLES = 64


class InternVL:
    """A model on a device.

    Any number of threads may ask it, and one thread may read several answers in turn. As many answers are computed
    together as the model has `rows`; the others wait. An answer depends on its own request alone.

    Attributes:
        config: what the model is.
        choice: the device that "auto" took and why; None where the device was given.
        requests: checks and prepares questions; `requests.tile` decodes an image before it is asked about.
    """

    def __init__(
        self,
        opened: Bundle,
        engine: Engine,
        choice: DeviceChoice | None = None,
        tokenizer: Tokenizer | None = None,
        *,
        most_waiting: int = MOST_WAITING,
        prompts_first: bool = False,
    ) -> None:
        manifest = opened.manifest
        self.config = manifest.model
        self.choice = choice
        self._tokenizer = tokenizer or Tokenizer(opened.path(names.TOKENIZER))
        self.requests = RequestBuilder(
            self.config, manifest.template, self._tokenizer, manifest.tokens.image, capacity=engine.cache.capacity
        )
        self._stop_ids = manifest.tokens.stop
        self._grammars = Grammars(opened.path(names.TOKENIZER), self.config.decoder.vocab_size, self._stop_ids)
        self._table = opened.embeddings()
        self._images = ImageCache(engine)
        self._engine = engine
        self._scheduler = Scheduler(
            engine, self.config.decoder, self._table.__getitem__, most_waiting, prompts_first=prompts_first
        )
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
        rows: int = 1,
        threads: int | None = None,
        exact: bool = False,
        most_waiting: int = MOST_WAITING,
        prompts_first: bool = False,
        revision: str | None = None,
        progress: bool | Progress = False,
    ) -> InternVL:
        """Open, verify and load a bundle.

        Args:
            folder: the bundle: a folder, or a hub id, which is downloaded (see `find_bundle`).
            device: "cpu", "cuda" (ONNX Runtime, for bundles that compute in float16), "tensorrt" (engines that `build`
                made), or "auto": the first of "tensorrt", "cuda" and "cpu" that can run this bundle here (see
                `choose_device`, which says why).
            engine: on the CPU, "onnxruntime", "openvino" (OpenVINO for tiles and prompts, ONNX Runtime for decode) or
                "auto", which is the faster one.
            dialect: the decoder graph to run, "onnxruntime" or "standard"; the default is the fastest that the bundle
                has.
            context: the most tokens that prompt and answer may have together; the default is 32768, or the most that
                the model can have, and for TensorRT what the engines were built for, which is also the most there.
            rows: the most answers that are computed together, each with a KV cache of `context` tokens. On a CPU, the
                unused part of a cache takes no memory, and a model with several rows decodes at least two at a time,
                so that an answer does not depend on what else is asked; this makes a lone answer slower
                (docs/performance.md). TensorRT has at most those of `build --rows`, and CUDA has one row.
            threads: CPU threads; the default is all available cores.
            exact: compute in the types of the bundle, with ONNX Runtime's operators. Without it, OpenVINO may round to
                bfloat16 (`engines.choice`), and compiled operators compute attention (`native.choice`).
            most_waiting: answers that may wait for a row; a further one is refused with a BusyError.
            prompts_first: with several rows, read images and prompts of waiting questions before answers under way go
                on. This gives the most answers in an hour; those under way wait meanwhile. The answers are the same.
            revision: branch, tag or commit of a hub id; the default is its main branch.
            progress: show on standard error how TensorRT warms up, which compiles kernels in the first start.

        Raises:
            BundleError: the bundle is damaged or too new, or its hub id cannot be downloaded.
            EngineError: the device is not available, cannot run the bundle, or does not use one of the arguments; or
                the context is more than the model can use.

        Warns:
            QualityWarning: the bundle failed its quality gate.
            ContextWarning: the context is more than the model was trained on.
        """
        check_loading(device, context, rows, threads)
        opened = Bundle.open(find_bundle(folder, revision, device))
        choice = None
        if device == "auto":
            choice = choose_device(
                opened, engine=engine, dialect=dialect, context=context, threads=threads, exact=exact, rows=rows
            )
            device = choice.device
        if warning := quality_warning(opened.folder, opened.manifest):
            warnings.warn(warning, QualityWarning, stacklevel=2)
        with ThreadPoolExecutor(1) as pool:  # the engines' libraries let other threads of Python run while they load
            reading = pool.submit(Tokenizer, opened.path(names.TOKENIZER))
            show = as_progress(progress)
            loaded = load_engine(
                opened, device, engine, dialect, context, rows, threads=threads, exact=exact, progress=show
            )
        return cls(opened, loaded, choice, reading.result(), most_waiting=most_waiting, prompts_first=prompts_first)

    def chat(self, question: Text, images: Images = (), **options: Unpack[ChatOptions]) -> Reply:
        """Answer a question.

        Args:
            question: it may have `<image>` marks, or be a list of texts and `IMAGE`; without marks, images go in front.
            images: paths, bytes or Pillow images, one per `<image>` mark of history and question, in order; a list of
                images shares one mark.
            options: see `ChatOptions`.

        Raises:
            PromptError: question, images, options and context do not fit together. It is raised before any work starts.
            ImageError: an image cannot be read or exceeds a limit.
        """
        return self.stream(question, images, **options).reply

    def stream(self, question: Text, images: Images = (), **options: Unpack[ChatOptions]) -> ReplyStream:
        """Answer a question as `chat` does, and return an iterator over pieces of the text.

        Its `reply` is the finished answer. The request is checked at once; the computation begins when the first piece
        is requested, and goes on in the background.
        """
        return self.sample_streams(question, images, 1, **options)[0]

    def samples(
        self, question: Text, images: Images = (), count: int = 8, **options: Unpack[ChatOptions]
    ) -> list[Reply]:
        """Answer a question several times. The images and the prompt are computed once.

        Each answer is that of `chat` with its own seed: `seed`, `seed + 1` and so on, where `seed` is given. They are
        computed side by side where the model has `rows` for them, else one after the other.

        Args:
            question, images, options: as for `chat`. Greedy answers are all the same.
            count: number of answers, 1 to 64.

        Raises:
            PromptError, ImageError: as `chat`.
        """
        streams = self.sample_streams(question, images, count, **options)
        for stream in streams:
            stream.begin()
        return [stream.reply for stream in streams]

    def vote(
        self,
        question: Text,
        images: Images = (),
        votes: int = 8,
        *,
        reason: bool = False,
        choices: Sequence[str] | None = None,
        sure: float | None = None,
        **options: Unpack[ChatOptions],
    ) -> Vote:
        """Answer a question several times, and return the answer that most of the replies give.

        The first reply is greedy, and the others are sampled (temperature 0.6, top_p 0.95, unless `options` say
        otherwise). Answers are equal without case, quotes and end stop, and numbers by their value. The vote ends as
        soon as the outcome is certain.

        Args:
            question, images, options: as for `chat`.
            votes: the most replies, 1 to 64. Load the model with as many `rows`, or a part of them, to be fast.
            reason: ask for reasoning before the answer. Give `max_new_tokens` room for it.
            choices: the possible answers. No reply can give another one; after reasoning, a reply that names none of
                them is asked to choose (extra `structured`).
            sure: end the vote as soon as the leader is the majority's answer with this probability, such as 0.95. It
                saves replies, and may now and then change the outcome.

        Raises:
            PromptError, ImageError: as `chat`.
        """
        return vote(self, question, images, votes, reason, choices, sure, options)

    def sample_streams(
        self,
        question: Text,
        images: Images = (),
        count: int = 8,
        *,
        first_greedy: bool = False,
        **options: Unpack[ChatOptions],
    ) -> list[ReplyStream]:
        """Return the answers of `samples` before they are computed. They share the images and the prompt.

        Args:
            question, images, options: as for `chat`.
            count: number of answers, 1 to 64.
            first_greedy: whether the first answer is greedy, whatever the temperature.

        Raises:
            PromptError, ImageError: as `chat`.
        """
        if not 1 <= whole_number("count", count) <= MOST_SAMPLES:
            raise PromptError(f"count is {count}, expected 1 to {MOST_SAMPLES}")
        checked = checked_options(options)
        sampling = Sampling(**{name: checked[name] for name in Sampling.__dataclass_fields__ if name in checked})
        form = checked.get("answer_format")
        matchers = [None if form is None else self._grammars.matcher(form) for _ in range(count)]
        request = self.requests.build(question, images, checked)
        prompt = self._prompt(request)
        counted = request.prompt_ids.tolist() if self.config.layout == "native" else ()
        streams = []
        for index, matcher in enumerate(matchers):
            seed = None if sampling.seed is None else sampling.seed + index
            temperature = 0.0 if first_greedy and index == 0 else sampling.temperature
            sampler = Sampler(replace(sampling, seed=seed, temperature=temperature), counted)
            constrained = None if matcher is None else Constrained(sampler, matcher, self._stop_ids)
            chooser = recorded(constrained or sampler, checked)
            text = TextStream(self._tokenizer, self._stop_texts(checked), checked.get("keep_special", False))
            guesser = self._guesser(request, checked, constrained)
            streams.append(self._answer(request, prompt, chooser, text, guesser))
        return streams

    @property
    def rows(self) -> int:
        """The most answers that are computed together."""
        return self._engine.cache.rows

    @property
    def context(self) -> int:
        """The most tokens that prompt and answer may have together."""
        return self.requests.capacity

    @property
    def stop_ids(self) -> Sequence[int]:
        """The tokens that end an answer."""
        return tuple(self._stop_ids)

    @property
    def runs_on(self) -> tuple[str, str]:
        """The name of the engine's class, and of the decoder graph that it runs."""
        return type(self._engine).__name__, self._engine.dialect

    @property
    def load_now(self) -> Load:
        """What is computed and what waits at this moment, and when the last step was."""
        return self._scheduler.load

    @property
    def image_cache_hits(self) -> int:
        """Images whose tokens were taken from the cache since the model was loaded."""
        return self._images.hits

    @property
    def engine(self) -> Engine:
        """The engine that executes the graphs, as soon as no answer is being computed.

        Whoever uses it directly changes what its rows hold. So the next question reuses nothing of earlier ones.
        """
        self._scheduler.forget()
        return self._engine

    def trace(
        self, question: Text, images: Images = (), answer: Sequence[int] | None = None, **options: Unpack[ChatOptions]
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
        checked = checked_options(options)
        if "answer_format" in checked:
            raise PromptError("trace follows the model or given tokens, no answer_format; leave it out")
        request = self.requests.build(question, images, checked)
        recorder = Recorder(answer)
        reply = self._answer(request, self._prompt(request), recorder, TextStream(self._tokenizer), None).reply
        return Trace(reply, recorder.logits)

    def answer_ids(self, text: str) -> list[int]:
        """Return the tokens of an answer with this text, the stop token included."""
        start = len(self._tokenizer.encode(""))  # InternLM2 puts <s> in front of everything
        return [*self._tokenizer.encode(text)[start:], self._stop_ids[0]]

    def close(self) -> None:
        """End answers under way with an EngineError, and release the engine. A later question raises it, too."""
        self._scheduler.close()
        if hasattr(self, "_engine"):
            self._engine.close()
            del self._engine, self._images

    def __repr__(self) -> str:
        engine = type(self._engine).__name__ if hasattr(self, "_engine") else "closed"
        return f"<InternVL {self._source}, {engine}>"

    def __enter__(self) -> InternVL:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _answer(
        self, request: Request, prompt: Prompt, chooser: Chooser, text: TextStream, guesser: Guesser | None
    ) -> ReplyStream:
        def accept(token: int) -> bool:
            if token not in self._stop_ids and (piece := text.push(token)):
                task.emit(piece)
            return text.stopped

        def finish() -> tuple[str, Reply]:
            rest = text.finish()
            return rest, Reply(
                text=text.text,
                output_ids=decoding.tokens,
                prompt_ids=request.prompt_ids.tolist(),
                image_tokens=int(request.is_image.sum()),
                tiles=[len(tiles) for tiles in request.tiles],
                finish_reason="stop" if text.stopped or decoding.stopped else "length",
                timings=timings(request.seconds, task),
                logprobs=new_logprobs(0) if isinstance(chooser, LogprobRecorder) else None,
            )

        def new_logprobs(start: int) -> list[TokenLogprob]:
            return chooser.logprobs(self._tokenizer, start) if isinstance(chooser, LogprobRecorder) else []

        decoding = Decoding(chooser, self._stop_ids, request.max_new_tokens, accept, guesser)
        task = Task(prompt, decoding)
        return ReplyStream(self._scheduler, task, finish, new_logprobs)

    def _prompt(self, request: Request) -> Prompt:
        def embed() -> Generator[None, None, NDArray[np.float32]]:
            embeds: NDArray[np.float32] = self._table[request.prompt_ids]
            parts = []
            for tiles in request.tiles:
                tokens = yield from self._images.encode_steps(tiles)
                parts.append(tokens.reshape(-1, embeds.shape[1]))
            if parts:
                embeds[request.is_image] = np.concatenate(parts)
            return embeds

        return Prompt(request.keys(self.config.tokens_per_tile), embed)

    def _stop_texts(self, options: Mapping[str, Any]) -> list[str]:
        """The stop strings, without the names of tokens that end an answer anyway."""
        ends = {self._tokenizer.decode([token], skip_special=False) for token in self._stop_ids}
        return [text for text in options.get("stop", ()) if text not in ends]

    def _guesser(self, request: Request, options: Mapping[str, Any], constrained: Constrained | None) -> Guesser | None:
        """Return a guesser for the request, or None where guessing is not asked for or would change the answer.

        With dynamic NTK, several tokens in one step get another rotary base than the same tokens one by one.
        """
        longest = len(request.prompt_ids) + request.max_new_tokens
        if RotaryAngles(self.config.decoder).scales_at(longest):
            return None
        lookup = None
        if options.get("speculate"):
            image_ids = set(request.prompt_ids[request.is_image].tolist())
            lookup = PromptLookup(request.prompt_ids.tolist(), excluded=image_ids)
        return lookup if constrained is None else ForcedTokens(constrained, lookup)
