"""Bind, serve, drain: the life of a server process."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import socket
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TextIO

import uvicorn
from uvicorn.server import Server

from internvl_edge.base.errors import EdgeError
from internvl_edge.bundle.bundle import sha256
from internvl_edge.bundle.names import MANIFEST
from internvl_edge.runtime.model import InternVL

from .admission import Admission
from .app import build_app
from .engine import ServedModel
from .fetch import Fetcher
from .http_protocol import EdgeProtocol
from .images import ImageReader
from .log import AccessLog, ServerMessages
from .metrics import Metrics
from .services import Services
from .settings import HEAD_BYTES, IDLE_S, Settings

# Seconds that connections have to end after the last answer.
_CLOSING_S = 3
_BACKLOG = 128


@dataclass(frozen=True)
class Place:
    """Where a server listens.

    Attributes:
        certificate, key: files in PEM for TLS; None for plain HTTP.
    """

    host: str
    port: int
    certificate: Path | None = None
    key: Path | None = None


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a host that a server binds."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def bind(place: Place) -> socket.socket:
    """Return a socket that listens at a place.

    Raises:
        EdgeError: the name or address is not of this machine, or the port is taken or not allowed.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(
            place.host, place.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        found = socket.socket(family, socket.SOCK_STREAM)
    except OSError:
        raise EdgeError(f"--host {place.host} is no address of this machine; give 127.0.0.1 or 0.0.0.0") from None
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
        found.listen(_BACKLOG)
        found.setblocking(False)
    except OSError as error:
        found.close()
        raise EdgeError(
            f"{place.host}:{place.port} cannot be bound ({error.strerror or error}); give another --port or --host"
        ) from None
    return found


class EdgeServer:
    """A server of one bundle. `run` serves until a signal, or until `stop`.

    Args:
        settings: how it is set up.
        load: loads the model.
        bundle: its folder, for the metrics.
        place: where it listens.
        access_log: where the log of requests goes; None writes none.
        ready: is called when the model is loaded.
    """

    def __init__(
        self,
        settings: Settings,
        load: Callable[[], InternVL],
        bundle: Path,
        place: Place,
        access_log: TextIO | None = None,
        ready: Callable[[str], None] = lambda address: None,
    ) -> None:
        self._settings = settings
        self._load = load
        self._bundle = bundle
        self._socket = bind(place)
        self._place = place
        self._log = AccessLog(access_log)
        self._ready = ready
        self._server: _DrainingServer | None = None

    @property
    def address(self) -> str:
        """The address that clients take, such as "http://127.0.0.1:23333"."""
        host = f"[{self._place.host}]" if ":" in self._place.host else self._place.host
        scheme = "http" if self._place.certificate is None else "https"
        return f"{scheme}://{host}:{self._socket.getsockname()[1]}"

    def run(self) -> None:
        """Serve until SIGTERM or SIGINT, then drain.

        Raises:
            EdgeError: the model cannot be loaded, or the files of TLS cannot be used.
            KeyboardInterrupt: a second signal ended it before it was drained.
        """
        logger = logging.getLogger(__package__)
        handler = ServerMessages()
        logger.addHandler(handler)
        logger.propagate = False
        try:
            asyncio.run(self._serve())
        finally:
            logger.removeHandler(handler)
            self._socket.close()
            self._log.close()

    def stop(self) -> None:
        """Begin to drain, from any thread."""
        if self._server is not None:
            self._server.drain()

    async def _serve(self) -> None:
        settings = self._settings
        served, admission = ServedModel(self._load), Admission(settings)
        metrics = Metrics(admission, served)
        fetcher = Fetcher(settings.image_hosts, settings.limits.body_bytes)
        services = Services(settings, served, admission, ImageReader(settings, fetcher), metrics)
        config = self._config(services)
        server = self._server = _DrainingServer(config, admission, settings.drain_s)
        loading = asyncio.ensure_future(self._start(served, services, server))
        try:
            await server.serve(sockets=[self._socket])
        finally:
            loading.cancel()
            await served.close()
        if served.error is not None:
            raise served.error
        if server.interrupted:
            raise KeyboardInterrupt

    def _config(self, services: Services) -> uvicorn.Config:
        config = uvicorn.Config(
            build_app(services, self._log),
            http=EdgeProtocol,
            ws="none",
            loop="asyncio",
            lifespan="off",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            backlog=_BACKLOG,
            timeout_keep_alive=IDLE_S,
            timeout_graceful_shutdown=_CLOSING_S,
            h11_max_incomplete_event_size=HEAD_BYTES,
            ssl_certfile=self._place.certificate,
            ssl_keyfile=self._place.key,
        )
        try:
            config.load()
        except (OSError, ssl.SSLError):
            raise EdgeError(
                f"TLS cannot use {self._place.certificate} and {self._place.key}; give a certificate and key in PEM"
            ) from None
        return config

    async def _start(self, served: ServedModel, services: Services, server: _DrainingServer) -> None:
        await served.start()
        model = served.peek
        if model is None:
            server.should_exit = True
            return
        services.admission.rows = model.rows  # a GPU has one, whatever was asked for
        services.metrics.loaded(self._settings.model, *model.runs_on, sha256(self._bundle / MANIFEST))
        self._ready(self.address)


class _DrainingServer(Server):
    """uvicorn's server, which goes on listening while answers under way end, and says 503 to new ones."""

    def __init__(self, config: uvicorn.Config, admission: Admission, drain_s: float) -> None:
        super().__init__(config)
        self.interrupted = False
        self._admission = admission
        self._drain_s = drain_s
        self._deadline: float | None = None

    def drain(self) -> None:
        """Take no more requests, and end when those under way are answered or `drain_s` is over."""
        self._admission.draining = True
        if self._deadline is None:
            self._deadline = time.monotonic() + self._drain_s

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal drains; the second one ends at once."""
        if self._deadline is not None:
            self.interrupted = self.force_exit = self.should_exit = True
        self.drain()

    async def on_tick(self, counter: int) -> bool:
        """Return whether it is time to end."""
        if self._deadline is not None:
            late = time.monotonic() >= self._deadline
            if late or self.should_exit:
                self._admission.cancel_all()
            if late or not self._admission.running:
                self.should_exit = True
        return await super().on_tick(counter)
