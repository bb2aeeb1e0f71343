"""Loads components one after the other in a process of its own, as a user would, and tells what happened.

Run by path with a JSON list of requests on stdin; prints one JSON line for each. It must not import bitroute unless a
request says that the container needs it: that is what it proves.
"""

from __future__ import annotations

import atexit
import gc
import json
import sys
import warnings
from typing import Any


def main() -> None:
    gc.set_threshold(100_000)  # as bitroute.convert.garbage, which cannot be imported here
    atexit.register(gc.freeze)
    for request in json.load(sys.stdin):
        try:
            answer = _load(request)
        except Exception as error:  # whatever the libraries raise is the answer
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps({"bitroute_imported": "bitroute" in sys.modules, **answer}), flush=True)
        gc.collect()  # or a model in a cycle would stay beside the next one


def _load(request: dict[str, Any]) -> dict[str, Any]:
    warnings.simplefilter("ignore")
    if request["needs_bitroute"]:
        import bitroute  # noqa: F401  importing it is what registers the quantizer
    import diffusers
    import torch
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    if request["lift_gpu_check"]:
        lift_gpu_check()
    library = diffusers if request["library"] == "diffusers" else transformers
    model_class = getattr(library, request["class"])
    gc.freeze()  # what the libraries hold is never garbage
    variant = {"variant": request["variant"]} if request["variant"] else {}
    choices = {"dtype": torch.bfloat16, "output_loading_info": True, **variant}
    model, info = model_class.from_pretrained(request["folder"], **choices)
    answer: dict[str, Any] = {
        key: sorted(str(name) for name in info.get(key, ()))
        for key in ("missing_keys", "unexpected_keys", "mismatched_keys")
    }
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    answer["meta_tensors"] = sorted(name for name, tensor in tensors.items() if _is_meta(tensor))
    answer["forward"] = _forward(model, request["probe"]) if request["probe"] else None
    return answer


def _is_meta(tensor: Any) -> bool:
    """Of a tensor subclass its parts count: quanto's calls itself meta although they are loaded."""
    if hasattr(tensor, "__tensor_flatten__"):
        return any(_is_meta(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return bool(tensor.is_meta)


def _forward(model: Any, probe: dict[str, dict[str, Any]]) -> dict[str, Any]:
    import torch

    generator = torch.Generator().manual_seed(0)
    tensors = {name: _input(spec, generator) for name, spec in probe.items()}
    inputs = _nested({name: [tensor] if probe[name]["listed"] else tensor for name, tensor in tensors.items()})
    try:
        with torch.inference_mode():
            outputs = model.eval()(**inputs, return_dict=False)
    except Exception as error:  # a kernel that this device lacks; the caller knows whether that was to be expected
        return {"error": f"{type(error).__name__}: {error}"}
    parts = [part for output in outputs for part in (output if isinstance(output, list) else [output])]
    results = [part for part in parts if isinstance(part, torch.Tensor)]
    return {"finite": all(bool(result.isfinite().all()) for result in results), "outputs": len(results)}


def _nested(inputs: dict[str, Any]) -> dict[str, Any]:
    """What is called `a.b` becomes entry b of the dict a."""
    nested: dict[str, Any] = {}
    for name, value in inputs.items():
        outer, dot, inner = name.partition(".")
        place, key = (nested.setdefault(outer, {}), inner) if dot else (nested, outer)
        place[key] = value
    return nested


def _input(spec: dict[str, Any], generator: Any) -> Any:
    import torch

    if spec["value"] is not None:
        return spec["value"]
    shape, dtype = spec["shape"], torch.long if spec["dtype"] == "long" else torch.bfloat16
    if spec["fill"] == "random" and dtype == torch.long:
        return torch.randint(0, spec["below"], shape, generator=generator)
    if spec["fill"] == "random":
        return torch.randn(shape, generator=generator).to(dtype)
    return torch.full(shape, {"zeros": 0, "ones": 1}[spec["fill"]], dtype=dtype)


def lift_gpu_check() -> None:
    """bitsandbytes has CPU kernels, but the quantizers of both libraries refuse to load without a GPU."""
    from diffusers.quantizers.bitsandbytes import bnb_quantizer
    from transformers.quantizers import quantizer_bnb_4bit, quantizer_bnb_8bit

    for quantizer in (
        bnb_quantizer.BnB4BitDiffusersQuantizer, bnb_quantizer.BnB8BitDiffusersQuantizer,
        quantizer_bnb_4bit.Bnb4BitHfQuantizer, quantizer_bnb_8bit.Bnb8BitHfQuantizer,
    ):  # fmt: skip
        quantizer.validate_environment = lambda self, *args, **kwargs: None
        quantizer.update_device_map = lambda self, device_map: {"": "cpu"}


if __name__ == "__main__":
    main()
