"""Which convolutions a recipe takes, what is refused, and what it saves of SDXL and Stable Diffusion 1.5."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from families import on_meta, write_index
from rich.console import Console

from bitroute import plan
from bitroute.convert.entry import Entry
from bitroute.convert.plan import ComponentPlan
from bitroute.convert.table import plan_table
from bitroute.errors import RecipeError

Write = Callable[..., None]
Recipe = Callable[[str], str]
UNET = Path(__file__).parents[1] / "data" / "unet"
PUBLISHED = yaml.safe_load(Path(__file__).with_name("families_image.yaml").read_text(encoding="utf-8"))
KEPT = {"conv_in", "conv_out", "conv_shortcut", "proj_in", "proj_out"}
PER_ROW = {"float8": 4, "int8": 5}  # bytes: a scale, and for INT8 a zero point
HALVED = {"conv", "conv1", "conv2"}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    (folder / "unet").symlink_to(UNET)
    write_index(folder, {"unet": "UNet2DConditionModel"})
    return folder


def component(small: Path, write_recipe: Recipe, unet: str) -> ComponentPlan:
    [found] = plan(write_recipe(f"components:\n  unet: {unet}\n"), str(small)).components
    return found


def convolutions(planned: ComponentPlan) -> dict[str, Entry]:
    return {entry.layer: entry for entry in planned.entries if entry.kind == "Conv2d"}


def taken(planned: ComponentPlan) -> set[str]:
    """The last names of the convolutions that are quantized."""
    return {name.rpartition(".")[2] for name, entry in convolutions(planned).items() if entry.quantized}


def refusal(small: Path, write_recipe: Recipe, unet: str) -> str:
    with pytest.raises(RecipeError) as caught:
        component(small, write_recipe, unet)
    return str(caught.value)


@pytest.mark.parametrize(
    "rules", ["[]", "[{layers: 'down_blocks.*', backend: float8}]", "[{layers: '*', backend: int8}]"]
)
def test_neither_the_default_nor_a_wide_pattern_takes_convolutions(
    rules: str, small: Path, write_recipe: Recipe
) -> None:
    planned = component(small, write_recipe, f"{{backend: int8, rules: {rules}}}")
    assert taken(planned) == set() and len(planned.quantized) == 10
    assert planned.container.name == "torchao" and planned.notes == ()


def test_the_role_takes_all_that_the_profile_does_not_keep(small: Path, write_recipe: Recipe) -> None:
    planned = component(small, write_recipe, "{rules: [{role: convolution, backend: int8}]}")
    found = convolutions(planned)
    assert {name.rpartition(".")[2] for name in found} == KEPT | HALVED
    assert taken(planned) == HALVED
    assert {entry.role for entry in found.values()} == {"convolution"}
    assert found["conv_in"].reason == "keep (profile)"
    assert found["down_blocks.0.resnets.0.conv2"].weight.shape == (16, 16 * 9)
    assert planned.quantized == [entry for entry in found.values() if entry.quantized]


def test_keep_none_takes_every_one(small: Path, write_recipe: Recipe) -> None:
    planned = component(small, write_recipe, "{keep: none, rules: [{role: convolution, backend: float8}]}")
    assert taken(planned) == KEPT | HALVED


def test_a_pattern_that_names_only_convolutions_takes_them(small: Path, write_recipe: Recipe) -> None:
    planned = component(small, write_recipe, "{backend: int8, rules: [{layers: '*.conv?', backend: float8}]}")
    assert taken(planned) == {"conv1", "conv2"}
    assert {entry.backend.name for entry in convolutions(planned).values()} == {"float8", "keep"}


def test_the_plan_says_that_no_library_runs_them(small: Path, write_recipe: Recipe) -> None:
    planned = component(small, write_recipe, "{backend: int8, rules: [{role: convolution, backend: int8}]}")
    assert planned.container.name == "bitroute"
    assert planned.notes == (
        "bitroute container, because no library runs weight-only convolutions such as "
        "'down_blocks.0.downsamplers.0.conv'",
    )
    words = refusal(small, write_recipe, "{container: native, rules: [{role: convolution, backend: int8}]}")
    assert "no library runs weight-only convolutions" in words


def test_the_table_shows_them(small: Path, write_recipe: Recipe) -> None:
    file = write_recipe("components:\n  unet: {rules: [{role: convolution, backend: int8}]}\n")
    console = Console(width=160)
    with console.capture() as shown:
        console.print(plan_table(plan(file, str(small)), 160))
    rows = [line.split() for line in shown.get().splitlines() if line.startswith("conv_in")]
    assert rows[0][:2] == ["conv_in", "convolution"] and "keep" in rows[0]


@pytest.mark.parametrize("backend", ["nf4", "mxfp4", "quanto-int8", "bnb-int8"])
def test_formats_of_linear_layers_refuse_them_in_a_sentence(backend: str, small: Path, write_recipe: Recipe) -> None:
    words = refusal(small, write_recipe, f"{{keep: none, rules: [{{layers: conv_in, backend: {backend}}}]}}")
    assert f"{backend} cannot hold layer 'conv_in'" in words
    assert f"{backend} holds linear layers only" in words


def test_dynamic_activations_are_refused_or_the_layer_is_kept(small: Path, write_recipe: Recipe) -> None:
    rule = "layers: '*.conv1', backend: int8, options: {activations: dynamic}"
    assert "the activations cannot" in refusal(small, write_recipe, f"{{rules: [{{{rule}}}]}}")
    planned = component(small, write_recipe, f"{{backend: int8, rules: [{{{rule}, otherwise: keep}}]}}")
    assert taken(planned) == set()
    assert "down_blocks.0.resnets.0.conv1 is kept: of a convolution the weight can be quantized" in planned.notes[0]


def test_at_4_bits_the_profile_keeps_them(small: Path, write_recipe: Recipe) -> None:
    planned = component(small, write_recipe, "{backend: nf4}")
    reasons = {entry.reason for name, entry in convolutions(planned).items() if name.endswith("conv1")}
    assert reasons == {"keep (profile, 4-bit)"} and len(planned.quantized) == 10


@pytest.fixture
def sana(tmp_path: Path, write_hollow: Write) -> Path:
    """Its feed-forward is three convolutions: 1×1, depthwise 3×3, 1×1."""
    sizes = {
        "attention_head_dim": 32,
        "cross_attention_head_dim": 32,
        "cross_attention_dim": 64,
        "caption_channels": 64,
    }
    heads = {"num_attention_heads": 2, "num_cross_attention_heads": 2, "num_layers": 1, "sample_size": 8}
    (tmp_path / "sana" / "unet").mkdir(parents=True)
    write_hollow(on_meta("SanaTransformer2DModel", {**sizes, **heads}), tmp_path / "sana" / "unet")
    write_index(tmp_path / "sana", {"unet": "SanaTransformer2DModel"})
    return tmp_path / "sana"


def test_depthwise_convolutions_stay(sana: Path, write_recipe: Recipe) -> None:
    planned = component(sana, write_recipe, "{keep: none, rules: [{role: convolution, backend: int8}]}")
    ff = "transformer_blocks.0.ff"
    assert {entry.layer for entry in planned.quantized} == {
        f"{ff}.conv_inverted",
        f"{ff}.conv_point",
        "patch_embed.proj",
    }
    [depthwise] = [entry for entry in planned.entries if entry.kind == "other Conv2d"]
    assert depthwise.layer == f"{ff}.conv_depth" and depthwise.backend.name == "keep"


def test_a_rule_for_depthwise_convolutions_alone_is_refused(sana: Path, write_recipe: Recipe) -> None:
    words = refusal(sana, write_recipe, "{keep: none, rules: [{layers: '*.conv_depth', backend: int8}]}")
    assert "matches only layers that are not linear, and no plain convolutions" in words
    assert "neither transposed nor in groups (depthwise)" in words


@pytest.fixture(scope="module", params=["SDXL base", "Stable Diffusion 1.5"])
def full_size(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, write_hollow: Write) -> Path:
    folder: Path = tmp_path_factory.mktemp("full") / request.param
    (folder / "unet").mkdir(parents=True)
    config = PUBLISHED["UNet2DConditionModel"][request.param]["config"]
    write_hollow(on_meta("UNet2DConditionModel", config), folder / "unet")
    write_index(folder, {"unet": "UNet2DConditionModel"})
    return folder


def test_linear_layers_alone_save_little_of_stable_diffusion_1_5(full_size: Path, write_recipe: Recipe) -> None:
    unet = component(full_size, write_recipe, "{backend: int8}")
    share = {"SDXL base": 0.576, "Stable Diffusion 1.5": 0.860}[full_size.name]
    assert round(unet.size_bytes / unet.source_bytes, 3) == share
