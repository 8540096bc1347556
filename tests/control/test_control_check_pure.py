"""What check says where a test as root on a machine without Xen cannot break
anything: its steps, from made-up sights."""

from __future__ import annotations

import os
import socket
from collections import Counter
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any, cast

import pytest

from qrexec_activate.control import (
    check_qrexec,
    check_routes,
    check_services,
    check_units,
    checks,
)
from qrexec_activate.control.address import Obstacle, Trouble
from qrexec_activate.control.check_names import (
    likely_target,
    meant_unit,
    strays,
)
from qrexec_activate.control.check_qrexec import (
    agent_steps,
    client_steps,
    refuses,
)
from qrexec_activate.control.check_services import services
from qrexec_activate.control.check_units import reloads, syntax
from qrexec_activate.control.daemons import Daemon
from qrexec_activate.control.publications import Publication
from qrexec_activate.control.steps import Context, Level
from qrexec_activate.control.survey import Entry, Survey, Unit
from qrexec_activate.routing.routes import SocketUnit
from qrexec_activate.routing.unitfile import SourceFile
from qrexec_activate.systemd.systemctl import Systemctl

UNIT = "qrexec-connect-tcp@80.socket"
DAEMON = Daemon("qrexec-connect-tcp.service", "qubes.ConnectTCP", None)


class Silent:
    """A manager that knows nothing."""

    def manager_properties(self, *names: str) -> list[Any]:
        return [None for _ in names]

    def unit_properties(
        self, units: list[str], kind: str, names: list[str]
    ) -> list[dict[str, Any]]:
        return [dict.fromkeys(names) for _ in units]


def context(*files: SourceFile, active: str = "inactive") -> Context:
    now = Survey(user=True)
    socket_unit = SocketUnit(UNIT, files, (), UNIT)
    now.units[UNIT] = Unit(
        socket_unit, DAEMON, "loaded", active, "dead", "enabled"
    )
    now.daemons[DAEMON.unit] = DAEMON
    return Context(cast("Any", Silent()), now, Systemctl(user=True))


def entry(listener: str, file: str = "", active: str = "inactive") -> Entry:
    return Entry(
        listener,
        "work",
        DAEMON.service,
        "80",
        UNIT,
        DAEMON.unit,
        file,
        "enabled",
        active,
        False,
    )


# -------------------------------------------------------------------- qrexec


def test_an_agent_that_is_dead_leaves_its_socket_file(tmp_path: Path) -> None:
    for is_there in (True, False):
        (step,) = agent_steps(is_there, False)
        assert step.level is Level.ERROR
        assert step.mend.endswith("systemctl restart qubes-qrexec-agent")
    (step,) = agent_steps(True, True)
    assert step.level is Level.OK
    # Seen by asking, as an agent in a network of its own is in no list here.
    path = str(tmp_path / "agent")
    with socket.socket(socket.AF_UNIX) as agent:
        agent.bind(path)
        assert refuses(path)
        agent.listen()
        assert not refuses(path)
    assert refuses(path)


def test_a_package_that_is_missing_in_the_template_is_no_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(check_qrexec, "DEFAULT_CLIENT", "/nowhere/client")
    monkeypatch.setattr(check_qrexec, "QUBES_SIGNS", (str(tmp_path),))
    (step,) = client_steps("/nowhere/client", None)
    assert (step.level, step.mend) == (Level.ERROR, "")
    assert "in the template" in step.advice


def test_xen_that_is_closed_to_this_user_is_told_by_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "gntalloc").touch()
    (tmp_path / "limit").write_text("1024\n")
    assert [
        step.level
        for step in check_qrexec.xen_steps(tmp_path, tmp_path / "limit")
    ] == [Level.WARNING]
    monkeypatch.setattr(os, "access", lambda *_: False)
    closed, few = check_qrexec.xen_steps(tmp_path, tmp_path / "limit")
    assert f"{tmp_path}/gntalloc cannot be opened" in closed.text
    assert (closed.mend, "group qubes" in closed.advice) == ("", True)
    assert "about 30 calls" in few.text
    (tmp_path / "gntalloc").unlink()
    (tmp_path / "limit").write_text("1073741824\n")
    assert not list(check_qrexec.xen_steps(tmp_path, tmp_path / "limit"))


# -------------------------------------------------------------------- routes


def test_a_file_that_cannot_be_read_is_opened_and_read(tmp_path: Path) -> None:
    path = tmp_path / "gitweb.conf"
    path.touch()
    file = SourceFile(str(path), None, "cannot be read (Permission denied)")
    (step,) = reloads(context(file))
    assert step.level is Level.ERROR
    assert step.mend == (
        f"chmod a+r {path} && systemctl --user daemon-reload"
        f" && systemctl --user restart {UNIT}"
    )


def test_what_systemd_cannot_verify_is_not_called_understood(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said = "Couldn't process aliases: No such file or directory\n"
    failed = CompletedProcess([], 1, "", said)
    monkeypatch.setattr(check_units, "ran", lambda _: failed)
    (step,) = syntax(context(SourceFile("/units/a.conf", "[Socket]\n")))
    assert step.level is Level.WARNING
    assert said.strip() in step.text
    of_another = "/units/other.service:3: Unknown key 'X', ignoring."
    fails = CompletedProcess([], 1, "", of_another)
    monkeypatch.setattr(check_units, "ran", lambda _: fails)
    (step,) = syntax(context(SourceFile("/units/a.conf", "[Socket]\n")))
    assert step.level is Level.OK
    missing = CompletedProcess([], 127, "", "env: no such program\n")
    monkeypatch.setattr(check_units, "ran", lambda _: missing)
    assert not list(syntax(context(SourceFile("/units/a.conf", "[Socket]\n"))))


def test_a_privileged_port_needs_another_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setattr(
        check_routes,
        "obstacle",
        lambda *_: Obstacle(Trouble.PRIVILEGED, "port 80 needs privileges"),
    )
    file = f"{tmp_path}/systemd/user/{UNIT}.d/work.conf"
    one = context()
    one.now.entries.append(entry("127.0.0.1:80", file, "failed"))
    (step,) = check_routes.routes(one)
    assert "port 80 needs privileges" in step.text
    assert step.mend.startswith(f"qrexec-activate edit {file} && ")
    assert "start 127" not in step.mend


def test_a_folder_of_ones_own_is_made_writable(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    closed = tmp_path / "closed"
    closed.mkdir()
    monkeypatch.setattr(os, "access", lambda *_: False)
    one = context()
    one.now.entries.append(entry(f"{closed}/socket"))
    (step,) = check_routes.routes(one)
    assert f"{closed} cannot be written to" in step.text
    assert step.mend == (
        f"chmod u+rwx {closed} && systemctl --user start {UNIT}"
    )


# --------------------------------------------------------------- the manager


def test_who_cannot_be_asked_is_reached_in_the_way_that_works(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("SUDO_USER", raising=False)
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    monkeypatch.setattr(checks, "RUNTIME", str(tmp_path))
    monkeypatch.setattr(os, "getuid", lambda: 1000)
    # Nobody is logged in, and nothing lingers.
    assert checks.to_reach(user=True) == ("loginctl enable-linger", "")
    (tmp_path / "1000").mkdir()
    with socket.socket(socket.AF_UNIX) as bus:
        bus.bind(str(tmp_path / "1000" / "bus"))
        # The manager runs, and this shell does not know where.
        mend, _ = checks.to_reach(user=True)
        assert mend == f"export XDG_RUNTIME_DIR={tmp_path}/1000"
        monkeypatch.setenv("XDG_RUNTIME_DIR", f"{tmp_path}/1000")
        assert checks.to_reach(user=True)[0] == ""
    monkeypatch.setattr(os, "getuid", lambda: 0)
    assert "--system" in checks.to_reach(user=True)[1]
    monkeypatch.setenv("SUDO_USER", "user")
    mend, advice = checks.to_reach(user=True)
    assert (mend, "those of user: run it without sudo" in advice) == ("", True)
    assert checks.to_reach(user=False)[0] == ""


# --------------------------------------------------------------- near misses


@pytest.mark.parametrize(
    ("target", "others", "likely"),
    [
        ("gitwep", ["gitweb"], "gitweb"),
        ("gitweb", ["gitwep"], ""),
        ("GitWeb", ["gitweb"], "gitweb"),
        ("gitweb", ["GitWeb"], ""),
        ("gitwb", ["gitweb", "gitweb"], "gitweb"),
        ("work-2", ["work-1"], ""),
        ("mail-b", ["mail-a"], ""),
        ("work-web", ["work"], ""),
        ("vault", ["work"], ""),
    ],
)
def test_a_qube_that_looks_like_another(
    target: str, others: list[str], likely: str
) -> None:
    assert likely_target(target, Counter([target, *others])) == likely


@pytest.mark.parametrize(
    ("folder", "unit"),
    [
        ("qrexec-connect-tcp@1237.sockets.d", "qrexec-connect-tcp@1237.socket"),
        ("qrexec-connect-tpc@1237.socket.d", "qrexec-connect-tcp@1237.socket"),
        ("qrexec-connect-tcp-1237.socket.d", "qrexec-connect-tcp@1237.socket"),
        ("tcp-1237.socket.d", "qrexec-connect-tcp@1237.socket"),
        ("tpc@1237.socket.d", "qrexec-connect-tcp@1237.socket"),
        (
            "qrexec-connect-unix@a+b.socket.d",
            r"qrexec-connect-unix@a\x2bb.socket",
        ),
        (
            r"qrexec-connect-unix@a\x2db+:c d.socket.d",
            r"qrexec-connect-unix@a-b\x2b:c\x20d.socket",
        ),
        ("qrexec-connect-tcp@1237.socket.d", ""),
        ("pipewire.socket.d", ""),
        ("sshd@.service.d", ""),
    ],
)
def test_a_folder_that_is_of_no_unit(folder: str, unit: str) -> None:
    prefixes = {"qrexec-connect-tcp", "qrexec-connect-unix"}
    assert meant_unit(folder, prefixes) == unit


@pytest.mark.parametrize(
    ("instance", "why"),
    [
        ("12 34", "the argument '12 34' holds ' '"),
        ("12é", "the argument '12é' holds 'é'"),
        ("a\udcff", "no UTF-8"),
        ("12 \\z", "begins no"),
        ("+" * 80, "is longer than"),
    ],
)
def test_a_folder_whose_name_no_unit_can_have_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, instance: str, why: str
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    folder = tmp_path / f"systemd/user/qrexec-connect-tcp@{instance}.socket.d"
    folder.mkdir(parents=True)
    lines = "[Socket]\nListenStream=127.0.0.1:80\nFileDescriptorName=work\n"
    (folder / "work.conf").write_text(lines)
    seen = context()
    seen.now.files.fragments["qrexec-connect-tcp@.socket"] = ""
    (step,) = strays(seen)
    assert step.level is Level.ERROR
    assert why in step.text
    assert not step.mend
    assert "give it the name of a unit" in step.advice


@pytest.mark.parametrize("mine", [True, False])
def test_a_folder_of_drop_ins_that_cannot_be_read_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mine: bool
) -> None:
    folder = tmp_path / f"{UNIT}.d"
    folder.mkdir()
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setattr(os, "access", lambda *_: False)
    if not mine:
        monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    seen = context()
    seen.now.files.folders[UNIT] = [str(folder)]
    (step,) = strays(seen)
    assert step.level is Level.ERROR
    assert f"{folder} cannot be read" in step.text
    command, *again = step.mend.split(" && ")
    assert command == (
        f"chmod u+rwx {folder}" if mine else f"sudo chmod a+rx {folder}"
    )
    assert again[-1] == f"systemctl --user restart {UNIT}"


@pytest.mark.parametrize("level", ["systemd/user", "systemd"])
@pytest.mark.parametrize("how", ["a link to nothing", "no folder"])
def test_a_folder_of_units_that_leads_nowhere_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, level: str, how: str
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    path = tmp_path / level
    path.parent.mkdir(exist_ok=True)
    if how == "no folder":
        path.touch()
    else:
        path.symlink_to(tmp_path / "dotfiles")
    (step,) = strays(context())
    assert step.level is Level.ERROR
    assert step.text.startswith(f"{path} is {how}, so nothing of yours")
    assert "put the folder back" in step.advice
    path.unlink()
    path.mkdir()
    assert list(strays(context())) == []


SCRIPT = "/etc/qubes-rpc/qubes.ConnectUnix"


def offered(
    monkeypatch: pytest.MonkeyPatch, *found: Publication, user: bool
) -> list[tuple[Level, str, str]]:
    """What check says of these names, and of the script."""
    monkeypatch.setattr(check_services, "published", lambda *_: list(found))
    monkeypatch.setattr(check_services, "where_installed", lambda _: SCRIPT)
    monkeypatch.setattr("os.access", lambda *_: True)
    monkeypatch.setattr("shutil.which", lambda _: "/usr/bin/socat")
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    look = context()
    look.now.user = user
    look.systemctl = Systemctl(user=user)
    return [(step.level, step.text, step.mend) for step in services(look)]


def name(problem: str = "", **fields: Any) -> Publication:
    socket = "/run/qubes.ConnectUnix/x"
    given = {
        "unit": "qrexec-publish-x.socket",
        "file": "",
        "alive": not problem,
        "problem": problem,
        **fields,
    }
    return Publication("x", socket, socket, **given)


def test_each_name_shows_which_way_its_calls_take(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    link = f"{SCRIPT}+x"
    alive = "x leads to /run/qubes.ConnectUnix/x, which is alive, "
    installed = (Level.OK, f"{SCRIPT} is installed", "")
    # Those of the system, too, of which native ones are.
    assert offered(monkeypatch, name(way=link), name(), user=False) == [
        installed,
        (Level.OK, f"{alive}by qrexec alone, as root ({link})", ""),
        (Level.OK, f"{alive}by the script {SCRIPT}", ""),
    ]
    assert offered(monkeypatch, user=True) == [installed]
    assert offered(monkeypatch, user=False) == []


def test_what_mends_a_name_takes_nothing_of_the_systems_away(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gone = name("nobody listens")
    by_hand = name("nobody listens", unit="")
    says = "x cannot be called: nobody listens"
    unit = "qrexec-publish-x.socket"
    for found, user, mend in (
        (gone, True, f"systemctl --user restart {unit}"),
        (gone, False, f"sudo systemctl restart {unit}"),
        (by_hand, True, "qrexec-activate unpublish x"),
        (by_hand, False, ""),
    ):
        assert offered(monkeypatch, found, user=user)[1:] == [
            (Level.ERROR, says, mend)
        ]
    # To unpublish what goes another way would delete its user and its files.
    other = name("/x is what other qubes reach", alive=True, way="/x")
    assert offered(monkeypatch, other, user=False)[1:] == [
        (Level.ERROR, "x: /x is what other qubes reach", "")
    ]
