"""What a qube forgets is said before it is written; and nobody else can keep
from writing who may."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from desk import Desk

from qrexec_activate.control import checks, dropins, persistence
from qrexec_activate.control.dropins import locked
from qrexec_activate.control.persistence import forgotten, qubesdb
from qrexec_activate.loopback.machine import Machine

SYSTEM = Path("/etc/systemd/system")


@pytest.fixture
def desk(shared_machine: Machine) -> Iterator[Desk]:
    desk = Desk(shared_machine)
    yield desk
    desk.leave()


@pytest.fixture
def database(tmp_path: Path) -> Callable[[str], str]:
    """A QubesDB in which this qube's persistence is what is said; returns a
    PATH."""

    def write(persistence: str) -> str:
        program = tmp_path / "qubesdb-read"
        program.write_text(
            f'#!/bin/sh\n[ "$1" = /qubes-vm-persistence ] || exit 2\n'
            f"echo {persistence}\n"
        )
        program.chmod(0o755)
        return f"{tmp_path}:{os.environ['PATH']}"

    return write


def test_an_app_qube_keeps_its_private_volume_and_no_more(
    database: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(persistence, "_folder", lambda path: Path("/proc"))
    monkeypatch.setenv("PATH", database("rw-only"))
    for kept in ("/home/user/.config", "/rw/config", "/usr/local/bin"):
        assert forgotten(Path(kept)) == ""
    said = forgotten(SYSTEM)
    assert f"this qube forgets {SYSTEM} when it shuts down" in said
    assert "Make it in the template" in said
    monkeypatch.setenv("PATH", database("none"))
    assert "a disposable and forgets /home/user" in forgotten(
        Path("/home/user")
    )
    monkeypatch.setenv("PATH", database("full"))
    assert forgotten(SYSTEM) == ""


def test_what_bind_dirs_names_is_kept(
    database: Callable[[str], str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("PATH", database("rw-only"))
    real = os.stat
    monkeypatch.setattr(
        os,
        "stat",
        lambda path, **rest: real(tmp_path if path == "/rw" else path),
    )
    assert forgotten(tmp_path / "bound") == ""
    assert "forgets /proc/bound" in forgotten(Path("/proc/bound"))


def test_outside_qubes_nothing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert qubesdb("/name") == ""
    assert forgotten(SYSTEM) == ""


def test_lingering_is_forgotten_too(
    database: Callable[[str], str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("PATH", database("none"))
    monkeypatch.setattr(checks, "RUNTIME", str(tmp_path))
    monkeypatch.setattr(os, "getuid", lambda: 1000)
    mend, advice = checks.to_reach(user=True)
    assert mend == ""
    assert "forgets /var/lib/systemd/linger" in advice


def test_it_is_said_before_anything_is_written(
    desk: Desk, database: Callable[[str], str]
) -> None:
    environment = {"PATH": database("none")}
    desk.machine.write_unit(
        "my-agent.socket", "[Socket]\nListenStream=%t/agent\n"
    )
    desk.machine.write_unit(
        "my-agent.service", "[Service]\nExecStart=/bin/cat\n"
    )
    desk.machine.systemctl("daemon-reload")
    for words in (
        ("add", "tcp", str(desk.port), "gitweb", "--dry-run"),
        ("add", "tcp", str(desk.port), "gitweb"),
        ("add-rpc", "my-rpc", "my.Rpc"),
        ("publish", "agent", "--unit", "my-agent", "--dry-run"),
        ("publish", "agent", "--unit", "my-agent"),
        ("publish", "notes", "--exec", "/bin/cat", "--dry-run"),
        ("publish", "notes", "--exec", "/bin/cat"),
    ):
        result = desk.try_(*words, environment=environment)
        assert result.returncode == 0, result.stderr
        assert (
            f"a disposable and forgets {desk.machine.unit_dir}" in result.stderr
        )
    desk.run("unpublish", "agent", "notes")


# ------------------------------------------------------------------- the lock


def test_the_lock_is_of_nobody_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))
    monkeypatch.setattr(dropins, "LOCK_TIMEOUT", 0.0)
    folder = tmp_path / "user"
    folder.mkdir()
    # Whoever can read the folder of units.
    held = os.open(folder, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    for runtime in (tmp_path / "run", None):
        if runtime:
            runtime.mkdir()
        else:
            monkeypatch.delenv("XDG_RUNTIME_DIR")
        with locked(folder):
            lock = (runtime or folder) / dropins.LOCK
            assert lock.stat().st_mode & 0o777 == 0o600
    os.close(held)


def test_the_systems_lock_lies_where_only_root_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert dropins.SYSTEM_LOCK.parent == Path("/run")
    monkeypatch.setattr(dropins, "SYSTEM_LOCK", tmp_path / "lock")
    monkeypatch.setattr(dropins, "own_folder", lambda *, user: tmp_path)
    with locked(tmp_path):
        assert (tmp_path / "lock").stat().st_mode & 0o777 == 0o600
