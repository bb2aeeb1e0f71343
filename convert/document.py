"""A YAML document whose every value remembers the line that said it.

Plain YAML only: no aliases, no tags, no duplicate keys, bounded in size and depth. Unquoted scalars follow
the YAML 1.2 core schema (https://yaml.org/spec/1.2.2/#103-core-schema), so `no` and `on` stay text.
"""

from __future__ import annotations

import errno
import os
import re
import shlex
import stat
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import TextIO

import yaml
from yaml.composer import ComposerError
from yaml.reader import ReaderError

from bitroute.errors import Problem, RecipeError, printable

__all__ = [
    "MAX_PROBLEMS",
    "SHOWN",
    "Finder",
    "KeyPath",
    "Value",
    "as_comments",
    "check_new",
    "compose",
    "parse",
    "printable",
    "read_text",
    "shown",
    "sorted_problems",
    "write_new",
]

KeyPath = tuple[str | int, ...]
Finder = Callable[[str, Path], tuple[Path, str] | None]  # a name, a folder → the file and how to call it

MAX_BYTES = 1 << 18  # a rule for each of 1500 layers takes half of it
MAX_NODES = 20_000  # keys and values; PyYAML reads them in about a second
MAX_DEPTH = 32
MAX_KEY_LENGTH = 100
MAX_CHAIN = 16  # recipes that extend each other
MAX_PROBLEMS = 50  # more are counted, not shown
SHOWN = 80  # characters of a value in an error
MESSAGE = 100  # characters of PyYAML's own words
_INT = re.compile(r"[-+]?[0-9]{1,18}")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]{1,3})?")
_WORDS = {"": None, "~": None, "null": None, "true": True, "false": False}


@dataclass(eq=False)
class Value:
    """A mapping, a list or a scalar, with the file and the line (from 1) that said it."""

    content: dict[str, Value] | list[Value] | str | int | float | bool | None
    file: str
    line: int

    @property
    def plain(self) -> object:
        """The same as dicts, lists and scalars."""
        if isinstance(self.content, dict):
            return {key: value.plain for key, value in self.content.items()}
        if isinstance(self.content, list):
            return [value.plain for value in self.content]
        return self.content

    def child(self, key: str | int) -> Value | None:
        if isinstance(self.content, dict):
            return self.content.get(str(key))
        if isinstance(self.content, list) and isinstance(key, int) and key < len(self.content):
            return self.content[key]
        return None

    def nearest(self, path: KeyPath) -> Value:
        """The value at `path`, or the nearest one above it that exists."""
        found = self
        for key in path:
            below = found.child(key)
            if below is None:
                break
            found = below
        return found

    def where(self, path: KeyPath = ()) -> str:
        """`flux-fp8.yaml:14` for the value at `path`, or for the nearest one above it."""
        found = self.nearest(path)
        return f"{found.file}:{found.line}"

    def remove(self, child: Value) -> None:
        if isinstance(self.content, dict):
            self.content = {key: value for key, value in self.content.items() if value is not child}
        elif isinstance(self.content, list):
            self.content = [value for value in self.content if value is not child]


def shown(value: object) -> str:
    """The value as an error shows it: on one line, escaped and never long."""
    if value is None:
        return "nothing"
    text = repr(value[: SHOWN + 1] if isinstance(value, str) else value)
    return text if len(text) <= SHOWN else text[: SHOWN - 3] + "..."


def sorted_problems(problems: Iterable[Problem]) -> list[Problem]:
    """By file and line where they have both, the others after them; the first MAX_PROBLEMS and a count of the rest."""
    ordered = sorted(problems, key=_place)
    more = len(ordered) - MAX_PROBLEMS
    if more <= 0:
        return ordered
    rest = Problem(f"and {more} more problem{'s' if more > 1 else ''}", next_step="mend these first")
    return [*ordered[:MAX_PROBLEMS], rest]


def _place(problem: Problem) -> tuple[bool, str, int]:
    file, _, line = problem.where.rpartition(":")
    return (False, file, int(line)) if line.isdecimal() else (True, "", 0)


def compose(path: Path, name: str, find: Finder) -> tuple[Value, str]:
    """The document in `path` on top of what it extends, and its text with the extended ones as comments.

    Raises:
        RecipeError: unreadable or not plain YAML, a parent that does not exist, a circle of parents or too many.
    """
    documents, text, chain = list[Value](), "", list[Path]()
    while True:
        own = read_text(path, name)
        document = parse(own, name)
        assert isinstance(document.content, dict)
        parent = document.content.pop("extends", None)
        text = f"{text.rstrip()}\n\n# extends {name}:\n{as_comments(own)}" if documents else own
        documents.append(document)
        chain.append(path.resolve())
        if parent is None:
            return reduce(_merge, reversed(documents)), text
        path, name = _find_parent(parent, find, path)
        _refuse_chain(chain, path, parent)


def _refuse_chain(chain: list[Path], path: Path, parent: Value) -> None:
    if path.resolve() in chain:
        circle = printable(" → ".join(step.name for step in (*chain, path)))
        raise RecipeError(Problem("recipes extend each other in a circle", parent.where(), got=circle))
    if len(chain) == MAX_CHAIN:
        what, expected = "too many recipes extend each other", f"at most {MAX_CHAIN} in a chain"
        raise RecipeError(Problem(what, parent.where(), expected=expected, next_step="put some into one file"))


def read_text(path: Path, name: str) -> str:
    """The text of a UTF-8 file of at most MAX_BYTES.

    Raises:
        RecipeError: it is no regular file (a pipe would be waited for), cannot be read, is too large or not UTF-8.
    """
    try:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):
            got = "a folder" if stat.S_ISDIR(mode) else "a pipe, a socket or a device"
            raise RecipeError(Problem("is not a file", name, got=got))
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else None
        raise RecipeError(Problem("cannot be read", name, got=reason or str(error))) from error
    if len(content) > MAX_BYTES:
        raise RecipeError(Problem("is too large for a recipe", name, expected=f"at most {MAX_BYTES} bytes"))
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        what = "is not text in UTF-8"
        raise RecipeError(Problem(what, f"{name}:{line}", got=f"the byte 0x{content[error.start]:02x}")) from None


def write_new(text: str, place: Path, name: str) -> Path:
    """Writes a new file at `place`, or of that name in the folder `place`; returns where it went.

    Raises:
        RecipeError: the file exists or cannot be written.
    """
    try:
        place = place / name if place.is_dir() else place
        with open(place, "x", encoding="utf-8", newline="") as stream:
            _write_or_remove(text, stream, place)
    except (OSError, ValueError) as error:
        raise RecipeError(_not_written(place, error)) from error
    return place


def _write_or_remove(text: str, stream: TextIO, place: Path) -> None:
    """Half a file, on a full disk, would be in the way of the next try."""
    try:
        stream.write(text)
        stream.flush()
    except BaseException:
        place.unlink()
        raise


def check_new(place: Path) -> None:
    """Raises RecipeError where `write_new` could not write such a file, as far as that shows without writing."""
    try:
        place.lstat()
    except FileNotFoundError as missing:
        if not place.parent.is_dir():
            raise RecipeError(_not_written(place, FileNotFoundError(missing.errno, "no such folder"))) from None
        if not os.access(place.parent, os.W_OK):
            raise RecipeError(_not_written(place, PermissionError(errno.EACCES, "the folder is read-only"))) from None
        return
    except (OSError, ValueError) as error:
        raise RecipeError(_not_written(place, error)) from error
    raise RecipeError(_not_written(place, FileExistsError()))


def _not_written(place: Path, error: OSError | ValueError) -> Problem:
    where = printable(str(place))
    if isinstance(error, FileExistsError):
        return Problem("the file exists already", where, next_step="give another name")
    missing = isinstance(error, FileNotFoundError) and not place.parent.exists()
    mend = f"make the folder first: mkdir -p {shlex.quote(printable(str(place.parent)))}" if missing else ""
    got = error.strerror if isinstance(error, OSError) else str(error)
    return Problem("cannot write the file", where, got=got or "", next_step=mend)


def parse(text: str, name: str) -> Value:
    """The mapping that `text` is.

    Raises:
        RecipeError: not plain YAML, not a mapping, or a key said twice; with the line.
    """
    try:
        node = _Loader(text).get_single_node()
        if isinstance(node, yaml.MappingNode):
            return _construct(node, name, 1)
    except ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise RecipeError(
            Problem("holds a character that YAML forbids", f"{name}:{line}", f"U+{error.character:04X}")
        ) from None
    except yaml.MarkedYAMLError as error:
        raise RecipeError(_yaml_problem(error, name)) from None
    except (ValueError, OverflowError) as error:  # escapes that stand for no character
        raise RecipeError(Problem("is not valid YAML", name, got=str(error)[:MESSAGE])) from None
    got = "nothing" if node is None else "a list" if isinstance(node, yaml.SequenceNode) else "a single value"
    raise RecipeError(Problem("is not a mapping", f"{name}:1", got=got, expected="`key: value` lines"))


class _Loader(yaml.BaseLoader):
    """Composes nodes without resolving them; refuses what a recipe never needs and an attacker would."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.depth = self.nodes = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        self.depth += 1
        self.nodes += 1
        refusals = {
            "aliases (*name) are not allowed": isinstance(event, yaml.AliasEvent),
            "tags (!name) are not allowed": getattr(event, "tag", None) is not None,
            f"it is nested deeper than {MAX_DEPTH} levels": self.depth > MAX_DEPTH,
            f"it holds more than {MAX_NODES} values": self.nodes > MAX_NODES,
        }
        for refusal, applies in refusals.items():
            if applies:
                raise ComposerError(None, None, refusal, event.start_mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


def _yaml_problem(error: yaml.MarkedYAMLError, name: str) -> Problem:
    mark = error.problem_mark or error.context_mark
    where = f"{name}:{mark.line + 1}" if mark else name
    message = ", ".join(part for part in (error.context, error.problem) if part)
    tab = "\\t" in message or "tab" in message
    if len(message) > MESSAGE:  # it quotes what it found
        message = message[:MESSAGE] + "..."
    return Problem("is not valid YAML: " + printable(message), where, next_step="indent with spaces" if tab else "")


def _construct(node: yaml.Node, name: str, line: int) -> Value:
    if isinstance(node, yaml.MappingNode):
        return Value(_mapping(node, name), name, line)
    if isinstance(node, yaml.SequenceNode):
        items = [_construct(item, name, item.start_mark.line + 1) for item in node.value]
        return Value(items, name, line)
    assert isinstance(node, yaml.ScalarNode)
    return Value(_scalar(node), name, line)


def _mapping(node: yaml.MappingNode, name: str) -> dict[str, Value]:
    content: dict[str, Value] = {}
    for key, value in node.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode):
            raise RecipeError(Problem("a key is not text", f"{name}:{line}", expected="a plain name"))
        key.value.encode()  # a lone surrogate is no text
        if len(key.value) > MAX_KEY_LENGTH:
            got, expected = shown(key.value), f"at most {MAX_KEY_LENGTH} characters"
            raise RecipeError(Problem("a key is too long", f"{name}:{line}", got, expected))
        if key.value in content:
            first = f"the first is in line {content[key.value].line}"
            raise RecipeError(Problem(f"the key {shown(key.value)} is said twice", f"{name}:{line}", got=first))
        content[key.value] = _construct(value, name, line)
    return content


def _scalar(node: yaml.ScalarNode) -> str | int | float | bool | None:
    text = str(node.value)
    text.encode()  # a lone surrogate is no text
    if node.style is not None:  # quoted, or a block
        return text
    if text in _WORDS:
        return _WORDS[text]
    if _INT.fullmatch(text):
        return int(text)
    return float(text) if _FLOAT.fullmatch(text) else text


def _find_parent(parent: Value, find: Finder, path: Path) -> tuple[Path, str]:
    if not isinstance(parent.content, str):
        got, expected = shown(parent.plain), "the name or the path of one recipe"
        raise RecipeError(Problem("`extends` does not name a recipe", parent.where(), got, expected))
    found = find(parent.content, path.parent)
    if found is None:
        raise RecipeError(
            Problem(
                f"extends {shown(parent.content)}, which does not exist",
                parent.where(),
                expected="a built-in recipe, or a path relative to this file",
                next_step="`quantize recipes list` shows the built-in ones",
            )
        )
    return found


def _merge(below: Value, above: Value) -> Value:
    """Mappings key by key, everything else replaced; options and method stay with the backend they were written for."""
    if not (isinstance(below.content, dict) and isinstance(above.content, dict)):
        return above
    merged = dict(below.content)
    if "backend" in above.content:
        merged = {key: value for key, value in merged.items() if key not in ("options", "method")}
    for key, value in above.content.items():
        merged[key] = _merge(merged[key], value) if key in merged else value
    return Value(merged, above.file, above.line)


def as_comments(text: str) -> str:
    return "".join(f"# {line}".rstrip() + "\n" for line in text.splitlines())
