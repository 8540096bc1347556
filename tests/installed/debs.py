"""The packages that the tests in this folder look at: built once, from this
tree."""

from __future__ import annotations

import subprocess
from pathlib import Path

from container import ROOT

UPGRADE = "0.1.0+upgrade"


def export(folder: Path) -> None:
    """Copy the tree, so that all packages are of one state of it."""
    subprocess.run(
        [ROOT / "tools/export-tree", folder], check=True, timeout=600
    )


def build(tree: Path, folder: Path, *version: str) -> list[Path]:
    """Build the Debian packages of a tree into a folder."""
    subprocess.run(
        [tree / "tools/build-deb", folder, *version], check=True, timeout=600
    )
    return sorted(folder.glob("*.deb"))
