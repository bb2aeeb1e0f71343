"""A comparison for a model card: a Markdown table, and one picture of the worst, a middle and the best prompt.

Names and prompts come from strangers: all of their characters that mean something in Markdown are escaped.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from PIL import Image

from bitroute.convert.markdown import escaped, table
from bitroute.convert.table import size
from bitroute.errors import JobError, Problem
from bitroute.eval.compare import neighbour_sentences, percent, report_content, stored_mean
from bitroute.eval.intervals import Mean
from bitroute.eval.pictures import open_picture
from bitroute.eval.readback import IDENTICAL
from bitroute.eval.scores import TITLES, words
from bitroute.eval.sheet import Column, draw, stacked

COLUMNS = 6  # candidates beside each other in the picture; more of them wrap
METRICS = ("lpips", "psnr")
LONGEST_PROMPT = 150  # characters in the picture's headings

Json = Mapping[str, Any]


def write_card(content: Json, folder: Path, stem: str) -> None:
    """`stem`.md and, where a candidate drew, `stem`.png beside the comparison's pictures in `folder`.

    Raises:
        JobError: a picture cannot be read, or a file not be written.
    """
    if any(candidate["pictures"] for candidate in content["candidates"]):
        card_picture(content, folder, folder / f"{stem}.png")
    _write(folder / f"{stem}.md", lambda file: file.write_text(card_markdown(content), encoding="utf-8"))


def write_report_card(folder: Path) -> None:
    """report.md and report.png beside the report.json in `folder`.

    Raises:
        SourceError: the report cannot be read. JobError: as `write_card`.
    """
    write_card(report_content(folder), folder, "report")


def card_markdown(content: Json) -> str:
    """GitHub Markdown of a comparison (docs/compare.md), the noise floor first, then the best candidate."""
    found = {candidate["name"]: candidate for candidate in content["candidates"]}
    titles = ["", "size", "bits/weight", *(TITLES[metric] for metric in METRICS), "denoiser error", "verdict"]
    rows = [_floor_row(what, scores) for what, scores in content["floor"].items()]
    rows += [_row(found[name]) for name in content["by_quality"]]
    scored = table(titles, rows)
    sentences = [f"- {escaped(sentence)}" for sentence in neighbour_sentences(content)]
    sentences += [
        f"- {escaped(c['name'])}: {escaped('; '.join(c['tripwires']))}" for c in found.values() if c["tripwires"]
    ]
    return "\n\n".join(part for part in (scored, _how(content), "\n".join(sentences)) if part) + "\n"


def _floor_row(what: str, scores: Json) -> list[str]:
    means = [words(metric, stored_mean(scores[metric]["mean"])) for metric in METRICS]
    return [f"*noise floor: original, {escaped(what)}*", "", "", *means, "", ""]


def _row(candidate: Json) -> list[str]:
    bits, error, judged = candidate["bits_per_weight"], candidate["denoiser_error"], not candidate["tripwires"]
    scores = candidate["scores"] if judged else {}
    means = [words(metric, stored_mean(scores[metric]["mean"])) if scores else "" for metric in METRICS]
    return [
        escaped(candidate["name"]), size(candidate["size_bytes"]), "" if bits is None else f"{bits:.2f}", *means,
        percent(stored_mean(error)) if error and scores else "", verdict(candidate),
    ]  # fmt: skip


def verdict(candidate: Json) -> str:
    """In a few words."""
    if candidate["tripwires"] or not candidate["scores"]:
        return "rejected"
    close = {"identical": "identical", "indistinguishable": "within the noise floor"}
    gate = ("passes the gate" if candidate["passed"] else "fails the gate") if candidate["gate"] else ""
    return ", ".join(part for part in (close.get(candidate["closeness"], "differs measurably"), gate) if part)


def _how(content: Json) -> str:
    sampling, original = content["sampling"], content["original"]
    call = ", ".join(f"{name} = {value}" for name, value in sampling["call"].items())
    given = [sampling["pipeline"]] if sampling["pipeline"] else []
    given += [f"{name} given" for name in sampling["inputs"]]
    drawn = ", ".join([_count(sampling["prompts"], "prompt"), _count(sampling["seeds"], "seed"), *given])
    notes = "".join(f" {note}." for note in content["notes"])
    return escaped(
        f"Every picture is compared with that of the original, {original['name']} ({size(original['size_bytes'])}), "
        f"from the same noise: {drawn}{', ' if call else ''}{call}. In brackets: 95 % bootstrap intervals over "
        f"prompts. Denoiser error: of its output on the original's latents, relative.{notes}"
    )


def _count(items: Sequence[object], what: str) -> str:
    return f"{len(items)} {what}{'' if len(items) == 1 else 's'}"


def card_picture(content: Json, folder: Path, file: Path) -> None:
    """Draws the comparison in `folder` as one PNG: the original and every candidate that drew, at most 6 side by side.

    Raises:
        JobError: no candidate has pictures, one of them cannot be read, or `file` cannot be written.
    """
    found = {candidate["name"]: candidate for candidate in content["candidates"]}
    drawn = [found[name] for name in content["by_quality"] if found[name]["pictures"]]
    if not drawn:
        raise JobError(Problem("no candidate drew a picture", str(folder), expected="at least one that did"))
    chosen = chosen_prompts(content)
    headings = [f"{rank}: {content['sampling']['prompts'][prompt][:LONGEST_PROMPT]}" for prompt, rank in chosen.items()]
    places = [prompt * len(content["sampling"]["seeds"]) for prompt in chosen]  # the samples with the first seed
    original = _original(content, drawn[0], places, folder)
    sheets = [draw([original, *(_column(c, places, folder) for c in part)], headings) for part in _parts(drawn)]
    _write(file, lambda partial: stacked(sheets).save(partial, format="PNG", optimize=True))


def _write(file: Path, write: Callable[[Path], object]) -> None:
    """The file gets its name when it is whole."""
    partial = file.with_name(f"{file.name}.part")
    try:
        write(partial)
        os.replace(partial, file)
    except OSError as error:
        raise JobError(Problem("cannot write the card", str(file), got=error.strerror or str(error))) from error


def chosen_prompts(content: Json) -> dict[int, str]:
    """Prompt → worst, middle or best, by the mean LPIPS of all candidates' pictures of it; worst first."""
    seeds, prompts = len(content["sampling"]["seeds"]), len(content["sampling"]["prompts"])
    drew = [candidate for candidate in content["candidates"] if candidate["samples"]]
    scored = [c["samples"] for c in [c for c in drew if not c["tripwires"]] or drew]
    means = [
        fmean(s["lpips"] for samples in scored for s in samples[prompt * seeds : (prompt + 1) * seeds])
        for prompt in range(prompts)
    ]
    worst_first = sorted(range(prompts), key=lambda prompt: -means[prompt])
    ranks = {0: "worst", (prompts - 1) // 2: "middle", prompts - 1: "best"}
    if prompts < 3:
        ranks = {0: "worst", 1: "best"} if prompts == 2 else {0: "the only prompt"}
    return {worst_first[place]: rank for place, rank in ranks.items()}


def _parts(drawn: Sequence[Json]) -> list[Sequence[Json]]:
    """Equally long, as far as possible."""
    number = -(-len(drawn) // COLUMNS)
    length = -(-len(drawn) // number)
    return [drawn[start : start + length] for start in range(0, len(drawn), length)]


def _original(content: Json, candidate: Json, places: Sequence[int], folder: Path) -> Column:
    original = content["original"]
    pictures = _open(folder, original["pictures"], candidate, places)
    return Column(original["name"], f"original, {size(original['size_bytes'])}", pictures, [""] * len(places))


def _column(candidate: Json, places: Sequence[int], folder: Path) -> Column:
    pictures = _open(folder, candidate["pictures"], candidate, places)
    caption = size(candidate["size_bytes"]) + (", rejected" if candidate["tripwires"] else "")
    return Column(candidate["name"], caption, pictures, [_words(candidate["samples"][place]) for place in places])


def _words(sample: Json) -> str:
    same = sample["psnr"] == IDENTICAL
    return "identical" if same else f"LPIPS {words('lpips', Mean(sample['lpips'], None, None, 1))}"


def _open(folder: Path, name: str, candidate: Json, places: Sequence[int]) -> list[Image.Image]:
    return [open_picture(folder, f"{name}/{candidate['samples'][place]['picture']}") for place in places]
