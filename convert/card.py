"""The model card of a checkpoint: what was made of what, how to load it, how good it is, what it needs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from jinja2 import Environment, PackageLoader, StrictUndefined

from bitroute.convert.bare import INDEX
from bitroute.convert.checkpoint import STEMS, Component
from bitroute.convert.copies import WEIGHTS
from bitroute.convert.hub import PAGE
from bitroute.convert.markdown import escaped, fenced, table
from bitroute.convert.origin import Origin
from bitroute.convert.quality import Quality
from bitroute.convert.reading import read_json
from bitroute.convert.record import Record, RecordedComponent, RecordedEntry
from bitroute.convert.snippet import Trial, needs_bitroute, recorded_code
from bitroute.convert.table import size
from bitroute.errors import SourceError

PICTURE = "report.png"
TITLES = ("component", "stored as", "backend", "layers", "bits per weight", "size before → after")
REST = "not quantized"  # norms, embeddings, biases, and the layers that the recipe keeps


class _Markdown(str):
    """Text that is Markdown already."""


@dataclass(frozen=True)
class CardInputs:
    """What a card is made of."""

    folder: Path
    record: Record
    origin: Origin
    trial: Trial
    quality: Quality | None = None


def model_card(given: CardInputs, repo: str, revision: str | None = None) -> str:
    """README.md for the repository; every word that comes from a recipe, a report or another card is escaped.

    revision: the branch that it is for, where it is not the default one.

    Raises:
        SourceError: the checkpoint's record or index was damaged.
    """
    content = read_json(given.folder / "bitroute.json")
    plan, record, origin = content["plan"], given.record, given.origin
    index = {} if record.bare else read_json(given.folder / INDEX)
    resident = component_bytes(record, given.folder, index)
    body = _environment().get_template("card.md.j2").render(
        title=repo.rpartition("/")[2], origin=origin, trial=given.trial, bare=record.bare,
        link=_Markdown(f"{PAGE}{origin.repo}"), devices=plan["devices"],
        sizes=_Markdown(_from_to(plan["source_bytes"], plan["size_bytes"])),
        ratio=f"{plan['size_bytes'] / max(plan['source_bytes'], 1):.0%}",
        code=_Markdown(fenced(recorded_code(record, repo, revision), "python")),
        install=_Markdown(fenced(_install(plan["packages"]), "sh")), needs_bitroute=needs_bitroute(record),
        parts=_Markdown(table(TITLES, _rows(record, resident))),
        quality=given.quality, table=_Markdown(given.quality.table if given.quality else ""),
        memory=[_Markdown(size(bytes_)) for bytes_ in (sum(resident.values()), max(resident.values(), default=0))],
        bitroute=content["bitroute"], libraries=_libraries(content["libraries"]),
        recipe_name=content["recipe"]["name"], recipe=_Markdown(fenced(content["recipe"]["text"], "yaml")),
        licence=_Markdown(_licence(given)),
    )  # fmt: skip
    return f"---\n{metadata(record, origin, index).to_yaml()}\n---\n\n{body.strip()}\n"


def metadata(record: Record, origin: Origin, index: Mapping[str, Any]) -> ModelCardData:
    """The keys that the Hub reads, as https://huggingface.co/docs/hub/model-cards has them."""
    formats = {entry.backend.name for c in record.components for entry in c.entries if entry.quantized}
    containers = {component.container for component in record.components} - {"plain", "bitroute"}
    relation: dict[str, Any] = {"base_model_relation": "quantized"} if origin.repo else {}
    return ModelCardData(
        base_model=origin.repo, **relation, **origin.license,
        library_name=record.bare.library if record.bare else "diffusers",
        pipeline_tag=pipeline_tag(str(index.get("_class_name"))), tags=["bitroute", *sorted(containers | formats)],
    )  # fmt: skip


def pipeline_tag(class_name: str) -> str | None:
    """The Hub's task of a pipeline class, by the lists of diffusers; None where they do not have it."""
    from diffusers.pipelines import auto_pipeline as known

    tasks = {
        "text-to-image": known.AUTO_TEXT2IMAGE_PIPELINES_MAPPING,
        "text-to-video": known.AUTO_TEXT2VIDEO_PIPELINES_MAPPING,
        "text-to-audio": known.AUTO_TEXT2AUDIO_PIPELINES_MAPPING,
        "image-to-image": known.AUTO_IMAGE2IMAGE_PIPELINES_MAPPING | known.AUTO_INPAINT_PIPELINES_MAPPING,
        "image-to-video": known.AUTO_IMAGE2VIDEO_PIPELINES_MAPPING,
        "video-to-video": known.AUTO_VIDEO2VIDEO_PIPELINES_MAPPING,
    }
    found = [task for task, classes in tasks.items() if class_name in {entry.__name__ for entry in classes.values()}]
    return found[0] if found else None


def component_bytes(record: Record, folder: Path, index: Mapping[str, Any]) -> dict[str, int]:
    """Component → bytes of its tensors once loaded: as stored where quantized, else in bfloat16."""
    found = {component.name: component.size_bytes for component in record.components}
    for name in sorted({file.partition("/")[0] for file in record.copied if file.endswith(WEIGHTS)}):
        entry = index.get(name)
        if name not in found and isinstance(entry, list) and len(entry) == 2 and entry[0] in STEMS:
            found[name] = _copied_bytes(Component(name, entry[0], str(entry[1]), folder / name), record)
    return found


def _copied_bytes(component: Component, record: Record) -> int:
    try:
        specs = [tensor.spec for tensor in component.tensors.values()]
    except SourceError:  # weights that are no safetensors
        return sum(bytes_ for file, bytes_ in record.copied.items() if file.startswith(f"{component.name}/"))
    return sum(spec.numel * (min(spec.dtype.itemsize, 2) if spec.dtype.is_floating_point else spec.dtype.itemsize)
               for spec in specs)  # fmt: skip


def _rows(record: Record, resident: Mapping[str, int]) -> Iterable[Sequence[str]]:
    for component in record.components:
        yield from _component_rows(component)
    converted = {component.name for component in record.components}
    for name, size_bytes in resident.items():
        if name not in converted:
            yield escaped(name), "copied unchanged", "", "", "", size(size_bytes)


def _component_rows(component: RecordedComponent) -> Iterable[Sequence[str]]:
    groups: dict[str, list[RecordedEntry]] = {}
    for entry in sorted(component.entries, key=lambda entry: not entry.quantized):
        groups.setdefault(_label(entry), []).append(entry)
    for label, entries in groups.items():
        count = str(len(entries)) if entries[0].quantized else f"{len(entries)} tensors"
        yield escaped(component.name), escaped(component.container), escaped(label), count, *_sizes(entries)
    yield escaped(component.name), "", "in all", "", *_sizes(component.entries)


def _label(entry: RecordedEntry) -> str:
    return str(entry.backend) if entry.quantized else REST


def _sizes(entries: Sequence[RecordedEntry]) -> tuple[str, str]:
    before = sum(entry.weight.size_bytes for entry in entries)
    after = sum(spec.size_bytes for entry in entries for _, spec in entry.tensors.values())
    elements = sum(entry.weight.numel for entry in entries)
    return f"{8 * after / max(elements, 1):.2f}", _from_to(before, after)


def _from_to(before: int, after: int) -> str:
    return f"{size(before)} → {size(after)}"


def _install(packages: Sequence[str]) -> str:
    return f"pip install {' '.join(sorted({'torch', 'accelerate', *packages}))}"


def _libraries(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def _licence(given: CardInputs) -> str:
    """What of the base's licence goes along."""
    files = [file for file in given.record.copied if "/" not in file]
    said = given.origin.license.get("license_name") or given.origin.license.get("license", "")
    name = escaped(given.origin.name)
    words = [f"That of {name}: {escaped(said)}." if said else f"The card of {name} names none."]
    words += ["The files of the original go along: " + ", ".join(map(escaped, files)) + "."] if files else []
    return " ".join(words)


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("bitroute.convert", "."), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        autoescape=False, keep_trailing_newline=True,
        finalize=lambda value: value if isinstance(value, _Markdown) else escaped(str(value)),
    )  # fmt: skip
    return environment
