"""Every call of every layer is heard: two experts, guidance, image and text streams, offloaded blocks."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file
from torch import Tensor, nn

from bitroute import Sampling, calibrate
from bitroute.calibrate.calibration import Offload
from bitroute.calibrate.capture import Capture, steps_of
from bitroute.eval.generate import load

SMALL = {"height": 32, "width": 32, "num_inference_steps": 4}
Family = Callable[[str], Path]


def rows_of(file: Path) -> dict[str, int]:
    return {name.removesuffix("/rows"): int(part[0]) for name, part in load_file(file).items() if "/rows" in name}


@pytest.mark.parametrize(("steps", "wanted"), [(20, 5), (28, 3), (4, 1)])
def test_after_as_many_samples_as_a_part_has_steps_each_step_was_measured(steps: int, wanted: int) -> None:
    longest = -(-steps // wanted)
    chosen = [steps_of(number, steps, wanted) for number in range(longest)]
    assert set.union(*map(set, chosen)) == set(range(steps))
    assert {len(found) for found in chosen} == {wanted}
    parts = [range(part * steps // wanted, (part + 1) * steps // wanted) for part in range(wanted)]
    assert all(len(found & set(part)) == 1 for found in chosen for part in parts)
    assert chosen == [steps_of(number, steps, wanted) for number in range(longest)]


def test_steps_of_a_copied_scheduler_are_not_steps_of_the_denoiser() -> None:
    """Pipelines that make sound beside their pictures step with a copy too."""
    pipe = SimpleNamespace(scheduler=FlowMatchEulerDiscreteScheduler())
    pipe.scheduler.set_timesteps(3)
    before, beside, x = FlowMatchEulerDiscreteScheduler.step, deepcopy(pipe.scheduler), torch.ones(1, 4)
    capture = Capture(pipe, {}, timesteps=1)
    with capture.listening():
        for timestep in pipe.scheduler.timesteps:
            pipe.scheduler.step(x, timestep, x)
            beside.step(x, timestep, x)
    assert capture.step == capture.steps == 3 and FlowMatchEulerDiscreteScheduler.step is before


def test_more_steps_than_there_are_means_all() -> None:
    assert steps_of(7, 4, 9) == {0, 1, 2, 3}


def test_each_expert_and_each_branch_of_guidance_is_heard(family: Family, tmp_path: Path) -> None:
    call = {**SMALL, "num_frames": 5, "guidance_scale": 3.0, "max_sequence_length": 16}
    found = calibrate(str(family("wan22")), tmp_path / "wan.safetensors", Sampling(("a fox",), call=call))
    rows = rows_of(found.file)
    block = "blocks.0.attn1.to_q"
    tokens = 2 * 2 * 2  # frames, height and width of the latents, in patches of 2 by 2
    early, late = rows[f"transformer/{block}"], rows[f"transformer_2/{block}"]
    assert early % (2 * tokens) == late % (2 * tokens) == 0 and early > 0 and late > 0
    assert early + late == 4 * 2 * tokens  # four steps, each with and without the prompt
    assert found.uncalled == [] and found.layers == len(rows)


def test_a_batch_of_two_counts_twice_and_convolutions_are_patches(family: Family, tmp_path: Path) -> None:
    model, prompts = str(family("sd15")), ("a fox",)
    wanted = ["*attn1.to_q", "conv_in"]
    plain, guided = (
        calibrate(
            model, tmp_path / f"{scale}", Sampling(prompts, call={**SMALL, "guidance_scale": scale}), layers=wanted
        )
        for scale in (1.0, 3.0)
    )
    assert {key: 2 * rows for key, rows in rows_of(plain.file).items()} == rows_of(guided.file)
    tensors = load_file(guided.file)
    assert tensors["unet/conv_in/hessian"].shape == (1, 36, 36) and tensors["unet/conv_in/rows"][0] == 4 * 2 * 4 * 4
    assert len(tensors) == 5 * guided.layers


@pytest.mark.parametrize("offload", ["none", "model", "block"])
def test_the_statistics_are_those_of_what_the_layers_were_given(
    offload: Offload, tiny: Path, sampling: Sampling, tmp_path: Path, given: dict[str, Tensor]
) -> None:
    """Both streams of a block, and a text encoder, however their weights come to where they run."""
    found = calibrate(
        "builtin:tiny-flux", tmp_path / "s", sampling, components=["transformer", "text_encoder_2"], offload=offload,
        timesteps=2, layers=list({key.partition("/")[2] for key in given}),
    )  # fmt: skip
    tensors = load_file(found.file)
    assert found.layers == len(given)
    for key, x in given.items():
        exact = x.double()
        torch.testing.assert_close(
            tensors[f"{key}/hessian"][0].double(), exact.T @ exact / len(x), rtol=1e-5, atol=1e-4
        )
        assert torch.equal(tensors[f"{key}/absmax"], x.float().abs().amax(0))
        known = {tuple(row) for row in x.tolist()}
        kept = tensors[f"{key}/inputs"]
        assert kept.dtype == x.dtype and all(tuple(row) in known for row in kept.tolist())


@pytest.fixture(scope="module")
def given(tiny: Path, sampling: Sampling) -> dict[str, Tensor]:
    """By key of the layer, all rows that it is given at the steps that are measured; by hooks of the test's own."""
    from bitroute.eval.calling import run_pipeline

    pipe, heard = load(tiny, "cpu"), dict[str, list[Tensor]]()
    for key in (
        "transformer/transformer_blocks.0.attn.to_q", "transformer/transformer_blocks.0.attn.add_k_proj",
        "transformer/single_transformer_blocks.1.proj_out", "text_encoder_2/encoder.block.0.layer.0.SelfAttention.q",
    ):  # fmt: skip
        component, _, layer = key.partition("/")
        heard[key] = []

        def hear(_: nn.Module, args: tuple[Tensor], calls: list[Tensor] = heard[key]) -> None:
            calls.append(args[0].flatten(0, -2).clone())

        getattr(pipe, component).get_submodule(layer).register_forward_pre_hook(hear)
    for sample in sampling.samples():
        run_pipeline(pipe, sampling, sample, output_type="latent")
    chosen = [4 * number + step for number in range(3) for step in sorted(steps_of(number, 4, 2))]
    return {
        key: torch.cat([calls[n] for n in chosen] if key.startswith("transformer") else calls)
        for key, calls in heard.items()
    }
