"""From a model on the Hub to a published checkpoint with one command, as a user types it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from hub import Hub

from bitroute.cli import main

RECIPE = """\
model: you/tiny-flux
components:
  transformer: {backend: float8}
eval:
  prompts: PROMPTS
  steps: 2
  call: {height: 64, width: 64, guidance_scale: 0.0, max_sequence_length: 16}
  gate: {psnr: LIMIT}
push:
  repo: me/tiny-flux-fp8
"""


@pytest.fixture
def me(hub: Hub, source: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """A hub with a model of somebody else, and a token of me."""
    hub.tokens = {"hf_me": "me"}
    monkeypatch.setenv("HF_TOKEN", "hf_me")
    hub.add("you/tiny-flux", source)
    return hub


def job(tmp_path: Path, limit: float, *words: str) -> Result:
    (tmp_path / "prompts.txt").write_text("red apple, noto style\nfox, fluent style\n")
    recipe = tmp_path / "fp8.yaml"
    recipe.write_text(RECIPE.replace("PROMPTS", str(tmp_path / "prompts.txt")).replace("LIMIT", str(limit)))
    arguments = ["--recipe", str(recipe), "--out", str(tmp_path / "fp8"), *words]
    return CliRunner().invoke(main, arguments, env={"XDG_CACHE_HOME": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"})


def published(hub: Hub) -> dict[str, bytes]:
    repository = hub.repositories["me/tiny-flux-fp8"]
    return {name: blob.file.read_bytes() for name, blob in repository.commits[repository.refs["main"]].items()}


def test_one_command_plans_converts_verifies_evaluates_and_publishes(me: Hub, tmp_path: Path) -> None:
    found = job(tmp_path, 20, "--push", "--json")
    assert found.exit_code == 0, found.output
    said = json.loads(found.stdout)
    assert said["url"] == f"{me.url}/me/tiny-flux-fp8"
    assert said["evaluation"]["passed"] and said["verification"]["problems"] == []
    files = published(me)
    card = files["README.md"].decode()
    assert "base_model: you/tiny-flux" in card and "noise floor" in card
    assert files["report.png"].startswith(b"\x89PNG")
    assert files["bitroute.json"] == (tmp_path / "fp8" / "bitroute.json").read_bytes()
    assert me.leaks == []


def test_what_fails_its_gate_is_not_published(me: Hub, tmp_path: Path) -> None:
    found = job(tmp_path, 90, "--push")
    assert found.exit_code == 3, found.output
    assert "It fails the gate: psnr > 90" in found.stdout
    assert "me/tiny-flux-fp8" not in me.repositories
    again = CliRunner().invoke(main, ["push", str(tmp_path / "fp8"), "me/tiny-flux-fp8"])
    assert again.exit_code == 2, again.output
    assert "gate" in again.stderr
    assert "me/tiny-flux-fp8" not in me.repositories


def test_a_push_that_cannot_be_is_refused_before_the_job(
    me: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    found = job(tmp_path, 20, "--push", "me/other")
    assert found.exit_code == 2, found.output
    assert "hf auth login" in found.stderr
    assert not (tmp_path / "fp8").exists()
