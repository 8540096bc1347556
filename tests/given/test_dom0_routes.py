"""Routes that dom0 gives, from its words in QubesDB to connections: the real
generator under a real `systemd --user`, and a pretend QubesDB."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from desk import Desk, listens
from scenario import free_port, measured

from qrexec_activate.loopback.machine import Machine
from qrexec_activate.loopback.qubesdb import put, write_programs

PATIENCE = 60.0
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def machine() -> Iterator[Machine]:
    with Machine(qubesdb=True, environment=measured()) as machine:
        yield machine


@pytest.fixture
def desk(machine: Machine) -> Iterator[Desk]:
    desk = Desk(machine)
    # It has stopped all that is of this project.
    machine.systemctl("start", "qrexec-activate-dom0.service")
    yield desk
    for path in machine.qubesdb.glob("vm-config/*"):
        machine.say(f"/vm-config/{path.name}", None)
    until("nothing is left", lambda: not dom0_units(machine))
    for path in machine.unit_dir.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
    machine.systemctl("daemon-reload")


def until(what: str, condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"never happened: {what}"
        time.sleep(0.02)


def dom0_units(machine: Machine) -> set[str]:
    """The sockets from dom0 that listen, each with when it was started."""
    lines = machine.systemctl(
        "list-units", "--state=active", "--plain", "--no-legend", "*:dom0-*"
    )
    return {line.split()[0] for line in lines.splitlines()}


def serve(machine: Machine, qube: str) -> None:
    """Let all ports of a qube say which qube it is in, and then echo."""
    rpc = machine.add_qube(qube) / "rpc" / "qubes.ConnectTCP"
    rpc.write_text(f"#!/bin/sh\necho {qube} $1\ncat\n")
    rpc.chmod(0o755)


def answer(port: int) -> str:
    with socket.create_connection(("127.0.0.1", port), PATIENCE) as sock:
        sock.shutdown(socket.SHUT_WR)
        with sock.makefile() as file:
            return file.read().strip()


def allow(machine: Machine) -> None:
    (machine.loopback / "policy").write_text("* * @anyvm @anyvm allow\n")


def test_dom0_opens_an_address_and_takes_it_away_again(desk: Desk) -> None:
    machine, port = desk.machine, desk.port
    allow(machine)
    serve(machine, "gitweb")
    serve(machine, "work")
    assert not listens(("127.0.0.1", port))
    line = f"tcp {port} gitweb 127.0.0.1:{port}"
    machine.say("/vm-config/connect-tcp", line)
    until("it listens", lambda: listens(("127.0.0.1", port)))
    assert answer(port) == f"gitweb {port}"
    # Another qube for it.
    machine.say("/vm-config/connect-tcp", f"tcp {port} work")
    unit = desk.labelled("dom0-work")
    until("it is another route", lambda: dom0_units(machine) == {unit})
    assert answer(port) == f"work {port}"
    machine.say("/vm-config/connect-tcp", None)
    until("it is closed", lambda: not listens(("127.0.0.1", port)))
    assert desk.failed() == ""


def test_what_stays_is_not_touched(desk: Desk) -> None:
    machine, port, other = desk.machine, desk.port, free_port()
    allow(machine)
    serve(machine, "gitweb")
    machine.say("/vm-config/connect-a", f"tcp {port} gitweb")
    until("it listens", lambda: listens(("127.0.0.1", port)))
    unit = desk.labelled("dom0-gitweb")
    started = machine.property(unit, "ActiveEnterTimestampMonotonic")
    with socket.create_connection(("127.0.0.1", port), PATIENCE) as sock:
        file = sock.makefile()
        assert file.readline() == f"gitweb {port}\n"
        machine.say("/vm-config/connect-b", f"tcp {other} work; nonsense")
        until("the other listens", lambda: listens(("127.0.0.1", other)))
        # The same route, by another feature.
        machine.say("/vm-config/connect-0", f"tcp {port} gitweb")
        machine.say("/vm-config/connect-b", None)
        until("the other is closed", lambda: dom0_units(machine) == {unit})
        sock.sendall(b"still there\n")
        assert file.readline() == "still there\n"
    assert machine.property(unit, "ActiveEnterTimestampMonotonic") == started
    assert machine.property(unit, "NeedDaemonReload") == "no"


def test_a_unix_socket_is_its_users_alone(desk: Desk) -> None:
    machine = desk.machine
    path = machine.runtime / "given" / "notes"
    machine.say("/vm-config/connect-u", "unix notes @default %t/given/notes")
    until("it is there", path.exists)
    assert path.stat().st_mode & 0o777 == 0o600
    machine.say("/vm-config/connect-u", None)
    until("it is gone", lambda: not listens(str(path)))


def test_a_login_has_the_routes_from_the_first_second(
    tmp_path: Path,
) -> None:
    port = free_port()

    class Given(Machine):
        def _lay_out(self, units: Path, bus: str) -> None:
            super()._lay_out(units, bus)
            self.say("/vm-config/connect-a", f"tcp {port} gitweb")

    with Given(qubesdb=True, environment=measured()) as machine:
        # Once sockets.target is there, so is it.
        machine.systemctl("start", "sockets.target")
        assert listens(("127.0.0.1", port))


def test_a_reload_without_qubesdb_loses_nothing(desk: Desk) -> None:
    machine, port = desk.machine, desk.port
    machine.say("/vm-config/connect-a", f"tcp {port} gitweb")
    until("it listens", lambda: listens(("127.0.0.1", port)))
    away = machine.qubesdb.with_name("away")
    machine.qubesdb.rename(away)
    try:
        machine.systemctl("daemon-reload")
        assert listens(("127.0.0.1", port))
        watch = "qrexec-activate-dom0.service"
        until(
            "it waits for QubesDB",
            lambda: machine.property(watch, "SubState") == "auto-restart",
        )
    finally:
        away.rename(machine.qubesdb)
    machine.say("/vm-config/connect-a", None)
    until("it is closed", lambda: not listens(("127.0.0.1", port)))


def test_what_the_qube_has_itself_comes_first(desk: Desk) -> None:
    machine, port = desk.machine, desk.port
    desk.run("add", "tcp", str(port), "work")
    machine.say("/vm-config/connect-a", f"tcp {port} gitweb")
    machine.say("/vm-config/connect-b", f"tcp {free_port()} gitweb")
    until("the other is there", lambda: dom0_units(machine))
    assert desk.routes()[f"127.0.0.1:{port}"] == "work"
    desk.run("remove", "tcp", str(port), "work")
    # Now it is free, and dom0 has it at the next change.
    machine.say("/vm-config/connect-b", None)
    unit = desk.labelled("dom0-gitweb")
    until("it is dom0's", lambda: dom0_units(machine) == {unit})
    assert desk.routes() == {f"127.0.0.1:{port}": "gitweb"}


def test_an_own_address_takes_dom0s_place_at_once(desk: Desk) -> None:
    machine, address = desk.machine, f"127.0.0.1:{desk.port}"
    allow(machine)
    serve(machine, "gitweb")
    serve(machine, "work")
    machine.say("/vm-config/connect-a", f"tcp {desk.port} gitweb")
    until("it is dom0's", lambda: dom0_units(machine))
    with socket.create_connection(("127.0.0.1", desk.port), PATIENCE) as sock:
        # Now the daemon runs, and has the address, too.
        file = sock.makefile()
        assert file.readline() == f"gitweb {desk.port}\n"
        lines = (f"ListenStream={address}", "FileDescriptorName=work")
        desk.drop_in(desk.tcp, "work", "[Socket]", *lines)
        machine.systemctl("enable", "--now", desk.tcp)
        assert answer(desk.port) == f"work {desk.port}"
        assert desk.routes() == {address: "work"}
        sock.sendall(b"still there\n")
        assert file.readline() == "still there\n"
    assert desk.failed() == ""


def test_what_a_person_has_stopped_is_left_so(desk: Desk) -> None:
    machine, port, other = desk.machine, desk.port, free_port()
    machine.say("/vm-config/connect-a", f"tcp {port} gitweb")
    until("it listens", lambda: listens(("127.0.0.1", port)))
    machine.systemctl("stop", desk.labelled("dom0-gitweb"))
    machine.say("/vm-config/connect-b", f"tcp {other} gitweb")
    until("the other listens", lambda: listens(("127.0.0.1", other)))
    assert not listens(("127.0.0.1", port))


def test_dom0_switches_on_some_of_what_a_template_holds(desk: Desk) -> None:
    machine, port, other = desk.machine, desk.port, free_port()
    allow(machine)
    serve(machine, "gitweb")
    services = machine.runtime / "qubes-service"
    services.mkdir()
    switched = machine.directory / "switched.conf"
    switched.write_text(
        (ROOT / "units" / "qrexec-connect-switched.conf")
        .read_text()
        .replace("/run/qubes-service", str(services))
    )
    units = []
    for number in (port, other):
        unit = f"qrexec-connect-tcp@{number}.socket"
        lines = (
            f"ListenStream=127.0.0.1:{number}",
            "FileDescriptorName=gitweb",
        )
        desk.drop_in(unit, "gitweb", "[Socket]", *lines)
        folder = machine.unit_dir / f"{unit}.d"
        (folder / "switched.conf").symlink_to(switched)
        units.append(unit)
    machine.systemctl("daemon-reload")
    machine.systemctl("enable", *units)
    # qvm-service client qrexec-connect-tcp-PORT
    (services / f"qrexec-connect-tcp-{port}").touch()
    machine.systemctl("start", *units)
    assert answer(port) == f"gitweb {port}"
    assert not listens(("127.0.0.1", other))
    assert desk.failed() == ""
    # No fault, and no mend that would not help.
    (step,) = (
        one for one in steps_of(desk) if f"127.0.0.1:{other}" in one["text"]
    )
    assert step["level"] == "ok"
    assert step["text"].endswith(
        f"{units[1]} is off, as a condition of it is not met:"
        f" ConditionPathExists={services}/qrexec-connect-tcp,"
        f" ConditionPathExists={services}/qrexec-connect-tcp-{other}"
    )
    # qvm-service client qrexec-connect-tcp: all of the kind.
    (services / "qrexec-connect-tcp").touch()
    machine.systemctl("restart", *units)
    assert answer(other) == f"gitweb {other}"
    # It is on, and a person has stopped it.
    machine.systemctl("stop", units[1])
    (step,) = (
        one for one in steps_of(desk) if f"127.0.0.1:{other}" in one["text"]
    )
    assert step["text"].endswith(f"{units[1]} is not started")
    for path in services.iterdir():
        path.unlink()
    machine.systemctl("restart", *units)
    assert not listens(("127.0.0.1", port))
    assert not listens(("127.0.0.1", other))


# ------------------------------------------------------------- the generator alone


@pytest.fixture
def place(tmp_path: Path) -> Path:
    write_programs(tmp_path / "bin", tmp_path / "db", tmp_path)
    put(tmp_path / "db", "/default-user", subprocess_user())
    for name in ("run", "home"):
        (tmp_path / name).mkdir()
    return tmp_path


def subprocess_user() -> str:
    return subprocess.run(
        ["id", "-un"], capture_output=True, text=True, check=True
    ).stdout.strip()


def generate(place: Path, **environment: str) -> tuple[dict[str, str], str]:
    """What the generator writes (links by where they lead), and says."""
    out = place / "out"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    result = subprocess.run(
        [place / "qrexec-activate", out, out, out],
        env={
            "PATH": os.defpath,
            "HOME": str(place / "home"),
            "XDG_RUNTIME_DIR": str(place / "run"),
            "SYSTEMD_SCOPE": "user",
            **environment,
        },
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=True,
    )
    assert "Traceback" not in result.stderr
    files = {}
    for path in out.rglob("*"):
        name = str(path.relative_to(out))
        if path.is_symlink():
            files[name] = os.readlink(path)
        elif path.is_file():
            files[name] = path.read_text()
    return files, result.stderr


WATCH = "default.target.wants/qrexec-activate-dom0.service"


def test_a_unit_is_a_drop_in_and_a_link(place: Path) -> None:
    put(place / "db", "/vm-config/connect-a", "tcp 1234 gitweb;tcp 80 x;bad")
    put(place / "db", "/vm-config/other", "tcp 1235 gitweb")
    files, said = generate(place)
    unit = "qrexec-connect-tcp@1234:dom0-gitweb.socket"
    assert files.pop(f"{unit}.d/connect-a.conf").endswith(
        "ListenStream=127.0.0.1:1234\nFileDescriptorName=gitweb\n"
    )
    assert files == {
        f"sockets.target.wants/{unit}": (
            "/usr/lib/systemd/user/qrexec-connect-tcp@.socket"
        ),
        WATCH: "/usr/lib/systemd/user/qrexec-activate-dom0.service",
    }
    assert said.count("\n") == 1
    assert said.startswith(
        "<4>qrexec-activate: vm-config.connect-a, from dom0: 'bad'"
    )


def test_privileged_ports_are_the_systems(place: Path) -> None:
    put(place / "db", "/vm-config/connect-a", "tcp 1234 gitweb;tcp 80 x")
    out = place / "out"
    out.mkdir()
    # Not by generate(): as the system's it would write below /run.
    code = (
        "import sys; sys.path.append(sys.argv[1])\n"
        "from qrexec_activate.given import generator\n"
        "place = generator.Place({'SYSTEMD_SCOPE': 'system'})\n"
        "assert place.memory.startswith('/run/'), place.memory\n"
        "place.runtime = sys.argv[2]\n"
        "generator.generate(sys.argv[3], place)\n"
    )
    subprocess.run(
        [
            *(sys.executable, "-IS", "-c", code),
            *(str(Path(__file__).parents[2]), str(place / "run"), str(out)),
        ],
        env={"PATH": f"{place / 'bin'}:{os.defpath}"},
        check=True,
    )
    assert {str(path.relative_to(out)) for path in out.glob("*/*")} == {
        "multi-user.target.wants/qrexec-activate-dom0.service",
        "qrexec-connect-tcp@80:dom0-x.socket.d/connect-a.conf",
        "sockets.target.wants/qrexec-connect-tcp@80:dom0-x.socket",
    }


def test_only_the_user_whom_dom0_names_gets_routes(place: Path) -> None:
    put(place / "db", "/vm-config/connect-a", "tcp 1234 gitweb")
    put(place / "db", "/default-user", "somebody-else")
    assert generate(place) == ({}, "")


def test_a_machine_without_qubesdb_hears_nothing(place: Path) -> None:
    for name in ("list", "read", "watch"):
        (place / "bin" / f"qubesdb-{name}").unlink()
    assert generate(place) == ({}, "")


@pytest.mark.parametrize("broken", ["list", "read", "hangs"])
def test_qubesdb_may_die_at_any_step(
    place: Path, broken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(place / "db", "/vm-config/connect-a", "tcp 1234 gitweb")
    before = generate(place)
    program = place / "bin" / f"qubesdb-{broken.replace('hangs', 'read')}"
    end = "sleep 1000" if broken == "hangs" else "exit 1"
    program.write_text(
        f"#!/bin/sh\necho '/vm-config/connect-b = tcp 1 x'\nexec {end}\n"
        if broken == "hangs"
        else f"#!/bin/sh\necho '/vm-config/connect-b = tcp 1 x'\n{end}\n"
    )
    assert generate(place) == before
    # It is there again.
    put(place / "db", "/vm-config/connect-a", None)
    write_programs(place / "bin", place / "db", place)
    assert list(generate(place)[0]) == [WATCH]


def test_one_that_cannot_be_written_is_no_reason_for_others(
    place: Path,
) -> None:
    # The name of a file has 255 bytes, which this one and `.conf` exceed.
    name = "a" * 200
    put(place / "db", "/vm-config/connect-a", f"unix {name} x /y;tcp 1234 b")
    put(place / "db", "/vm-config/connect-b", "tcp 1235 b")
    files, said = generate(place)
    assert sum("wants/qrexec-connect-tcp" in name for name in files) == 2
    del said


def test_an_own_socket_that_is_masked_or_not_enabled_is_no_rival(
    place: Path,
) -> None:
    put(
        place / "db", "/vm-config/connect-a", "tcp 1234 a;tcp 1235 a;tcp 1236 a"
    )
    own = place / "home" / ".config" / "systemd" / "user"
    wants = own / "sockets.target.wants"
    wants.mkdir(parents=True)
    for number, unit in enumerate(("on", "off", "masked"), start=1234):
        (own / f"{unit}.socket.d").mkdir()
        (own / f"{unit}.socket.d" / "a.conf").write_text(
            f"[Socket]\nListenStream=127.0.0.1:{number}\n"
        )
        if unit != "off":
            (wants / f"{unit}.socket").symlink_to("nowhere")
    (own / "masked.socket").symlink_to("/dev/null")
    files, said = generate(place)
    ports = {
        name.split("@")[1][:4]
        for name in files
        if "wants/qrexec-connect" in name
    }
    assert ports == {"1235", "1236"}
    assert f"127.0.0.1:1234 is opened by {own}/on.socket.d/a.conf" in said


#: Each takes longer to import than all that there is to do.
HEAVY = {
    *("re", "enum", "functools", "collections", "collections.abc", "typing"),
    *("dataclasses", "inspect", "ipaddress", "socket", "signal"),
    *("subprocess", "pathlib", "site", "trio", "click", "jeepney", "systemd"),
}


def test_a_login_waits_for_little(place: Path) -> None:
    """A hundred routes are two questions, and nothing is imported for them
    that takes its time."""
    for number in range(100):
        put(
            place / "db",
            f"/vm-config/connect-tcp-{number}",
            f"tcp {20000 + number} gitweb 127.0.0.1:{20000 + number}",
        )
    own = place / "home" / ".config" / "systemd" / "user" / "x.socket.d"
    own.mkdir(parents=True)
    own.joinpath("x.conf").write_text("[Socket]\nListenStream=%t/x\n")
    own.parent.joinpath("sockets.target.wants").mkdir()
    own.parent.joinpath("sockets.target.wants", "x.socket").symlink_to("x")
    asked = place / "asked"
    for program in (place / "bin").iterdir():
        lines = program.read_text().partition("\n")
        program.write_text(f"{lines[0]}\necho >>{asked}\n{lines[2]}")
    code = (
        "import sys; sys.path.append(sys.argv.pop(1))\n"
        "from qrexec_activate.given.generator import main; main()\n"
        "sys.stdout.write(' '.join(sys.modules))\n"
    )
    out = place / "out"
    out.mkdir()
    result = subprocess.run(
        [
            *(sys.executable, "-IS", "-c", code),
            *(str(Path(__file__).parents[2]), *[str(out)] * 3),
        ],
        env={
            "PATH": f"{place / 'bin'}:{os.defpath}",
            "HOME": str(place / "home"),
            "XDG_RUNTIME_DIR": str(place / "run"),
        },
        capture_output=True,
        text=True,
        check=True,
    )
    assert HEAVY & set(result.stdout.split()) == set()
    assert asked.read_text().count("\n") == 2
    assert len(list(out.glob("sockets.target.wants/*"))) == 100


# ------------------------------------------------------ what the commands say of it


@pytest.fixture
def given(desk: Desk) -> Desk:
    """One route from dom0, one of the qube's own for the same address, which
    wins, and one that is none."""
    desk.drop_in(
        desk.tcp,
        "work",
        "[Socket]",
        f"ListenStream=127.0.0.2:{desk.port}",
        "FileDescriptorName=work",
    )
    desk.start(desk.tcp)
    desk.machine.say("/vm-config/connect-b", f"tcp {desk.port} gitweb; bad")
    desk.machine.say("/vm-config/connect-c", f"tcp {desk.port} x 127.0.0.2")
    until(
        "dom0's is there",
        lambda: dom0_units(desk.machine) == {desk.labelled("dom0-gitweb")},
    )
    return desk


def test_commands_show_what_is_from_dom0_and_leave_it_alone(
    given: Desk,
) -> None:
    desk, port = given, given.port
    origins = {one["listener"]: one["origin"] for one in desk.json("list")}
    assert origins == {f"127.0.0.1:{port}": "dom0", f"127.0.0.2:{port}": "here"}
    assert "dom0: vm-config.connect-b" in desk.run("list", "--wide")
    header, *rows = desk.run("status", "--wide").splitlines()[:3]
    assert header.split()[-1] == "FROM"
    assert {row.split()[1]: row.split()[-1] for row in rows} == {
        "gitweb": "dom0",
        "work": "here",
    }
    shown = desk.run("status", f"127.0.0.1:{port}")
    assert "from dom0 by vm-config.connect-b" in shown
    assert (
        f"# 127.0.0.1:{port}, to gitweb, is from dom0 (vm-config.connect-b)"
        in desk.run("policy")
    )
    (file,) = desk.machine.runtime.glob("systemd/generator/*/connect-b.conf")
    before = dom0_units(desk.machine)
    for words in (
        ("remove", f"127.0.0.1:{port}"),
        ("retarget", f"127.0.0.1:{port}", "work"),
        ("edit", f"127.0.0.1:{port}"),
        ("edit", str(file)),
        ("disable", f"127.0.0.1:{port}"),
        ("disable", "--now", "gitweb"),
        ("enable", "gitweb"),
    ):
        said = desk.fails(*words)
        assert "cannot be changed here, as dom0 gives it" in said
        assert "--unset client vm-config.connect-b" in said
    assert dom0_units(desk.machine) == before


def steps_of(desk: Desk) -> list[dict[str, str]]:
    """What check says: never that all is well, without a qrexec-agent."""
    steps: list[dict[str, str]] = json.loads(
        desk.try_("check", "--json").stdout
    )["steps"]
    return steps


def test_check_names_what_dom0_says_in_vain(given: Desk) -> None:
    desk, port = given, given.port
    steps = steps_of(desk)
    (bad,) = (one for one in steps if "connect-b, from dom0" in one["text"])
    assert "'bad' is no kind of route" in bad["text"]
    assert bad["advice"] == (
        "mend it in dom0: qvm-features client vm-config.connect-b"
    )
    # The pair.
    (lost,) = (one for one in steps if "connect-c, from dom0" in one["text"])
    assert (
        f"127.0.0.2:{port} is opened by {desk.machine.unit_dir}/{desk.tcp}.d"
        f"/work.conf, and what is this qube's own comes first" in lost["text"]
    )
    desk.machine.systemctl("stop", "qrexec-activate-dom0.service")
    desk.machine.say("/vm-config/connect-d", f"tcp {port} y 127.0.0.3")
    steps = steps_of(desk)
    (late,) = (one for one in steps if "is not there yet" in one["text"])
    assert f"127.0.0.3:{port} → y" in late["text"]
    desk.machine.run(["sh", "-c", late["mend"]])
    until("it is there", lambda: listens(("127.0.0.3", port)))
