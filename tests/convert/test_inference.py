"""What is inferred of a class without a profile, held against the profiles; and profiles beside a recipe."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import yaml
from click.testing import CliRunner
from families import kept_always, linear, on_meta, profile_of
from torch import nn

from bitroute import plan, quantize, verify
from bitroute.convert.commands import show_profile
from bitroute.convert.document import parse
from bitroute.convert.inference import Inference, infer
from bitroute.convert.profile import Profile, find_profile, profiles
from bitroute.errors import RecipeError

Model = dict[str, Any]
Write = Callable[[str], str]

OF_FLUX: dict[str, dict[str, Model]] = {
    "FluxTransformer2DModel": {"FLUX.1 dev": {"config": {"guidance_embeds": True}}},
    "CLIPTextModel": {"CLIP-L": {"config": {"num_hidden_layers": 12}}},
    "T5EncoderModel": {
        "t5-xxl": {
            "config": {
                "d_model": 4096, "d_ff": 10240, "d_kv": 64, "num_heads": 64, "num_layers": 24, "vocab_size": 32128,
                "feed_forward_proj": "gated-gelu",
            }
        }
    },
}  # fmt: skip
FILES = [file for file in Path(__file__).parent.glob("families_*.yaml") if not file.stem.endswith("_cases")]
PUBLISHED: dict[str, dict[str, Model]] = {
    **OF_FLUX,
    **{name: models for file in FILES for name, models in yaml.safe_load(file.read_text(encoding="utf-8")).items()},
}
MODELS = [  # of a VAE nothing is inferred: it has no stack of blocks
    (name, model) for name, models in PUBLISHED.items() for model in models if not name.startswith("Autoencoder")
]
AGREEMENT = {  # share of the linear weights with the profile's role; 1 where the class is not listed
    # a small transformer of its own makes the modulation of all blocks; its layers have names like any others
    "ChromaTransformer2DModel": 0.96,
    # the linear layers around the middle block, outside its transformer blocks, are named proj_in and proj_out alone
    "UNet2DConditionModel": 0.99,
    "ControlNetModel": 0.99,
    # layers around the blocks of a control branch or a face adapter, and single ones that mix two streams
    "WanVACETransformer3DModel": 0.98,
    "WanAnimateTransformer3DModel": 0.98,
    "MochiTransformer3DModel": 0.99,
    "LTX2VideoTransformer3DModel": 0.99,
}
MISSED = {"vace_blocks.0.proj_in"}  # the entry of a control branch, inside its first block
SKYREELS = {
    "num_attention_heads": 2, "attention_head_dim": 32, "ffn_dim": 128, "num_layers": 2, "text_dim": 64, "freq_dim": 64,
    "in_channels": 4, "out_channels": 4,
}  # fmt: skip


def inferred(model: nn.Module) -> Inference:
    found = infer(model)
    assert found
    return found


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.attn, self.proj, self.gates = Attention(width), nn.Linear(width, width), nn.Linear(width, 6 * width)


class Unknown(nn.Module):
    """Names that say little: the place and the shapes have to."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.table = nn.Linear(4, 16), nn.Linear(16, 96)
        self.blocks = nn.ModuleList([Block(16), Block(16)])
        self.then = nn.Linear(16, 4)


class Mixer(nn.Module):
    """Blocks without attention."""

    def __init__(self, *widths: int) -> None:
        super().__init__()
        self.start = nn.Linear(4, 8)
        self.mixers = nn.ModuleList([nn.Sequential(nn.Linear(8, width), nn.Linear(width, 8)) for width in widths])
        self.stop = nn.Linear(8, 4)


def test_every_profile_has_a_published_model_to_be_held_against() -> None:
    assert set(profiles()) <= set(PUBLISHED)


@pytest.mark.parametrize(("class_name", "model"), MODELS)
def test_inferred_roles_and_kept_layers_agree_with_the_profile(class_name: str, model: str) -> None:
    built, profile = on_meta(class_name, PUBLISHED[class_name][model]["config"]), profile_of(class_name)
    found, sizes = inferred(built).profile, linear(built)
    said, guessed = profile.roles_of(sizes), found.roles_of(sizes)
    same = sum(size for name, size in sizes.items() if said[name] == guessed[name]) / sum(sizes.values())
    assert same >= AGREEMENT.get(class_name, 1)
    at_the_ends = {name for name in kept_always(profile, sizes) if said[name] in ("embedder", "output")}
    assert at_the_ends - MISSED <= set(found.kept(sizes))


def test_the_exceptions_are_needed() -> None:
    for class_name in AGREEMENT:
        model = next(iter(PUBLISHED[class_name].values()))
        sizes = linear(built := on_meta(class_name, model["config"]))
        assert inferred(built).profile.roles_of(sizes) != profile_of(class_name).roles_of(sizes)


@pytest.mark.parametrize(("class_name", "model"), MODELS)
def test_the_file_to_edit_says_what_was_inferred(class_name: str, model: str) -> None:
    found = inferred(on_meta(class_name, PUBLISHED[class_name][model]["config"]))
    assert Profile.model_validate(parse(found.text, "profile").plain) == found.profile


def test_vision_towers_and_what_the_class_itself_keeps_in_float32_are_kept() -> None:
    models = PUBLISHED["Qwen2_5_VLForConditionalGeneration"]
    found = inferred(on_meta("Qwen2_5_VLForConditionalGeneration", next(iter(models.values()))["config"]))
    assert [entry.layers for entry in found.profile.keep] == [
        "model.visual.merger.*",
        "lm_head",
        "model.visual.blocks.*",
    ]
    t5 = inferred(on_meta("T5EncoderModel", OF_FLUX["T5EncoderModel"]["t5-xxl"]["config"]))
    assert [entry.layers for entry in t5.profile.keep] == ["encoder.block.*.layer.*.DenseReluDense.wo"]
    assert "_keep_in_fp32_modules" in t5.profile.keep[0].why


def test_place_and_shape_decide_where_the_names_say_nothing() -> None:
    model = Unknown()
    found = inferred(model)
    roles = found.profile.roles_of(linear(model))
    assert {name: roles[name] for name in ("first", "table", "then")} == {
        "first": "embedder", "table": "modulation", "then": "output",
    }  # fmt: skip
    assert {name.removeprefix("blocks.1."): role for name, role in roles.items() if name.startswith("blocks.1.")} == {
        "attn.qkv": "attention", "attn.proj": "attention", "proj": "feed-forward", "gates": "modulation",
    }  # fmt: skip
    assert set(found.profile.kept(linear(model))) == {"first", "table", "then"}
    assert found.stacks == {"blocks": 2}


def test_a_pattern_that_would_reach_too_far_gives_way_to_names() -> None:
    assert inferred(Unknown()).profile.roles["feed-forward"] == ["blocks.0.proj", "blocks.1.proj"]  # not blocks.*.proj


def test_blocks_without_attention_count_where_they_repeat() -> None:
    found = inferred(Mixer(16, 16)).profile
    assert found.roles == {"feed-forward": ["mixers.*.*"], "embedder": ["start"], "output": ["stop"]}
    assert infer(Mixer(16, 24)) is None and infer(nn.Linear(2, 2)) is None


@pytest.fixture(scope="module")
def skyreels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline folder with a transformer whose class has no profile."""
    folder = tmp_path_factory.mktemp("inferred") / "model"
    assert find_profile("SkyReelsV2Transformer3DModel") is None
    torch.manual_seed(0)
    model: Any = diffusers.SkyReelsV2Transformer3DModel(**SKYREELS)  # type: ignore[no-untyped-call,unused-ignore]
    model.to(torch.bfloat16).save_pretrained(folder / "transformer")
    index = {"_class_name": "DiffusionPipeline", "transformer": ["diffusers", "SkyReelsV2Transformer3DModel"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture
def write_recipe(tmp_path: Path, skyreels: Path) -> Write:
    def write(component: str) -> str:
        file = tmp_path / "recipe.yaml"
        file.write_text(f"model: {skyreels}\ncomponents:\n  transformer:\n    backend: float8\n{component}")
        return str(file)

    return write


def test_a_plan_says_what_it_inferred_and_the_result_is_as_honest(write_recipe: Write, tmp_path: Path) -> None:
    recipe = write_recipe("    rules: [{role: feed-forward, backend: nf4}]\n")
    component = plan(recipe).components[0]
    note = component.notes[0]
    assert note.startswith("roles and kept layers of SkyReelsV2Transformer3DModel are inferred: blocks in blocks (2);")
    assert "proj_out" in note and "condition_embedder.time_proj" in note
    routed = {entry.name: (entry.backend.name, entry.reason) for entry in component.entries}
    assert routed["proj_out.weight"] == ("keep", "keep (inferred)")
    assert routed["blocks.1.ffn.net.2.weight"][0] == "nf4" and routed["blocks.1.attn1.to_q.weight"][0] == "float8"
    found = verify(quantize(recipe, out=tmp_path / "out"))
    assert found.problems == []
    assert "forward not run: no probe inputs are known" in found.components["transformer"]


def test_nothing_is_inferred_that_nobody_asks_for(write_recipe: Write) -> None:
    component = plan(write_recipe("    keep: [proj_out]\n")).components[0]
    assert not any("inferred" in note for note in component.notes)
    assert {entry.role for entry in component.entries} == {"", "convolution"}


def test_roles_are_inferred_for_a_rule_though_the_keep_list_is_given(write_recipe: Write) -> None:
    component = plan(write_recipe("    keep: none\n    rules: [{role: output, backend: nf4}]\n")).components[0]
    assert component.notes[0].startswith("roles of SkyReelsV2Transformer3DModel are inferred: ")
    assert "kept are" not in component.notes[0]
    assert {entry.layer for entry in component.entries if entry.backend.name == "nf4"} == {"proj_out"}


def write_profile(folder: Path, keep: str, class_name: str = "SkyReelsV2Transformer3DModel") -> Path:
    file = folder / "mine.yaml"
    file.write_text(f"class: {class_name}\nroles:\n  attention: ['blocks.*.attn?.*']\nkeep:\n{keep}")
    return file


def entry(layers: str) -> str:
    return f"- {{layers: {layers}, why: it says so, source: me}}\n"


def test_a_profile_beside_the_recipe_comes_before_all_others(
    write_recipe: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_profile(tmp_path, entry("blocks.0.*") + entry("nothing.*"))
    recipe = write_recipe("    profile: ./mine.yaml\n")
    monkeypatch.chdir("/")
    planned = plan(recipe)
    kept = {entry.layer for entry in planned.components[0].entries if entry.reason == "keep (profile)"}
    assert kept and all(layer.startswith("blocks.0.") for layer in kept)
    assert planned.components[0].notes == (f"'nothing.*' matches no layer ({tmp_path / 'mine.yaml'}:6)",)
    assert "# class: SkyReelsV2Transformer3DModel" in planned.recipe.text


@pytest.mark.parametrize(
    ("keep", "class_name", "line", "words"),
    [
        (entry("'{9-'"), "SkyReelsV2Transformer3DModel", 5, "{9-"),
        ("- {layers: x, wy: typo}\n", "SkyReelsV2Transformer3DModel", 5, "unknown key 'keep.0.wy' in a profile"),
        (entry("proj_out"), "FluxTransformer2DModel", 1, "for another class"),
    ],
)
def test_what_is_wrong_with_a_profile_is_told_with_its_line(
    keep: str, class_name: str, line: int, words: str, write_recipe: Write, tmp_path: Path
) -> None:
    file = write_profile(tmp_path, keep, class_name)
    with pytest.raises(RecipeError) as refused:
        plan(write_recipe("    profile: mine.yaml\n"))
    assert f"{file}:{line}: " in str(refused.value) and words in str(refused.value)


def test_a_profile_that_does_not_exist_is_refused_with_the_line_that_names_it(write_recipe: Write) -> None:
    recipe = write_recipe("    profile: ./nowhere.yaml\n")
    with pytest.raises(RecipeError, match=r"no profile './nowhere\.yaml'") as refused:
        plan(recipe)
    assert str(refused.value).startswith(f"{recipe}:5: ") and len(refused.value.problems) == 1


def test_the_command_writes_a_profile_that_a_recipe_can_name(
    skyreels: Path, write_recipe: Write, tmp_path: Path
) -> None:
    file = tmp_path / "mine.yaml"
    assert CliRunner().invoke(show_profile, [str(skyreels), "-o", str(file)]).output == f"{file}\n"
    guessed, named = plan(write_recipe("")), plan(write_recipe("    profile: mine.yaml\n"))
    routes = [[(e.name, e.backend.name) for e in found.components[0].entries] for found in (guessed, named)]
    assert routes[0] == routes[1]
    again = CliRunner().invoke(show_profile, [str(skyreels), "-o", str(file)])
    assert isinstance(again.exception, RecipeError) and "exists already" in str(again.exception)


def test_the_command_prints_a_built_in_profile_as_it_stands(source: Path) -> None:
    printed = CliRunner().invoke(show_profile, ["builtin:tiny-flux"]).output
    assert printed == profiles()["FluxTransformer2DModel"].read_text(encoding="utf-8")
    refused = CliRunner().invoke(show_profile, ["builtin:tiny-flux", "transfomer"]).exception
    assert "did you mean 'transformer'?" in str(refused)
    diffusers.AutoencoderTiny().save_pretrained(source / "vae")
    index = source / "model_index.json"
    index.write_text(index.read_text(encoding="utf-8").replace("AutoencoderKL", "AutoencoderTiny"), encoding="utf-8")
    refused = CliRunner().invoke(show_profile, [str(source), "vae"]).exception
    assert "nothing can be inferred for AutoencoderTiny" in str(refused)
