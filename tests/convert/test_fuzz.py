"""Thousands of damaged recipes and headers: an answer or an error with a place, in bounded time and memory."""

from __future__ import annotations

import functools
import json
import resource
import signal
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import pytest
import safetensors
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from bitroute import plan
from bitroute.backends.base import CODES
from bitroute.convert import architecture
from bitroute.convert import plan as planning
from bitroute.convert.layout import read_header
from bitroute.convert.recipe import builtin_recipes
from bitroute.errors import BitrouteError

EXAMPLES = 2000
CPU_S = 2.0  # for one example; of this process, so that a busy machine does not matter
GROWTH_BYTES = 2**30
FUZZ = settings(
    max_examples=EXAMPLES, derandomize=True, deadline=None, database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)  # fmt: skip


@contextmanager
def bounded() -> Iterator[None]:
    """Fails what computes for longer than CPU_S, and what needs GROWTH_BYTES more memory than before."""
    own = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGPROF, _too_long)
    resource.setrlimit(resource.RLIMIT_AS, (own + GROWTH_BYTES, hard))
    signal.setitimer(signal.ITIMER_PROF, CPU_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGPROF, before)


def _too_long(number: int, frame: FrameType | None) -> NoReturn:
    raise TimeoutError(f"more than {CPU_S} s")


def check_words(error: BitrouteError, place: str) -> None:
    """Every problem says what, one says where, and nothing can paint the terminal or flood it."""
    assert all(problem.what for problem in error.problems)
    assert any(place in problem.where for problem in error.problems)
    for line in str(error).splitlines():
        assert line.isprintable() and len(line) < 1000


# --- recipes ---

SCALARS = [
    "", "~", "null", "true", "no", "0", "-1", "1e999", ".nan", "9" * 400, "2020-01-01", "x" * 3000, "'", '"', "'\\0'",
    '"\\0"', '"\\ud800"', "\u202e", "\x00", "\x85", "é", "*a", "&a x", "!!python/object/apply:os.system [true]", "!x",
    "[]", "{}", "[[[[]]]]", "{a: {b: [c]}}", "{<<: *a}", "<<", "{", "]", "- x", "? x", "|", ">-", "%YAML", "@", "`",
    "#", "int8", "float8", "nvfp4", "keep", "none", "profile", "../x", "/dev/zero", "re:(a+)+$", "re:[", "{0-",
    "{5-1}", "*" * 300, "transformer", "{backend: int8}", "[int8, nf4]", "{scale: mse}",
]  # fmt: skip
LINES = [
    "a: &a [x, x]", "b: *a", "---", "...", "\t", "%TAG ! x", "- x", "components:", "extends: tiny-flux-fp8",
    "extends: recipe.yaml", "model: nowhere", "  transformer: {backend: int8}",
    "    rules: [{layers: '*', backend: keep}]", "eval: {prompts: x}", "    options: {scale: mse}", "a: " + "[" * 200,
    "a: " + "{a: " * 200, "? " * 50, "  " * 60 + "x: 1",
]  # fmt: skip
Edit = Callable[[list[str], int, int], None]  # changes the lines; where, and which of the values above


def _delete(lines: list[str], at: int, which: int) -> None:
    del lines[at]


def _repeat(lines: list[str], at: int, which: int) -> None:
    lines.insert(at, lines[at])


def _swap(lines: list[str], at: int, which: int) -> None:
    other = which % len(lines)
    lines[at], lines[other] = lines[other], lines[at]


def _set_scalar(lines: list[str], at: int, which: int) -> None:
    lines[at] = lines[at].partition(":")[0] + ": " + SCALARS[which % len(SCALARS)]


def _set_key(lines: list[str], at: int, which: int) -> None:
    lines[at] = SCALARS[which % len(SCALARS)] + ":" + lines[at].partition(":")[2]


def _indent(lines: list[str], at: int, which: int) -> None:
    lines[at] = " " * (which % 9) + lines[at].lstrip()


def _insert_line(lines: list[str], at: int, which: int) -> None:
    lines.insert(at, LINES[which % len(LINES)])


def _insert_text(lines: list[str], at: int, which: int) -> None:
    column = which % (len(lines[at]) + 1)
    lines[at] = lines[at][:column] + SCALARS[which % len(SCALARS)] + lines[at][column:]


def _cut(lines: list[str], at: int, which: int) -> None:
    lines[at] = lines[at][: which % (len(lines[at]) + 1)]


EDITS: list[Edit] = [_delete, _repeat, _swap, _set_scalar, _set_key, _indent, _insert_line, _insert_text, _cut]
RECIPES = [path.read_text(encoding="utf-8").splitlines() for path in builtin_recipes().values()]
PLACES = st.integers(0, 9999)


@pytest.fixture(scope="module")
def planned_quickly() -> Iterator[None]:
    """The same model for every recipe: it is looked at once."""
    with pytest.MonkeyPatch.context() as patch:
        build = architecture.build
        built = functools.cache(lambda folder, component: build(component))
        patch.setattr(planning, "build", lambda component: built(component.folder, component))
        plan("tiny-flux-mixed")
        yield


@given(st.sampled_from(RECIPES), st.lists(st.tuples(st.sampled_from(EDITS), PLACES, PLACES), min_size=1, max_size=3))
@FUZZ
def test_any_damage_to_a_recipe_gives_a_plan_or_an_error_with_its_place(
    tmp_path: Path, planned_quickly: None, recipe: list[str], edits: list[tuple[Edit, int, int]]
) -> None:
    lines = list(recipe)
    for edit, at, which in edits:
        if lines:
            edit(lines, at % len(lines), which)
    file = tmp_path / "recipe.yaml"
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    try:
        with bounded():
            planned = plan(str(file), "builtin:tiny-flux")
    except BitrouteError as error:
        check_words(error, "recipe.yaml")
    else:
        assert planned.size_bytes > 0


# --- headers ---

TENSORS = {
    "block.0.weight": torch.zeros(4, 8, dtype=torch.bfloat16),
    "block.0.bias": torch.zeros(4),
    "empty": torch.zeros(0, 3),
    "scale": torch.zeros(()),
}
SOUND = save(TENSORS, {"format": "pt"})
LENGTH = struct.unpack("<Q", SOUND[:8])[0]
VALUES = [
    "null", "true", "0", "-1", "1", str(2**31), str(2**63), str(2**64), "9" * 400, "0.5", "1e308", "NaN", '""',
    '"F32"', '"F7"', json.dumps("x" * 5000), json.dumps("\u202e"), json.dumps("\ud800"), "[]", "{}", "[0, 0]",
    "[-1, 4]", f"[0, {2**64}]", "[4, 8]", "[8, 4]", json.dumps([1] * 100), "[[]]", '{"dtype": "F32"}',
    '"__metadata__"', '"scale"', "[" * 50 + "]" * 50, '{"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}',
    '{"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}',
]  # fmt: skip
BYTES = [b'"', b"[[", b"{}", b"\xff\xfe", b"\0", b"1e9", b"NaN", b"-", b" ", b"\\u"]


def _containers(value: Any) -> Iterator[Any]:
    """Every mapping and list in it that is not empty."""
    if isinstance(value, dict | list) and value:
        yield value
        for child in value.values() if isinstance(value, dict) else value:
            yield from _containers(child)


def _damage_json(header: dict[str, Any], what: str, at: int, which: int) -> None:
    """One value of the header, of an entry or of a list is set, removed, or moved to another name."""
    containers = list(_containers(header)) or [{"": 0}]
    container = containers[at % len(containers)]
    key = list(container)[which % len(container)] if isinstance(container, dict) else which % len(container)
    value = json.loads(VALUES[(at + which) % len(VALUES)])
    if what == "remove":
        del container[key]
    elif what == "rename" and isinstance(container, dict):
        container[str(value)[:5000]] = container.pop(key)
    else:
        container[key] = value


def _damage_bytes(content: bytearray, what: str, at: int, which: int) -> None:
    """A bit flipped, bytes cut out, doubled or overwritten in the header, or another length before it."""
    place = at % min(len(content), 8 + LENGTH) if content else 0
    piece = content[place : place + which % 40]
    if what == "flip" and content:
        content[place] ^= 1 << which % 8
    elif what == "cut":
        del content[place : place + len(piece)]
    elif what == "double":
        content[place:place] = piece
    elif what == "overwrite":
        content[place : place + 4] = BYTES[which % len(BYTES)]
    else:
        content[:8] = struct.pack("<Q", which * at**4 % 2**64)


def damaged_json(damages: list[tuple[str, int, int]]) -> bytes:
    header = json.loads(SOUND[8 : 8 + LENGTH])
    for damage in damages:
        _damage_json(header, *damage)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + SOUND[8 + LENGTH :]


def damaged_bytes(damages: list[tuple[str, int, int]]) -> bytes:
    content = bytearray(SOUND)
    for damage in damages:
        _damage_bytes(content, *damage)
    return bytes(content)


def damages(*kinds: str) -> st.SearchStrategy[list[tuple[str, int, int]]]:
    return st.lists(st.tuples(st.sampled_from(kinds), PLACES, PLACES), min_size=1, max_size=3)


@given(
    damages("set", "remove", "rename").map(damaged_json)
    | damages("flip", "cut", "double", "overwrite", "length").map(damaged_bytes)
)
@FUZZ
def test_any_damage_to_a_header_is_refused_with_its_file_or_read_as_the_library_reads_it(
    tmp_path: Path, content: bytes
) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    try:
        with bounded():
            found = read_header(file)
    except BitrouteError as error:
        check_words(error, "model.safetensors")
        return
    library = dict(safetensors.deserialize(content))  # type: ignore[no-untyped-call]
    read = {name: (CODES[t.spec.dtype], list(t.spec.shape)) for name, t in found.tensors.items()}
    assert read == {name: (entry["dtype"], entry["shape"]) for name, entry in library.items()}
