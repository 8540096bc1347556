"""Every recipe is complete, in the index, and run by a test."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from recipe import EXAMPLES, ROOT, sections

from qrexec_activate.loopback import policy

RECIPES = sorted(path.parent.name for path in EXAMPLES.glob("*/policy"))


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_complete(name: str) -> None:
    folder = EXAMPLES / name
    text = (folder / "README.md").read_text()
    assert text.startswith("# ")
    assert policy.parse((folder / "policy").read_text())
    assert any(sections(name).values())
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


@pytest.mark.parametrize("name", RECIPES)
def test_a_page_names_the_packages_of_its_programs(name: str) -> None:
    """Those that its units start, and that Debian does not have by itself."""
    folder = EXAMPLES / name
    programs = {
        program
        for path in folder.rglob("*.service")
        for program in re.findall(
            r"^Exec\w+=[-+:@!]*(/\S+)", path.read_text(), re.MULTILINE
        )
    }
    found = subprocess.run(
        ["dpkg-query", "--search", *sorted(programs)],
        capture_output=True,
        text=True,
        check=False,
    )
    packages = {line.partition(":")[0] for line in found.stdout.splitlines()}
    shown = subprocess.run(
        ["dpkg-query", "-W", "-f=${Priority} ${Package}\n", *sorted(packages)],
        capture_output=True,
        text=True,
        check=True,
    )
    text = (folder / "README.md").read_text()
    for line in shown.stdout.splitlines() if packages else ():
        priority, package = line.removesuffix("-minimal").split()
        assert priority in (
            "required",
            "important",
            "standard",
        ) or re.search(rf"\b{package}\b", text), f"{name} needs {package}"


def test_the_setup_knows_every_recipe() -> None:
    text = (ROOT / "tools" / "recipes-setup").read_text()
    packages = text.partition("packages=(\n")[2].partition("\n)\n")[0]
    known = re.findall(r"^    \[([a-z-]+)\]=", packages, re.MULTILINE)
    assert sorted(known) == RECIPES
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
