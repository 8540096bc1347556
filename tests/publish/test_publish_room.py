"""What a published program can reach, and what it cannot: it is one that tries,
under a real user manager. tests/recipes has one with a user of its own, in a
booted system."""

from __future__ import annotations

import os
import shutil
import socket
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from desk import PATIENCE, Desk, free_port

from qrexec_activate.loopback.machine import Machine

HOSTILE = Path(__file__).with_name("hostile.py")


@pytest.fixture
def desk(shared_machine: Machine) -> Iterator[Desk]:
    desk = Desk(shared_machine)
    shutil.copy(HOSTILE, desk.machine.home)
    try:
        yield desk
    finally:
        if names := [one["name"] for one in desk.json("published")]:
            desk.run("unpublish", *names)
        desk.leave()


def publish(desk: Desk, name: str, *words: str, argument: str = "") -> None:
    program = f"{sys.executable} {desk.machine.home}/hostile.py {argument}"
    desk.run("publish", name, "--exec", program, *words)


def tries(desk: Desk, name: str, *ways: str) -> list[str]:
    """What it says of each way that it is told to try."""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(PATIENCE)
        client.connect(str(desk.machine.runtime / "qubes.ConnectUnix" / name))
        with client.makefile("rw") as file:
            said = []
            for way in ways:
                file.write(f"{way}\n")
                file.flush()
                said.append(file.readline().strip())
            return said


@pytest.fixture
def ways() -> Iterator[list[str]]:
    """What listens in the qube: on a port, as Caddy and the routes to other
    qubes do, and on a name that is in no file system, as some buses do."""
    with ExitStack() as stack:
        tcp = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        abstract = stack.enter_context(socket.socket(socket.AF_UNIX))
        abstract.bind(f"\0qa-{os.getpid()}")
        abstract.listen()
        yield [
            f"tcp 127.0.0.1 {tcp.getsockname()[1]}",
            f"abstract qa-{os.getpid()}",
        ]


@pytest.mark.parametrize("idle", [(), ("--idle", "1min")])
def test_a_program_has_no_network_unless_it_is_asked_for(
    desk: Desk, ways: list[str], idle: tuple[str, ...]
) -> None:
    publish(desk, "closed", *idle)
    publish(desk, "open", "--network", *idle)
    assert tries(desk, "closed", *ways) == ["closed", "closed"]
    assert tries(desk, "open", *ways) == ["open", "open"]


def test_what_listens_on_a_port_has_it_to_itself(
    desk: Desk, ways: list[str]
) -> None:
    port = str(free_port())
    # Whoever takes the port while the program sleeps gets none of its clients;
    # and another service may have the same.
    with socket.create_server(("127.0.0.1", int(port))):
        for name in ("one", "other"):
            publish(desk, name, "--port", port, argument=port)
            assert tries(desk, name, *ways) == ["closed", "closed"]
    with socket.socket() as client:
        assert client.connect_ex(("127.0.0.1", int(port))) != 0
    assert "take it" in desk.fails(
        *("publish", "x", "--exec", "/bin/cat"),
        *("--port", port, "--network"),
        code=2,
    )


#: A manager that makes a user namespace unasked, as systemd 257 does as a
#: user's own.
UNASKED = """\
#!/bin/sh
while [ "$1" != /bin/sh ]; do shift; done
exec unshare --user --net /bin/sh -c "$(printf %s "$3" | sed 's/\\$\\$/$/g')"
"""


def test_a_port_is_found_in_a_user_namespace_that_nobody_asked_for(
    desk: Desk,
) -> None:
    pretend = desk.machine.home / "pretend"
    pretend.mkdir()
    systemd_run = pretend / "systemd-run"
    systemd_run.write_text(UNASKED)
    systemd_run.chmod(0o755)
    try:
        said = desk.run(
            *("publish", "x", "--exec", "/bin/cat", "--port", "9000"),
            "--dry-run",
            environment={"PATH": f"{pretend}:{os.environ['PATH']}"},
        )
    finally:
        shutil.rmtree(pretend)
    assert "PrivateUsers=yes" in said
    assert "nsenter" in said
    assert "JoinsNamespaceOf" not in said


def test_where_there_is_no_private_network_it_is_said(desk: Desk) -> None:
    """A systemd that cannot make one starts the program all the same; here it
    has tried, and could not."""
    pretend = desk.machine.home / "pretend"
    pretend.mkdir()
    systemd_run = pretend / "systemd-run"
    systemd_run.write_text("#!/bin/sh\nexit 1\n")
    systemd_run.chmod(0o755)
    path = {"PATH": f"{pretend}:{os.environ['PATH']}"}
    before = desk.files()
    try:
        said = desk.fails(
            "publish", "x", "--exec", "/bin/cat", code=2, environment=path
        )
        assert "cannot keep a program from the network here" in said
        assert "--network" in said
        assert desk.files() == before
        desk.run(
            *("publish", "x", "--exec", "/bin/cat", "--network"),
            *("--idle", "1min"),
            environment=path,
        )
    finally:
        shutil.rmtree(pretend)
