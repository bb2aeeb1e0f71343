"""What the tests share: the bundled pipeline, copies of it to damage, and conversions that are made once."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import hollow
import pytest
from hub import Hub

from bitroute.convert.garbage import collect_seldom

# no test asks the network or looks into the user's own cache, unless it has a hub of its own
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(Path(__file__).with_name("no-hf-home"))}
collect_seldom()
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the tests run side by side, and threads on small tensors wait
for name in ("HF_TOKEN", "HF_HUB_CACHE", "HF_ASSETS_CACHE", "HF_TOKEN_PATH", "HF_ENDPOINT", "HUGGINGFACE_HUB_CACHE"):
    os.environ.pop(name, None)

TINY_FLUX = Path(str(files("bitroute.recipes"))) / "tiny-flux"
Convert = Callable[[str], Path]
Command = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(autouse=True)
def interruptible() -> Iterator[None]:
    """A shell starts what runs in the background without it, and a command that is interrupted ends without it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


@pytest.fixture(scope="session")
def tiny() -> Path:
    """The bundled pipeline; read-only by agreement."""
    return TINY_FLUX


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A pipeline folder of one's own."""
    return Path(shutil.copytree(TINY_FLUX, tmp_path / "source"))


@pytest.fixture(scope="session")
def convert(tmp_path_factory: pytest.TempPathFactory) -> Convert:
    """Converts a recipe (a built-in name, or YAML text) once; read-only by agreement."""
    from bitroute import quantize

    made: dict[str, Path] = {}

    def convert(recipe: str) -> Path:
        if recipe not in made:
            place = tmp_path_factory.mktemp("converted")
            name = recipe
            if "\n" in recipe:
                name = str(place / "recipe.yaml")
                Path(name).write_text(recipe, encoding="utf-8")
            made[recipe] = quantize(name, out=place / "out")
        return made[recipe]

    return convert


@pytest.fixture
def output(tmp_path: Path, convert: Convert) -> Path:
    """A finished checkpoint of one's own: float8, one file per component."""
    return Path(shutil.copytree(convert("tiny-flux-fp8"), tmp_path / "output"))


@pytest.fixture
def write_recipe(tmp_path: Path) -> Callable[[str], str]:
    """Writes a recipe file and returns its path."""

    def write(text: str) -> str:
        file = tmp_path / "recipe.yaml"
        file.write_text(text, encoding="utf-8")
        return str(file)

    return write


@pytest.fixture
def command(tmp_path: Path) -> Command:
    """Runs `python -m bitroute ARGS` in a process of its own."""

    def command(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
        words = [sys.executable, "-m", "bitroute", *map(str, arguments)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.run(
            words, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=120, check=False
        )

    return command


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub of one's own, which the client of this process and of its children talks to; nobody is logged in.

    Xet is switched off: the client then sends and fetches files over plain HTTP.
    """
    from huggingface_hub import constants

    home = tmp_path / "hf-home"
    with Hub(tmp_path / "hub") as hub:
        settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
        for name, value in settings.items():
            monkeypatch.setenv(name, value)
        values: dict[str, object] = {  # what the client read from the environment when it was imported
            "ENDPOINT": hub.url, "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HOME": str(home), "HF_HUB_CACHE": str(home / "hub"), "HF_ASSETS_CACHE": str(home / "assets"),
            "HF_TOKEN_PATH": str(home / "token"), "HF_STORED_TOKENS_PATH": str(home / "stored_tokens"),
            "AGENT_HARNESSES_PATH": str(home / "harnesses.json"), "HF_HUB_DISABLE_XET": True, "HF_HUB_OFFLINE": False,
        }  # fmt: skip
        for name, value in values.items():
            monkeypatch.setattr(constants, name, value)
        yield hub


@pytest.fixture(scope="session")
def write_hollow() -> Callable[..., None]:
    """Writes a model of any size that takes no disk."""
    return hollow.write_hollow


@pytest.fixture(scope="session")
def fill() -> Callable[..., None]:
    """Draws into a cache, in this process, what an evaluation draws in processes of their own: same bytes, sooner."""
    from bitroute.eval.generate import draw
    from bitroute.eval.sampling import Sampling

    def fill(cache: Path, original: Path, models: Sequence[Path], sampling: Sampling, share_text: bool = True) -> None:
        plain = replace(sampling, attention="math")
        draw(original, sampling, cache / sampling.key(original))
        draw(original, sampling, cache / f"{sampling.key(original)}-again")
        draw(original, plain, cache / plain.key(original))
        shared = [original] if share_text else []
        for model in models:
            draw(model, sampling, cache / sampling.key(model, *shared), *shared)

    return fill
