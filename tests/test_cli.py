"""The command line as a user meets it: results on stdout, words on stderr, exit codes, and never a traceback."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file

from bitroute import __version__
from bitroute.backends import available
from bitroute.cli import main
from bitroute.convert.recipe import builtin_recipes
from bitroute.errors import BitrouteError

HEAVY = ("torch", "diffusers", "transformers", "numpy", "rich", "pydantic")
NAME = "diffusion_pytorch_model.safetensors"
Command = Callable[..., "subprocess.CompletedProcess[str]"]
Convert = Callable[[str], Path]


def run(*words: str | Path) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words], prog_name="quantize")


def strict_json(text: str) -> Any:
    """NaN and Infinity are Python's invention."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


def commands(found: click.Command = main, path: str = "quantize") -> Iterator[tuple[str, click.Command]]:
    yield path, found
    for name, below in getattr(found, "commands", {}).items():
        yield from commands(below, f"{path} {name}")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_help_is_quick_and_imports_no_library() -> None:
    code = (
        "import sys\nfrom bitroute.cli import main\nmain(['--help'], standalone_mode=False)\n"
        f"print([name for name in {HEAVY} if name in sys.modules])"
    )
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("Usage:")
    assert done.stdout.splitlines()[-1] == "[]"
    assert time.monotonic() - start < 2


@pytest.mark.parametrize(("path", "found"), list(commands()), ids=[path for path, _ in commands()])
def test_every_command_and_option_has_help(path: str, found: click.Command) -> None:
    assert found.help
    assert found.help.strip().partition("\n")[0].endswith((".", ":"))  # a sentence
    for parameter in found.params:
        if isinstance(parameter, click.Option):
            assert parameter.help, f"{path} {parameter.opts}"
    assert run(*path.split()[1:], "-h").exit_code == 0


def test_the_three_ways_to_call_it_are_the_same_program(command: Command) -> None:
    answers = {command("--version").stdout}
    for script in ("quantize", "bitroute"):
        words = [str(Path(sys.executable).with_name(script)), "--version"]
        answers.add(subprocess.run(words, capture_output=True, text=True, check=True).stdout)
    assert {answer.split()[-1] for answer in answers} == {__version__}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "give --recipe, or a command"),
        (["--recipe"], "requires an argument"),
        (["--recpie", "x"], "--recpie"),
        (["verfy", "x"], "No such command 'verfy'"),
        (["recipes", "lst"], "No such command 'lst'"),
        (["verify"], "Missing argument 'FOLDER'"),
        (["--recipe", "nothing"], "no recipe 'nothing'"),
        (["--recipe", "tiny-flux-fp8", "--model", "nowhere", "--dry-run"], "nowhere: no such model folder"),
        (["--recipe", "flux-fp8", "--dry-run"], "black-forest-labs/FLUX.1-dev"),
        (["--recipe", "tiny-flux-fp8", "--device", "warp"], "no device 'warp'"),
        (["backends", "nvpf4"], "did you mean 'nvfp4'?"),
        (["recipes", "show", "tiny"], "no recipe 'tiny'"),
        (["inspect", "nowhere"], "no such file or folder"),
        (["verify", "nowhere"], "not a finished checkpoint of bitroute"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_usage_and_refusals_exit_with_2_and_say_why(here: Path, words: list[str], said: str) -> None:
    done = run(*words)
    assert done.exit_code == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert list(here.iterdir()) == []


def test_a_job_prints_its_plan_and_how_to_load_the_result(here: Path) -> None:
    done = run("--recipe", "tiny-flux-fp8", "--no-verify")
    assert done.exit_code == 0
    assert (here / "tiny-flux-fp8" / "model_index.json").is_file()
    assert "transformer_blocks.{0-1}.norm1.linear" in done.stdout
    assert 'from_pretrained("tiny-flux-fp8", dtype=torch.bfloat16)' in done.stdout
    assert "quantizing: 100 %" in done.stderr
    again = run("--recipe", "tiny-flux-fp8", "--no-verify")
    assert again.exit_code == 2
    assert "give --overwrite" in again.stderr
    assert run("--recipe", "tiny-flux-fp8", "--no-verify", "--overwrite").exit_code == 0


def test_a_job_verifies_itself_and_prints_json_alone_on_stdout(here: Path, write_recipe: Callable[[str], str]) -> None:
    file = write_recipe("model: builtin:tiny-flux\ncomponents:\n  text_encoder_2: {backend: int8}\n")
    done = run("--recipe", file, "--out", "out", "--json")
    assert done.exit_code == 0
    printed = strict_json(done.stdout)
    assert printed["out"] == "out"
    assert printed["verification"]["verified"] is True
    assert printed["verification"]["components"]["text_encoder_2"].endswith("loaded without bitroute; forward ok")
    assert len(printed["verification"]["layers"]) == 12


def test_a_bitroute_container_is_announced_with_its_import(here: Path) -> None:
    done = run("--recipe", "tiny-flux-mixed", "--no-verify")
    assert "import bitroute" in done.stdout
    assert "note: transformer: bitroute container, because it mixes the families" in done.stdout


def test_a_dry_run_prints_the_plan_and_writes_nothing(here: Path) -> None:
    table, machine = (
        run("--recipe", "tiny-flux-nf4", "--dry-run"),
        run("--recipe", "tiny-flux-nf4", "--dry-run", "--json"),
    )
    assert (table.exit_code, machine.exit_code) == (0, 0)
    planned = strict_json(machine.stdout)
    assert planned["components"]["transformer"]["container"] == "bitsandbytes"
    assert "bitsandbytes" in table.stdout
    assert list(here.iterdir()) == []


def test_failures_of_a_job_exit_with_1(here: Path, source: Path) -> None:
    file = source / "transformer" / NAME
    tensors = load_file(file)
    tensors["single_transformer_blocks.0.proj_mlp.weight"][0, 0] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    done = run("--recipe", "tiny-flux-fp8", "--model", source, "--out", "out")
    assert done.exit_code == 1
    assert "layer 'single_transformer_blocks.0.proj_mlp' is not finite" in done.stderr
    assert not (here / "out" / "transformer" / "config.json").exists()


def test_a_traceback_appears_only_with_vv(here: Path) -> None:
    words = ["--recipe", "tiny-flux-fp8", "--model", "nowhere"]
    assert [("Traceback" in run(*flags, *words).stderr) for flags in ([], ["-v"], ["-vv"])] == [
        False,
        False,
        True,
    ]
    assert "no such model folder" in run("-vv", *words).stderr


def test_verify_prints_the_worst_layers_and_exits_with_0_or_1(output: Path) -> None:
    done = run("verify", output, "--no-load")
    assert done.exit_code == 0
    assert "worst layers of 64 by SQNR" in done.stdout
    assert f"verified: {output}" in done.stdout
    (output / "scheduler" / "scheduler_config.json").unlink()
    done = run("verify", output, "--no-load", "--json")
    assert done.exit_code == 1
    found = strict_json(done.stdout)
    assert found["verified"] is False
    assert "scheduler_config.json" in found["problems"][0]["what"]


def test_an_exact_layer_is_null_in_json(source: Path, write_recipe: Callable[[str], str], here: Path) -> None:
    file = source / "transformer" / NAME
    tensors = load_file(file)
    tensors["single_transformer_blocks.0.proj_mlp.weight"].zero_()
    save_file(tensors, file, metadata={"format": "pt"})
    assert run("--recipe", "tiny-flux-fp8", "--model", source, "--out", "out", "--no-verify").exit_code == 0
    done = run("verify", "out", "--no-load", "--json")
    assert done.exit_code == 0
    layers = {layer["layer"]: layer["sqnr_db"] for layer in strict_json(done.stdout)["layers"]}
    assert layers["single_transformer_blocks.0.proj_mlp"] is None
    assert layers["single_transformer_blocks.1.proj_mlp"] > 30


def test_recipes_are_listed_shown_copied_and_checked(here: Path) -> None:
    listed = run("recipes", "list")
    assert all(name in listed.stdout for name in builtin_recipes())
    assert strict_json(run("recipes", "list", "--json").stdout).keys() == builtin_recipes().keys()
    assert run("recipes", "show", "flux-fp8").stdout == builtin_recipes()["flux-fp8"].read_text()
    (here / "mine.yaml").write_text("extends: flux-fp8\n")
    assert "# extends flux-fp8.yaml" in run("recipes", "show", "mine.yaml").stdout
    assert run("recipes", "copy", "tiny-flux-fp8").stdout == "tiny-flux-fp8.yaml\n"
    assert (here / "tiny-flux-fp8.yaml").read_text() == builtin_recipes()["tiny-flux-fp8"].read_text()
    (here / "tiny-flux-fp8.yaml").write_text("mine")
    refused = run("recipes", "copy", "tiny-flux-fp8")
    assert refused.exit_code == 2
    assert "exists already" in refused.stderr
    assert (here / "tiny-flux-fp8.yaml").read_text() == "mine"
    assert run("recipes", "copy", "flux-fp8", "other.yaml").exit_code == 0
    checked = run("recipes", "check", "other.yaml", "--model", "builtin:tiny-flux")
    assert checked.exit_code == 0
    assert "fits builtin:tiny-flux" in checked.stdout
    (here / "other.yaml").write_text("model: builtin:tiny-flux\ncomponents: {transformer: {backend: flaot8}}\n")
    assert "other.yaml:2: unknown backend 'flaot8'" in run("recipes", "check", "other.yaml").stderr


@pytest.mark.parametrize("name", [n for n in builtin_recipes() if n.startswith("tiny")])
def test_every_tiny_recipe_fits_its_model(name: str) -> None:
    assert run("recipes", "check", name).exit_code == 0


def test_backends_are_listed_and_described() -> None:
    listed = run("backends")
    assert [line.split()[0] for line in listed.stdout.splitlines()] == available()
    assert strict_json(run("backends", "--json").stdout).keys() == set(available())
    for name in available():
        described = strict_json(run("backends", name, "--json").stdout)
        assert described["name"] == name
        assert described["bits_per_weight"] > 3
        assert run("backends", name).stdout.startswith(f"{name}\n")
    assert "option scale: absmax | mse | four-over-six (default absmax)" in run("backends", "nvfp4").stdout


def test_inspect_shows_a_file_a_component_and_a_pipeline(convert: Convert, tiny: Path) -> None:
    file = strict_json(run("inspect", tiny / "transformer" / NAME, "--json").stdout)
    assert file["tensors"]["x_embedder.weight"]["dtype"] == "BF16"
    assert file["tensors"]["x_embedder.weight"]["shape"] == [192, 32]
    out = convert("tiny-flux-fp8")
    component = strict_json(run("inspect", out / "transformer", "--json").stdout)["components"]["transformer"]
    assert component["quant_method"] == "torchao"
    assert component["unaligned_tensors"] == 0
    assert component["dtypes"]["F8_E4M3"]["tensors"] == 52
    pipeline = run("inspect", out)
    assert f"made by bitroute {__version__} from builtin:tiny-flux" in pipeline.stdout
    assert "transformer: FluxTransformer2DModel, torchao" in pipeline.stdout
    assert "vae: AutoencoderKL, not quantized" in pipeline.stdout
    assert strict_json(run("inspect", out, "--json").stdout)["components"].keys() == {
        "text_encoder", "text_encoder_2", "transformer", "vae",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("transformer/config.json", "[]"),
        ("transformer/config.json", '{"quantization_config": 3}'),
        ("transformer/config.json", '{"quantization_config": {"bitroute": [1]}}'),
        ("transformer/config.json", '{"quantization_config": {"bitroute": {"layers": 3}}}'),
        ("transformer/config.json", '{"architectures": 3}'),
        ("transformer/config.json", '{"architectures": [3]}'),
        ("bitroute.json", '{"x": 1}'),
        ("bitroute.json", "{]"),
        ("bitroute.json", '{"source": 3}'),
        (f"transformer/{NAME}", "garbage"),
        (f"transformer/{NAME}", ""),
    ],
)  # fmt: skip
def test_inspect_survives_garbage(output: Path, name: str, content: str) -> None:
    (output / name).write_text(content)
    for flags in ([], ["--json"]):
        done = run("inspect", output, *flags)
        assert done.exit_code in (0, 2)
        assert done.exception is None or isinstance(done.exception, SystemExit | BitrouteError)
        assert done.exit_code == 0 or str(output / name) in done.stderr


def test_inspect_refuses_what_holds_no_safetensors(tmp_path: Path) -> None:
    (tmp_path / "x.bin").write_bytes(b"x")
    assert "no safetensors file" in run("inspect", tmp_path).stderr
    done = run("inspect", tmp_path / "x.bin")
    assert done.exit_code == 2
    assert "not a sound safetensors file" in done.stderr


def test_doctor_tells_versions_devices_and_formats() -> None:
    found = strict_json(run("doctor", "--json").stdout)
    assert found["libraries"]["bitroute"] == __version__
    assert found["devices"][0].startswith("cpu")
    assert found["formats"].keys() == set(available())
    text = run("doctor").stdout
    assert all(name in text for name in (*available(), "torch", "memory:", f"rounding: {found['rounding']}"))


@pytest.mark.parametrize(
    "words",
    ["--help", "recipes list", "recipes show tiny-flux-mixed", "--recipe tiny-flux-fp8 --dry-run"],
)
def test_a_reader_that_leaves_early_is_no_error(here: Path, words: str) -> None:
    pipe = f"{sys.executable} -m bitroute {words} | true"
    done = subprocess.run(["sh", "-c", pipe], capture_output=True, text=True, check=False, cwd=here)
    assert "Traceback" not in done.stderr
    assert "BrokenPipe" not in done.stderr


def test_a_pipe_without_unicode_gets_plain_lines_and_no_crash(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    done = command("--recipe", "tiny-flux-fp8", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "transformer_blocks.{0-1}.norm1.linear" in done.stdout
    assert "1152?192" in done.stdout
    assert "\x1b[" not in done.stdout


def test_the_default_output_is_named_after_the_recipe_file(here: Path) -> None:
    shutil.copy(builtin_recipes()["tiny-flux-int8"], here / "my recipe.yaml")
    assert run("--recipe", "my recipe.yaml", "--no-verify").exit_code == 0
    assert (here / "my recipe" / "model_index.json").is_file()


def test_what_a_library_makes_of_an_interrupt_is_an_interrupt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch or diffusers, while they are imported, may turn it into an error of their own."""

    def fail() -> None:
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
        except KeyboardInterrupt as interrupt:
            raise ImportError("cannot load module more than once per process") from interrupt

    monkeypatch.setitem(main.commands, "fail", click.Command("fail", callback=fail))
    found = CliRunner().invoke(main, ["fail"], prog_name="quantize")
    assert found.exit_code == 130
    assert "interrupted" in found.stderr and "did not expect" not in found.stderr


def test_an_interrupt_that_python_drops_comes_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is raised while an object is deleted goes nowhere."""

    class Interrupting:
        def __del__(self) -> None:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)

    def go_on() -> None:
        Interrupting()
        time.sleep(5)

    monkeypatch.setitem(main.commands, "on", click.Command("on", callback=go_on))
    found = CliRunner().invoke(main, ["on"], prog_name="quantize")
    assert found.exit_code == 130, found.output
