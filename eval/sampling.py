"""What is drawn, and how: everything that must be the same for the original and every candidate."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from bitroute.convert.describe import LIBRARIES
from bitroute.errors import Problem, RecipeError, did_you_mean
from bitroute.eval.inputs import hashes, names

PROMPT_LIMIT_BYTES = 1_000_000
SEED_LIMIT = 2**32  # a seed times the prompts must fit into 63 bits


@dataclass(frozen=True)
class Sample:
    """One picture: prompt number i of the set, from the noise of `seed`."""

    prompt_index: int
    prompt: str
    seed: int

    @property
    def noise_seed(self) -> int:
        """Another one for each prompt and seed, the same for every pipeline."""
        return self.seed * 100_003 + self.prompt_index

    @property
    def stem(self) -> str:
        return f"{self.prompt_index:04d}-{self.seed}"


@dataclass(frozen=True)
class Sampling:
    """call: arguments of the pipeline such as height, num_inference_steps, guidance_scale. threads: torch threads.

    pipeline: the diffusers class to use instead of the one that the model names. inputs: argument → picture files, one
    for all prompts or one for each (inputs.py).
    """

    prompts: tuple[str, ...]
    seeds: tuple[int, ...] = (0,)
    call: Mapping[str, Any] = field(default_factory=dict)
    device: str = "cpu"
    threads: int = 1
    attention: str = "default"  # or "math": the plain kernel, for the noise floor
    pipeline: str | None = None
    inputs: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def samples(self) -> Iterator[Sample]:
        for index, prompt in enumerate(self.prompts):
            for seed in self.seeds:
                yield Sample(index, prompt, seed)

    def request(self) -> dict[str, Any]:
        """JSON for another process of this machine, which makes the same with Sampling(**request)."""
        return {
            "prompts": list(self.prompts), "seeds": list(self.seeds), "call": dict(self.call),
            "device": self.device, "threads": self.threads, "attention": self.attention, "pipeline": self.pipeline,
            "inputs": {argument: list(files) for argument, files in self.inputs.items()},
        }  # fmt: skip

    def describe(self) -> dict[str, Any]:
        """For reports and for the key: input pictures by their names and contents, not by their places.

        Raises:
            JobError: an input picture cannot be read.
        """
        content = {"inputs_sha256": hashes(self.inputs)} if self.inputs else {}
        return {**self.request(), "inputs": names(self.inputs), **content}

    @property
    def hardware(self) -> str:
        """The GPU, or the processor with the instruction set that decides which of torch's kernels run.

        Raises:
            RecipeError: torch does not know or have the device.
        """
        try:
            if torch.device(self.device).type == "cuda":
                return torch.cuda.get_device_name(self.device)
        except (RuntimeError, AssertionError) as error:
            raise RecipeError(Problem(f"no device {self.device!r} here", "--device", got=str(error)[:200])) from error
        return f"{platform.processor() or platform.machine()} {torch.backends.cpu.get_cpu_capability()}"

    def key(self, *folders: Path) -> str:
        """Of everything that decides the pictures: settings, hardware, the models' files, the libraries' versions."""
        parts = [self.describe(), self.hardware, library_versions(), [_identity(folder) for folder in folders]]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def library_versions() -> dict[str, str]:
    return {library: version(library) for library in ("bitroute", *LIBRARIES)}


def prompt_sets() -> dict[str, Path]:
    """The prompt sets that come with bitroute, by name."""
    folder = Path(str(files("bitroute.recipes"))) / "prompts"
    return {path.stem: path for path in sorted(folder.glob("*.txt"))}


def read_prompts(name_or_file: str) -> tuple[str, ...]:
    """One prompt a line; empty lines and lines that start with # do not count.

    Raises:
        RecipeError: no such set or file, too large, not text, or no prompt in it.
    """
    file = prompt_sets().get(name_or_file, Path(name_or_file))
    if not os.path.isfile(file):  # False, no error, for a prompt where its file was expected: too long a name
        known = list(prompt_sets())
        raise RecipeError(
            Problem(
                f"no prompts {name_or_file[:100]!r}", "--prompts",
                expected=f"a text file, or one of {', '.join(known)}",
                next_step=did_you_mean(name_or_file, known),
            )
        )  # fmt: skip
    if file.stat().st_size > PROMPT_LIMIT_BYTES:
        raise RecipeError(Problem("the prompt file is too large", str(file), expected="at most 1 MB of text"))
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(Problem("cannot read the prompts", str(file), got=str(error))) from error
    if "\0" in text:
        raise RecipeError(Problem("cannot read the prompts", str(file), got="bytes that are no text"))
    lines = [line.strip() for line in text.splitlines()]
    prompts = tuple(line for line in lines if line and not line.startswith("#"))
    if not prompts:
        raise RecipeError(Problem("no prompt in this file", str(file), expected="one prompt a line"))
    return prompts


def parse_seeds(text: str) -> tuple[int, ...]:
    """`0,1,2` → (0, 1, 2). Raises RecipeError for anything else, for a seed twice, and from 2^32 on."""
    parts = [part.strip() for part in text.split(",")]
    seeds = tuple(int(part) if part.isdecimal() and len(part) < 20 else SEED_LIMIT for part in parts)
    if max(seeds) >= SEED_LIMIT or len(set(seeds)) < len(seeds):
        expected = f"0 or 0,1,2: different numbers below {SEED_LIMIT}"
        raise RecipeError(Problem("not a list of seeds", "--seeds", got=repr(text[:100]), expected=expected))
    return seeds


def call_arguments(call: Sequence[str], steps: int | None = None, size: str | None = None) -> dict[str, Any]:
    """The pipeline's arguments from NAME=VALUE texts (values as JSON, else text), steps and WIDTHxHEIGHT.

    Raises:
        RecipeError: a text without `=`, NaN or an infinity, or a size that is not two numbers.
    """
    arguments: dict[str, Any] = {"num_inference_steps": steps} if steps else {}
    if size is not None:
        width, _, height = size.lower().partition("x")
        if not (width.isdecimal() and height.isdecimal()):
            raise RecipeError(
                Problem("not a size", "--size", got=repr(size), expected="WIDTHxHEIGHT, such as 1024x768")
            )
        arguments |= {"width": int(width), "height": int(height)}
    for text in call:
        name, separator, value = text.partition("=")
        if not separator or not name.isidentifier():
            raise RecipeError(Problem("not an argument", "--call", got=repr(text), expected="NAME=VALUE"))
        arguments[name] = _value(value)
    return arguments


def _value(text: str) -> Any:
    """JSON where it is, else the text itself; NaN would make the report unreadable for other programs."""

    def refuse(constant: str) -> None:
        raise RecipeError(Problem("not a finite number", "--call", got=constant))

    try:
        return json.loads(text, parse_constant=refuse)
    except ValueError:
        return text


def _identity(folder: Path) -> list[Any]:
    """Names, sizes and change times: hashing 24 GB would take longer than drawing the pictures."""
    found = sorted(files_in(folder))
    return [
        str(folder.resolve()),
        *([str(f.relative_to(folder)), f.stat().st_size, f.stat().st_mtime_ns] for f in found),
    ]


def files_in(folder: Path) -> Iterator[Path]:
    """Every file that a loader finds, those of linked folders too; a folder that contains itself is entered once."""
    seen = set[Path]()
    for place, folders, found in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if (Path(place) / name).resolve() not in seen]
        seen.update((Path(place) / name).resolve() for name in folders)
        yield from (file for name in found if (file := Path(place) / name).is_file())
