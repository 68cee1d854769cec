"""A process that has imported the libraries and forks for each Python program that a test runs.

An import of torch takes longer than most of these programs. Nothing of internvl_edge is imported here: each program
imports all of it, as one that a user starts does.

    python fork_server.py SOCKET

SOCKET is a descriptor. Each message there is a JSON object (code, arguments, environment, directory) with four
descriptors: standard input, output and error, and a socket for answers. They are the process's id, and in the end its
exit status.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import selectors
import socket
import sys
import threading
from contextlib import suppress
from typing import Any

# What takes long to import, without what starts a thread then (onnxruntime): a fork would lose it.
LIBRARIES = (
    *("numpy", "PIL.Image", "click", "tokenizers", "ml_dtypes", "onnx", "onnx_ir", "torch"),
    *("jinja2", "matplotlib.figure", "matplotlib.backends.backend_svg"),
)


def serve(channel: socket.socket) -> None:
    """Fork for each message, until nobody has the other end. Several programs can run at a time."""
    with selectors.DefaultSelector() as events:
        events.register(channel, selectors.EVENT_READ)
        while True:
            for event, _ in events.select():
                if event.fileobj is not channel:
                    events.unregister(event.fileobj)
                    os.close(event.fd)
                    child, answers = event.data
                    with answers, suppress(BrokenPipeError):
                        answers.send(str(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])).encode())
                    continue
                message, descriptors, _, _ = socket.recv_fds(channel, 1 << 20, 4)
                if not message:
                    return
                child = os.fork()
                if not child:
                    for number, stream in enumerate(descriptors[:3]):
                        os.dup2(stream, number)
                    os.closerange(3, 1024)
                    os._exit(run(json.loads(message)))
                for stream in descriptors[:3]:
                    os.close(stream)
                answers = socket.socket(fileno=descriptors[3])
                answers.send(str(child).encode())
                events.register(os.pidfd_open(child), selectors.EVENT_READ, (child, answers))


def run(program: dict[str, Any]) -> int:
    """Run a program as the interpreter does, and return its status.

    What the interpreter does in the end is done here, but for taking all modules apart, which takes long.
    """
    os.environ.clear()
    os.environ.update(program["environment"])
    os.chdir(program["directory"])
    sys.argv, sys.path[0] = ["-c", *program["arguments"]], ""
    status: object = None
    try:
        exec(compile(program["code"], "<string>", "exec"), {"__name__": "__main__"})
    except SystemExit as stop:
        status = stop.code
    except BaseException:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]  # there is an exception
        status = 1
    if not (status is None or isinstance(status, int)):
        print(status, file=sys.stderr)
        status = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    return status or 0


if __name__ == "__main__":
    for name in LIBRARIES:
        with suppress(ImportError):
            importlib.import_module(name)
    gc.freeze()
    with suppress(KeyboardInterrupt):
        serve(socket.socket(fileno=int(sys.argv[1])))
