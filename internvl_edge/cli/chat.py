"""`internvl-edge chat BUNDLE`: hold a conversation in the terminal."""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import click

from internvl_edge.base.errors import EdgeError
from internvl_edge.model.preprocess import load_image
from internvl_edge.runtime.conversation import Conversation

from .options import answering_options, chat_options, load_model, loading_options
from .output import say_device

_HELP = "/image FILE adds an image to the next question, /clear forgets the turns, /history shows them, /quit ends"
_COMMANDS = ("/image", "/clear", "/history", "/quit")


@click.command("chat")
@click.argument("bundle", type=click.Path(path_type=Path))
@loading_options
@answering_options
def command(bundle: Path, **values: Any) -> None:
    """Chat with BUNDLE in the terminal. It answers each line, and later questions see earlier turns.

    Lines that start with / are commands: /image FILE, /clear, /history, /quit.
    """
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (line editing and history for input())
    with contextlib.suppress(AttributeError):  # a byte that is not UTF-8 is an error of one line, not of the program
        sys.stdin.reconfigure(errors="surrogateescape")  # type: ignore[union-attr]
    with load_model(bundle, values) as model:
        terminal = _Terminal(Conversation(model, **chat_options(values)))
        say_device(model.choice)
        click.secho(_HELP, dim=True)
        while (line := terminal.read()) is not None:
            try:
                terminal.handle(line)
            except EdgeError as error:
                click.secho(f"error: {error}", fg="red", err=True)


def typed_paths(text: str) -> list[str]:
    """Return the paths in a line that a person typed, or that a terminal wrote for files dropped on it.

    Quotes, backslashes, `~` and variables are expanded as a shell does. A text that is the name of a file as it stands
    is taken as it is, and so is one with an unclosed quote.
    """
    if not text or os.path.exists(text):
        return [text]
    try:
        posix = os.name != "nt"  # elsewhere a backslash separates folders, and quotes are kept
        words = [word if posix else word.strip('"') for word in shlex.split(text, posix=posix)]
    except ValueError:
        words = [text]
    return [os.path.expanduser(os.path.expandvars(word)) for word in words]


class _Terminal:
    """Reads lines and prints answers. An error in one line does not end the conversation."""

    def __init__(self, conversation: Conversation) -> None:
        self._conversation = conversation
        self._images: list[str] = []

    def read(self) -> str | None:
        """Return the next line, or None at the end of input or after /quit."""
        while True:
            try:
                line = input("> ").strip()
            except EOFError:
                return None
            except KeyboardInterrupt:
                click.echo()
                return None
            if line in ("/quit", "/exit"):
                return None
            if line:
                return line

    def handle(self, line: str) -> None:
        """Execute a command, or answer a question."""
        name, _, argument = line.partition(" ")
        if name == "/image":
            images = typed_paths(argument.strip())
            for image in images:
                load_image(image)  # report a bad image now, not after the next question was typed
            self._images += images
            click.secho(f"{len(self._images)} image(s) go with the next question", dim=True)
        elif name == "/clear":
            self._conversation.clear()
            self._images.clear()
            click.secho("cleared", dim=True)
        elif name == "/history":
            for question, answer in self._conversation.history:
                click.echo(f"> {question}\n{answer}")
        elif name.startswith("/"):
            near = get_close_matches(name, _COMMANDS, n=1)
            click.secho(f"there is no command {name}; {f'did you mean {near[0]}?' if near else _HELP}", dim=True)
        else:
            self._answer(line)

    def _answer(self, question: str) -> None:
        images, self._images = self._images, []
        try:
            for piece in self._conversation.stream(question, *images):
                click.echo(piece, nl=False)
            click.echo()
        except KeyboardInterrupt:
            click.secho("\n(stopped; this turn is not kept)", dim=True)
        except EdgeError:
            self._images = images
            raise
