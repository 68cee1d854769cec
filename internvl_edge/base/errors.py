"""What can be wrong on the user's side. Every message is one line: what was found, what was expected, what to do."""


class EdgeError(Exception):
    """A mistake in what the user gave, never a bug of ours; the command line prints it and exits with status 2."""


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


class RestoredWarning(UserWarning):
    """A folder was missing because a process was killed while it replaced it; the old one was put back."""
