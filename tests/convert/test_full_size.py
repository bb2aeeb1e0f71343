"""FLUX.1-dev at its full size: the plan from sparse files, and the memory of a job on layers of real widths."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from bitroute.convert.recipe import builtin_recipes, family_of
from bitroute.convert.recommend import Advice, advice_text, recommend

Write = Callable[..., None]
FLUX = {
    "guidance_embeds": True,
    "num_layers": 19,
    "num_single_layers": 38,
    "num_attention_heads": 24,
    "in_channels": 64,
}
T5 = {
    "vocab_size": 32128, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64,
    "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False,
}  # fmt: skip
CLIP = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
}
VAE = {
    "block_out_channels": (128, 256, 512, 512), "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4, "latent_channels": 16, "layers_per_block": 2,
    "use_quant_conv": False, "use_post_quant_conv": False,
}  # fmt: skip
FLUX_PARAMETERS = 11_901_408_320
T5_PARAMETERS = 4_762_310_656
GIB = 2**30
DRIVER = """
import json, sys, threading, time
import torch, diffusers, transformers, torchao.quantization
from diffusers import FluxTransformer2DModel

def resident():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))

peak, running = 0, True
def watch():
    global peak
    while running:
        peak = max(peak, resident())
        time.sleep(0.01)

idle = resident()
thread = threading.Thread(target=watch)
thread.start()
from bitroute.cli import main
main(["--recipe", "flux-fp8", "--model", sys.argv[1], "--out", sys.argv[2], "--no-verify"], standalone_mode=False)
running = False
thread.join()
from bitroute import plan
print(json.dumps({"idle": idle, "peak": peak, "planned": plan("flux-fp8", sys.argv[1]).job_peak_bytes}))
"""


def index(**components: tuple[str, str]) -> dict[str, Any]:
    return {"_class_name": "FluxPipeline", **{name: list(entry) for name, entry in components.items()}}


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory, write_hollow: Write) -> Path:
    """The folder structure of FLUX.1-dev as on the Hub, 33.7 GB of which almost nothing is on the disk."""
    folder = tmp_path_factory.mktemp("flux") / "FLUX.1-dev"
    with torch.device("meta"):
        models = {
            "transformer": FluxTransformer2DModel(**FLUX),
            "text_encoder_2": T5EncoderModel(T5Config(**T5)),
            "text_encoder": CLIPTextModel(CLIPTextConfig(**CLIP)),
            "vae": AutoencoderKL(**VAE),
        }
    for name, model in models.items():
        (folder / name).mkdir(parents=True)
        write_hollow(model, folder / name, 5 * 10**9 if name == "text_encoder_2" else 10**10)
    named = {name: (type(model).__module__.partition(".")[0], type(model).__name__) for name, model in models.items()}
    (folder / "model_index.json").write_text(json.dumps(index(**named)))
    return folder


def dry_run(recipe: str, model: Path) -> tuple[dict[str, Any], float]:
    words = [
        sys.executable,
        "-m",
        "bitroute",
        "--recipe",
        recipe,
        "--model",
        str(model),
        "--dry-run",
        "--json",
    ]
    before = _child_seconds()
    done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=model.parent)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), _child_seconds() - before


def _child_seconds() -> float:
    """Of the processor, imports included: a busy machine changes nothing."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_the_hollow_folder_has_the_shards_of_the_hub_and_takes_no_disk(flux: Path) -> None:
    assert len(list((flux / "transformer").glob("*.safetensors"))) == 3
    assert len(list((flux / "text_encoder_2").glob("*.safetensors"))) == 2
    files = [file.stat() for file in flux.rglob("*") if file.is_file()]
    assert sum(file.st_size for file in files) > 33 * 10**9
    assert sum(512 * file.st_blocks for file in files) < 10**7


def test_the_plan_of_flux_dev_has_its_exact_sizes_in_seconds(flux: Path) -> None:
    planned, seconds = dry_run("flux-fp8.yaml", flux)
    transformer, t5 = planned["components"]["transformer"], planned["components"]["text_encoder_2"]
    assert transformer["parameters"] == FLUX_PARAMETERS
    assert transformer["source_bytes"] == 2 * FLUX_PARAMETERS
    assert t5["parameters"] == T5_PARAMETERS
    assert transformer["container"] == t5["container"] == "torchao"
    for component in (transformer, t5):
        quantized = [entry for entry in component["entries"] if entry["backend"] == "float8"]
        saved = sum(entry["shape"][0] * entry["shape"][1] - 4 * entry["shape"][0] for entry in quantized)
        assert component["size_bytes"] == component["source_bytes"] - saved
    assert 0.50 < transformer["size_bytes"] / transformer["source_bytes"] < 0.51
    assert len({entry["file"] for entry in transformer["entries"]}) == 3
    assert planned["job_peak_bytes"] < GIB
    assert seconds < 10


@pytest.mark.parametrize("recipe", [name for name in builtin_recipes() if family_of(name) == "flux"])
def test_every_recipe_for_flux_fits_it(recipe: str, flux: Path) -> None:
    from bitroute import plan
    from bitroute.convert.describe import describe

    planned = plan(recipe, str(flux))
    sizes = {component.name: component.size_bytes / component.source_bytes for component in planned.components}
    assert set(sizes) == {"transformer", "text_encoder_2"}
    assert 0.26 < sizes["transformer"] < 0.51
    native = {component.name: component.container.name for component in planned.components}
    assert native["text_encoder_2"] == "torchao"
    assert native["transformer"] == {"flux-nf4": "bitsandbytes", "flux-mixed": "bitroute"}.get(recipe, "torchao")
    shards = [sum(entry.size_bytes for entry in shard) for c in planned.components for shard in c.shards]
    assert 4.6e9 < max(shards) <= 5e9
    json.dumps(describe(planned), allow_nan=False)


@pytest.fixture(scope="module")
def peaks(tmp_path_factory: pytest.TempPathFactory, write_hollow: Write, tiny: Path) -> dict[int, dict[str, int]]:
    """Depth → bytes of anonymous memory: idle with the libraries, at the peak of a job, and as its plan foretold.

    Depth 2 is two double and four single blocks of FLUX.1-dev: 1.31 billion parameters.
    """
    return {depth: _peak(depth, tmp_path_factory.mktemp("wide"), write_hollow, tiny) for depth in (1, 2)}


def _peak(depth: int, place: Path, write_hollow: Write, tiny: Path) -> dict[str, int]:
    with torch.device("meta"):
        model = FluxTransformer2DModel(**{**FLUX, "num_layers": depth, "num_single_layers": 2 * depth})
    (place / "source" / "transformer").mkdir(parents=True)
    write_hollow(model, place / "source" / "transformer")
    shutil.copytree(tiny / "text_encoder_2", place / "source" / "text_encoder_2")
    content = index(
        transformer=("diffusers", "FluxTransformer2DModel"), text_encoder_2=("transformers", "T5EncoderModel")
    )
    (place / "source" / "model_index.json").write_text(json.dumps(content))
    words = [sys.executable, "-c", DRIVER, str(place / "source"), str(place / "out")]
    done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=place, env={**os.environ})
    shutil.rmtree(place)
    assert done.returncode == 0, done.stderr
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_a_job_holds_a_layer_in_memory_and_never_the_model(peaks: dict[int, dict[str, int]]) -> None:
    for found in peaks.values():
        assert found["peak"] - found["idle"] < GIB
        assert found["peak"] - found["idle"] < found["planned"]


def test_twice_the_depth_needs_the_same_memory(peaks: dict[int, dict[str, int]]) -> None:
    assert abs(peaks[1]["peak"] - peaks[2]["peak"]) < 100 * 10**6


@pytest.fixture(scope="module")
def advice(flux: Path) -> Advice:
    return recommend(str(flux), vram_gib=24)


@pytest.mark.parametrize(
    ("vram_gib", "recipe", "offload"),
    [(80, "(as it is)", "none"), (24, "flux-int8", "none"), (16, "flux-int8", "model"), (12, "flux-mixed", "model"),
     (8, "flux-nf4", "model"), (6, "flux-nf4", "blocks")],
)  # fmt: skip
def test_every_card_gets_the_recipe_that_loses_least_of_those_that_fit(
    vram_gib: float, recipe: str, offload: str, advice: Advice
) -> None:
    asked = replace(advice, vram_gib=vram_gib)
    assert (asked.best.name, asked.best.offload(asked.room_bytes)) == (recipe, offload)


def test_the_advice_states_the_bytes_of_each_component_and_ranks_by_the_error_of_the_formats(advice: Advice) -> None:
    choices = {choice.name: choice for choice in advice.choices}
    assert set(choices) == {"(as it is)", *(name for name in builtin_recipes() if family_of(name) == "flux")}
    assert choices["(as it is)"].size_bytes["transformer"] == 2 * FLUX_PARAMETERS
    planned, _ = dry_run("flux-nf4", Path(advice.model))
    assert choices["flux-nf4"].size_bytes["transformer"] == planned["components"]["transformer"]["size_bytes"]
    errors = [choices[name].error for name in ("flux-int8", "flux-fp8", "flux-mixed", "flux-nf4")]
    assert errors == sorted(errors) and 0.005 < errors[0] < 0.012 and 0.08 < errors[-1] < 0.1
    assert "quantize --recipe flux-int8" in advice_text(advice)
