"""What the profiles keep, layer by layer, against the list that is under version control."""

from __future__ import annotations

import pytest
import yaml
from families import published
from kept import FILE, Kept, kept_layers

from bitroute.convert.profile import profiles

LISTED: dict[str, dict[str, Kept]] = yaml.safe_load(FILE.read_text(encoding="utf-8"))
MODELS = [(class_name, model) for class_name, models in published().items() for model in models]


def test_every_published_model_of_every_profile_is_listed() -> None:
    assert [(class_name, model) for class_name, models in LISTED.items() for model in models] == MODELS
    assert set(profiles()) <= set(LISTED)


@pytest.mark.parametrize(("class_name", "model"), MODELS)
def test_the_kept_layers_are_exactly_the_listed_ones(class_name: str, model: str) -> None:
    assert kept_layers(class_name, model) == LISTED[class_name][model]
