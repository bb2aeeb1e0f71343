"""The lines that load a checkpoint: shown to its users, and run in a fresh process before they are published."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from bitroute.convert.checkpoint import Component
from bitroute.convert.plan import LOADING_BYTES
from bitroute.convert.record import Record
from bitroute.errors import Problem

IMPORT = "import bitroute  # registers its loader\n"
CODE = """\
import torch
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained({place}, dtype=torch.bfloat16)
"""
OF_A_COMPONENT = """\
import torch
from {library} import {class_name}

{name} = {class_name}.from_pretrained({place}, dtype=torch.bfloat16)
"""


@dataclass(frozen=True)
class Trial:
    """What running the lines has shown: `note` says why they were not run as they stand, or with what help."""

    ran: bool
    note: str = ""
    problem: Problem | None = None


def loading_code(
    place: str, needs_bitroute: bool, revision: str | None = None, bare: Component | None = None
) -> str:  # fmt: skip
    """place: a folder, or a repository on the Hub; revision: its branch, where it is not the default one.

    bare: the component that the checkpoint is, where it is no pipeline.
    """
    said = [place, *([revision] if revision else [])]
    words = [json.dumps(word, ensure_ascii=False) for word in said]  # a JSON string is a Python string too
    names = {"library": bare.library, "class_name": bare.class_name, "name": bare.name} if bare else {}
    lines = (OF_A_COMPONENT if bare else CODE).format(place=", revision=".join(words), **names)
    return (IMPORT if needs_bitroute else "") + lines


def needs_bitroute(record: Record) -> bool:
    return any(component.container == "bitroute" for component in record.components)


def try_loading(folder: Path, record: Record) -> Trial:
    """Runs the very lines of a card, with the folder in the repository's place, without network."""
    needed = int(1.2 * (record.size_bytes + sum(record.copied.values()))) + LOADING_BYTES
    available = psutil.virtual_memory().available
    if needed > available:
        return Trial(False, f"it needs {needed / 1e9:.1f} GB of memory, {available / 1e9:.1f} were free")
    lifted = any(c.container == "bitsandbytes" for c in record.components) and not torch.cuda.is_available()
    code = loading_code(str(folder.resolve()), needs_bitroute(record), bare=record.bare)
    done = subprocess.run(
        [sys.executable, "-P", "-c", (_lifting() if lifted else "") + code],
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
