"""A unit for each route: it comes and goes by itself, and no other port closes
for it."""

from __future__ import annotations

import contextlib
import os
import pwd
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
import trio
from desk import PATIENCE, Desk, free_port, listens
from scenario import Scene, ask, connect, echo, echoes, refuses

from qrexec_activate.control.settle import Change, carry_out
from qrexec_activate.errors import ActivateError, ManagerError
from qrexec_activate.loopback.machine import Machine
from qrexec_activate.systemd.systemctl import Systemctl

ME = pwd.getpwuid(os.geteuid()).pw_name


@pytest.fixture
def desk(shared_machine: Machine) -> Iterator[Desk]:
    desk = Desk(shared_machine)
    yield desk
    desk.leave()


def since(desk: Desk, unit: str) -> str:
    return desk.machine.property(unit, "ActiveEnterTimestampMonotonic")


# ---------------------------------------------------------------------- labels


def test_a_label_is_what_a_person_says_to_every_command(desk: Desk) -> None:
    port = str(desk.port)
    desk.run("add", "tcp", port, "gitweb")
    desk.run("add", "tcp", port, "work", "--label", "shop")
    shop, other = ("127.0.0.2", desk.port), ("127.0.0.1", desk.port)
    unit = desk.labelled("shop")
    assert desk.active() == {desk.gitweb, unit}
    began = since(desk, desk.gitweb)
    assert desk.run("stop", "shop") == (f"Stopped: 127.0.0.2:{port} to work\n")
    assert not listens(shop)
    assert f"sockets.target.wants/{unit}" in desk.files()
    desk.run("start", "shop")
    assert listens(shop)
    desk.run("disable", "--now", "shop")
    assert not listens(shop)
    assert f"sockets.target.wants/{unit}" not in desk.files()
    desk.run("enable", "shop")
    assert not listens(shop)
    assert f"sockets.target.wants/{unit}" in desk.files()
    desk.run("enable", "--now", "shop")
    assert listens(shop)
    assert "127.0.0.2" in desk.run("list", "shop")
    desk.run("retarget", "shop", "vault")
    assert desk.routes() == {
        f"127.0.0.1:{port}": "gitweb",
        f"127.0.0.2:{port}": "vault",
    }
    desk.run("remove", "shop")
    assert desk.active() == {desk.gitweb}
    assert since(desk, desk.gitweb) == began
    assert listens(other)
    assert desk.folders() == {f"{desk.gitweb}.d"}


def test_a_label_that_is_taken_or_no_label_is_refused(desk: Desk) -> None:
    port = str(desk.port)
    desk.run("add", "tcp", port, "gitweb", "--label", "x")
    said = desk.fails("add", "tcp", port, "work", "--label", "x", code=2)
    assert f"there is a {desk.labelled('x')} already" in said
    for label in ("", "-x", "a:b", "a b", "ä", "a/b", "\x1b[31m"):
        said = desk.fails("add", "tcp", port, "work", "--label", label, code=2)
        assert "is no label" in said
    # One target twice: the second has a number.
    desk.run("add", "tcp", port, "work")
    desk.run("add", "tcp", port, "work", "--listen", "127.0.0.9")
    assert desk.active() == {
        desk.labelled(label) for label in ("x", "work", "work-2")
    }


def test_a_route_that_is_there_is_found_whoever_wrote_it(desk: Desk) -> None:
    desk.drop_in(
        desk.tcp,
        "gitweb",
        "[Socket]",
        f"ListenStream=127.0.0.1:{desk.port}",
        "FileDescriptorName=gitweb",
    )
    desk.start(desk.tcp)
    before = desk.files()
    result = desk.try_("add", "tcp", str(desk.port), "gitweb")
    assert result.returncode == 0
    assert "reaches gitweb already" in result.stderr
    # "Now" would be news.
    assert "now reaches" not in result.stdout
    assert desk.files() == before


def two_in_a_unit(desk: Desk) -> None:
    for number, qube in enumerate(("gitweb", "work"), start=1):
        desk.drop_in(
            desk.tcp,
            qube,
            "[Socket]",
            f"ListenStream=127.0.0.{number}:{desk.port}",
            f"FileDescriptorName={qube}",
        )
    desk.start(desk.tcp)


def test_a_unit_of_several_routes_is_switched_as_one_or_not_at_all(
    desk: Desk,
) -> None:
    two_in_a_unit(desk)
    said = desk.fails("stop", "gitweb", code=2)
    assert f"is also the route from 127.0.0.2:{desk.port} to work" in said
    assert listens(("127.0.0.1", desk.port))
    assert desk.run("stop", "gitweb", "work").count("Stopped") == 2
    assert desk.active() == set()
    desk.run("start", desk.tcp)
    assert desk.active() == {desk.tcp}


def test_a_word_for_several_units_needs_all(desk: Desk) -> None:
    other = free_port()
    for port in (desk.port, other):
        desk.run("add", "tcp", str(port), "work")
    for verb in ("stop", "disable", "start", "enable"):
        assert "may mean 2 routes" in desk.fails(verb, "work", code=2)
    assert "may mean 2 routes" in desk.fails("retarget", "work", "x", code=2)
    desk.run("stop", "work", "--all")
    assert desk.active() == set()


# --------------------------------------------------- what a person wrote by hand


def test_a_route_is_known_by_its_file_before_systemd_has_read_it(
    desk: Desk,
) -> None:
    two_in_a_unit(desk)
    folder = desk.machine.unit_dir / f"{desk.tcp}.d"
    path = folder / "gitweb.conf"
    path.write_text(f"# by hand\n{path.read_text()}")
    script = desk.machine.home / "editor"
    script.write_text('#!/bin/sh\nsed -i s/gitweb/vault/ "$1"\n')
    script.chmod(0o755)
    desk.run("edit", "gitweb", environment={"VISUAL": str(script)})
    assert desk.routes()[f"127.0.0.1:{desk.port}"] == "vault"
    path.write_text(f"# once more\n{path.read_text()}")
    desk.run("remove", "vault")
    # Nor has it read this one.
    desk.drop_in(
        desk.tcp,
        "new",
        "[Socket]",
        f"ListenStream=127.0.0.3:{desk.port}",
        "FileDescriptorName=new",
    )
    desk.run("remove", "new")
    assert desk.routes() == {f"127.0.0.2:{desk.port}": "work"}


def test_a_unit_that_systemd_has_never_seen_goes_like_any_other(
    desk: Desk,
) -> None:
    desk.run("add", "tcp", str(desk.port), "work")
    desk.drop_in(
        desk.gitweb,
        "gitweb",
        "[Socket]",
        f"ListenStream=127.0.0.9:{desk.port}",
        "FileDescriptorName=gitweb",
    )
    desk.run("remove", "gitweb", "work")
    assert desk.files() == set()
    assert desk.active() == set()


@pytest.mark.parametrize("name", ["ü", 'a"b', "o'ne"])
def test_a_path_that_a_reload_closes_is_open_after_a_change(
    desk: Desk, name: str
) -> None:
    path = str(desk.machine.runtime / f"{name}.sock")
    added = desk.try_("add", "unix", "x", "work", "--listen", path)
    assert added.returncode == 0
    assert f"{path}: systemd 252 closes it" in added.stderr
    desk.run("retarget", path, "vault")
    assert listens(path)
    desk.run("remove", path)
    assert desk.active() == set()


def test_a_route_that_goes_leaves_its_unit_running(desk: Desk) -> None:
    two_in_a_unit(desk)
    began = since(desk, desk.tcp)
    desk.run("remove", "gitweb")
    assert not listens(("127.0.0.1", desk.port))
    assert listens(("127.0.0.2", desk.port))
    assert since(desk, desk.tcp) == began


def test_a_name_that_is_for_two_addresses_is_not_changed_for_one(
    desk: Desk,
) -> None:
    path = desk.drop_in(
        desk.tcp,
        "both",
        "[Socket]",
        f"ListenStream=127.0.0.1:{desk.port}",
        f"ListenStream=127.0.0.2:{desk.port}",
        "FileDescriptorName=gitweb",
        "# a word",
    )
    desk.start(desk.tcp)
    before = path.read_text()
    address = f"127.0.0.1:{desk.port}"
    said = desk.fails("retarget", address, "work")
    assert f"127.0.0.2:{desk.port} would change, too" in said
    assert path.read_text() == before
    desk.run("retarget", desk.tcp, "@dispvm:work")
    assert path.read_text() == before.replace("=gitweb", "=@dispvm\\x3awork")
    assert set(desk.routes().values()) == {"@dispvm:work"}


def test_what_another_file_decides_is_not_retargeted(desk: Desk) -> None:
    two_in_a_unit(desk)
    desk.drop_in(desk.tcp, "zz", "[Socket]", "FileDescriptorName=vault")
    desk.machine.systemctl("daemon-reload")
    before = desk.files()
    said = desk.fails("retarget", f"127.0.0.1:{desk.port}", "mail")
    assert "another file of" in said
    assert desk.files() == before
    assert set(desk.routes().values()) == {"vault"}


def test_an_editor_that_changes_nothing_leaves_line_ends_alone(
    desk: Desk,
) -> None:
    desk.run("add", "tcp", str(desk.port), "gitweb")
    path = desk.machine.unit_dir / f"{desk.gitweb}.d" / "gitweb.conf"
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    before = path.read_bytes()
    result = desk.try_("edit", "gitweb", environment={"VISUAL": "true"})
    assert "is as it was" in result.stderr
    assert path.read_bytes() == before
    desk.run("retarget", "gitweb", "work")
    assert path.read_bytes() == before.replace(b"gitweb", b"work")


def test_what_was_typed_is_kept_if_it_cannot_be_used(desk: Desk) -> None:
    desk.run("add", "tcp", str(desk.port), "gitweb")
    script = desk.machine.home / "editor"
    script.write_text('#!/bin/sh\necho nonsense >>"$1"\n')
    script.chmod(0o755)
    result = desk.try_("edit", "gitweb", environment={"VISUAL": str(script)})
    found = re.search(r"your text is in (\S+)$", result.stderr)
    assert found
    kept = Path(found[1])
    assert kept.read_text().endswith("nonsense\n")
    kept.unlink()
    kept.parent.rmdir()


# ---------------------------------------------------------------------- many


@pytest.fixture
def told(desk: Desk) -> Iterator[Path]:
    """A file that takes down how systemctl is called."""
    folder = desk.machine.home / "bin"
    folder.mkdir(exist_ok=True)
    log = desk.machine.home / "told"
    log.touch()
    shim = folder / "systemctl"
    shim.write_text(
        f'#!/bin/sh\necho "$@" >>{log}\n'
        'PATH=${PATH#*:}\nexec systemctl "$@"\n'
    )
    shim.chmod(0o755)
    path = desk.machine.environment["PATH"]
    desk.machine.environment["PATH"] = f"{folder}:{path}"
    yield log
    desk.machine.environment["PATH"] = path
    shim.unlink()
    log.unlink()


def test_many_routes_come_by_no_reload_and_go_by_one(
    desk: Desk, told: Path
) -> None:
    lines = [
        f"tcp {port} work  # a comment"
        for port in range(desk.port, desk.port + 60)
    ]
    lines += ["", "unix notes @default --label notes --listen %t/x-notes"]
    source = desk.machine.home / "routes"
    source.write_text("\n".join(lines))
    commands: list[tuple[str, ...]] = [
        ("add", "--from", str(source)),
        ("retarget", "work", "vault", "--all"),
        ("stop", "vault", "--all"),
        ("start", "vault", "--all"),
        ("remove", "vault", "--all"),
    ]
    count = {"vault": 60, "work": 60}
    for words in commands:
        told.write_text("")
        printed = desk.run(*words)
        calls = told.read_text().splitlines()
        verbs = [call.split()[1] for call in calls]
        reloads = 0 if words[0] in ("add", "start", "stop") else 1
        assert verbs.count("daemon-reload") == reloads, calls
        assert len(verbs) <= 6, calls
        if words[0] == "add":
            assert printed.count(" now reaches work") == count["work"]
            assert len(desk.active()) == 61
            # The daemon, too, is to take the files for what systemd has read.
            assert not [
                unit
                for unit in desk.active()
                if desk.machine.property(unit, "NeedDaemonReload") != "no"
            ]
    assert set(desk.routes().values()) == {"@default"}
    # Once more is no more.
    source.write_text(lines[-1])
    assert "already" in desk.try_("add", "--from", str(source)).stderr


def test_a_line_that_is_there_twice_is_one_route(desk: Desk) -> None:
    source = desk.machine.home / "routes"
    source.write_text(f"tcp {desk.port} work\n" * 2)
    result = desk.try_("add", "--from", str(source))
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.count("now reaches") == 1
    assert desk.routes() == {f"127.0.0.1:{desk.port}": "work"}


def test_a_new_route_of_a_unit_that_systemd_has_in_memory_listens(
    desk: Desk, told: Path
) -> None:
    unit = f"qrexec-connect-tcp@{desk.port}:work.socket"
    holder = desk.machine.write_unit(
        "holder.service",
        f"[Unit]\nWants={unit}\n[Service]\nType=oneshot\n"
        "RemainAfterExit=yes\nExecStart=/bin/true\n",
    )
    desk.machine.systemctl("daemon-reload")
    desk.machine.systemctl("start", "holder.service")
    told.write_text("")
    try:
        desk.run("add", "tcp", str(desk.port), "work")
        assert told.read_text().count(" daemon-reload\n") == 1
        assert desk.active() == {unit}
        assert desk.routes() == {f"127.0.0.1:{desk.port}": "work"}
    finally:
        desk.machine.systemctl("stop", "holder.service")
        holder.unlink()
        desk.run("remove", unit)
        desk.machine.systemctl("daemon-reload")


def test_systemd_reads_again_what_it_has_read_too_early() -> None:
    said: list[str] = []

    class Early(Systemctl):
        """Has read the unit before its file was there."""

        def run(self, *arguments: str, check: bool = True) -> str:
            said.append(arguments[0])
            if arguments[0] == "start" and "daemon-reload" not in said:
                raise ManagerError("Unit has no Listen setting")
            return "inactive\n"

    for unread in (True, False):
        said.clear()
        change = Change(start=["a.socket"], unread=unread)
        with contextlib.ExitStack() as stack:
            if not unread:
                stack.enter_context(pytest.raises(ActivateError))
            carry_out(change, Early(user=True))
        assert ("daemon-reload" in said) is unread
        if unread:
            assert said[-3:] == ["daemon-reload", "is-active", "start"]


def test_lines_of_standard_input_are_routes(desk: Desk) -> None:
    result = subprocess.run(
        desk.argv("add"),
        input=f"tcp {desk.port} work\ntcp {desk.port} 'mail'\n",
        env=desk.machine.environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert f"127.0.0.2:{desk.port} now reaches mail" in result.stdout
    assert desk.routes() == {
        f"127.0.0.1:{desk.port}": "work",
        f"127.0.0.2:{desk.port}": "mail",
    }
    assert "no route to add" in desk.fails("add", code=2)
    assert "write add KIND" in desk.fails("add", "tcp", "1234", code=2)


BAD_LINES = [
    ("tcp 1234", "Missing argument 'TARGET'"),
    ("tcp 1234 -x", "No such option"),
    ("tcp 1234 9work", "begins with a letter"),
    ("tcp 0 work", "is no port"),
    ("tcp 'x", "No closing quotation"),
    ("nope x work", "there is no nope@.socket"),
    ("tcp 1234 work --label a:b", "is no label"),
    ("tcp 1234 work --listen /etc/passwd/x", "cannot be made"),
    ("tcp PORT work --listen 127.0.0.1", "is taken by the route to gitweb"),
]


def test_a_line_that_is_wrong_is_named_and_no_route_comes(desk: Desk) -> None:
    source = desk.machine.home / "routes"
    for line, said in BAD_LINES:
        line = line.replace("PORT", str(desk.port))
        source.write_text(f"tcp {desk.port} gitweb\n\n{line}\n")
        printed = desk.fails("add", "--from", str(source))
        assert said in printed
        assert f"{source}:3: " in printed
    assert desk.files() == set()


def test_if_one_of_many_does_not_start_none_is_left(desk: Desk) -> None:
    unit = desk.labelled("work")
    override = desk.drop_in(unit, "zz", "[Unit]", "AssertPathExists=/nowhere")
    before = desk.files()
    source = desk.machine.home / "routes"
    source.write_text(
        "".join(f"tcp {desk.port} {qube}\n" for qube in ("a", "work", "b"))
    )
    result = desk.try_("add", "--from", str(source))
    assert result.returncode == 1
    assert f"status {unit}" in result.stderr
    assert desk.files() == before
    assert desk.active() == set()
    assert desk.failed() == ""
    override.unlink()


# ------------------------------------------------ an address that somebody else has


def test_who_has_the_address_of_a_route_is_said(desk: Desk) -> None:
    desk.run("add", "tcp", str(desk.port), "gitweb")
    desk.run("stop", "gitweb")
    comm = Path("/proc/self/comm").read_text().strip()
    with socket.create_server(("127.0.0.1", desk.port)):
        for words in (("start", "gitweb"), ("enable", "--now", "gitweb")):
            said = desk.fails(*words, code=1)
            assert (
                f"127.0.0.1:{desk.port} is taken by {comm} (pid {os.getpid()})"
                f" of the user {ME}; before, it was closed" in said
            )
    desk.run("start", "gitweb")
    assert listens(("127.0.0.1", desk.port))


class Refusing(Systemctl):
    """A systemd that starts nothing."""

    def run(self, *arguments: str, check: bool = True) -> str:
        if arguments[0] == "is-active":
            return "failed\n" * (len(arguments) - 1)
        if check and arguments[0] in ("start", "restart"):
            raise ManagerError("it does not start")
        return ""


def test_what_an_address_reached_before_is_said() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        change = Change(
            restart=["x.socket"],
            wanted={"x.socket": [address]},
            before={address: "gitweb"},
        )
        with pytest.raises(ActivateError) as caught:
            carry_out(change, Refusing(user=True))
    assert f"{address} is taken by" in str(caught.value)
    assert f"of the user {ME}; before, it reached gitweb" in str(caught.value)
    # Nobody has it any more, and still it does not start.
    with pytest.raises(ActivateError, match=r"it does not start .*says more"):
        carry_out(change, Refusing(user=True))


# ------------------------------------------------------- while others look on

#: Takes a port that is free for an instant, in a loop, until its input ends.
THIEF = """
import os, select, socket, sys
if os.geteuid() == 0:
    os.setuid(65534)
host, port = sys.argv[1], int(sys.argv[2])
print("ready", flush=True)
while not select.select([sys.stdin], [], [], 0)[0]:
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind((host, port))
            sock.listen()
        except OSError:
            continue
        print("got it", flush=True)
"""


@contextlib.contextmanager
def thief(address: tuple[str, int]) -> Iterator[None]:
    """Another user, where this one may become another, who wants a port; it is
    an error if they ever get it."""
    with subprocess.Popen(
        [sys.executable, "-c", THIEF, address[0], str(address[1])],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
        try:
            yield
        finally:
            said, _ = process.communicate("\n", timeout=PATIENCE)
        assert said == ""


@pytest.mark.slow
async def test_no_port_and_no_waiting_connection_is_lost_to_changes(
    scene: Scene,
) -> None:
    """A unit written by hand, two routes in it, and a place for one connection:
    all others wait in the kernel while 100 routes come, change and go, and
    another user tries to get the ports."""
    desk = Desk(scene.machine)
    scene.options(MAX_CONNECTIONS="1", MAX_TOTAL="1000")
    first = await scene.route(echo)
    second = scene.address()
    scene.drop_in("other", second)
    await scene.systemctl("daemon-reload")
    await scene.systemctl("restart", scene.unit)
    source = scene.machine.home / "routes"
    ports = range(desk.port, desk.port + 100)
    source.write_text("".join(f"tcp {port} vault\n" for port in ports))

    async def run(*words: str) -> str:
        return await trio.to_thread.run_sync(lambda: desk.run(*words))

    async with AsyncExitStack() as stack:
        running = await stack.enter_async_context(await connect(first))
        assert await echoes(running)
        waiting = [
            await stack.enter_async_context(await connect(first))
            for _ in range(30)
        ]
        for stream in waiting:
            await stream.send_all(b"ping")
        with thief(first):
            await run("add", "--from", str(source))
            await run("remove", "other")
            assert refuses(second)
            await run("retarget", "vault", "mail", "--all")
            await run("add", "tcp", str(first[1]), "third")
            await run("remove", "third")
            await run("remove", "mail", "--all")
        assert await echoes(running)
        await running.aclose()
        for stream in waiting:
            with trio.fail_after(120):
                assert await stream.receive_some() == b"ping"
            await stream.aclose()
    desk.leave()


async def test_a_route_reaches_its_qube_before_any_daemon_reload(
    scene: Scene,
) -> None:
    """Also where systemd holds all units for changed once one was enabled
    (255 and later)."""
    desk = Desk(scene.machine)
    await scene.qube("vault")
    host, port = scene.address()
    listen = f"{host}:{port}"
    await trio.to_thread.run_sync(
        lambda: desk.run(
            "add", "tcp", str(scene.port), "vault", "--listen", listen
        )
    )
    assert await ask((host, port)) == "vault"
    desk.leave()


async def test_a_retargeted_port_stays_open_and_reaches_the_new_qube(
    scene: Scene,
) -> None:
    desk = Desk(scene.machine)
    first = await scene.route(echo)
    await scene.qube("vault")
    async with await connect(first) as running:
        assert await echoes(running)
        with thief(first):
            await trio.to_thread.run_sync(
                lambda: desk.run("retarget", "work", "vault")
            )
        assert await ask(first) == "vault"
        assert await echoes(running)
    desk.leave()
