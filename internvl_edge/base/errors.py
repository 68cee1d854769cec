"""The errors that a user can correct.

Every message is one line: what was found, what was expected, and what to do.
"""

from __future__ import annotations

from .text import one_line


class EdgeError(Exception):
    """An error in the user's input, and not a bug. The command line prints it and exits with status 2.

    Its message is one line of at most `text.MESSAGE_LENGTH` characters, whatever input it quotes.
    """

    def __init__(self, message: object = "") -> None:
        super().__init__(one_line(str(message)))


class CheckpointError(EdgeError):
    """The checkpoint folder, its configuration or one of its tensors cannot be used."""


class BundleError(EdgeError):
    """The bundle is missing, damaged, or made by a newer version."""


class ImageError(EdgeError):
    """An image cannot be decoded or exceeds the stated limits."""


class PromptError(EdgeError):
    """The question, its history and its images do not fit together, or do not fit the context."""


class EngineError(EdgeError):
    """The device or its libraries cannot run the bundle."""


class FormError(EngineError):
    """The form that an answer must have became too complex, or no token of the model can continue it."""


class BusyError(EngineError):
    """Too many questions wait for a model. A later one may be taken."""


class QualityWarning(UserWarning):
    """A bundle is used that failed its quality gate."""


class ContextWarning(UserWarning):
    """More tokens are asked for than the model was trained on."""


class RestoredWarning(UserWarning):
    """A folder was missing because a process was killed while it replaced it; the old one was put back."""
