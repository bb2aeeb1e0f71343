"""What the tests of conversion share: a repository on the Hub, folders that cannot be read."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
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


@pytest.fixture
def locked(tmp_path: Path) -> Callable[[Path], AbstractContextManager[None]]:
    """Takes all rights to a folder away; also from root, which reads everything and so becomes nobody meanwhile."""

    @contextmanager
    def lock(folder: Path) -> Iterator[None]:
        user = os.geteuid()
        for place in (tmp_path, *tmp_path.parents):
            if user == 0 and place.stat().st_mode & 0o011 != 0o011:  # nobody has to come as far as the folder
                place.chmod(place.stat().st_mode | 0o011)
        folder.chmod(0)
        try:
            if user == 0:
                os.seteuid(65534)
            yield
        finally:
            os.seteuid(user)
            folder.chmod(0o755)

    return lock
