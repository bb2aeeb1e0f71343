"""Models on the Hub: access, revisions, faults. The real client against a hub on the loopback interface."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hub import Hub
from huggingface_hub import HfApi, constants

from bitroute import plan
from bitroute.convert import hub as client
from bitroute.convert.plan import fetch
from bitroute.errors import RecipeError

REPO = "me/tiny-flux"
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
RECIPE = "components:\n  transformer: {backend: float8}\n"
Write = Callable[[str], str]


def refusal(model: str = REPO, recipe: str = "tiny-flux-fp8") -> str:
    with pytest.raises(RecipeError) as refused:
        plan(recipe, model)
    return str(refused.value)


# Access


def test_a_gated_model_says_which_page_to_visit_before_anything_is_downloaded(hub: Hub, source: Path) -> None:
    hub.add(REPO, source, gated=True)
    words = refusal()
    assert "the model is gated" in words
    assert "no token on this machine" in words
    assert f"https://huggingface.co/{REPO}" in words
    assert "hf auth login" in words
    assert hub.files_sent <= {"model_index.json"}


def test_a_token_without_access_to_a_gated_model_is_told_to_request_it(
    hub: Hub, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add(REPO, source, gated=True)
    hub.tokens = {"hf_stranger": "stranger", "hf_me": "me"}
    monkeypatch.setenv("HF_TOKEN", "hf_stranger")
    words = refusal()
    assert "not in the authorized list" in words
    assert f"request access on https://huggingface.co/{REPO}" in words
    monkeypatch.setenv("HF_TOKEN", "hf_me")
    fetch(plan("tiny-flux-fp8", REPO))
    assert hub.leaks == []


def test_a_private_model_is_told_from_a_misspelt_one_as_far_as_the_hub_tells(
    hub: Hub, commit: str, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("me/secret", source, private=True)
    hub.tokens = {"hf_stranger": "stranger", "hf_me": "me"}
    words = refusal("me/secret")
    assert "or a private one" in words
    assert "no token on this machine" in words
    assert "hf auth login" in words
    assert f"did you mean '{REPO}'?" in refusal("me/tiny-fluks")
    assert f"did you mean '{REPO}'?" in refusal("you/tiny-flux")
    monkeypatch.setenv("HF_TOKEN", "hf_stranger")
    assert "the account of the token needs access" in refusal("me/secret")
    monkeypatch.setenv("HF_TOKEN", "hf_me")
    assert plan("tiny-flux-fp8", "me/secret").pipeline.name == "me/secret"


def test_a_token_that_the_hub_does_not_know_is_named(hub: Hub, commit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_expired")
    words = refusal()
    assert "does not know this token" in words
    assert "Invalid credentials" in words


# Revisions


def test_a_revision_is_pinned_and_a_wrong_one_is_answered_with_the_known_ones(
    hub: Hub, commit: str, source: Path, write_recipe: Write
) -> None:
    (source / "LICENSE.md").write_text("of the branch")
    other = hub.add(REPO, source, ref="release")
    recipe = write_recipe(f"model: {REPO}\nrevision: release\n{RECIPE}")
    planned = plan(recipe)
    assert planned.pipeline.hub is not None
    assert planned.pipeline.hub.commit == other
    assert planned.copied["LICENSE.md"] == len("of the branch")
    for pinned in (f"{REPO}@release", f"{REPO}@{other}"):
        assert plan(recipe, pinned).copied == planned.copied
    words = refusal(f"{REPO}@relaese")
    assert "no revision 'relaese'" in words
    assert "did you mean 'release'?" in words


def test_the_revision_of_a_recipe_is_not_that_of_another_model(
    hub: Hub, commit: str, source: Path, write_recipe: Write
) -> None:
    recipe = write_recipe(f"model: {REPO}\nrevision: nowhere\n{RECIPE}")
    hub.add("me/other", source)
    assert plan(recipe, "me/other").pipeline.name == "me/other"
    assert "no revision 'nowhere'" in refusal(REPO, recipe)


def test_a_local_folder_wins_over_the_hub_and_has_no_revision(
    hub: Hub, commit: str, source: Path, write_recipe: Write, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shutil.move(source, tmp_path / REPO)
    monkeypatch.chdir(tmp_path)
    planned = plan("tiny-flux-fp8", REPO)
    assert planned.pipeline.hub is None
    assert hub.requests == []
    words = refusal(REPO, write_recipe(f"model: {REPO}\nrevision: main\n{RECIPE}"))
    assert "a folder, which wins over the Hub" in words


# Faults


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "WAITS_S", (0, 0, 0))


def test_too_many_requests_are_waited_for_as_long_as_the_hub_says(hub: Hub, commit: str, impatient: None) -> None:
    hub.fail("^/api/models/", 2, status=429, headers={"Retry-After": "0"})
    hub.fail("resolve/.*/model_index.json", status=429, headers={"Retry-After": "0"})
    assert plan("tiny-flux-fp8", REPO).pipeline.is_outline


def test_a_wait_that_is_too_long_is_said_at_once(hub: Hub, commit: str) -> None:
    hub.fail("^/api/models/", status=429, headers={"Retry-After": "3600"})
    words = refusal()
    assert "too many requests" in words
    assert "wait 3600 seconds" in words


def test_a_hub_that_is_down_is_named_with_what_it_said(hub: Hub, commit: str, impatient: None) -> None:
    hub.fail("^/api/models/", 4, status=503)
    words = refusal()
    assert "HTTP 503" in words
    assert "status.huggingface.co" in words


def test_no_network_is_no_traceback(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    words = refusal()
    assert "no such folder here, and the Hub cannot be reached" in words
    assert "HF_HUB_OFFLINE=1" in words


def test_a_server_without_ranges_is_not_asked_for_whole_weights(hub: Hub, commit: str) -> None:
    hub.fail("^/cdn/", 100, status=200)
    assert "the server sends whole files only" in refusal()


def test_offline_mode_uses_what_is_there_and_says_what_is_not(
    hub: Hub, commit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch(plan("tiny-flux-fp8", REPO))
    hub.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert plan("tiny-flux-fp8", REPO).pipeline.hub is not None
    assert plan("tiny-flux-fp8", f"{REPO}@{commit}").pipeline.folder.name == commit
    assert "was not downloaded before" in refusal("me/other")
    assert "HF_HUB_OFFLINE is set" in refusal("me/other")
    (Path(constants.HF_HUB_CACHE) / "models--me--tiny-flux" / "snapshots" / commit / WEIGHTS).unlink()
    words = refusal()
    assert f"without {WEIGHTS}" in words
    assert hub.requests == []


# The hub of the tests, as those of pushing need it


@pytest.fixture
def owner(hub: Hub) -> Iterator[HfApi]:
    hub.tokens = {"hf_me": "me", "hf_stranger": "stranger"}
    yield HfApi(endpoint=hub.url, token="hf_me")


def test_the_loopback_hub_takes_a_folder_and_gives_it_back(
    hub: Hub, owner: HfApi, source: Path, tmp_path: Path
) -> None:
    assert owner.whoami()["name"] == "me"
    owner.create_repo("me/new", private=True)
    owner.create_repo("me/new", exist_ok=True)
    first = owner.upload_folder(repo_id="me/new", folder_path=source)
    there = hub.repositories["me/new"].commits[first.oid]
    assert there.keys() == {file.relative_to(source).as_posix() for file in source.rglob("*") if file.is_file()}
    assert there[WEIGHTS].file.read_bytes() == (source / WEIGHTS).read_bytes()
    owner.create_branch("me/new", branch="draft")
    (source / "README.md").write_text("a card")
    request = owner.upload_folder(repo_id="me/new", folder_path=source, create_pr=True)
    assert request.pr_revision == "refs/pr/1"
    assert "README.md" in hub.repositories["me/new"].commits[hub.repositories["me/new"].refs["refs/pr/1"]]
    assert hub.repositories["me/new"].refs["main"] == hub.repositories["me/new"].refs["draft"] == first.oid
    assert hub.leaks == []
    with pytest.raises(Exception, match="403"):
        HfApi(endpoint=hub.url, token="hf_stranger").create_repo("me/taken")
