"""`internvl-edge chat BUNDLE`: hold a conversation in the terminal."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import sys
from collections.abc import Callable
from difflib import get_close_matches
from itertools import chain, islice
from pathlib import Path
from typing import Any

import click

from internvl_edge.base.errors import EdgeError
from internvl_edge.base.extras import require_extras
from internvl_edge.model.preprocess import load_image
from internvl_edge.model.prompt import marked_text
from internvl_edge.runtime.conversation import Conversation

from .options import answering_options, chat_options, engine_extra, load_model, loading_options
from .output import quiet_option, reading, shown_progress, timing_line

_HELP = "/image FILE adds an image to the next question, /clear forgets the turns, /history shows them, /quit ends"
_COMMANDS = ("/image", "/clear", "/history", "/quit")
# What a shell reads as more than itself, outside quotes.
_SPECIAL = re.compile(r"([^\w@%+=:,./~-])")


@click.command("chat")
@click.argument("bundle", type=click.Path(path_type=Path))
@quiet_option
@loading_options
@answering_options
def command(bundle: Path, quiet: bool, **values: Any) -> None:
    """Chat with BUNDLE in the terminal. It answers each line, and later questions see earlier turns.

    Lines that start with / are commands: /image FILE, /clear, /history, /quit. Ctrl-C stops an answer or clears the
    line; a second Ctrl-C or Ctrl-D ends.
    """
    require_extras("chat", *engine_extra(bundle, values["device"], values["engine"]))
    _edit_lines()
    with contextlib.suppress(AttributeError):  # a byte that is not UTF-8 is an error of one line, not of the program
        sys.stdin.reconfigure(errors="surrogateescape")  # type: ignore[union-attr]
    with contextlib.ExitStack() as stack:
        with shown_progress(quiet) as progress:
            model = stack.enter_context(load_model(bundle, values, progress))
        terminal = _Terminal(Conversation(model, **chat_options(values)), quiet)
        if not quiet:
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


def completions(line: str) -> tuple[str, list[str]]:
    """Complete the last word of a line: a command, or the name of a file after /image.

    Returns:
        The last word, and what can stand in its place. Special characters in names have a backslash before them.
    """
    if " " not in line:
        return line, [f"{name} " for name in _COMMANDS if line.startswith("/") and name.startswith(line)]
    if not line.startswith("/image "):
        return "", []
    found = re.search(r"(?:\\.|[^\s\\])*$", line)  # a space after a backslash is part of a name
    word = found[0] if found else ""
    typed = re.sub(r"\\(.)", r"\1", word)
    start = typed.rpartition("/")[2]
    prefix = typed[: len(typed) - len(start)]
    try:
        entries = sorted(os.scandir(os.path.expanduser(prefix) or "."), key=lambda entry: entry.name)
    except OSError:
        return word, []
    names = [
        prefix + entry.name + ("/" if entry.is_dir() else "")
        for entry in entries
        if entry.name.startswith(start) and (start or not entry.name.startswith("."))
    ]
    return word, [_SPECIAL.sub(r"\\\1", name) for name in names]


def _edit_lines() -> None:
    """Turn on editing, history and completion of what `input` reads, where the system has readline."""
    try:
        import readline
    except ImportError:
        return
    found: list[str] = []

    def complete(text: str, state: int) -> str | None:
        if not state:
            word, whole = completions(readline.get_line_buffer()[: readline.get_endidx()])
            # readline replaces `text`, the end of the word after a delimiter that a backslash may stand before.
            found[:] = [each[len(word) - len(text) :] for each in whole]
        return found[state] if state < len(found) else None

    readline.set_completer(complete)
    readline.set_completer_delims(" \t\n")
    libedit = "libedit" in (readline.__doc__ or "")
    readline.parse_and_bind("bind ^I rl_complete" if libedit else "tab: complete")


class _Terminal:
    """Reads lines and prints answers. An error in one line does not end the conversation."""

    def __init__(self, conversation: Conversation, quiet: bool) -> None:
        self._conversation = conversation
        self._quiet = quiet
        self._images: list[str] = []

    def read(self) -> str | None:
        """Return the next line, or None at the end of input, after /quit, or after Ctrl-C on two empty lines."""
        interrupted = False
        while True:
            try:
                line = input("> ").strip()
            except EOFError:
                return None
            except KeyboardInterrupt:
                click.echo()
                if interrupted:
                    return None
                interrupted = True
                click.secho("(Ctrl-C again, Ctrl-D or /quit ends)", dim=True)
                continue
            interrupted = False
            if line in ("/quit", "/exit"):
                return None
            if line:
                return line

    def handle(self, line: str) -> None:
        """Execute a command, or answer a question."""
        name, _, argument = line.partition(" ")
        commands: dict[str, Callable[[str], None]] = {
            "/image": self._add_images,
            "/clear": lambda argument: self._clear(),
            "/history": lambda argument: self._show_history(),
        }
        if name in commands:
            commands[name](argument.strip())
        elif name.startswith("/"):
            near = get_close_matches(name, _COMMANDS, n=1)
            click.secho(f"there is no command {name}; {f'did you mean {near[0]}?' if near else _HELP}", dim=True)
        else:
            self._answer(line)

    def _add_images(self, typed: str) -> None:
        if not typed:
            raise EdgeError("/image needs a file: /image photo.jpg")
        images = typed_paths(typed)
        for image in images:
            load_image(image)  # report a bad image now, not after the next question was typed
        self._images += images
        count = len(self._images)
        click.secho(f"{count} image{'s go' if count > 1 else ' goes'} with the next question", dim=True)

    def _clear(self) -> None:
        self._conversation.clear()
        self._images.clear()
        click.secho("cleared", dim=True)

    def _show_history(self) -> None:
        for question, answer in self._conversation.history:
            click.echo(f"> {marked_text(question)}\n{answer}")

    def _answer(self, question: str) -> None:
        images, self._images = self._images, []
        try:
            with shown_progress(self._quiet) as progress, progress.phase(reading(len(images))):
                pieces = self._conversation.stream(question, *images)
                first = list(islice(pieces, 1))
            for piece in chain(first, pieces):
                click.echo(piece, nl=False)
            click.echo()
        except KeyboardInterrupt:
            self._images = images  # so that the question can be asked again
            click.secho("\n(stopped; question and answer are not kept)", dim=True)
            return
        except EdgeError:
            self._images = images
            raise
        reply = self._conversation.reply
        if reply and sys.stderr.isatty() and not self._quiet:
            click.secho(timing_line(reply), dim=True, err=True)
