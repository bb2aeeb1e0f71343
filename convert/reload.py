"""Components loaded in a fresh process, as their user would, and one forward pass of each."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from bitroute.convert.plan import LOADING_BYTES
from bitroute.convert.profile import find_profile
from bitroute.convert.record import RecordedComponent
from bitroute.errors import BitrouteError, Problem

ANSWER = '{"bitroute_imported": '  # how the lines of loading.py begin


@dataclass(frozen=True)
class Reload:
    words: str  # "loaded without bitroute; forward ok" and its other outcomes
    problems: tuple[Problem, ...] = ()
    notes: tuple[str, ...] = ()


def reload(components: Sequence[RecordedComponent]) -> dict[str, Reload]:
    """Component → what came of it. Those that need bitroute are loaded in one process, the others in another.

    One is in memory at a time; what is larger than the free memory is not loaded.
    """
    found, requests = dict[str, Reload](), dict[str, dict[str, Any]]()
    for recorded in components:
        try:
            unfit = _unfit(recorded)
            if unfit:
                found[recorded.name] = Reload(f"not loaded ({unfit})")
            else:
                requests[recorded.name] = _request(recorded)
        except BitrouteError as error:
            found[recorded.name] = Reload("not loaded", tuple(error.problems))
    answers = dict[str, dict[str, Any]]()
    for with_bitroute in (False, True):
        asked = {name: asking for name, asking in requests.items() if asking["needs_bitroute"] == with_bitroute}
        answers |= zip(asked, _answers(list(asked.values())), strict=True)
    return {
        recorded.name: found.get(recorded.name) or _told(recorded, answers[recorded.name]) for recorded in components
    }


def _unfit(recorded: RecordedComponent) -> str:
    needed = int(1.2 * recorded.size_bytes) + LOADING_BYTES
    available = psutil.virtual_memory().available
    return "" if needed <= available else f"needs {needed / 1e9:.1f} GB of memory, {available / 1e9:.1f} are free"


def _lifts_gpu_check(recorded: RecordedComponent) -> bool:
    return recorded.container == "bitsandbytes" and not torch.cuda.is_available()


def _request(recorded: RecordedComponent) -> dict[str, Any]:
    component = recorded.component
    profile = find_profile(component.class_name)
    probe = profile.probe(component.config) if profile else {}
    return {
        "folder": str(component.folder), "library": component.library, "class": component.class_name,
        "variant": component.variant,
        "needs_bitroute": recorded.container == "bitroute", "lift_gpu_check": _lifts_gpu_check(recorded),
        "probe": {name: asdict(given) for name, given in probe.items()},
    }  # fmt: skip


def _answers(requests: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One for each request. Where a process ends too early, another one goes on after what ended it."""
    # -P: the script's own folder must not shadow the standard library
    command = [sys.executable, "-P", str(Path(__file__).with_name("loading.py"))]
    answers: list[dict[str, Any]] = []
    while len(answers) < len(requests):
        left = requests[len(answers) :]
        done = subprocess.run(command, input=json.dumps(left), capture_output=True, text=True, check=False)
        lines = done.stdout.splitlines(keepends=True)  # libraries print too
        said = [json.loads(line) for line in lines if line.startswith(ANSWER) and line.endswith("\n")]
        answers += said[: len(left) - 1] if done.returncode else said
        if len(answers) < len(requests):
            error = f"the loading process ended with {done.returncode}: {done.stderr.strip()[-400:]}"
            answers.append({"error": error})
    return answers


def _told(recorded: RecordedComponent, answer: Mapping[str, Any]) -> Reload:
    words, failed = _outcome(recorded, answer)
    problems = [*_loading_problems(recorded, answer), *failed]
    lifted = f"{recorded.name}: the loader's GPU check was lifted, in verify's own process only"
    return Reload(words, tuple(problems), (lifted,) if _lifts_gpu_check(recorded) else ())


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
