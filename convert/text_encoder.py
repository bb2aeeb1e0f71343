"""The text encoders in a single file of a whole pipeline, by diffusers' own functions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from bitroute.convert.checkpoint import Component


def convert_text_encoder(
    component: Component, model_class: type, *, checkpoint: dict[str, Tensor], config: Mapping[str, Any]
) -> dict[str, Tensor]:
    """The tensors that diffusers would load into the text encoder; none where the file holds no such one."""
    from diffusers.loaders import single_file_utils as diffusers_functions

    place = {"config": str(component.folder.parent), "subfolder": component.name, "local_files_only": True}
    with _instead_of_loading(diffusers_functions) as taken:
        if diffusers_functions.is_clip_model_in_single_file(model_class, checkpoint):
            diffusers_functions.create_diffusers_clip_model_from_ldm(model_class, checkpoint, **place)
        elif model_class.__name__ == "T5EncoderModel" and diffusers_functions.is_t5_in_single_file(checkpoint):
            diffusers_functions.create_diffusers_t5_model_from_checkpoint(model_class, checkpoint, **place)
    return taken


@contextmanager
def _instead_of_loading(functions: Any) -> Iterator[dict[str, Tensor]]:
    """These functions return a loaded model: what they are about to load is taken instead."""
    taken: dict[str, Tensor] = {}
    load = functions.load_model_dict_into_meta
    functions.load_model_dict_into_meta = lambda model, tensors, **options: taken.update(tensors)
    try:
        yield taken
    finally:
        functions.load_model_dict_into_meta = load
