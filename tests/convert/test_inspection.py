"""inspect: all that is there, in words that do nothing but stand there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from bitroute.convert.inspection import inspect, inspection_text
from bitroute.errors import SourceError


@pytest.mark.parametrize("part", ["vae", "."])
def test_a_folder_that_cannot_be_read_is_named(
    source: Path, part: str, locked: Callable[[Path], AbstractContextManager[None]]
) -> None:
    with locked(source / part), pytest.raises(SourceError) as refused:
        inspect(source)
    assert str(refused.value).startswith(f"{source / part}: the folder cannot be read\n    got:      Permission denied")


def test_nothing_in_a_checkpoint_acts_on_the_terminal(output: Path) -> None:
    paint = "a\x1b[31m\nb"
    file = output / "transformer" / "config.json"
    config = json.loads(file.read_text())
    layers = {"layers": {paint: [paint]}}
    config |= {"_class_name": paint, "quantization_config": {"quant_method": paint, "bitroute": layers}}
    file.write_text(json.dumps(config))
    record = json.loads((output / "bitroute.json").read_text())
    (output / "bitroute.json").write_text(json.dumps({**record, "bitroute": paint, "source": {"model": paint}}))
    (output / "transformer").rename(output / f"x{paint}")
    lines = inspection_text(inspect(output)).split("\n")
    assert all(map(str.isprintable, lines))
    assert r"xa\x1b[31m\nb: a\x1b[31m\nb, a\x1b[31m\nb" in lines
    assert r"made by bitroute a\x1b[31m\nb from a\x1b[31m\nb" in lines
    assert r"  a\x1b[31m\nb: a\x1b[31m\nb" in lines


def test_the_path_of_a_file_does_not_act_on_the_terminal(tiny: Path, tmp_path: Path) -> None:
    file = shutil.copy(tiny / "text_encoder" / "model.safetensors", tmp_path / "a\x1b[31m.safetensors")
    assert inspection_text(inspect(file)).startswith(f"{tmp_path}/a\\x1b[31m.safetensors\n")
