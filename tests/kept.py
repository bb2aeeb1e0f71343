"""What the profiles keep of every published model; `python tests/kept.py` writes it to tests/convert/kept.yaml.

A test compares the file with the profiles, so that a change of a profile shows in the diff what it keeps more or less.
"""

from __future__ import annotations

from collections.abc import Iterable

import yaml
from families import DATA, on_meta, profile_of, published, weighted
from torch import nn
from torch.nn.modules.conv import _ConvNd

from bitroute.convert.fold import fold
from bitroute.convert.profile import EVERY_KIND, KINDS

FILE = DATA / "kept.yaml"
HEAD = """\
# The layers that the profiles keep of every published model: in every kind of quantization, and in some kinds more.
# Written by `python tests/kept.py`; do not edit.
"""
Kept = dict[str, list[str]]


def kept_layers(class_name: str, model: str) -> Kept:
    """Kind of quantization → the layers that are kept in it; what all kinds keep stands under `always`."""
    config = published()[class_name][model]["config"]
    parts = weighted(on_meta(class_name, config))
    layers = [name for name, part in parts.items() if isinstance(part, (nn.Linear, _ConvNd))]
    kept = profile_of(class_name).kept(layers)
    always = [name for name in layers if kept.get(name) == EVERY_KIND]
    more = {kind: [name for name in layers if kind in kept.get(name, ()) and name not in set(always)] for kind in KINDS}
    return {"always": _folded(always), **{kind: _folded(names) for kind, names in more.items() if names}}


def _folded(names: Iterable[str]) -> list[str]:
    return [str(found) for found in fold(names)]


def main() -> None:
    found = {name: {model: kept_layers(name, model) for model in models} for name, models in published().items()}
    FILE.write_text(HEAD + yaml.safe_dump(found, sort_keys=False, width=160, default_flow_style=None), encoding="utf-8")


if __name__ == "__main__":
    main()
