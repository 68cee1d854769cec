"""How a server is set up, and the limits that it keeps. docs/serve.md gives the reasons."""

from __future__ import annotations

from dataclasses import dataclass

# Seconds that a client has for the head of a request, and for each further piece of a body.
HEAD_S = 10.0
PIECE_S = 10.0
# A body must arrive at this many bytes/s in the mean, after the first `PIECE_S` seconds.
SLOWEST_BODY = 16 << 10
# Seconds that a client may leave a response unread before it is dropped.
UNREAD_S = 60.0
# Seconds after which an idle connection is closed.
IDLE_S = 30
MOST_CONNECTIONS = 1000
HEAD_BYTES = 32 << 10
# Seconds without a step of the engine after which /livez says that it is stuck.
STUCK_S = 120.0
# Seconds between two comment lines in a stream that has nothing to say yet.
WAITING_S = 10.0
# Pixels above which an image is decoded alone. 4 million take about 30 MB.
LARGE_PIXELS = 4_000_000
# Images that are fetched at once, and the seconds that one may take.
FETCHES = 4
FETCH_S = 10.0
# What "Retry-After" says while a model is loaded, or by a server that is about to end.
RETRY_LOADING_S = 5
RETRY_DRAINING_S = 10


@dataclass(frozen=True)
class Limits:
    """The most that one request, or all together, may ask for.

    Attributes:
        body_bytes: of a request, and of a fetched image.
        values: commas and opening brackets in the JSON of a body, each of which may become an object of Python's.
        images, tiles: of a request.
        pixels: width x height of an image.
        samples: `n` and `votes`.
        memory_bytes: of all requests together: bodies while they are read, then tiles.
        queue: requests that may wait while every row is taken.
        request_s: seconds from the head of a request to the end of its answer.
    """

    body_bytes: int = 20 << 20
    values: int = 200_000
    images: int = 16
    tiles: int = 64
    pixels: int = 32_000_000
    samples: int = 8
    memory_bytes: int = 512 << 20
    queue: int = 32
    request_s: float = 300.0


@dataclass(frozen=True)
class Settings:
    """How a server is set up.

    Attributes:
        model: the name that it serves.
        rows: answers that are computed together.
        max_tiles: the most tiles of an image whose `detail` is "auto".
        exif, background: how images are read, see `load_image`.
        keys: API keys, of which each request needs one; none for a server that is open.
        local_names: whether the `Host` of a request must be an address or "localhost". It keeps a page on the network
            whose name is made to point at this machine from asking a server that has no key.
        cors_origins: origins whose pages may call the server.
        image_hosts: hosts, or "host:port", whose images may be fetched.
        open_metrics: whether /metrics needs no key.
        strict_fields: whether a field that nobody knows is an error.
        drain_s: seconds that answers under way have after SIGTERM.
    """

    model: str
    rows: int = 1
    max_tiles: int = 6
    exif: bool = False
    background: str | None = None
    keys: tuple[str, ...] = ()
    local_names: bool = False
    cors_origins: tuple[str, ...] = ()
    image_hosts: tuple[str, ...] = ()
    open_metrics: bool = False
    strict_fields: bool = False
    drain_s: float = 25.0
    limits: Limits = Limits()
