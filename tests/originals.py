"""Small models in their authors' names: state dicts that diffusers' conversion functions take."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

Tensors = dict[str, Tensor]
SD_UNET: dict[str, Any] = {
    "block_out_channels": [64, 128], "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"], "cross_attention_dim": 64, "layers_per_block": 1,
    "attention_head_dim": 2, "sample_size": 16, "norm_num_groups": 32,
}  # fmt: skip
SD_VAE: dict[str, Any] = {
    "block_out_channels": [32, 32], "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2, "latent_channels": 4, "sample_size": 16,
}  # fmt: skip
CLIP: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 64,
}  # fmt: skip
WAN: dict[str, Any] = {
    "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 32, "text_dim": 32, "freq_dim": 32,
    "ffn_dim": 128, "in_channels": 16, "out_channels": 16,
}  # fmt: skip
SD3: dict[str, Any] = {
    "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 32, "joint_attention_dim": 64,
    "caption_projection_dim": 64, "pooled_projection_dim": 64, "pos_embed_max_size": 8, "sample_size": 8,
    "dual_attention_layers": [0], "qk_norm": "rms_norm",
}  # fmt: skip


def renamed(tensors: Tensors, words: Mapping[str, str], prefix: str = "") -> Tensors:
    """Every name with its words replaced in order."""
    found = {}
    for name, tensor in tensors.items():
        for old, new in words.items():
            name = name.replace(old, new)
        found[f"{prefix}{name}"] = tensor
    return found


def wan(tensors: Tensors) -> Tensors:
    words = {
        "condition_embedder.time_embedder.linear_1": "time_embedding.0",
        "condition_embedder.time_embedder.linear_2": "time_embedding.2",
        "condition_embedder.text_embedder.linear_1": "text_embedding.0",
        "condition_embedder.text_embedder.linear_2": "text_embedding.2",
        "condition_embedder.time_proj": "time_projection.1", "attn2": "cross_attn", "attn1": "self_attn",
        ".to_out.0.": ".o.", ".to_q.": ".q.", ".to_k.": ".k.", ".to_v.": ".v.", "proj_out": "head.head",
        "ffn.net.0.proj": "ffn.0", "ffn.net.2": "ffn.2", "norm2": "norm__", "norm3": "norm2", "norm__": "norm3",
        "scale_shift_table": "modulation",
    }  # fmt: skip
    found = renamed(tensors, words)
    found["head.modulation"] = found.pop("modulation")
    return found


def sd3(tensors: Tensors) -> Tensors:
    """Fused q, k, v; the last block and the output have shift and scale in the other order."""
    words = {
        "pos_embed.pos_embed": "pos_embed", "pos_embed.proj": "x_embedder.proj",
        "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0", "norm_out.linear": SWAPPED,
        "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2", "proj_out": "final_layer.linear",
        "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0", "transformer_blocks.": "joint_blocks.",
        "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
        "norm1_context.linear": "context_block.adaLN_modulation.1", "norm1.linear": "x_block.adaLN_modulation.1",
        "ff_context.net.0.proj": "context_block.mlp.fc1", "ff_context.net.2": "context_block.mlp.fc2",
        "ff.net.0.proj": "x_block.mlp.fc1", "ff.net.2": "x_block.mlp.fc2", "attn2.to_out.0": "x_block.attn2.proj",
        "attn.to_out.0": "x_block.attn.proj", "attn.to_add_out": "context_block.attn.proj",
        "attn.norm_added_q": "context_block.attn.ln_q", "attn.norm_added_k": "context_block.attn.ln_k",
        "attn2.norm_q": "x_block.attn2.ln_q", "attn2.norm_k": "x_block.attn2.ln_k",
        "attn.norm_q": "x_block.attn.ln_q", "attn.norm_k": "x_block.attn.ln_k",
        "attn.add_q_proj": "context_block.attn.to_q", "attn.add_k_proj": "context_block.attn.to_k",
        "attn.add_v_proj": "context_block.attn.to_v", "1.attn.to_": "1.x_block.attn.to_",
        "0.attn.to_": "0.x_block.attn.to_", "0.attn2.to_": "0.x_block.attn2.to_",
    }  # fmt: skip
    found = renamed(tensors, words)
    for name in [name for name in found if ".to_q." in name]:
        parts = [found.pop(name.replace(".to_q.", f".to_{part}.")) for part in "qkv"]
        found[name.replace(".to_q.", ".qkv.")] = torch.cat(parts)
    for name in [n for n in found if n.startswith((SWAPPED, "joint_blocks.1.context_block.adaLN"))]:
        found[name] = torch.cat(list(reversed(found[name].chunk(2))))
    return found


SWAPPED = "final_layer.adaLN_modulation.1"


def sd_unet(tensors: Tensors) -> Tensors:
    """The names of latent-diffusion for SD_UNET: its blocks are numbered through."""
    words = {
        "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
        "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2", "norm1.": "in_layers.0.",
        "down_blocks.0.resnets.0": "input_blocks.1.0", "down_blocks.0.attentions.0": "input_blocks.1.1",
        "down_blocks.0.downsamplers.0.conv": "input_blocks.2.0.op", "down_blocks.1.resnets.0": "input_blocks.3.0",
        "mid_block.resnets.0": "middle_block.0", "mid_block.attentions.0": "middle_block.1",
        "mid_block.resnets.1": "middle_block.2", "up_blocks.0.resnets.0": "output_blocks.0.0",
        "up_blocks.0.resnets.1": "output_blocks.1.0", "up_blocks.0.upsamplers.0.conv": "output_blocks.1.1.conv",
        "up_blocks.1.resnets.0": "output_blocks.2.0", "up_blocks.1.attentions.0": "output_blocks.2.1",
        "up_blocks.1.resnets.1": "output_blocks.3.0", "up_blocks.1.attentions.1": "output_blocks.3.1",
    }  # fmt: skip
    resnet = {"norm1.": "in_layers.0.", "conv1.": "in_layers.2.", "norm2.": "out_layers.0.", "conv2.": "out_layers.3."}
    resnet |= {"time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection"}
    blocks = {name: tensor for name, tensor in tensors.items() if "resnets" in name}
    others = {name: tensor for name, tensor in tensors.items() if name not in blocks}
    del words["norm1."]
    return renamed(blocks, {**words, **resnet}, UNET) | renamed(others, words, UNET)


def sd_vae(tensors: Tensors) -> Tensors:
    """The names of latent-diffusion for SD_VAE; attention is made of 1x1 convolutions."""
    words = {
        "down_blocks.": "down.", "up_blocks.0": "up.1", "up_blocks.1": "up.0#", "up.0#": "up.0",
        "mid_block.resnets.0": "mid.block_1", "mid_block.resnets.1": "mid.block_2", ".resnets.": ".block.",
        "mid_block.attentions.0": "mid.attn_1", "downsamplers.0.conv": "downsample.conv", "to_out.0": "proj_out",
        "upsamplers.0.conv": "upsample.conv", "conv_shortcut": "nin_shortcut", "conv_norm_out": "norm_out",
        "group_norm": "norm", ".to_": ".",
    }  # fmt: skip
    found = renamed(tensors, words, "first_stage_model.")
    return {n: t[:, :, None, None] if "attn_1" in n and t.ndim == 2 else t for n, t in found.items()}


def clip(tensors: Tensors) -> Tensors:
    prefix = "cond_stage_model.transformer.text_model."
    return {f"{prefix}{name.removeprefix('text_model.')}": tensor for name, tensor in tensors.items()}


UNET = "model.diffusion_model."
ORIGINALS: dict[str, tuple[str, dict[str, Any], Callable[[Tensors], Tensors]]] = {
    "wan": ("WanTransformer3DModel", WAN, wan),
    "sd3": ("SD3Transformer2DModel", SD3, sd3),
    "sd": ("UNet2DConditionModel", SD_UNET, sd_unet),
    "sd-vae": ("AutoencoderKL", SD_VAE, sd_vae),
}
