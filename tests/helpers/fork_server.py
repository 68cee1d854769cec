"""A process that has imported the libraries and forks for each Python program that a test runs.

An import of torch takes longer than most of these programs. Nothing of internvl_edge is imported here: each program
imports all of it, as one that a user starts does.

    python fork_server.py SOCKET

SOCKET is a descriptor. Each message there is a JSON object (code, arguments, environment, directory) with the
descriptors of standard input, output and error. The answers are the process's id, and in the end its exit status.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import socket
import sys
import threading
from contextlib import suppress
from typing import Any

# What takes long to import, without what starts a thread then (onnxruntime): a fork would lose it.
LIBRARIES = ("numpy", "PIL.Image", "click", "tokenizers", "ml_dtypes", "onnx", "onnx_ir", "torch")


def serve(channel: socket.socket) -> None:
    """Fork for each message, until nobody has the other end."""
    while True:
        message, streams, _, _ = socket.recv_fds(channel, 1 << 20, 3)
        if not message:
            return
        child = os.fork()
        if not child:
            channel.close()
            for number, stream in enumerate(streams):
                os.dup2(stream, number)
                os.close(stream)
            os._exit(run(json.loads(message)))
        for stream in streams:
            os.close(stream)
        channel.send(str(child).encode())
        channel.send(str(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])).encode())


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
