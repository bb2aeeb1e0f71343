"""A model that is one file in its authors' own names, read as the components of a diffusers pipeline.

The names come from diffusers' own conversion functions (loaders/single_file_model.py), run on stand-ins: only headers
are read, and every converted tensor says where its bytes are. What the file does not hold (configs, tokenizers, other
components) comes from a pipeline of the same family, `config`.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bitroute.convert.architecture import build_model
from bitroute.convert.checkpoint import PICKLES, Access, Component, Pipeline
from bitroute.convert.configs import open_config
from bitroute.convert.document import printable
from bitroute.convert.foreign import read_file
from bitroute.convert.gguf import read_gguf
from bitroute.convert.layout import DerivedTensor, Header, StoredTensor, read_header
from bitroute.convert.schema import Dequantize
from bitroute.convert.text_encoder import convert_text_encoder
from bitroute.convert.tracing import LooksAtValues, trace
from bitroute.errors import Problem, SourceError

Convert = Callable[..., Mapping[str, object]]
LORA_WORDS = (".lora_A.", ".lora_B.", ".lora_up.", ".lora_down.", "lora_unet_", "lora_te", ".lora.", ".hada_w1_a")
SCALE_WORDS = ("scaled_fp8", ".scale_weight", ".weight_scale", ".comfy_quant", ".quant_state.", ".weight.absmax")
TEXT_WORDS = ("text_model.encoder.", "encoder.block.0.layer.0.", "model.embed_tokens.", "text_projection")
UNKNOWN_FAMILY = "v1"  # what diffusers calls whatever it does not know, and Stable Diffusion 1
DENOISER = "model.diffusion_model."  # before its names in a file that holds more
SD_UNET = f"{DENOISER}input_blocks.0.0.weight"
NAMED = 5  # tensors that a note lists
MAX_TENSORS = 10_000  # the largest files have half of them; the functions' time grows with their square


@dataclass(frozen=True)
class SingleFileComponent(Component):
    """Its config is in the folder, its weights are in a file that may hold others too."""

    file: Path = Path()
    dequantize: Dequantize = False

    @cached_property
    def headers(self) -> dict[Path, Header]:
        return {self.file: Header(_read(self.file, self.dequantize), {})}


def open_single_file(
    model: str, file: Path, config: str | None, access: Access, dequantize: Dequantize = False
) -> Pipeline:
    """The pipeline `config` with those components whose weights the file holds read from there.

    config: the folder or the Hub id of a pipeline of that family; of two components of one class, the folder of the
    one that is meant inside it (`DIR/transformer_2`). access, dequantize: as `open_pipeline` has them.

    Raises:
        SourceError: what the file holds is none of that pipeline's denoisers, or cannot be read as one; no `config`.
    """
    if file.suffix in PICKLES:
        mend = "a pickle can run code: save it as safetensors first, in a process that you trust it with"
        raise SourceError(Problem("pickled single files are not read", model, got=file.suffix, next_step=mend))
    stored = _read(file, dequantize)
    if len(stored) > MAX_TENSORS:
        raise SourceError(
            Problem("a file of so many tensors is no model", model, f"{len(stored)}", f"at most {MAX_TENSORS}")
        )
    _refuse_lora(model, stored)
    if config is None:
        raise SourceError(_no_config(model, stored))

    def hold(base: Pipeline, only: str | None) -> dict[str, Component]:
        return _held(base, file, stored, dequantize, only)

    return replace(open_config(config, access, hold), name=model, dequantize=dequantize)


def _held(
    base: Pipeline, file: Path, stored: dict[str, StoredTensor], dequantize: Dequantize, only: str | None
) -> dict[str, Component]:
    """The components of the pipeline that the file holds."""
    found: dict[str, Component] = {}
    problems: list[Problem] = []
    for name, part in base.components.items():
        if only not in (None, name) and _is_denoiser(part):
            continue
        component = SingleFileComponent(
            name, part.library, part.class_name, part.folder, file=file, dequantize=dequantize
        )
        try:
            found |= {name: read} if (read := _read_as(component)) else {}
        except SourceError as error:
            problems += error.problems
    denoisers = [name for name in found if _is_denoiser(found[name])]
    if not denoisers:
        raise SourceError([_no_denoiser(base, file, stored, list(found)), *problems])
    if len(denoisers) > 1:
        raise SourceError(_ambiguous(base, file, denoisers))
    found[denoisers[0]] = replace(found[denoisers[0]], notes=_notes(file, stored, found))
    return found


def _notes(file: Path, stored: Mapping[str, StoredTensor], held: Mapping[str, Component]) -> tuple[str, ...]:
    """What the file holds and nothing is made of."""
    parts = [part for component in held.values() for tensor in component.tensors.values() for part in _parts(tensor)]
    starts, left = sorted(part.offset for part in parts), []
    for tensor in stored.values():
        place = bisect_left(starts, tensor.offset)
        if place == len(starts) or starts[place] >= tensor.offset + max(tensor.spec.size_bytes, 1):
            left.append(tensor.name)
    more = f" and {len(left) - NAMED} more" if len(left) > NAMED else ""
    listed = (f"tensors of {file.name} that are not read: {', '.join(left[:NAMED])}{more}",) if left else ()
    return (f"{', '.join(held)} read from {file.name}", *listed)


def _read_as(component: SingleFileComponent) -> Component | None:
    """The component read from the file; None where the file does not hold it.

    A file with at least half of the tensors of the class holds it: what is missing is then named by `build`.
    """
    model = build_model(component)
    expected = frozenset(model.state_dict())
    read = _with_names(component, model, expected)
    if read is None:
        return None
    try:
        names = read.tensors.keys()
    except SourceError:
        if _is_denoiser(component):
            raise
        return None  # most files hold none, and their conversion then ends anyhow
    return read if 2 * len(expected & names) >= len(expected) else None


def _with_names(component: SingleFileComponent, model: nn.Module, expected: frozenset[str]) -> Component | None:
    """With diffusers' conversion as a view, unless the file has the names of the class already."""
    if expected <= component.tensors.keys():
        return component
    convert = _conversion(component, type(model))
    if convert is None:
        return None
    config = dict(component.config)
    return replace(component, views=(*component.views, partial(_convert, convert, config, component)))


def _conversion(component: Component, model_class: type) -> Convert | None:
    import diffusers
    from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES

    if component.library == "transformers":
        return partial(convert_text_encoder, component, model_class)
    for name, functions in SINGLE_FILE_LOADABLE_CLASSES.items():
        if issubclass(model_class, getattr(diffusers, name)):
            found: Convert = functions["checkpoint_mapping_fn"]
            return found
    return None


def _convert(
    convert: Convert, config: dict[str, Any], component: SingleFileComponent, stored: dict[str, StoredTensor]
) -> dict[str, StoredTensor]:
    if _is_denoiser(component) and any(name.startswith(DENOISER) for name in stored):  # the others would come along
        stored = {name: tensor for name, tensor in stored.items() if name.startswith(DENOISER)}
    try:
        return trace(lambda checkpoint: convert(checkpoint=checkpoint, config=config), stored)
    except Exception as error:  # the functions raise whatever they like on tensors of another model
        got = str(error) if isinstance(error, LooksAtValues) else f"{type(error).__name__}: {error}"
        what = f"diffusers' conversion to {component.class_name} does not take this file"
        mend = "check that --config is a pipeline of the same family, and that the file is complete"
        raise SourceError(Problem(what, str(component.file), got=printable(got[:300]), next_step=mend)) from error


def _parts(tensor: StoredTensor) -> Iterator[StoredTensor]:
    if isinstance(tensor, DerivedTensor):
        for part in tensor.parts:
            yield from _parts(part)
    else:
        yield tensor


def _is_denoiser(component: Component) -> bool:
    return component.library == "diffusers" and not component.class_name.startswith("Autoencoder")


def _refuse_lora(model: str, stored: Mapping[str, StoredTensor]) -> None:
    if any(word in name for name in stored for word in LORA_WORDS):
        mend = "give the model itself, and the LoRA in the recipe: `fuse_loras: [{path: FILE}]`"
        raise SourceError(Problem("this is a LoRA, no model", model, got=next(iter(stored)), next_step=mend))


def _read(file: Path, dequantize: Dequantize) -> dict[str, StoredTensor]:
    """Raises SourceError where the weights are quantized and nobody asked for them as floats."""
    if dequantize:
        return read_file(file, dequantize)
    if file.suffix == ".gguf":
        stored = read_gguf(file)
        kinds = "GGUF blocks" if any(isinstance(tensor, DerivedTensor) for tensor in stored.values()) else ""
    else:
        stored = read_header(file).tensors
        kinds = ", ".join(sorted({str(t.spec.dtype).removeprefix("torch.") for t in _codes(stored)}))
    if kinds or any(word in name for name in stored for word in SCALE_WORDS):
        got, expected = kinds or "scales of quantized weights", "bf16, fp16 or fp32 weights"
        mend = "start from the original; or `quantize dequantize` it, or give a job --dequantize: both errors add up"
        raise SourceError(Problem("the file is already quantized", str(file), got, expected, mend))
    return stored


def _codes(stored: Mapping[str, StoredTensor]) -> list[StoredTensor]:
    return [t for t in stored.values() if t.spec.dtype.itemsize == 1 and t.spec.dtype != torch.bool]


def family(stored: Mapping[str, StoredTensor]) -> tuple[str, str] | None:
    """What diffusers takes the file for, and the Hub id of the pipeline whose configs it would use."""
    from diffusers.loaders.single_file_utils import fetch_diffusers_config, infer_diffusers_model_type

    found = []

    def ask(checkpoint: dict[str, Tensor]) -> dict[str, object]:
        found.append((infer_diffusers_model_type(checkpoint), fetch_diffusers_config(checkpoint)))
        return {}

    try:
        trace(ask, stored)
    except Exception:  # on tensors of no model that it knows
        return None
    name, config = found[0]
    if name == UNKNOWN_FAMILY and SD_UNET not in stored:
        return None
    return str(name), str(config["pretrained_model_name_or_path"])


def _no_config(model: str, stored: Mapping[str, StoredTensor]) -> Problem:
    known = family(stored)
    got = f"{known[0]} in diffusers' words, whose pipeline is {known[1]}" if known else "a family that it does not know"
    return Problem(
        "a single file has weights alone: its configs, tokenizers and other components are missing", model, got,
        "a pipeline of that family beside it, as a folder or a Hub id",
        f"give --config {known[1] if known else 'DIR'}; a command without --config takes a folder, which "
        "`quantize convert FILE --config DIR --out FOLDER` writes",
    )  # fmt: skip


def _no_denoiser(base: Pipeline, file: Path, stored: Mapping[str, StoredTensor], others: list[str]) -> Problem:
    known = family(stored)
    wanted = [f"{part.name} ({part.class_name})" for part in base.components.values() if part.library == "diffusers"]
    if others:
        got, mend = f"only {', '.join(others)}", "give the file of the transformer or the unet"
    elif not known and any(word in name for name in stored for word in TEXT_WORDS):
        got, mend = "a text encoder, as it seems", "give the file of the transformer or the unet"
    else:
        got = f"{known[0]} in diffusers' words" if known else f"tensors such as {next(iter(stored), 'none')!r}"
        mend = f"give a pipeline of that family: --config {known[1] if known else 'DIR'}"
    what = f"the file does not hold the denoiser of {base.name}"
    return Problem(what, str(file), got, f"one of {', '.join(wanted)}", mend)


def _ambiguous(base: Pipeline, file: Path, names: list[str]) -> Problem:
    return Problem(
        f"the file fits {' and '.join(names)} alike", str(file), got=f"{base.name} has components of one class",
        next_step=f"say which one it is: --config {base.name}/{names[-1]}",
    )  # fmt: skip
