"""Publishing: the real client against a hub on the loopback interface, with faults, and what is refused before."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from hub import Hub
from huggingface_hub import ModelCard, constants, snapshot_download

from bitroute.convert.commands import push_folder
from bitroute.convert.files import sha256, write_json
from bitroute.convert.job import run
from bitroute.convert.origin import find_origin
from bitroute.convert.plan import fetch, plan
from bitroute.convert.push import check_folder, check_push, push
from bitroute.convert.reading import read_json
from bitroute.convert.recipe import read_recipe
from bitroute.convert.record import read_record
from bitroute.convert.schema import PushRecipe
from bitroute.convert.seal import sealed
from bitroute.convert.upload import Target, commit_files, find_target, open_target, stale_files
from bitroute.convert.verify import verify
from bitroute.errors import BitrouteError, JobError, RecipeError, SourceError

BASE, REPO = "you/tiny-flux", "me/tiny-flux-fp8"
CARD = "---\nlicense: other\nlicense_name: tiny-license\nlicense_link: LICENSE.md\n---\n# base"
COMPARE = """
import sys, torch
from diffusers import FluxPipeline
call = dict(height=64, width=64, num_inference_steps=2, guidance_scale=0.0, max_sequence_length=16, output_type="np")
pictures = []
for place in sys.argv[1:]:
    pipe = FluxPipeline.from_pretrained(place, dtype=torch.bfloat16)
    pictures.append(pipe("red apple, noto style", generator=torch.Generator().manual_seed(0), **call).images)
assert "bitroute" not in sys.modules
assert pictures[0].std() > 0.05
assert (pictures[0] == pictures[1]).all()
"""


@pytest.fixture
def me(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """The hub, and a token of me that may write."""
    hub.tokens = {"hf_me": "me", "hf_reader": "me", "hf_stranger": "stranger"}
    hub.read_only = {"hf_reader"}
    monkeypatch.setenv("HF_TOKEN", "hf_me")
    return hub


@pytest.fixture
def base(me: Hub, source: Path) -> str:
    """A gated model of somebody else which I may read; its commit."""
    (source / "README.md").write_text(CARD)
    (source / "LICENSE.md").write_text("you may")
    commit = me.add(BASE, source, gated=True)
    me.repositories[BASE].readers = {"me"}
    return commit


def refusal(target: Target, base: str | None = None) -> str:
    with pytest.raises(RecipeError) as refused:
        check_push(target, base)
    return str(refused.value)


def published(hub: Hub, repo: str = REPO, ref: str = "main") -> dict[str, bytes]:
    repository = hub.repositories[repo]
    return {name: blob.file.read_bytes() for name, blob in repository.commits[repository.refs[ref]].items()}


def uploads(hub: Hub) -> list[str]:
    return [request for request in hub.requests if request.startswith("PUT ")]


def commit_small(target: Target, files: dict[str, str | bytes]) -> str:
    """A commit of a few bytes, by the steps of `push`."""
    parent = open_target(target, find_target(target) is not None)
    return commit_files(target, parent, files, stale_files(target, parent, list(files)), "a message", bars=False)


# The whole way


def test_a_push_goes_on_after_faults_and_what_arrives_draws_what_the_folder_draws(
    me: Hub, base: str, tmp_path: Path
) -> None:
    folder = tmp_path / "out"
    run(fetch(plan("tiny-flux-fp8", BASE)), folder)
    (folder / "notes.txt").write_text("mine alone")
    found = verify(folder, load=False)
    target, said = Target(REPO, accept_license=True), list[str]()
    me.fail(r"/upload/", status=503, method="PUT")  # the client tries again by itself
    me.fail(r"/commit/", cut_after=0, method="POST")  # the commit is made, and its answer lost
    with pytest.raises(JobError, match="the upload was interrupted"):
        push(folder, target, verification=found)
    sent = len(uploads(me))
    url = push(folder, target, verification=found, progress=said.append)

    assert url == f"{me.url}/{REPO}"
    assert len(uploads(me)) == sent > 4
    assert me.leaks == []
    assert any("loading the checkpoint in a fresh process" in words for words in said)
    assert len(me.repositories[REPO].commits) == 2  # the empty one, and all files at once
    assert not me.repositories[REPO].private
    listed = json.loads((folder / "bitroute.json").read_text())["files"]
    files = published(me)
    assert files.keys() == {*listed, "README.md"}
    assert files["LICENSE.md"] == b"you may"
    data = ModelCard(files["README.md"].decode()).data.to_dict()
    assert (data["base_model"], data["license"], data["license_name"]) == (BASE, "other", "tiny-license")
    assert data["license_link"] == "LICENSE.md"
    assert base in files["README.md"].decode()
    assert f'from_pretrained("{REPO}", dtype=torch.bfloat16)' in files["README.md"].decode()

    downloaded = snapshot_download(REPO)
    assert verify(downloaded, load=False).problems == []
    words = [sys.executable, "-P", "-c", COMPARE, REPO, str(folder)]
    done = subprocess.run(
        words, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_what_is_known_of_the_base_goes_into_the_card(
    me: Hub, base: str, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = read_record(output)
    record = replace(local, model=BASE, revision=base)
    found = find_origin(record)
    assert (found.repo, found.commit, found.note) == (BASE, base, "")
    assert found.license["license_link"] == f"https://huggingface.co/{BASE}/blob/{base}/LICENSE.md"  # it was not copied
    assert find_origin(local).repo is None
    given = find_origin(local, BASE)
    assert (given.repo, given.commit, given.license["license"]) == (BASE, None, "other")
    monkeypatch.setenv("HF_TOKEN", "hf_stranger")
    assert "could not be read: the model is gated" in find_origin(record).note


# The repository


def test_a_commit_that_fails_is_made_by_the_next_try_which_sends_nothing_again(me: Hub) -> None:
    files: dict[str, str | bytes] = {"a.safetensors": b"1", "b.json": b"2"}
    me.fail(r"/commit/", status=503, method="POST")
    with pytest.raises(JobError, match="run the same command again: what has arrived is not sent twice"):
        commit_small(Target(REPO), files)
    assert published(me) == {}
    commit_small(Target(REPO), files)
    assert published(me) == files
    assert len(uploads(me)) == 1


def test_a_private_repository_is_made_private(me: Hub) -> None:
    assert commit_small(Target(REPO, private=True), {"a": b"1"}) == f"{me.url}/{REPO}"
    assert me.repositories[REPO].private
    assert find_target(Target(REPO)) is True


def test_a_branch_is_made_if_it_is_missing_and_main_stays(me: Hub) -> None:
    commit_small(Target(REPO), {"a": b"1"})
    url = commit_small(Target(REPO, revision="dev"), {"a": b"2"})
    commit_small(Target(REPO, revision="dev"), {"b": b"3"})
    assert url == f"{me.url}/{REPO}/tree/dev"
    assert published(me) == {"a": b"1"}
    assert published(me, ref="dev") == {"a": b"2", "b": b"3"}


def test_a_pull_request_leaves_the_branch_alone_and_can_be_added_to(me: Hub) -> None:
    commit_small(Target(REPO), {"a": b"1"})
    url = commit_small(Target(REPO, create_pr=True), {"a": b"2"})
    assert url == f"{me.url}/{REPO}/discussions/1"
    assert published(me) == {"a": b"1"}
    commit_small(Target(REPO, revision="refs/pr/1"), {"b": b"3"})
    assert published(me, ref="refs/pr/1") == {"a": b"2", "b": b"3"}


def test_weights_of_another_checkpoint_do_not_stay_and_everything_else_does(me: Hub) -> None:
    shards = [f"transformer/model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    stale = [*shards, "transformer/model.safetensors.index.json", "vae/pytorch_model.bin", "old.gguf"]
    kept = {"vae/config.json": b"{}", "picture.png": b"p", "notes.md": b"n"}
    commit_small(Target(REPO), {**dict.fromkeys(stale, b"old"), **kept})
    new: dict[str, str | bytes] = {"transformer/model.safetensors": b"new", "vae/config.json": b"{ }"}
    parent = open_target(Target(REPO), True)
    assert stale_files(Target(REPO), parent, list(new)) == sorted(stale)
    commit_small(Target(REPO), new)
    assert published(me) == {**kept, **new}


def test_a_commit_of_somebody_else_in_between_is_not_overwritten(me: Hub, tmp_path: Path) -> None:
    target = Target(REPO)
    commit_small(target, {"a": b"1"})
    parent = open_target(target, True)
    commit_small(target, {"a": b"2"})
    with pytest.raises(JobError, match="somebody else changed the repository meanwhile"):
        commit_files(target, parent, {"a": b"3"}, [], "a message", bars=False)
    assert published(me) == {"a": b"2"}


def test_metadata_that_the_hub_refuses_stops_the_push_before_a_file_is_sent(me: Hub) -> None:
    with pytest.raises(JobError, match='"license" must be one of'):
        commit_small(Target(REPO), {"a.safetensors": b"1", "README.md": b"---\nlicense: my-own\n---\n"})
    assert uploads(me) == []


# What is refused before anything is written


@pytest.mark.parametrize("repo", ["tiny", "a/b/c", "me/", "me/x@dev", "../x", "me/x y", ""])
def test_a_name_that_no_repository_has_is_refused(me: Hub, repo: str) -> None:
    assert "not the name of a repository" in refusal(Target(repo))
    assert me.requests == []


def test_words_that_contradict_each_other_are_refused_together(me: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    words = refusal(Target("me", revision="0" * 40, create_pr=True))
    for part in ("not the name of a", "against the default branch", "a commit cannot be", "HF_HUB_OFFLINE is set"):
        assert part in words


@pytest.mark.parametrize(
    ("token", "repo", "words"),
    [
        (None, REPO, "no token on this machine"),
        ("hf_expired", REPO, "does not know this token"),
        ("hf_reader", REPO, "the token may only read"),
        ("hf_me", "stranger/new", "may not make repositories of 'stranger'"),
        ("hf_stranger", "me/there", "this account may not write the repository"),
        ("hf_reader", "me/there", "this account may not write the repository"),
    ],
)
def test_an_account_that_may_not_write_there_is_refused(
    me: Hub, source: Path, monkeypatch: pytest.MonkeyPatch, token: str | None, repo: str, words: str
) -> None:
    me.add("me/there", source)
    monkeypatch.delenv("HF_TOKEN")
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    assert words in refusal(Target(repo))
    assert me.repositories.keys() == {"me/there"}


def test_a_public_repository_does_not_become_private_by_a_push(me: Hub, source: Path) -> None:
    me.add(REPO, source)
    assert "the repository exists and is public" in refusal(Target(REPO, private=True))
    assert check_push(Target(REPO), None) is False


def test_what_is_made_of_a_gated_model_becomes_public_only_where_its_licence_was_accepted(me: Hub, base: str) -> None:
    assert "the base model is gated" in refusal(Target(REPO), BASE)
    assert "--accept-license" in refusal(Target(REPO), BASE)
    assert "does not say whether the base model is gated" in refusal(Target(REPO), "you/gone")
    assert check_push(Target(REPO, private=True), BASE) is None
    assert check_push(Target(REPO, accept_license=True), BASE) is None
    me.repositories[BASE].gated = False
    assert check_push(Target(REPO), BASE) is None
    assert REPO not in me.repositories


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", ".cache/x", ""])
def test_a_record_that_lists_what_is_not_in_the_folder_is_refused(me: Hub, output: Path, name: str) -> None:
    content = read_json(output / "bitroute.json")
    write_json(output / "bitroute.json", sealed({**content, "files": [*content["files"], name]}))
    with pytest.raises(SourceError, match="which is not in the folder"):
        check_folder(output, Target(REPO))


def test_a_link_that_leads_outside_is_refused(me: Hub, output: Path, tmp_path: Path) -> None:
    weights = output / "vae" / "diffusion_pytorch_model.safetensors"
    weights.rename(tmp_path / "outside")
    weights.symlink_to(tmp_path / "outside")
    with pytest.raises(SourceError, match="which is not in the folder"):
        check_folder(output, Target(REPO))


def test_a_checkpoint_that_changed_after_it_was_verified_is_refused(me: Hub, output: Path) -> None:
    found = verify(output, load=False)
    for name in ("vae/config.json", "bitroute.json"):
        write_json(output / name, sealed({**read_json(output / name), "another": 1}))
    with pytest.raises(SourceError, match="changed after it was verified") as refused:
        push(output, Target(REPO), verification=found)
    assert all(name in str(refused.value) for name in ("vae/config.json", "bitroute.json"))
    assert me.repositories == {}


def test_a_checkpoint_that_does_not_verify_is_refused(me: Hub, output: Path) -> None:
    (output / "vae" / "config.json").unlink()
    with pytest.raises(SourceError, match=r"vae/config\.json is missing"):
        push(output, Target(REPO), verification=verify(output, load=False))
    assert me.repositories == {}


def test_the_command_refuses_before_it_verifies(me: Hub, output: Path) -> None:
    report = output.with_name("report")
    report.mkdir()
    candidate = {
        "record_sha256": sha256(output / "bitroute.json"), "tripwires": [], "passed": False, "verdict": "LPIPS 0.5",
    }  # fmt: skip
    (report / "report.json").write_text(json.dumps({"schema": "bitroute-report/1", "candidates": [candidate]}))
    for words, problem in (
        (["--report", str(report)], "fails its quality gate"),
        (["--base-model", "no"], "not a base"),
    ):
        done = CliRunner().invoke(push_folder, [str(output), REPO, *words])
        assert isinstance(done.exception, BitrouteError)
        assert problem in str(done.exception)
        assert done.stderr == ""
    assert me.repositories == {}


# The recipe


def test_a_recipe_says_where_its_result_goes(write_recipe: Callable[[str], str]) -> None:
    text = "components: {transformer: {backend: int8}}\npush: {repo: me/x, private: true}\n"
    recipe = read_recipe(write_recipe(text)).recipe
    assert recipe
    assert recipe.push == PushRecipe(repo="me/x", private=True, revision=None, create_pr=False)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("push: me/x", "write `push: {repo: 'me/x'}`"),
        ("push: {}", "'repo' is missing"),
        ("push: {repo: me/x, privat: true}", "did you mean 'private'?"),
        ("push: {repo: me/x, prompts: a}", "'prompts' belongs under `eval`"),
        ("eval: {prompts: a, repo: me/x}", "'repo' belongs under `push`"),
    ],
)
def test_a_misspelt_push_is_explained(write_recipe: Callable[[str], str], line: str, words: str) -> None:
    found = read_recipe(write_recipe(f"components: {{transformer: {{backend: int8}}}}\n{line}\n"))
    assert words in "\n".join(map(str, found.problems))


def test_a_checkpoint_never_replaces_its_own_base(me: Hub, base: str) -> None:
    assert base
    assert "would replace it" in refusal(Target(BASE, private=True), BASE.upper())


def test_what_is_sent_is_what_was_verified(me: Hub, base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "out"
    run(fetch(plan("tiny-flux-fp8", BASE)), folder)
    found = verify(folder, load=False)
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"

    def change(words: str) -> None:
        if "fresh process" in words:
            file.write_bytes(file.read_bytes()[:-1] + b"x")

    with pytest.raises(SourceError, match="changed after it was verified"):
        push(folder, Target(REPO, accept_license=True), verification=found, progress=change)
    assert REPO not in me.repositories
