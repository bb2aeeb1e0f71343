"""Which layers of a model can be measured: the linear ones and the convolutions of its denoisers, or as one asks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib import import_module

from bitroute.calibrate.budget import Layer
from bitroute.convert.architecture import build
from bitroute.convert.checkpoint import Component, Pipeline
from bitroute.convert.pattern import Layers, Pattern
from bitroute.errors import Problem, RecipeError, did_you_mean
from bitroute.eval.recording import DENOISERS

KEPT_IN_FLOAT32 = ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict")  # of the classes of both libraries


def find_layers(pipeline: Pipeline, components: Sequence[str], patterns: Sequence[str]) -> tuple[Layer, ...]:
    """The layers of these components (none: the denoisers) that one of the patterns matches (none: all of them).

    Raises:
        RecipeError: unknown components, or a pattern that matches nothing. SourceError: weights that do not belong to
            their class, or that are quantized already.
    """
    chosen = _components(pipeline, components)
    layers = [layer for component in chosen for layer in _layers(component)]
    names = Layers(list(dict.fromkeys(layer.name for layer in layers)))
    matched = set(names.names) if not patterns else set[str]()
    problems = []
    for pattern in patterns:
        found = names.matching(Pattern.parse(pattern))
        matched.update(found)
        if not found:
            near = did_you_mean(pattern, names.names) or f"for example {names.names[-1]!r}" if names.names else ""
            where = ", ".join(component.name for component in chosen)
            problems.append(Problem(f"{pattern!r} matches no layer of {where}", "--layers", next_step=near))
    if problems:
        raise RecipeError(problems)
    if not layers:
        raise RecipeError(Problem("there is no linear layer and no convolution to measure", pipeline.name))
    return tuple(layer for layer in layers if layer.name in matched)


def _components(pipeline: Pipeline, names: Sequence[str]) -> list[Component]:
    known = pipeline.components
    problems = [
        Problem(f"the pipeline has no component {name[:100]!r}", "--components", expected=f"one of {', '.join(known)}",
                next_step=did_you_mean(name, known))
        for name in names if name not in known
    ]  # fmt: skip
    found = [known[name] for name in names or DENOISERS if name in known]
    if not names and not found:
        mend = f"give --components: one or more of {', '.join(known)}"
        problems.append(Problem("the pipeline has no known denoiser", pipeline.name, next_step=mend))
    if problems:
        raise RecipeError(problems)
    return list(dict.fromkeys(found))


def _layers(component: Component) -> Iterator[Layer]:
    architecture = build(component)
    model_class = getattr(import_module(component.library), component.class_name)
    kept = [word for name in KEPT_IN_FLOAT32 for word in getattr(model_class, name, None) or ()]
    convolutions = set(architecture.convolutions)
    wanted = {*architecture.linear, *convolutions}
    for name in (name for name in architecture.layers if name in wanted):
        columns = architecture.sources[f"{name}.weight"].spec.rows.shape[1]
        item_bytes = 4 if any(word in name for word in kept) else 2
        yield Layer(component.name, name, columns, item_bytes, name in convolutions)
