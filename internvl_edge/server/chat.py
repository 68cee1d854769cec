"""POST /v1/chat/completions: from a request to its answer, its stream or its error."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import anyio
import anyio.to_thread
from starlette.types import Receive, Scope, Send

from internvl_edge.base.errors import BusyError, EdgeError, EngineError, FormError
from internvl_edge.runtime.messages import AskedQuestion, Message, Picture, question_from
from internvl_edge.runtime.model import InternVL
from internvl_edge.runtime.reply import Reply, ReplyStream
from internvl_edge.runtime.request import Tiles
from internvl_edge.runtime.voting import Vote, reasoning_question, vote_steps

from .admission import Reservation
from .answers import Reader
from .body import Disconnected, read_body
from .chat_reply import DONE, WAITING, ReplyWriter, event, timings, vote_facts, vote_finish
from .chat_request import ChatRequest, read_chat, read_json
from .errors import ApiError, broken, from_edge, timed_out, unavailable
from .log import failure
from .services import Call, Services, call_of
from .settings import RETRY_DRAINING_S, WAITING_S

# Seconds that the last words of a stream may take to be sent.
_LAST_WORDS_S = 5.0
_MOST_NAMED_FIELDS = 20
_DEFAULT_TOKENS = 1024
_LOG = logging.getLogger(__name__)


class Chat:
    """The endpoint, an ASGI application."""

    def __init__(self, services: Services) -> None:
        self._services = services

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        call = call_of(scope)
        response = _Response(send)
        outcome = "invalid"
        try:
            outcome = await self._serve(scope, receive, response, call)
        except Disconnected:
            outcome = "cancelled"
        except ApiError as error:
            outcome = "rejected" if error.status in (429, 503) else "error" if error.status >= 500 else "invalid"
            await response.fail(error)
        finally:
            call.facts["outcome"] = outcome
            self._services.metrics.requests.labels(outcome).inc()
            self._services.metrics.seconds.observe(call.seconds)

    async def _serve(self, scope: Scope, receive: Receive, response: _Response, call: Call) -> str:
        """Answer a request, and return its outcome."""
        services = self._services
        limits, admission = services.settings.limits, services.admission
        with admission.memory() as memory:
            body = [await read_body(scope, receive, limits, memory)]
            gone = False

            def leave() -> None:
                nonlocal gone
                if not response.complete:
                    gone = True
                    cancellation.cancel()

            outcome = ""
            with admission.request() as cancellation:
                cancellation.deadline = anyio.current_time() + limits.request_s - call.seconds
                watcher = asyncio.ensure_future(_watch(receive, leave))
                try:
                    outcome = await self._answer(body, response, call, memory)
                finally:
                    watcher.cancel()
            if outcome:
                return outcome
        if gone:
            return "cancelled"
        if admission.draining:
            raise unavailable("draining", "this server is about to end; ask another one", RETRY_DRAINING_S)
        raise timed_out(limits.request_s)

    async def _answer(self, body: list[bytes], response: _Response, call: Call, memory: Reservation) -> str:
        """Answer a body, which is taken out of its list. Errors of the engine are logged and looked into."""
        try:
            return await self._compute(body, response, call, memory)
        except (ApiError, asyncio.CancelledError):
            raise
        except EdgeError as error:
            if isinstance(error, EngineError) and not isinstance(error, (FormError, BusyError)):
                _LOG.error("request %s: %s", call.number, failure(error))
                self._services.in_background(self._services.served.examine())
            raise from_edge(error, "messages", self._services.admission.retry_after) from error
        except Exception as error:
            _LOG.error("request %s: %s", call.number, failure(error))
            self._services.in_background(self._services.served.examine())
            raise broken() from error

    async def _compute(self, body: list[bytes], response: _Response, call: Call, memory: Reservation) -> str:
        services, model = self._services, self._services.served.model
        prepare = partial(_prepare, body, services, model.config.max_tiles)
        request = await anyio.to_thread.run_sync(prepare, limiter=services.images.pool)
        self._note(request, call)
        tiles = await services.images.read(request.images, model, memory)
        asked = asked_question(request, tiles)
        request = replace(request, messages=())  # the files of the images are not needed any more
        reader = Reader()
        writer = ReplyWriter(f"chatcmpl-{call.number}", int(time.time()), services.settings.model, model.stop_ids)
        turn = _Turn(request, reader, writer, response, call)
        if request.votes is not None:
            call.facts["preprocess_s"] = round(call.seconds, 4)
            return self._done(turn, *await self._vote(turn, model, asked))
        begin = partial(_begin, model, asked, request, reader)
        streams = await anyio.to_thread.run_sync(begin, limiter=services.images.pool)
        call.facts["preprocess_s"] = round(call.seconds, 4)
        try:
            if request.stream:
                await self._stream(turn, streams)
            else:
                await reader.finish(streams)
                await response.send_json(200, writer.complete([stream.reply for stream in streams], turn.preprocess_s))
            return self._done(turn, [stream.reply for stream in streams])
        finally:
            for stream in streams:
                stream.close()

    def _note(self, request: ChatRequest, call: Call) -> None:
        """Name the fields that nobody knows in a header and in the metrics."""
        call.facts["stream"] = request.stream or None
        names = list(dict.fromkeys(name for name in request.unknown if _is_plain(name)))
        if names:
            call.headers["X-Ignored-Fields"] = ", ".join(names[:_MOST_NAMED_FIELDS])
        self._services.metrics.ignored([name if _is_plain(name) else "other" for name in set(request.unknown)])

    async def _stream(self, turn: _Turn, streams: Sequence[ReplyStream]) -> None:
        response, writer, request = turn.response, turn.writer, turn.request
        wants_logprobs = bool(request.options.get("logprobs"))
        async with response.streaming():
            for index in range(len(streams)):
                await response.write(writer.chunk(index, {"role": "assistant", "content": ""}))
            async for index, text in turn.reader.pieces(streams):
                found = writer.logprobs(streams[index].new_logprobs()) if wants_logprobs else None
                if text:
                    await response.write(writer.chunk(index, {"content": text}, logprobs=found))
                    continue
                reply = streams[index].reply
                if found and found["content"]:
                    await response.write(writer.chunk(index, {"content": ""}, logprobs=found))
                await response.write(
                    writer.chunk(index, {}, reply.finish_reason, timings=timings(reply, turn.preprocess_s))
                )
            if request.include_usage:
                await response.write(writer.usage_chunk([stream.reply for stream in streams]))
            await response.write(DONE, last=True)

    async def _vote(self, turn: _Turn, model: InternVL, asked: AskedQuestion) -> tuple[list[Reply], Vote]:
        request, response, writer = turn.request, turn.response, turn.writer
        options = _options(model, asked, request)
        steps = vote_steps(
            model,
            asked.question,
            asked.images,
            request.votes or 1,
            request.reason,
            request.choices,
            None,
            options,
            begin=turn.reader.begin,
        )
        if not request.stream:
            vote = await turn.reader.vote(steps)
            await response.send_json(200, writer.vote(vote, turn.preprocess_s))
            return list(vote.replies), vote
        first = await turn.reader.first(steps)  # what is wrong with the request shows here, before the first byte
        async with response.streaming():
            await response.write(writer.chunk(0, {"role": "assistant", "content": ""}))
            vote = await turn.reader.vote(steps, first)
            replies = list(vote.replies)
            if vote.answer is not None:
                await response.write(writer.chunk(0, {"content": vote.answer}))
            facts = {"vote": vote_facts(vote), "timings": timings(replies[0], turn.preprocess_s)}
            await response.write(writer.chunk(0, {}, vote_finish(vote), **facts))
            if request.include_usage:
                await response.write(writer.usage_chunk(replies))
            await response.write(DONE, last=True)
        return replies, vote

    def _done(self, turn: _Turn, replies: list[Reply], vote: Vote | None = None) -> str:
        """Count and note an answer, and return its outcome."""
        services, call = self._services, turn.call
        first = replies[0].timings
        preprocess_s = turn.preprocess_s
        has_form = "answer_format" in turn.request.options or turn.request.choices is not None
        services.metrics.answered(replies, preprocess_s, has_form)
        services.admission.served(max(0.0, call.seconds - preprocess_s - first["waiting_s"]))
        call.facts |= {
            "prompt_tokens": len(replies[0].prompt_ids),
            "completion_tokens": sum(len(reply.output_ids) for reply in replies),
            "tiles": sum(replies[0].tiles),
            "waiting_s": first["waiting_s"],
            "first_token_s": timings(replies[0], preprocess_s)["first_token_s"],
        }
        if vote is not None:
            return vote_finish(vote)
        return "length" if any(reply.finish_reason == "length" for reply in replies) else "stop"


@dataclass(frozen=True)
class _Turn:
    """What belongs to one request."""

    request: ChatRequest
    reader: Reader
    writer: ReplyWriter
    response: _Response
    call: Call

    @property
    def preprocess_s(self) -> float:
        """Seconds from the request to its prompt."""
        found: float = self.call.facts["preprocess_s"]
        return found


class _Response:
    """Sends the response to one request, and knows how far it is."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._started = False
        self._streams = False
        self.complete = False
        self._wrote = 0.0
        self._lock = asyncio.Lock()

    async def send_json(self, status: int, values: Any, headers: dict[str, str] | None = None) -> None:
        """Send a whole response."""
        body = json.dumps(values, ensure_ascii=False, separators=(",", ":")).encode()
        head = {"content-type": "application/json", "content-length": str(len(body))} | (headers or {})
        await self._start(status, head)
        await self._body(body, last=True)

    @asynccontextmanager
    async def streaming(self) -> AsyncIterator[None]:
        """Begin a stream, and write a comment line whenever nothing else was written for a while."""
        head = {"content-type": "text/event-stream", "cache-control": "no-cache", "x-accel-buffering": "no"}
        self._streams = True
        await self._start(200, head)
        beat = asyncio.ensure_future(self._beat())
        try:
            yield
        finally:
            beat.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await beat

    async def write(self, data: bytes, last: bool = False) -> None:
        """Send a part of a stream."""
        async with self._lock:
            await self._body(data, last)

    async def fail(self, error: ApiError) -> None:
        """Send an error: as the response, or as the last event of a stream that has begun."""
        if not self._started:
            await self.send_json(error.status, error.body, error.headers)
        if self.complete or not self._streams:
            return
        with anyio.move_on_after(_LAST_WORDS_S):
            await self.write(event(error.body), last=True)

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(max(0.05, self._wrote + WAITING_S - time.monotonic()))
            if time.monotonic() - self._wrote >= WAITING_S:
                await self.write(WAITING)

    async def _start(self, status: int, headers: dict[str, str]) -> None:
        self._started = True
        self._wrote = time.monotonic()
        encoded = [(name.lower().encode(), value.encode("latin-1")) for name, value in headers.items()]
        await self._send({"type": "http.response.start", "status": status, "headers": encoded})

    async def _body(self, data: bytes, last: bool) -> None:
        self._wrote = time.monotonic()
        self.complete = self.complete or last
        await self._send({"type": "http.response.body", "body": data, "more_body": not last})


async def _watch(receive: Receive, leave: Any) -> None:
    """Call `leave` when the client is gone."""
    while (await receive())["type"] != "http.disconnect":
        pass
    leave()


def _prepare(body: list[bytes], services: Services, checkpoint_tiles: int) -> ChatRequest:
    return read_chat(read_json(body.pop(), services.settings.limits), services.settings, checkpoint_tiles)


def asked_question(request: ChatRequest, tiles: Sequence[Tiles]) -> AskedQuestion:
    """Return the question of a request, with its images as tiles. Raises PromptError."""
    found = iter(tiles)
    messages = [
        Message(message.role, [part if isinstance(part, str) else Picture(next(found)) for part in message.parts])
        for message in request.messages
    ]
    return question_from(messages)


def _begin(model: InternVL, asked: AskedQuestion, request: ChatRequest, reader: Reader) -> list[ReplyStream]:
    """Prepare all answers of a request, and begin to compute them."""
    question = asked.question
    if request.reason:
        question = reasoning_question(question)
    options = _options(model, asked, request)
    streams = model.sample_streams(question, asked.images, request.samples, **options)
    try:
        for stream in streams:
            reader.begin(stream)
    except EngineError:
        for stream in streams:
            stream.close()
        raise
    return streams


def _options(model: InternVL, asked: AskedQuestion, request: ChatRequest) -> dict[str, Any]:
    """All options of a question. Without a limit of the client's, an answer leaves half of a small context."""
    most = min(_DEFAULT_TOKENS, max(1, model.context // 2))
    return {"max_new_tokens": most} | dict(asked.options) | dict(request.options)


def _is_plain(name: str) -> bool:
    return len(name) <= 100 and name.replace("_", "").replace(".", "").replace("-", "").isalnum() and name.isascii()
