"""The generated pages are what the program says today, and the README names what exists."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from bitroute import backends
from bitroute.convert.recipe import builtin_recipes

ROOT = Path(__file__).parents[1]


def test_the_generated_pages_are_fresh() -> None:
    command = [sys.executable, str(ROOT / "docs" / "generate.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_readme_names_every_backend_and_every_tiny_recipe() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    missing = [name for name in backends.available() if f"`{name}`" not in readme]
    assert missing == []
    assert [name for name in builtin_recipes() if name.startswith("tiny") and name not in readme] == []


def test_every_file_the_readme_links_to_exists() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", readme)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []
