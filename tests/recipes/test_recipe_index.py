"""Every recipe is complete, in the index, and run by a test."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from recipe import EXAMPLES, ROOT

from qrexec_activate.loopback import policy

RECIPES = sorted(path.parent.name for path in EXAMPLES.glob("*/policy"))


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_complete(name: str) -> None:
    folder = EXAMPLES / name
    text = (folder / "README.md").read_text()
    assert text.startswith("# ")
    assert policy.parse((folder / "policy").read_text())
    for place in folder.iterdir():
        if place.is_dir():
            assert f"`{place.name}/" in text, (
                f"its page does not say where {place.name}/ goes"
            )
    assert f"[{name}]({name}/README.md)" in (EXAMPLES / "README.md").read_text()
    assert (
        f'"{name}"'
        in (
            Path(__file__).parent / f"test_recipe_{name.replace('-', '_')}.py"
        ).read_text()
    )


def test_the_setup_knows_every_recipe() -> None:
    known = re.findall(
        r"^    \[([a-z-]+)\]=",
        (ROOT / "tools" / "recipes-setup").read_text(),
        re.MULTILINE,
    )
    assert sorted(set(known)) == RECIPES
    unknown = subprocess.run(
        [ROOT / "tools" / "recipes-setup", "nothing"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert unknown.returncode in (0, 2)


def test_lines_are_short() -> None:
    for path in EXAMPLES.rglob("*"):
        if path.is_file() and path.suffix != ".md":
            assert all(
                len(line) <= 120 for line in path.read_text().splitlines()
            ), path
