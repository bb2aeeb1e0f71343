"""Candidates of several reports beside each other: `compare.json`, and its words for the terminal.

All of them have the same original, prompts and seeds, so that their scores pair prompt by prompt.
"""

from __future__ import annotations

import math
import re
import shutil
import textwrap
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

from bitroute.convert.document import printable
from bitroute.convert.files import write_json
from bitroute.convert.table import size
from bitroute.errors import JobError, Problem, RecipeError
from bitroute.eval.intervals import SIGNIFICANCE, Difference, Mean, compare, holm, summarize
from bitroute.eval.readback import IDENTICAL, Report, StoredCandidate, read_reports
from bitroute.eval.scores import words

SCHEMA = "bitroute-compare/1"
PAIRED = {"lpips": False, "psnr": True, "denoiser_error": False}  # metric → whether higher is better
ORIGINAL = "pictures/original"
WIDTH, LONGEST_NAME = 100, 31  # columns of the terminal form


@dataclass(frozen=True)
class Entry:
    """A candidate under the name that tells it from the others. errors: prompt → the denoiser's relative error."""

    name: str
    report: Report
    found: StoredCandidate
    pictures: str

    @property
    def lpips(self) -> float:
        return self.found.scores["lpips"].mean.value

    @property
    def errors(self) -> dict[int, float]:
        prompts = self.found.trajectory.prompts if self.found.trajectory else []
        return {error.prompt: error.relative_error for error in prompts}

    @property
    def quality(self) -> tuple[bool, float, int]:
        """Sorts the best first and those whose scores mean nothing last."""
        return (not self.found.judged, self.lpips if self.found.judged else 0, self.found.size_bytes)


def compare_reports(paths: Sequence[Path], out: Path) -> dict[str, Any]:
    """Writes pictures/ and, last of all, compare.json into `out`; returns its content (docs/compare.md).

    Raises:
        SourceError: a report cannot be read, or cannot be compared with the others; all problems at once.
        RecipeError: `out` is the folder of one of the reports. JobError: it cannot be written.
    """
    reports = read_reports(paths)
    if any(report.folder.resolve() == out.resolve() for report in reports):
        raise RecipeError(Problem("this is the folder of a report", str(out), next_step="give another --out"))
    entries = name_candidates(reports)
    content = describe(reports, entries, ORIGINAL)
    try:
        _copy_pictures(reports[0], entries, out)
        write_json(out / "compare.json", content)
    except OSError as error:
        got = error.strerror or str(error)
        raise JobError(Problem("cannot write the comparison", str(error.filename or out), got)) from error
    return content


def name_candidates(reports: Sequence[Report]) -> list[Entry]:
    """Each candidate once; where reports have different ones of one name, the reports' names are added."""
    found: list[tuple[Report, StoredCandidate]] = []
    for report in reports:
        for candidate in report.content.candidates:
            twin = next((place for place, (_, other) in enumerate(found) if _same(candidate, other)), None)
            if twin is None:
                found.append((report, candidate))
            elif found[twin][1].trajectory is None:  # drawn again, this time with the denoiser's error
                found[twin] = (report, candidate)
    shared = Counter(candidate.name for _, candidate in found)
    entries: dict[str, Entry] = {}
    for report, candidate in found:
        name = candidate.name if shared[candidate.name] == 1 else f"{report.name}/{candidate.name}"
        while name in entries:  # a folder may be called so too
            name += "'"
        slug = re.sub(r"[^A-Za-z0-9._-]+", "-", name)[-60:]
        pictures = f"pictures/{len(entries) + 1}-{slug}" if candidate.samples else ""
        entries[name] = Entry(name, report, candidate, pictures)
    return list(entries.values())


def _same(one: StoredCandidate, other: StoredCandidate) -> bool:
    keys = ("name", "size_bytes", "tripwires", "scores", "samples")
    return all(getattr(one, key) == getattr(other, key) for key in keys)


def report_content(folder: Path) -> dict[str, Any]:
    """One report as a comparison of its candidates; the pictures' folders are the report's own.

    Raises:
        SourceError: the report cannot be read.
    """
    reports = read_reports([folder])
    named = name_candidates(reports)
    entries = [replace(entry, pictures=entry.found.pictures if entry.found.samples else "") for entry in named]
    return describe(reports, entries, reports[0].content.original.pictures)


def describe(reports: Sequence[Report], entries: Sequence[Entry], original_pictures: str) -> dict[str, Any]:
    """The content of compare.json; docs/compare.md explains each key."""
    first = reports[0].content
    original = first.original
    return {
        "schema": SCHEMA,
        "original": {"name": original.name, "size_bytes": original.size_bytes, "pictures": original_pictures},
        "sampling": first.sampling.model_dump(mode="json", exclude_unset=True),
        "floor": first.model_dump(mode="json", include={"floor"}, exclude_unset=True)["floor"],
        "unrelated_lpips": first.unrelated_lpips,
        "notes": [*_notes(reports), *_unpaired(entries)],
        "candidates": [_candidate(entry, entries) for entry in entries],
        "by_size": [entry.name for entry in sorted(entries, key=lambda entry: entry.found.size_bytes)],
        "by_quality": [entry.name for entry in sorted(entries, key=lambda entry: entry.quality)],
        "pairs": [pair for metric in PAIRED for pair in _pairs(metric, entries)],
    }


def _notes(reports: Sequence[Report]) -> list[str]:
    """With the report's name where not all of them say it."""
    said = Counter(note for report in reports for note in set(report.content.notes))
    notes = [
        note if said[note] == len(reports) else f"{report.name}: {note}"
        for report in reports
        for note in report.content.notes
    ]
    return list(dict.fromkeys(notes))


def _unpaired(entries: Sequence[Entry]) -> Iterator[str]:
    for entry in entries:
        if entry.found.judged and math.isinf(entry.found.scores["psnr"].mean.value):
            yield f"{entry.name} is identical to the original: there is no PSNR to compare with"


def _candidate(entry: Entry, entries: Sequence[Entry]) -> dict[str, Any]:
    kept = {"verdict", "passed", "closeness", "tripwires", "gate", "size_bytes", "scores", "samples"}
    errors = entry.errors
    mean = summarize(list(errors.values()), list(errors), higher_is_better=False).mean if errors else None
    return {
        "name": entry.name,
        "report": entry.report.name,
        **entry.found.model_dump(mode="json", include=kept, exclude_unset=True),
        "bits_per_weight": _bits(entry.found),
        "denoiser_error": asdict(mean) if mean else None,
        "pareto": entry.found.judged and not any(_dominates(other, entry) for other in entries),
        "pictures": entry.pictures,
    }


def _bits(found: StoredCandidate) -> float | None:
    """Of all components that bitroute wrote; None where it wrote none, or their sizes are not in the report."""
    parts, parameters = found.bits_per_weight, found.parameters
    if len(parts) == 1:
        return next(iter(parts.values()))
    total = sum(parameters.get(name, 0) for name in parts)
    if not total or not parts.keys() <= parameters.keys():
        return None
    return round(sum(bits * parameters[name] for name, bits in parts.items()) / total, 3)


def _dominates(one: Entry, other: Entry) -> bool:
    """No larger and no worse, and not equal in both."""
    if not one.found.judged:
        return False
    ours, theirs = (one.found.size_bytes, one.lpips), (other.found.size_bytes, other.lpips)
    return ours != theirs and ours[0] <= theirs[0] and ours[1] <= theirs[1]


def _judged_pairs(entries: Sequence[Entry]) -> Iterator[tuple[Entry, Entry]]:
    """The better one by LPIPS first."""
    return combinations(sorted((e for e in entries if e.found.judged), key=lambda entry: entry.quality), 2)


def _pairs(metric: str, entries: Sequence[Entry]) -> Iterator[dict[str, Any]]:
    pairs = [(pair, found) for pair in _judged_pairs(entries) if (found := _difference(metric, *pair))]
    corrected = holm([found.p for _, found in pairs])
    for ((one, other), found), p in zip(pairs, corrected, strict=True):
        yield {**_described(metric, one, other, found), "p": p, "significant": p < SIGNIFICANCE}


def _difference(metric: str, one: Entry, other: Entry) -> Difference | None:
    """Of the samples that both have, without those of which one score alone is infinite; None where there is none."""
    first, second = _values(metric, one), _values(metric, other)
    both = [key for key in first if key in second]
    keys = [key for key in both if first[key] == second[key] or math.isfinite(first[key] - second[key])]
    prompts = [prompt for prompt, _ in keys]
    return compare([first[key] for key in keys], [second[key] for key in keys], prompts) if keys else None


def _values(metric: str, entry: Entry) -> dict[tuple[int, int], float]:
    """(prompt, seed) → score; the denoiser's error has no seed."""
    if metric == "denoiser_error":
        return {(prompt, 0): error for prompt, error in entry.errors.items()}
    samples = zip(entry.report.content.sampling.samples(), entry.found.samples, strict=True)
    return {(sample.prompt_index, sample.seed): stored.scores[metric] for sample, stored in samples}


def _described(metric: str, one: Entry, other: Entry, found: Difference) -> dict[str, Any]:
    """A pair with its better candidate first, so that the difference is positive."""
    mean, higher_is_better = found.mean, PAIRED[metric]
    one_is_better = mean.value == 0 or (mean.value > 0) == higher_is_better
    better, worse = (one, other) if one_is_better else (other, one)
    bounds = (mean.low, mean.high) if mean.value >= 0 else (_negative(mean.high), _negative(mean.low))
    return {
        "metric": metric,
        "better": better.name,
        "worse": worse.name,
        "difference": abs(mean.value),
        "low": bounds[0],
        "high": bounds[1],
        "wins": found.above if one_is_better == higher_is_better else found.below,
        "prompts": mean.prompts,
    }


def _negative(bound: float | None) -> float | None:
    return None if bound is None else -bound


def _copy_pictures(first: Report, entries: Sequence[Entry], out: Path) -> None:
    folders = {ORIGINAL: first.folder / first.content.original.pictures}
    folders |= {e.pictures: e.report.folder / e.found.pictures for e in entries if e.pictures}
    for name, folder in folders.items():
        (out / name).mkdir(parents=True, exist_ok=True)
        for sample in first.content.sampling.samples():
            shutil.copyfile(folder / f"{sample.stem}.png", out / name / f"{sample.stem}.png")


def comparison_text(content: Mapping[str, Any]) -> str:
    """Both orders as tables, the noise floor, and whether neighbours in quality differ; at most WIDTH columns."""
    candidates = {candidate["name"]: candidate for candidate in content["candidates"]}
    sizes = [_size_row(candidates[name]) for name in content["by_size"]]
    floor = [_quality_row(f"floor: {what}", scores, None) for what, scores in content["floor"].items()]
    ranked = [_candidate_row(candidates[name]) for name in content["by_quality"]]
    sentences = [_wrapped(sentence) for sentence in neighbour_sentences(content)]
    parts = [
        aligned([("by size", "size", "bits/weight", "LPIPS", ""), *sizes]),
        aligned([("by quality", "LPIPS", "PSNR dB", "denoiser error, %"), *floor, *ranked]),
        "\n".join(sentences),
    ]
    return "\n\n".join(part for part in parts if part)


def _size_row(candidate: Mapping[str, Any]) -> Sequence[str]:
    bits = candidate["bits_per_weight"]
    judged = candidate["scores"] and not candidate["tripwires"]
    lpips = (
        words("lpips", replace(stored_mean(candidate["scores"]["lpips"]["mean"]), low=None)) if judged else "rejected"
    )
    front = "no other is smaller and better" if candidate["pareto"] else ""
    return candidate["name"], size(candidate["size_bytes"]), "" if bits is None else f"{bits:.2f}", lpips, front


def _candidate_row(candidate: Mapping[str, Any]) -> Sequence[str]:
    if candidate["tripwires"] or not candidate["scores"]:
        return candidate["name"], "rejected", "", ""
    return _quality_row(candidate["name"], candidate["scores"], candidate["denoiser_error"])


def _quality_row(name: str, scores: Mapping[str, Any], error: Mapping[str, Any] | None) -> Sequence[str]:
    means = [words(metric, stored_mean(scores[metric]["mean"])) for metric in ("lpips", "psnr")]
    return name, *means, percent(stored_mean(error)).replace(" %", "") if error else ""


def neighbour_sentences(content: Mapping[str, Any]) -> list[str]:
    """One for each two neighbours in the order by quality: do they differ?"""
    pairs = {frozenset((p["better"], p["worse"])): p for p in content["pairs"] if p["metric"] == "lpips"}
    found = [pairs.get(frozenset(neighbours)) for neighbours in pairwise(content["by_quality"])]
    return [_sentence(pair) for pair in found if pair]


def _sentence(pair: Mapping[str, Any]) -> str:
    p = "p < 0.001" if pair["p"] < 0.001 else f"p = {pair['p']:.2g}"
    better, worse = printable(pair["better"]), printable(pair["worse"])
    if not pair["significant"]:
        return f"no significant difference in LPIPS between {better} and {worse} ({p}, {pair['prompts']} prompts)"
    difference = words("lpips", Mean(pair["difference"], pair["low"], pair["high"], pair["prompts"]))
    wins = f"on {pair['wins']} of {pair['prompts']} prompts"
    return f"{better} is better than {worse} by {difference} LPIPS, {wins}, {p}"


def _wrapped(sentence: str) -> str:
    """No line ends inside of an interval or of `p = 0.05`."""
    kept = re.sub(r"\[[^\]]*\]|p [<=] [\d.]+", lambda found: found[0].replace(" ", "\xa0"), sentence)
    return textwrap.fill(kept, WIDTH, subsequent_indent="  ").replace("\xa0", " ")


def stored_mean(stored: Mapping[str, Any]) -> Mean:
    """A mean as reports have it."""
    value, low, high = (math.inf if stored[key] == IDENTICAL else stored[key] for key in ("value", "low", "high"))
    return Mean(value, low, high, stored["prompts"])


def percent(mean: Mean) -> str:
    """`3.21 % [3.02, 3.40]`"""
    interval = "" if mean.low is None or mean.high is None else f" [{100 * mean.low:.2f}, {100 * mean.high:.2f}]"
    return f"{100 * mean.value:.2f} %{interval}"


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Columns of equal width, the first one bounded; what would act on a terminal is escaped."""
    shown = [[_shortened(printable(row[0])), *row[1:]] for row in rows]
    widths = [max(map(len, column)) for column in zip(*shown, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in shown)
    return "\n".join(line.rstrip() for line in lines)


def _shortened(name: str) -> str:
    """The end of a name tells it from others."""
    return name if len(name) <= LONGEST_NAME else f"…{name[1 - LONGEST_NAME :]}"
