"""The hash of a JSON file inside itself, so that one changed bit shows: of its text with zeros for the hash."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bitroute.errors import Problem, SourceError

SEAL = "seal"
OPEN = "0" * 64


def sealed_text(content: Mapping[str, Any]) -> str:
    """The content as `write_json` writes it, with its seal as the last key."""
    text = json.dumps({**content, SEAL: OPEN}, indent=1)
    before, _, after = text.rpartition(OPEN)
    return before + hashlib.sha256(text.encode()).hexdigest() + after


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """What `sealed_text` holds."""
    found: dict[str, Any] = json.loads(sealed_text(content))
    return found


def check_seal(file: Path, content: Mapping[str, Any]) -> None:
    """Raises SourceError where the file, whose content that is, was changed since it was sealed.

    The bytes are hashed, not their meaning: a bit that only turns an escape to capitals shows as well.
    """
    seal = content.get(SEAL)
    if isinstance(seal, str) and len(seal) == len(OPEN):
        before, _, after = file.read_bytes().removesuffix(b"\n").rpartition(seal.encode())
        if hashlib.sha256(before + OPEN.encode() + after).hexdigest() == seal:
            return
    raise SourceError(
        Problem(
            f"the file {file.name} was changed after the job", str(file.parent),
            next_step="convert again, or copy the checkpoint again",
        )
    )  # fmt: skip
