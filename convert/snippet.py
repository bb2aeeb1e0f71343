"""The lines that load a checkpoint: shown to its users, and run in a fresh process before they are published."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from bitroute.convert.checkpoint import Component
from bitroute.convert.garbage import NEW_OBJECTS
from bitroute.convert.plan import LOADING_BYTES, ComponentPlan, Plan
from bitroute.convert.record import Record
from bitroute.convert.schema import Dequantize
from bitroute.errors import Problem

IMPORT = "import bitroute  # registers its loader\n"
SELDOM = f"import gc\ngc.set_threshold({NEW_OBJECTS})\n"  # before the lines that are tried: a matter of seconds only
CODE = """\
import torch
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained({place}, dtype=torch.{dtype})
"""
OF_A_COMPONENT = """\
import torch
from {library} import {class_name}

{name} = {class_name}.from_pretrained({place}, dtype=torch.{dtype})
"""


@dataclass(frozen=True)
class Trial:
    """What running the lines has shown: `note` says why they were not run as they stand, or with what help."""

    ran: bool
    note: str = ""
    problem: Problem | None = None


def loading_code(
    place: str, needs_bitroute: bool, revision: str | None = None, bare: Component | None = None, *,
    variant: str | None = None, dtype: str = "bfloat16",
) -> str:  # fmt: skip
    """place: a folder, or a repository on the Hub; revision: its branch, where it is not the default one.

    bare: the component that the checkpoint is, where it is no pipeline. variant: in the names of its weights.
    """
    said = {"revision": revision, "variant": variant}
    words = [quoted(place), *(f"{key}={quoted(word)}" for key, word in said.items() if word)]
    names = {"library": bare.library, "class_name": bare.class_name, "name": bare.name} if bare else {}
    lines = (OF_A_COMPONENT if bare else CODE).format(place=", ".join(words), dtype=dtype, **names)
    return (IMPORT if needs_bitroute else "") + lines


def quoted(word: str) -> str:
    return json.dumps(word, ensure_ascii=False)  # a JSON string is a Python string too


def recorded_code(record: Record, place: str, revision: str | None = None) -> str:
    """The lines for a finished checkpoint."""
    variant = next((recorded.component.variant for recorded in record.components), None)
    dtype = loading_dtype(record.dequantize, (recorded.container for recorded in record.components))
    return loading_code(place, needs_bitroute(record), revision, record.bare, variant=variant, dtype=dtype)


def code_by_file(plan: Plan, out: Path) -> dict[str, str]:
    """Weight file → the lines that load it alone, of a plan that puts each component in one."""
    dtype = loading_dtype(plan.pipeline.dequantize, (component.container.name for component in plan.components))
    return {
        str(out / planned.component.place / name): _code_of_a_file(planned, out, name, dtype)
        for planned in plan.components
        for name in planned.shard_names
    }


def _code_of_a_file(planned: ComponentPlan, out: Path, file: str, dtype: str) -> str:
    component = planned.component
    by_file = component.library == "diffusers" and _loads_files(component.class_name)
    path = quoted(str(out / component.place / file))
    words = [f"{path}, config={quoted(str(out))}" if by_file else quoted(str(out))]
    words += [] if component.bare else [f"subfolder={quoted(component.name)}"]
    words += [f"variant={quoted(planned.variant)}"] if planned.variant and not by_file else []
    load = f"{component.class_name}.{'from_single_file' if by_file else 'from_pretrained'}"
    imports = f"import torch\nfrom {component.library} import {component.class_name}"
    name = component.name if component.name.isidentifier() else "model"
    return f"{imports}\n\n{name} = {load}({', '.join(words)}, dtype=torch.{dtype})\n"


def _loads_files(class_name: str) -> bool:
    """Whether this class of diffusers has a `from_single_file` that knows it."""
    import diffusers
    from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES

    found = getattr(diffusers, class_name)
    return any(issubclass(found, getattr(diffusers, name)) for name in SINGLE_FILE_LOADABLE_CLASSES)


def loading_dtype(read_as: Dequantize, containers: Iterable[str]) -> str:
    """What the job made all floats, where it quantized nothing; else what layers compute in."""
    return read_as if isinstance(read_as, str) and {*containers} == {"plain"} else "bfloat16"


def needs_bitroute(record: Record) -> bool:
    return any(component.container == "bitroute" for component in record.components)


def try_loading(folder: Path, record: Record) -> Trial:
    """Runs the very lines of a card, with the folder in the repository's place, without network."""
    needed = int(1.2 * (record.size_bytes + sum(record.copied.values()))) + LOADING_BYTES
    available = psutil.virtual_memory().available
    if needed > available:
        return Trial(False, f"it needs {needed / 1e9:.1f} GB of memory, {available / 1e9:.1f} were free")
    lifted = any(c.container == "bitsandbytes" for c in record.components) and not torch.cuda.is_available()
    code = recorded_code(record, str(folder.resolve()))
    done = subprocess.run(
        [sys.executable, "-P", "-c", SELDOM + (_lifting() if lifted else "") + code],
        capture_output=True, text=True, errors="replace", check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    note = "there is no GPU here: the loader's check for one was lifted in that process" if lifted else ""
    return Trial(True, note, _problem(folder, done) if done.returncode else None)


def _lifting() -> str:
    loading = str(Path(__file__).with_name("loading.py"))
    return f"import runpy\nrunpy.run_path({loading!r})['lift_gpu_check']()\n"


def _problem(folder: Path, done: subprocess.CompletedProcess[str]) -> Problem:
    last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    mend = "`quantize verify` says which component it is"
    return Problem("the checkpoint does not load in a fresh process", str(folder), got=last[-400:], next_step=mend)
