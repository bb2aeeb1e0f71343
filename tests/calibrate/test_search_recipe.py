"""Whatever is chosen, the recipe says it: planned again, every layer has its candidate and every byte is counted."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from bitroute.calibrate.search_candidates import parse_candidates
from bitroute.calibrate.search_recipe import Draft, group_of, planned_recipe, recipe_text
from bitroute.calibrate.search_space import Keep, Space, choose_component, open_space
from bitroute.convert.checkpoint import open_pipeline
from bitroute.convert.recipe import RecipeFile
from bitroute.errors import JobError, RecipeError

BASE = """\
model: builtin:tiny-flux
components:
  transformer: {backend: nf4}
  text_encoder_2:
    backend: int8
    rules: [{layers: "*.SelfAttention.*", backend: nvfp4, options: {scale: mse}}]
"""
CANDIDATES = "nvfp4:scale=mse,mxfp4:method.rotate=32,int8,keep"
Open = Callable[..., Space]


@pytest.fixture(scope="module")
def open_tiny() -> Open:
    base = RecipeFile.made("base", BASE)
    pipeline = open_pipeline("builtin:tiny-flux")

    def open_tiny(keep: Keep = "none", candidates: str = CANDIDATES) -> Space:
        component = choose_component(pipeline, None)
        return open_space(base, pipeline, component, parse_candidates(candidates), keep)

    return open_tiny


def written(space: Space, chosen: dict[str, str], container: str = "auto") -> str:
    errors = {layer.name: dict.fromkeys(layer.size_bytes, 1.0) for layer in space.layers}
    draft = Draft(
        {"model": "builtin:tiny-flux"}, ["Why."], 'a "quoted" title', RecipeFile.made("base", BASE), container
    )
    text = recipe_text(space, chosen, errors, draft)
    planned_recipe(space, chosen, text, draft, "recipe")
    return text


@pytest.mark.parametrize("seed", range(4))
def test_any_choice_becomes_a_recipe_that_says_it(open_tiny: Open, seed: int) -> None:
    space, dice = open_tiny(), random.Random(seed)
    few = [dice.choice(list(space.candidates)) for _ in range(seed + 1)]
    chosen = {
        layer.name: dice.choice([name for name in few if name in layer.size_bytes] or ["keep"])
        for layer in space.layers
    }
    text = written(space, chosen)
    assert "text_encoder_2" in text and text.startswith("# Why.\n")
    assert max(map(len, text.splitlines())) < 400


def test_blocks_that_are_treated_alike_share_a_rule_that_says_what_it_is_worth(open_tiny: Open) -> None:
    space = open_tiny()
    chosen = dict(space.uniform("nvfp4 (scale mse)"))
    eight = [name for name in chosen if name.startswith("single_") and "proj" in name and ".3." not in name]
    roles = [layer.name for layer in space.layers if layer.role == "modulation"]
    chosen |= dict.fromkeys(eight, "int8") | dict.fromkeys(roles, "keep")
    lines = written(space, chosen).splitlines()
    assert '      - layers: "re:single_transformer_blocks\\\\.(0|1|2)\\\\.(proj_mlp|proj_out)"' in lines
    assert "      - role: modulation" in lines
    assert lines[lines.index("      - role: modulation") - 1] == (
        "      # 8 layers, 16.00 bits, 13.3 % of the error (13.3 % as nvfp4 (scale mse))"
    )
    assert sum("backend:" in line for line in lines) == 5  # two of them of the T5


def test_a_method_and_a_container_are_written_as_recipes_say_them(open_tiny: Open) -> None:
    space = open_tiny("none", "mxfp4:method.rotate=32,keep")
    assert "    method: {rotate: 32}" in written(space, dict(space.uniform("mxfp4 (rotate 32)")))
    native = open_tiny("none", "int8,float8,keep")
    assert "    container: native" in written(native, dict(native.uniform("int8")), "native")


def test_a_recipe_that_says_something_else_is_never_written(open_tiny: Open) -> None:
    space = open_tiny()
    chosen, other = dict(space.uniform("int8")), dict(space.uniform("nvfp4 (scale mse)"))
    draft = Draft({"model": "builtin:tiny-flux"}, [], "", RecipeFile.made("base", BASE))
    errors = {layer.name: dict.fromkeys(layer.size_bytes, 1.0) for layer in space.layers}
    with pytest.raises(JobError, match="does not say what was chosen"):
        planned_recipe(space, other, recipe_text(space, chosen, errors, draft), draft, "recipe")


@pytest.mark.parametrize(
    ("keep", "kept", "attention"),
    [
        ("none", {"nvfp4 (scale mse)", "int8", "keep"}, {"nvfp4 (scale mse)", "int8", "keep"}),
        ("8-bit", {"int8", "keep"}, {"nvfp4 (scale mse)", "int8", "keep"}),
        ("profile", {"keep"}, {"nvfp4 (scale mse)", "int8", "keep"}),
    ],
)
def test_what_the_profile_keeps_gets_as_much_as_was_asked_for(
    open_tiny: Open, keep: Keep, kept: set[str], attention: set[str]
) -> None:
    found = {layer.name: set(layer.size_bytes) for layer in open_tiny(keep, "nvfp4:scale=mse,int8,keep").layers}
    assert found["proj_out"] == found["time_text_embed.text_embedder.linear_1"] == kept
    assert found["transformer_blocks.0.attn.to_q"] == attention


def test_a_layer_that_a_format_refuses_lacks_that_candidate(open_tiny: Open) -> None:
    found = {layer.name: set(layer.size_bytes) for layer in open_tiny("none", "mxfp4:method.rotate=128,keep").layers}
    assert found["x_embedder"] == {"keep"}
    assert len(found["transformer_blocks.0.ff.net.2"]) == 2


def test_bytes_are_those_of_the_plan(open_tiny: Open) -> None:
    space = open_tiny()
    kept = space.uniform("keep")
    assert space.size_bytes(kept) == 10268736 and space.bits(kept) == 16
    assert space.planned.size_bytes == space.other_bytes + 10268736


def test_a_model_without_a_denoiser_and_a_denoiser_that_is_not_there_are_refused(tiny: Path) -> None:
    pipeline = open_pipeline("builtin:tiny-flux")
    with pytest.raises(RecipeError, match="no such denoiser"):
        choose_component(pipeline, "unet")
    with pytest.raises(RecipeError, match="no denoiser to search"):
        choose_component(open_pipeline(str(tiny / "text_encoder_2")), None)


def test_a_group_is_a_name_without_its_block_number() -> None:
    assert group_of("blocks.3.attn.to_out.0") == "blocks.*.attn.to_out.0"
    assert group_of("proj_out") == "proj_out"
    assert str(parse_candidates("int8")[0]) == "int8"
