"""How much a program may write: sizes, names, and what of a change is refused;
tests/recipes has the file systems."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from qrexec_activate.errors import UsageProblem
from qrexec_activate.publish import accounts, disk
from qrexec_activate.publish.change import check_change
from qrexec_activate.publish.services import Service

GIB = 1 << 30


@pytest.fixture(autouse=True)
def homes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine that has all it takes, and one image."""
    for module in (accounts, disk):
        monkeypatch.setattr(module, "HOMES", tmp_path)
    monkeypatch.setattr(disk, "LOOP_CONTROL", tmp_path)
    monkeypatch.setattr(shutil, "which", lambda name, path=None: name)
    with (tmp_path / "wiki.disk").open("wb") as image:
        image.truncate(GIB)
    return tmp_path


@pytest.mark.parametrize(
    ("text", "size"),
    [("16M", 16 << 20), ("2G", 2 * GIB), ("1T", 1 << 40), ("1024M", GIB)],
)
def test_a_size_is_read_and_written(text: str, size: int) -> None:
    assert disk.parse_disk(text) == size
    assert disk.parse_disk(disk.written(size)) == size


@pytest.mark.parametrize(
    "text", ["", "0", "1024", "15M", "1K", "-1G", "1.5G", "1G\n", "1GB", "٣G"]
)
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(UsageProblem, match="--disk"):
        disk.parse_disk(text)


def test_a_size_of_no_round_number_is_written_too() -> None:
    assert disk.written(GIB + 1) == f"{GIB + 1}"
    assert disk.written(0) == "0"


def test_a_mount_unit_is_named_as_systemd_wants_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.undo()
    for user in ("wiki", "_a-b-2"):
        escaped = subprocess.run(
            ["systemd-escape", "--path", "--suffix=mount", accounts.home(user)],
            capture_output=True,
            text=True,
            check=True,
        )
        assert disk.mount_unit(user) == escaped.stdout.strip()


def test_a_size_is_that_of_the_image(homes: Path) -> None:
    assert disk.size_of("wiki") == GIB
    assert disk.size_of("other") == 0
    # What is not mounted does not tell.
    (homes / "wiki").mkdir()
    assert disk.used("wiki") is disk.used("other") is None


def test_a_user_whose_image_is_there_is_not_made() -> None:
    with pytest.raises(UsageProblem, match=r"wiki\.disk is there already"):
        accounts.check_user("wiki")


def test_what_the_machine_cannot_give_is_refused(
    monkeypatch: pytest.MonkeyPatch, homes: Path
) -> None:
    free = SimpleNamespace(free=GIB)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free)
    disk.check_disk(GIB)
    with pytest.raises(UsageProblem, match="has only 1024M to give"):
        disk.check_disk(GIB + 1)
    monkeypatch.setattr(disk, "LOOP_CONTROL", homes / "nothing")
    with pytest.raises(UsageProblem, match="no loop devices"):
        disk.check_disk(1)
    monkeypatch.setattr(
        shutil, "which", lambda name, path=None: name != "mkfs.ext4"
    )
    with pytest.raises(UsageProblem, match=r"needs .*mkfs\.ext4: apt"):
        disk.check_disk(1)


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        (GIB, 0, "with --disk 1G"),
        (GIB, 2 * GIB, "with --disk 1G"),
        (0, GIB, "with no --disk"),
    ],
)
def test_a_disk_stays_as_it_was_made(
    before: int, after: int, said: str
) -> None:
    with pytest.raises(UsageProblem, match=said):
        check_change(
            Service("x", user="wiki", disk=before),
            Service("x", user="wiki", disk=after),
        )
