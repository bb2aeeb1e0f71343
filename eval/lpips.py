"""LPIPS v0.1 with AlexNet features (Zhang et al. 2018): a perceptual distance, 0 for identical pictures.

The weights are those of the lpips package and of torchvision, stored as fp16; the arithmetic is fp32 on the CPU,
and its digits repeat for the same number of torch threads (another number moves them by some 1e-9).
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

from bitroute.eval.metrics import check_pair

WEIGHTS = Path(str(files("bitroute.eval"))) / "lpips_alexnet.safetensors"
SMALLEST_SIDE = 64  # pixels; AlexNet's last features of smaller pictures are a few cells
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # the published input layer, RGB
STRIDES, PADDINGS = (4, 1, 1, 1, 1), (2, 2, 1, 1, 1)
POOLED = (1, 2)  # the convolutions that a 3x3 maximum of stride 2 precedes


def upsampled(height: int, width: int) -> bool:
    """Whether pictures of this size are enlarged before they are compared."""
    return min(height, width) < SMALLEST_SIDE


class Lpips:
    """weights: conv{0..4}.weight [out, in, k, k] and .bias [out], lin{0..4}.weight [1, out, 1, 1]; float."""

    def __init__(self, weights: Path = WEIGHTS) -> None:
        self._weights = {name: tensor.float() for name, tensor in load_file(weights).items()}

    @torch.inference_mode()
    def distance(self, first: Tensor, second: Tensor) -> float:
        """Of two uint8 RGB pictures [3, H, W].

        Raises:
            JobError: the two are not pictures of one size.
        """
        check_pair(first, second)
        features = zip(self._features(first), self._features(second), strict=True)
        taps = [
            functional.conv2d((one - other).square(), self._weights[f"lin{index}.weight"]).double().mean()
            for index, (one, other) in enumerate(features)
        ]
        return float(torch.stack(taps).sum())

    def _features(self, picture: Tensor) -> list[Tensor]:
        """Five maps [1, C, h, w] whose channel vectors have length 1."""
        x = _prepared(picture)
        maps = []
        for index, (stride, padding) in enumerate(zip(STRIDES, PADDINGS, strict=True)):
            if index in POOLED:
                x = functional.max_pool2d(x, 3, stride=2)
            weight, bias = self._weights[f"conv{index}.weight"], self._weights[f"conv{index}.bias"]
            x = functional.relu(functional.conv2d(x, weight, bias, stride=stride, padding=padding))
            maps.append(x / (x.square().sum(dim=1, keepdim=True).sqrt() + 1e-10))
        return maps


def _prepared(picture: Tensor) -> Tensor:
    """fp32 [1, 3, H, W], from [-1, 1] by the published shift and scale; at least 64 px a side."""
    x = picture.float().unsqueeze(0) / 127.5 - 1
    height, width = picture.shape[1:]
    if upsampled(height, width):
        factor = SMALLEST_SIDE / min(height, width)
        size = (round(height * factor), round(width * factor))
        x = functional.interpolate(x, size, mode="bilinear", align_corners=False)
    shift, scale = (torch.tensor(values).reshape(1, 3, 1, 1) for values in (SHIFT, SCALE))
    return (x - shift) / scale
