"""Measurements survive whatever ends a search, and are never mixed with those of another one."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from bitroute.calibrate.search_journal import MEASUREMENTS, Journal
from bitroute.errors import JobError, RecipeError

SETTINGS = {"model": "tiny", "number of samples": 4}


def test_what_was_measured_is_known_again_bit_for_bit(tmp_path: Path) -> None:
    first = Journal(tmp_path / "work", SETTINGS)
    first.add("proj_out int8", 0.1 + 0.2)
    first.add("proj_out nvfp4", math.inf)
    assert Journal(tmp_path / "work", SETTINGS).errors == {"proj_out int8": 0.1 + 0.2, "proj_out nvfp4": math.inf}


@pytest.mark.parametrize("cut", [1, 9, 20])
def test_a_line_that_was_cut_off_is_dropped_and_written_over(tmp_path: Path, cut: int) -> None:
    journal = Journal(tmp_path, SETTINGS)
    journal.add("a", 1.0)
    journal.add("b", 2.0)
    file = tmp_path / MEASUREMENTS
    file.write_bytes(file.read_bytes()[:-cut])
    again = Journal(tmp_path, SETTINGS)
    assert again.errors == {"a": 1.0}
    again.add("c", 3.0)
    assert Journal(tmp_path, SETTINGS).errors == {"a": 1.0, "c": 3.0}


def test_other_settings_are_refused_by_name(tmp_path: Path) -> None:
    Journal(tmp_path, SETTINGS).add("a", 1.0)
    with pytest.raises(RecipeError, match="begun with another number of samples") as refused:
        Journal(tmp_path, {**SETTINGS, "number of samples": 8})
    assert len(refused.value.problems) == 1


@pytest.mark.parametrize("text", ["[]\n", '{"settings": 3}\n', "\xff\n", '{"settings": {}}\nno\n', "{" * 9999 + "\n"])
def test_another_file_of_that_name_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / MEASUREMENTS).write_text(text, encoding="latin-1")
    with pytest.raises(RecipeError):
        Journal(tmp_path, SETTINGS)


def test_a_folder_that_cannot_be_made_is_an_error_with_its_name(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(JobError, match="cannot keep measurements"):
        Journal(tmp_path / "file" / "work", SETTINGS)


@pytest.mark.parametrize("error", ["-0.5", "NaN", "Infinity", "-Infinity", '"0.1"', "true", "[1]", "1e400"])
def test_what_is_no_squared_error_is_refused_with_the_file(tmp_path: Path, error: str) -> None:
    Journal(tmp_path, SETTINGS)
    with (tmp_path / MEASUREMENTS).open("a") as stream:
        stream.write(f'{{"what": "a", "squared_error": {error}}}\n')
    with pytest.raises(RecipeError, match=r"measurements\.jsonl: not the measurements"):
        Journal(tmp_path, SETTINGS)
