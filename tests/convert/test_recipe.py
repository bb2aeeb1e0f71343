"""Recipes: every problem at once with its line, composition, and no input that does more than be refused."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bitroute.convert.recipe import RecipeFile, builtin_recipes, copy_recipe, read_recipe
from bitroute.convert.schema import ComponentRecipe, Recipe, Rule
from bitroute.errors import RecipeError

GOOD = """\
model: someone/model
components:
  transformer:
    backend: float8
    options: {granularity: row}
    rules:
      - layers: "blocks.{0-3}.*"
        backend: int8
      - role: attention
        backend: keep
"""


def write(folder: Path, text: str, name: str = "r.yaml") -> str:
    (folder / name).write_text(text, encoding="utf-8")
    return str(folder / name)


def read(folder: Path, text: str) -> RecipeFile:
    return read_recipe(write(folder, text))


def found(file: RecipeFile) -> list[tuple[int, str]]:
    return [(int(problem.where.rpartition(":")[2]), problem.what) for problem in file.problems]


def refusal(folder: Path, text: str) -> str:
    with pytest.raises(RecipeError) as caught:
        read(folder, text)
    return str(caught.value)


def test_a_recipe_is_read_with_the_line_of_every_value(tmp_path: Path) -> None:
    file = read(tmp_path, GOOD)
    assert file.recipe and not file.problems
    assert file.recipe.components["transformer"].rules[1].role == "attention"
    assert file.where(("components", "transformer", "rules", 1, "backend")).endswith("r.yaml:10")
    assert file.where(("components", "transformer", "keep")).endswith("r.yaml:3")


def test_all_problems_come_at_once_and_in_order(tmp_path: Path) -> None:
    text = """\
model: 12
desription: a typo
components:
  transformer:
    backend: flote8
    keep: profle
    rules:
      - layerz: a
        backend: int8
      - {layers: b, role: c, backend: int8}
      - {role: attention, backend: nvfp44}
      - {layers: ok, backend: keep, otherwise: skip}
  vae: float8
"""
    assert found(read(tmp_path, text)) == [
        (1, "'model' is not valid"),
        (2, "unknown key 'desription'"),
        (5, "unknown backend 'flote8'"),
        (6, "'keep' is not valid"),
        (8, "unknown key 'layerz'"),
        (10, "a rule says both 'layers' and 'role'"),
        (11, "unknown backend 'nvfp44'"),
        (12, "'otherwise' is not valid"),
        (13, "'vae' is not valid"),
    ]


def test_near_words_are_suggested_for_keys_backends_and_choices(tmp_path: Path) -> None:
    text = "component: {}\ncomponents:\n  a: {backend: flot8, container: nativ}\n"
    suggested = [problem.next_step for problem in read(tmp_path, text).problems]
    assert suggested == ["did you mean 'components'?", "did you mean 'float8'?", "did you mean 'native'?"]


def test_a_misspelt_key_is_not_also_reported_as_missing(tmp_path: Path) -> None:
    text = "components: {a: {rules: [{layers: x, bakend: int8}]}}\n"
    assert found(read(tmp_path, text)) == [(1, "unknown key 'bakend'")]
    assert found(read(tmp_path, "component: {a: {}}\n")) == [(1, "unknown key 'component'")]


def test_what_is_understood_survives_beside_what_is_not(tmp_path: Path) -> None:
    text = GOOD + "      - {layers: x, backend: nonesuch}\n      - {layers: y, backend: int8}\nextra: 1\n"
    file = read(tmp_path, text)
    assert file.recipe
    assert [rule.layers for rule in file.recipe.components["transformer"].rules] == [
        "blocks.{0-3}.*",
        None,
        "y",
    ]
    assert file.where(("components", "transformer", "rules", 2)).endswith(":12")


def test_an_unknown_backend_takes_its_options_along(tmp_path: Path) -> None:
    file = read(tmp_path, "components: {a: {backend: nonesuch, options: {granularity: row}}}\n")
    assert file.recipe and file.recipe.components["a"] == ComponentRecipe.model_validate({})


@pytest.mark.parametrize("text", ["model: x\n", "components: {}\n", "components: [a]\n", "components:\n"])
def test_a_recipe_without_components_is_a_problem_and_no_recipe(tmp_path: Path, text: str) -> None:
    file = read(tmp_path, text)
    assert file.recipe is None and len(file.problems) == 1


def test_a_number_where_text_belongs_is_told_to_be_quoted(tmp_path: Path) -> None:
    file = read(tmp_path, "description: 1234567\n" + GOOD)
    assert [problem.next_step for problem in file.problems] == ["put it in quotes"]


def test_words_and_dates_stay_text(tmp_path: Path) -> None:
    text = "model: no\ndescription: 2024-05-06\n" + GOOD.partition("\n")[2]
    file = read(tmp_path, text)
    assert file.recipe and (file.recipe.model, file.recipe.description) == ("no", "2024-05-06")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model: a\nmodel: b\n", "r.yaml:2: the key 'model' is said twice"),
        ("- a\n", "r.yaml:1: is not a mapping"),
        ("", "r.yaml:1: is not a mapping"),
        ("a: [1\nb: 2\n", "r.yaml:2: is not valid YAML"),
        ("a: &x {}\nb: *x\n", "r.yaml:2: is not valid YAML: aliases"),
        ("a: !!python/object:os.system {}\n", "r.yaml:1: is not valid YAML: tags"),
        ("a: " + "[" * 100 + "]" * 100, "nested deeper than"),
        ("a: " + "[" * 50_000, "nested deeper than"),
        ("a:\n\t- b\n", "r.yaml:2: is not valid YAML"),
        ("[a]: b\n", "r.yaml:1: a key is not text"),
        ("a: b\n---\nc: d\n", "r.yaml:2: is not valid YAML"),
        ("a: b\nc: \x01\n", "r.yaml:2: holds a character"),
        ('a: "\\Uffffffff"\n', "is not valid YAML"),
        ('"\\ud800": b\n', "is not valid YAML"),
        ("# " + "x" * 2**20, "is too large"),
    ],
)
def test_what_is_not_a_plain_yaml_mapping_is_refused_with_its_line(tmp_path: Path, text: str, words: str) -> None:
    assert words in refusal(tmp_path, text)


def test_bytes_that_are_not_utf8_are_refused_with_their_line(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_bytes(b"model: a\ndescription: \xff\n")
    with pytest.raises(RecipeError, match=r"r\.yaml:2: is not text"):
        read_recipe(str(tmp_path / "r.yaml"))


def test_a_hundred_thousand_values_are_refused_quickly(tmp_path: Path) -> None:
    started = time.monotonic()
    assert "more than" in refusal(tmp_path, "a: [" + "1," * 100_000 + "1]\n")
    assert time.monotonic() - started < 15


def test_extends_merges_mappings_and_replaces_lists(tmp_path: Path) -> None:
    write(tmp_path, GOOD, "below.yaml")
    file = read(
        tmp_path,
        "extends: below.yaml\nmodel: other/model\ncomponents:\n  transformer:\n"
        "    rules: [{layers: z, backend: keep}]\n  vae: {backend: int8}\n",
    )
    assert file.recipe and not file.problems
    transformer = file.recipe.components["transformer"]
    assert file.recipe.model == "other/model" and list(file.recipe.components) == ["transformer", "vae"]
    assert (transformer.backend, transformer.options) == ("float8", {"granularity": "row"})
    assert [rule.layers for rule in transformer.rules] == ["z"]


def test_another_backend_does_not_inherit_the_options_of_the_one_it_replaces(tmp_path: Path) -> None:
    write(tmp_path, GOOD, "below.yaml")
    file = read(tmp_path, "extends: below.yaml\ncomponents: {transformer: {backend: int8}}\n")
    assert file.recipe and file.recipe.components["transformer"].options == {}
    assert len(file.recipe.components["transformer"].rules) == 2


def test_lines_point_into_the_file_that_said_it(tmp_path: Path) -> None:
    write(tmp_path, GOOD + "wrong: 1\n", "below.yaml")
    file = read(tmp_path, "extends: below.yaml\nmodel: 3\n")
    assert [Path(problem.where).name for problem in file.problems] == ["below.yaml:11", "r.yaml:2"]


def test_the_text_of_a_recipe_that_extends_holds_the_other_one_too(tmp_path: Path) -> None:
    write(tmp_path, GOOD, "below.yaml")
    file = read(tmp_path, "extends: below.yaml\n")
    assert yaml.safe_load(file.text) == {"extends": "below.yaml"}
    assert "# model: someone/model" in file.text


def test_a_built_in_recipe_can_be_extended_by_name(tmp_path: Path) -> None:
    file = read(tmp_path, "extends: flux-fp8\nmodel: builtin:tiny-flux\n")
    assert file.recipe and file.recipe.components["transformer"].backend == "float8"


def test_circles_and_missing_parents_are_refused_where_they_are_said(tmp_path: Path) -> None:
    write(tmp_path, "model: a\nextends: r.yaml\n", "other.yaml")
    assert "other.yaml:2: recipes extend each other in a circle" in refusal(tmp_path, "extends: other.yaml\n")
    assert "r.yaml:2: extends 'gone.yaml', which does not exist" in refusal(tmp_path, "a: 1\nextends: gone.yaml\n")
    assert "r.yaml:1: `extends` does not name a recipe" in refusal(tmp_path, "extends: [a]\n")


def test_a_missing_recipe_names_near_ones_and_the_command_that_lists_them() -> None:
    with pytest.raises(RecipeError) as caught:
        read_recipe("flux-pf8.yaml")
    assert "did you mean 'flux-fp8'?" in str(caught.value) and "quantize recipes list" in str(caught.value)


@pytest.mark.parametrize("name", ["", "x" * 5000, "\0", "\ud800", "/", ".."])
def test_a_name_that_cannot_be_a_file_is_only_a_missing_recipe(name: str) -> None:
    with pytest.raises(RecipeError):
        read_recipe(name)


@pytest.mark.parametrize("name", builtin_recipes())
def test_every_built_in_recipe_is_valid_and_says_what_it_is(name: str) -> None:
    for spelling in (name, f"{name}.yaml"):
        file = read_recipe(spelling)
        assert file.problems == []
        assert file.recipe and file.recipe.description and file.recipe.model


@pytest.mark.parametrize("name", builtin_recipes())
def test_every_built_in_recipe_stands_alone_so_that_a_copy_can_be_edited(name: str, tmp_path: Path) -> None:
    copied = copy_recipe(name, tmp_path)
    assert copied == tmp_path / f"{name}.yaml" and copied.read_bytes() == builtin_recipes()[name].read_bytes()
    assert "extends" not in yaml.safe_load(copied.read_text(encoding="utf-8"))
    assert read_recipe(str(copied)).recipe == read_recipe(name).recipe


def copy_refusal(name: str, target: Path) -> str:
    with pytest.raises(RecipeError) as caught:
        copy_recipe(name, target)
    return str(caught.value)


def test_a_copy_of_what_is_no_recipe_leaves_no_file(tmp_path: Path) -> None:
    (tmp_path / "program").write_bytes(b"\x7fELF\xff")
    assert "is not text in UTF-8" in copy_refusal(str(tmp_path / "program"), tmp_path / "copy.yaml")
    assert "a folder" in copy_refusal(str(tmp_path), tmp_path / "copy.yaml")
    assert not (tmp_path / "copy.yaml").exists()


def test_a_copy_into_a_missing_folder_says_to_make_it(tmp_path: Path) -> None:
    message = copy_refusal("flux-fp8", tmp_path / "missing folder" / "x.yaml")
    assert f"mkdir -p '{tmp_path}/missing folder'" in message


@pytest.mark.parametrize("target", ["x" * 300, "\0", "file.yaml/x.yaml", "file.yaml"])
def test_a_copy_that_cannot_be_written_is_refused(tmp_path: Path, target: str) -> None:
    write(tmp_path, "kept", "file.yaml")
    assert copy_refusal("flux-fp8", tmp_path / target)
    assert (tmp_path / "file.yaml").read_text(encoding="utf-8") == "kept"


def test_every_key_of_a_recipe_is_described() -> None:
    for model in (Recipe, ComponentRecipe, Rule):
        assert all(field.description for field in model.model_fields.values())


def test_listing_and_reading_recipes_imports_no_heavy_library() -> None:
    code = (
        "import sys; from bitroute.convert.recipe import *; import bitroute.convert.profile as p;"
        "[read_recipe(n) for n in builtin_recipes()]; p.find_profile('FluxTransformer2DModel');"
        "sys.exit(', '.join({'torch', 'diffusers', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stderr.strip() == ""


KEYS = st.sampled_from(
    ["model", "components", "extends", "backend", "options", "keep", "rules", "layers", "role", "transformer"]
)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just("int8")
TREES = st.recursive(
    SCALARS | KEYS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS | st.text(max_size=4), inner, max_size=4),
    max_leaves=20,
)
QUICK = settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def survives(folder: Path, content: bytes) -> None:
    """Reads it: either a RecipeError, or problems that all have words and a line."""
    (folder / "fuzz.yaml").write_bytes(content)
    try:
        file = read_recipe(str(folder / "fuzz.yaml"))
    except RecipeError as error:
        assert str(error)
        return
    assert file.recipe or file.problems
    assert all(problem.what and problem.where.rpartition(":")[2].isdigit() for problem in file.problems)


@QUICK
@given(text=st.text() | st.text("{}[]:-&*!|>'\"%@#, \n\tab01\\x"))
def test_random_text_is_refused_or_read(tmp_path: Path, text: str) -> None:
    survives(tmp_path, text.encode("utf-8", "surrogatepass"))


@QUICK
@given(content=st.binary())
def test_random_bytes_are_refused_or_read(tmp_path: Path, content: bytes) -> None:
    survives(tmp_path, content)


@QUICK
@given(tree=st.dictionaries(KEYS, TREES, max_size=4))
def test_random_trees_are_refused_or_read(tmp_path: Path, tree: dict[str, object]) -> None:
    survives(tmp_path, yaml.safe_dump(tree, allow_unicode=True).encode("utf-8", "surrogatepass"))
