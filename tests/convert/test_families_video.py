"""Families of video models, and Z-Image, as data: profiles at published sizes, small models running, recipes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from families import kept_always, linear, make, on_meta, profile_of, recipe, weighted, write_index
from torch import nn

from bitroute import quantize, verify
from bitroute.backends import Kind
from bitroute.convert.pattern import Layers, Pattern
from bitroute.convert.profile import ProbeInput

Write = Callable[..., None]
Build = Callable[..., Path]
Facts = dict[str, Any]
HERE = Path(__file__).parent
PUBLISHED: dict[str, dict[str, Facts]] = yaml.safe_load((HERE / "families_video.yaml").read_text(encoding="utf-8"))
CASES: dict[str, Any] = yaml.safe_load((HERE / "families_video_cases.yaml").read_text(encoding="utf-8"))
SMALL: dict[str, list[Facts]] = CASES["small"]
FAMILIES: dict[str, dict[str, str]] = CASES["families"]
MODELS = [(class_name, model) for class_name, models in PUBLISHED.items() for model in models]
VAES = [class_name for class_name in PUBLISHED if class_name.startswith("Autoencoder")]
OMNI = {**SMALL["ZImageTransformer2DModel"][0], "siglip_feat_dim": 64}  # its forward pass wants nested lists: no probe


@pytest.fixture(scope="module")
def real() -> dict[tuple[str, str], nn.Module]:
    return {(name, model): on_meta(name, PUBLISHED[name][model]["config"]) for name, model in MODELS}


def tensor(wanted: ProbeInput) -> Any:
    if wanted.value is not None:
        return wanted.value
    if wanted.dtype == "long":
        return torch.randint(0, wanted.below or 1, wanted.shape)
    made = {"random": torch.randn, "zeros": torch.zeros, "ones": torch.ones}[wanted.fill](wanted.shape)
    return [made] if wanted.listed else made


@pytest.mark.parametrize(("class_name", "model"), MODELS)
def test_a_published_model_has_the_parameters_of_its_name(
    class_name: str, model: str, real: dict[tuple[str, str], nn.Module]
) -> None:
    facts = PUBLISHED[class_name][model]
    found = sum(parameter.numel() for parameter in real[class_name, model].parameters())
    assert found == facts["parameters"]
    assert facts["source"]
    assert abs(found / facts.get("published", found) - 1) < 0.18  # "14B" of the I2V models of Wan 2.1 is 16.4


@pytest.mark.parametrize(("class_name", "model"), MODELS)
def test_every_linear_layer_has_one_role_and_the_kept_share_is_small(
    class_name: str, model: str, real: dict[tuple[str, str], nn.Module]
) -> None:
    sizes, names = linear(real[class_name, model]), list(weighted(real[class_name, model]))
    profile = profile_of(class_name)
    layers = Layers(names)
    found = Counter(
        name for texts in profile.roles.values() for text in texts for name in layers.matching(Pattern.parse(text))
    )
    kept = kept_always(profile, names)
    assert all(found[name] == 1 for name in sizes)
    assert {name for name in found if name not in sizes} <= set(kept)  # CogVideoX: a convolution, later a linear layer
    facts = PUBLISHED[class_name][model]
    share = sum(size for name, size in sizes.items() if name in kept) / facts["parameters"]
    assert round(share, 4) == facts["kept"]
    assert share < CASES["kept"].get(class_name, 0.035)


@pytest.mark.parametrize("class_name", PUBLISHED)
def test_every_pattern_of_a_profile_matches_a_layer_of_some_variant(
    class_name: str, real: dict[tuple[str, str], nn.Module]
) -> None:
    variants = [*SMALL.get(class_name, []), *([OMNI] if class_name == "ZImageTransformer2DModel" else [])]
    models = [model for (name, _), model in real.items() if name == class_name]
    models += [on_meta(class_name, config) for config in variants]
    layers = [Layers(list(weighted(model))) for model in models]
    profile = profile_of(class_name)
    texts = [text for texts in profile.roles.values() for text in texts] + [entry.layers for entry in profile.keep]
    assert [text for text in texts if not any(found.matching(Pattern.parse(text)) for found in layers)] == []
    assert all(entry.why and entry.source for entry in profile.keep)


def test_every_linear_layer_of_the_variants_has_a_role() -> None:
    variants = [(name, config) for name, configs in SMALL.items() for config in configs]
    for class_name, config in [*variants, ("ZImageTransformer2DModel", OMNI)]:
        sizes = linear(on_meta(class_name, config))
        assert set(profile_of(class_name).roles_of(sizes)) == set(sizes)


@pytest.mark.parametrize("class_name", CASES["blocks"])
def test_the_blocks_of_a_class_are_lists_in_order(class_name: str, real: dict[tuple[str, str], nn.Module]) -> None:
    model = next(model for (name, _), model in real.items() if name == class_name)
    lists = {name: part for name, part in model.named_modules() if isinstance(part, nn.ModuleList) and "." not in name}
    assert {name for name, part in lists.items() if len(part)} <= set(CASES["blocks"][class_name])
    for stack in CASES["blocks"][class_name]:
        blocks = model.get_submodule(stack)
        assert isinstance(blocks, nn.ModuleList)
        numbers = [int(name[len(stack) + 1 :].split(".")[0]) for name in linear(model) if name.startswith(f"{stack}.")]
        assert list(dict.fromkeys(numbers)) == list(range(len(blocks)))


@pytest.mark.parametrize("class_name", VAES)
def test_a_vae_is_kept_whole_in_every_kind_of_quantization(
    class_name: str, real: dict[tuple[str, str], nn.Module]
) -> None:
    sizes, profile = linear(real[class_name, "VAE"]), profile_of(class_name)
    assert set(sizes) <= kept_always(profile, sizes)
    assert "kept whole" in profile.about and "Convolutions are not quantized" in profile.notes[0]


@pytest.mark.parametrize(
    ("class_name", "model", "kind", "share"),
    [
        ("WanTransformer3DModel", "Wan2.1-T2V-14B", "4-bit", 0.16),
        ("WanTransformer3DModel", "Wan2.1-T2V-14B", "8-bit", 0.02),
        ("LTXVideoTransformer3DModel", "LTX-Video 2B", "4-bit", 0.02),
        ("LTXVideoTransformer3DModel", "LTX-Video 2B", "w8a8", 0.23),
        ("LTX2VideoTransformer3DModel", "LTX-2 19B", "4-bit", 0.14),
        ("HunyuanVideoTransformer3DModel", "HunyuanVideo", "w8a8", 0.29),
        ("HunyuanVideo15Transformer3DModel", "HunyuanVideo-1.5", "w8a8", 0.35),
        ("MochiTransformer3DModel", "mochi-1-preview", "w8a8", 0.28),
        ("Qwen2_5_VLTextModel", "Qwen2.5-VL-7B (of HunyuanVideo 1.5)", "w8a8", 0.40),
    ],
)
def test_more_stays_where_the_sources_speak_of_one_kind_of_quantization(
    class_name: str, model: str, kind: Kind, share: float, real: dict[tuple[str, str], nn.Module]
) -> None:
    sizes = linear(real[class_name, model])
    kept = profile_of(class_name).kept(sizes)
    kept_size = sum(size for name, size in sizes.items() if kind in kept.get(name, ()))
    assert round(kept_size / PUBLISHED[class_name][model]["parameters"], 2) == share


@pytest.mark.parametrize(
    ("class_name", "config"), [(name, config) for name, configs in SMALL.items() for config in configs]
)
def test_the_probe_runs_one_forward_pass_from_the_config_alone(class_name: str, config: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = make(class_name, config).eval()
    known = dict(model.config) if hasattr(model, "save_config") else model.config.to_dict()
    inputs = {name: tensor(wanted) for name, wanted in profile_of(class_name).probe(known).items()}
    with torch.inference_mode():
        output = model(**inputs, return_dict=False)[0]
    output = output[0] if isinstance(output, list) else output
    assert output.isfinite().all() and output.std() > 0


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """A random pipeline folder of a family, with its real component names."""

    def build(family: str) -> Path:
        folder = tmp_path_factory.mktemp("small") / family
        torch.manual_seed(0)
        for component, class_name in FAMILIES[family].items():
            make(class_name, SMALL[class_name][0]).to(torch.bfloat16).save_pretrained(folder / component)
        write_index(folder, FAMILIES[family])
        return folder

    return build


def test_wan_in_nf4_with_an_int8_text_encoder_loads_without_bitroute_and_runs(small: Build, tmp_path: Path) -> None:
    file = recipe(tmp_path, small("wan"), transformer="nf4", text_encoder="int8")
    found = verify(quantize(file, out=tmp_path / "out"))
    assert found.problems == [] and found.compared
    assert all(words.endswith("loaded without bitroute; forward ok") for words in found.components.values())


def test_z_image_whose_inputs_are_lists_loads_and_runs(small: Build, tmp_path: Path) -> None:
    found = verify(quantize(recipe(tmp_path, small("z-image"), transformer="float8"), out=tmp_path / "out"))
    assert found.problems == []
    assert found.components["transformer"].endswith("loaded without bitroute; forward ok")


@pytest.mark.parametrize("family", [name for name in FAMILIES if not name.startswith("wan")])
@pytest.mark.parametrize("backend", ["float8", "nf4"])
def test_a_quantized_pipeline_holds_its_weights(family: str, backend: str, small: Build, tmp_path: Path) -> None:
    folder, text = small(family), "int8" if backend == "nf4" else backend
    file = recipe(tmp_path, folder, **{name: text for name in FAMILIES[family]} | {"transformer": backend})
    found = verify(quantize(file, out=tmp_path / "out"), load=False)
    assert found.problems == [] and found.compared
    assert {layer.component for layer in found.layers} == set(FAMILIES[family])
