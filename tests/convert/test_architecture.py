"""The class of a component: what its config may say, and what is never done for it."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from bitroute import plan
from bitroute.convert.architecture import build_model
from bitroute.convert.checkpoint import Component
from bitroute.errors import RecipeError

KERNEL = "kernels-community/flash-attn2"  # not there: looking for it is an error
KEYS = ["attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation"]


def edit_json(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def refusal(source: Path) -> str:
    with pytest.raises(RecipeError) as refused:
        plan("tiny-flux-fp8", str(source))
    return str(refused.value)


@pytest.mark.parametrize(
    ("config", "got"),
    [
        ({"quant_method": "fp8"}, "quant_method 'fp8'"), ({"x": 1}, "quant_method nothing"), (["fp8"], "['fp8']"),
        ("fp8", "'fp8'"), (3, "3"), ({"quant_method": "x" * 5000}, "x" * 70),
    ],
    ids=lambda value: str(value)[:20],
)  # fmt: skip
@pytest.mark.parametrize("part", ["transformer", "text_encoder_2"])
def test_a_quantization_config_of_any_kind_is_refused(source: Path, part: str, config: object, got: str) -> None:
    edit_json(source / part / "config.json", quantization_config=config)
    words = refusal(source)
    assert f"component {part!r} is already quantized" in words
    assert got in words
    assert max(map(len, words.splitlines())) < 300


@pytest.mark.parametrize(("part", "library"), [("transformer", "diffusers"), ("text_encoder_2", "transformers")])
def test_a_class_name_is_shown_escaped_and_never_long(source: Path, part: str, library: str) -> None:
    edit_json(source / "model_index.json", **{part: [library, "X\x1b" * 5000]})
    words = refusal(source)
    assert "has no model class 'X\\x1bX\\x1b" in words
    assert len(words) < 1000


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("value", [KERNEL, {"": KERNEL}, "flash_attention_2"], ids=["name", "mapping", "flash"])
def test_no_kernel_is_looked_for_that_a_config_names(source: Path, key: str, value: object) -> None:
    expected = plan("tiny-flux-fp8", str(source)).size_bytes
    for part in ("transformer", "text_encoder_2"):
        edit_json(source / part / "config.json", **{key: value})
    assert plan("tiny-flux-fp8", str(source)).size_bytes == expected


def test_no_kernel_is_looked_for_that_a_config_inside_a_config_names(tmp_path: Path) -> None:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    inner = {**sizes, **dict.fromkeys(KEYS[1::2], KERNEL)}
    config = {"text_config": {**inner, "vocab_size": 8}, "vision_config": {**inner, "image_size": 8, "patch_size": 8}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", 2) + b"{}")
    model: Any = build_model(Component("text_encoder", "transformers", "CLIPModel", tmp_path))
    assert {part.config._attn_implementation for part in (model, model.text_model, model.vision_model)} == {"sdpa"}
