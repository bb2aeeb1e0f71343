"""Statistics of a model on their way into a job: read from a file, refused where they do not fit, else used."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import bitroute
from bitroute.convert.plan import plan
from bitroute.convert.statistics import metadata, open_statistics
from bitroute.errors import BitrouteError, RecipeError, SourceError

LAYERS = ["transformer_blocks.0.ff.net.0.proj", "single_transformer_blocks.0.attn.to_q"]
RECIPE = """\
model: builtin:tiny-flux
components:
  transformer:
    keep: ["*norm*", "*embed*", proj_out]
    rules:
      - layers: transformer_blocks.0.ff.net.0.proj
        backend: nvfp4
        method: {METHOD}
      - layers: single_transformer_blocks.0.attn.to_q
        backend: nvfp4
        options: {scale: mse}
"""
CLASSES = {"transformer": "FluxTransformer2DModel"}


def write(file: Path, classes: dict[str, str] = CLASSES, width: int = 0, **changed: Tensor) -> Path:
    folder = Path(bitroute.__file__).parent / "recipes/tiny-flux/transformer"
    source = load_file(folder / "diffusion_pytorch_model.safetensors")
    tensors = {}
    for layer in LAYERS:
        columns = width or source[f"{layer}.weight"].shape[1]
        x = torch.randn(300, columns, generator=torch.Generator().manual_seed(1)) * torch.linspace(0.1, 3, columns)
        hessian = x.T @ x / len(x)
        found = {"hessian": hessian[None], "second_moment": hessian.diagonal().clone(), "absmax": x.abs().amax(0)}
        tensors |= {f"transformer/{layer}/{kind}": tensor.clone() for kind, tensor in {**found, **changed}.items()}
    save_file(tensors, file, metadata("builtin:tiny-flux", classes, {"prompts": 3}))
    return file


@pytest.fixture
def statistics(tmp_path: Path) -> Path:
    return write(tmp_path / "statistics.safetensors")


def recipe(tmp_path: Path, method: str) -> str:
    file = tmp_path / "recipe.yaml"
    file.write_text(RECIPE.replace("{METHOD}", method))
    return str(file)


def refusal(kind: type[BitrouteError], act: Callable[[], object]) -> str:
    with pytest.raises(kind) as found:
        act()
    return str(found.value)


def test_what_was_measured_is_read_back(statistics: Path) -> None:
    found = open_statistics(statistics)
    assert (found.model, found.components, found.settings) == ("builtin:tiny-flux", CLASSES, {"prompts": 3})
    assert sorted(found.layers("transformer")) == sorted(LAYERS)
    assert found.kinds("transformer", LAYERS[0]) == ["second_moment", "absmax", "hessian"]
    read, stored = found.of("transformer", LAYERS[0]), load_file(statistics)
    assert read.hessian is not None
    assert torch.equal(read.hessian, stored[f"transformer/{LAYERS[0]}/hessian"])
    assert read.inputs is None


def test_a_job_with_gptq_stores_what_the_backend_makes_of_the_statistics(tmp_path: Path, statistics: Path) -> None:
    """And still in torchao's own folder; what has no method has its search weighted."""
    out = bitroute.quantize(recipe(tmp_path, "{gptq: true}"), out=tmp_path / "out", statistics=statistics)
    planned = plan(recipe(tmp_path, "{gptq: true}"), statistics=statistics)
    assert planned.components[0].container.name == "torchao"
    stored = load_file(out / "transformer/diffusion_pytorch_model.safetensors")
    entries = {entry.layer: entry for entry in planned.components[0].quantized}
    source = load_file(planned.components[0].component.folder / "diffusion_pytorch_model.safetensors")
    for layer in LAYERS:
        entry, measured = entries[layer], open_statistics(statistics).of("transformer", layer)
        expected = entry.backend.quantize(source[f"{layer}.weight"], measured)
        plain = entry.backend.quantize(source[f"{layer}.weight"]) if layer == LAYERS[1] else {}
        assert torch.equal(stored[f"{layer}._weight_qdata"], expected["qdata"])
        assert not plain or not torch.equal(plain["qdata"], expected["qdata"])


def test_the_recipe_names_its_statistics_seen_from_itself(tmp_path: Path, statistics: Path) -> None:
    file = Path(recipe(tmp_path, "{gptq: true}"))
    file.write_text(f"statistics: {statistics.name}\n{file.read_text()}")
    found = plan(str(file)).statistics
    assert found is not None
    assert found.file == statistics


def test_a_method_without_statistics_is_refused_with_its_line_and_the_command(tmp_path: Path) -> None:
    words = refusal(RecipeError, lambda: plan(recipe(tmp_path, "{gptq: true}")))
    assert "recipe.yaml:6" in words
    assert "nvfp4 (gptq) needs statistics" in words
    assert "quantize calibrate" in words


def test_a_layer_that_was_not_measured_is_named(tmp_path: Path) -> None:
    file = tmp_path / "few.safetensors"
    save_file({f"transformer/{LAYERS[1]}/absmax": torch.ones(128)}, file, metadata("m", CLASSES, {}))
    words = refusal(RecipeError, lambda: plan(recipe(tmp_path, "{gptq: true}"), statistics=file))
    assert "needs hessian of its layer's input" in words
    assert LAYERS[0] in words


def test_statistics_of_another_model_are_refused(tmp_path: Path) -> None:
    other = write(tmp_path / "other.safetensors", {"transformer": "SD3Transformer2DModel"})
    words = refusal(RecipeError, lambda: plan(recipe(tmp_path, "{gptq: true}"), statistics=other))
    assert "SD3Transformer2DModel" in words
    wide = write(tmp_path / "wide.safetensors", width=96)
    words = refusal(RecipeError, lambda: plan(recipe(tmp_path, "{gptq: true}"), statistics=wide))
    assert "does not fit its weight" in words


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_numbers_that_nothing_can_have_measured_stop_the_job_with_their_name(tmp_path: Path, value: float) -> None:
    source = write(tmp_path / "bad.safetensors")
    tensors = load_file(source)
    tensors[f"transformer/{LAYERS[1]}/second_moment"][3] = value
    save_file(tensors, source, metadata("m", CLASSES, {}))
    words = refusal(
        SourceError, lambda: bitroute.quantize(recipe(tmp_path, "{}"), out=tmp_path / "out", statistics=source)
    )
    assert f"{LAYERS[1]}/second_moment" in words


@pytest.mark.parametrize(
    ("method", "changed", "words"),
    [
        ("{rotate: 64, gptq: true}", {"hessian": torch.eye(16).repeat(12, 1, 1)}, "blocks of 16, no multiple of 64"),
        ("{gptq: true}", {"inputs": torch.ones(0, 192)}, "does not fit its weight"),
        ("{gptq: true}", {"inputs": torch.ones(2, 192).to(torch.float8_e4m3fn)}, "does not fit its weight"),
    ],
)
def test_statistics_that_a_method_cannot_read_are_refused_by_the_plan(
    method: str, changed: dict[str, Tensor], words: str, tmp_path: Path
) -> None:
    statistics = write(tmp_path / "odd.safetensors", **changed)
    with pytest.raises(RecipeError, match=words):
        plan(recipe(tmp_path, method), statistics=statistics)


def test_static_activations_behind_a_rotation_need_rows_of_the_input(tmp_path: Path, statistics: Path) -> None:
    file = Path(recipe(tmp_path, "{rotate: 64}"))
    static = "        options: {activations: static}\n        method:"
    file.write_text(file.read_text().replace("        method:", static))
    with pytest.raises(RecipeError, match="needs inputs of its layer's input"):
        plan(str(file), statistics=statistics)


def test_a_home_folder_that_nobody_has_is_a_file_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="there are no statistics"):
        plan(recipe(tmp_path, "{rotate: 64}"), statistics="~nobody-of-that-name/statistics.safetensors")


def test_changed_statistics_are_not_resumed(tmp_path: Path, statistics: Path) -> None:
    def run(after: int) -> None:
        def stop(done: int, what: str) -> None:
            if after:
                raise KeyboardInterrupt

        bitroute.quantize(
            recipe(tmp_path, "{gptq: true}"), out=tmp_path / "out", statistics=statistics, resume=True, progress=stop
        )

    with pytest.raises(KeyboardInterrupt):
        run(1)
    write(statistics)
    assert "statistics.safetensors" in refusal(RecipeError, lambda: run(0))


@pytest.mark.parametrize(
    ("content", "words"),
    [({}, "no record of a calibration"), ({"format_version": 2}, "format_version 2"), ({"format_version": [1]}, "[1]")],
)
def test_a_file_that_is_no_statistics_is_refused(tmp_path: Path, content: dict[str, object], words: str) -> None:
    file = tmp_path / "x.safetensors"
    record = {"model": "m", "components": {}, "settings": {}, **content} if content else {}
    save_file({"a/b/absmax": torch.ones(1)}, file, {"bitroute_statistics": json.dumps(record)})
    assert words in refusal(SourceError, lambda: open_statistics(file))
    save_file({"a": torch.ones(1)}, file, metadata("m", {}, {}))
    assert "a tensor 'a'" in refusal(SourceError, lambda: open_statistics(file))


def test_a_method_among_the_options_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(
        "model: builtin:tiny-flux\ncomponents:\n  transformer: {backend: int8, options: {method: {rotate: 16}}}\n"
    )
    assert "'method' is no option" in refusal(RecipeError, lambda: plan(str(file)))


def test_what_is_smoothed_or_weighted_for_uneven_inputs_is_healthy(tmp_path: Path) -> None:
    """Its weights err where inputs are small: verification judges them as they were rounded."""
    layer = LAYERS[1]
    x = torch.randn(500, 192, generator=torch.Generator().manual_seed(1)) * torch.logspace(-3, 0, 192)
    file = tmp_path / "uneven.safetensors"
    hessian = x.T @ x / 500
    measured = {"absmax": x.abs().amax(0), "second_moment": hessian.diagonal().clone(), "hessian": hessian[None]}
    save_file(
        {f"transformer/{layer}/{kind}": found for kind, found in measured.items()}, file, metadata("m", CLASSES, {})
    )
    for number, (options, method) in enumerate([("{}", "{smooth: 1.0, gptq: true}"), ("{scale: mse}", "{}")]):
        recipe_file = tmp_path / f"{number}.yaml"
        rule = f"{{layers: {layer}, backend: int4, options: {options}, method: {method}}}"
        recipe_file.write_text(f"model: builtin:tiny-flux\ncomponents: {{transformer: {{rules: [{rule}]}}}}\n")
        out = bitroute.quantize(str(recipe_file), out=tmp_path / str(number), statistics=file)
        found = bitroute.verify(out, load=False)
        assert found.problems == []
        assert found.layers[0].sqnr_db > 5
