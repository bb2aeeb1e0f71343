"""The report: `report.json` for machines, words for people. The page is drawn from the same content by page.py."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from bitroute.convert.table import size
from bitroute.eval.evaluate import Candidate, Evaluation, provenance_of
from bitroute.eval.intervals import Mean
from bitroute.eval.scores import TITLES, Scores, plain, words

SCHEMA = "bitroute-report/1"


def describe(evaluation: Evaluation) -> dict[str, Any]:
    """The content of report.json; docs/report.md explains each key."""
    original = evaluation.original
    return {
        "schema": SCHEMA,
        "verdict": verdict(evaluation),
        "passed": evaluation.passed,
        "original": {
            "name": original.name, "size_bytes": folder_bytes(original), "measured": dict(evaluation.drawn.measured),
            "pictures": "pictures/original",
        },
        "sampling": evaluation.sampling.describe(),
        "environment": dict(evaluation.environment),
        "floor": {what: scores.describe() for what, scores in evaluation.floor.items()},
        "notes": sorted({note for scores in evaluation.floor.values() for note in scores.notes}),
        "candidates": [_candidate(candidate, evaluation) for candidate in evaluation.candidates],
    }  # fmt: skip


def write_report(evaluation: Evaluation, folder: Path) -> dict[str, Any]:
    """`pictures/` and report.json, the JSON last; returns its content."""
    drawn = {"original": evaluation.drawn}
    drawn |= {_folder_name(candidate): candidate.run for candidate in evaluation.candidates if candidate.run}
    for name, run in drawn.items():
        (folder / "pictures" / name).mkdir(parents=True, exist_ok=True)
        for sample in evaluation.samples:
            shutil.copyfile(run.folder / f"{sample.stem}.png", folder / "pictures" / name / f"{sample.stem}.png")
    content = describe(evaluation)
    partial = folder / "report.json.part"
    partial.write_text(json.dumps(content, indent=1, allow_nan=False), encoding="utf-8")
    os.replace(partial, folder / "report.json")
    return content


def verdict(evaluation: Evaluation) -> str:
    """One sentence per candidate."""
    return " ".join(candidate_verdict(candidate, evaluation) for candidate in evaluation.candidates)


def candidate_verdict(candidate: Candidate, evaluation: Evaluation) -> str:
    if candidate.tripwires or candidate.scores is None:
        return f"{candidate.name} is broken: {'; '.join(candidate.tripwires)}."
    scores = candidate.scores
    if candidate.closeness == "identical":
        return f"{candidate.name} draws pictures identical to the original's."
    means = f"LPIPS {words('lpips', _mean(scores, 'lpips'))}, PSNR {words('psnr', _mean(scores, 'psnr'))} dB"
    floor = min(found.mean("psnr") for found in evaluation.floor.values())
    within = "within" if candidate.closeness else "outside"
    near = "cannot be told from the original" if candidate.closeness else "can be told from the original"
    failed = [str(limit) for limit in candidate.limits if not limit.holds(scores.mean(limit.metric))]
    gate = f" It fails the gate: {', '.join(failed)}." if failed else " It passes the gate." if candidate.limits else ""
    return f"{candidate.name} {near}: {means}, {within} the noise floor of {floor:.1f} dB.{gate}"


def table(evaluation: Evaluation) -> str:
    """Size and scores as aligned text, the noise floor first."""
    rows = [("", "size", *TITLES.values())]
    for what, scores in evaluation.floor.items():
        rows.append((f"floor: {what}", "", *(words(m, _mean(scores, m)) for m in TITLES)))
    for candidate in evaluation.candidates:
        shown = [words(m, _mean(candidate.scores, m)) for m in TITLES] if candidate.scores else ["broken"]
        rows.append((candidate.name, size(folder_bytes(candidate.model)), *shown))
    widths = [max(len(row[i]) for row in rows if i < len(row)) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)) for row in rows)


def folder_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _candidate(candidate: Candidate, evaluation: Evaluation) -> dict[str, Any]:
    origin = provenance_of(candidate.model) or {}
    plan = origin.get("plan", {}).get("components", {})
    return {
        "name": candidate.name,
        "verdict": candidate_verdict(candidate, evaluation),
        "passed": candidate.passed,
        "closeness": candidate.closeness,
        "tripwires": list(candidate.tripwires),
        "size_bytes": folder_bytes(candidate.model),
        "bits_per_weight": {name: round(8 * part["size_bytes"] / part["parameters"], 3) for name, part in plan.items()},
        "recipe": origin.get("recipe"),
        "measured": dict(candidate.run.measured) if candidate.run else {},
        "pictures": f"pictures/{_folder_name(candidate)}" if candidate.run else "",
        "scores": candidate.scores.describe() if candidate.scores else {},
        "gate": [_limit(candidate, i) for i in range(len(candidate.limits))],
        "samples": _samples(candidate, evaluation),
    }


def _limit(candidate: Candidate, index: int) -> dict[str, Any]:
    limit = candidate.limits[index]
    mean = candidate.scores.mean(limit.metric) if candidate.scores else None
    return {"limit": str(limit), "mean": plain(mean), "holds": mean is not None and limit.holds(mean)}


def _samples(candidate: Candidate, evaluation: Evaluation) -> list[dict[str, Any]]:
    if candidate.scores is None:
        return []
    values = candidate.scores.values
    return [
        {"prompt": sample.prompt, "seed": sample.seed, "picture": f"{sample.stem}.png",
         **{metric: plain(values[metric][index]) for metric in values}}
        for index, sample in enumerate(evaluation.samples)
    ]  # fmt: skip


def _folder_name(candidate: Candidate) -> str:
    """A name that cannot collide with the original's."""
    return f"candidate-{candidate.name.replace('/', '-')}"


def _mean(scores: Scores, metric: str) -> Mean:
    return scores.summary(metric).mean
