"""Who may ask: keys, names of the host, other origins, and requests whose framing is ambiguous."""

from __future__ import annotations

import hmac
import ipaddress
import re
from collections.abc import Iterable
from pathlib import Path

from starlette.types import Scope

from internvl_edge.base.errors import EdgeError
from internvl_edge.base.json_files import read_bytes

from .errors import INVALID, ApiError
from .settings import HEAD_BYTES, Settings

# Paths that need no key: they say nothing but whether the server lives and is ready, and the page holds no secret.
OPEN_PATHS = ("/livez", "/readyz", "/health", "/")
_KEY_FILE_BYTES = 64 << 10
_KEY = re.compile(r"[\x21-\x7e]{8,512}")
_ALLOWED_HEADERS = "authorization, content-type"
_EXPOSED_HEADERS = "X-Request-Id, X-Ignored-Fields, Retry-After"
_SDK_HEADER = re.compile(r"x-stainless-[a-z0-9-]{1,40}")


def read_keys(path: Path | None, environment: str | None) -> tuple[str, ...]:
    """Return the API keys: one per line of a file, where empty lines and those with `#` do not count, or one of text.

    Raises:
        EdgeError: the file cannot be read or holds none, or a key is shorter than 8 characters or not of printable
            ASCII. No message shows a key.
    """
    lines = [environment.strip()] if environment and environment.strip() else []
    where = "INTERNVL_EDGE_API_KEY"
    if path is not None:
        where = str(path)
        data = read_bytes(path, EdgeError, "give a file with one API key per line", limit=_KEY_FILE_BYTES)
        found = [line.strip() for line in data.decode("utf-8", "replace").splitlines()]
        found = [line for line in found if line and not line.startswith("#")]
        if not found:
            raise EdgeError(f"{path} holds no API key; write one per line")
        lines += found
    for number, key in enumerate(lines, start=1):
        if not _KEY.fullmatch(key):
            raise EdgeError(
                f"{where}: key {number} has {len(key)} characters, expected 8 to 512 of printable ASCII without spaces"
            )
    return tuple(dict.fromkeys(lines))


class Access:
    """Judges requests by their heads."""

    def __init__(self, settings: Settings) -> None:
        self._keys = [key.encode() for key in settings.keys]
        self._open = {*OPEN_PATHS, *(("/metrics",) if settings.open_metrics else ())}
        self._local_names = settings.local_names
        self._origins = {origin.encode() for origin in settings.cors_origins}

    def check(self, scope: Scope) -> None:
        """Refuse a request that may not be answered.

        Raises:
            ApiError: 400, 401, 403, 415 or 431.
        """
        headers: list[tuple[bytes, bytes]] = scope["headers"]
        names = [name for name, _ in headers]
        if sum(len(name) + len(value) for name, value in headers) + len(scope["raw_path"]) > HEAD_BYTES:
            raise _closing(431, f"the head of the request has more than {HEAD_BYTES} bytes; send fewer headers")
        if b"transfer-encoding" in names and b"content-length" in names:
            # Two parties that read such a request differently see two requests (smuggling).
            raise _closing(400, "the request has both Transfer-Encoding and Content-Length; send one of them")
        if b"content-encoding" in names:
            raise _closing(415, "the body is compressed, which this server does not read; send it as it is")
        if self._local_names and not all(_is_local(value) for name, value in headers if name == b"host"):
            raise ApiError(
                403,
                "the Host of this request is neither localhost nor an address; ask http://localhost, or start the "
                "server with an API key",
                kind="permission_error",
                code="host_not_allowed",
            )
        if self._keys and scope["path"] not in self._open and not self._has_key(_values(headers, b"authorization")):
            raise ApiError(
                401,
                "this server needs an API key; send it as Authorization: Bearer KEY",
                kind="authentication_error",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    def cors_headers(self, scope: Scope) -> dict[str, str]:
        """Return the headers by which a page of an allowed origin may read the response; never with credentials."""
        if not self._origins:
            return {}
        headers = {"Vary": "Origin"}
        if (origin := self._origin(scope)) is not None:
            headers["Access-Control-Allow-Origin"] = origin.decode("ascii")
            headers["Access-Control-Expose-Headers"] = _EXPOSED_HEADERS
        return headers

    def preflight(self, scope: Scope) -> dict[str, str] | None:
        """Return the headers that answer the question of a browser before it asks; None where this is no such one."""
        asked = _values(scope["headers"], b"access-control-request-method")
        if scope["method"] != "OPTIONS" or not asked or self._origin(scope) is None:
            return None
        wanted = b",".join(_values(scope["headers"], b"access-control-request-headers")).decode("latin-1").lower()
        extra = [name for name in re.split(r"\s*,\s*", wanted.strip()) if _SDK_HEADER.fullmatch(name)]
        return {
            "Access-Control-Allow-Methods": "GET, POST",
            "Access-Control-Allow-Headers": ", ".join([_ALLOWED_HEADERS, *extra[:20]]),
            "Access-Control-Max-Age": "600",
        }

    def _origin(self, scope: Scope) -> bytes | None:
        found = _values(scope["headers"], b"origin")
        return found[0] if len(found) == 1 and found[0] in self._origins else None

    def _has_key(self, given: list[bytes]) -> bool:
        if len(given) != 1 or given[0][:7].lower() != b"bearer ":
            return False
        token = given[0][7:].strip()
        # Every key is compared, so that the time does not say which one was nearly right.
        return sum(hmac.compare_digest(token, key) for key in self._keys) > 0


def _closing(status: int, message: str) -> ApiError:
    return ApiError(status, message, kind=INVALID, headers={"Connection": "close"})


def _values(headers: Iterable[tuple[bytes, bytes]], wanted: bytes) -> list[bytes]:
    return [value for name, value in headers if name == wanted]


def _is_local(host: bytes) -> bool:
    """Whether a `Host` is localhost or an address, with any port."""
    text = host.decode("latin-1").strip().lower()
    name = re.sub(r":[0-9]{1,5}$", "", text)
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        ipaddress.ip_address(name[1:-1] if name.startswith("[") and name.endswith("]") else name)
    except ValueError:
        return False
    return True
