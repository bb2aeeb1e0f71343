"""One component loaded in a fresh process, as its user would, and one forward pass."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from bitroute.convert.plan import LOADING_BYTES
from bitroute.convert.profile import find_profile
from bitroute.convert.record import RecordedComponent
from bitroute.errors import Problem


@dataclass(frozen=True)
class Reload:
    words: str  # "loaded without bitroute; forward ok" and its other outcomes
    problems: tuple[Problem, ...] = ()
    notes: tuple[str, ...] = ()


def reload(recorded: RecordedComponent) -> Reload:
    """Loads in another process; a component larger than the free memory is not loaded."""
    needed = int(1.2 * recorded.size_bytes) + LOADING_BYTES
    available = psutil.virtual_memory().available
    if needed > available:
        words = f"needs {needed / 1e9:.1f} GB of memory, {available / 1e9:.1f} are free"
        return Reload(f"not loaded ({words})")
    no_gpu = recorded.container == "bitsandbytes" and not torch.cuda.is_available()
    lifted = f"{recorded.name}: the loader's GPU check was lifted, in verify's own process only"
    answer = _run_loading(recorded, no_gpu)
    words, failed = _outcome(recorded, answer)
    problems = [*_loading_problems(recorded, answer), *failed]
    return Reload(words, tuple(problems), (lifted,) if no_gpu else ())


def _run_loading(recorded: RecordedComponent, lift_gpu_check: bool) -> dict[str, Any]:
    component = recorded.component
    profile = find_profile(component.class_name)
    probe = profile.probe(component.config) if profile else {}
    request = {
        "folder": str(component.folder), "library": component.library, "class": component.class_name,
        "variant": component.variant,
        "needs_bitroute": recorded.container == "bitroute", "lift_gpu_check": lift_gpu_check,
        "probe": {name: asdict(given) for name, given in probe.items()},
    }  # fmt: skip
    # -P: the script's own folder must not shadow the standard library
    command = [sys.executable, "-P", str(Path(__file__).with_name("loading.py"))]
    done = subprocess.run(command, input=json.dumps(request), capture_output=True, text=True, check=False)
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        return {"error": f"the loading process ended with {done.returncode}: {done.stderr.strip()[-400:]}"}
    answer: dict[str, Any] = json.loads(lines[-1])
    return answer


def _loading_problems(recorded: RecordedComponent, answer: Mapping[str, Any]) -> Iterator[Problem]:
    where = str(recorded.component.folder)
    if "error" in answer:
        yield Problem(f"{recorded.component.class_name} does not load", where, got=answer["error"])
        return
    if answer["bitroute_imported"] and recorded.container != "bitroute":
        yield Problem("loading imported bitroute, which the plan said it would not need", where)
    for key, words in (
        ("missing_keys", "newly initialized"), ("unexpected_keys", "unknown to the model"),
        ("mismatched_keys", "of another shape"), ("meta_tensors", "left on the meta device"),
    ):  # fmt: skip
        if answer[key]:
            yield Problem(f"{len(answer[key])} tensors are {words} after loading", where, got=str(answer[key][:3]))


def _outcome(recorded: RecordedComponent, answer: Mapping[str, Any]) -> tuple[str, list[Problem]]:
    """Words for the user; a forward that should have run and did not is a problem."""
    component = recorded.component
    how = "with bitroute" if recorded.container == "bitroute" else "without bitroute"
    if "error" in answer:
        return f"does not load {how}", []
    forward = answer["forward"]
    needs = sorted({entry.backend.gpu_to_compute() for entry in recorded.entries if entry.quantized} - {""})
    if forward is None:
        return f"loaded {how}; forward not run: no probe inputs are known for {component.class_name}", []
    if "error" in forward and needs:
        return f"loaded {how}; forward not run: needs {', '.join(needs)}", []
    if "error" in forward or not forward["finite"]:
        got = forward.get("error", "NaN or infinite outputs")
        problem = Problem("a forward after loading fails", str(component.folder), got=got)
        return f"loaded {how}; forward failed", [problem]
    return f"loaded {how}; forward ok", []
