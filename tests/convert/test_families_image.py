"""Model families of pictures as data: profiles at published sizes, small models running."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import (
    Facts,
    kept_always,
    linear,
    make,
    nested,
    on_meta,
    profile_of,
    published,
    read,
    recipe,
    share,
    tensor,
    weighted,
    write_index,
)
from torch import nn

from bitroute import quantize, verify
from bitroute.convert.pattern import Layers, Pattern

Write = Callable[..., None]
Build = Callable[..., Path]

ALL = published()
OWN = {**read("families_image.yaml"), **read("families_more.yaml")}
MODELS = [(class_name, model) for class_name, models in OWN.items() for model in models]
CASES = [read("families_image_cases.yaml"), read("families_more_cases.yaml")]


def cases(section: str) -> dict[str, Any]:
    return {name: case for file in CASES for name, case in file[section].items()}


SMALL: dict[str, list[Facts]] = cases("small")
BLOCKS: dict[str, list[str]] = cases("blocks")
SMALL_SHARE: dict[str, float] = cases("small_share")
MODULATION: dict[str, list[int]] = cases("modulation")
KINDS = (nn.Linear, nn.Conv2d)
WHOLE = (
    "CLIPTextModel",
    "CLIPTextModelWithProjection",
    "AutoencoderKL",
    "AutoencoderDC",
)  # classes that are kept whole


def described(class_name: str, model: str | Facts) -> tuple[str, Facts]:
    return class_name, ALL[class_name][model]["config"] if isinstance(model, str) else model


@pytest.fixture(scope="module")
def real() -> dict[tuple[str, str], nn.Module]:
    return {(name, model): on_meta(*described(name, model)) for name, model in MODELS}


@pytest.mark.parametrize(("class_name", "model"), MODELS)
def test_a_published_model_has_the_size_that_is_said_of_it(
    class_name: str, model: str, real: dict[tuple[str, str], nn.Module]
) -> None:
    facts, built = OWN[class_name][model], real[class_name, model]
    stored = sum(tensor.numel() for tensor in built.state_dict().values())
    assert sum(parameter.numel() for parameter in built.parameters()) == facts["parameters"]
    if "stored" in facts:
        assert stored == facts["stored"]
    if "published" in facts:
        digits = len(str(facts["published"]).partition(".")[2])
        assert round(facts.get("stored", facts["parameters"]) / 1e9, digits) == facts["published"]
    assert facts["source"] and facts["said"]


@pytest.mark.parametrize(("class_name", "model"), MODELS)
def test_every_linear_layer_has_one_role_and_the_kept_share_is_small(
    class_name: str, model: str, real: dict[tuple[str, str], nn.Module]
) -> None:
    built, profile = real[class_name, model], profile_of(class_name)
    sizes, names = linear(built), list(weighted(built))
    texts = [text for texts in profile.roles.values() for text in texts]
    layers = Layers(names)
    found = Counter(name for text in texts for name in layers.matching(Pattern.parse(text)))
    assert {name: found[name] for name in sizes} == dict.fromkeys(sizes, 1)
    others = set(found) - set(sizes)
    assert all(name.endswith((".proj_in", ".proj_out")) for name in others)  # convolutions, in SDXL linear layers
    assert not others or model.endswith("Stable Diffusion 1.5")
    kept = share(built, kept_always(profile, names))
    assert round(kept, 4) == OWN[class_name][model]["kept"]
    assert kept < SMALL_SHARE.get(class_name, 0.035)


@pytest.mark.parametrize("class_name", OWN)
def test_every_pattern_of_a_profile_matches_a_linear_layer_or_a_convolution(
    class_name: str, real: dict[tuple[str, str], nn.Module]
) -> None:
    profile, models = profile_of(class_name), [model for (name, _), model in real.items() if name == class_name]
    parts = [{name: part for name, part in weighted(model).items() if isinstance(part, KINDS)} for model in models]
    layers = [Layers(list(found)) for found in parts]
    texts = [text for texts in profile.roles.values() for text in texts] + [entry.layers for entry in profile.keep]
    assert [text for text in texts if not any(found.matching(Pattern.parse(text)) for found in layers)] == []
    assert all(entry.why and entry.source for entry in profile.keep)


@pytest.mark.parametrize("class_name", SMALL)
def test_every_linear_layer_of_the_variants_has_a_role(class_name: str) -> None:
    for config in SMALL[class_name]:
        sizes = linear(on_meta(class_name, config))
        assert set(profile_of(class_name).roles_of(sizes)) == set(sizes)


@pytest.mark.parametrize(("class_name", "model"), MODELS)
def test_the_blocks_of_a_model_are_lists_in_order(
    class_name: str, model: str, real: dict[tuple[str, str], nn.Module]
) -> None:
    names = list(linear(real[class_name, model]))
    for stack in BLOCKS[class_name]:
        blocks = real[class_name, model].get_submodule(stack)
        assert isinstance(blocks, nn.ModuleList)
        numbers = [int(name[len(stack) + 1 :].split(".")[0]) for name in names if name.startswith(f"{stack}.")]
        assert list(dict.fromkeys(numbers)) == list(range(len(blocks)))


@pytest.mark.parametrize("class_name", MODULATION)
def test_the_notes_state_the_share_of_modulation(class_name: str, real: dict[tuple[str, str], nn.Module]) -> None:
    found = []
    for built in (built for (name, _), built in real.items() if name == class_name):
        roles = profile_of(class_name).roles_of(linear(built))
        found.append(round(100 * share(built, {name for name, role in roles.items() if role == "modulation"})))
    assert found[: len(MODULATION[class_name])] == MODULATION[class_name]


def test_the_notes_state_the_shares_of_convolutions_experts_and_single_blocks(
    real: dict[tuple[str, str], nn.Module],
) -> None:
    def percent(class_name: str, pattern: str) -> list[int]:
        models = [built for (name, _), built in real.items() if name == class_name]
        names = [Layers(list(linear(built))).matching(Pattern.parse(pattern)) for built in models]
        return [round(100 * share(built, found)) for built, found in zip(models, names, strict=True)]

    assert percent("Flux2Transformer2DModel", "single_transformer_blocks.*")[0] == 73
    assert percent("HiDreamImageTransformer2DModel", "*.experts.*") == [60]
    assert percent("LongCatImageTransformer2DModel", "single_transformer_blocks.*.proj_out") == [15]
    linear_shares = {name: percent(name, "*") for name in ("UNet2DConditionModel", "SanaTransformer2DModel")}
    assert linear_shares == {"UNet2DConditionModel": [87, 31], "SanaTransformer2DModel": [53, 53, 52]}


@pytest.mark.parametrize(
    ("class_name", "config"), [(name, config) for name, configs in SMALL.items() for config in configs]
)
def test_the_probe_runs_one_forward_pass_from_the_config_alone(class_name: str, config: Facts) -> None:
    torch.manual_seed(0)
    model = make(class_name, config).eval()
    known = dict(model.config) if hasattr(model, "save_config") else model.config.to_dict()
    probe = profile_of(class_name).probe(known)
    for parameter in model.parameters():
        if not parameter.any():  # layers that begin at zero, as those of a ControlNet, hide what comes before them
            nn.init.normal_(parameter, std=0.02)
    with torch.inference_mode():
        output = model(**nested({name: tensor(wanted) for name, wanted in probe.items()}), return_dict=False)[0]
    for part in output if isinstance(output, (list, tuple)) else [output]:
        assert part.isfinite().all() and part.std() > 0


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """A random pipeline folder of some classes."""

    def build(**classes: str) -> Path:
        folder = tmp_path_factory.mktemp("small") / "model"
        torch.manual_seed(0)
        for component, class_name in classes.items():
            make(class_name, SMALL[class_name][0]).to(torch.bfloat16).save_pretrained(folder / component)
        write_index(folder, classes)
        return folder

    return build


def test_two_transformers_quantized_load_without_bitroute_and_run(small: Build, tmp_path: Path) -> None:
    folder = small(transformer="SD3Transformer2DModel", unet="UNet2DConditionModel")
    found = verify(quantize(recipe(tmp_path, folder, transformer="nf4", unet="float8"), out=tmp_path / "out"))
    assert found.problems == [] and found.compared
    assert all(words.endswith("loaded without bitroute; forward ok") for words in found.components.values())


@pytest.mark.parametrize("backend", ["float8", "nf4"])
def test_every_class_quantized_holds_its_weights(backend: str, small: Build, tmp_path: Path) -> None:
    classes = {f"part_{number}": name for number, name in enumerate(OWN) if name not in WHOLE}
    file = recipe(tmp_path, small(**classes), **dict.fromkeys(classes, backend))
    found = verify(quantize(file, out=tmp_path / "out"), load=False)
    assert found.problems == [] and found.compared
    assert {layer.component for layer in found.layers} == set(classes)
