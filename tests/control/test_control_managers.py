"""Two managers: what only shows shows both, and says whose is what; what
changes something changes one.

The manager of another machine stands in for the system's: what is asked of it,
and how, is the same.
"""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from desk import PATIENCE, Desk, free_port
from schema import problems

from qrexec_activate.control import status as status_module
from qrexec_activate.control.daemons import Daemon
from qrexec_activate.control.managers import ask
from qrexec_activate.control.status import Status, route_table
from qrexec_activate.control.survey import Entry, Survey, Unit
from qrexec_activate.control.survey import _entries as entries_of
from qrexec_activate.control.way import hops
from qrexec_activate.errors import ManagerError
from qrexec_activate.loopback.machine import Machine
from qrexec_activate.routing.routes import SocketUnit
from qrexec_activate.routing.unitfile import SourceFile


@pytest.fixture(scope="module")
def system() -> Iterator[Machine]:
    with Machine() as machine:
        yield machine


@pytest.fixture
def desk(
    shared_machine: Machine,
    system: Machine,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Desk]:
    monkeypatch.setitem(
        shared_machine.environment,
        "DBUS_SYSTEM_BUS_ADDRESS",
        system.environment["DBUS_SESSION_BUS_ADDRESS"],
    )
    desk = Desk(shared_machine)
    yield desk
    desk.leave()
    system.systemctl("stop", "qrexec-connect-*", check=False)
    for path in system.unit_dir.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    system.systemctl("daemon-reload")
    system.systemctl("reset-failed")


def of_system(
    system: Machine, port: int, target: str = "vault", host: str = "127.0.0.1"
) -> Path:
    unit = f"qrexec-connect-tcp@{port}.socket"
    path = system.write_drop_in(
        unit,
        target,
        f"[Socket]\nListenStream={host}:{port}\nFileDescriptorName={target}\n",
    )
    system.systemctl("daemon-reload")
    system.systemctl("enable", "--now", unit, check=False)
    return path


def connected(host: str, port: int) -> socket.socket:
    """A connection through which something has come back."""
    sock = socket.create_connection((host, port), timeout=PATIENCE)
    sock.sendall(b"x")
    assert sock.recv(1) == b"x"
    return sock


def whose(desk: Desk, *words: str) -> dict[str, str]:
    return {
        one["listener"]: one["manager"] for one in desk.json("list", *words)
    }


def test_where_the_system_has_nothing_all_looks_as_without_it(
    desk: Desk,
) -> None:
    desk.run("add", "tcp", str(desk.port), "gitweb")
    for command in (["list"], ["status"], ["list", "--json"], ["check"]):
        both, mine = (
            desk.try_(*command, *narrow) for narrow in ([], ["--user"])
        )
        assert (both.stdout, both.stderr, both.returncode) == (
            mine.stdout,
            mine.stderr,
            mine.returncode,
        )
        assert "system" not in both.stdout.replace("systemd", "").lower()


def test_routes_of_both_are_shown_and_marked(
    desk: Desk, system: Machine
) -> None:
    desk.run("add", "tcp", str(desk.port), "gitweb")
    mine, theirs = f"127.0.0.1:{desk.port}", f"127.0.0.1:{free_port()}"
    of_system(system, int(theirs.rpartition(":")[2]))
    assert whose(desk) == {mine: "user", theirs: "system"}
    assert whose(desk, "--user") == {mine: "user"}
    assert whose(desk, "--system") == {theirs: "system"}
    assert whose(desk, "vault") == {theirs: "system"}

    header, *lines = desk.run("list").splitlines()
    assert header.split()[-2:] == ["MANAGER", "FILE"]
    assert [line.split()[-2] for line in lines] == ["user", "system"]
    for one in ("--user", "--system"):
        assert "MANAGER" not in desk.run("list", one)

    now = desk.json("status")
    assert [one["manager"] for one in now["routes"]] == ["user", "system"]
    assert {one["manager"] for one in now["daemons"]} == {"user", "system"}
    text = desk.run("status")
    assert text.splitlines()[0].split()[-1] == "MANAGER"
    assert "qrexec-connect-tcp.service (system):" in text
    assert "(system)" in desk.run("status", "vault")
    assert "(user)" in desk.run("status", "gitweb")
    (narrowed,) = desk.json("status", "--system")["routes"]
    assert narrowed["listener"] == theirs

    completed = desk.run(
        "list",
        environment={
            "_QREXEC_ACTIVATE_COMPLETE": "bash_complete",
            "COMP_WORDS": "qrexec-activate list va",
            "COMP_CWORD": "2",
        },
    )
    assert "vault" in completed


def test_a_connection_is_of_the_manager_whose_daemon_began_it(
    desk: Desk, system: Machine
) -> None:
    """Both have a unit of one name, so that only the manager tells."""
    desk.machine.add_qube("gitweb")
    system.add_qube("vault")
    script = "#!/bin/sh\nexec cat\n"
    for machine, qube in ((desk.machine, "gitweb"), (system, "vault")):
        path = machine.loopback / "qubes" / qube / "rpc" / "qubes.ConnectTCP"
        path.write_text(script)
        path.chmod(0o755)
    of_system(system, desk.port, host="127.0.0.9")
    desk.drop_in(
        desk.tcp,
        "gitweb",
        "[Socket]",
        f"ListenStream=127.0.0.1:{desk.port}",
        "FileDescriptorName=gitweb",
    )
    desk.start(desk.tcp)
    with connected("127.0.0.9", desk.port), connected("127.0.0.1", desk.port):
        now = desk.json("status")
        ids = {one["manager"]: one["id"] for one in now["connections"]}
        for word in ("vault", "127.0.0.9:" + str(desk.port), ids["system"]):
            said = desk.fails("disconnect", word, code=2)
            assert f"{word!r} is the system's: add --system" in said
        said = desk.fails("disconnect", ids["user"], "--system", code=2)
        assert "is your own, not the system's: leave out --system" in said
        assert "Ended" in desk.run("disconnect", "--all")
        none = desk.try_("disconnect", "--all")
        assert (none.returncode, none.stderr) == (
            0,
            "No connection of your own is open; what else is open is the"
            " system's: add --system\n",
        )
        assert "Would end" in desk.run(
            "disconnect", "vault", "--system", "--dry-run"
        )
    assert sorted(
        (one["manager"], one["target"]) for one in now["connections"]
    ) == [("system", "vault"), ("user", "gitweb")]
    assert [one["open"] for one in now["routes"]] == [1, 1]


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ["remove", "ROUTE"],
        ["remove", "ROUTE", "--dry-run"],
        ["remove", "tcp", "PORT", "vault"],
        ["remove", "FILE"],
        ["disable", "ROUTE"],
        ["stop", "vault"],
        ["edit", "ROUTE"],
        ["retarget", "ROUTE", "work"],
    ],
    ids=" ".join,
)
def test_what_changes_something_leaves_the_systems_routes_alone(
    desk: Desk, system: Machine, words: list[str]
) -> None:
    desk.run("add", "tcp", str(desk.port), "gitweb")
    port = free_port()
    path = of_system(system, port)
    before = path.read_bytes(), desk.files()
    meant = {"ROUTE": f"127.0.0.1:{port}", "PORT": str(port), "FILE": str(path)}
    said = desk.fails(
        *(meant.get(word, word) for word in words),
        code=2,
        environment={"EDITOR": "false"},
    )
    assert "is the system's: add --system" in said
    assert (path.read_bytes(), desk.files()) == before
    assert whose(desk, f"127.0.0.1:{port}") == {f"127.0.0.1:{port}": "system"}
    assert (
        system.property(f"qrexec-connect-tcp@{port}.socket", "ActiveState")
        == "active"
    )


def test_a_route_of_ones_own_is_not_the_systems(desk: Desk) -> None:
    desk.run("add", "tcp", str(desk.port), "gitweb")
    said = desk.fails("disable", "gitweb", "--system", code=2)
    assert "is your own, not the system's: leave out --system" in said
    assert "there is no route 'nosuch'" in desk.fails("disable", "nosuch")


def test_one_name_of_both_means_the_users_where_something_changes(
    desk: Desk, system: Machine
) -> None:
    desk.run("add", "tcp", str(desk.port), "gitweb")
    port = free_port()
    of_system(system, port, "gitweb")
    assert list(whose(desk, "gitweb").values()) == ["user", "system"]
    desk.run("remove", "gitweb")
    assert list(whose(desk, "gitweb").values()) == ["system"]


def test_check_walks_the_way_of_both_and_says_whose_is_wrong(
    desk: Desk, system: Machine
) -> None:
    desk.run("add", "tcp", str(desk.port), "gitweb")
    port = free_port()
    of_system(system, port)
    well = desk.json("check")
    assert {one["manager"] for one in well["steps"]} == {"user", "system"}
    about = [one for one in well["steps"] if one["area"] == "qrexec"]
    assert {one["manager"] for one in about[:1]} == {"user"}
    unit = f"qrexec-connect-tcp@{port}.socket"
    system.systemctl("disable", unit)
    result = desk.try_("check", "--quiet")
    assert result.returncode == 1
    assert result.stdout.startswith("warning routes (system): 127.0.0.1:")
    assert f"$ systemctl enable {unit}\n" in result.stdout
    assert desk.try_("check", "--user").returncode == 0
    assert "(system)" not in desk.try_("check", "--system", "-q").stdout


def test_check_finds_what_the_system_does_not_read_either(
    desk: Desk, system: Machine
) -> None:
    port = free_port()
    path = of_system(system, port)
    system.systemctl("disable", "--now", f"qrexec-connect-tcp@{port}.socket")
    path.rename(path.with_suffix(".cfg"))
    system.systemctl("daemon-reload")
    assert desk.json("list") == []
    result = desk.try_("check", "--quiet")
    assert f"routes (system): {path.with_suffix('.cfg')}" in result.stdout


def test_an_address_that_the_system_has_is_named_with_its_route(
    desk: Desk, system: Machine
) -> None:
    of_system(system, desk.port)
    desk.drop_in(
        desk.tcp,
        "gitweb",
        "[Socket]",
        f"ListenStream=127.0.0.1:{desk.port}",
        "FileDescriptorName=gitweb",
    )
    desk.start(desk.tcp, check=False)
    (found,) = [
        one
        for one in desk.json("check", code=2)["steps"]
        if one["level"] == "error" and one["manager"] == "user"
    ]
    assert "is taken by the route to vault" in found["text"]
    assert "qrexec-activate edit" in found["mend"]


def test_root_without_a_manager_of_its_own_sees_the_systems(
    desk: Desk, system: Machine
) -> None:
    if os.geteuid() != 0:
        pytest.skip("for root")
    port = free_port()
    of_system(system, port)
    nobody = {"XDG_RUNTIME_DIR": "/nowhere", "DBUS_SESSION_BUS_ADDRESS": ""}
    plain = desk.try_("list", environment=nobody)
    assert (plain.returncode, plain.stderr) == (0, "")
    assert f"127.0.0.1:{port}" in plain.stdout
    by_sudo = desk.try_("list", environment={**nobody, "SUDO_USER": "bob"})
    assert by_sudo.stdout == plain.stdout
    assert by_sudo.stderr == (
        "Routes of bob are not shown: run it without sudo\n"
    )
    said = desk.fails("remove", "vault", environment=nobody)
    assert "for the system's, add --system" in said
    checked = desk.try_("check", "-q", environment=nobody)
    assert checked.returncode == 0, checked.stdout
    checked = desk.try_(
        "check", "-q", environment={**nobody, "SUDO_USER": "bob"}
    )
    assert checked.returncode == 1
    assert "run it without sudo" in checked.stdout


# ------------------------------------------------------------------------ pure


@pytest.mark.parametrize(
    ("reachable", "declares", "uid", "shown", "lost"),
    [
        ("user system", True, 1000, ["user", "system"], ""),
        ("user system", False, 1000, ["user"], ""),
        ("user", True, 1000, ["user"], ""),
        ("user", True, 0, ["user"], ""),
        ("system", True, 1000, ["system"], "only the system's routes"),
        ("system", False, 1000, None, "no user"),
        ("system", False, 0, ["system"], ""),
        ("hung system", True, 0, ["system"], "only the system's routes"),
        ("hung system", False, 0, None, "no user"),
        ("", True, 0, None, "no user"),
        ("", True, 1000, None, "no user"),
    ],
)
def test_of_two_managers_those_are_shown_that_can_be_read(
    monkeypatch: pytest.MonkeyPatch,
    reachable: str,
    declares: bool,
    uid: int,
    shown: list[str] | None,
    lost: str,
) -> None:
    monkeypatch.delenv("SUDO_USER", raising=False)
    monkeypatch.setattr(os, "geteuid", lambda: uid)

    def look(user: bool) -> str:
        name = "user" if user else "system"
        if name not in reachable.split():
            hung = TimeoutError() if "hung" in reachable else None
            raise ManagerError(f"no {name}") from hung
        return name

    if shown is None:
        with pytest.raises(ManagerError, match=lost):
            ask(None, look, lambda _: declares)
        return
    found, said = ask(None, look, lambda _: declares)
    assert found == shown
    assert said.startswith(lost)
    assert bool(said) is bool(lost)


def of_root(path: str) -> Entry:
    """A route of the system's whose file only root can read."""
    unit = SocketUnit(
        "qrexec-connect-tcp@80.socket",
        (
            SourceFile("/x/qrexec-connect-tcp@.socket", "[Socket]\n"),
            SourceFile(path, None, "cannot be read (Permission denied)"),
        ),
        (("Stream", "127.0.0.1:80"),),
        "work",
    )
    daemon = Daemon("qrexec-connect-tcp.service", "qubes.ConnectTCP", None)
    now = Survey(user=False)
    (entry,) = entries_of(
        Unit(
            unit,
            daemon,
            "loaded",
            "active",
            "listening",
            "enabled",
            (),
            "system",
        ),
        now,
    )
    return entry


def test_what_only_root_can_read_is_not_called_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    entry = of_root("/x/work.conf")
    assert (entry.refused, entry.target) == ("", None)
    assert entry.state == "not readable"
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert of_root("/x/work.conf").state == "refused"


def test_connections_that_only_root_can_see_are_not_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    entry = of_root("/x/work.conf")
    now = Status([], [entry], [], [], marked=True)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    _, (row,) = route_table(now)
    assert row[4:6] == ["?", "?"]
    printed: Any = status_module._as_json(now)
    assert printed["routes"][0]["open"] is None
    assert problems(printed, "status") == []
    assert (
        "only root" in hops(entry, [], "active", None, "me", seen=False)[0].note
    )
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    _, (row,) = route_table(now)
    assert row[4:6] == ["0", "0"]
