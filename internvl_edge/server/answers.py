"""Read answers in an event loop: the runtime computes in its own thread and wakes the loop for each piece of text."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Generator, Sequence
from contextlib import suppress

import anyio.to_thread

from internvl_edge.runtime.reply import ReplyStream
from internvl_edge.runtime.voting import Vote

Steps = Generator[ReplyStream, None, Vote]


class Reader:
    """Reads some answers of one request, in the event loop that makes it."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._news = asyncio.Event()

    def begin(self, stream: ReplyStream) -> None:
        """Begin to compute an answer. Raises EngineError, as `ReplyStream.begin`."""
        stream.begin(self._wake)

    async def pieces(self, streams: Sequence[ReplyStream]) -> AsyncIterator[tuple[int, str]]:
        """Yield (number of the answer, new text) as it comes, and (number, "") at the end of an answer.

        Raises:
            EdgeError or any other error: what ended an answer.
        """
        unfinished = dict(enumerate(streams))
        while unfinished:
            self._news.clear()
            for number, stream in list(unfinished.items()):
                if text := stream.poll():
                    yield number, text
                if stream.finished:
                    del unfinished[number]
                    yield number, ""
            if unfinished:
                await self._news.wait()

    async def finish(self, streams: Sequence[ReplyStream]) -> None:
        """Wait until answers are complete. Raises what ended one of them."""
        async for _ in self.pieces(streams):
            pass

    async def first(self, steps: Steps) -> ReplyStream | Vote:
        """Begin the answers of a vote. Raises what is wrong with the request."""
        return await anyio.to_thread.run_sync(_next, steps)

    async def vote(self, steps: Steps, found: ReplyStream | Vote | None = None) -> Vote:
        """Follow the steps of a vote (`vote_steps`) from what `first` returned on, and return its outcome."""
        try:
            found = found or await self.first(steps)
            while isinstance(found, ReplyStream):
                await self.finish([found])
                found = await anyio.to_thread.run_sync(_next, steps)
            return found
        finally:
            steps.close()

    def _wake(self) -> None:
        with suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self._news.set)


def _next(steps: Steps) -> ReplyStream | Vote:
    try:
        return next(steps)
    except StopIteration as end:
        outcome: Vote = end.value
        return outcome
