"""Model families of pictures as data: profiles at published sizes, small models running, recipes planned."""

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

from bitroute import plan, quantize, verify
from bitroute.convert.pattern import Layers, Pattern
from bitroute.convert.profile import ProbeInput

Write = Callable[..., None]
Build = Callable[..., Path]
Facts = dict[str, Any]


def read(name: str) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(Path(__file__).with_name(name).read_text(encoding="utf-8"))
    return content


PUBLISHED: dict[str, dict[str, Facts]] = read("families_image.yaml")
CASES = read("families_image_cases.yaml")
SMALL: dict[str, list[Facts]] = CASES["small"]
PIPELINES: dict[str, dict[str, tuple[str, str | Facts]]] = CASES["pipelines"]
PLANS: list[tuple[str, str, list[list[float]]]] = CASES["plans"]
MODELS = [(class_name, model) for class_name, models in PUBLISHED.items() for model in models]
BLOCKS = {
    "SD3Transformer2DModel": ["transformer_blocks"],
    "QwenImageTransformer2DModel": ["transformer_blocks"],
    "Qwen2_5_VLForConditionalGeneration": ["model.visual.blocks", "model.language_model.layers"],
    "UNet2DConditionModel": ["down_blocks", "up_blocks"],
    "CLIPTextModelWithProjection": ["text_model.encoder.layers"],
    "Flux2Transformer2DModel": ["transformer_blocks", "single_transformer_blocks"],
    "Mistral3ForConditionalGeneration": ["model.vision_tower.transformer.layers", "model.language_model.layers"],
    "Qwen3ForCausalLM": ["model.layers"],
    "PixArtTransformer2DModel": ["transformer_blocks"],
}
SMALL_SHARE = {  # the kept share of parameters stays below this
    "CLIPTextModelWithProjection": 1.0,  # kept whole
    "Qwen2_5_VLForConditionalGeneration": 0.15,  # vision tower 8 %, lm_head 7 %
    "Qwen3ForCausalLM": 0.10,  # lm_head
    "Flux2Transformer2DModel": 0.055,  # klein 4B; of dev 2.5 %
    "Mistral3ForConditionalGeneration": 0.05,  # vision tower 2 %, lm_head 3 %
}
PER_ROW = {"float8": 4, "int8": 5}  # bytes: a scale, and for INT8 a zero point


def published(class_name: str, model: str | Facts) -> tuple[str, Facts]:
    return class_name, PUBLISHED[class_name][model]["config"] if isinstance(model, str) else model


@pytest.fixture(scope="module")
def real() -> dict[tuple[str, str], nn.Module]:
    return {(name, model): on_meta(*published(name, model)) for name, model in MODELS}


def share(model: nn.Module, names: set[str] | dict[str, str]) -> float:
    """Of all parameters, those in the weights of these linear layers."""
    kept = sum(size for name, size in linear(model).items() if name in names)
    return kept / sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(("class_name", "model"), MODELS)
def test_a_published_model_has_the_size_that_is_said_of_it(
    class_name: str, model: str, real: dict[tuple[str, str], nn.Module]
) -> None:
    facts, built = PUBLISHED[class_name][model], real[class_name, model]
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
    assert all(
        name.endswith((".proj_in", ".proj_out")) for name in others
    )  # SD1.5: convolutions, in SDXL linear layers
    assert not others or model == "Stable Diffusion 1.5"
    kept = share(built, kept_always(profile, names))
    assert round(kept, 4) == PUBLISHED[class_name][model]["kept"]
    assert kept < SMALL_SHARE.get(class_name, 0.035)


@pytest.mark.parametrize("class_name", PUBLISHED)
def test_every_pattern_of_a_profile_matches_a_layer_and_every_kept_layer_is_linear(
    class_name: str, real: dict[tuple[str, str], nn.Module]
) -> None:
    profile = profile_of(class_name)
    layers = [Layers(list(linear(model))) for (name, _), model in real.items() if name == class_name]
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


def test_the_notes_state_the_shares_that_the_models_have(real: dict[tuple[str, str], nn.Module]) -> None:
    def modulation(class_name: str, model: str) -> float:
        built = real[class_name, model]
        roles = profile_of(class_name).roles_of(linear(built))
        return round(share(built, {name for name, role in roles.items() if role == "modulation"}), 2)

    assert modulation("QwenImageTransformer2DModel", "Qwen-Image, Qwen-Image-Edit") == 0.33
    assert modulation("Flux2Transformer2DModel", "FLUX.2 dev") == 0.02
    sd3 = [modulation("SD3Transformer2DModel", model) for model in PUBLISHED["SD3Transformer2DModel"]]
    assert sd3 == [0.33, 0.34, 0.33]
    flux2 = real["Flux2Transformer2DModel", "FLUX.2 dev"]
    assert (
        round(share(flux2, {name for name in linear(flux2) if name.startswith("single_transformer_blocks.")}), 2)
        == 0.73
    )
    linear_shares = {
        model: share(real["UNet2DConditionModel", model], set(linear(real["UNet2DConditionModel", model])))
        for model in PUBLISHED["UNet2DConditionModel"]
    }
    assert {model: round(1 - found, 2) for model, found in linear_shares.items()} == {
        "SDXL base": 0.13,
        "Stable Diffusion 1.5": 0.69,
    }


def tensor(wanted: ProbeInput) -> Any:
    if wanted.value is not None:
        return wanted.value
    if wanted.dtype == "long":
        return torch.randint(0, wanted.below or 1, wanted.shape)
    return {"random": torch.randn, "zeros": torch.zeros, "ones": torch.ones}[wanted.fill](wanted.shape)


def nested(inputs: dict[str, Any]) -> dict[str, Any]:
    plain = {name: value for name, value in inputs.items() if "." not in name}
    for name, value in inputs.items():
        outer, dot, inner = name.partition(".")
        if dot:
            plain.setdefault(outer, {})[inner] = value
    return plain


@pytest.mark.parametrize(
    ("class_name", "config"),
    [(name, config) for name, configs in SMALL.items() if name in PUBLISHED for config in configs],
)
def test_the_probe_runs_one_forward_pass_from_the_config_alone(class_name: str, config: Facts) -> None:
    torch.manual_seed(0)
    model = make(class_name, config).eval()
    known = dict(model.config) if hasattr(model, "save_config") else model.config.to_dict()
    probe = profile_of(class_name).probe(known)
    with torch.inference_mode():
        output = model(**nested({name: tensor(wanted) for name, wanted in probe.items()}), return_dict=False)[0]
    assert output.isfinite().all() and output.std() > 0


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
    classes = {f"part_{number}": name for number, name in enumerate(PUBLISHED) if name != "CLIPTextModelWithProjection"}
    file = recipe(tmp_path, small(**classes), **dict.fromkeys(classes, backend))
    found = verify(quantize(file, out=tmp_path / "out"), load=False)
    assert found.problems == [] and found.compared
    assert {layer.component for layer in found.layers} == set(classes)


@pytest.fixture(scope="module")
def full_size(tmp_path_factory: pytest.TempPathFactory, write_hollow: Write) -> Build:
    """A pipeline folder of a published model whose weights are holes."""
    made: dict[str, Path] = {}

    def build(model: str) -> Path:
        if model not in made:
            made[model] = folder = tmp_path_factory.mktemp("full") / model
            for component, entry in PIPELINES[model].items():
                (folder / component).mkdir(parents=True)
                write_hollow(on_meta(*published(*entry)), folder / component)
            write_index(folder, {component: class_name for component, (class_name, _) in PIPELINES[model].items()})
        return made[model]

    return build


@pytest.mark.parametrize(("name", "model", "gigabytes"), PLANS)
def test_every_recipe_fits_its_full_size_model_and_loads_without_bitroute(
    name: str, model: str, gigabytes: list[list[float]], full_size: Build
) -> None:
    components = plan(name, str(full_size(model))).components
    sizes = [[round(part.source_bytes / 1e9, 1), round(part.size_bytes / 1e9, 1)] for part in components]
    assert sizes == gigabytes
    first, *texts = [part.container.name for part in components]
    assert first == ("bitsandbytes" if name.endswith("nf4") else "torchao")
    assert set(texts) <= {"torchao"}


@pytest.mark.parametrize(("name", "model"), [(name, model) for name, model, _ in PLANS if name.endswith("fp8")])
def test_the_planned_8_bit_size_is_one_byte_a_weight_and_a_scale_a_row(name: str, model: str, full_size: Build) -> None:
    for part in plan(name, str(full_size(model))).components:
        quantized = [(entry.backend.name, *entry.weight.rows.shape) for entry in part.entries if entry.quantized]
        saved = sum(rows * columns - PER_ROW[backend] * rows for backend, rows, columns in quantized)
        assert part.size_bytes == part.source_bytes - saved
