"""Members of a `quantization_config` that both formats have, checked where they are read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from internvl_edge.base.errors import CheckpointError
from internvl_edge.base.text import shown
from internvl_edge.model.limits import LARGEST


def module_names(values: Mapping[str, Any], name: str, where: str = "quantization_config") -> tuple[str, ...]:
    """A list of texts; absent and null are an empty one.

    Raises:
        CheckpointError: anything else.
    """
    found = values.get(name)
    if found is None:
        return ()
    if not isinstance(found, list) or not all(isinstance(each, str) for each in found):
        raise CheckpointError(f"{where}: {name} is {shown(found)}, expected a list of module names")
    return tuple(found)


def inputs_per_group(value: Any, where: str = "quantization_config") -> int:
    """How many inputs share a scale.

    Raises:
        CheckpointError: no whole number of inputs.
    """
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= LARGEST["intermediate_size"]:
        raise CheckpointError(f"{where}: group_size is {shown(value)}, expected a number of inputs or -1")
    return value
