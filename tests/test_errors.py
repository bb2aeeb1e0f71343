"""What an error looks like: nothing that was read can act on the terminal or pass for another line."""

from __future__ import annotations

from pathlib import Path

from click.testing import CliRunner

from bitroute.cli import main
from bitroute.errors import JobError, Problem, printable

PAINT = "a\x1b[31m\r\u202e\nnext: rm -rf /"
PLAIN = "a\\x1b[31m\\r\\u202e\\nnext: rm -rf /"


def test_what_cannot_be_printed_is_escaped_in_what_and_where() -> None:
    assert printable(PAINT) == PLAIN
    assert str(Problem(PAINT, PAINT)) == f"{PLAIN}: {PLAIN}"


def test_the_lines_of_a_detail_stand_below_each_other() -> None:
    words = str(JobError([Problem("x", got="one\x1b[0m\ntwo\u2028three", expected="y"), Problem("z")]))
    assert words == "x\n    got:      one\\x1b[0m\n              two\n              three\n    expected: y\nz"


def test_words_of_any_language_stay_as_they_are() -> None:
    assert str(Problem("模型 ö …", "/mödel 模型")) == "/mödel 模型: 模型 ö …"


def test_a_path_that_paints_the_terminal_is_shown_without_paint(source: Path) -> None:
    painted = source.rename(source.with_name("a\x1b[31mred"))
    (painted / "model_index.json").unlink()
    done = CliRunner().invoke(main, ["--recipe", "tiny-flux-fp8", "--model", str(painted), "--dry-run"])
    assert done.exit_code == 2
    assert "a\\x1b[31mred: not a diffusers pipeline folder" in done.stderr
    assert "\x1b" not in done.output
