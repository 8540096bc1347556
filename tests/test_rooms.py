"""Who may import whom: the rooms of the package, from the bottom up."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

import qrexec_activate

PACKAGE = Path(qrexec_activate.__file__).parent
#: A room imports from itself, from those listed here, and these.
FOR_ALL = {"errors", "printable"}
MAY_IMPORT = {
    "routing": set(),
    "given": {"routing"},
    "systemd": {"routing"},
    "forward": {"routing", "systemd"},
    "control": {"routing", "given", "systemd", "forward"},
    "publish": {"routing", "given", "systemd", "control"},
    "loopback": set(),
}
#: What of forward the commands know: how outcomes are written, and what
#: qrexec-client-vm takes.
SHARED_OF_FORWARD = {"outcome", "process"}


def imported(path: Path) -> Iterator[str]:
    """Yield what a module imports of this package, as paths below it."""
    room = path.relative_to(PACKAGE).parent.parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = room[: len(room) - node.level + 1]
            module = node.module.split(".") if node.module else []
            base = (*base, *module)
            if PACKAGE.joinpath(*base).is_dir():
                for alias in node.names:
                    yield "/".join([*base, alias.name])
            else:
                yield "/".join(base)
        elif isinstance(node, ast.ImportFrom):
            assert not (node.module or "").startswith("qrexec_activate"), path
        elif isinstance(node, ast.Import):
            for alias in node.names:
                assert not alias.name.startswith("qrexec_activate"), path


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_a_room_imports_only_from_those_below_it(room: str) -> None:
    paths = sorted((PACKAGE / room).glob("*.py"))
    assert paths
    for path in paths:
        for name in imported(path):
            other = name.split("/")[0]
            allowed = {room} | FOR_ALL | MAY_IMPORT[room]
            assert other in allowed, f"{path} imports {name}"
            if room == "control" and other == "forward":
                module = name.split("/")[1]
                assert module in SHARED_OF_FORWARD, f"{path} imports {name}"


def test_every_room_says_what_lives_there() -> None:
    rooms = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert rooms == set(MAY_IMPORT)
    for room in rooms:
        tree = ast.parse((PACKAGE / room / "__init__.py").read_text())
        assert ast.get_docstring(tree)


DESIGN = (PACKAGE.parent / "docs" / "design.md").read_text()


def trusted() -> set[Path]:
    """What serve imports, at once or later: the part that has to be right."""
    found: set[Path] = set()
    waiting = [PACKAGE / "forward" / "serve.py"]
    while waiting:
        path = waiting.pop()
        if path not in found and path.exists():
            found.add(path)
            waiting += [PACKAGE / f"{name}.py" for name in imported(path)]
    return found


def test_the_trusted_part_is_what_the_design_says_and_stays_small() -> None:
    rooms = {path.parent.name for path in trusted()}
    assert rooms == {"routing", "systemd", "forward", PACKAGE.name}
    for room in ("routing", "forward"):
        left_out = set((PACKAGE / room).glob("*.py")) - trusted()
        assert {path.name for path in left_out} == {"__init__.py"}
    for path in trusted():
        if path.parent.name == "systemd":
            assert f"`{path.name}`" in DESIGN
    (limit,) = re.findall(r"at most ([\d,]+) lines", DESIGN)
    lines = sum(len(path.read_text().splitlines()) for path in trusted())
    most = int(limit.replace(",", ""))
    # Nor does it claim more than there is.
    assert 0.9 * most < lines <= most


def test_every_module_of_forward_has_its_place_in_the_design() -> None:
    for path in (PACKAGE / "forward").glob("[a-z]*.py"):
        assert f"`{path.name}`" in DESIGN


def test_the_numbers_of_the_design_are_those_of_the_code() -> None:
    rows = re.findall(r"^\| (\d+) \|.*\| `(\w+)\.(\w+)` \|$", DESIGN, re.M)
    assert len(rows) > 15
    for value, module, name in rows:
        holder = import_module(f"qrexec_activate.forward.{module}")
        if module == "settings":
            holder = holder.Settings()
        assert getattr(holder, name) == int(value), name


def test_every_place_that_the_design_names_is_there() -> None:
    root = PACKAGE.parent
    # Folders end with a slash.
    places = re.findall(r"`(\w[\w-]*/(?:[\w./-]*(?:/|\.\w+))?)`", DESIGN)
    assert len(places) > 10
    for place in places:
        assert (root / place).exists() or (PACKAGE / place).exists(), place
