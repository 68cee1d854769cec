"""The OpenAPI document, made from the same table of fields that checks requests."""

from __future__ import annotations

from typing import Any

from internvl_edge import __version__

from .fields import FIELDS
from .settings import Settings

_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
_PART = {
    "oneOf": [
        {
            "type": "object",
            "required": ["type", "text"],
            "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
        },
        {
            "type": "object",
            "required": ["type", "image_url"],
            "properties": {
                "type": {"const": "image_url"},
                "image_url": {
                    "oneOf": [
                        {"type": "string"},
                        {
                            "type": "object",
                            "required": ["url"],
                            "properties": {
                                "url": {"type": "string"},
                                "detail": {"enum": ["low", "auto", "medium", "high", "original"]},
                                "max_dynamic_patch": {"type": "integer", "minimum": 1},
                            },
                        },
                    ]
                },
            },
        },
    ]
}
_MESSAGE = {
    "type": "object",
    "required": ["role", "content"],
    "properties": {
        "role": {"enum": ["system", "developer", "user", "assistant"]},
        "content": {"oneOf": [{"type": "string"}, {"type": "array", "minItems": 1, "items": _PART}]},
    },
}
_OBJECT = {"type": "object"}
_EXAMPLE = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 16}


def document(settings: Settings) -> dict[str, Any]:
    """Return the OpenAPI 3.1 document of a server."""
    fields = {field.name: _nullable(dict(field.schema)) for field in FIELDS if field.use == "used"}
    fields["messages"] = dict(FIELDS[0].schema) | {"items": _MESSAGE}
    for name in ("n", "votes"):
        fields[name]["maximum"] = settings.limits.samples
    fields["model"] = {"const": settings.model}
    chat = {"type": "object", "required": ["messages"], "properties": fields, "examples": [_EXAMPLE]}
    tokenize = {
        "type": "object",
        "properties": {
            "model": {"const": settings.model},
            "prompt": {"type": "string"},
            "messages": {"type": "array", "minItems": 1, "items": _MESSAGE},
        },
        "examples": [{"prompt": "Hello"}],
    }
    model = {"type": "object", "required": ["id", "object", "created", "owned_by"]}
    key: list[dict[str, Any]] = [{"key": []}] if settings.keys else []
    paths = {
        "/v1/chat/completions": {
            "post": _operation(
                "Answer a question about texts and images.",
                {"application/json": {"schema": _OBJECT}, "text/event-stream": {"schema": {"type": "string"}}},
                key,
                chat,
                (400, 404, 408, 413, 415, 429, 500, 503, 504),
            )
        },
        "/v1/models": {"get": _operation("List the model.", _json(_OBJECT), key)},
        "/v1/models/{model}": {
            "get": _operation("Describe the model.", _json(model), key, None, (404,))
            | {"parameters": [{"name": "model", "in": "path", "required": True, "schema": {"const": settings.model}}]}
        },
        "/tokenize": {
            "post": _operation(
                "Count the tokens of a text or of a conversation.",
                _json(_OBJECT),
                key,
                tokenize,
                (400, 404, 408, 413, 415, 429, 503),
            )
        },
        "/readyz": {"get": _operation("Whether questions are answered now.", _json(_OBJECT), [], None, (503,))},
        "/livez": {"get": _operation("Whether the server should go on.", _json(_OBJECT), [], None, (503,))},
        "/metrics": {
            "get": _operation(
                "Metrics for Prometheus.",
                {"text/plain": {"schema": {"type": "string"}}},
                [] if settings.open_metrics else key,
            )
        },
        "/openapi.json": {"get": _operation("This document.", _json(_OBJECT), key)},
    }
    described: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "internvl-edge", "version": __version__},
        "paths": paths,
        "components": {"schemas": {"Error": _ERROR}},
    }
    if key:
        described["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    return described


def _operation(
    summary: str,
    content: dict[str, Any],
    security: list[dict[str, Any]],
    body: dict[str, Any] | None = None,
    errors: tuple[int, ...] = (),
) -> dict[str, Any]:
    refusals = {*errors, 400, 403, *((401,) if security else ())}
    error = {"description": "an error", "content": _json({"$ref": "#/components/schemas/Error"})}
    responses: dict[str, Any] = {"200": {"description": "done", "content": content}}
    responses |= {str(status): error for status in sorted(refusals)}
    operation: dict[str, Any] = {"summary": summary, "responses": responses}
    if security:
        operation["security"] = security
    if body is not None:
        operation["requestBody"] = {"required": True, "content": _json(body)}
    return operation


def _json(schema: dict[str, Any]) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}


def _nullable(schema: dict[str, Any]) -> dict[str, Any]:
    kinds = schema.get("type", [])
    schema["type"] = [*([kinds] if isinstance(kinds, str) else kinds), "null"]
    if "enum" in schema:
        schema["enum"] = [*schema["enum"], None]
    return schema
