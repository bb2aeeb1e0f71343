"""Profiles against the model classes they speak of: at real sizes without weights, at small sizes running."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from families import kept_always
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from bitroute.convert.profile import ProbeInput, Profile, find_profile, profiles
from bitroute.convert.recipe import builtin_recipes, family_of, read_recipe
from bitroute.convert.routing import route
from bitroute.errors import RecipeError

OF_FLUX = ["CLIPTextModel", "FluxTransformer2DModel", "T5EncoderModel"]
RECIPES = [name for name in builtin_recipes() if family_of(name) in ("flux", "tiny-flux")]
T5_XXL = {"d_model": 4096, "d_ff": 10240, "d_kv": 64, "num_heads": 64, "num_layers": 24, "vocab_size": 32128}
SMALL_FLUX = {
    "in_channels": 8,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 24,
    "pooled_projection_dim": 12,
    "axes_dims_rope": (4, 6, 6),
}
SMALL_T5 = {"d_model": 32, "d_ff": 48, "d_kv": 8, "num_heads": 4, "num_layers": 2, "vocab_size": 40}
SMALL_CLIP = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 40,
    "max_position_embeddings": 16,
}


def flux(**config: Any) -> Any:
    return FluxTransformer2DModel(**config)  # type: ignore[no-untyped-call,unused-ignore]


def t5(**config: Any) -> Any:
    return T5EncoderModel(T5Config(feed_forward_proj="gated-gelu", **config))


def clip(**config: Any) -> Any:
    return CLIPTextModel(CLIPTextConfig(eos_token_id=39, bos_token_id=38, pad_token_id=0, **config))


@pytest.fixture(scope="module")
def real_models() -> dict[str, nn.Module]:
    with torch.device("meta"):
        models = [
            flux(guidance_embeds=True),
            t5(**T5_XXL),
            CLIPTextModel(CLIPTextConfig(num_hidden_layers=12)),
        ]
    return {type(model).__name__: model for model in models}


def layers(model: nn.Module) -> tuple[list[str], list[str]]:
    """Names of the linear layers, and of the others that have a weight."""
    weighted = {name: part for name, part in model.named_modules() if getattr(part, "weight", None) is not None}
    linear = [name for name, part in weighted.items() if isinstance(part, nn.Linear)]
    return linear, [name for name in weighted if name not in linear]


def profile_of(class_name: str) -> Profile:
    found = find_profile(class_name)
    assert found and found.class_name == class_name
    return found


def tensor(wanted: ProbeInput) -> torch.Tensor:
    if wanted.dtype == "long":
        return torch.randint(0, wanted.below or 1, wanted.shape)
    make = {"random": torch.randn, "zeros": torch.zeros, "ones": torch.ones}[wanted.fill]
    return make(wanted.shape)


def test_a_class_without_a_profile_has_none() -> None:
    assert find_profile("NoSuchModel") is None and find_profile("../recipes") is None


@pytest.mark.parametrize("class_name", profiles())
def test_every_profile_says_where_its_class_is_used(class_name: str) -> None:
    assert profile_of(class_name).about


@pytest.mark.parametrize("class_name", OF_FLUX)
def test_every_linear_layer_has_exactly_one_role_and_no_other_layer_has_any(
    class_name: str, real_models: dict[str, nn.Module]
) -> None:
    linear, other = layers(real_models[class_name])
    profile = profile_of(class_name)
    by_role = [
        Profile.model_validate({"class": "x", "roles": {role: texts}, "keep": [], "inputs": {}}).roles_of(
            [*linear, *other]
        )
        for role, texts in profile.roles.items()
    ]
    assert Counter(name for found in by_role for name in found) == Counter(linear)


@pytest.mark.parametrize("class_name", OF_FLUX)
def test_every_keep_entry_keeps_something_and_names_its_source(
    class_name: str, real_models: dict[str, nn.Module]
) -> None:
    names = [name for found in layers(real_models[class_name]) for name in found]
    for entry in profile_of(class_name).keep:
        alone = profile_of(class_name).model_copy(update={"keep": [entry]}).kept(names)
        assert alone and all(kinds == set(entry.kinds) for kinds in alone.values()) and entry.source


def test_flux_keeps_the_root_proj_out_and_never_those_of_the_single_blocks(
    real_models: dict[str, nn.Module],
) -> None:
    linear, other = layers(real_models["FluxTransformer2DModel"])
    kept = kept_always(profile_of("FluxTransformer2DModel"), [*linear, *other])
    embedders = [
        f"time_text_embed.{part}_embedder.linear_{i}" for part in ("timestep", "guidance", "text") for i in (1, 2)
    ]
    assert set(kept) == {"x_embedder", "context_embedder", *embedders, "norm_out.linear", "proj_out"}


def test_flux_parts_hold_the_share_of_weights_the_notes_claim(real_models: dict[str, nn.Module]) -> None:
    model = real_models["FluxTransformer2DModel"]
    linear, _ = layers(model)
    sizes = {name: model.get_submodule(name).weight.numel() for name in linear}  # type: ignore[operator]
    roles = profile_of("FluxTransformer2DModel").roles_of(linear)
    modulation = sum(size for name, size in sizes.items() if roles[name] == "modulation")
    single_proj_out = sum(size for name, size in sizes.items() if name.endswith(".proj_out"))
    assert round(modulation / sum(sizes.values()), 2) == 0.27
    assert round(single_proj_out / sum(sizes.values()), 2) == 0.15


def test_t5_keeps_the_wo_of_every_block_and_clip_keeps_every_linear_layer(
    real_models: dict[str, nn.Module],
) -> None:
    linear, other = layers(real_models["T5EncoderModel"])
    kept = profile_of("T5EncoderModel").kept([*linear, *other])
    assert set(kept) == {f"encoder.block.{i}.layer.1.DenseReluDense.wo" for i in range(24)}
    linear, other = layers(real_models["CLIPTextModel"])
    older = [f"text_model.{name}" for name in linear]
    assert list(profile_of("CLIPTextModel").kept([*linear, *older, *other])) == [
        *(name for name in [*linear, *older] if ".self_attn." in name),
        *(name for name in [*linear, *older] if ".mlp." in name),
    ]


@pytest.mark.parametrize(
    ("make", "config"),
    [
        (flux, {**SMALL_FLUX, "guidance_embeds": True}),
        (flux, {**SMALL_FLUX, "guidance_embeds": False}),
        (t5, SMALL_T5),
        (clip, SMALL_CLIP),
    ],
)
def test_the_probe_runs_one_forward_pass_from_the_config_alone(make: Any, config: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = make(**config).eval()
    inputs = {name: tensor(wanted) for name, wanted in profile_of(type(model).__name__).probe(config).items()}
    assert ("guidance" in inputs) == config.get("guidance_embeds", False)
    with torch.inference_mode():
        output = model(**inputs)[0]
    assert output.isfinite().all() and output.std() > 0


def test_a_config_without_a_needed_size_is_an_error_that_names_it() -> None:
    with pytest.raises(RecipeError, match="lacks the size 'in_channels'"):
        profile_of("FluxTransformer2DModel").probe({"joint_attention_dim": 8})


def test_a_size_may_be_a_product() -> None:
    wanted = {"x": {"shape": [1, "heads * width", "2*width"]}}
    profile = Profile.model_validate({"class": "x", "roles": {}, "keep": [], "inputs": wanted})
    assert profile.probe({"heads": 3, "width": 5})["x"].shape == (1, 15, 10)


@pytest.fixture(scope="module")
def tiny_models() -> dict[str, nn.Module]:
    """Block counts and guidance as in tiny-flux; the widths do not matter here."""
    tiny = {**SMALL_FLUX, "num_layers": 2, "num_single_layers": 4, "guidance_embeds": False}
    return {"FluxTransformer2DModel": flux(**tiny), "T5EncoderModel": t5(**SMALL_T5)}


@pytest.mark.parametrize("name", RECIPES)
def test_every_built_in_recipe_routes_its_model_without_a_problem(
    name: str, real_models: dict[str, nn.Module], tiny_models: dict[str, nn.Module]
) -> None:
    file = read_recipe(name)
    assert file.recipe
    models = tiny_models if file.recipe.model == "builtin:tiny-flux" else real_models
    classes = {"transformer": "FluxTransformer2DModel", "text_encoder_2": "T5EncoderModel"}
    for component, recipe in file.recipe.components.items():
        profile = profile_of(classes[component])
        linear, other = layers(models[classes[component]])
        names = [*linear, *other]
        routes, problems = route(
            component, recipe, linear, other, profile.roles_of(names), profile.kept(names), file.where
        )
        assert problems == [] and set(routes) == set(names)


def test_the_mixed_recipe_mixes_formats_by_role_and_depth(real_models: dict[str, nn.Module]) -> None:
    file, profile = read_recipe("flux-mixed"), profile_of("FluxTransformer2DModel")
    linear, other = layers(real_models["FluxTransformer2DModel"])
    assert file.recipe
    recipe = file.recipe.components["transformer"]
    routes, _ = route("transformer", recipe, linear, other, profile.roles_of(linear), profile.kept(linear), file.where)
    assert {routes[name].backend for name in linear} == {"keep", "float8", "int8", "nvfp4", "nf4"}
    assert routes["transformer_blocks.3.ff.net.2"].backend == "float8"
    assert routes["transformer_blocks.4.ff.net.2"].backend == "nf4"
    assert routes["single_transformer_blocks.27.proj_out"].backend == "nvfp4"
    assert routes["single_transformer_blocks.28.proj_out"].backend == "float8"
