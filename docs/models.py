"""The page of the models: families, sizes under each recipe, what is kept and why, pitfalls.

Sizes are those that tests/convert/sizes.yaml holds and a test compares with the plans of the full-size models;
published models and their parameters are the facts of tests/convert/families_*.yaml.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from bitroute.convert.profile import KINDS, KeptLayers, Profile, find_profile, profiles
from bitroute.convert.recipe import builtin_recipes, family_of, read_recipe
from bitroute.convert.table import size

FOLDER = Path(__file__).parent
FACTS = FOLDER.parent / "tests" / "convert"
HEAD = """\
Every family of models that has recipes of its own. `quantize recommend MODEL --vram 12GB` picks the recipe for a card.
A model of another class works too: what its layers do is inferred from its modules, and `quantize profile MODEL`
writes that down to be edited.

Sizes are those of the plan for the full-size model with bf16 weights; *whole* counts the components that are copied as
they are too, where their published config is known. Loading: "diffusers" is plain diffusers with the library of the
format; "bitroute" needs `import bitroute` too. "Config unsourced": no published config was found in the libraries'
sources, so the defaults of the class stand for it. Kinds of quantization: `8-bit` (weights alone), `w8a8` (8-bit
weights and activations), `4-bit` (weights of 4 to 6 bits).
"""
DENOISER_HEAD = "What their layers do (for `role:`), and which of them `keep: profile` leaves as they are.\n"
COLUMNS = ("recipe", "denoiser", "text encoders", "whole", "loading")
DENOISERS = ("transformer", "transformer_2", "unet")


def models_page(note: str) -> str:
    pipelines, sizes = _read("pipelines.yaml"), _read("sizes.yaml")
    facts = _facts()
    denoisers = {family: next(iter(parts.values()))[0] for family, parts in pipelines.items()}
    others = [found for name, found in _profiles().items() if name not in denoisers.values()]
    return "\n".join(
        [
            "# Models\n", note, HEAD, _contents(pipelines, denoisers),
            *(line for family in sorted(pipelines) for line in _family(family, pipelines[family], sizes, facts)),
            "## Profiles of the denoisers\n", DENOISER_HEAD,
            *(_profile(_profiles()[name]) for name in dict.fromkeys(denoisers.values())),
            "## Other profiles\n\nText encoders, VAEs, ControlNets and further denoisers.\n",
            *(_profile(found) for found in others),
            "## Failures of the libraries\n", *_failures(),
        ]
    )  # fmt: skip


def _contents(pipelines: Mapping[str, Any], denoisers: Mapping[str, str]) -> str:
    links = [f"[{family}](#{family}) ([profile](#{denoisers[family].lower()}))" for family in sorted(pipelines)]
    return " · ".join([*links, "[other profiles](#other-profiles)", "[failures](#failures-of-the-libraries)"]) + "\n"


def _read(name: str) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((FACTS / name).read_text(encoding="utf-8"))
    return content


def _facts() -> dict[str, dict[str, Any]]:
    """Class → published model → its facts."""
    found: dict[str, dict[str, Any]] = {}
    for file in sorted(FACTS.glob("families_*.yaml")):
        if not file.stem.endswith("_cases"):
            for class_name, models in _read(file.name).items():
                found.setdefault(class_name, {}).update(models)
    return found


def _profiles() -> dict[str, Profile]:
    return {name: found for name in profiles() if (found := find_profile(name))}


def _family(family: str, parts: Mapping[str, Any], sizes: Mapping[str, Any], facts: Mapping[str, Any]) -> Iterator[str]:
    names = [name for name in builtin_recipes() if family_of(name) == family]
    recipe = read_recipe(names[0]).recipe
    yield f"## {family}\n\n{recipe.model if recipe else ''}\n"
    yield "| component | class | published model | parameters |\n|---|---|---|--:|"
    for component, (class_name, model) in parts.items():
        yield _component(component, class_name, model, facts)
    yield f"\n| {' | '.join(COLUMNS)} |\n|---|--:|--:|--:|---|"
    whole = {component: _bytes(entry, facts) for component, entry in parts.items()}
    yield _row("as it is", whole, "diffusers")
    for name in names:
        if name in sizes:
            after = {component: sizes[name].get(component, {}).get("after", whole[component]) for component in parts}
            native = all(entry["container"] != "bitroute" for entry in sizes[name].values())
            yield _row(f"`{name}`", after, "diffusers" if native else "bitroute")
    yield ""


def _component(component: str, class_name: str, model: Any, facts: Mapping[str, Any]) -> str:
    named = model if isinstance(model, str) else ""
    known = facts[class_name][named] if named else {}
    parameters = f"{known['parameters'] / 1e9:.3f} B" if named else ""
    unsourced = " (config unsourced)" if "unsourced" in str(known.get("source", "")) else ""
    return f"| {component} | {class_name} | {named}{unsourced} | {parameters} |"


def _bytes(entry: Sequence[Any], facts: Mapping[str, Any]) -> int:
    class_name, model = entry
    if not isinstance(model, str):
        return 0
    known = facts[class_name][model]
    return 2 * int(known.get("stored", known["parameters"]))


def _row(name: str, sizes: Mapping[str, int], loading: str) -> str:
    denoiser = sum(found for component, found in sizes.items() if component in DENOISERS)
    texts = sum(found for component, found in sizes.items() if component.startswith("text_encoder"))
    cells = (name, size(denoiser), size(texts), size(sum(sizes.values())), loading)
    return f"| {' | '.join(cells)} |"


def _profile(profile: Profile) -> str:
    roles = [f"| {role} | {_patterns(texts)} |" for role, texts in profile.roles.items()]
    kept = [f"| {_patterns([e.layers])} | {_kinds(e)} | {e.why} | {e.source} |" for e in profile.keep]
    return "\n".join(
        [
            f"### {profile.class_name}\n", f"{profile.about[:1].upper()}{profile.about[1:]}.\n",
            *(["| role | layers |", "|---|---|", *roles, ""] if roles else []),
            *(["| kept | in | why | source |", "|---|---|---|---|", *kept, ""] if kept else []),
            *(f"- {note}" for note in profile.notes), "",
        ]
    )  # fmt: skip


def _kinds(entry: KeptLayers) -> str:
    return "every kind" if set(entry.kinds) == set(KINDS) else ", ".join(entry.kinds)


def _patterns(texts: Iterable[str]) -> str:
    return ", ".join(f"`{text}`" for text in texts).replace("|", "\\|")


def _failures() -> Iterator[str]:
    """What diffusers and the formats' libraries themselves get wrong, seen by running them."""
    content = yaml.safe_load((FOLDER / "known-failures.yaml").read_text(encoding="utf-8"))
    for entry in content:
        versions = ", ".join(f"{library} {version}" for library, version in entry["versions"].items())
        error = f" `{entry['error']}`" if entry["error"] else ""
        yield f"- {entry['class']}: {entry['what']}.{error} ({entry['where']}; {versions})"
