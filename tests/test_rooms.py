"""Who may import whom: the rooms of the package, from the bottom up."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import qrexec_activate

PACKAGE = Path(qrexec_activate.__file__).parent
#: A room imports from itself, from those listed here, and these.
FOR_ALL = {"errors", "printable"}
MAY_IMPORT = {
    "routing": set(),
    "systemd": {"routing"},
    "forward": {"routing", "systemd"},
    "control": {"routing", "systemd", "forward"},
    "publish": {"routing", "systemd", "control"},
    "loopback": set(),
}
#: What of forward the commands know: how outcomes are written.
SHARED_OF_FORWARD = {"outcome"}


def imported(path: Path) -> Iterator[str]:
    """Yield what a module imports of this package, as paths below it."""
    room = path.relative_to(PACKAGE).parent.parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = room[: len(room) - node.level + 1]
            module = node.module.split(".") if node.module else []
            if module:
                yield "/".join([*base, *module])
            else:
                for alias in node.names:
                    yield "/".join([*base, alias.name])
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
