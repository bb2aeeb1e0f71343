"""What users do with a model that they loaded, as docs/loading.yaml lists it: each function does one of those things.

Each returns what the model then computes; it must be what it computed before, to the last bit, unless the function
compares by itself. There is no accelerator where the tests run: offloading goes from the CPU to the CPU.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from accelerate import cpu_offload, cpu_offload_with_hook
from diffusers import FluxPipeline
from diffusers.hooks import apply_group_offloading
from peft import LoraConfig, get_peft_model_state_dict
from torch import Tensor
from torch.nn import functional

TINY_FLUX = Path(str(files("bitroute.recipes"))) / "tiny-flux"
CPU = torch.device("cpu")
CLASSES = {"transformer": "FluxTransformer2DModel", "text_encoder_2": "T5EncoderModel"}
TARGETS = {"transformer": ["to_q", "to_k", "to_v", "proj_mlp", "ff.net.0.proj"], "text_encoder_2": ["q", "v", "wo"]}
SIMILAR = 0.8  # of what a LoRA changes in a model of 4 to 8 bits and in the original: tens of its roundings add up


@dataclass(frozen=True)
class Stored:
    """A component of a pipeline, in one of the containers."""

    pipeline: Path
    component: str

    def load(self, **options: Any) -> Any:
        name = CLASSES[self.component]
        library = transformers if self.component == "text_encoder_2" else diffusers
        return getattr(library, name).from_pretrained(self.folder, **{"dtype": torch.bfloat16, **options}).eval()

    @property
    def folder(self) -> Path:
        return self.pipeline / self.component

    @cached_property
    def output(self) -> Tensor:
        return run(self.load())

    def lora(self, model: Any) -> None:
        """An adapter with the same random numbers wherever it is added."""
        torch.manual_seed(0)
        config = LoraConfig(r=4, target_modules=TARGETS[self.component], init_lora_weights=False)
        model.add_adapter(config, adapter_name="noise")


def run(model: Any) -> Tensor:
    """One forward pass of a Flux transformer or a text encoder."""
    with torch.no_grad():
        if model.__class__.__name__.endswith("EncoderModel"):
            found: Tensor = model(torch.arange(2, 16).reshape(1, 14)).last_hidden_state
            return found
        generator, config = torch.Generator().manual_seed(0), model.config

        def noise(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).bfloat16()

        found = model(
            hidden_states=noise(1, 16, config.in_channels),
            encoder_hidden_states=noise(1, 8, config.joint_attention_dim),
            pooled_projections=noise(1, config.pooled_projection_dim),
            timestep=torch.tensor([0.5], dtype=torch.bfloat16),
            img_ids=torch.zeros(16, 3), txt_ids=torch.zeros(8, 3), return_dict=False,
        )[0]  # fmt: skip
        return found


def compile_it(stored: Stored, work: Path) -> Tensor:
    """Of a transformer one block of each kind, as diffusers recommends; no code is generated: that takes long."""
    model = stored.load()
    compiled = getattr(model, "compile_repeated_blocks", model.compile)
    compiled(backend="eager", fullgraph=True)
    return run(model)


def offload_model(stored: Stored, work: Path) -> Tensor:
    model, hook = cpu_offload_with_hook(stored.load(), CPU)
    found = run(model)
    hook.offload()
    return found


def offload_each_layer(stored: Stored, work: Path) -> Tensor:
    model = stored.load()
    cpu_offload(model, CPU, offload_buffers=len(model._parameters) > 0)  # as enable_sequential_cpu_offload does
    assert all(tensor.is_meta for tensor in parts(model)), "some tensors stay on the accelerator"
    return run(model)


def parts(model: Any) -> list[Tensor]:
    """The tensors of a model; those of a subclass are taken apart."""
    found = []
    for tensor in model.parameters():
        names = tensor.__tensor_flatten__()[0] if hasattr(tensor, "__tensor_flatten__") else []
        found += [getattr(tensor, name) for name in names] or [tensor]
    return found


def offload_groups(stored: Stored, **options: Any) -> Tensor:
    model = stored.load()
    apply_group_offloading(model, onload_device=CPU, offload_device=CPU, **options)
    run(model)  # the second pass meets what the first has put away
    return run(model)


def offload_blocks(stored: Stored, work: Path) -> Tensor:
    return offload_groups(stored, offload_type="block_level", num_blocks_per_group=1)


def offload_leaves(stored: Stored, work: Path) -> Tensor:
    return offload_groups(stored, offload_type="leaf_level")


def offload_to_disk(stored: Stored, work: Path) -> Tensor:
    return offload_groups(stored, offload_type="leaf_level", offload_to_disk_path=str(work / "offloaded"))


def map_by_hand(stored: Stored, work: Path) -> Tensor:
    return run(stored.load(device_map={"": "cpu"}))


def map_auto(stored: Stored, work: Path) -> Tensor:
    return run(stored.load(device_map="auto"))


def map_to_disk(stored: Stored, work: Path) -> Tensor:
    return run(stored.load(device_map={"": "disk"}, offload_folder=str(work / "disk")))


def move(stored: Stored, work: Path) -> Tensor:
    return run(stored.load().to("cpu").to(device="cpu"))


def cast(stored: Stored, work: Path) -> Tensor:
    return run(stored.load().to(torch.float32).to(torch.bfloat16))


def halve(stored: Stored, work: Path) -> Tensor:
    return run(stored.load().half().to(torch.bfloat16))


def save(stored: Stored, work: Path, **options: Any) -> Tensor:
    saved = Stored(work / "saved", stored.component)
    stored.load().save_pretrained(saved.folder, **options)
    return run(saved.load(**options))


def save_variant(stored: Stored, work: Path) -> Tensor:
    return save(stored, work, variant="small")


def read_whole(stored: Stored, work: Path) -> Tensor:
    return run(stored.load(disable_mmap=True))


def high_memory(stored: Stored, work: Path) -> Tensor:
    return run(stored.load(low_cpu_mem_usage=False))


def deepcopy(stored: Stored, work: Path) -> Tensor:
    return run(copy.deepcopy(stored.load()))


def pickle_it(stored: Stored, work: Path) -> Tensor:
    return run(pickle.loads(pickle.dumps(stored.load())))


def save_by_torch(stored: Stored, work: Path) -> Tensor:
    return run(through_torch(stored.load(), weights_only=False))


def exchange_states(stored: Stored, work: Path) -> Tensor:
    model = stored.load()
    model.load_state_dict(through_torch(stored.load().state_dict(), weights_only=True))
    return run(model)


def through_torch(content: Any, weights_only: bool) -> Any:
    file = io.BytesIO()
    torch.save(content, file)
    file.seek(0)
    return torch.load(file, weights_only=weights_only)


def dequantize(stored: Stored, work: Path) -> Tensor:
    """The plain model, saved and loaded."""
    model = stored.load()
    model.dequantize()
    plain = Stored(work / "plain", stored.component)
    model.save_pretrained(plain.folder)
    assert "quantization_config" not in (plain.folder / "config.json").read_text()
    return about(plain.output, stored.output)


def load_lora(stored: Stored, work: Path) -> Tensor:
    """Twice with halved weights, then without."""
    pipe = with_lora(stored, work)
    pipe.load_lora_weights(work / "lora", adapter_name="again")
    pipe.set_adapters(["noise", "again"], [0.5, 0.5])
    compare_effects(stored, run(pipe.transformer))
    pipe.unload_lora_weights()
    return run(pipe.transformer)


def with_lora(stored: Stored, work: Path) -> Any:
    adapted = Stored(TINY_FLUX, stored.component).load()
    stored.lora(adapted)
    weights = get_peft_model_state_dict(adapted, adapter_name="noise")
    FluxPipeline.save_lora_weights(work / "lora", transformer_lora_layers=weights)
    pipe = FluxPipeline.from_pretrained(
        stored.pipeline, transformer=stored.load(), text_encoder=None, text_encoder_2=None,
        tokenizer=None, tokenizer_2=None, vae=None,
    )  # fmt: skip
    pipe.load_lora_weights(work / "lora", adapter_name="noise")
    return pipe


def add_adapter(stored: Stored, work: Path) -> Tensor:
    model = stored.load()
    stored.lora(model)
    compare_effects(stored, run(model))
    model.disable_adapters()
    return run(model)


def fuse_lora(stored: Stored, work: Path) -> Tensor:
    pipe = with_lora(stored, work)
    pipe.fuse_lora()
    compare_effects(stored, run(pipe.transformer))
    pipe.unfuse_lora()
    pipe.unload_lora_weights()
    return about(run(pipe.transformer), stored.output)


def fuse_projections(stored: Stored, work: Path) -> Tensor:
    model = stored.load()
    model.fuse_qkv_projections()
    return about(run(model), stored.output)


def cast_layers(stored: Stored, work: Path) -> Tensor:
    model = stored.load()
    model.enable_layerwise_casting(storage_dtype=torch.float16, compute_dtype=torch.bfloat16)
    return run(model)


def compare_effects(stored: Stored, found: Tensor) -> None:
    """What a LoRA changes is what it changes in the original, up to what rounding made of the weights."""
    assert similarity(found - stored.output, effect(stored.component)) > SIMILAR


@cache
def effect(component: str) -> Tensor:
    plain = Stored(TINY_FLUX, component)
    model = plain.load()
    plain.lora(model)
    return run(model) - plain.output


def about(found: Tensor, expected: Tensor) -> Tensor:
    """The expected output, which differs from what was found by a rounding of bf16 or two in the sums."""
    assert similarity(found, expected) > 0.999
    return expected


def similarity(a: Tensor, b: Tensor) -> float:
    return functional.cosine_similarity(a.float().flatten(), b.float().flatten(), dim=0).item()


USES: dict[str, Callable[[Stored, Path], Tensor]] = {
    use.__name__: use
    for use in (
        compile_it, offload_model, offload_each_layer, offload_blocks, offload_leaves, offload_to_disk, map_by_hand,
        map_auto, map_to_disk, move, cast, halve, save, save_variant, read_whole, high_memory, deepcopy, pickle_it,
        save_by_torch, exchange_states, dequantize, load_lora, add_adapter, fuse_lora, fuse_projections, cast_layers,
    )
}  # fmt: skip
