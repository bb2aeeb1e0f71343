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

from bitroute import plan, quantize, verify
from bitroute.convert.pattern import Layers, Pattern
from bitroute.convert.profile import ProbeInput

Write = Callable[..., None]
Build = Callable[..., Path]
PUBLISHED: dict[str, dict[str, dict[str, Any]]] = yaml.safe_load(
    Path(__file__).with_name("families_video.yaml").read_text(encoding="utf-8")
)
MODELS = [(class_name, model) for class_name, models in PUBLISHED.items() for model in models]
LISTED = {
    "WanTransformer3DModel": ["blocks"],
    "UMT5EncoderModel": ["encoder.block"],
    "ZImageTransformer2DModel": ["noise_refiner", "context_refiner", "layers"],
    "Qwen3Model": ["layers"],
    "LTXVideoTransformer3DModel": ["transformer_blocks"],
    "CogVideoXTransformer3DModel": ["transformer_blocks"],
    "ChromaTransformer2DModel": ["transformer_blocks", "single_transformer_blocks"],
    "HunyuanVideoTransformer3DModel": ["transformer_blocks", "single_transformer_blocks"],
}
WAN = {
    "num_attention_heads": 2,
    "attention_head_dim": 32,
    "ffn_dim": 128,
    "num_layers": 1,
    "text_dim": 64,
    "freq_dim": 64,
}
Z_IMAGE = {
    "dim": 192, "n_layers": 1, "n_refiner_layers": 1, "n_heads": 3, "n_kv_heads": 3, "cap_feat_dim": 64,
    "axes_dims": [16, 24, 24], "axes_lens": [64, 64, 64],
}  # fmt: skip
LTX = {
    "num_attention_heads": 2, "attention_head_dim": 32, "cross_attention_dim": 64, "num_layers": 1,
    "caption_channels": 64, "in_channels": 64, "out_channels": 64,
}  # fmt: skip
COG = {
    "num_attention_heads": 2, "attention_head_dim": 64, "num_layers": 1, "text_embed_dim": 64, "time_embed_dim": 64,
    "max_text_seq_length": 8, "sample_width": 4, "sample_height": 4, "sample_frames": 5,
}  # fmt: skip
CHROMA = {
    "in_channels": 64, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 32, "num_attention_heads": 2,
    "joint_attention_dim": 64, "axes_dims_rope": (8, 12, 12), "approximator_hidden_dim": 64, "approximator_layers": 1,
}  # fmt: skip
HUNYUAN = {
    "num_layers": 1, "num_single_layers": 1, "num_refiner_layers": 1, "attention_head_dim": 32,
    "num_attention_heads": 2, "text_embed_dim": 64, "pooled_projection_dim": 64, "rope_axes_dim": (8, 12, 12),
}  # fmt: skip
T5 = {"d_model": 64, "d_ff": 128, "d_kv": 32, "num_heads": 2, "num_layers": 1, "vocab_size": 64}
QWEN = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 32, "vocab_size": 64,
}  # fmt: skip
# "config unsourced" but for the keys that make a variant: they cover the layers that only variants have
SMALL: dict[str, list[dict[str, Any]]] = {
    "WanTransformer3DModel": [WAN, {**WAN, "in_channels": 36, "image_dim": 64, "added_kv_proj_dim": 64}],
    "UMT5EncoderModel": [{**T5, "feed_forward_proj": "gated-gelu"}],
    "ZImageTransformer2DModel": [Z_IMAGE],
    "Qwen3Model": [QWEN],
    "LTXVideoTransformer3DModel": [LTX],
    "CogVideoXTransformer3DModel": [
        COG,
        {**COG, "use_rotary_positional_embeddings": True},
        {**COG, "use_rotary_positional_embeddings": True, "patch_size_t": 2, "ofs_embed_dim": 64, "patch_bias": False},
    ],
    "ChromaTransformer2DModel": [CHROMA],
    "HunyuanVideoTransformer3DModel": [HUNYUAN, {**HUNYUAN, "guidance_embeds": False}],
}  # fmt: skip
OMNI = {**Z_IMAGE, "siglip_feat_dim": 64}  # its forward pass wants nested lists, which no probe gives
FOLDERS = {
    "wan": {"transformer": "WanTransformer3DModel", "text_encoder": "UMT5EncoderModel"},
    "wan22": {name: "WanTransformer3DModel" for name in ("transformer", "transformer_2")}
    | {"text_encoder": "UMT5EncoderModel"},
    "z-image": {"transformer": "ZImageTransformer2DModel", "text_encoder": "Qwen3Model"},
    "ltx": {"transformer": "LTXVideoTransformer3DModel", "text_encoder": "T5EncoderModel"},
    "cogvideox": {"transformer": "CogVideoXTransformer3DModel", "text_encoder": "T5EncoderModel"},
    "chroma": {"transformer": "ChromaTransformer2DModel", "text_encoder": "T5EncoderModel"},
    "hunyuan-video": {"transformer": "HunyuanVideoTransformer3DModel"},
}  # fmt: skip
FULL_SIZE = {
    "WanTransformer3DModel": "Wan2.1-T2V-14B",
    "UMT5EncoderModel": "umt5-xxl",
    "ZImageTransformer2DModel": "Z-Image and Z-Image-Turbo",
    "Qwen3Model": "Qwen3-4B (of Z-Image)",
    "LTXVideoTransformer3DModel": "LTX-Video 2B",
    "CogVideoXTransformer3DModel": "CogVideoX-5b",
}
T5_XXL = {"d_model": 4096, "d_ff": 10240, "d_kv": 64, "num_heads": 64, "num_layers": 24, "vocab_size": 32128}
# gigabytes of 10^9 bytes that the quantized components take, the larger part of the pipeline
SIZES_GB = {
    "wan-fp8": (14.5, 7.7), "wan-nf4": (7.7, 7.7), "wan22-fp8": (14.5, 7.7), "wan22-nf4": (7.7, 7.7),
    "z-image-fp8": (6.3, 4.4), "z-image-nf4": (3.4, 4.4), "ltx-fp8": (2.0, 5.9), "ltx-nf4": (1.1, 5.9),
    "cogvideox-fp8": (5.6, 5.9), "cogvideox-nf4": (4.1, 5.9),
}  # fmt: skip


@pytest.fixture(scope="module")
def real() -> dict[tuple[str, str], nn.Module]:
    return {(name, model): on_meta(name, PUBLISHED[name][model]["config"]) for name, model in MODELS}


def tensor(wanted: ProbeInput) -> Any:
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
    assert share < (0.18 if class_name == "UMT5EncoderModel" else 0.035)


@pytest.mark.parametrize("class_name", PUBLISHED)
def test_every_pattern_of_a_profile_matches_a_layer_of_some_variant(
    class_name: str, real: dict[tuple[str, str], nn.Module]
) -> None:
    variants = [*SMALL[class_name], *([OMNI] if class_name == "ZImageTransformer2DModel" else [])]
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


@pytest.mark.parametrize("class_name", PUBLISHED)
def test_the_blocks_of_a_class_are_lists_in_order(class_name: str, real: dict[tuple[str, str], nn.Module]) -> None:
    model = next(model for (name, _), model in real.items() if name == class_name)
    stacks = {name: part for name, part in model.named_modules() if isinstance(part, nn.ModuleList) and "." not in name}
    if class_name == "UMT5EncoderModel":
        stacks = {"encoder.block": model.get_submodule("encoder.block")}  # type: ignore[dict-item]
    names = [name for name in stacks if len(stacks[name])]
    assert names == LISTED[class_name]
    for name in names:
        blocks = dict.fromkeys(
            int(key[len(name) + 1 :].split(".")[0]) for key in linear(model) if key.startswith(f"{name}.")
        )
        assert list(blocks) == list(range(len(stacks[name])))


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
        for component, class_name in FOLDERS[family].items():
            config = T5 if class_name == "T5EncoderModel" else SMALL[class_name][0]
            make(class_name, config).to(torch.bfloat16).save_pretrained(folder / component)
        write_index(folder, FOLDERS[family])
        return folder

    return build


def test_wan_quantized_with_every_backend_of_its_recipes_loads_without_bitroute_and_runs(
    small: Build, tmp_path: Path
) -> None:
    folder = small("wan22")
    file = recipe(tmp_path, folder, transformer="nf4", transformer_2="float8", text_encoder="int8")
    found = verify(quantize(file, out=tmp_path / "out"))
    assert found.problems == [] and found.compared
    assert all(words.endswith("loaded without bitroute; forward ok") for words in found.components.values())


def test_z_image_whose_inputs_are_lists_loads_and_runs(small: Build, tmp_path: Path) -> None:
    found = verify(quantize(recipe(tmp_path, small("z-image"), transformer="float8"), out=tmp_path / "out"))
    assert found.problems == []
    assert found.components["transformer"].endswith("loaded without bitroute; forward ok")


@pytest.mark.parametrize("family", ["z-image", "ltx", "cogvideox", "chroma", "hunyuan-video"])
@pytest.mark.parametrize("backend", ["float8", "nf4"])
def test_a_quantized_pipeline_holds_its_weights(family: str, backend: str, small: Build, tmp_path: Path) -> None:
    folder, text = small(family), "int8" if backend == "nf4" else backend
    file = recipe(tmp_path, folder, **{name: text for name in FOLDERS[family]} | {"transformer": backend})
    found = verify(quantize(file, out=tmp_path / "out"), load=False)
    assert found.problems == [] and found.compared
    assert {layer.component for layer in found.layers} == set(FOLDERS[family])


@pytest.fixture(scope="module")
def full_size(tmp_path_factory: pytest.TempPathFactory, write_hollow: Write) -> Build:
    """A pipeline folder of a published model whose weights are holes."""
    made: dict[str, Path] = {}

    def build(family: str) -> Path:
        if family not in made:
            made[family] = folder = tmp_path_factory.mktemp("full") / family
            for component, name in FOLDERS[family].items():
                (folder / component).mkdir(parents=True)
                t5 = {**T5_XXL, "feed_forward_proj": "gated-gelu"}
                config = t5 if name == "T5EncoderModel" else PUBLISHED[name][FULL_SIZE[name]]["config"]
                write_hollow(on_meta(name, config), folder / component)
            write_index(folder, FOLDERS[family])
        return made[family]

    return build


@pytest.mark.parametrize("name", SIZES_GB)
def test_every_recipe_of_a_family_fits_its_full_size_model_and_loads_without_bitroute(
    name: str, full_size: Build
) -> None:
    family, _, kind = name.rpartition("-")
    planned = {component.name: component for component in plan(name, str(full_size(family))).components}
    assert set(planned) == set(FOLDERS[family])
    for component, class_name in FOLDERS[family].items():
        if class_name in FULL_SIZE:
            facts = PUBLISHED[class_name][FULL_SIZE[class_name]]
            assert planned[component].source_bytes == 2 * facts["parameters"]
    native = "bitsandbytes" if kind == "nf4" else "torchao"
    containers = {component: planned[component].container.name for component in planned}
    assert containers == {component: native if component == "transformer" else "torchao" for component in planned}
    sizes = [round(planned[component].size_bytes / 1e9, 1) for component in ("transformer", "text_encoder")]
    assert sizes == list(SIZES_GB[name])


@pytest.mark.parametrize("family", {name.rpartition("-")[0]: None for name in SIZES_GB})
def test_the_planned_fp8_size_is_one_byte_a_quantized_weight_and_four_a_row(family: str, full_size: Build) -> None:
    for component in plan(f"{family}-fp8", str(full_size(family))).components:
        quantized = [entry.weight.rows.shape for entry in component.entries if entry.quantized]
        saved = sum(rows * columns - 4 * rows for rows, columns in quantized)
        assert component.size_bytes == component.source_bytes - saved
