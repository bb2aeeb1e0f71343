"""Four bits, measured in pictures: uniform recipes, methods and a searched recipe of the bundled model, paired.

python benchmarks/four_bits.py [FOLDER]    writes docs/four-bits.md; about half an hour on two cores, less when FOLDER
(build/four-bits) still has the checkpoints and statistics of an earlier run.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported

import bitroute
from bitroute.convert.noise import quiet
from bitroute.eval.compare import Entry, name_candidates
from bitroute.eval.intervals import Difference, compare
from bitroute.eval.readback import read_reports

MODEL = "builtin:tiny-flux"
PAGE = Path(__file__).parents[1] / "docs" / "four-bits.md"
CALL = {"height": 64, "width": 64, "num_inference_steps": 20, "guidance_scale": 0.0, "max_sequence_length": 16}
BITS = 4.6  # per weight of the transformer, everything counted
PROMPTS = 64
METRICS = {"lpips": False, "psnr": True, "denoiser_error": False}  # whether higher is better
Encoding = tuple[str, dict[str, Any], dict[str, Any]]  # backend, options, method

MSE = {"scale": "mse"}
UNIFORM: Mapping[str, Encoding] = {
    "nf4": ("nf4", {}, {}),
    "nf4 mse": ("nf4", MSE, {}),
    "nf4 mse, blocks of 32": ("nf4", {**MSE, "block": 32}, {}),
    "mxfp4": ("mxfp4", {}, {}),
    "mxfp4 mse": ("mxfp4", MSE, {}),
    "nvfp4": ("nvfp4", {}, {}),
    "nvfp4 mse": ("nvfp4", MSE, {}),
    "int4 mse, groups of 64": ("int4", MSE, {}),
    "int4 mse, groups of 32": ("int4", {**MSE, "group": 32}, {}),
    "int4 hqq, groups of 64": ("int4", {"zero": "hqq"}, {}),
    "codebook4, blocks of 32": ("codebook4", {"block": 32}, {}),
    "codebook4, blocks of 16": ("codebook4", {}, {}),
}
METHODS: Mapping[str, Encoding] = {
    "mxfp4": ("mxfp4", {}, {}),
    "mxfp4 mse": ("mxfp4", MSE, {}),
    "mxfp4 mse, rotate": ("mxfp4", MSE, {"rotate": 32}),
    "mxfp4 mse, low rank": ("mxfp4", MSE, {"low_rank": 4}),
    "mxfp4 mse, gptq": ("mxfp4", MSE, {"gptq": True}),
    "mxfp4 mse, rotate, gptq": ("mxfp4", MSE, {"rotate": 32, "gptq": True}),
    "mxfp4 mse, rotate, low rank, gptq": ("mxfp4", MSE, {"rotate": 32, "low_rank": 4, "gptq": True}),
    "nvfp4": ("nvfp4", {}, {}),
    "nvfp4 mse": ("nvfp4", MSE, {}),
    "nvfp4 mse, gptq": ("nvfp4", MSE, {"gptq": True}),
    "int4 mse, gptq": ("int4", MSE, {"gptq": True}),
    "codebook4, gptq": ("codebook4", {"block": 32}, {"gptq": True}),
}
TEXT = """\
# Four bits in pictures

<!-- written by: python benchmarks/four_bits.py -->

The bundled model on a CPU, {prompts} prompts (emoji-64), 20 steps, against its own bf16 pictures from the same noise.
Only the transformer is quantized; bits are those of all its weights, scales and kept layers included. The denoiser's
error is that of its output on the original's own inputs. Statistics and sensitivities were measured on other prompts
(emoji-calibration-32). In brackets: 95 % bootstrap intervals over prompts.

## A searched recipe at {budget} bits

    quantize calibrate {model} --prompts emoji-calibration-32 --out statistics.safetensors ...
    quantize search {model} --bits {budget} --keep none --statistics statistics.safetensors -o searched.yaml ...

Beside it every linear layer in one format (`keep: none`; what a format cannot hold stays in bf16). The last three
columns say by how much the searched recipe is better, prompt by prompt; an interval without 0 is significant.

{uniform}

## Methods

The profile's layers stay in bf16. `rotate: 32`, `low_rank: 4`, `gptq: true`, each where the row says so.

{methods}

{claim}
"""


@dataclass(frozen=True)
class Folders:
    root: Path

    @property
    def statistics(self) -> Path:
        return self.root / "statistics.safetensors"

    @property
    def searched(self) -> Path:
        return self.root / "searched.yaml"

    def checkpoint(self, table: str, name: str) -> Path:
        return self.root / table / "".join(letter if letter.isalnum() else "-" for letter in name)


def main() -> None:
    quiet()
    folders = Folders(Path(sys.argv[1] if len(sys.argv) > 1 else "build/four-bits").absolute())
    folders.root.mkdir(parents=True, exist_ok=True)
    sampling = bitroute.Sampling(bitroute.read_prompts("emoji-calibration-32"), call=CALL)
    if not folders.statistics.exists():
        bitroute.calibrate(MODEL, folders.statistics, sampling)
    if not folders.searched.exists():
        bitroute.search(MODEL, folders.searched, sampling, bits=BITS, keep="none", statistics=folders.statistics)
    uniform = {name: made(folders, "uniform", name, encoding, "none") for name, encoding in UNIFORM.items()}
    searched = folders.checkpoint("uniform", "searched")
    if not (searched / "bitroute.json").exists():
        bitroute.quantize(str(folders.searched), out=searched, statistics=folders.statistics)
    methods = {name: made(folders, "methods", name, encoding, "profile") for name, encoding in METHODS.items()}
    first = judged(folders, "uniform", {**uniform, "searched": searched})
    second = judged(folders, "methods", methods)
    words = {"prompts": PROMPTS, "model": MODEL, "budget": BITS, "claim": claim(second)}
    PAGE.write_text(TEXT.format(uniform=beside(first), methods=table(second), **words), "utf-8")


def made(folders: Folders, kind: str, name: str, encoding: Encoding, keep: str) -> Path:
    """The checkpoint of one format and method, made if it is not there."""
    folder = folders.checkpoint(kind, name)
    if not (folder / "bitroute.json").exists():
        backend, options, method = encoding
        said = f"{{backend: {backend}, options: {options}, method: {method}, keep: {keep}, otherwise: keep}}"
        recipe = folder.with_suffix(".yaml")
        recipe.parent.mkdir(exist_ok=True)
        recipe.write_text(f"model: {MODEL}\ncomponents:\n  transformer: {said}\n".replace("True", "true"), "utf-8")
        bitroute.quantize(str(recipe), out=folder, statistics=folders.statistics if method.get("gptq") else None)
    return folder


def judged(folders: Folders, kind: str, checkpoints: Mapping[str, Path]) -> dict[str, Entry]:
    """Name → the candidate of a report over all of them."""
    sampling = bitroute.Sampling(bitroute.read_prompts("emoji-64"), call=CALL)
    paths = [str(path) for path in checkpoints.values()]
    found = bitroute.evaluate(MODEL, paths, sampling, denoiser_prompts=PROMPTS, cache=folders.root / "cache")
    report = folders.root / f"{kind}-report"
    bitroute.write_report(found, report)
    entries = {entry.name: entry for entry in name_candidates(read_reports([report]))}
    return {name: entries[path.name] for name, path in checkpoints.items()}


def beside(entries: Mapping[str, Entry]) -> str:
    """Every recipe with the searched one's paired advantage over it."""
    searched = entries["searched"]
    lines = [_row(name, entry, *_advantages(searched, entry)) for name, entry in _by_quality(entries)]
    head = "| recipe | bits | LPIPS | PSNR dB | denoiser's error % | LPIPS less | PSNR more | error less, % |"
    return "\n".join([head, "|---" * 8 + "|", *lines])


def table(entries: Mapping[str, Entry]) -> str:
    head = "| recipe | bits | LPIPS | PSNR dB | denoiser's error % |"
    return "\n".join([head, "|---" * 5 + "|", *(_row(name, entry) for name, entry in _by_quality(entries))])


def claim(entries: Mapping[str, Entry]) -> str:
    """MR-GPTQ's claim (arXiv 2509.23202), with and without a branch of low rank."""
    found = [_difference("denoiser_error", entries["mxfp4 mse, rotate, low rank, gptq"], entries["nvfp4"])]
    found.append(_difference("denoiser_error", entries["mxfp4 mse, rotate, gptq"], entries["nvfp4"]))
    whole, alone = (f"{100 * one.mean.value:+.2f} % {_interval(one, 100, 1)}" for one in found)
    return (
        "MXFP4 with rotation, low rank and GPTQ beside plain NVFP4, difference of the denoiser's error (negative: "
        f"MXFP4 is better): {whole}; without low rank {alone}."
    )


def _by_quality(entries: Mapping[str, Entry]) -> list[tuple[str, Entry]]:
    return sorted(entries.items(), key=lambda item: item[1].quality)


def _row(name: str, entry: Entry, *more: str) -> str:
    scores, errors = entry.found.scores, entry.errors
    error = 100 * sum(errors.values()) / len(errors)
    bits = entry.found.bits_per_weight["transformer"]
    means = [f"{scores['lpips'].mean.value:.5f}", f"{scores['psnr'].mean.value:.2f}", f"{error:.2f}"]
    return "| " + " | ".join([name, f"{bits:.3f}", *means, *more]) + " |"


def _advantages(searched: Entry, other: Entry) -> Iterator[str]:
    """Positive where the searched recipe is better."""
    for metric, higher_is_better in METRICS.items():
        if searched is other:
            yield ""
            continue
        found = _difference(metric, searched, other)
        sign, unit = (1 if higher_is_better else -1), 100 if metric == "denoiser_error" else 1
        digits = 5 if metric == "lpips" else 2
        yield f"{sign * unit * found.mean.value:.{digits}f} {_interval(found, unit, sign, digits)}"


def _interval(found: Difference, unit: float, sign: int, digits: int = 2) -> str:
    assert found.mean.low is not None and found.mean.high is not None
    bounds: Sequence[float] = sorted((sign * unit * found.mean.low, sign * unit * found.mean.high))
    return f"[{bounds[0]:.{digits}f}, {bounds[1]:.{digits}f}]"


def _difference(metric: str, one: Entry, other: Entry) -> Difference:
    first, second = (_values(metric, entry) for entry in (one, other))
    assert all(map(math.isfinite, (*first, *second)))
    return compare(first, second, list(range(PROMPTS)))


def _values(metric: str, entry: Entry) -> list[float]:
    if metric == "denoiser_error":
        return [entry.errors[prompt] for prompt in range(PROMPTS)]
    return [sample.scores[metric] for sample in entry.found.samples]


if __name__ == "__main__":
    main()
