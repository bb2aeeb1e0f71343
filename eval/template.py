"""What report.html and compare.html share: the template environment, and figures as their tables show them."""

from __future__ import annotations

import base64
import hashlib
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from bitroute.convert.table import size
from bitroute.eval.pictures import LOSSLESS_PX, WEBP_QUALITY
from bitroute.eval.scores import HIGHER_IS_BETTER

MARKS = {"pass": "✔", "fail": "✘", "rejected": "⚠", "no gate": "○"}
TITLES = {"lpips": "LPIPS", "psnr": "PSNR", "ssim": "SSIM", "ms_ssim": "MS-SSIM", "flip": "FLIP"}
PERFECT = {"lpips": 0.0, "ssim": 1.0, "ms_ssim": 1.0, "flip": 0.0}
EXPLANATIONS = {
    "lpips": "learned perceptual distance, from AlexNet features; 0 is identical",
    "psnr": "peak signal-to-noise ratio in dB, from the mean squared error of the pixels; identical has no number",
    "ssim": "structural similarity of small windows; 1 is identical",
    "ms_ssim": "structural similarity over several scales; 1 is identical",
    "flip": "the difference that an eye sees when the two pictures take turns; 0 is identical",
}


@dataclass(frozen=True)
class Cell:
    """A mean as the table shows it; every cell of a column has equally many decimals."""

    value: str
    interval: str = ""
    note: str = ""


def write_page(file: Path, html: str) -> Path:
    partial = file.with_name(f"{file.name}.part")
    partial.write_text(html, encoding="utf-8")
    os.replace(partial, file)
    return file


def fill(template: str, **values: Any) -> str:
    """The page's HTML. Prompts, names and recipes come from strangers: everything is escaped."""
    environment = Environment(
        loader=PackageLoader("bitroute.eval", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {
        "bytes": size, "mark": mark, "plural": _plural, "ratio": _ratio, "fixed": fixed, "signed": _signed,
        "interval": interval, "digits_for": digits_for, "p_value": p_value, "script_hash": _script_hash,
    }  # fmt: skip
    environment.globals |= {
        "marks": MARKS, "titles": TITLES, "explanations": EXPLANATIONS, "higher_is_better": HIGHER_IS_BETTER,
        "quality": WEBP_QUALITY, "lossless_px": LOSSLESS_PX,
    }  # fmt: skip
    return environment.get_template(template).render(**values)


def mark(candidate: Mapping[str, Any]) -> str:
    """pass, fail or rejected; `no gate` where nothing was asked of the candidate."""
    if candidate["tripwires"] or not candidate["scores"]:
        return "rejected"
    if not candidate["gate"]:
        return "no gate"
    return "pass" if candidate["passed"] else "fail"


def decimals(content: Mapping[str, Any]) -> dict[str, int]:
    """metric → decimals with which even the mean nearest to perfect keeps two digits; PSNR has two."""
    scored = [*content["floor"].values(), *(c["scores"] for c in content["candidates"] if c["scores"])]
    distances = {
        metric: [abs(float(scores[metric]["mean"]["value"]) - perfect) for scores in scored]
        for metric, perfect in PERFECT.items()
    }
    return {"psnr": 2, **{metric: digits_for(found) for metric, found in distances.items()}}


def digits_for(distances: Iterable[float]) -> int:
    """Three to six decimals: as many as the smallest distance above 0 needs for two digits."""
    found = [distance for distance in distances if distance > 1e-9]
    return min(6, max(3, 1 - math.floor(math.log10(min(found))))) if found else 3


def cell(summary: Mapping[str, Any], digits: int) -> Cell:
    mean = summary["mean"]
    note = f"{summary['identical']} more identical" if summary["identical"] and mean["value"] != "identical" else ""
    return Cell(fixed(mean["value"], digits), interval(mean, digits), note)


def interval(mean: Mapping[str, Any], digits: int, scale: float = 1) -> str:
    """`[0.012, 0.034]`; empty where there is none, or no more than its mean."""
    low, high = mean["low"], mean["high"]
    return "" if low is None or low == high else f"[{fixed(low, digits, scale)}, {fixed(high, digits, scale)}]"


def fixed(value: float | str, digits: int, scale: float = 1) -> str:
    """Words such as `identical` stay."""
    return value if isinstance(value, str) else f"{scale * value:.{digits}f}"


def p_value(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.2g}"


def _signed(value: float, digits: int) -> str:
    rounded = round(value, digits)
    return f"{rounded:+.{digits}f}" if rounded else f"{0:.{digits}f}"


def _ratio(value: float | None, original: float | None) -> str:
    return f"{value / original:.2f}×" if value and original else ""


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _script_hash(script: str) -> str:
    """For the page's content security policy: only this script runs, whatever a prompt holds."""
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
