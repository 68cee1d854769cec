"""Lets users of Hugging Face's optimum find this exporter: optimum's `TasksManager` knows InternVL after `register()`.

    from internvl_edge.adapters.optimum import register
    from optimum.exporters.tasks import TasksManager
    register()
    found = TasksManager.get_exporter_config_constructor(
        "onnx", model_type="internvl_chat", task="image-text-to-text", library_name="transformers"
    )
    found(config).export("InternVL2_5-1B", "bundle")

Nothing is traced: what is found calls `export_bundle`, which writes graphs directly. optimum's own command line exports
by tracing and cannot use it. Needs the extra `optimum`.
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
    """What optimum hands out for InternVL.

    Args:
        config: the model's configuration object or None; the exporter reads the checkpoint's own `config.json`.
        task: `image-text-to-text`.
    """

    def __init__(self, config: Any = None, task: str = TASK, **unused: Any) -> None:
        self.config = config
        self.task = task

    def export(self, checkpoint: str | Path, out: str | Path, **options: Any) -> Path:
        """Export a checkpoint folder or hub id to a bundle; `options` are those of `export_bundle`.

        Raises:
            EdgeError: as `export_bundle`.
        """
        from internvl_edge.checkpoint.hub import resolve_checkpoint

        with requires("export", "export"):
            from internvl_edge.export import export_bundle
        return export_bundle(resolve_checkpoint(str(checkpoint)), out, **options)

    def __getattr__(self, name: str) -> Any:
        """Tracing exporters ask for inputs, outputs and patches, which do not exist here."""
        if name.startswith("__"):
            raise AttributeError(name)
        raise EdgeError(f"InternVL is not exported by tracing, so there is no {name}; call export(checkpoint, out)")


def register() -> None:
    """Make InternVL known to optimum's TasksManager, in both layouts; existing entries stay.

    Raises:
        EdgeError: optimum is not installed or cannot be imported.
    """
    with requires("optimum", "register()"):
        from optimum.exporters.tasks import TasksManager
    add = TasksManager.create_register(BACKEND)
    for model_type in MODEL_TYPES:
        add(model_type, TASK)(InternVLExport)
