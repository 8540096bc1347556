"""What people type by habit, or by mistake: it works, or the answer helps."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from desk import PATIENCE, Desk

from qrexec_activate.loopback.machine import Machine


@pytest.fixture
def desk(shared_machine: Machine) -> Iterator[Desk]:
    desk = Desk(shared_machine)
    yield desk
    desk.leave()


def test_a_misspelt_command_is_guessed(desk: Desk) -> None:
    assert "'statsu' (did you mean status?)" in desk.fails("statsu", code=2)
    assert "did you mean" not in desk.fails("zzzzzz", code=2)


def test_a_misspelt_kind_is_guessed(desk: Desk) -> None:
    said = desk.fails("add", "tpc", str(desk.port), "work", code=2)
    assert "(did you mean tcp?)" in said


def test_udp_is_explained(desk: Desk) -> None:
    said = desk.fails("add", "udp", "53", "sys-net", code=2)
    assert "UDP cannot be carried" in said


@pytest.mark.parametrize("option", ["-h", "--help"])
def test_serve_has_help(desk: Desk, option: str) -> None:
    assert desk.run("serve", option).startswith("Usage: qrexec-activate serve")


def test_adding_again_says_once_what_is_so(desk: Desk) -> None:
    desk.run("add", "tcp", str(desk.port), "work")
    again = desk.try_("add", "tcp", str(desk.port), "work")
    assert again.returncode == 0
    assert "reaches work already" in again.stderr
    assert "now reaches" not in again.stdout


def test_what_cannot_be_added_leaves_no_folder(tmp_path: Path) -> None:
    """As with sudo, which gives root no systemd of its own."""
    for words in (
        ["add", "tcp", "1234", "work"],
        ["remove", "work"],
        ["edit", "work"],
    ):
        done = subprocess.run(
            [sys.executable, "-m", "qrexec_activate", *words],
            env={"HOME": str(tmp_path), "PATH": "/usr/bin:/bin"},
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
        assert done.returncode == 1
        assert "cannot reach" in done.stderr
        assert list(tmp_path.iterdir()) == []


def test_only_a_socket_can_be_published(desk: Desk) -> None:
    said = desk.fails("publish", "x", "--unix", "/etc/passwd", code=2)
    assert "/etc/passwd is no socket" in said
    assert desk.json("published") == []


def test_a_program_whose_socket_has_failed_is_no_idle_one(desk: Desk) -> None:
    name = f"wiki-{desk.port}"
    desk.run("publish", name, "--exec", "/bin/cat", "--idle", "5min")
    (well,) = desk.json("published")
    assert well["state"] == "idle"
    assert well["file"] == str(desk.machine.unit_dir / well["unit"])
    desk.machine.systemctl("stop", well["unit"])
    socket = desk.machine.runtime / "qubes.ConnectUnix" / name
    socket.mkdir(parents=True)
    try:
        desk.machine.systemctl("start", well["unit"], check=False)
        (failed,) = desk.json("published")
        assert failed["state"] == "failed"
    finally:
        socket.rmdir()
        desk.run("unpublish", name)
