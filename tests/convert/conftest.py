"""What the tests of models from the Hub share."""

from __future__ import annotations

from pathlib import Path

import pytest
from hub import Hub


@pytest.fixture
def commit(hub: Hub, source: Path) -> str:
    """The bundled pipeline as repositories look: with a single-file twin, other precisions and other frameworks."""
    (source / "flux1-tiny.safetensors").write_bytes(b"twin" * 1000)
    (source / "README.md").write_text("a model card")
    (source / "LICENSE.md").write_text("a licence")
    for name in ("diffusion_pytorch_model.fp16.safetensors", "flax_model.msgpack", "model.onnx", "model.onnx_data"):
        (source / "transformer" / name).write_bytes(b"other" * 1000)
    (source / "text_encoder_2" / "pytorch_model.bin").write_bytes(b"pickle" * 1000)
    return hub.add("me/tiny-flux", source)
