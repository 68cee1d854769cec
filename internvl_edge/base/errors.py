"""What can be wrong on the user's side. Every message is one line: what was found, what was expected, what to do."""

from __future__ import annotations

from .text import one_line


class EdgeError(Exception):
    """A mistake in what the user gave, never a bug of ours; the command line prints it and exits with status 2.

    Its message is one line of at most `text.MESSAGE_LENGTH` characters, whatever was echoed in it.
    """

    def __init__(self, message: object = "") -> None:
        super().__init__(one_line(str(message)))


class CheckpointError(EdgeError):
    """The checkpoint folder, its configuration or one of its tensors is not usable."""


class BundleError(EdgeError):
    """The bundle is missing, damaged, or made by a newer version."""


class ImageError(EdgeError):
    """An image cannot be decoded or exceeds the stated limits."""


class PromptError(EdgeError):
    """The question, its history and its images do not fit together, or do not fit the context."""


class EngineError(EdgeError):
    """The device or its libraries cannot run the bundle."""


class QualityWarning(UserWarning):
    """A bundle is used that failed its quality gate."""
