"""A model that is one component, without a model_index.json: a ControlNet, a text encoder."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from diffusers import FluxControlNetModel, FluxControlNetPipeline
from families import make, read
from hub import Hub
from safetensors.torch import load_file

from bitroute import plan, quantize, verify
from bitroute.cli import main
from bitroute.convert.bare import bare_index, name_of
from bitroute.convert.files import write_json
from bitroute.convert.inspection import inspect
from bitroute.convert.job import run
from bitroute.convert.push import push
from bitroute.convert.record import read_record
from bitroute.convert.seal import SEAL, sealed
from bitroute.convert.selection import select
from bitroute.convert.upload import Target
from bitroute.errors import SourceError

SMALL = read("families_more_cases.yaml")["small"]
LIKE_TINY_FLUX = {
    "in_channels": 32, "num_layers": 1, "num_single_layers": 1, "num_attention_heads": 3, "attention_head_dim": 64,
    "joint_attention_dim": 128, "pooled_projection_dim": 64, "axes_dims_rope": [8, 28, 28], "patch_size": 1,
}  # fmt: skip
WEIGHTS = "diffusion_pytorch_model.safetensors"
LOAD = """
import json, sys, torch, diffusers, transformers
from safetensors import safe_open
for line in sys.argv[1:]:
    folder, library, name, needs_bitroute = json.loads(line)
    assert "bitroute" not in sys.modules
    if needs_bitroute:
        import bitroute
    model, info = getattr({"diffusers": diffusers, "transformers": transformers}[library], name).from_pretrained(
        folder, dtype=torch.bfloat16, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    assert not any(part.is_meta for part in model.parameters())
    print(name)
"""
KILLED = """
import os, signal, sys, time
from pathlib import Path
from bitroute import plan
from bitroute.convert.job import run
seen = []
def progress(done, what):
    seen.append(what)
    if len(seen) == 8:
        while not list(Path(sys.argv[2]).glob("*.safetensors")):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)
planned = plan("flux-controlnet-fp8", sys.argv[1], shard_bytes=100_000)
run(planned, Path(sys.argv[2]), progress=progress)
"""


def write(model: Any, folder: Path) -> Path:
    """Weights that are not zero anywhere, so that nothing is lost in an output of zeros."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def flux_controlnet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As repositories look: with a card, a licence, pictures."""
    folder = write(make("FluxControlNetModel", LIKE_TINY_FLUX), tmp_path_factory.mktemp("bare") / "Controlnet-Union")
    for name in ("README.md", "LICENSE.md", "canny.png", "diffusion_pytorch_model_promax.safetensors"):
        (folder / name).write_text("beside it")
    return folder


@pytest.fixture(scope="module")
def sdxl_controlnet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(make("ControlNetModel", SMALL["ControlNetModel"][0]), tmp_path_factory.mktemp("bare") / "canny")


@pytest.fixture(scope="module")
def text_encoder(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Path:
    folder = write(make("T5EncoderModel", SMALL["T5EncoderModel"][0]), tmp_path_factory.mktemp("bare") / "t5")
    for file in (tiny / "tokenizer_2").iterdir():
        shutil.copy(file, folder)
    return folder


def command(*words: str | Path) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


def recipe_for(folder: Path, **backends: str) -> Path:
    file = folder / "recipe.yaml"
    parts = "".join(f"  {name}: {{backend: {backend}}}\n" for name, backend in backends.items())
    file.write_text(f"components:\n{parts}")
    return file


def names(folder: Path) -> set[str]:
    return {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}


@pytest.fixture(scope="module")
def fp8(tmp_path_factory: pytest.TempPathFactory, flux_controlnet: Path) -> tuple[Path, Result]:
    """What the command makes of the ControlNet, and what it says."""
    out = tmp_path_factory.mktemp("made") / "out"
    return out, command("-r", "flux-controlnet-fp8", "-m", flux_controlnet, "-o", out)


@pytest.fixture(scope="module")
def int8(tmp_path_factory: pytest.TempPathFactory, sdxl_controlnet: Path) -> Path:
    out = tmp_path_factory.mktemp("made") / "out"
    return quantize("sdxl-controlnet-int8", str(sdxl_controlnet), out)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory, text_encoder: Path) -> Path:
    place = tmp_path_factory.mktemp("made")
    return quantize(str(recipe_for(place, text_encoder="int8")), str(text_encoder), place / "out")


@pytest.mark.parametrize(
    ("library", "class_name", "name"),
    [
        ("diffusers", "FluxControlNetModel", "controlnet"),
        ("diffusers", "QwenImageMultiControlNetModel", "controlnet"),
        ("diffusers", "UNet2DConditionModel", "unet"),
        ("diffusers", "UNetControlNetXSModel", "unet"),
        ("diffusers", "AutoencoderKLWan", "vae"),
        ("diffusers", "AsymmetricAutoencoderKL", "vae"),
        ("diffusers", "WanTransformer3DModel", "transformer"),
        ("diffusers", "T2IAdapter", "model"),
        ("transformers", "T5EncoderModel", "text_encoder"),
    ],
)
def test_a_component_is_called_what_pipelines_call_it(library: str, class_name: str, name: str) -> None:
    assert name_of(library, class_name) == name


@pytest.mark.parametrize("config", [{}, {"_class_name": 3}, {"architectures": []}, {"architectures": "T5"}])
def test_a_config_without_a_class_is_no_model(config: dict[str, Any]) -> None:
    assert bare_index(config) is None


def test_a_controlnet_becomes_a_folder_of_its_own_that_verifies(
    fp8: tuple[Path, Result], flux_controlnet: Path
) -> None:
    out, said = fp8
    assert said.exit_code == 0, said.output
    assert "loaded without bitroute; forward ok" in said.output
    assert f'controlnet = FluxControlNetModel.from_pretrained("{out}", dtype=torch.bfloat16)' in said.output
    assert names(out) == {"config.json", WEIGHTS, "LICENSE.md", "bitroute.json"}
    assert json.loads((out / "config.json").read_text())["quantization_config"]["quant_method"] == "torchao"
    assert (out / WEIGHTS).stat().st_size < 0.6 * (flux_controlnet / WEIGHTS).stat().st_size
    found = verify(out, load=False)
    assert found.problems == [] and found.compared and found.layers


def test_the_convolutions_that_feed_the_unet_stay(int8: Path) -> None:
    entries = read_record(int8).components[0].entries
    convolutions = {e.layer: e.quantized for e in entries if len(e.weight.shape) == 4 or "resnets.0.conv" in e.layer}
    assert convolutions["down_blocks.0.resnets.0.conv1"]
    assert not any(quantized for name, quantized in convolutions.items() if name.startswith(("controlnet", "conv_in")))
    assert verify(int8, load=False).problems == []


def test_a_text_encoder_takes_its_tokenizer_along(encoder: Path) -> None:
    assert names(encoder) >= {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert "model_index.json" not in names(encoder)
    assert verify(encoder, load=False).problems == []


def test_the_results_load_in_a_fresh_process(fp8: tuple[Path, Result], int8: Path, encoder: Path) -> None:
    requests = [
        [str(fp8[0]), "diffusers", "FluxControlNetModel", False],
        [str(encoder), "transformers", "T5EncoderModel", False],
        [str(int8), "diffusers", "ControlNetModel", True],
    ]
    words = [sys.executable, "-P", "-c", LOAD, *map(json.dumps, requests)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == [name for _, _, name, _ in requests]


def test_it_answers_as_the_original_does(fp8: tuple[Path, Result], flux_controlnet: Path) -> None:
    inputs = {
        "hidden_states": torch.randn(1, 16, 32), "controlnet_cond": torch.randn(1, 16, 32),
        "encoder_hidden_states": torch.randn(1, 8, 128), "pooled_projections": torch.randn(1, 64),
        "timestep": torch.ones(1), "img_ids": torch.zeros(16, 3), "txt_ids": torch.zeros(8, 3),
    }  # fmt: skip
    inputs = {name: value.bfloat16() for name, value in inputs.items()}
    answers = []
    for folder in (flux_controlnet, fp8[0]):
        model = FluxControlNetModel.from_pretrained(folder, dtype=torch.bfloat16)
        with torch.inference_mode():
            answers.append(model(**inputs).controlnet_block_samples[0].float())
    error = (answers[0] - answers[1]).norm() / answers[0].norm()
    assert 0 < error < 0.05


def test_a_recipe_that_calls_it_otherwise_is_told_its_name(flux_controlnet: Path) -> None:
    said = command("-r", "flux-nf4", "-m", flux_controlnet, "--dry-run")
    assert said.exit_code == 2
    assert "the model is one component without a pipeline, and it is not called 'transformer'" in said.stderr
    assert "expected: controlnet, a FluxControlNetModel" in said.stderr


def test_its_profile_is_shown_without_its_name(flux_controlnet: Path) -> None:
    said = command("profile", flux_controlnet)
    assert said.exit_code == 0, said.output
    assert "class: FluxControlNetModel" in said.output


def test_inspect_says_its_name(flux_controlnet: Path, fp8: tuple[Path, Result], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((flux_controlnet / "config.json").read_bytes())
    shutil.copy(flux_controlnet / WEIGHTS, tmp_path)
    assert inspect(tmp_path)["components"].keys() == {"controlnet"}
    found = inspect(fp8[0])
    assert found["components"]["controlnet"]["quant_method"] == "torchao"
    assert found["made_by"]["recipe"]["name"] == "flux-controlnet-fp8.yaml"


def test_what_takes_a_whole_pipeline_is_refused_with_a_reason(
    flux_controlnet: Path, fp8: tuple[Path, Result], tmp_path: Path
) -> None:
    recipe = recipe_for(tmp_path, controlnet="int8")
    recipe.write_text(recipe.read_text() + "eval: {prompts: general-16}\n")
    for words in (
        ["-r", recipe, "-m", flux_controlnet, "-o", tmp_path / "out", "--eval"],
        ["eval", flux_controlnet, fp8[0], "-o", tmp_path / "report"],
    ):
        said = command(*words)
        assert said.exit_code == 2, said.output
        assert "only a whole pipeline draws pictures to compare" in said.stderr
        assert "in the place of controlnet/" in said.stderr
    said = command("recommend", flux_controlnet, "--vram", "16")
    assert said.exit_code == 2
    assert "one component does not say what the whole pipeline needs" in said.stderr
    assert names(tmp_path) == {"recipe.yaml"}


def test_a_folder_with_a_config_and_no_weights_is_refused(flux_controlnet: Path, tmp_path: Path) -> None:
    shutil.copy(flux_controlnet / "config.json", tmp_path)
    said = command("-r", "flux-controlnet-fp8", "-m", tmp_path, "--dry-run")
    assert said.exit_code == 2
    assert "component 'controlnet' has no weights" in said.stderr


def test_a_killed_job_leaves_nothing_to_load_and_is_resumed(flux_controlnet: Path, tmp_path: Path) -> None:
    out, whole = tmp_path / "out", tmp_path / "whole"
    words = [sys.executable, "-P", "-c", KILLED, str(flux_controlnet), str(out)]
    assert subprocess.run(words, capture_output=True, check=False).returncode == -signal.SIGKILL
    left = names(out)
    assert "bitroute.json.part" in left and "config.json" not in left
    assert any(name.endswith(".safetensors") for name in left)
    planned = plan("flux-controlnet-fp8", str(flux_controlnet), shard_bytes=100_000)
    run(planned, out, resume=True)
    run(planned, whole)
    assert names(out) == names(whole) >= {f"{WEIGHTS}.index.json"}
    assert all((out / name).read_bytes() == (whole / name).read_bytes() for name in names(out))


def test_a_finished_output_is_replaced_only_where_it_is_asked(flux_controlnet: Path, tmp_path: Path) -> None:
    words = ["-r", "flux-controlnet-fp8", "-m", flux_controlnet, "-o", tmp_path / "out", "--no-verify"]
    assert command(*words).exit_code == 0
    assert "an earlier output of bitroute" in command(*words).stderr
    assert command(*words, "--overwrite").exit_code == 0
    assert "is finished: there is nothing to convert" in command(*words, "--resume").stderr


def test_a_quantized_one_is_decoded_by_its_record(
    fp8: tuple[Path, Result], flux_controlnet: Path, tmp_path: Path
) -> None:
    said = command("dequantize", fp8[0], "-o", tmp_path / "out", "--no-verify")
    assert said.exit_code == 0, said.output
    original, decoded = load_file(flux_controlnet / WEIGHTS), load_file(tmp_path / "out" / WEIGHTS)
    assert original.keys() == decoded.keys()
    name = "transformer_blocks.0.attn.to_q.weight"
    error = (original[name].float() - decoded[name].float()).norm() / original[name].float().norm()
    assert 0 < error < 0.04
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_a_record_whose_class_is_code_is_refused(fp8: tuple[Path, Result], tmp_path: Path) -> None:
    out = Path(shutil.copytree(fp8[0], tmp_path / "out"))
    content = json.loads((out / "bitroute.json").read_text())
    content["plan"]["components"]["controlnet"]["class"] = "X\nimport os"
    content.pop(SEAL)
    write_json(out / "bitroute.json", sealed(content))
    with pytest.raises(SourceError, match="not the record that a job writes"):
        read_record(out)


def test_a_variant_on_the_hub_is_found_beside_the_config() -> None:
    files = ["config.json", "README.md", "canny.png", WEIGHTS, "diffusion_pytorch_model.fp16.safetensors", "a/b.bin"]
    index = bare_index({"_class_name": "ControlNetModel"})
    assert index
    assert select(files, index, None, "me/it") == {"config.json": "config.json", WEIGHTS: WEIGHTS}
    assert select(files, index, "fp16", "me/it")[WEIGHTS] == "diffusion_pytorch_model.fp16.safetensors"


def test_one_on_the_hub_is_planned_downloaded_quantized_and_published(
    hub: Hub, flux_controlnet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.tokens = {"hf_me": "me"}
    monkeypatch.setenv("HF_TOKEN", "hf_me")
    hub.add("you/controlnet", flux_controlnet)
    planned = command("-r", "flux-controlnet-fp8", "-m", "you/controlnet", "--dry-run")
    assert planned.exit_code == 0, planned.output
    out = quantize("flux-controlnet-fp8", "you/controlnet", tmp_path / "out")
    assert {"canny.png", "diffusion_pytorch_model_promax.safetensors"}.isdisjoint(hub.files_sent)
    push(out, Target("me/controlnet-fp8"), verification=verify(out, load=False))
    repository = hub.repositories["me/controlnet-fp8"]
    files = {name: blob.file for name, blob in repository.commits[repository.refs["main"]].items()}
    assert files.keys() == {"config.json", WEIGHTS, "LICENSE.md", "bitroute.json", "README.md"}
    card = files["README.md"].read_text()
    assert "from diffusers import FluxControlNetModel" in card
    assert 'controlnet = FluxControlNetModel.from_pretrained("me/controlnet-fp8", dtype=torch.bfloat16)' in card
    assert "take it as `controlnet=controlnet`" in card
    assert "DiffusionPipeline" not in card and "enable_model_cpu_offload" not in card
    assert FluxControlNetModel.from_pretrained("me/controlnet-fp8", dtype=torch.bfloat16).config.num_layers == 1


def test_a_pipeline_with_a_controlnet_draws_with_it_quantized(
    source: Path, flux_controlnet: Path, tmp_path: Path
) -> None:
    shutil.copytree(flux_controlnet, source / "controlnet", ignore=shutil.ignore_patterns("*promax*", "*.png"))
    index = json.loads((source / "model_index.json").read_text())
    index |= {"_class_name": "FluxControlNetPipeline", "controlnet": ["diffusers", "FluxControlNetModel"]}
    (source / "model_index.json").write_text(json.dumps(index))
    recipe = recipe_for(tmp_path, transformer="float8", controlnet="float8")
    out = quantize(str(recipe), str(source), tmp_path / "out")
    assert verify(out, load=False).problems == []
    pictures = []
    for folder in (source, out):
        pipe = FluxControlNetPipeline.from_pretrained(folder, dtype=torch.bfloat16)
        pipe.set_progress_bar_config(disable=True)
        made = pipe(
            "red apple", control_image=torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)), height=64,
            width=64, num_inference_steps=1, max_sequence_length=16, guidance_scale=0.0, output_type="np",
            generator=torch.Generator().manual_seed(0),
        )  # fmt: skip
        pictures.append(made.images)
    assert 0 < abs(pictures[0] - pictures[1]).mean() < 0.05
