"""A whole search on the bundled model: measured, interrupted, resumed, solved, written, and planned again."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from filelock import FileLock
from hub import Hub
from safetensors.torch import save_file

from bitroute.backends import create
from bitroute.calibrate.search import Found, run, search, trial
from bitroute.calibrate.search_candidates import KEEP
from bitroute.calibrate.search_front import Front
from bitroute.calibrate.search_journal import MEASUREMENTS
from bitroute.calibrate.search_request import Search, Wish, prepare
from bitroute.calibrate.search_sensitivity import Bench, stratified
from bitroute.cli import main
from bitroute.convert.plan import plan
from bitroute.convert.reading import read_tensor
from bitroute.convert.statistics import metadata, open_statistics
from bitroute.errors import BitrouteError, JobError, RecipeError
from bitroute.eval.recording import record, recording_of
from bitroute.eval.replay import Recorded
from bitroute.eval.sampling import Sampling

CALL = {"height": 64, "width": 64, "num_inference_steps": 2, "guidance_scale": 0.0, "max_sequence_length": 16}
OPTIONS: Mapping[str, Any] = {"candidates": "nvfp4,int8,keep", "samples": 2, "keep": "none"}
LAYER = "single_transformer_blocks.3.proj_out"
Make = Callable[..., Wish]


@pytest.fixture(scope="module")
def sampling() -> Sampling:
    return Sampling(("red apple, noto style", "fox, fluent style"), (0,), CALL)


@pytest.fixture(scope="module")
def cache(tiny: Path, sampling: Sampling, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recording, made in this process: the same as in one of its own, sooner."""
    folder = tmp_path_factory.mktemp("cache")
    record(tiny, sampling, recording_of(tiny, sampling, folder))
    return folder


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of all searches of this module: they measure nothing twice."""
    return tmp_path_factory.mktemp("work")


@pytest.fixture(scope="module")
def found(sampling: Sampling, cache: Path, work: Path, tmp_path_factory: pytest.TempPathFactory) -> Found:
    place = tmp_path_factory.mktemp("found") / "best.yaml"
    return search("builtin:tiny-flux", place, sampling, bits=5.0, cache=cache, work=work, **OPTIONS)


@pytest.fixture
def wish(sampling: Sampling, work: Path, tmp_path: Path) -> Make:
    def wish(**changed: Any) -> Wish:
        base = Wish("builtin:tiny-flux", tmp_path / "best.yaml", sampling, bits=5.0, work=work, **OPTIONS)
        return replace(base, **changed)

    return wish


@pytest.fixture(scope="module")
def bench(tiny: Path, sampling: Sampling, cache: Path, found: Found) -> Bench:
    recorded = recording_of(tiny, sampling, cache)
    return Bench(found.search.space.component, recorded, sampling, 2, torch.float32)


def test_the_recipe_is_valid_fits_its_budget_and_gives_what_was_predicted(found: Found) -> None:
    planned = plan(str(found.recipe))
    part = next(part for part in planned.components if part.name == "transformer")
    assert part.size_bytes == found.chosen.size_bytes and planned.size_bytes == found.chosen.checkpoint_bytes
    assert 4.95 < part.bits_per_weight <= 5.0
    chosen = {entry.layer: str(entry.backend) for entry in part.entries if entry.kind == "Linear"}
    assert chosen == dict(found.chosen.chosen)
    assert {"nvfp4", "int8"} <= set(chosen.values())


def test_it_loses_less_than_its_small_candidate_and_what_the_layers_lose_adds_up(found: Found) -> None:
    """Measured together, not only predicted."""
    small = next(point for point in found.uniform if point.name == "all nvfp4")
    assert found.chosen.measured is not None and small.measured is not None
    assert found.chosen.measured < 0.75 * small.measured
    for point in (found.chosen, *found.uniform):
        assert point.measured == pytest.approx(point.predicted, rel=0.25)


def test_the_front_falls_with_size_and_no_uniform_recipe_lies_below_it(found: Found) -> None:
    errors = [point.predicted for point in found.front]
    assert errors == sorted(errors, reverse=True) and len(errors) > 5 and errors[-1] == 0
    for uniform in found.uniform:
        below = [point.predicted for point in found.front if point.size_bytes >= uniform.size_bytes]
        assert below[0] <= uniform.predicted


def test_the_recipe_says_why(found: Found) -> None:
    text = found.recipe.read_text()
    assert "5 bits per weight" in text and "of the error" in text and "all int8 8.20 bits" in text


def test_an_interrupted_search_goes_on_and_finds_the_same(
    found: Found, wish: Make, cache: Path, tmp_path: Path, work: Path
) -> None:
    lines = (work / MEASUREMENTS).read_text().splitlines(keepends=True)
    (tmp_path / MEASUREMENTS).write_text("".join(lines[:-7]) + lines[-7][:10])

    def stop(what: str, done: int, total: int) -> None:
        if what.startswith("layers") and done == total - 3:
            raise KeyboardInterrupt

    interrupted = wish(work=tmp_path)
    with pytest.raises(KeyboardInterrupt):
        run(prepare(interrupted), stop, cache)
    assert not interrupted.recipe_out.exists()
    assert len((tmp_path / MEASUREMENTS).read_text().splitlines()) > len(lines) - 7
    again = run(prepare(interrupted), cache=cache)
    assert again.recipe.read_text() == found.recipe.read_text()
    assert (tmp_path / MEASUREMENTS).read_text() == "".join(lines)


def test_another_budget_measures_only_the_new_recipe(found: Found, wish: Make, cache: Path, work: Path) -> None:
    before = (work / MEASUREMENTS).read_text().splitlines()
    other = run(prepare(wish(bits=None, budget_bytes=found.chosen.checkpoint_bytes + 100_000)), cache=cache)
    after = (work / MEASUREMENTS).read_text().splitlines()
    assert len(after) == len(before) + 1
    assert other.chosen.checkpoint_bytes <= found.chosen.checkpoint_bytes + 100_000
    assert other.chosen.predicted < found.chosen.predicted


def test_a_layer_is_measured_alone_and_the_model_is_the_same_afterwards(bench: Bench, found: Found) -> None:
    layer = next(layer for layer in found.search.space.layers if layer.name == LAYER)
    before = {name: tensor.clone() for name, tensor in bench.model.state_dict().items()}
    errors = [bench.error_with([(layer, create(*name))]) for name in (("nvfp4",), ("int8",), ("keep",))]
    assert errors[0] > 20 * errors[1] > 0 and errors[2] == 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in bench.model.state_dict().items())
    assert bench.error() == 0


def test_a_format_that_quantizes_activations_is_run(bench: Bench, found: Found) -> None:
    layer = next(layer for layer in found.search.space.layers if layer.name == LAYER)
    weights = bench.error_with([(layer, create("nvfp4", scale="mse"))])
    both = bench.error_with([(layer, create("nvfp4", scale="mse", activations="nvfp4"))])
    assert weights < both < 100 * weights
    assert bench.error() == 0


def test_calls_are_spread_over_steps_and_samples() -> None:
    assert stratified([4, 4], 4) == [(0, 0), (1, 1), (0, 2), (1, 3)]
    assert sorted(stratified([2, 2], 9)) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    spread = stratified([20] * 16, 32)
    assert len(set(spread)) == 32 and {sample for sample, _ in spread} == set(range(16))
    assert {call for _, call in spread} == set(range(20))


def test_a_native_container_gets_formats_of_one_library(wish: Make) -> None:
    listed = "nvfp4:scale=mse,int8,mxfp4:scale=mse,nf4,keep"
    native = prepare(wish(native=True, candidates=listed, bits=5.0, keep="none"))
    names = [[str(backend) for backend in family] for family in native.families]
    assert names == [["nvfp4 (scale mse)", "int8", "keep"], ["nf4", "keep"]]


def test_a_native_container_is_not_asked_to_keep_what_its_loader_cannot_keep_apart(wish: Make) -> None:
    """That of bitsandbytes knows `proj_out` by its last name, which the single blocks' have too."""
    search = prepare(wish(native=True, candidates="nf4,keep", bits=5.0, keep="none"))
    choices = {layer.name: set(layer.size_bytes) for layer in search.space.only(search.families[0]).layers}
    assert choices["proj_out"] == {"nf4"}
    assert choices["single_transformer_blocks.0.proj_out"] == {"nf4", "keep"}
    with pytest.raises(RecipeError, match="no native container can be loaded"):
        prepare(wish(native=True, candidates="nf4,keep", bits=6.0, keep="profile"))


def test_without_a_base_recipe_other_components_stay_as_they_are(wish: Make) -> None:
    alone, beside = prepare(wish()), prepare(wish(base="tiny-flux-int8", model=None))
    assert alone.base.recipe is not None and alone.base.recipe.components == {}
    assert [part.name for part in alone.space.planned.components] == ["transformer"]
    assert beside.space.other_bytes < alone.space.other_bytes
    assert beside.source == alone.source == {"model": "builtin:tiny-flux"}


def test_a_model_on_the_hub_is_downloaded_when_it_is_measured(
    hub: Hub, source: Path, wish: Make, tmp_path: Path
) -> None:
    hub.add("me/tiny-flux", source)
    search = prepare(wish(model="me/tiny-flux", work=tmp_path / "work"))
    assert search.pipeline.is_outline and "tokenizer_2/tokenizer.json" not in hub.files_sent

    def stop(what: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(search, stop, tmp_path)
    assert (
        "tokenizer_2/tokenizer.json" in hub.files_sent and "settings" in (tmp_path / "work" / MEASUREMENTS).read_text()
    )


@pytest.mark.parametrize(
    ("changed", "word"),
    [
        ({"bits": 4.2}, "at least 4.5"), ({"bits": None, "budget_bytes": 3_000_000}, "a checkpoint of"),
        ({"bits": None}, "one goal"), ({"gate": "lpips<0.1"}, "--bits and --gate"), ({"bits": float("nan")}, "--bits"),
        ({"candidates": "nvfp5"}, "nvfp5"), ({"component": "vae"}, "no such denoiser"),
        ({"base": "nothing"}, "no recipe"),
        ({"candidates": "nvfp4:method.gptq=true:scale=mse,keep"}, "needs statistics: hessian"),
        ({"native": True, "candidates": "mxfp4"}, "no native container"), ({"estimate": True}, "statistics"),
        ({"methods": True}, "--methods needs"), ({"methods": True, "native": True}, "no native container holds"),
        ({"statistics": Path("none.safetensors")}, "none.safetensors"), ({"model": "no/where/here"}, "no such model"),
        ({"sampling": Sampling(("x",), (0,), CALL, "tpu9")}, "--device"),
        ({"recipe_out": Path("no-folder/best.yaml")}, "no such folder"), ({"model": None}, "no model"),
        ({"model": ""}, "no model"), ({"candidates": ""}, "0 of them"), ({"give_up": float("nan")}, "--simplify"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_before_anything_is_measured(
    wish: Make, changed: dict[str, Any], word: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BitrouteError, match=word) as refused:
        prepare(wish(**changed))
    assert refused.value.exit_code == 2
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_exists_and_the_work_of_another_search_are_left_alone(
    wish: Make, tmp_path: Path, cache: Path
) -> None:
    (tmp_path / "best.yaml").write_text("mine")
    with pytest.raises(RecipeError, match="exists already"):
        prepare(wish())
    with pytest.raises(RecipeError, match="begun with another number of samples"):
        run(prepare(wish(samples=3, recipe_out=tmp_path / "other.yaml")), cache=cache)
    assert [path.name for path in tmp_path.iterdir()] == ["best.yaml"]


def test_a_second_search_waits_for_the_first_and_says_so(wish: Make, tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    held, said = FileLock(tmp_path / "work" / "lock"), list[str]()

    def stop(what: str, done: int, total: int) -> None:
        said.append(what)
        if len(said) == 2:
            raise KeyboardInterrupt
        held.release()

    held.acquire()
    with pytest.raises(KeyboardInterrupt):
        run(prepare(wish(work=tmp_path / "work")), stop, tmp_path)
    assert said == ["waiting for another search in the same folder", "layers in candidates"]


def test_a_work_folder_that_cannot_be_locked_is_an_error_with_its_name(wish: Make, tmp_path: Path) -> None:
    (tmp_path / "work" / "lock").mkdir(parents=True)
    with pytest.raises(JobError, match="work: cannot keep measurements"):
        run(prepare(wish(work=tmp_path / "work")), cache=tmp_path)


def test_a_recording_without_the_denoiser_is_an_error(tmp_path: Path, found: Found, sampling: Sampling) -> None:
    (tmp_path / "run.json").write_text('{"samples": []}')
    with pytest.raises(JobError, match="never called"):
        Bench(found.search.space.component, tmp_path, sampling, 2, torch.float32)


def test_the_command_prints_the_front_and_writes_it(found: Found, cache: Path, work: Path, tmp_path: Path) -> None:
    """Everything is measured already, so that it takes no time."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("red apple, noto style\nfox, fluent style\n")
    (tmp_path / "bitroute").mkdir()
    (tmp_path / "bitroute" / "eval").symlink_to(cache)

    def command(*words: str | Path) -> Result:
        settings = [
            "--prompts", prompts, "--steps", 2, "--size", "64x64", "--call", "guidance_scale=0.0", "--keep", "none",
            "--call", "max_sequence_length=16", "--samples", 2, "--candidates", OPTIONS["candidates"], "--work", work,
        ]  # fmt: skip
        arguments = [str(word) for word in ("search", "builtin:tiny-flux", "--bits", "5", *words, *settings)]
        return CliRunner().invoke(main, arguments, env={"XDG_CACHE_HOME": str(tmp_path)})

    out, plot = tmp_path / "best.yaml", tmp_path / "front.svg"
    dry = command("-o", out, "--dry-run")
    assert dry.exit_code == 0 and "forward passes" in dry.stdout and not out.exists()
    done = command("-o", out, "--pareto", plot, "--json")
    assert done.exit_code == 0, done.output
    content = json.loads(done.stdout)
    assert content["chosen"]["predicted_error"] == found.chosen.predicted
    assert content["chosen"]["layers"] == dict(found.chosen.chosen)
    assert plot.read_text().startswith("<svg xmlns=") and plot.read_text().rstrip().endswith("</svg>")
    assert "eval:" in out.read_text() and plan(str(out)).size_bytes == found.chosen.checkpoint_bytes
    twice = command("-o", out)
    assert twice.exit_code == 2 and "exists already" in twice.stderr
    shown = command("-o", tmp_path / "again.yaml")
    assert "all int8" in shown.stdout and "quantize --recipe" in shown.stdout


@pytest.fixture(scope="module")
def statistics(
    tiny: Path, sampling: Sampling, cache: Path, found: Found, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Of the rows that were recorded: moments and maxima of every layer, and of one the whole E[xᵀ x]."""
    tape = Recorded(recording_of(tiny, sampling, cache) / "0000-0.safetensors")
    tensors = {}
    for layer in found.search.space.layers:
        x = rows_of(tape, layer.name)
        tensors[f"transformer/{layer.name}/second_moment"] = x.square().mean(0)
        tensors[f"transformer/{layer.name}/absmax"] = x.abs().amax(0)
        if layer.name == LAYER:
            tensors[f"transformer/{layer.name}/hessian"] = (x.T @ x / len(x))[None]
    file = tmp_path_factory.mktemp("statistics") / "statistics.safetensors"
    save_file(tensors, file, metadata("builtin:tiny-flux", {"transformer": "FluxTransformer2DModel"}, {}))
    return file


def rows_of(tape: Recorded, layer: str) -> torch.Tensor:
    return torch.cat([x.float() for _, x in tape.layer_inputs(f"transformer/{layer}")])


def test_what_a_layer_loses_is_known_from_its_hessian(
    statistics: Path, tiny: Path, sampling: Sampling, cache: Path, found: Found
) -> None:
    recorded = recording_of(tiny, sampling, cache)
    bench = Bench(found.search.space.component, recorded, sampling, 1, torch.float32, open_statistics(statistics))
    layer, backend = next(layer for layer in found.search.space.layers if layer.name == LAYER), create("nvfp4")
    x, weight = rows_of(Recorded(recorded / "0000-0.safetensors"), LAYER), read_tensor(layer.source)
    decoded = backend.decode(backend.quantize(weight), layer.source.spec).to(weight.dtype)
    direct = (x @ (decoded.float() - weight.float()).T).square().sum(1).mean().item()
    assert bench.lost(layer, backend) == pytest.approx(direct, rel=1e-3)


def test_an_estimate_runs_one_candidate_of_each_layer_and_comes_near(
    statistics: Path, wish: Make, cache: Path, tmp_path: Path, work: Path
) -> None:
    estimated = prepare(
        wish(estimate=True, statistics=statistics, work=tmp_path / "work", candidates="nvfp4,int8,keep")
    )
    assert estimated.forwards == 2 * len(estimated.space.layers)
    again = run(estimated, cache=cache)
    near = [
        errors_in(tmp_path / "work")[what] / error for what, error in errors_in(work).items() if what[-4:] == "int8"
    ]
    assert len(near) == len(estimated.space.layers) and sorted(near)[len(near) // 2] == pytest.approx(1, rel=0.3)
    assert "statistics: " in again.recipe.read_text() and plan(str(again.recipe)).statistics is not None


def test_methods_that_lower_the_expected_error_are_measured_and_written(
    statistics: Path, wish: Make, cache: Path, tmp_path: Path
) -> None:
    """Of three layers; what is known once takes neither an encoding nor a forward pass again."""
    asked = wish(methods=True, statistics=statistics, work=tmp_path / "work", candidates="mxfp4,int8,keep", bits=15.2)
    three = (LAYER, "single_transformer_blocks.2.proj_out", "proj_out")
    first, again = (restricted(prepare(replace(asked, recipe_out=tmp_path / f"{n}.yaml")), three) for n in "ab")
    assert first.encodings == 3 * (2 + 11) and first.forwards == 3 * 8 * first.wish.samples
    found = run(first, cache=cache)
    known = errors_in(tmp_path / "work")
    for layer in found.search.space.layers:
        tried = {what for what in known if what.startswith(f"expected {layer.name} ")}
        assert len(layer.size_bytes) - 1 <= min(8, len(tried)) and bool(tried) is (layer.name in three)
    assert "gptq" in found.chosen.chosen[LAYER] and "low_rank" in found.recipe.read_text()
    assert [point.name for point in found.uniform] == ["all int8"]
    assert run(again, cache=cache).recipe.read_text() == found.recipe.read_text()
    assert errors_in(tmp_path / "work") == known


def restricted(search: Search, names: Sequence[str]) -> Search:
    """The others stay as they are."""
    layers = (
        layer if layer.name in names else replace(layer, size_bytes={KEEP: layer.size_bytes[KEEP]})
        for layer in search.space.layers
    )
    space = replace(search.space, layers=tuple(layers))
    return replace(search, space=space, listed=space)


def errors_in(work: Path) -> dict[str, float]:
    lines = [json.loads(line) for line in (work / MEASUREMENTS).read_text().splitlines()[1:]]
    return {line["what"]: line["squared_error"] for line in lines}


def test_what_a_gate_judges_is_the_same_for_other_gates_and_other_recipes(found: Found, tmp_path: Path) -> None:
    """Its checkpoints are resumed, which a job refuses for another recipe."""
    errors = {layer.name: dict.fromkeys(layer.size_bytes, 0.1) for layer in found.search.space.layers}
    front = Front(found.search.space, errors, found.search.families, 0.0)
    wish = replace(found.search.wish, bits=None, gate="lpips<0.1", recipe_out=tmp_path / "other.yaml")
    first, other = (trial(search, front, found.chosen) for search in (found.search, replace(found.search, wish=wish)))
    assert (first.recipe.name, first.recipe.text) == (other.recipe.name, other.recipe.text)
