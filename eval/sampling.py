"""What is drawn, and how: everything that must be the same for the original and every candidate."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

from bitroute.errors import Problem, RecipeError, did_you_mean

PROMPT_LIMIT_BYTES = 1_000_000


@dataclass(frozen=True)
class Sample:
    """One picture: prompt number i of the set, from the noise of `seed`."""

    prompt_index: int
    prompt: str
    seed: int

    @property
    def stem(self) -> str:
        return f"{self.prompt_index:04d}-{self.seed}"


@dataclass(frozen=True)
class Sampling:
    """call: arguments of the pipeline such as height, num_inference_steps, guidance_scale. threads: torch threads."""

    prompts: tuple[str, ...]
    seeds: tuple[int, ...] = (0,)
    call: Mapping[str, Any] = field(default_factory=dict)
    device: str = "cpu"
    threads: int = 1
    attention: str = "default"  # or "math": the plain kernel, for the noise floor

    def samples(self) -> Iterator[Sample]:
        for index, prompt in enumerate(self.prompts):
            for seed in self.seeds:
                yield Sample(index, prompt, seed)

    def describe(self) -> dict[str, Any]:
        return {
            "prompts": list(self.prompts), "seeds": list(self.seeds), "call": dict(self.call),
            "device": self.device, "threads": self.threads, "attention": self.attention,
        }  # fmt: skip

    def key(self, *folders: Path) -> str:
        """Of everything that decides the pictures: these settings, the model's files, the libraries' versions."""
        libraries = {name: version(name) for name in ("torch", "diffusers", "transformers", "torchao")}
        parts = [self.describe(), libraries, [_identity(folder) for folder in folders]]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


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
    if not file.is_file():
        known = list(prompt_sets())
        raise RecipeError(
            Problem(
                f"no prompts {name_or_file!r}", "--prompts", expected=f"a text file, or one of {', '.join(known)}",
                next_step=did_you_mean(name_or_file, known),
            )
        )  # fmt: skip
    if file.stat().st_size > PROMPT_LIMIT_BYTES:
        raise RecipeError(Problem("the prompt file is too large", str(file), expected="at most 1 MB of text"))
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(Problem("cannot read the prompts", str(file), got=str(error))) from error
    prompts = tuple(line for line in lines if line and not line.startswith("#"))
    if not prompts:
        raise RecipeError(Problem("no prompt in this file", str(file), expected="one prompt a line"))
    return prompts


def parse_seeds(text: str) -> tuple[int, ...]:
    """`0,1,2` → (0, 1, 2). Raises RecipeError for anything else, and for a seed twice."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts) or len(set(parts)) < len(parts):
        raise RecipeError(Problem("not a list of seeds", "--seeds", got=repr(text), expected="0 or 0,1,2"))
    return tuple(int(part) for part in parts)


def call_arguments(call: Sequence[str], steps: int | None = None, size: str | None = None) -> dict[str, Any]:
    """The pipeline's arguments from NAME=VALUE texts (values as JSON, else text), steps and WIDTHxHEIGHT.

    Raises:
        RecipeError: a text without `=`, or a size that is not two numbers.
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
        try:
            arguments[name] = json.loads(value)
        except json.JSONDecodeError:
            arguments[name] = value
    return arguments


def _identity(folder: Path) -> list[Any]:
    """Names, sizes and change times: hashing 24 GB would take longer than drawing the pictures."""
    found = sorted(file for file in folder.rglob("*") if file.is_file())
    return [
        str(folder.resolve()),
        *([str(f.relative_to(folder)), f.stat().st_size, f.stat().st_mtime_ns] for f in found),
    ]
