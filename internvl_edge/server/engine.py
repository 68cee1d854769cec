"""The model that is served: loaded in the background, looked at after a failure, and loaded again if it is broken."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Literal

import anyio
import anyio.to_thread

from internvl_edge.base.errors import EdgeError
from internvl_edge.runtime.model import InternVL

from .errors import SERVER, ApiError, unavailable
from .log import failure
from .settings import RETRY_LOADING_S, STUCK_S

State = Literal["loading", "ready", "restarting", "failed"]
_LOG = logging.getLogger(__name__)


class ServedModel:
    """Holds the model.

    Args:
        load: loads it; it is called in a thread.

    Attributes:
        state: "loading" until it can answer; "failed" when it could not be loaded again.
        error: why the first load failed.
    """

    def __init__(self, load: Callable[[], InternVL]) -> None:
        self.state: State = "loading"
        self.error: EdgeError | None = None
        self.loaded = anyio.Event()
        self._load = load
        self._model: InternVL | None = None
        self._examining = False
        self._restarts_since = 0.0

    async def start(self) -> None:
        """Load the model. `error` says whether that failed."""
        try:
            self._model = await _in_thread(self._load)
            self.state = "ready"
        except EdgeError as error:
            self.state, self.error = "failed", error
        self.loaded.set()

    @property
    def model(self) -> InternVL:
        """The model.

        Raises:
            ApiError: 503 while there is none that can answer.
        """
        if self.state == "failed":
            raise ApiError(
                503,
                "the model of this server is broken and could not be loaded again",
                kind=SERVER,
                code="engine_failed",
                headers={"x-should-retry": "false"},
            )
        if self.state != "ready" or self._model is None:
            raise unavailable(self.state, f"the model of this server is {self.state}; ask again soon", RETRY_LOADING_S)
        return self._model

    @property
    def peek(self) -> InternVL | None:
        """The model, where there is one."""
        return self._model

    @property
    def lives(self) -> bool:
        """False where nothing moves any more: the model is lost, or made no step or reloads since two minutes."""
        stalled = 0.0
        if self.state == "restarting":
            stalled = time.monotonic() - self._restarts_since
        elif self._model is not None and self.state == "ready":
            stalled = self._model.load_now.stalled_s
        return self.state != "failed" and stalled < STUCK_S

    @property
    def progress(self) -> float:
        """When the engine made its last step, in seconds since 1970; 0 where there is none."""
        return 0.0 if self._model is None else time.time() - (time.monotonic() - self._model.load_now.progress)

    async def examine(self) -> None:
        """After an answer failed for a reason of the engine's: ask a short question, and load again if that fails."""
        model = self._model
        if self._examining or model is None or self.state != "ready":
            return
        self._examining = True
        try:
            await anyio.to_thread.run_sync(_probe, model)
        except Exception as error:  # whatever it is, the model does not answer
            _LOG.error("the engine fails: %s", failure(error))
            await self._restart(model)
        finally:
            self._examining = False

    async def _restart(self, model: InternVL) -> None:
        self.state, self._model, self._restarts_since = "restarting", None, time.monotonic()
        try:
            await anyio.to_thread.run_sync(model.close)
            self._model = await anyio.to_thread.run_sync(self._load)
            await anyio.to_thread.run_sync(_probe, self._model)
            self.state = "ready"
            _LOG.warning("the engine was loaded again")
        except Exception as error:
            self.state = "failed"
            _LOG.critical("the engine could not be loaded again: %s", failure(error))

    async def close(self) -> None:
        """Release the model."""
        model, self._model = self._model, None
        if model is not None:
            self.state = "loading"
            await anyio.to_thread.run_sync(model.close)


async def _in_thread(work: Callable[[], InternVL]) -> InternVL:
    """Do something in a thread that the end of the process does not wait for, unlike those of anyio."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[InternVL] = loop.create_future()

    def report(result: InternVL | None, error: BaseException | None) -> None:
        if done.cancelled():
            return
        if error is not None:
            done.set_exception(error)
        else:
            assert result is not None
            done.set_result(result)

    def run() -> None:
        found, problem = None, None
        try:
            found = work()
        except BaseException as error:
            problem = error
        with suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(report, found, problem)

    threading.Thread(target=run, name="load", daemon=True).start()
    return await done


def _probe(model: InternVL) -> None:
    _ = model.chat("Hello", max_new_tokens=1).text
