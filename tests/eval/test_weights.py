"""Tier 0: the figures are those of plain numpy, the limit is 6.02 dB a bit, and damage is one reason."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file
from torch import Tensor

from bitroute import quantize
from bitroute.convert.files import write_json
from bitroute.convert.seal import sealed
from bitroute.errors import JobError
from bitroute.eval.weights import weigh

WEIGHTS = "diffusion_pytorch_model.safetensors"
LAYERS = ("transformer_blocks.0.attn.to_q", "single_transformer_blocks.1.proj_mlp")
INT8 = f"""
model: builtin:tiny-flux
components:
  transformer:
    container: bitroute
    rules:
      - {{layers: {LAYERS[0]}, backend: int8}}
      - {{layers: {LAYERS[1]}, backend: int8}}
"""
Convert = Callable[[str], Path]


@pytest.fixture
def int8(tmp_path: Path, convert: Convert) -> Path:
    """A checkpoint of one's own with two quantized layers."""
    return Path(shutil.copytree(convert(INT8), tmp_path / "int8"))


def change(checkpoint: Path, edit: Callable[[dict[str, Tensor]], Any]) -> None:
    file = checkpoint / "transformer" / WEIGHTS
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, {"format": "pt"})


def by_hand(*pairs: tuple[np.ndarray, np.ndarray], stored_bytes: int) -> dict[str, float]:
    """Float32 weights and their decoded values."""
    wanted = np.concatenate([w.ravel() for w, _ in pairs])
    error = np.concatenate([(decoded - w).ravel() for w, decoded in pairs])
    relative = np.linalg.norm(error.astype(np.float64)) / np.linalg.norm(wanted.astype(np.float64))
    bits = 8 * stored_bytes / wanted.size
    sqnr_db = -20 * math.log10(relative)
    gap_db = 20 * math.log10(2) * bits - sqnr_db
    return {"bits_per_weight": bits, "relative_error": relative, "sqnr_db": sqnr_db, "gap_db": gap_db}


def test_the_figures_are_those_of_plain_numpy(int8: Path, tiny: Path) -> None:
    source, stored = load_file(tiny / "transformer" / WEIGHTS), load_file(int8 / "transformer" / WEIGHTS)
    pairs, sizes = {}, {}
    for layer in LAYERS:
        codes, scales = (stored[f"{layer}.{suffix}"].float().numpy() for suffix in ("qdata", "scale"))
        pairs[layer] = (source[f"{layer}.weight"].float().numpy(), codes * scales.reshape(-1, 1))
        sizes[layer] = sum(
            t.nbytes for name, t in stored.items() if name.startswith(f"{layer}.") and not name.endswith("bias")
        )
    found = weigh(int8, tiny)["transformer"]
    layers = found.pop("layers")
    whole = by_hand(*pairs.values(), stored_bytes=sum(sizes.values()))
    largest = max(float(abs(decoded - w).max()) for w, decoded in pairs.values())
    limit_db = 20 * math.log10(2) * whole["bits_per_weight"]
    assert found == pytest.approx({**whole, "limit_db": limit_db, "largest_error": largest}, rel=1e-9)
    by_layer = {layer: by_hand(pairs[layer], stored_bytes=sizes[layer]) for layer in LAYERS}
    worst_first = sorted(LAYERS, key=lambda layer: by_layer[layer]["sqnr_db"])
    assert [(entry.pop("layer"), entry.pop("backend")) for entry in layers] == [(name, "int8") for name in worst_first]
    for entry, layer in zip(layers, worst_first, strict=True):
        assert entry == pytest.approx(by_layer[layer], rel=1e-9)


def test_a_bit_is_worth_six_decibels(convert: Convert, tiny: Path) -> None:
    for figures in weigh(convert("tiny-flux-mixed"), tiny).values():
        assert figures["limit_db"] == pytest.approx(6.02 * figures["bits_per_weight"], rel=1e-3)
        assert figures["gap_db"] == pytest.approx(figures["limit_db"] - figures["sqnr_db"])
        assert all(layer["gap_db"] > 0 for layer in figures["layers"])


@pytest.mark.parametrize(
    ("backend", "bits", "low", "high"),
    [
        ("mxfp4", 4.25, 0.10, 0.125),
        ("nvfp4", 4.5, 0.08, 0.10),
        ("int8", 8.1, 0.005, 0.01),
        ("float8", 8.1, 0.024, 0.028),
    ],
)
def test_each_format_loses_what_it_loses_on_gaussian_weights(
    convert: Convert, tiny: Path, backend: str, bits: float, low: float, high: float
) -> None:
    recipe = f"model: builtin:tiny-flux\ncomponents:\n  transformer: {{backend: {backend}}}\n"
    figures = weigh(convert(recipe), tiny)["transformer"]
    assert figures["bits_per_weight"] == pytest.approx(bits, abs=0.08)
    assert low < figures["relative_error"] < high
    assert figures["sqnr_db"] == pytest.approx(-20 * math.log10(figures["relative_error"]))


def test_the_ten_worst_layers_are_listed_worst_first(convert: Convert, tiny: Path) -> None:
    found = weigh(convert("tiny-flux-mixed"), tiny)
    assert set(found) == {"transformer", "text_encoder_2"}
    errors = [layer["relative_error"] for layer in found["transformer"]["layers"]]
    assert len(errors) == 10
    assert errors == sorted(errors, reverse=True)
    assert {layer["backend"] for layer in found["text_encoder_2"]["layers"]} == {"int8"}


def test_layers_that_lost_nothing_are_called_identical(source: Path, write_recipe: Callable[[str], str]) -> None:
    file = source / "transformer" / WEIGHTS
    tensors = load_file(file)
    for layer in LAYERS:
        tensors[f"{layer}.weight"].zero_()
    save_file(tensors, file, {"format": "pt"})
    found = weigh(quantize(write_recipe(INT8), str(source), source.parent / "out"), source)["transformer"]
    assert (found["sqnr_db"], found["relative_error"], found["largest_error"]) == ("identical", 0.0, 0.0)
    assert [(layer["sqnr_db"], layer["relative_error"]) for layer in found["layers"]] == [("identical", 0.0)] * 2
    json.dumps(found, allow_nan=False)


def test_checkpoints_of_other_tools_and_components_that_are_kept_have_no_figures(tiny: Path, convert: Convert) -> None:
    assert weigh(tiny, tiny) == {}
    assert set(weigh(convert(INT8), tiny)) == {"transformer"}
    assert weigh(convert("model: builtin:tiny-flux\ncomponents:\n  transformer: {backend: keep}\n"), tiny) == {}


def cut_the_record(checkpoint: Path) -> None:
    text = (checkpoint / "bitroute.json").read_text()
    (checkpoint / "bitroute.json").write_text(text[: len(text) // 2])


def cut_the_weights(checkpoint: Path) -> None:
    file = checkpoint / "transformer" / WEIGHTS
    file.write_bytes(file.read_bytes()[:-100])


def remove_the_component(checkpoint: Path) -> None:
    shutil.rmtree(checkpoint / "transformer")


def rename_a_backend(checkpoint: Path) -> None:
    text = (checkpoint / "bitroute.json").read_text().replace('"backend": "int8"', '"backend": "int9"')
    write_json(checkpoint / "bitroute.json", sealed(json.loads(text)))


def drop_a_scale(checkpoint: Path) -> None:
    change(checkpoint, lambda tensors: tensors.pop(f"{LAYERS[0]}.scale"))


def recast_the_codes(checkpoint: Path) -> None:
    change(checkpoint, lambda tensors: tensors.update({f"{LAYERS[0]}.qdata": tensors[f"{LAYERS[0]}.qdata"].float()}))


def put_a_nan(checkpoint: Path) -> None:
    change(checkpoint, lambda tensors: tensors[f"{LAYERS[0]}.scale"].fill_(math.nan))


def zero_both(checkpoint: Path) -> None:
    change(checkpoint, lambda tensors: [tensors[f"{layer}.qdata"].zero_() for layer in LAYERS])


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (cut_the_record, "cannot read the file as JSON"),
        (cut_the_weights, "not a sound safetensors file"),
        (remove_the_component, "No such file or directory"),
        (rename_a_backend, "unknown backend 'int9'"),
        (drop_a_scale, rf"'{LAYERS[0]}\.scale' is not as planned: no such tensor"),
        (recast_the_codes, rf"'{LAYERS[0]}\.qdata' is not as planned"),
        (put_a_nan, rf"'{LAYERS[0]}\.weight' does not hold its weight: NaN or infinite values"),
        (zero_both, r"does not hold its weight: SQNR 0\.0 dB, and 1 more"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_damage_is_a_job_error_with_one_reason(
    int8: Path, tiny: Path, harm: Callable[[Path], None], reason: str
) -> None:
    harm(int8)
    with pytest.raises(JobError, match=reason) as error:
        weigh(int8, tiny)
    assert len(error.value.problems) == 1


def test_another_original_than_the_source_is_a_job_error(int8: Path, source: Path) -> None:
    index = json.loads((source / "model_index.json").read_text())
    (source / "model_index.json").write_text(json.dumps({k: v for k, v in index.items() if k != "transformer"}))
    with pytest.raises(JobError, match="the source has no component 'transformer'"):
        weigh(int8, source)
