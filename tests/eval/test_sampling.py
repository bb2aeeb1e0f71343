"""What is drawn: prompts, seeds and arguments from texts that strangers write, and the key of the cache."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bitroute.errors import RecipeError
from bitroute.eval.sampling import Sampling, call_arguments, files_in, parse_seeds, prompt_sets, read_prompts


@pytest.fixture
def prompt_file(tmp_path: Path) -> Callable[[bytes], str]:
    def write(content: bytes) -> str:
        file = tmp_path / "prompts.txt"
        file.write_bytes(content)
        return str(file)

    return write


def test_every_prompt_is_drawn_with_every_seed() -> None:
    samples = list(Sampling(("a", "b"), (0, 7)).samples())
    assert [(sample.prompt, sample.seed) for sample in samples] == [("a", 0), ("a", 7), ("b", 0), ("b", 7)]
    assert len({sample.stem for sample in samples}) == 4


def test_comments_empty_lines_and_spaces_are_no_prompts(prompt_file: Callable[[bytes], str]) -> None:
    file = prompt_file("\ufeff# a set\r\n\r\n  a fox \r\n#1\n\tein Fuchs, süß\n".encode())
    assert read_prompts(file) == ("a fox", "ein Fuchs, süß")


def test_every_built_in_set_has_prompts_and_none_twice() -> None:
    assert "emoji-16" in prompt_sets()
    for name in prompt_sets():
        prompts = read_prompts(name)
        assert len(set(prompts)) == len(prompts) > 0


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "no prompt"),
        (b"# only\n\n# comments\n", "no prompt"),
        (b"\x89PNG\r\n\x1a\n\x00\x00", "cannot read the prompts"),
        (b"a fox\0\0\0", "no text"),
        (b"a fox\n" * 200_000, "too large"),
    ],
)
def test_a_prompt_file_that_is_none_is_refused_by_name(
    prompt_file: Callable[[bytes], str], content: bytes, reason: str
) -> None:
    file = prompt_file(content)
    with pytest.raises(RecipeError, match=reason) as error:
        read_prompts(file)
    assert file in str(error.value)


@pytest.mark.parametrize("name", ["a red fox in the snow, " * 30, ".", ""])
def test_a_prompt_or_a_folder_instead_of_a_file_is_refused_with_what_is_expected(name: str) -> None:
    with pytest.raises(RecipeError, match="a text file, or one of emoji-16"):
        read_prompts(name)


def test_an_almost_right_name_of_a_prompt_set_gets_the_right_one() -> None:
    with pytest.raises(RecipeError, match="did you mean 'emoji-16'"):
        read_prompts("emoji16")


@pytest.mark.parametrize(("text", "seeds"), [("0", (0,)), ("0,1, 2", (0, 1, 2)), ("4294967295", (2**32 - 1,))])
def test_seeds_are_read(text: str, seeds: tuple[int, ...]) -> None:
    assert parse_seeds(text) == seeds


@pytest.mark.parametrize("text", ["", "1,", "a", "-1", "1.5", "0,0", "1,01", "0-3", "4294967296", "9" * 5000, "²"])
def test_what_is_no_list_of_seeds_is_refused(text: str) -> None:
    with pytest.raises(RecipeError, match="not a list of seeds") as error:
        parse_seeds(text)
    assert len(str(error.value)) < 300


def test_arguments_are_json_where_they_can_be_and_text_otherwise() -> None:
    texts = ["guidance_scale=3.5", "negative_prompt=blurry, dark", "sigmas=[1.0, 0.5]", "flag=true", "empty=", "a=b=c"]
    assert call_arguments(texts, steps=20, size="1024X768") == {
        "num_inference_steps": 20, "width": 1024, "height": 768, "guidance_scale": 3.5,
        "negative_prompt": "blurry, dark", "sigmas": [1.0, 0.5], "flag": True, "empty": "", "a": "b=c",
    }  # fmt: skip


@pytest.mark.parametrize("size", ["64", "64x", "x64", "64x64x64", "-64x64", "6.4x64", "64*64", ""])
def test_what_is_no_size_is_refused(size: str) -> None:
    with pytest.raises(RecipeError, match="not a size"):
        call_arguments([], size=size)


@pytest.mark.parametrize("text", ["steps", "=4", "two words=1", "--steps=4", ""])
def test_what_is_no_argument_is_refused(text: str) -> None:
    with pytest.raises(RecipeError, match="NAME=VALUE"):
        call_arguments([text])


@pytest.mark.parametrize("value", ["NaN", "-Infinity", "[1, NaN]"])
def test_a_number_that_json_does_not_know_is_refused_before_anything_is_drawn(value: str) -> None:
    with pytest.raises(RecipeError, match="not a finite number"):
        call_arguments([f"guidance_scale={value}"])


def test_a_sampling_survives_the_way_to_another_process() -> None:
    sampling = Sampling(("a", "b"), (0, 7), {"height": 64}, threads=2, pipeline="FluxPipeline")
    sent = Sampling(**json.loads(json.dumps(sampling.request())))
    assert sent.describe() == sampling.describe()
    assert list(sent.samples()) == list(sampling.samples())


@pytest.mark.parametrize(
    "change",
    [
        {"prompts": ("a", "c")},
        {"seeds": (1,)},
        {"call": {"num_inference_steps": 5}},
        {"attention": "math"},
        {"threads": 2},
        {"pipeline": "FluxImg2ImgPipeline"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_every_setting_is_in_the_key(tiny: Path, change: dict[str, object]) -> None:
    sampling = Sampling(("a", "b"), (0,), {"num_inference_steps": 4})
    assert replace(sampling).key(tiny) == sampling.key(tiny)
    assert replace(sampling, **change).key(tiny) != sampling.key(tiny)  # type: ignore[arg-type]


def test_a_processor_with_other_instructions_has_another_key(tiny: Path) -> None:
    code = "import sys; from pathlib import Path; from bitroute.eval.sampling import Sampling; "
    code += "print(Sampling(('a',)).key(Path(sys.argv[1])))"
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": "default"}
    key = subprocess.check_output([sys.executable, "-P", "-c", code, str(tiny)], env=environment, text=True).strip()
    assert len(key) == 16
    if torch.backends.cpu.get_cpu_capability() != "DEFAULT":
        assert key != Sampling(("a",)).key(tiny)


@pytest.mark.parametrize("device", ["gpu", "cuda:99", ""])
def test_a_device_that_is_not_here_is_refused(tiny: Path, device: str) -> None:
    with pytest.raises(RecipeError, match=f"no device '{device}' here"):
        Sampling(("a",), device=device).key(tiny)


def test_the_models_files_are_in_the_key(source: Path, tiny: Path) -> None:
    sampling = Sampling(("a",))
    keys = [sampling.key(source)]
    weights = source / "transformer" / "diffusion_pytorch_model.safetensors"
    os.utime(weights, ns=(0, weights.stat().st_mtime_ns + 1))
    keys.append(sampling.key(source))
    (source / "transformer" / "extra.safetensors").write_bytes(b"")
    keys.append(sampling.key(source))
    (source / "vae" / "config.json").unlink()
    keys += [sampling.key(source), sampling.key(tiny), sampling.key(source, tiny)]
    assert len(set(keys)) == len(keys)


def test_the_key_changes_with_files_behind_a_linked_folder(tmp_path: Path) -> None:
    model, elsewhere = tmp_path / "model", tmp_path / "elsewhere"
    model.mkdir()
    elsewhere.mkdir()
    (model / "transformer").symlink_to(elsewhere, target_is_directory=True)
    (elsewhere / "loop").symlink_to(model, target_is_directory=True)
    (elsewhere / "weights").write_bytes(b"good")
    before = Sampling(("fox",)).key(model)
    (elsewhere / "weights").write_bytes(b"destroyed")
    assert Sampling(("fox",)).key(model) != before
    assert sum(file.stat().st_size for file in files_in(model)) == 9
