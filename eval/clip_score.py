"""The CLIP score: does a picture show what its prompt says? A plug-in of standalone.py.

100 · max(cos(I, T), 0) of CLIP's embeddings of picture and prompt, for each picture by itself (Hessel et al. 2021,
https://arxiv.org/abs/2104.08718). The factor is torchmetrics', where the paper has 2.5, and as there the prompt is
not put behind "A photo depicts". Prompts are cut at the length that the model knows: 77 tokens, the ends included.
"""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPModel


class ClipScore:
    """argument: a CLIP model's folder, or its name on the Hub, as `CLIPModel.from_pretrained` takes it."""

    higher_is_better = True

    def __init__(self, argument: str | None) -> None:
        if argument is None:
            raise ValueError("which CLIP model? Give its folder or its name on the Hub: clip=./clip-vit-base-patch16")
        model, info = CLIPModel.from_pretrained(argument, dtype=torch.float32, output_loading_info=True)
        if missing := sorted(info["missing_keys"]):  # transformers gives them random values and only warns
            raise ValueError(f"{len(missing)} tensors of a CLIP model are not in {argument}, such as {missing[0]}")
        self.title = f"CLIP score ({Path(argument).name})"
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = model.eval().to(self.device)
        self.words = AutoTokenizer.from_pretrained(argument)
        self.pixels = CLIPImageProcessorPil.from_pretrained(argument)  # the same with and without torchvision

    @torch.inference_mode()
    def score(self, picture: Image.Image, prompt: str) -> float:
        limit = self.model.config.text_config.max_position_embeddings
        text = self.words(prompt, truncation=True, max_length=limit, return_tensors="pt").to(self.device)
        image = self.pixels(picture, return_tensors="pt").to(self.device)
        found = self.model(
            input_ids=text["input_ids"], attention_mask=text["attention_mask"], pixel_values=image["pixel_values"]
        )
        cosine = float((found.image_embeds * found.text_embeds).sum())  # both have length 1
        return 100 * max(cosine, 0.0)
