"""Which components of a candidate ran with activations that this device cannot multiply as they are stored."""

from __future__ import annotations

from pathlib import Path

import torch

from bitroute.convert.record import RecordedComponent, read_record
from bitroute.errors import BitrouteError


def emulated(model: Path, device: str) -> list[str]:
    """Names of components; empty for checkpoints of other tools, and where the record is damaged."""
    if not (model / "bitroute.json").is_file():
        return []
    try:
        record = read_record(model)
    except BitrouteError:  # a tripwire says so
        return []
    return [component.name for component in record.components if _emulates(component, torch.device(device))]


def _emulates(component: RecordedComponent, device: torch.device) -> bool:
    """What needs a GPU in its own library's container runs there or not at all."""
    ours = component.container == "bitroute"
    return any(
        entry.backend.emulates(device) and (ours or not entry.backend.gpu_to_compute()) for entry in component.entries
    )
