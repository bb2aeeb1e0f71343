"""Models that are one file in their authors' names: the components of a pipeline, bit for bit as diffusers has them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from families import make, write_index
from hub import Hub
from originals import CLIP, ORIGINALS, Tensors, clip
from safetensors.torch import load_file, save_file

from bitroute import plan, quantize, verify
from bitroute.cli import main
from bitroute.convert.checkpoint import Component, open_pipeline
from bitroute.convert.journal import journal_of
from bitroute.convert.layout import read_header
from bitroute.convert.plan import fetch
from bitroute.convert.reading import read_tensor
from bitroute.convert.single_file import family
from bitroute.errors import BitrouteError, RecipeError, SourceError

Original = Callable[..., tuple[Path, Path]]
WEIGHTS = "diffusion_pytorch_model.safetensors"
TRANSFORMER = "components:\n  transformer: {backend: float8}\n"
COMPONENTS = {"sd": "unet", "sd-vae": "vae"}


@pytest.fixture
def original(tmp_path: Path) -> Original:
    """Writes small models as one file in their authors' names, and the configs of their pipeline; returns both."""

    def write(*names: str, **more: torch.Tensor) -> tuple[Path, Path]:
        torch.manual_seed(0)
        config, tensors, classes = tmp_path / "config", dict[str, torch.Tensor](more), dict[str, str]()
        for name in names:
            class_name, settings, rename = ORIGINALS[name]
            model, component = make(class_name, settings), COMPONENTS.get(name, "transformer")
            model.save_config(config / component)
            classes[component] = class_name
            tensors |= rename({key: value.to(torch.bfloat16) for key, value in model.state_dict().items()})
        write_index(config, classes)
        save_file({key: value.contiguous().clone() for key, value in tensors.items()}, tmp_path / "model.safetensors")
        return tmp_path / "model.safetensors", config

    return write


def mapped(name: str, file: Path) -> Tensors:
    """What diffusers' own function makes of the whole state dict."""
    from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES

    class_name, settings, _ = ORIGINALS[name]
    convert: Callable[..., Tensors] = SINGLE_FILE_LOADABLE_CLASSES[class_name]["checkpoint_mapping_fn"]
    return convert(checkpoint=load_file(file), config=dict(make(class_name, settings).config))


def held(file: Path, config: Path | str, component: str = "transformer") -> Component:
    return open_pipeline(str(file), config=str(config)).components[component]


def refusal(file: Path, config: Path | str | None = None) -> str:
    with pytest.raises(SourceError) as refused:
        open_pipeline(str(file), config=config and str(config))
    return str(refused.value)


@pytest.mark.parametrize("name", ["wan", "sd3", "sd"])
def test_every_tensor_is_what_diffusers_own_function_makes_of_it(name: str, original: Original) -> None:
    file, config = original(name)
    found, expected = held(file, config, COMPONENTS.get(name, "transformer")).tensors, mapped(name, file)
    assert found.keys() == expected.keys()
    for tensor, value in expected.items():
        assert torch.equal(read_tensor(found[tensor]), value), tensor


def test_the_fused_layers_of_a_flux_are_cut_without_being_computed(tmp_path: Path) -> None:
    """Its function knows the sizes of the published model alone: here the rows are few, not the columns."""
    from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers as convert

    from bitroute.convert.tracing import trace

    names = {f"single_blocks.0.{name}": rows for name, rows in (("linear1", 21504), ("linear2", 3072))}
    names |= {"single_blocks.0.modulation.lin": 9216, "final_layer.linear": 64, "txt_in": 64, "img_in": 64}
    names |= {f"{part}_in.{layer}_layer": 64 for part in ("time", "vector") for layer in ("in", "out")}
    names |= {f"double_blocks.0.{part}_attn.{name}": 96 for part in ("img", "txt") for name in ("qkv", "proj")}
    names |= {f"double_blocks.0.{part}_{name}": 96 for part in ("img", "txt") for name in ("mod.lin", "mlp.0", "mlp.2")}
    tensors = {f"{name}.weight": torch.randn(rows, 2) for name, rows in names.items()}
    tensors |= {f"{name}.bias": torch.randn(rows) for name, rows in names.items()}
    norms = [f"double_blocks.0.{part}_attn.norm" for part in ("img", "txt")] + ["single_blocks.0.norm"]
    tensors |= {f"{norm}.{kind}_norm.scale": torch.randn(8) for norm in norms for kind in ("query", "key")}
    tensors |= {f"final_layer.adaLN_modulation.1.{kind}": torch.randn(64) for kind in ("weight", "bias")}
    save_file(tensors, tmp_path / "flux.safetensors")
    found = trace(lambda checkpoint: convert(checkpoint), read_header(tmp_path / "flux.safetensors").tensors)
    expected = convert(dict(tensors))
    assert all(torch.equal(read_tensor(found[name]), value) for name, value in expected.items())
    derived = {name for name, tensor in found.items() if hasattr(tensor, "parts")}
    assert derived == {"norm_out.linear.weight", "norm_out.linear.bias"}


def test_a_single_file_becomes_a_pipeline_that_loads_and_is_verified(
    original: Original, tmp_path: Path, write_recipe: Callable[[str], str]
) -> None:
    file, config = original("wan")
    out = quantize(write_recipe(TRANSFORMER), str(file), tmp_path / "out", config=str(config))
    found = verify(out)
    assert found.problems == []
    assert found.compared
    assert "forward ok" in found.components["transformer"]
    source = json.loads((out / "bitroute.json").read_text())["source"]
    assert (source["model"], source["config"]) == (str(file), str(config))


def test_a_file_in_the_names_of_diffusers_is_taken_as_it_is(tiny: Path) -> None:
    component = held(tiny / "transformer" / WEIGHTS, tiny)
    assert component.tensors == read_header(tiny / "transformer" / WEIGHTS).tensors


def test_what_the_file_does_not_hold_is_copied_from_the_config(tiny: Path) -> None:
    planned = plan("tiny-flux-fp8", str(tiny / "transformer" / WEIGHTS), config="builtin:tiny-flux")
    assert planned.copied == plan("tiny-flux-fp8").copied


def test_of_a_whole_pipeline_all_that_the_file_holds_is_read_from_it(
    original: Original, write_recipe: Callable[[str], str]
) -> None:
    encoder = make("CLIPTextModel", CLIP)
    file, config = original("sd", "sd-vae", alphas_cumprod=torch.ones(4), **clip(encoder.state_dict()))
    encoder.config.save_pretrained(config / "text_encoder")
    index = json.loads((config / "model_index.json").read_text())
    index["text_encoder"] = ["transformers", "CLIPTextModel"]
    (config / "model_index.json").write_text(json.dumps(index))
    planned = plan(write_recipe("components:\n  unet: {backend: int8}\n"), str(file), config=str(config))
    parts = {component.name: component for component in planned.components}
    assert list(parts) == ["unet", "vae", "text_encoder"]
    assert not parts["vae"].quantized
    assert any("alphas_cumprod" in note for note in parts["unet"].notes)
    expected = mapped("sd-vae", file)
    for entry in parts["vae"].entries:
        assert torch.equal(read_tensor(entry.source), expected[entry.name])
    for entry in parts["text_encoder"].entries:
        assert torch.equal(read_tensor(entry.source), encoder.state_dict()[entry.name])


def test_a_file_that_changed_since_the_job_began_is_named(
    original: Original, write_recipe: Callable[[str], str]
) -> None:
    file, config = original("wan")
    before = journal_of(plan(write_recipe(TRANSFORMER), str(file), config=str(config)), "cpu")
    os.utime(file, (0, 0))
    now = journal_of(plan(write_recipe(TRANSFORMER), str(file), config=str(config)), "cpu")
    assert [problem.where for problem in before.changes(now)] == [str(file)]


def test_without_a_config_the_family_and_the_command_are_named(original: Original) -> None:
    file, _ = original("wan")
    assert "--config Wan-AI/Wan2.1" in refusal(file)
    assert family({}) is None


def test_a_file_of_another_family_is_refused_with_its_own(original: Original, tiny: Path) -> None:
    file, _ = original("wan")
    said = refusal(file, tiny)
    assert "does not hold the denoiser of" in said
    assert "--config Wan-AI/Wan2.1" in said


def test_a_missing_and_an_unknown_tensor_are_named(original: Original, write_recipe: Callable[[str], str]) -> None:
    file, config = original("wan")
    tensors = load_file(file)
    tensors["blocks.0.extra.weight"] = tensors.pop("blocks.1.self_attn.q.weight")
    save_file(tensors, file)
    with pytest.raises(RecipeError) as refused:
        plan(write_recipe(TRANSFORMER), str(file), config=str(config))
    assert "lacks tensor 'blocks.1.attn1.to_q.weight'" in str(refused.value)
    assert "tensor 'blocks.0.extra.weight' is none that WanTransformer3DModel has" in str(refused.value)


def test_of_two_components_of_one_class_the_config_says_which(original: Original) -> None:
    file, config = original("wan")
    (config / "transformer_2").mkdir()
    (config / "transformer_2/config.json").write_text((config / "transformer/config.json").read_text())
    write_index(config, {"transformer": "WanTransformer3DModel", "transformer_2": "WanTransformer3DModel"})
    index: dict[str, Any] = {name: ["diffusers", "WanTransformer3DModel"] for name in ("transformer", "transformer_2")}
    (config / "model_index.json").write_text(json.dumps({"_class_name": "WanPipeline", **index}))
    assert f"--config {config}/transformer_2" in refusal(file, config)
    assert list(open_pipeline(str(file), config=f"{config}/transformer_2").held) == ["transformer_2"]


LORA = {"transformer.blocks.0.attn1.to_q.lora_A.weight": torch.ones(4, 8)}
SCALED = {"blocks.0.weight": torch.ones(4, 8).to(torch.float8_e4m3fn), "blocks.0.scale_weight": torch.ones(1)}
TEXT = {"encoder.block.0.layer.0.SelfAttention.q.weight": torch.ones(4, 8), "shared.weight": torch.ones(4, 8)}


@pytest.mark.parametrize(
    ("tensors", "words"), [(LORA, "fuse_loras"), (SCALED, "already quantized"), (TEXT, "a text encoder")]
)
def test_what_is_no_denoiser_is_refused_in_a_sentence(tensors: Tensors, words: str, tmp_path: Path, tiny: Path) -> None:
    save_file(tensors, tmp_path / "model.safetensors")
    assert words in refusal(tmp_path / "model.safetensors", tiny)


def test_a_file_in_scaled_fp8_is_decoded_before_it_is_converted(original: Original) -> None:
    file, config = original("sd3")
    tensors = load_file(file)
    name = "joint_blocks.0.x_block.attn.qkv.weight"
    expected = (tensors[name] * 8).to(torch.float8_e4m3fn).float() / 8
    tensors[name] = (tensors[name] * 8).to(torch.float8_e4m3fn)
    tensors[name.replace(".weight", ".scale_weight")] = torch.tensor(1 / 8)
    save_file(tensors, file)
    assert "--dequantize" in refusal(file, config)
    component = open_pipeline(str(file), config=str(config), dequantize=True).components["transformer"]
    found = read_tensor(component.tensors["transformer_blocks.0.attn.to_k.weight"])
    assert torch.equal(found, expected.chunk(3)[1].to(torch.bfloat16))


def test_a_file_with_the_vae_alone_is_refused(original: Original) -> None:
    file, config = original("sd-vae")
    assert "only vae" in refusal(file, config)


def test_a_pickle_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.ckpt").write_bytes(b"\x80\x02")
    assert "pickled single files are not read" in refusal(tmp_path / "model.ckpt")


@pytest.mark.parametrize("content", [b"", b"no header at all", b"\xff" * 64])
def test_a_damaged_file_is_refused(content: bytes, tmp_path: Path, tiny: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    assert "not a sound safetensors file" in refusal(tmp_path / "model.safetensors", tiny)


def test_a_folder_takes_no_config(tiny: Path) -> None:
    assert "only a single file has a config" in refusal(tiny, tiny)


def test_the_file_cannot_lie_in_the_output_that_is_replaced(output: Path) -> None:
    file = next((output / "vae").glob("*.safetensors"))
    model = output / "transformer" / "mine.safetensors"
    model.write_bytes((Path(open_pipeline("builtin:tiny-flux").folder) / "transformer" / WEIGHTS).read_bytes())
    with pytest.raises(BitrouteError, match="lies in the output folder"):
        quantize("tiny-flux-fp8", str(model), output, config="builtin:tiny-flux", overwrite=True)
    assert file.exists()


def test_an_evaluation_asks_for_a_folder(tiny: Path, tmp_path: Path) -> None:
    words = ["--recipe", "tiny-flux-fp8", "--model", str(tiny / "transformer" / WEIGHTS)]
    done = CliRunner().invoke(main, [*words, "--config", "builtin:tiny-flux", "--eval", "--out", str(tmp_path / "out")])
    assert done.exit_code == 2
    assert "quantize convert FILE" in done.output


def test_of_a_config_on_the_hub_the_weights_that_the_file_holds_are_not_downloaded(
    hub: Hub, commit: str, tiny: Path, tmp_path: Path, write_recipe: Callable[[str], str]
) -> None:
    file = tmp_path / "mine.safetensors"
    file.write_bytes((tiny / "transformer" / WEIGHTS).read_bytes())
    planned = plan(write_recipe(TRANSFORMER), str(file), config="me/tiny-flux")
    assert planned.pipeline.is_outline
    assert planned.pipeline.hub
    assert f"transformer/{WEIGHTS}" not in planned.pipeline.hub.missing
    out = tmp_path / "out"
    from bitroute.convert.job import run

    run(fetch(planned), out)
    assert json.loads((out / "bitroute.json").read_text())["source"]["config"] == f"me/tiny-flux@{commit}"
    found = verify(out, load=False)
    assert found.compared
    assert found.problems == []
