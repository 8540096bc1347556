"""The packages that the tests in this folder look at: built once, from this
tree."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from container import ROOT, give_up

UPGRADE = f"{(ROOT / 'version').read_text().strip()}+upgrade"
#: The last commit of version 0.1.0.
FIRST_RELEASE = "c075b24c488275ada35bae83868cc971b4b8fce9"


def export(folder: Path) -> None:
    """Copy the tree, so that all packages are of one state of it."""
    subprocess.run(
        [ROOT / "tools/export-tree", folder], check=True, timeout=600
    )


def export_first_release(folder: Path) -> None:
    """Copy the tree of version 0.1.0 from git's history."""
    known = subprocess.run(
        ["git", "cat-file", "-e", f"{FIRST_RELEASE}^{{commit}}"],
        cwd=ROOT,
        capture_output=True,
        check=False,
    )
    if known.returncode:
        give_up(
            f"git does not have {FIRST_RELEASE}, version 0.1.0, from which to"
            f" upgrade: fetch all of the history"
        )
    archive = subprocess.run(
        ["git", "archive", FIRST_RELEASE],
        cwd=ROOT,
        capture_output=True,
        check=True,
    ).stdout
    subprocess.run(
        ["tar", "--extract", f"--directory={folder}"], input=archive, check=True
    )


def build(tree: Path, folder: Path, *version: str) -> list[Path]:
    """Build the Debian packages of a tree into a folder; under another version
    without its tests, which have run by then."""
    options = {"DEB_BUILD_OPTIONS": "nocheck"} if version else {}
    subprocess.run(
        [tree / "tools/build-deb", folder, *version],
        check=True,
        timeout=600,
        env={**os.environ, **options},
    )
    return sorted(folder.glob("*.deb"))
