"""What the layers of a class without a profile do, and which to keep: inferred from its modules, without weights.

A stack is a list of repeated blocks, outermost, with attention in it if the model has any. Inside a stack the names
decide and then the shapes; outside, what the names say and then the place: embedders come before the blocks, outputs
after them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import get_args

from torch import nn

from bitroute.convert.architecture import build, build_model
from bitroute.convert.checkpoint import Component, Pipeline
from bitroute.convert.document import read_text, shown
from bitroute.convert.profile import KeptLayers, Profile, Role, profiles
from bitroute.errors import Problem, RecipeError, did_you_mean

__all__ = ["Inference", "infer", "profile_text"]

FEED_FORWARD = re.compile(
    r"(^|_)(ff|ffn|mlp|net|wi|wo|fc|w\d)(_|\d|$)|feed_?forward|^(gate|up|down)(_up)?_proj$|^Dense"
)
ATTENTION = re.compile(r"attn|attention|(^|_)(q|k|v|qkv|kv)(_|$)", re.IGNORECASE)
MODULATION = re.compile(r"norm|modulation|(^|_)mod(_|\d|$)|ada_?ln|scale_shift|time_emb_proj|emb_layers", re.IGNORECASE)
OUTPUT = re.compile(r"(^|_)(out|final|head|last)(_|$)")
EMBEDDER = re.compile(r"emb|caption|(^|_)in$")
VISION = re.compile(r"vis(ion|ual)")
FUSED = 3  # an attention output this many times wider than what it gives takes the feed-forward's rows too
MODULATIONS = (3, 6, 9)  # vectors of shift, scale and gate that one block takes
SIDE_SHARE = 0.1  # of the weights in stacks: towers with less, apart from the model's own blocks, are kept
KEPT_SHOWN = 12  # patterns in the plan's note
DENOISERS = ("transformer", "unet")
SOURCE = "inferred from the modules"
WHY = {
    "embedder": "comes before the blocks: every token passes through it, or every block takes its output",
    "output": "comes after the blocks: nothing after it can correct its error",
    "modulation": "one for all blocks, so its error reaches every token",
    "side": "a tower of its own beside the blocks, with few of the weights",
    "float32": "the class itself keeps it in float32 (_keep_in_fp32_modules)",
}


@dataclass(frozen=True)
class Inference:
    """The profile, and what it was inferred from.

    stacks: list of blocks → how many; shares: role → its part of the linear weights; kept: their part that is kept.
    """

    profile: Profile
    stacks: Mapping[str, int]
    shares: Mapping[str, float]
    kept: float

    def words(self, keeps: bool) -> str:
        """For the plan, on one line: what was decided; keeps: whether the kept layers are asked for too."""
        blocks = ", ".join(f"{name} ({count})" for name, count in self.stacks.items())
        shares = ", ".join(f"{role} {share:.1%}" for role, share in self.shares.items())
        roles = f"of {self.profile.class_name} are inferred: blocks in {blocks}; {shares}"
        if not keeps:
            return f"roles {roles}"
        kept = [entry.layers for entry in self.profile.keep]
        more = f" and {len(kept) - KEPT_SHOWN} more" if len(kept) > KEPT_SHOWN else ""
        layers = ", ".join(kept[:KEPT_SHOWN]) + more or "nothing"
        return f"roles and kept layers {roles}; kept are {layers} ({self.kept:.1%} of the linear weights)"

    @property
    def text(self) -> str:
        """A profile file to edit."""
        profile = self.profile
        roles = [line for role, texts in profile.roles.items() for line in _role_lines(role, texts, self.shares[role])]
        kept = [
            f'  - layers: "{entry.layers}"\n    why: "{entry.why}"\n    source: {entry.source}'
            for entry in profile.keep
        ]
        return "\n".join(
            [
                f"# Inferred from the modules of {profile.class_name}: read it before you rely on it.",
                "# In a recipe, under the component: `profile: ./THIS_FILE.yaml`.",
                f"# Blocks: {', '.join(f'{name} ({count})' for name, count in self.stacks.items())}.",
                f"class: {profile.class_name}", f"about: {profile.about}", "",
                "# What the layers do, for `role:` in a rule; `*` crosses dots. In percent of the linear weights.",
                "roles:", *roles, "",
                f"# What `keep: profile` leaves as it is: {self.kept:.1%} of the linear weights. Norms, convolutions",
                "# and embedding tables are not linear layers and stay in any case.",
                "keep:" if kept else "keep: []", *kept, "",
                "notes:", *(f'  - "{note}"' for note in profile.notes), "",
            ]
        )  # fmt: skip


def infer(model: nn.Module) -> Inference | None:
    """The profile of a model on any device; None where no blocks repeat, so that nothing can be inferred."""
    tree = _Tree(model)
    if not tree.stacks:
        return None
    roles = {name: tree.role(name) for name in tree.linear}
    reasons = {name: reason for name in tree.linear if (reason := tree.reason(name, roles[name]))}
    weights = sum(tree.linear.values())
    shares = {role: tree.share(name for name in roles if roles[name] == role) for role in get_args(Role)}
    shares = {role: share for role, share in shares.items() if role in roles.values()}
    kept = sum(tree.linear[name] for name in reasons) / max(weights, 1)
    profile = _profile(tree, roles, reasons, shares)
    return Inference(profile, {name: len(tree.lists[name]) for name in tree.stacks}, shares, kept)


class _Tree:
    """linear: layer → weights, of those a backend can take; lists: lists of modules, by name."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        modules = dict(model.named_modules())
        self.layers = {name: part for name, part in modules.items() if name and type(part) is nn.Linear}
        self.linear = {name: part.in_features * part.out_features for name, part in self.layers.items()}
        self.lists = {
            name: part for name, part in modules.items() if name and isinstance(part, nn.ModuleList | nn.Sequential)
        }
        self.order = {name: place for place, name in enumerate(modules)}

    @cached_property
    def stacks(self) -> list[str]:
        attending = self._outermost(self._attends)
        if any(len(self.lists[name]) > 1 for name in attending):
            return attending
        return self._outermost(self._repeats)

    @cached_property
    def main(self) -> str:
        """The stack with the most weights."""
        return max(self.stacks, key=self._weights)

    @cached_property
    def own(self) -> list[str]:
        """The stacks of the model itself; a vision tower or a refiner is before the main one, elsewhere, and small."""
        parent, place = self.main.rpartition(".")[0], self.order[self.main]
        aside = [name for name in self.stacks if name.rpartition(".")[0] != parent and self.order[name] < place]
        share = sum(map(self._weights, aside)) / sum(map(self._weights, self.stacks))
        return [name for name in self.stacks if name not in aside or (share >= SIDE_SHARE and not VISION.search(name))]

    @cached_property
    def width(self) -> int:
        """Inputs per row of most layers of the main stack."""
        widths = Counter(self.layers[name].in_features for name in self._below(self.main))
        return widths.most_common(1)[0][0]

    def share(self, names: Iterable[str]) -> float:
        return sum(self.linear[name] for name in names) / max(sum(self.linear.values()), 1)

    def slot(self, name: str) -> str:
        """The name with `*` for the place in every list: the same in all blocks."""
        parts = name.split(".")
        places = [".".join(parts[:depth]) in self.lists for depth in range(len(parts))]
        inside = self.stack_of(name)
        return ".".join("*" if listed and inside else part for part, listed in zip(parts, places, strict=True))

    def stack_of(self, name: str) -> str:
        return next((stack for stack in self.stacks if name.startswith(f"{stack}.")), "")

    def role(self, name: str) -> Role:
        stack = self.stack_of(name)
        return self._role_inside(name.removeprefix(f"{stack}."), name) if stack else self._role_outside(name)

    def reason(self, name: str, role: str) -> str:
        """A key of WHY, or nothing where the layer may be quantized."""
        stack = self.stack_of(name)
        if not stack:
            return role
        if stack not in self.own:
            return "side"
        return "float32" if self._is_float32(name) else ""

    def _role_inside(self, path: str, name: str) -> Role:
        layer = self.layers[name]
        for part in reversed(path.split(".")):  # the innermost name that says something decides
            if FEED_FORWARD.search(part):
                return "feed-forward"
            if ATTENTION.search(part):
                fused = "out" in path and layer.in_features >= FUSED * layer.out_features
                return "feed-forward" if fused else "attention"
            if MODULATION.search(part):
                return "modulation"
        return "modulation" if self._modulates(layer) else "feed-forward"

    def _role_outside(self, name: str) -> Role:
        parts = name.split(".")
        if self._modulates(self.layers[name]):
            return "modulation"
        if any(OUTPUT.search(part) for part in parts):
            return "output"
        if any(MODULATION.search(part) for part in parts[-2:]):
            return "modulation"
        if any(EMBEDDER.search(part) for part in parts):
            return "embedder"
        return "output" if self.order[name] > max(self.order[stack] for stack in self.own) else "embedder"

    def _modulates(self, layer: nn.Linear) -> bool:
        return layer.in_features == self.width and layer.out_features in [k * self.width for k in MODULATIONS]

    def _is_float32(self, name: str) -> bool:
        wanted = [
            *(getattr(self.model, "_keep_in_fp32_modules", None) or []),
            *(getattr(self.model, "_keep_in_fp32_modules_strict", None) or []),
        ]
        return any(part in wanted for part in name.split("."))

    def _attends(self, stack: str) -> bool:
        return any(ATTENTION.search(name[len(stack) :]) for name in self._below(stack))

    def _repeats(self, stack: str) -> bool:
        """Whether two blocks have parameters of the same names and shapes; a layer alone is no block."""
        blocks = [child for child in self.lists[stack].children() if any(True for _ in child.children())]
        shapes = Counter(tuple((name, part.shape) for name, part in block.named_parameters()) for block in blocks)
        return bool(self._below(stack)) and max(shapes.values(), default=0) > 1

    def _outermost(self, wanted: Callable[[str], bool]) -> list[str]:
        found: list[str] = []
        for name in self.lists:  # a list comes before those in it
            if not any(name.startswith(f"{outer}.") for outer in found) and wanted(name):
                found.append(name)
        return found

    def _below(self, stack: str) -> list[str]:
        return [name for name in self.linear if name.startswith(f"{stack}.")]

    def _weights(self, stack: str) -> int:
        return sum(self.linear[name] for name in self._below(stack))


def profile_text(pipeline: Pipeline, name: str | None = None) -> tuple[str, str]:
    """The class of a component and its profile file: the built-in one, or one inferred.

    name: the component; by default the transformer or the unet.

    Raises:
        RecipeError: no such component, or nothing can be inferred. SourceError: it does not fit its class.
    """
    component = _component(pipeline, name)
    builtin = profiles().get(component.class_name)
    if builtin:
        return component.class_name, read_text(builtin, builtin.name)
    build(component)  # refuses weights that are not those of the class
    found = infer(build_model(component))
    if found is None:
        what = f"nothing can be inferred for {component.class_name}: no blocks with linear layers repeat in it"
        raise RecipeError(Problem(what, str(component.folder), next_step="list the layers to keep: `keep: [...]`"))
    return component.class_name, found.text


def _component(pipeline: Pipeline, name: str | None) -> Component:
    known = pipeline.components
    usual = known if pipeline.bare else DENOISERS
    chosen = name or next((part for part in usual if part in known), None)
    if chosen is None or chosen not in known:
        what = f"the pipeline has no component {shown(chosen)}" if chosen else "no component is named"
        near = did_you_mean(name, known) if name else ""
        raise RecipeError(Problem(what, str(pipeline.folder), expected=f"one of {', '.join(known)}", next_step=near))
    return known[chosen]


def _profile(
    tree: _Tree, roles: Mapping[str, Role], reasons: Mapping[str, str], shares: Mapping[str, float]
) -> Profile:
    """With the shortest patterns that say exactly this: `*` crosses dots and may reach too far."""
    slots = list(dict.fromkeys(map(tree.slot, roles)))
    ways: list[Callable[[list[str]], list[str]]] = [
        lambda names: _compact({*map(tree.slot, names)}, slots),
        lambda names: list(dict.fromkeys(map(tree.slot, names))),
    ]
    for write in ways:
        found = _written(tree, roles, reasons, shares, write)
        if found.roles_of(roles) == roles and found.kept(roles).keys() == reasons.keys():
            return found
    return _written(tree, roles, reasons, shares, list)


def _written(
    tree: _Tree, roles: Mapping[str, Role], reasons: Mapping[str, str], shares: Mapping[str, float],
    write: Callable[[list[str]], list[str]],
) -> Profile:  # fmt: skip
    kept = [
        KeptLayers.model_validate({"layers": text, "why": words, "source": SOURCE})
        for reason, words in WHY.items()
        if (names := [name for name in reasons if reasons[name] == reason])
        for text in write(names)
    ]
    notes = ["Inferred, not measured: compare pictures before you publish."]
    inside = tree.share(name for name, role in roles.items() if role == "modulation" and name not in reasons)
    if inside:
        notes.append(
            f"Modulation inside the blocks holds {inside:.0%} of the linear weights and is not kept: it sees one row "
            "per sample, so keep it at 8 bits or more, and without quantized activations."
        )
    written = {role: write([name for name in roles if roles[name] == role]) for role in shares}
    about = "inferred from the modules of the class"
    return Profile.model_validate(
        {"class": type(tree.model).__name__, "about": about, "roles": written, "keep": kept, "notes": notes}
    )


def _compact(names: set[str], everything: Sequence[str]) -> list[str]:
    """`prefix.*` for every largest part of the tree whose layers are all among `names`, else the name."""
    found: dict[str, None] = {}
    for name in everything:
        if name not in names:
            continue
        parts = name.split(".")
        for depth in range(1, len(parts) + 1):
            prefix = ".".join(parts[:depth])
            below = [other for other in everything if other.startswith(f"{prefix}.")]
            if depth == len(parts) or names.issuperset(below):
                found[f"{prefix}.*" if len(below) > 1 else name] = None
                break
    return list(found)


def _role_lines(role: str, texts: Sequence[str], share: float) -> list[str]:
    return [f"  {role}:  # {share:.1%}", *(f'    - "{text}"' for text in texts)]
