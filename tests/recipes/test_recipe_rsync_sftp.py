"""rsync and sftp: a folder goes there and comes back, byte for byte, by rsync's
daemon and by sftp."""

from __future__ import annotations

import filecmp
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from recipe import Recipe, forwards_nothing, require


@pytest.fixture
def recipe() -> Iterator[Recipe]:
    require("rsync-sftp", "rsync", "sftp", "ssh-keygen", "sshd")
    with Recipe("rsync-sftp") as recipe:
        files, work = recipe["files"], recipe["work"]
        album = work.machine.home / "album"
        (album / "summer").mkdir(parents=True)
        for name, size in {
            "large": 20 << 20,
            "summer/small": 3,
            "summer/empty": 0,
        }.items():
            (album / name).write_bytes(os.urandom(size))
        if os.geteuid() == 0:
            # Started by root, rsync would become nobody.
            config = files.machine.config / "rsync" / "rsyncd.conf"
            config.write_text(f"uid = root\ngid = root\n{config.read_text()}")
        yield recipe


def is_same(one: Path, other: Path) -> bool:
    match, mismatch, errors = filecmp.cmpfiles(
        one, other, ["large", "summer/small", "summer/empty"], shallow=False
    )
    return len(match) == 3 and not mismatch and not errors


def test_rsync(recipe: Recipe) -> None:
    files, work = recipe["files"], recipe["work"]
    recipe.follow("")
    recipe.follow("rsync's daemon")
    album = work.machine.home / "album"
    assert is_same(album, files.machine.home / "files" / "album")
    assert is_same(album, work.machine.home / "album-again")
    said = work.run(
        "rsync album/large rsync://127.0.0.1:8873/published/ 2>&1", check=False
    )
    assert "module is read only" in said


def test_sftp(recipe: Recipe) -> None:
    files, work = recipe["files"], recipe["work"]
    options = files.let_in(work)
    work.substitutes["sftp -q"] = f"sftp -q {options}"
    recipe.follow("")
    recipe.follow("sftp")
    album = work.machine.home / "album"
    assert is_same(album, files.machine.home / "files" / "album-by-sftp")
    assert is_same(album, work.machine.home / "album-by-sftp")
    forwards_nothing(work, options)
