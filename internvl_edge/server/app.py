"""The application: the routes, and what stands around all of them (ids, access, errors of one form, the log)."""

from __future__ import annotations

import logging
import secrets
import time
from functools import partial
from typing import Any

import anyio
import anyio.to_thread
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from internvl_edge.base.errors import EdgeError
from internvl_edge.base.text import one_line
from internvl_edge.runtime.model import InternVL
from internvl_edge.runtime.request import Tiles

from .access import Access
from .body import Disconnected, read_body
from .chat import Chat, asked_question
from .chat_request import ChatRequest, check_model, read_chat, read_json, refuse_unknown
from .errors import ApiError, broken, from_edge, invalid, no_endpoint, unavailable
from .fields import check
from .log import AccessLog, failure
from .openapi import document
from .page import load_page
from .services import Call, Services
from .settings import RETRY_DRAINING_S, RETRY_LOADING_S

_LOG = logging.getLogger(__name__)


def build_app(services: Services, access_log: AccessLog) -> Starlette:
    """Return the application of a server."""
    endpoints = _Endpoints(services)
    routes = [
        Route("/v1/chat/completions", Chat(services), methods=["POST"]),
        Route("/v1/models", endpoints.models, methods=["GET"]),
        Route("/v1/models/{model:path}", endpoints.model, methods=["GET"]),
        Route("/tokenize", endpoints.tokenize, methods=["POST"]),
        Route("/readyz", endpoints.ready, methods=["GET"]),
        Route("/health", endpoints.ready, methods=["GET"]),
        Route("/livez", endpoints.live, methods=["GET"]),
        Route("/metrics", endpoints.metrics, methods=["GET"]),
        Route("/openapi.json", endpoints.openapi, methods=["GET"]),
        Route("/", endpoints.page, methods=["GET"]),
    ]
    around = Middleware(_Around, access=Access(services.settings), log=access_log)
    app = Starlette(
        routes=routes, middleware=[around], exception_handlers={HTTPException: _http_error, ApiError: _api_error}
    )
    app.router.redirect_slashes = False
    return app


class _Around:
    """Stands around every request: gives it an id, asks `Access`, catches what is left, and writes the log."""

    def __init__(self, app: ASGIApp, access: Access, log: AccessLog) -> None:
        self._app = app
        self._access = access
        self._log = log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        call = scope["internvl_edge.call"] = Call(secrets.token_hex(12))
        status = 0

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                further = {
                    "x-request-id": call.number,
                    "x-content-type-options": "nosniff",
                    **call.headers,
                    **self._access.cors_headers(scope),
                }
                message["headers"] = [
                    *message["headers"],
                    *((name.lower().encode(), value.encode("latin-1")) for name, value in further.items()),
                ]
            await send(message)

        try:
            if (allowed := self._access.preflight(scope)) is not None:
                await Response(status_code=204, headers=allowed)(scope, receive, answer)
            else:
                self._access.check(scope)
                await self._app(scope, receive, answer)
        except ApiError as error:
            await _send_error(error, scope, receive, answer)
        except Disconnected:
            pass
        except Exception as error:
            _LOG.error("request %s: %s", call.number, failure(error))
            if not status:
                await _send_error(broken("internal_error"), scope, receive, answer)
        finally:
            self._write(scope, call, status)

    def _write(self, scope: Scope, call: Call, status: int) -> None:
        client = scope.get("client")
        facts = {
            "id": call.number,
            "client": client[0] if client else None,
            "method": scope["method"][:20],
            "path": scope["path"][:200],
            "status": status or 499,  # the client left before there was anything to say
            "seconds": round(call.seconds, 4),
        }
        self._log.write(facts | call.facts)


class _Endpoints:
    """All paths but the answers."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._created = int(time.time())
        self._page = load_page()

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._describe()]})

    async def model(self, request: Request) -> Response:
        check_model({"model": request.path_params["model"]}, self._services.settings)
        return JSONResponse(self._describe())

    async def tokenize(self, request: Request) -> Response:
        """Count the tokens of a `prompt`, or of `messages` as they would be asked."""
        services = self._services
        limits = services.settings.limits
        with services.admission.memory() as memory:
            body = await read_body(request.scope, request.receive, limits, memory)
            with services.admission.request() as scope:
                scope.deadline = anyio.current_time() + limits.request_s
                model = services.served.model
                read = partial(read_json, body, limits)
                values = await anyio.to_thread.run_sync(read, limiter=services.images.pool)
                check_model(values, services.settings)
                known = {"model", "prompt", "messages", "add_special_tokens"}
                refuse_unknown([name for name in values if name not in known], services.settings)
                if "prompt" in values:
                    check(values["prompt"], {"type": "string"}, "prompt")
                    count = partial(model.requests.text_tokens, values["prompt"])
                elif "messages" in values:
                    chat = read_chat({"messages": values["messages"]}, services.settings, model.config.max_tiles)
                    count = partial(_count, model, chat, await services.images.read(chat.images, model, memory))
                else:
                    raise invalid("prompt", "there is neither a prompt nor messages; give one of them")
                try:
                    tokens = await anyio.to_thread.run_sync(count, limiter=services.images.pool)
                except EdgeError as error:
                    raise from_edge(error, "messages" if "messages" in values else "prompt") from None
                return JSONResponse({"count": len(tokens), "max_model_len": model.context, "tokens": tokens})
        raise unavailable("draining", "the count was cancelled; ask again", RETRY_DRAINING_S)

    async def ready(self, request: Request) -> Response:
        if self._services.admission.draining:
            raise unavailable("draining", "this server is about to end", RETRY_DRAINING_S)
        _ = self._services.served.model
        return JSONResponse({"status": "ready"})

    async def live(self, request: Request) -> Response:
        if not self._services.served.lives:
            raise unavailable("stuck", "the engine is lost or makes no progress; restart this server", RETRY_LOADING_S)
        return JSONResponse({"status": "live"})

    async def metrics(self, request: Request) -> Response:
        return Response(self._services.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def openapi(self, request: Request) -> Response:
        return JSONResponse(document(self._services.settings))

    async def page(self, request: Request) -> Response:
        return Response(self._page.body, headers=self._page.headers)

    def _describe(self) -> dict[str, Any]:
        model, limits = self._services.served.peek, self._services.settings.limits
        described: dict[str, Any] = {
            "id": self._services.settings.model,
            "object": "model",
            "created": self._created,
            "owned_by": "internvl-edge",
            "limits": {"body_bytes": limits.body_bytes, "images": limits.images, "pixels": limits.pixels},
        }
        if model is not None:
            described["max_model_len"] = model.context
        return described


def _count(model: InternVL, chat: ChatRequest, tiles: list[Tiles]) -> list[int]:
    asked = asked_question(chat, tiles)
    return model.requests.prompt_tokens(asked.question, asked.images, asked.options)


async def _http_error(request: Request, error: Exception) -> Response:
    """A path or a method that does not exist."""
    assert isinstance(error, HTTPException)
    if error.status_code == 405:
        allowed = dict(error.headers or {})
        found = ApiError(
            405,
            f"{one_line(request.scope['path'], 100)} takes {allowed.get('Allow', 'another method')}",
            code="method_not_allowed",
            headers=allowed,
        )
    else:
        found = no_endpoint(request.method, request.scope["path"])
    return JSONResponse(found.body, found.status, found.headers)


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return JSONResponse(error.body, error.status, error.headers)


async def _send_error(error: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
    await JSONResponse(error.body, error.status, error.headers)(scope, receive, send)
