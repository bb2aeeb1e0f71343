"""The report: `report.json` for machines, words for people. The page is drawn from the same content by page.py."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from bitroute.convert.checkpoint import folder_name
from bitroute.convert.files import sha256
from bitroute.convert.table import size
from bitroute.errors import JobError, Problem
from bitroute.eval.evaluate import Evaluation, provenance_of
from bitroute.eval.intervals import Mean
from bitroute.eval.judge import FLOOR_DB, Candidate
from bitroute.eval.sampling import files_in
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
            "name": folder_name(original), "size_bytes": folder_bytes(original),
            "measured": dict(evaluation.drawn.measured),
            "pictures": "pictures/original", "pictures_sha256": _pictures_sha256(evaluation),
        },
        "sampling": evaluation.sampling.describe(),
        "environment": dict(evaluation.environment),
        "floor": {what: scores.describe() for what, scores in evaluation.floor.items()},
        "unrelated_lpips": evaluation.unrelated_lpips,
        "text_encoders": "original" if evaluation.share_text else "own",
        "notes": _notes(evaluation),
        "candidates": [_candidate(candidate, evaluation) for candidate in evaluation.candidates],
    }  # fmt: skip


def write_report(evaluation: Evaluation, folder: str | Path) -> dict[str, Any]:
    """`pictures/` and report.json, the JSON last; returns its content.

    Raises:
        JobError: the folder cannot be written.
    """
    content, folder = describe(evaluation), Path(folder)
    try:
        _copy_pictures(evaluation, folder)
        partial = folder / "report.json.part"
        partial.write_text(json.dumps(content, indent=1, allow_nan=False), encoding="utf-8")
        os.replace(partial, folder / "report.json")
    except OSError as error:
        raise JobError(
            Problem("cannot write the report", str(error.filename or folder), got=error.strerror or str(error),
                    next_step="the pictures are kept: run the same command with another --out")
        ) from error  # fmt: skip
    return content


def _copy_pictures(evaluation: Evaluation, folder: Path) -> None:
    drawn = {"original": evaluation.drawn}
    drawn |= {_folder_name(candidate): candidate.run for candidate in evaluation.candidates if candidate.run}
    for name, run in drawn.items():
        (folder / "pictures" / name).mkdir(parents=True, exist_ok=True)
        for sample in evaluation.samples:
            shutil.copyfile(run.folder / f"{sample.stem}.png", folder / "pictures" / name / f"{sample.stem}.png")


def verdict(evaluation: Evaluation) -> str:
    """That of each candidate."""
    return " ".join(candidate_verdict(candidate, evaluation) for candidate in evaluation.candidates)


def candidate_verdict(candidate: Candidate, evaluation: Evaluation) -> str:
    """What was measured, against what, and what that means; why, where nothing can be said."""
    scores, name = candidate.scores, candidate.name
    if candidate.tripwires or scores is None:
        same = " Its pictures are identical to the original's." if candidate.closeness == "identical" else ""
        return f"{name} is rejected: {'; '.join(candidate.tripwires)}.{same}"
    also = _gate_verdict(candidate, scores) + _label(candidate)
    if candidate.closeness == "identical":
        return f"{name} draws pictures identical to the original's.{also}"
    near = "is indistinguishable" if candidate.closeness else "differs measurably"
    means = f"PSNR {words('psnr', _mean(scores, 'psnr'))} dB, {_against_floor(candidate, evaluation)}"
    lpips = f"LPIPS {words('lpips', _mean(scores, 'lpips'))}"
    return f"{name} {near} from the original: {means}; {lpips}.{also}"


def _against_floor(candidate: Candidate, evaluation: Evaluation) -> str:
    floor = min(found.mean("psnr") for found in evaluation.floor.values())
    if math.isinf(floor):
        return "where the original drawn again is identical"
    side = f"within {FLOOR_DB:g} dB of" if candidate.closeness else "outside"
    return f"{side} the noise floor of {floor:.1f} dB"


def _label(candidate: Candidate) -> str:
    return f" Activations emulated on this device: {', '.join(candidate.emulated)}." if candidate.emulated else ""


def _gate_verdict(candidate: Candidate, scores: Scores) -> str:
    if not candidate.limits:
        return ""
    failed = [limit for limit in candidate.limits if not limit.holds(scores.mean(limit.metric))]
    found = ", ".join(
        f"{limit} (is {words(limit.metric, replace(_mean(scores, limit.metric), low=None))})" for limit in failed
    )
    return f" It fails the gate: {found}." if failed else " It passes the gate."


def table(evaluation: Evaluation) -> str:
    """Size and scores as aligned text, the noise floor first."""
    rows = [("", "size", *TITLES.values(), "denoiser error")]
    for what, scores in evaluation.floor.items():
        rows.append((f"floor: {what}", "", *(words(m, _mean(scores, m)) for m in TITLES)))
    for candidate in evaluation.candidates:
        judged = None if candidate.tripwires else candidate.scores
        shown = [words(m, _mean(judged, m)) for m in TITLES] if judged else ["rejected", *[""] * (len(TITLES) - 1)]
        rows.append((candidate.name, size(folder_bytes(candidate.model)), *shown, denoiser_error(candidate)))
    widths = [max(len(row[i]) for row in rows if i < len(row)) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)) for row in rows)


def denoiser_error(candidate: Candidate) -> str:
    """Mean over the steps of the teacher-forced relative error, in percent."""
    if candidate.replay is None:
        return ""
    errors = [float(step["relative_error"]) for step in candidate.replay.trajectory["timesteps"]]
    return f"{100 * sum(errors) / len(errors):.2f} %"


def folder_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in files_in(folder))


def _candidate(candidate: Candidate, evaluation: Evaluation) -> dict[str, Any]:
    origin = provenance_of(candidate.model) or {}
    plan = origin.get("plan", {}).get("components", {})
    return {
        "name": candidate.name,
        "verdict": candidate_verdict(candidate, evaluation),
        "passed": candidate.passed,
        "closeness": candidate.closeness,
        "tripwires": list(candidate.tripwires),
        "emulated": list(candidate.emulated),
        "size_bytes": folder_bytes(candidate.model),
        "bits_per_weight": {name: round(8 * part["size_bytes"] / part["parameters"], 3) for name, part in plan.items()},
        "parameters": {name: part["parameters"] for name, part in plan.items()},
        "record_sha256": _record_sha256(candidate.model),
        "recipe": origin.get("recipe"),
        "measured": dict(candidate.run.measured) if candidate.run else {},
        "pictures": f"pictures/{_folder_name(candidate)}" if candidate.run else "",
        "scores": candidate.scores.describe() if candidate.scores else {},
        "gate": [_limit(candidate, i) for i in range(len(candidate.limits))],
        **_optional(candidate),
        "samples": _samples(candidate, evaluation),
    }


def _optional(candidate: Candidate) -> dict[str, Any]:
    """Without the keys that nothing was measured for."""
    found: dict[str, Any] = {"weights": candidate.weights, "drift": candidate.drift, "standalone": candidate.standalone}
    if candidate.replay:
        found |= asdict(candidate.replay)
    return {key: plain(value) for key, value in found.items() if value}


def _pictures_sha256(evaluation: Evaluation) -> str:
    """Of their pixels: where two reports agree, their candidates were compared with the same pictures."""
    found = hashlib.sha256()
    for picture in evaluation.drawn.pictures:
        found.update(f"{list(picture.shape)}".encode() + picture.contiguous().numpy().tobytes())
    return found.hexdigest()


def _record_sha256(model: Path) -> str | None:
    """Ties the report to one state of a checkpoint: its bitroute.json holds the hashes of all its files."""
    file = model / "bitroute.json"
    return sha256(file) if file.is_file() else None


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


def _notes(evaluation: Evaluation) -> list[str]:
    whose = "the original's" if evaluation.share_text else "their own"
    of_scores = sorted({note for scores in evaluation.floor.values() for note in scores.notes})
    return [f"Candidates encode prompts with {whose} text encoders", *of_scores, *_seen_before(evaluation)]


def _seen_before(evaluation: Evaluation) -> Iterator[str]:
    """What a candidate was calibrated on flatters it."""
    prompts = set(evaluation.sampling.prompts)
    for candidate in evaluation.candidates:
        found: Any = provenance_of(candidate.model)
        for key in ("statistics", "settings", "prompts"):
            found = found.get(key) if isinstance(found, dict) else None
        seen = prompts.intersection(map(str, found if isinstance(found, list) else []))
        if seen:
            yield f"{candidate.name} was calibrated on {len(seen)} of these {len(prompts)} prompts: judge it on others"


def _folder_name(candidate: Candidate) -> str:
    """Cannot collide with the original's, nor with another candidate's: a name's parents stay folders."""
    return f"candidate-{candidate.name}"


def _mean(scores: Scores, metric: str) -> Mean:
    return scores.summary(metric).mean
