"""One measurement in a fresh process, printed as JSON: what it took to convert with one library, or to load.

python benchmarks/measured.py convert FORMAT CANDIDATE SOURCE OUT [--no-fsync]
python benchmarks/measured.py load CANDIDATE FOLDER
Clocks run in the process and leave the imports out. Linux only.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from formats import BITROUTE, BITSANDBYTES, COPYING, FORMATS, SDNQ, UNCOMPILED, lift_gpu_check
from memory import Watcher, memory

CHUNK_BYTES = 2**20
Work = Callable[[], Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    convert, load = commands.add_parser("convert"), commands.add_parser("load")
    convert.add_argument("format", choices=list(FORMATS))
    convert.add_argument("candidate")
    convert.add_argument("source", type=Path)
    convert.add_argument("out", type=Path)
    convert.add_argument("--no-fsync", action="store_true")
    load.add_argument("candidate")
    load.add_argument("folder", type=Path)
    said = parser.parse_args()
    found = timed(lambda: loading(said.candidate, said.folder)) if said.command == "load" else converted(said)
    print(json.dumps(found))


def converted(said: argparse.Namespace) -> dict[str, Any]:
    if said.no_fsync:
        os.fsync = os.fdatasync = os.posix_fadvise = lambda *said: None
    if said.candidate == UNCOMPILED:
        os.environ["BITROUTE_COMPILE"] = "0"
    found = timed(lambda: conversion(said.candidate, said.format, said.source, said.out))
    written = sum(file.stat().st_size for file in said.out.rglob("*.safetensors"))
    return {**found, "written": written}


def timed(prepare: Callable[[], Work]) -> dict[str, Any]:
    """seconds, cpu: of the work alone. anon: peak of anonymous memory, over that after `import torch`. All in bytes."""
    watcher, pid = Watcher(os.getpid()), os.getpid()
    import_module("torch")
    base = memory(pid, "RssAnon")
    work = prepare()
    gc.collect()
    gc.freeze()  # or what the imports left is collected in the midst of somebody's work
    watcher.start()
    start, cpu = time.perf_counter(), time.process_time()
    work()
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    return {"seconds": seconds, "cpu": cpu, "anon": watcher.stop() - base, "rss": memory(pid, "VmHWM")}


def conversion(candidate: str, format_name: str, source: Path, out: Path) -> Work:
    """What is to be timed; everything that it needs is imported on return."""
    if candidate == COPYING:
        return lambda: _copy(FORMATS[format_name].written, source, out)
    if candidate in (BITROUTE, UNCOMPILED):
        return _bitroute(format_name, source, out)
    return _peer(candidate, FORMATS[format_name].peers[candidate](), source, out)


def _copy(written: float, source: Path, out: Path) -> None:
    """Reads all and writes that part of it."""
    out.mkdir()
    buffer = memoryview(bytearray(CHUNK_BYTES))
    for file in sorted(source.glob("*.safetensors")):
        with open(file, "rb", buffering=0) as reader, open(out / file.name, "xb", buffering=0) as writer:
            while count := reader.readinto(buffer):
                writer.write(buffer[: int(count * written)])
            os.fsync(writer.fileno())


def _bitroute(format_name: str, source: Path, out: Path) -> Work:
    """The command's own plan and job; `keep: none`, as the peers quantize every linear layer."""
    from bitroute.backends import create
    from bitroute.convert.job import run
    from bitroute.convert.plan import plan

    create(format_name)
    _model_class()
    transformer = {"backend": format_name, "keep": "none"}
    recipe = out.with_suffix(".yaml")
    recipe.write_text(json.dumps({"model": str(source), "components": {"transformer": transformer}}), "utf-8")
    return lambda: run(plan(str(recipe)), out)


def _peer(candidate: str, config: Any, source: Path, out: Path) -> Work:
    options = {"quantization_config": config, **_options(candidate)}
    model_class = _model_class()
    return lambda: model_class.from_pretrained(source, **options).save_pretrained(out)


def loading(candidate: str, folder: Path) -> Work:
    """From_pretrained, then every byte read; everything that it needs is imported on return."""
    if candidate in (BITROUTE, SDNQ):
        import_module(candidate)  # teaches diffusers their formats
    if candidate != SDNQ:
        lift_gpu_check()  # bitroute's NF4 is bitsandbytes' own
    config = json.loads((folder / "config.json").read_text("utf-8")).get("quantization_config", {})
    options, model_class = _options(config.get("quant_method", "")), _model_class()
    return lambda: read_all(model_class.from_pretrained(folder, **options))


def _model_class() -> Any:
    return import_module("diffusers").FluxTransformer2DModel


def _options(quantizer: str) -> dict[str, Any]:
    """bitsandbytes: loads onto a GPU unless it is told otherwise."""
    place = {"device_map": {"": "cpu"}} if quantizer == BITSANDBYTES else {}
    return {"torch_dtype": import_module("torch").bfloat16, **place}


def read_all(model: Any) -> int:
    """Reads every byte of all tensors, by one thread as torch's own wait for each other, and counts them."""
    import torch

    torch.set_num_threads(1)
    count = 0
    for tensor in (*model.parameters(), *model.buffers()):
        for storage in _storages(tensor):
            torch.empty(0, dtype=torch.uint8).set_(storage).max()
            count += storage.nbytes()
    return count


def _storages(tensor: Any) -> list[Any]:
    from torch.utils._python_dispatch import is_traceable_wrapper_subclass

    if is_traceable_wrapper_subclass(tensor):
        names, _ = tensor.__tensor_flatten__()
        return [storage for name in names for storage in _storages(getattr(tensor, name))]
    return [tensor.untyped_storage()] if tensor.numel() else []


if __name__ == "__main__":
    main()
