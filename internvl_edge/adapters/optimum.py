"""Make this exporter available in Hugging Face's optimum: `register()` adds InternVL to optimum's `TasksManager`.

    from internvl_edge.adapters.optimum import register
    from optimum.exporters.tasks import TasksManager
    register()
    found = TasksManager.get_exporter_config_constructor(
        "onnx", model_type="internvl_chat", task="image-text-to-text", library_name="transformers"
    )
    found(config).export("InternVL2_5-1B", "bundle")

The exporter does not trace the model: it calls `export_bundle`, which writes the graphs directly. The command line of
optimum exports by tracing and cannot use it. The extra `optimum` is necessary.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from internvl_edge.base.errors import EdgeError
from internvl_edge.base.extras import requires

BACKEND = "onnx"
TASK = "image-text-to-text"
MODEL_TYPES = ("internvl_chat", "internvl")


class InternVLExport:
    """The exporter that optimum returns for InternVL.

    Args:
        config: the model's configuration object or None. The exporter reads `config.json` of the checkpoint instead.
        task: `image-text-to-text`.
    """

    def __init__(self, config: Any = None, task: str = TASK, **unused: Any) -> None:
        self.config = config
        self.task = task

    def export(self, checkpoint: str | Path, out: str | Path, *, revision: str | None = None, **options: Any) -> Path:
        """Export a checkpoint folder or hub id to a bundle; `options` are those of `export_bundle`, and `revision`.

        Raises:
            EdgeError: as `export_bundle`.
        """
        from internvl_edge.checkpoint.hub import resolve_checkpoint

        with requires("export", "export"):
            from internvl_edge.export import export_bundle
        return export_bundle(resolve_checkpoint(str(checkpoint), revision), out, **options)

    def __getattr__(self, name: str) -> Any:
        """Raise EdgeError: tracing exporters use inputs, outputs and patches, which do not exist here."""
        if name.startswith("__"):
            raise AttributeError(name)
        raise EdgeError(f"InternVL is not exported by tracing, so there is no {name}; call export(checkpoint, out)")


def register() -> None:
    """Register InternVL in optimum's TasksManager, in both checkpoint layouts. Existing entries stay.

    Raises:
        EdgeError: optimum is not installed or cannot be imported.
    """
    with requires("optimum", "register()"):
        from optimum.exporters.tasks import TasksManager
    add = TasksManager.create_register(BACKEND)
    for model_type in MODEL_TYPES:
        add(model_type, TASK)(InternVLExport)
