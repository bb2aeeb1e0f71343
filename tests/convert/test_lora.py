"""LoRAs fused before quantizing: what diffusers' own fusing gives in float32, rounded once; and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import FluxPipeline
from diffusers.training_utils import _collate_lora_metadata
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor

from bitroute import plan, quantize, verify
from bitroute.convert.architecture import build
from bitroute.convert.checkpoint import open_pipeline
from bitroute.convert.lora import LoraFile, with_loras
from bitroute.convert.reading import read_tensor
from bitroute.errors import BitrouteError, RecipeError, SourceError

FILE = "pytorch_lora_weights.safetensors"
CONFIG = {
    "r": 4, "lora_alpha": 8, "target_modules": ["to_q", "to_k", "ff.net.2", "proj_mlp"],
    "rank_pattern": {"transformer_blocks.0.attn.to_q": 2}, "alpha_pattern": {"to_k": 3},
}  # fmt: skip
KOHYA = {  # as kohya's trainer names them
    "lora_unet_double_blocks_0_img_attn_proj": (192, 192),
    "lora_unet_double_blocks_0_img_mlp_2": (192, 768),
    "lora_unet_single_blocks_1_linear2": (192, 960),
}


def train(pipe: Any, component: str, **config: Any) -> None:
    """Stands for training: random updates of the size that it gives."""
    model = getattr(pipe, component)
    model.add_adapter(LoraConfig(**config))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.05


@pytest.fixture(scope="module")
def lora(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the transformer and of CLIP, with ranks and alphas of their own, as diffusers saves it."""
    pipe = FluxPipeline.from_pretrained(tiny, torch_dtype=torch.float32)
    train(pipe, "transformer", **CONFIG)
    train(pipe, "text_encoder", r=4, target_modules=["q_proj"], use_rslora=True)
    folder = tmp_path_factory.mktemp("lora")
    FluxPipeline.save_lora_weights(
        folder,
        transformer_lora_layers=get_peft_model_state_dict(pipe.transformer),
        text_encoder_lora_layers=get_peft_model_state_dict(pipe.text_encoder),
        **_collate_lora_metadata({"transformer": pipe.transformer, "text_encoder": pipe.text_encoder}),
    )
    return folder / FILE


def read(model: Path, component: str, *loras: LoraFile) -> dict[str, Tensor]:
    sources = build(with_loras(open_pipeline(str(model)), loras).components[component]).sources
    return {name: read_tensor(source) for name, source in sources.items()}


def named(file: Path, scale: float = 1.0) -> LoraFile:
    return LoraFile(file, file.name, scale)


def fused_by_diffusers(model: Path, scale: float, *files: Path) -> dict[str, dict[str, Tensor]]:
    """In float32; component → the weights."""
    pipe = FluxPipeline.from_pretrained(model, torch_dtype=torch.float32)
    for number, file in enumerate(files):
        pipe.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=f"n{number}")
    names = [f"n{number}" for number, _ in enumerate(files)]
    if len(names) > 1:
        pipe.set_adapters(names)  # or the scale reaches only the last one
    pipe.fuse_lora(components=["transformer", "text_encoder"], lora_scale=scale, adapter_names=names)
    models = {"transformer": pipe.transformer, "text_encoder": pipe.text_encoder}
    return {
        component: {name.replace(".base_layer", ""): tensor for name, tensor in model.state_dict().items()}
        for component, model in models.items()
    }


@pytest.mark.parametrize("component", ["transformer", "text_encoder"])
def test_every_weight_is_what_diffusers_fuses_in_float32_rounded_once(component: str, tiny: Path, lora: Path) -> None:
    expected = fused_by_diffusers(tiny, 0.7, lora)[component]
    found, plain = read(tiny, component, named(lora, 0.7)), read(tiny, component)
    assert all(torch.equal(tensor, expected[name].to(tensor.dtype)) for name, tensor in found.items())
    changed = {name for name, tensor in found.items() if not torch.equal(tensor, plain[name])}
    assert len(changed) == {"transformer": 18, "text_encoder": 1}[component]


def kohya(folder: Path) -> Path:
    generator = torch.Generator().manual_seed(1)
    state = {}
    for name, (out, into) in KOHYA.items():
        state[f"{name}.lora_down.weight"] = torch.randn(4, into, generator=generator) * 0.05
        state[f"{name}.lora_up.weight"] = torch.randn(out, 4, generator=generator) * 0.05
        state[f"{name}.alpha"] = torch.tensor(2.0)
    save_file(state, folder / "kohya.safetensors")
    return folder / "kohya.safetensors"


def test_the_spelling_of_kohya_and_its_alpha_are_read_and_two_loras_add_up(
    tiny: Path, lora: Path, tmp_path: Path
) -> None:
    other = kohya(tmp_path)
    expected = fused_by_diffusers(tiny, 0.5, lora, other)["transformer"]
    found = read(tiny, "transformer", named(lora, 0.5), named(other, 0.5))
    for name, tensor in found.items():
        assert torch.allclose(tensor.float(), expected[name], rtol=2**-8, atol=1e-6), name
    state = load_file(other)
    down, up = (state[f"lora_unet_double_blocks_0_img_attn_proj.lora_{part}.weight"] for part in ("down", "up"))
    name = "transformer_blocks.0.attn.to_out.0.weight"
    alone = read(tiny, "transformer", named(other))[name].float() - read(tiny, "transformer")[name].float()
    assert torch.allclose(alone, 2 / 4 * up @ down, atol=0.004)


@pytest.fixture
def write(tmp_path: Path, tiny: Path) -> Callable[..., str]:
    def write(*loras: dict[str, Any], **more: Any) -> str:
        content = {"model": str(tiny), "fuse_loras": list(loras), "components": {"transformer": {"backend": "int8"}}}
        file = tmp_path / "recipe.yaml"
        file.write_text(yaml.safe_dump({**content, **more}))
        return str(file)

    return write


def test_a_recipe_fuses_verifies_and_keeps_what_it_fused(
    write: Callable[..., str], lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "style.safetensors").write_bytes(lora.read_bytes())
    recipe = write({"path": "style.safetensors", "scale": 0.7})
    planned = plan(recipe)
    assert [component.name for component in planned.components] == ["transformer", "text_encoder"]
    assert "LoRA 'style.safetensors' × 0.7 is fused into 18 layers first" in planned.components[0].notes
    out = quantize(recipe, out=tmp_path / "out")
    found = verify(out, planned.pipeline)
    assert found.problems == [] and "LoRA 'style.safetensors' × 0.7: 19 of 19 weights came out changed" in found.notes
    recorded = json.loads((out / "bitroute.json").read_text())["source"]["loras"]
    assert [(entry["path"], entry["scale"]) for entry in recorded] == [("style.safetensors", 0.7)]
    monkeypatch.chdir(tmp_path)
    assert verify(out, load=False).compared
    (tmp_path / "style.safetensors").unlink()
    assert not verify(out, load=False).compared


def test_another_file_of_that_name_is_not_taken_for_the_lora_that_was_fused(
    tiny: Path, lora: Path, tmp_path: Path
) -> None:
    recorded = with_loras(open_pipeline(str(tiny)), [named(lora)]).loras[0].record()
    again = LoraFile.recorded({**recorded, "path": str(kohya(tmp_path))})
    with pytest.raises(SourceError, match="another file than the one that was fused"):
        with_loras(open_pipeline(str(tiny)), [again])


def altered(lora: Path, folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Path:
    save_file({n: t.contiguous() for n, t in change(load_file(lora)).items()}, folder / "altered.safetensors")
    return folder / "altered.safetensors"


REFUSED: dict[str, tuple[Callable[[dict[str, Tensor]], dict[str, Tensor]], str]] = {
    "zero": (lambda s: {n: torch.zeros_like(t) if "lora_B" in n else t for n, t in s.items()}, "changes nothing"),
    "no LoRA": (lambda s: {"transformer.proj_out.weight": torch.ones(4, 4)}, "cannot be read"),
    "another model": (
        lambda s: {n.replace("transformer_blocks", "blocks"): t for n, t in s.items()},
        "does not fit the pipeline|cannot be read",
    ),
    "half": (lambda s: {n: t for n, t in s.items() if "0.attn.to_k.lora_A" not in n}, "led to missing keys"),
    "another width": (
        lambda s: {n: t[..., :8] if "lora_A" in n else t for n, t in s.items() if n.startswith("transformer.")},
        "with other widths",
    ),
    "DoRA": (lambda s: {**s, "transformer.x.lora_magnitude_vector": torch.ones(4)}, "is a DoRA"),
    "NaN": (lambda s: {n: t * float("nan") if "0.attn.to_k" in n else t for n, t in s.items()}, "is not finite"),
    "infinite": (lambda s: {n: t * float("inf") if "lora_B" in n else t for n, t in s.items()}, "is not finite"),
    "another component": (
        lambda s: {**s, "text_encoder_2.encoder.q.lora_A.weight": torch.ones(4, 4)},
        "what diffusers would leave out",
    ),
    "a difference": (lambda s: {**s, "transformer.proj_out.diff_b": torch.ones(4)}, "what diffusers would leave out"),
    "too many": (lambda s: {f"{n}.lora_A.weight": torch.ones(1) for n in range(10_001)}, "too many tensors"),
    "empty": (lambda s: {}, "cannot be read|has no layer"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_fused_is_refused_at_plan_time(
    case: str, write: Callable[..., str], lora: Path, tmp_path: Path
) -> None:
    change, words = REFUSED[case]
    with pytest.raises(RecipeError, match=words):
        plan(write({"path": altered(lora, tmp_path, change).name}))


def test_a_lora_that_is_missing_broken_or_of_scale_0_is_refused(
    write: Callable[..., str], lora: Path, tmp_path: Path
) -> None:
    (tmp_path / "broken.safetensors").write_bytes(lora.read_bytes()[:1000])
    (tmp_path / "good.safetensors").write_bytes(lora.read_bytes())
    for entry, words in (
        ({"path": "none.safetensors"}, "is not there"),
        ({"path": "broken.safetensors"}, "not a sound safetensors file"),
        ({"path": "good.safetensors", "scale": 0}, "changes nothing"),
        ({"path": "good.safetensors", "into": "vae"}, "cannot go there"),
        ({"path": "good.safetensors", "scales": 1}, "unknown key 'scales'"),
        ("good.safetensors", r"write `- \{path: 'good.safetensors'\}`"),
    ):
        with pytest.raises(BitrouteError, match=words):
            plan(write(entry))


@pytest.mark.parametrize("key", ["target_modules", "rank_pattern"])
def test_a_regular_expression_in_the_metadata_is_not_run(key: str, write: Callable[..., str], tmp_path: Path) -> None:
    pattern = "(.*.*)*.*x"
    metadata = {f"transformer.{key}": pattern if key == "target_modules" else {pattern: 2}}
    tensors = {"transformer.x_embedder.lora_A.weight": torch.ones(2, 64)}
    save_file(tensors, tmp_path / "slow.safetensors", {"lora_adapter_metadata": json.dumps(metadata)})
    with pytest.raises(RecipeError, match="names its layers by a regular expression"):
        plan(write({"path": "slow.safetensors"}))
