"""From the Hub to a checkpoint: what is asked for, what is downloaded, and which files of a repository count."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from threading import main_thread

import pytest
import torch
from click.testing import CliRunner
from diffusers import FluxTransformer2DModel
from hub import Hub
from huggingface_hub import constants
from safetensors.torch import load_file
from transformers import T5Config, T5EncoderModel

from bitroute import plan, verify
from bitroute.cli import main
from bitroute.convert.checkpoint import folder_name, open_pipeline
from bitroute.convert.describe import describe
from bitroute.convert.job import run
from bitroute.convert.plan import Plan, fetch
from bitroute.errors import JobError, RecipeError, SourceError

REPO = "me/tiny-flux"
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
RECIPE = "components:\n  transformer: {backend: float8}\n"
Convert = Callable[[str], Path]
Write = Callable[[str], str]
Command = Callable[..., "subprocess.CompletedProcess[str]"]


def refusal(model: str = REPO, recipe: str = "tiny-flux-fp8") -> str:
    with pytest.raises(RecipeError) as refused:
        plan(recipe, model)
    return str(refused.value)


def weights(folder: Path) -> dict[str, bytes]:
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*.safetensors")}


def converted(planned: Plan, out: Path) -> Path:
    run(fetch(planned), out)
    return out


# The plan


def test_a_plan_from_the_hub_is_that_of_the_downloaded_folder(hub: Hub, commit: str, tiny: Path) -> None:
    planned = plan("tiny-flux-fp8", REPO)
    assert planned.pipeline.is_outline
    remote, local = describe(planned), describe(plan("tiny-flux-fp8", str(tiny)))
    assert remote.pop("model") == REPO
    local.pop("model")
    assert remote["copied"].pop("LICENSE.md") == len("a licence")
    assert remote["source_bytes"] - local["source_bytes"] == remote["size_bytes"] - local["size_bytes"] == 9
    for sizes in (remote, local):
        del sizes["source_bytes"], sizes["size_bytes"]
    assert remote == local
    assert "tokenizer_2/tokenizer.json" not in hub.files_sent
    assert hub.leaks == []


def test_the_outline_is_gone_with_its_plan(hub: Hub, commit: str) -> None:
    planned = plan("tiny-flux-fp8", REPO)
    folder = planned.pipeline.folder
    assert (folder / WEIGHTS).stat().st_size == (hub.repositories[REPO].commits[commit][WEIGHTS].size_bytes)
    del planned
    assert not folder.exists()


def test_an_outline_never_becomes_a_checkpoint(hub: Hub, commit: str, tmp_path: Path) -> None:
    with pytest.raises(JobError, match="not downloaded yet"):
        run(plan("tiny-flux-fp8", REPO), tmp_path / "out")
    assert not (tmp_path / "out" / "bitroute.json").exists()
    assert not list((tmp_path / "out").rglob("config.json"))


def test_a_plan_leaves_nothing_in_the_cache(hub: Hub, commit: str) -> None:
    plan("tiny-flux-fp8", REPO)
    assert not Path(constants.HF_HUB_CACHE).exists()


@pytest.fixture(scope="module")
def full_size(tmp_path_factory: pytest.TempPathFactory, write_hollow: Callable[..., None], tiny: Path) -> Path:
    """The transformer and the T5 of FLUX.1-dev with their true sizes and shards, and the single-file twin; sparse."""
    folder = tmp_path_factory.mktemp("full") / "FLUX.1-dev"
    shutil.copytree(tiny, folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    with torch.device("meta"):
        transformer = FluxTransformer2DModel(
            guidance_embeds=True, num_layers=19, num_single_layers=38, num_attention_heads=24, in_channels=64
        )
        t5 = T5EncoderModel(
            T5Config(
                vocab_size=32128, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64,
                feed_forward_proj="gated-gelu", tie_word_embeddings=False,
            )
        )  # fmt: skip
    write_hollow(transformer, folder / "transformer")
    write_hollow(t5, folder / "text_encoder_2", 5 * 10**9)
    for part in ("text_encoder", "vae"):
        shutil.copytree(tiny / part, folder / part, dirs_exist_ok=True)
    shutil.copy(tiny / "scheduler" / "scheduler_config.json", folder / "scheduler")
    with open(folder / "flux1-dev.safetensors", "wb") as stream:
        stream.truncate(23_800_000_000)
    return folder


def test_the_plan_of_a_33_gb_model_needs_less_than_5_mb(hub: Hub, full_size: Path) -> None:
    hub.add("black-forest-labs/FLUX.1-dev", full_size)
    planned = plan("flux-fp8")
    assert planned.source_bytes > 33 * 10**9
    assert describe(planned)["components"] == describe(plan("flux-fp8", str(full_size)))["components"]
    assert hub.sent_bytes < 1_000_000
    assert not any("flux1-dev" in path for path in hub.sent)
    held = sum(512 * file.stat().st_blocks for file in planned.pipeline.folder.rglob("*") if file.is_file())
    assert held < 2_000_000


def test_a_header_longer_than_the_first_request_is_read_whole(
    hub: Hub, commit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bitroute.convert.download.HEAD_BYTES", 64)
    assert plan("tiny-flux-fp8", REPO).components[0].parameters > 10**6


# The job


def test_a_job_from_the_hub_writes_the_same_weights_and_names_its_commit(
    hub: Hub, commit: str, convert: Convert, tmp_path: Path
) -> None:
    done: list[int] = []
    planned = plan("tiny-flux-fp8", REPO)
    missing = planned.pipeline.hub.missing if planned.pipeline.hub else {}
    fetched = fetch(planned, lambda count, what: done.append(count))
    assert describe(fetched) == describe(planned)
    assert sum(done) == sum(missing.values())
    out = tmp_path / "out"
    run(fetched, out)
    assert weights(out) == weights(convert("tiny-flux-fp8"))
    record = json.loads((out / "bitroute.json").read_text())
    assert record["source"] == {"model": REPO, "revision": commit, "variant": None}
    assert (out / "LICENSE.md").is_file()
    others = ("flux1-tiny", "README", "fp16", "msgpack", "onnx", "pytorch_model.bin")
    assert not [name for name in hub.files_sent if any(other in name for other in others)]
    assert hub.leaks == []


def test_verify_finds_the_source_in_the_cache_without_a_request(hub: Hub, commit: str, tmp_path: Path) -> None:
    out = converted(plan("tiny-flux-fp8", REPO), tmp_path / "out")
    hub.requests.clear()
    found = verify(out, load=False)
    assert (found.problems, found.notes, found.compared) == ([], [], True)
    assert verify(out, REPO, load=False).compared
    assert hub.requests == []


def test_without_the_cache_verify_says_that_weights_were_not_compared(hub: Hub, commit: str, tmp_path: Path) -> None:
    out = converted(plan("tiny-flux-fp8", REPO), tmp_path / "out")
    blob = (Path(constants.HF_HUB_CACHE) / "models--me--tiny-flux" / "snapshots" / commit / WEIGHTS).resolve()
    blob.unlink()
    found = verify(out, load=False)
    assert (found.problems, found.compared) == ([], False)
    assert f"source {REPO}@{commit} is not here" in found.notes[0]
    with pytest.raises(SourceError, match=rf"without {WEIGHTS}(.|\n)*hf download {REPO} --revision {commit}"):
        verify(out, REPO, load=False)


def test_a_second_plan_uses_the_download_and_moves_with_the_branch(hub: Hub, commit: str, source: Path) -> None:
    fetch(plan("tiny-flux-fp8", REPO))
    hub.sent.clear()
    planned = plan("tiny-flux-fp8", REPO)
    assert not planned.pipeline.is_outline
    assert fetch(planned) is planned
    assert hub.sent_bytes < 20_000
    (source / "LICENSE.md").write_text("another licence")
    assert hub.add(REPO, source) != commit
    assert plan("tiny-flux-fp8", REPO).copied["LICENSE.md"] == len("another licence")


def test_a_cut_download_goes_on_where_it_was_cut(
    hub: Hub, commit: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 2**16)  # what is lost of a cut file, 10 MB by default
    planned = plan("tiny-flux-fp8", REPO)
    whole = hub.repositories[REPO].commits[commit][WEIGHTS]
    hub.sent.clear()
    hub.fail(f"^/cdn/.*{WEIGHTS}", cut_after=5_000_000)
    folder = fetch(planned).pipeline.folder
    assert (folder / WEIGHTS).read_bytes() == whole.file.read_bytes()
    sent = next(count for path, count in hub.sent.items() if path.endswith(WEIGHTS))
    assert whole.size_bytes <= sent < whole.size_bytes + 2**16
    assert f"downloading {REPO}: 100 % of" in capfd.readouterr().err


def test_a_failed_download_keeps_its_complete_files(hub: Hub, commit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    planned = plan("tiny-flux-fp8", REPO)
    hub.fail(f"^/cdn/.*{WEIGHTS}", status=404, times=1)
    with pytest.raises(JobError) as failed:
        fetch(planned)
    assert "HTTP 404" in str(failed.value)
    hub.sent.clear()
    fetch(planned)
    assert WEIGHTS in hub.files_sent
    assert "text_encoder_2/model.safetensors" not in hub.files_sent


def test_an_interrupt_ends_the_download_soon(hub: Hub, commit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 2**12)
    planned = plan("tiny-flux-fp8", REPO)
    done: list[int] = []

    def interrupt_once(count: int, what: str) -> None:
        done.append(count)
        if sum(done) > 10**6 > sum(done) - count:
            signal.pthread_kill(main_thread().ident or 0, signal.SIGINT)
            time.sleep(0.1)  # until the main thread has seen it

    with pytest.raises(KeyboardInterrupt):
        fetch(planned, interrupt_once)
    assert sum(done) < 10**7
    assert planned.pipeline.hub is not None
    assert WEIGHTS in planned.pipeline.hub.missing
    fetch(planned)


def test_a_full_disk_is_refused_before_the_download(
    hub: Hub, commit: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    planned = plan("tiny-flux-fp8", REPO)
    free = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: free._replace(free=1000))
    with pytest.raises(SourceError, match=r"too full for the download(.|\n)*HF_HOME"):
        fetch(planned)


# What a repository may look like


def rename(folder: Path, variant: str) -> None:
    """Every weight file gets the name of a variant."""
    for file in list(folder.rglob("*.safetensors")):
        file.rename(file.with_name(f"{file.stem}.{variant}.safetensors"))


def test_weights_of_a_variant_are_read_where_the_recipe_says_so_and_written_under_plain_names(
    hub: Hub, source: Path, convert: Convert, write_recipe: Write, tmp_path: Path
) -> None:
    rename(source, "fp16")
    hub.add("me/half", source)
    words = refusal("me/half")
    assert "no weights under plain names" in words
    assert "say `variant: fp16` in the recipe" in words
    bundled = plan("tiny-flux-fp8").recipe.text
    recipe = write_recipe(re.sub("(?m)^model: .*$", "model: me/half\nvariant: fp16", bundled))
    out = converted(plan(recipe), tmp_path / "out")
    assert weights(out) == weights(convert("tiny-flux-fp8"))
    assert json.loads((out / "bitroute.json").read_text())["source"]["variant"] == "fp16"
    found = verify(out, load=False)
    assert (found.problems, found.compared) == ([], True)


def test_an_unknown_variant_is_answered_with_the_known_ones(hub: Hub, commit: str, write_recipe: Write) -> None:
    words = refusal(REPO, write_recipe(f"model: {REPO}\nvariant: bf16\n{RECIPE}"))
    assert "no weights of the variant 'bf16'" in words
    assert "only plain weights, fp16" in words


def test_shards_are_found_by_their_index_and_a_single_file_beside_it_is_left_out(
    hub: Hub, source: Path, tiny: Path, write_recipe: Write, tmp_path: Path
) -> None:
    whole = FluxTransformer2DModel.from_pretrained(source / "transformer", torch_dtype=torch.bfloat16)
    whole.save_pretrained(source / "transformer", max_shard_size="2MB")
    shutil.copy(tiny / WEIGHTS, source / WEIGHTS)
    hub.add("me/sharded", source)
    fetched = fetch(plan(write_recipe(RECIPE), "me/sharded"))
    assert len([name for name in hub.files_sent if name.startswith("transformer/diffusion")]) > 2
    assert WEIGHTS not in hub.files_sent
    tensors = fetched.components[0].component.tensors
    assert tensors.keys() == load_file(tiny / WEIGHTS).keys()


def test_a_repository_that_is_no_pipeline_is_told_what_it_holds(hub: Hub, source: Path) -> None:
    (source / "model_index.json").unlink()
    (source / "flux1-dev.safetensors").write_bytes(b"")
    hub.add("me/single", source)
    words = refusal("me/single")
    assert "not a diffusers pipeline" in words
    assert "no model_index.json, but flux1-dev.safetensors" in words


def test_damaged_content_is_refused_as_in_a_folder(hub: Hub, source: Path) -> None:
    file = source / WEIGHTS
    file.write_bytes(file.read_bytes()[:-2])
    hub.add("me/cut", source)
    assert "not a sound safetensors file" in refusal("me/cut")
    (source / "model_index.json").write_text("[1")
    hub.add("me/broken", source)
    assert "cannot read the file as JSON" in refusal("me/broken")


def test_evaluation_opens_the_whole_pipeline(hub: Hub, commit: str, source: Path) -> None:
    pipeline = open_pipeline(REPO)
    assert not pipeline.is_outline
    assert pipeline.name == REPO
    needed = {file.relative_to(source).as_posix() for file in source.rglob("*") if file.is_file()}
    assert folder_name(pipeline.folder) == "tiny-flux"
    others = ("flux1-tiny", "README", "captions", "fp16", "msgpack", "onnx", "pytorch_model.bin")
    needed = {name for name in needed if not any(other in name for other in others)}
    assert {file.relative_to(pipeline.folder).as_posix() for file in pipeline.folder.rglob("*.*")} == needed


def test_a_dry_run_on_the_command_line_prints_the_plan(hub: Hub, commit: str, command: Command) -> None:
    done = command("--recipe", "tiny-flux-fp8", "--model", REPO, "--dry-run", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["model"] == REPO


def test_a_refusal_on_the_command_line_is_no_traceback(hub: Hub, source: Path) -> None:
    hub.add(REPO, source, gated=True)
    refused = CliRunner().invoke(main, ["--recipe", "tiny-flux-fp8", "--model", REPO, "--dry-run"])
    assert refused.exit_code == 2
    assert f"accept its conditions on https://huggingface.co/{REPO}" in refused.stderr
    assert "Traceback" not in refused.stderr
