"""`import bitroute`: what it costs, what it shows, and that it makes both libraries load the container."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import bitroute
from bitroute.backends import create

HEAVY = ("torch", "diffusers", "transformers", "pydantic", "numpy", "bitroute.backends", "bitroute.convert")
LAYER = "encoder.block.0.layer.1.DenseReluDense.wo"
LOAD = f"""
from pathlib import Path
folder = Path({{folder!r}})
model, info = transformers.T5EncoderModel.from_pretrained(folder / "text_encoder_2", output_loading_info=True)
assert not any(info.values()), info
assert model.get_submodule({LAYER!r}).weight.float().abs().mean() > 0.001
model, info = diffusers.FluxTransformer2DModel.from_pretrained(folder / "transformer", output_loading_info=True)
assert not any(info.values()), info
print(type(model.proj_out).__name__)
"""


def run(code: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_loads_no_library() -> None:
    loaded = json.loads(run("import sys, json, bitroute; print(json.dumps(list(sys.modules)))"))
    assert [name for name in HEAVY if name in loaded] == []


def test_the_public_names_are_sorted_and_shown_without_being_resolved() -> None:
    code = "import sys, bitroute; print(dir(bitroute) == bitroute.__all__, 'bitroute.errors' in sys.modules)"
    assert run(code).split() == ["True", "False"]
    assert bitroute.__all__ == sorted(bitroute.__all__)


def test_the_error_root_and_the_version_are_at_the_front_door() -> None:
    from bitroute.errors import BitrouteError

    assert bitroute.BitrouteError is BitrouteError
    assert bitroute.__version__ == version("bitroute")


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'quantise'"):
        bitroute.quantise  # noqa: B018 - the access is the test


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A T5 and a Flux transformer with one MXFP4 layer each; its code table is made when its module is imported."""
    folder = tmp_path_factory.mktemp("checkpoint")
    for component, layer in (("text_encoder_2", LAYER), ("transformer", "proj_out")):
        _write(folder / component, component, layer)
    return folder


def _write(folder: Path, component: str, layer: str) -> None:
    source = Path(str(files("bitroute.recipes"))) / "tiny-flux" / component
    weights = next(source.glob("*.safetensors"))
    tensors = load_file(weights)
    stored = create("mxfp4").quantize(tensors.pop(f"{layer}.weight"))
    folder.mkdir()
    save_file(tensors | {f"{layer}.{name}": tensor for name, tensor in stored.items()}, folder / weights.name)
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "bitroute",
        "format_version": 1,
        "groups": [{"backend": "mxfp4", "options": {}, "layers": [layer]}],
    }
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    "imports",
    [
        "import bitroute, diffusers, transformers",
        "import diffusers.quantizers.auto, transformers.quantizers.auto, bitroute",
        "import transformers.quantizers.auto, bitroute, diffusers, bitroute",
    ],
    ids=["bitroute first", "bitroute last", "bitroute between"],
)
def test_a_checkpoint_loads_in_whichever_order_the_libraries_are_imported(
    checkpoint: Path, imports: str
) -> None:
    assert run(imports + LOAD.format(folder=str(checkpoint))).strip() == "QuantizedLinear"


def test_importing_a_library_imports_no_backend() -> None:
    code = (
        "import sys, bitroute, diffusers.quantizers.auto, transformers.quantizers.auto;"
        "print([name for name in sys.modules if name.startswith('bitroute.backends.')])"
    )
    backends = [f"bitroute.backends.{name}" for name in ("_diffusers", "_transformers", "base", "load")]
    assert sorted(eval(run(code))) == backends


def test_a_failing_registration_does_not_break_the_import_of_the_library() -> None:
    code = (
        "import sys, bitroute; sys.modules['bitroute.backends.load'] = None;"
        "import diffusers.quantizers.auto as auto; print('bitroute' in auto.AUTO_QUANTIZER_MAPPING)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "False"
    assert "cannot register with diffusers.quantizers.auto" in done.stderr


def test_the_face_is_not_torn_by_a_reload() -> None:
    assert torch.__version__  # a loaded torch must not matter
