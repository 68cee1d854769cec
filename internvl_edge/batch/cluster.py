"""A Ray cluster: how to reach it, whether strangers could use it, and how many workers fit.

Ray is imported where it is used: it is an extra of its own.
"""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from internvl_edge.base.errors import EdgeError, EngineError
from internvl_edge.base.extras import requires
from internvl_edge.base.text import one_line, shown

# CPUs that no worker takes at the start: one for reading, cutting and writing blocks, one for the filter of finished
# ids. Ray Data itself leaves room for these when it adds workers later.
SPARE_CPUS = 2
# Seconds to wait for the head of a cluster to accept a connection.
_CONNECT_S = 10.0


@dataclass(frozen=True)
class Fleet:
    """Where and how a batch is spread.

    Attributes:
        address: of a Ray cluster ("192.0.2.7:6379"), or "auto" for the one that `ray start` began on this machine.
        least, most: workers to begin with, which must fit, and at most; None is as many as fit, also later.
        cpus: of one worker, which is also its number of threads.
        gpus: of one worker.
    """

    address: str
    least: int = 1
    most: int | None = None
    cpus: float = 1.0
    gpus: float = 0.0


def parse_workers(text: str | None) -> tuple[int, int | None]:
    """Return the bounds that "4", "2:16" or None state.

    Raises:
        EdgeError: anything else.
    """
    if text is None:
        return 1, None
    least, colon, most = text.partition(":")
    if (
        not least.isdecimal()
        or (colon and not most.isdecimal())
        or not 1 <= int(least) <= int(most or least) <= 100_000
    ):
        raise EdgeError(f"--workers is {shown(text)}, expected a number such as 4, or bounds such as 2:16")
    return int(least), int(most or least)


@contextlib.contextmanager
def connected(address: str) -> Iterator[Any]:
    """Connect to a cluster, and leave it at the end.

    Raises:
        EdgeError: there is none, it has another Ray or Python, or anybody who reaches its port could run code.
    """
    with requires("fleet", "a batch on a Ray cluster"):
        import ray
    _require_listener(address)
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, configure_logging=True)
    except Exception as error:  # Ray raises ConnectionError, RuntimeError, ValueError and its own, by the cause
        reason = one_line(str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__, 200)
        raise EdgeError(
            f"no Ray cluster at {shown(address)} ({reason}); begin one with ray start --head, and give its address"
        ) from None
    try:
        require_protection(ray.get_runtime_context().gcs_address, os.environ.get("RAY_AUTH_MODE", ""))
        yield ray
    finally:
        ray.shutdown()


def _require_listener(address: str) -> None:
    """Raise EdgeError where nobody listens at HOST:PORT. Ray itself would go on trying for minutes."""
    host, colon, port = address.rpartition(":")
    if address == "auto":
        return
    if not colon or not host or not port.isdecimal():
        raise EdgeError(f"--ray is {shown(address)}, expected auto or HOST:PORT, such as 192.0.2.7:6379")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_S):
            pass
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise EdgeError(
            f"nobody listens at {address} ({reason}); begin a cluster with ray start --head, and give the address that "
            "it says"
        ) from None


def require_protection(address: str, mode: str) -> None:
    """Refuse a cluster that others can reach and that asks nobody for a token.

    Whoever reaches the port of such a cluster runs code on all of its machines.

    Args:
        address: of the cluster's head, HOST:PORT.
        mode: the value of RAY_AUTH_MODE.

    Raises:
        EdgeError: the host is not this machine alone, and the mode is not "token".
    """
    host = address.rsplit(":", 1)[0].strip("[]")
    try:
        local = ipaddress.ip_address(host).is_loopback
    except ValueError:
        local = host == "localhost"
    if not local and mode.lower() != "token":
        raise EdgeError(
            f"the Ray cluster at {address} asks for no token, so whoever reaches it runs code there; set "
            "RAY_AUTH_MODE=token for it and here (ray get-auth-token --generate makes a token)"
        )


def fitting_workers(nodes: Sequence[Mapping[str, float]], fleet: Fleet) -> tuple[int, int]:
    """Return how many workers to begin with, and how many at most, so that `SPARE_CPUS` stay free.

    Without them, Ray Data waits for ever and says nothing.

    Args:
        nodes: the resources of each node: "CPU", "GPU".
        fleet: what is asked for.

    Raises:
        EdgeError: not even the least number fits.
    """
    cpus = [node.get("CPU", 0.0) for node in nodes]
    fit = [
        int(min(node.get("CPU", 0.0) / fleet.cpus, node.get("GPU", 0.0) / fleet.gpus if fleet.gpus else 1e9))
        for node in nodes
    ]

    def free(place: int) -> float:
        return cpus[place] - fit[place] * fleet.cpus

    while sum(int(free(place) + 1e-9) for place in range(len(fit))) < SPARE_CPUS and any(fit):
        # The node that is nearest to another whole free CPU gives up a worker.
        place = max((place for place in range(len(fit)) if fit[place]), key=lambda place: free(place) % 1)
        fit[place] -= 1
    if sum(fit) < fleet.least:
        gpus = f" and {fleet.gpus:g} GPUs" if fleet.gpus else ""
        raise EdgeError(
            f"the cluster has {sum(cpus):g} CPUs on {len(nodes)} nodes, which leaves room for {sum(fit)} workers of "
            f"{fleet.cpus:g} CPUs{gpus} beside {SPARE_CPUS} CPUs for reading and writing; {fleet.least} were asked "
            "for: lower --workers or --cpus-per-worker, or add nodes"
        )
    return fleet.least, max(fleet.least, min(fleet.most or sum(fit), sum(fit)))


def is_rays_own(error: BaseException) -> bool:
    """Whether an error is one of Ray itself, as after the loss of a node, a worker or an object.

    Another attempt may then succeed. What a worker or a task of Ray Data raised would be raised again.
    """
    from ray.exceptions import RayError, RayTaskError

    causes = list(_causes(error))
    if any(isinstance(cause, EdgeError) or getattr(cause, "actor_init_failed", False) for cause in causes):
        return False
    raised = (cause.cause for cause in causes if isinstance(cause, RayTaskError))
    return isinstance(error, RayError) and all(isinstance(cause, RayError) for cause in raised)


def worker_failure(error: BaseException) -> EdgeError:
    """Return what went wrong in a worker as one line; finished rows are kept."""
    for cause in _causes(error):
        if isinstance(cause, EdgeError):
            return EngineError(f"a worker cannot go on: {cause}; finished rows are kept")
    return EdgeError(f"the cluster failed: {last_line(error)}; finished rows are kept")


def last_line(error: BaseException) -> str:
    """Return the last line of an error of Ray, which says the most; those before it are a traceback."""
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return one_line(lines[-1] if lines else repr(error), 250)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = getattr(error, "cause", None) or error.__cause__
