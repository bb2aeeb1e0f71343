"""Trains the small U-Net of the tests from nothing: a few minutes on one CPU core; the same script, the same bytes.

    python tests/data/unet/train.py

It draws 16 × 16 pictures of a coloured shape somewhere on black, and the U-Net learns to take noise out of them
(DDPM, the noise is predicted), told what to draw by the trained T5 encoder of the bundled pipeline. It writes
config.json and diffusion_pytorch_model.safetensors (bfloat16) beside itself. Pictures and weights: Apache-2.0.
"""

from __future__ import annotations

from itertools import product
from pathlib import Path

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch import Tensor
from torch.nn import functional
from transformers import AutoTokenizer, T5EncoderModel

HERE = Path(__file__).parent
TINY_FLUX = HERE.parents[2] / "recipes" / "tiny-flux"
COLOURS = {"red": (1, -1, -1), "green": (-1, 1, -1), "blue": (-1, -1, 1), "yellow": (1, 1, -1)}
SHAPES = ("circle", "square", "cross")
SIZE, BATCH, STEPS, RATE = 16, 32, 1500, 2e-3
CONFIG = {  # widths of 64 where there are linear layers: bitsandbytes' blocks
    "sample_size": SIZE, "in_channels": 3, "out_channels": 3, "block_out_channels": [16, 64], "layers_per_block": 1,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"], "up_block_types": ["UpBlock2D", "UpBlock2D"],
    "mid_block_type": None, "cross_attention_dim": 128, "attention_head_dim": 2, "time_embedding_dim": 64,
    "norm_num_groups": 8,
}  # fmt: skip


def encode(captions: list[str]) -> Tensor:
    """[captions, tokens, 128]."""
    tokenizer = AutoTokenizer.from_pretrained(TINY_FLUX / "tokenizer_2")
    encoder = T5EncoderModel.from_pretrained(TINY_FLUX / "text_encoder_2", dtype=torch.float32)
    tokens = tokenizer(captions, padding="max_length", max_length=16, truncation=True, return_tensors="pt")
    with torch.inference_mode():
        encoded: Tensor = encoder(tokens.input_ids).last_hidden_state
    return encoded.clone()


def shapes() -> Tensor:
    """[shapes, size, size], 1 inside a shape of radius 4 around the middle."""
    line = torch.arange(SIZE) - SIZE // 2
    y, x = line[:, None].float(), line[None, :].float()
    inside = torch.maximum(x.abs(), y.abs()) <= 4
    return torch.stack([x.hypot(y) <= 4, inside, inside & (torch.minimum(x.abs(), y.abs()) <= 1)]).float()


def pictures(kinds: Tensor, colours: Tensor) -> Tensor:
    """[batch, 3, size, size] in [-1, 1]; each shape is moved by up to three pixels."""
    masks = shapes()[kinds]
    moves = torch.randint(-3, 4, (len(kinds), 2)).tolist()
    moved = torch.stack([mask.roll(move, (0, 1)) for mask, move in zip(masks, moves, strict=True)])
    return moved[:, None] * (colours[:, :, None, None] + 1) - 1


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    names = list(product(COLOURS, SHAPES))
    texts = encode([" ".join(name) for name in names])
    colours = torch.tensor([COLOURS[colour] for colour, _ in names]).float()
    model, scheduler = UNet2DConditionModel(**CONFIG), DDPMScheduler()
    optimizer = torch.optim.AdamW(model.parameters(), RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, STEPS)
    for step in range(STEPS):
        chosen = torch.randint(0, len(names), (BATCH,))
        clean = pictures(chosen % len(SHAPES), colours[chosen])
        noise, times = torch.randn_like(clean), torch.randint(0, 1000, (BATCH,))
        noisy = scheduler.add_noise(clean, noise, times)
        loss = functional.mse_loss(model(noisy, times, texts[chosen]).sample, noise)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 99:
            print(f"step {step + 1}: loss {loss.item():.4f}", flush=True)
    model.to(torch.bfloat16).save_pretrained(HERE)


if __name__ == "__main__":
    main()
