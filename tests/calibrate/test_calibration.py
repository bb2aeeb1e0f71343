"""A calibration from the command to the file: what is refused before, what is left after an interrupt."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from filelock import FileLock
from hub import Hub
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.nn.modules.module import register_module_forward_pre_hook

from bitroute import Sampling, calibrate, read_prompts
from bitroute.calibrate.unfinished import place_of
from bitroute.cli import main
from bitroute.convert.checkpoint import open_pipeline
from bitroute.convert.statistics import open_statistics
from bitroute.errors import JobError, RecipeError, SourceError

TINY = "builtin:tiny-flux"
BLOCK = "transformer_blocks.0.attn.to_q"
SMALL: dict[str, Any] = {"timesteps": 2, "rows": 32, "budget_bytes": 8 * 10**6}
SETTINGS = ("--size", "64x64", "--steps", "4", "--call", "guidance_scale=0.0", "--call", "max_sequence_length=16")


@pytest.fixture(scope="module")
def whole(sampling: Sampling, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made without a break."""
    out = tmp_path_factory.mktemp("whole") / "stats.safetensors"
    return calibrate(TINY, out, sampling, **SMALL).file


@pytest.fixture
def begun(sampling: Sampling, tmp_path: Path) -> Path:
    """Broken off by SIGKILL in the third sample."""
    out = tmp_path / "stats.safetensors"

    def die(what: str, far: str) -> None:
        if far == "3 of 3":
            os.kill(os.getpid(), signal.SIGKILL)

    def work() -> None:
        calibrate(TINY, out, sampling, progress=die, save_seconds=0, **SMALL)

    process = get_context("fork").Process(target=work)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    return out


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., Result]:
    (tmp_path / "prompts.txt").write_text("red apple, noto style\n")

    def run(*words: str | Path, model: str | Path = TINY) -> Result:
        given = ["--prompts", str(tmp_path / "prompts.txt"), "--out", str(tmp_path / "stats.safetensors"), *SETTINGS]
        return CliRunner().invoke(main, ["calibrate", str(model), *given, *map(str, words)], prog_name="quantize")

    return run


def test_every_layer_of_the_denoiser_has_statistics_that_fit_its_weight(whole: Path, sampling: Sampling) -> None:
    found = open_statistics(whole)
    weights = open_pipeline(TINY).components["transformer"].tensors
    layers = found.layers("transformer")
    assert sorted(layers) == sorted(n.removesuffix(".weight") for n, w in weights.items() if len(w.spec.shape) == 2)
    for layer in layers:
        columns = weights[f"{layer}.weight"].spec.shape[1]
        assert found.misfit("transformer", layer, columns) is None and found.misfit("transformer", layer, columns + 1)
        assert found.kinds("transformer", layer) == ["second_moment", "absmax", "hessian", "inputs"]
    measured = found.of("transformer", BLOCK)
    assert measured.hessian is not None and measured.second_moment is not None and measured.inputs is not None
    torch.testing.assert_close(measured.hessian.diagonal(0, 1, 2).flatten(), measured.second_moment)
    assert measured.inputs.dtype == torch.bfloat16 and measured.inputs.shape == (32, 192)
    assert found.model == TINY and found.components == {"transformer": "FluxTransformer2DModel"}
    assert found.settings["prompts"] == list(sampling.prompts) and found.settings["timesteps"] == 2
    assert load_file(whole)[f"transformer/{BLOCK}/rows"].tolist() == [3 * 2 * 64, 0]


def test_a_killed_one_goes_on_to_the_bytes_of_one_that_was_not(begun: Path, whole: Path, sampling: Sampling) -> None:
    assert not begun.exists() and place_of(begun).is_file()
    with pytest.raises(SourceError, match="not a statistics file"):
        open_statistics(place_of(begun))
    with pytest.raises(RecipeError, match="unfinished calibration"):
        calibrate(TINY, begun, sampling, **SMALL)
    other = replace(sampling, call={**sampling.call, "num_inference_steps": 5})
    with pytest.raises(RecipeError, match="'call' has changed since the calibration began"):
        calibrate(TINY, begun, other, resume=True, **SMALL)
    with pytest.raises(RecipeError, match=r"what is measured of layer 'transformer/.*' has changed"):
        calibrate(TINY, begun, sampling, hessian=False, resume=True, **SMALL)
    seen = []
    calibrate(TINY, begun, sampling, resume=True, **SMALL, progress=lambda what, far: seen.append(far))
    assert begun.read_bytes() == whole.read_bytes() and seen == ["", ""]  # loading, and the third sample
    assert [file.name for file in begun.parent.iterdir()] == [begun.name]


def test_a_finished_one_is_resumed_by_doing_nothing_and_only_if_it_is_the_same(whole: Path, sampling: Sampling) -> None:
    before = whole.stat()
    found = calibrate(TINY, whole, sampling, resume=True, **SMALL)
    assert whole.stat() == before and (found.layers, found.uncalled) == (60, [])
    assert found.rows == sum(int(part[0]) for name, part in load_file(whole).items() if name.endswith("/rows"))
    with pytest.raises(RecipeError, match="another calibration is finished there"):
        calibrate(TINY, whole, sampling, resume=True, **{**SMALL, "timesteps": 1})
    with pytest.raises(RecipeError, match="there already"):
        calibrate(TINY, whole, sampling, **SMALL)


@pytest.mark.parametrize("damage", ["cut", "other"])
def test_a_damaged_state_is_refused(damage: str, whole: Path, sampling: Sampling, tmp_path: Path) -> None:
    out = tmp_path / "stats.safetensors"
    place_of(out).write_bytes(whole.read_bytes()[: 1000 if damage == "cut" else None])
    with pytest.raises(SourceError, match=r"not (a sound|the state)"):
        calibrate(TINY, out, sampling, resume=True, **SMALL)
    assert not out.exists()


def test_a_state_whose_tensors_do_not_fit_is_refused(begun: Path, sampling: Sampling) -> None:
    state = place_of(begun)
    with safe_open(state, framework="pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(state)
    for name, other in (("squares", torch.zeros(7)), ("sample.keys", torch.zeros(999, dtype=torch.int64))):
        save_file({**tensors, f"transformer/{BLOCK}/{name}": other}, state, metadata)
        with pytest.raises(SourceError, match="not the state of a calibration"):
            calibrate(TINY, begun, sampling, resume=True, **SMALL)


def test_a_model_on_the_hub_is_downloaded_only_after_all_was_checked(
    hub: Hub, tiny: Path, sampling: Sampling, tmp_path: Path
) -> None:
    hub.add("someone/tiny-flux", tiny)
    with pytest.raises(RecipeError, match="the budget is too small"):
        calibrate("someone/tiny-flux", tmp_path / "s", sampling, budget_bytes=10**6)
    assert not [name for name in hub.files_sent if "tokenizer" in name]
    found = calibrate("someone/tiny-flux", tmp_path / "s", sampling, layers=[BLOCK])
    assert found.layers == 1 and open_statistics(found.file).model == "someone/tiny-flux"


def test_a_model_that_has_changed_is_another_one(source: Path, sampling: Sampling, tmp_path: Path) -> None:
    out, chosen = tmp_path / "s.safetensors", [BLOCK]
    calibrate(str(source), out, sampling, layers=chosen)
    os.utime(source / "transformer" / "config.json", (1, 1))
    with pytest.raises(RecipeError, match="of another model"):
        calibrate(str(source), out, sampling, layers=chosen, resume=True)


def test_two_calibrations_do_not_write_one_file(sampling: Sampling, tmp_path: Path) -> None:
    with FileLock(tmp_path / ".s.safetensors.bitroute.lock"), pytest.raises(RecipeError, match="another calibration"):
        calibrate(TINY, tmp_path / "s.safetensors", sampling)


@pytest.mark.parametrize("way", ["overwrite", "resume"])
def test_somebody_elses_file_is_never_replaced(way: str, sampling: Sampling, tmp_path: Path) -> None:
    mine = tmp_path / "photo.png"
    mine.write_bytes(b"mine")
    place_of(mine).write_bytes(b"")
    ways: dict[str, bool] = {way: True}
    with pytest.raises(RecipeError, match="another file is there"):
        calibrate(TINY, mine, sampling, **ways, **SMALL)
    assert mine.read_bytes() == b"mine"


def test_a_full_disk_ends_with_what_to_do_and_leaves_no_half_file(sampling: Sampling, tmp_path: Path) -> None:
    def work() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10**5, 10**5))
        with pytest.raises(JobError, match="there is no room for a file"):
            calibrate(TINY, tmp_path / "stats.safetensors", sampling, **SMALL)

    process = get_context("fork").Process(target=work)
    process.start()
    process.join(60)
    assert process.exitcode == 0 and not list(tmp_path.iterdir())


def test_a_layer_that_is_given_nan_is_named_with_the_step(source: Path, sampling: Sampling, tmp_path: Path) -> None:
    (file,) = (source / "transformer").glob("*.safetensors")
    tensors = load_file(file)
    tensors["transformer_blocks.0.attn.norm_q.weight"].fill_(float("nan"))
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(JobError, match=r"attn\.to_out\.0: the input of a layer holds NaN[^§]*step 1 of 4 of sample 1"):
        calibrate(str(source), tmp_path / "s.safetensors", sampling)
    assert not (tmp_path / "s.safetensors").exists()


def test_layers_that_are_never_called_are_named(sampling: Sampling, tmp_path: Path) -> None:
    one = replace(sampling, prompts=sampling.prompts[:1])
    wanted = ["decoder.conv_out", "encoder.conv_in"]
    found = calibrate(TINY, tmp_path / "s", one, components=["vae"], layers=wanted)
    assert found.notes == ["1 layers were never called and have no statistics: vae/encoder.conv_in"]
    assert open_statistics(found.file).layers("vae") == ["decoder.conv_out"]
    with pytest.raises(JobError, match="no layer was called"):
        calibrate(TINY, tmp_path / "t", one, components=["vae"], layers=wanted[1:])


def test_everything_that_can_be_is_refused_before_the_pipeline_is_loaded(
    run: Callable[..., Result], source: Path, tmp_path: Path, convert: Callable[[str], Path]
) -> None:
    quantized = convert("tiny-flux-fp8")
    said = [
        (("--components", "transformr"), TINY, "did you mean 'transformer'"),
        (("--layers", "transformer_blocks.7.*"), TINY, "matches no layer of transformer"),
        (("--budget", "1MB"), TINY, "give --budget 9MB; or fewer --rows"),
        (("--call", "wdth=3"), TINY, "FluxPipeline takes no 'wdth'"),
        (("--device", "cuda:9"), TINY, "no device 'cuda:9' here"),
        (("--out", "s" * 300), TINY, "not a usable file"),
        (("--out", str(tmp_path)), TINY, "the statistics cannot go there"),
        (("--out", str(source / "s.safetensors")), source, "a file inside the model"),
        ((), quantized, "already quantized"),
        ((), source / "transformer", "only a whole pipeline draws"),
        (("--resume", "--overwrite"), TINY, "give one of them"),
    ]  # fmt: skip
    for words, model, expected in said:
        found = run(*words, model=model)
        assert found.exit_code == 2 and expected in found.stderr, (words, found.output)
    assert not (tmp_path / "stats.safetensors").exists()


def test_a_dry_run_says_what_would_be_measured_and_writes_nothing(run: Callable[..., Result], tmp_path: Path) -> None:
    found = run("--dry-run", "--timesteps", "2", "--budget", "25MB")
    assert found.exit_code == 0, found.output
    assert found.stdout.startswith("60 layers of transformer: absmax, second moments, 256 rows, Hessians in blocks of")
    assert "1 samples, 2 steps of each" in found.stdout and not (tmp_path / "stats.safetensors").exists()
    planned = json.loads(run("--dry-run", "--json", "--no-hessian", "--rows", "0").stdout)
    assert planned["planned"][f"transformer/{BLOCK}"] == {"columns": 192, "hessian_block": 0}


def test_the_command_writes_the_file_and_says_what_is_in_it(run: Callable[..., Result], tmp_path: Path) -> None:
    found = run("--layers", "*.attn.*", "--json")
    assert found.exit_code == 0, found.output
    content = json.loads(found.stdout)
    assert (
        content["layers"]
        == len(content["planned"])
        == len(open_statistics(tmp_path / "stats.safetensors").layers("transformer"))
    )
    assert "layers of transformer: absmax" in found.stderr and content["notes"] == []


def test_an_interrupt_ends_with_130_and_the_command_that_goes_on(
    begun: Path, run: Callable[..., Result], sampling: Sampling, tmp_path: Path
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    (tmp_path / "prompts.txt").write_text("\n".join(sampling.prompts))
    words = ("--timesteps", "2", "--rows", "32", "--budget", "8MB")
    with register_module_forward_pre_hook(interrupt):
        fresh = run(*words, "--out", tmp_path / "other")
        resumed = run(*words, "--resume")
    for found in (fresh, resumed):
        assert found.exit_code == 130 and "to go on: " in found.stderr, found.output
    assert "--resume" not in fresh.stderr and resumed.stderr.rstrip().endswith("--resume")
    assert place_of(begun).is_file() and not begun.exists() and not (tmp_path / "other").exists()


def test_the_calibration_prompts_are_captions_and_show_none_of_the_evaluated_things(tiny: Path) -> None:
    captions = (tiny / "captions.txt").read_text().splitlines()
    prompts, evaluated = read_prompts("emoji-calibration-32"), read_prompts("emoji-64")
    assert len(set(prompts)) == 32 and set(prompts) <= set(captions)
    things = [{prompt.rpartition(", ")[0] for prompt in found} for found in (prompts, evaluated)]
    assert not things[0] & things[1]


def test_the_function_is_callable_by_the_name_of_its_folder_in_either_order_of_imports() -> None:
    for first in ("import bitroute.calibrate.budget", "from bitroute import calibrate"):
        code = (
            f"{first}\nimport bitroute, bitroute.calibrate.budget as b\nprint(callable(bitroute.calibrate), b.__name__)"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert done.stdout.split() == ["True", "bitroute.calibrate.budget"], done.stderr
