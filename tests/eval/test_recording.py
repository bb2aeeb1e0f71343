"""Recording the original's denoiser and text encoders: every call, to the bit, each tensor once."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithPast

from bitroute.errors import JobError
from bitroute.eval.generate import draw, load
from bitroute.eval.recording import LAYER_ROWS, Recorder, Tape, encodings, record, record_apart
from bitroute.eval.replay import Recorded, replay
from bitroute.eval.sampling import Sampling


@pytest.fixture(scope="module")
def recorded(tiny: Path, sampling: Sampling, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recorded")
    record(tiny, sampling, folder)
    return folder


def tensors(folder: Path) -> dict[str, dict[str, Tensor]]:
    return {file.name: load_file(file) for file in sorted(folder.glob("*.safetensors"))}


def same(one: Path, other: Path) -> bool:
    first, second = tensors(one), tensors(other)
    keys = {file: found.keys() for file, found in first.items()}
    return keys == {file: found.keys() for file, found in second.items()} and all(
        torch.equal(found[name], second[file][name]) for file, found in first.items() for name in found
    )


def test_every_step_of_every_prompt_is_recorded_with_the_schedulers_timestep(
    recorded: Path, sampling: Sampling
) -> None:
    run = json.loads((recorded / "run.json").read_text())
    assert run == {
        "samples": [sample.stem for sample in sampling.samples()], "denoisers": ["transformer"],
        "text_encoders": ["text_encoder", "text_encoder_2"],
    }  # fmt: skip
    for stem in run["samples"]:
        sample = Recorded(recorded / f"{stem}.safetensors")
        assert [call["step"] for call in sample.calls] == [0, 1, 2, 3]
        assert sample.timesteps == [1000, 750, 500, 250]


def test_prompt_embeddings_are_stored_once_and_latents_for_each_step(recorded: Path) -> None:
    sample = Recorded(recorded / "0000-0.safetensors")
    inputs = [call["kwargs"]["dict"] for call in sample.calls]
    assert len({given["encoder_hidden_states"]["tensor"] for given in inputs}) == 1
    assert len({given["hidden_states"]["tensor"] for given in inputs}) == 4
    assert sample.read(inputs[0]["hidden_states"]["tensor"]).dtype == torch.bfloat16


def test_it_starts_from_the_same_noise_as_the_picture(
    tiny: Path, sampling: Sampling, recorded: Path, tmp_path: Path
) -> None:
    draw(tiny, replace(sampling, prompts=sampling.prompts[:1]), tmp_path)
    last = Recorded(recorded / "0000-0.safetensors")
    call = last.calls[-1]
    latents = last.read(call["kwargs"]["dict"]["hidden_states"]["tensor"]).float()
    velocity = last.read(call["output"]).float().reshape(latents.shape)
    drawn = load_file(tmp_path / "0000-0.safetensors")["latents/3"].float()
    assert torch.allclose(latents - 0.25 * velocity, drawn, atol=0.02)  # the last Euler step, from sigma 0.25 to 0


def test_the_denoiser_is_given_what_the_text_encoders_answered(recorded: Path) -> None:
    sample = Recorded(recorded / "0000-0.safetensors")
    answers = {call["encoder"]: call["outputs"] for call in sample.texts}
    given = sample.calls[0]["kwargs"]["dict"]
    assert list(answers) == ["text_encoder", "text_encoder_2"]
    assert answers["text_encoder"]["pooler_output"] == given["pooled_projections"]["tensor"]
    assert answers["text_encoder_2"]["last_hidden_state"] == given["encoder_hidden_states"]["tensor"]
    assert {name for answer in answers.values() for name in answer.values()} & sample.given == {
        given["pooled_projections"]["tensor"], given["encoder_hidden_states"]["tensor"]
    }  # fmt: skip


def test_guidance_encodes_two_prompts(tiny: Path, sampling: Sampling, tmp_path: Path) -> None:
    call = {**sampling.call, "num_inference_steps": 1, "true_cfg_scale": 2.0, "negative_prompt": "blurred"}
    record(tiny, replace(sampling, call=call), tmp_path, prompts=1)
    texts = Recorded(tmp_path / "0000-0.safetensors").texts
    assert [text["encoder"] for text in texts] == ["text_encoder", "text_encoder_2"] * 2
    assert texts[0]["args"] != texts[2]["args"]


def test_an_encoder_that_is_given_what_no_file_can_hold_is_left_out(
    tiny: Path, sampling: Sampling, recorded: Path
) -> None:
    def give_a_cache(_: Any, args: Any, options: dict[str, Any]) -> Any:
        return args, {**options, "cache": object()}

    pipe = load(tiny, "cpu")
    pipe.text_encoder_2.register_forward_pre_hook(give_a_cache, with_kwargs=True)
    recorder = Recorder(pipe)
    tape = recorder.record(sampling, next(sampling.samples()), layers=False)
    assert recorder.encoders == {"text_encoder": True, "text_encoder_2": False}
    assert [call["encoder"] for call in tape.texts] == ["text_encoder"]
    assert tape.calls == Recorded(recorded / "0000-0.safetensors").calls


def test_of_a_language_models_answer_the_last_hidden_state_is_recorded_and_no_logits() -> None:
    hidden = (torch.zeros(1, 2, 3), torch.ones(1, 2, 3))
    answer = CausalLMOutputWithPast(logits=torch.zeros(1, 2, 9), hidden_states=hidden)
    assert list(encodings(answer)) == ["hidden_states"]
    assert encodings(answer)["hidden_states"] is hidden[1]


@pytest.mark.parametrize("form", [tuple, list])
def test_a_text_encoder_may_answer_with_several_tensors_or_one(form: Callable[[Any], Any]) -> None:
    states, pooled = torch.zeros(1, 2, 3), torch.ones(1, 3)
    assert encodings(form([states, pooled])) == {"0": states, "1": pooled}
    assert encodings(states) == {"0": states}
    with pytest.raises(JobError, match="a text encoder's answer cannot be recorded"):
        encodings(form([]))


def test_layer_inputs_are_a_few_rows_at_three_steps_of_two_samples(recorded: Path) -> None:
    layer = "transformer/transformer_blocks.0.attn.to_q"
    found = [[x for _, x in Recorded(recorded / f"{n:04d}-0.safetensors").layer_inputs(layer)] for n in range(3)]
    assert [len(inputs) for inputs in found] == [3, 3, 0]
    assert all(x.shape[-1] == 192 and 1 < len(x) <= LAYER_ROWS for inputs in found for x in inputs)


def test_a_process_of_its_own_records_the_same_and_only_once(
    tiny: Path, sampling: Sampling, recorded: Path, tmp_path: Path
) -> None:
    record_apart(tiny, sampling, tmp_path)
    assert same(tmp_path, recorded)
    before = {file.name: file.stat().st_mtime_ns for file in tmp_path.iterdir()}
    record_apart(tiny, sampling, tmp_path)
    assert {file.name: file.stat().st_mtime_ns for file in tmp_path.iterdir()} == before


def test_an_unfinished_recording_is_made_again(tiny: Path, sampling: Sampling, recorded: Path, tmp_path: Path) -> None:
    record(tiny, sampling, tmp_path, prompts=2)
    (tmp_path / "run.json").unlink()
    (tmp_path / "0000-0.safetensors").write_bytes(b"cut")
    record(tiny, sampling, tmp_path)
    assert same(tmp_path, recorded)


@pytest.mark.parametrize("name", ["0001-0.safetensors", "run.json"])
def test_a_damaged_recording_is_made_again(
    tiny: Path, sampling: Sampling, recorded: Path, tmp_path: Path, name: str
) -> None:
    folder = Path(shutil.copytree(recorded, tmp_path / "recorded"))
    (folder / name).write_bytes((folder / name).read_bytes()[:-3])
    record(tiny, sampling, folder)
    assert same(folder, recorded)
    assert (folder / "run.json").read_text() == (recorded / "run.json").read_text()


def test_a_damaged_file_is_named_with_the_folder_to_remove(recorded: Path, tmp_path: Path) -> None:
    file = tmp_path / "0000-0.safetensors"
    save_file({"x": torch.zeros(1)}, file)
    with pytest.raises(JobError, match=r"damaged\n.*no calls, texts, timesteps in its header"):
        Recorded(file)
    file.write_bytes((recorded / "0000-0.safetensors").read_bytes()[:-1])
    with pytest.raises(JobError, match=f"damaged\n(.*\n)*.*remove {re.escape(str(tmp_path))} and"):
        Recorded(file)


def test_only_the_first_prompts_with_the_first_seed_are_recorded(
    tiny: Path, sampling: Sampling, tmp_path: Path
) -> None:
    record(tiny, replace(sampling, seeds=(7, 8)), tmp_path, prompts=2)
    assert list(tensors(tmp_path)) == ["0000-7.safetensors", "0001-7.safetensors"]


def test_guidance_calls_the_denoiser_twice_in_a_step(tiny: Path, sampling: Sampling, tmp_path: Path) -> None:
    call = {**sampling.call, "true_cfg_scale": 2.0, "negative_prompt": "blurred"}
    guided = replace(sampling, call=call)
    record(tiny, guided, tmp_path, prompts=2)
    assert [call["step"] for call in Recorded(tmp_path / "0000-0.safetensors").calls] == [0, 0, 1, 1, 2, 2, 3, 3]
    steps = replay(tiny, tiny, tmp_path, guided).trajectory["timesteps"]
    assert [(step["step"], step["timestep"], step["relative_error"]) for step in steps] == [
        (0, 1000, 0), (1, 750, 0), (2, 500, 0), (3, 250, 0)
    ]  # fmt: skip


def test_a_pipeline_that_is_given_a_picture_is_recorded_too(tiny: Path, sampling: Sampling, tmp_path: Path) -> None:
    Image.new("RGB", (64, 64), "teal").save(tmp_path / "teal.png")
    inputs = {"image": [str(tmp_path / "teal.png")]}
    edited = replace(sampling, pipeline="FluxImg2ImgPipeline", inputs=inputs, call={**sampling.call, "strength": 0.5})
    record(tiny, edited, tmp_path / "recorded", prompts=1)
    found = replay(tiny, tiny, tmp_path / "recorded", edited)
    assert [step["relative_error"] for step in found.trajectory["timesteps"]] == [0, 0]
    Image.new("RGB", (64, 64), "red").save(tmp_path / "teal.png")
    record(tiny, edited, tmp_path / "other", prompts=1)
    first, second = (Recorded(tmp_path / name / "0000-0.safetensors").calls[0] for name in ("recorded", "other"))
    latents = [call["kwargs"]["dict"]["hidden_states"] for call in (first, second)]
    assert latents[0] != latents[1]


def test_a_unet_with_positional_arguments_is_recorded_too(tiny: Path, tmp_path: Path) -> None:
    small_unet(tiny).save_pretrained(tmp_path / "model")
    sampling = Sampling(("fox", "guitar"), (0,), {"height": 64, "width": 64, "num_inference_steps": 2})
    record(tmp_path / "model", sampling, tmp_path / "recorded")
    found = replay(tmp_path / "model", tiny, tmp_path / "recorded", sampling)
    assert [step["relative_error"] for step in found.trajectory["timesteps"]] == [0, 0]
    assert not found.layers


def small_unet(tiny: Path) -> Any:
    """A Stable Diffusion pipeline with the bundled CLIP and VAE and a random UNet."""
    import diffusers

    flux = diffusers.FluxPipeline.from_pretrained(tiny, dtype=torch.bfloat16)
    torch.manual_seed(0)
    channels = flux.vae.config.latent_channels
    unet = diffusers.UNet2DConditionModel(
        sample_size=32, in_channels=channels, out_channels=channels, block_out_channels=(32, 64), layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=flux.text_encoder.config.hidden_size, attention_head_dim=8, norm_num_groups=8,
    )  # fmt: skip
    return diffusers.StableDiffusionPipeline(
        vae=flux.vae, text_encoder=flux.text_encoder, tokenizer=flux.tokenizer, unet=unet.to(torch.bfloat16),
        scheduler=diffusers.DDIMScheduler(clip_sample=False, steps_offset=1),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def test_arguments_of_every_kind_come_back_as_they_were(tmp_path: Path) -> None:
    given = {
        "mask": None, "flag": False, "scale": 0.5, "name": "a", "shapes": [(1, 2), (3, 4)],
        "nested": {"time_ids": torch.arange(6), "images": [torch.ones(2, 3, dtype=torch.bfloat16).T]},
        "t": torch.tensor(3.0), "none": torch.empty(0, 4),
    }  # fmt: skip
    tape = Tape()
    packed = json.loads(json.dumps(tape.pack(given)))
    tape.save(tmp_path / "sample.safetensors")
    found = Recorded(tmp_path / "sample.safetensors").unpack(packed, "cpu")
    assert repr(found) == repr(given)  # with the tensors' values, dtypes and shapes


def test_a_tensor_that_is_changed_in_place_later_is_kept_as_it_was() -> None:
    tape, latents = Tape(), torch.zeros(3)
    first = tape.add(latents)
    latents += 1
    assert tape.tensors[first].tolist() == [0, 0, 0]
    assert tape.add(latents) != first
    assert tape.add(torch.zeros(3)) == first


def test_an_argument_that_no_file_can_hold_is_refused() -> None:
    with pytest.raises(JobError, match=r"cannot be recorded\n.*Generator"):
        Tape().pack({"generator": torch.Generator()})


def test_a_pipeline_that_does_not_load_is_a_job_error(
    tiny: Path, sampling: Sampling, damage: Callable[..., Path], tmp_path: Path
) -> None:
    broken = damage(tiny, "transformer", lambda found: found.clear())
    with pytest.raises(JobError, match="the pipeline cannot be recorded"):
        record_apart(broken, sampling, tmp_path / "recorded")
    assert not (tmp_path / "recorded" / "run.json").exists()
