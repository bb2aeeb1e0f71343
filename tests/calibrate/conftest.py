"""A few steps of the bundled pipeline, and small random pipelines of families that have something special."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from families import read
from pipelines import write_pipeline

from bitroute.eval.sampling import Sampling

CALL = {"height": 64, "width": 64, "num_inference_steps": 4, "guidance_scale": 0.0, "max_sequence_length": 16}
PROMPTS = ("red apple, noto style", "fox, fluent style", "guitar, noto style")


@pytest.fixture(scope="session")
def sampling() -> Sampling:
    return Sampling(PROMPTS, (0,), CALL)


@pytest.fixture(scope="session")
def family(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Writes the small pipeline of a family once."""
    written: dict[str, Path] = {}

    def family(name: str) -> Path:
        if name not in written:
            facts = read("small_pipelines.yaml")[name]
            written[name] = write_pipeline(tmp_path_factory.mktemp(name), facts)
        return written[name]

    return family
