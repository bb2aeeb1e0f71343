"""`quantize recommend` and the listing of recipes, as a user types them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from diffusers import PriorTransformer
from sizes import full_size

from bitroute.cli import main
from bitroute.convert.recipe import builtin_recipes, family_of
from bitroute.convert.recommend import recommend


def command(*words: str | Path) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


def test_recommend_ends_with_what_to_type() -> None:
    done = command("recommend", "builtin:tiny-flux", "--vram", "12GB")
    assert done.exit_code == 0
    assert "(as it is): the smallest error of those whose weights all fit" in done.stdout
    assert done.stdout.rstrip().endswith("pipeline.to('cuda')")
    small = command("recommend", "builtin:tiny-flux", "--vram", "0.5", "--reserve", "0.493", "--json")
    advice = json.loads(small.stdout)
    offload = {choice["recipe"]: choice["offload"] for choice in advice["choices"]}
    assert advice["best"] == "flux-int8" and (offload["(as it is)"], offload["flux-int8"]) == ("blocks", "model")


def test_a_class_without_recipes_gets_one_to_save(tmp_path: Path) -> None:
    model = PriorTransformer(num_attention_heads=2, attention_head_dim=32, num_layers=2, embedding_dim=32)
    model.save_pretrained(tmp_path / "model" / "prior")
    index = {"_class_name": "DiffusionPipeline", "prior": ["diffusers", "PriorTransformer"]}
    (tmp_path / "model" / "model_index.json").write_text(json.dumps(index))
    done = command("recommend", tmp_path / "model", "--vram", "0.1", "--reserve", "0.09995")
    assert done.exit_code == 0 and "no built-in recipe is made for it; save this as" in done.stdout
    assert "components:\n  prior: {backend: " in done.stdout


def test_a_pipeline_without_a_denoiser_is_refused(source: Path) -> None:
    index = json.loads((source / "model_index.json").read_text())
    (source / "model_index.json").write_text(json.dumps({**index, "transformer": [None, None]}))
    done = command("recommend", source, "--vram", "12")
    assert done.exit_code == 2 and "nothing here denoises" in done.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--vram", "much"], "'much' is not a size such as 12GB"),
        (["--vram", "1GB"], "no room for weights on such a card"),
        (["--vram", "8", "--reserve", "8GB"], "no room for weights on such a card"),
        ([], "Missing option '--vram'"),
    ],
)
def test_a_card_that_cannot_be_meant_is_refused(words: list[str], said: str) -> None:
    done = command("recommend", "builtin:tiny-flux", *words)
    assert done.exit_code == 2 and said in done.stderr and "Traceback" not in done.stderr


def test_the_listing_groups_the_recipes_by_family() -> None:
    lines = command("recipes", "list").stdout.splitlines()
    headings = [line.partition(":")[0] for line in lines if line and not line.startswith(" ")]
    assert headings == sorted({family_of(name) for name in builtin_recipes()})
    below = lines[lines.index("flux: black-forest-labs/FLUX.1-dev") + 1 :]
    assert below[0].split()[0] == "flux-fp8"
    assert set(json.loads(command("recipes", "list", "--json").stdout)) == set(builtin_recipes())


@pytest.mark.parametrize(("family", "others"), [("sdxl", "sd15"), ("sd15", "sdxl"), ("wan22", "wan"), ("wan", "wan22")])
def test_of_two_families_of_one_class_the_one_that_fits_is_advised(family: str, others: str, tmp_path: Path) -> None:
    names = {choice.name for choice in recommend(full_size(family, tmp_path).name, 24).choices}
    assert {family_of(name) for name in names} == {"", family} and others not in {family_of(name) for name in names}


def test_one_family_is_listed_alone_and_an_unknown_one_is_named() -> None:
    listed = json.loads(command("recipes", "list", "wan22", "--json").stdout)
    assert set(listed) == {f"wan22-{kind}" for kind in ("fp8", "int8", "mixed", "nf4", "nvfp4")}
    done = command("recipes", "list", "wan23")
    assert done.exit_code == 2 and "no family 'wan23'" in done.stderr and "did you mean" in done.stderr
