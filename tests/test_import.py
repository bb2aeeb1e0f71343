"""`import bitroute`: what it costs, what it shows, and that it makes both libraries load the container."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import bitroute
from bitroute.backends import create

HEAVY = ("torch", "diffusers", "transformers", "pydantic", "numpy", "bitroute.backends", "bitroute.convert")
LAYER = "encoder.block.0.layer.1.DenseReluDense.wo"
LOAD = f"""
import sys
from pathlib import Path
from diffusers import FluxTransformer2DModel
print(*sorted(name for name in sys.modules if name.startswith("bitroute.backends.")))
folder = Path({{folder!r}})
model, info = transformers.T5EncoderModel.from_pretrained(folder / "text_encoder_2", output_loading_info=True)
assert not any(info.values()), info
assert model.get_submodule({LAYER!r}).weight.float().abs().mean() > 0.001
model, info = FluxTransformer2DModel.from_pretrained(folder / "transformer", output_loading_info=True)
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
    """A T5 and a Flux transformer with one MXFP4 layer each, whose code table is made on import."""
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
    ],
    ids=["bitroute first", "bitroute last"],
)
def test_a_checkpoint_loads_in_whichever_order_the_libraries_are_imported(checkpoint: Path, imports: str) -> None:
    modules, layer = run(imports + LOAD.format(folder=str(checkpoint))).splitlines()
    quantizers = ("_adapters", "_diffusers", "_transformers", "base", "layers", "load")
    assert modules.split() == [f"bitroute.backends.{name}" for name in quantizers]  # and no backend
    assert layer == "QuantizedLinear"


def test_a_failing_registration_does_not_break_the_import_of_the_library(tmp_path: Path) -> None:
    """A later diffusers may keep its tables elsewhere."""
    package = tmp_path / "diffusers" / "quantizers"
    package.mkdir(parents=True)
    for file, text in ((package.parent / "__init__.py", ""), (package / "auto.py", "TABLES = {}")):
        file.write_text(text)
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import bitroute;"
        "from diffusers.quantizers.auto import TABLES; print(TABLES)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "{}"
    assert "cannot register with diffusers.quantizers.auto" in done.stderr
