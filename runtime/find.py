"""Find a bundle by its folder or its hub id, with those of its TensorRT engines that this machine can run."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from internvl_edge.base.errors import EngineError
from internvl_edge.bundle.hub import resolve_bundle
from internvl_edge.bundle.names import ENGINE_RECORD, ENGINES


def find_bundle(name: str | Path, revision: str | None = None, device: str = "auto") -> Path:
    """Return the folder of a bundle. A hub id is downloaded into the cache of the hub's client, or found there.

    A local folder of this name comes first, and never causes network access. Engines are programs that nobody verifies
    against the manifest. They are downloaded only for the device "tensorrt", and of these only those that the present
    GPU and the installed TensorRT can run.

    Args:
        name: a folder, or a hub id such as "OWNER/NAME".
        revision: branch, tag or commit of a hub id; the default is its main branch.
        device: as `InternVL.load`.

    Raises:
        BundleError: as `bundle.hub.resolve_bundle`.
    """
    found = None if Path(name).exists() or device != "tensorrt" else _present_gpu()
    return resolve_bundle(name, revision, None if found is None else partial(_engine_files, sm=found))


def _present_gpu() -> int | None:
    """Return the compute capability of the present GPU as one number, None where there is none for TensorRT."""
    from .engines.tensorrt.cuda import Cuda

    try:
        cuda = Cuda()
    except EngineError:
        return None
    try:
        return cuda.compute_capability()
    except EngineError:
        return None
    finally:
        cuda.close()


def _engine_files(folder: Path, sm: int) -> list[str]:
    """Return the files of the first engines that fit a compute capability and the TensorRT that is installed."""
    from .engines.tensorrt.flavour import load_flavour
    from .engines.tensorrt.record import EngineRecord

    for path in sorted(folder.glob(f"{ENGINES}/*/{ENGINE_RECORD}")):
        try:
            record = EngineRecord.read(path.parent, complete=False)
            if sm in record.compute_capabilities and load_flavour(record.flavour).version == record.version:
                return [f"{ENGINES}/{record.target}/{name}" for name in record.files]
        except EngineError:  # of a newer version, or of a TensorRT that is not here
            continue
    return []
