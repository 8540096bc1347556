"""check, publish and published: what is right, what is wrong, and the command
that mends it."""

from __future__ import annotations

import json
import re
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from desk import Desk

from qrexec_activate.loopback.machine import Machine


@pytest.fixture
def desk(shared_machine: Machine) -> Iterator[Desk]:
    desk = Desk(shared_machine)
    yield desk
    desk.leave()


def wrong(desk: Desk, *, code: int) -> list[dict[str, Any]]:
    """The steps of check that are not as they should be."""
    found = desk.json("check", code=code)
    assert found["level"] == ("ok", "warning", "error")[code]
    return [step for step in found["steps"] if step["level"] != "ok"]


def the_same_everywhere(text: str) -> str:
    """What check says of this machine's own services is not for a golden
    file."""
    lines = text.splitlines(keepends=True)
    return "".join(line for line in lines if not re.search(r"services:", line))


# ---------------------------------------------------------------------- check


def test_where_all_is_well_check_says_so(desk: Desk) -> None:
    desk.run("add", "tcp", str(desk.port), "gitweb")
    desk.run("add", "unix", "notes", "vault")
    printed = desk.run("check")
    desk.is_golden("check-well.txt", printed, the_same_everywhere)
    assert desk.run("check", "--quiet") == "All is well\n"


def test_what_is_wrong_comes_with_the_command_that_mends_it(desk: Desk) -> None:
    port = desk.port
    desk.drop_in(
        desk.tcp,
        "gitweb",
        "[Socket]",
        f"ListenStream=127.0.0.1:{port}",
        "FileDescriptorName=gitweb",
    )
    desk.drop_in(
        desk.tcp,
        "wide",
        "[Socket]",
        f"ListenStream={port + 1}",
        "FileDescriptorName=gitweb",
    )
    desk.drop_in(
        desk.tcp,
        "slip",
        "[Socket]",
        f"ListenStream=127.0.0.2:{port}",
        "FileDescriptorName=gitwbe",
    )
    desk.drop_in(
        desk.tcp, "noname", "[Socket]", f"ListenStream=127.0.0.3:{port}"
    )
    desk.drop_in(desk.tcp, "typo", "[Socket]", f"ListenStreem=127.0.0.4:{port}")
    desk.drop_in(
        "qrexec-connect-unix@open.socket",
        "work",
        "[Socket]",
        f"ListenStream=@open-{port}",
        "FileDescriptorName=work",
    )
    desk.drop_in(
        "qrexec-connect-unix@idle.socket",
        "work",
        "[Socket]",
        "ListenStream=%t/idle",
        "FileDescriptorName=work",
    )
    desk.start(desk.tcp, "qrexec-connect-unix@open.socket")
    printed = desk.try_("check")
    assert printed.returncode == 2
    plain = printed.stdout.replace(str(port + 1), "12346")
    desk.is_golden("check-wrong.txt", plain, the_same_everywhere)
    found = desk.json("check", code=2)
    found["steps"] = [
        step for step in found["steps"] if step["area"] != "services"
    ]
    desk.is_golden(
        "check-wrong.json",
        json.dumps(found, indent=2).replace(str(port + 1), "12346"),
    )


def test_a_port_that_somebody_else_has_is_named_with_its_owner(
    desk: Desk,
) -> None:
    desk.drop_in(
        desk.tcp,
        "work",
        "[Socket]",
        f"ListenStream=127.0.0.1:{desk.port}",
        "FileDescriptorName=work",
    )
    with socket.create_server(("127.0.0.1", desk.port)):
        desk.start(desk.tcp, check=False)
        (step,) = wrong(desk, code=2)
    assert f"127.0.0.1:{desk.port} is taken by" in step["text"]
    assert "(pid " in step["text"]
    assert step["mend"] is None
    assert f"systemctl --user start {desk.tcp}" in step["advice"]


def test_files_that_systemd_has_not_read_need_a_reload(desk: Desk) -> None:
    desk.run("add", "tcp", str(desk.port), "gitweb")
    desk.drop_in(
        desk.gitweb,
        "work",
        "[Socket]",
        f"ListenStream=127.0.0.2:{desk.port}",
        "FileDescriptorName=work",
    )
    steps = wrong(desk, code=2)
    for step in steps:
        assert "systemctl --user daemon-reload" in step["mend"]
    # What check says is enough to mend it.
    desk.machine.run(["/bin/sh", "-c", steps[0]["mend"]])
    assert wrong(desk, code=0) == []
    assert set(desk.routes()) == {
        f"127.0.0.1:{desk.port}",
        f"127.0.0.2:{desk.port}",
    }


def test_a_listener_that_comes_only_with_a_restart_is_found(desk: Desk) -> None:
    desk.run("add", "tcp", str(desk.port), "gitweb")
    desk.drop_in(
        desk.gitweb,
        "work",
        "[Socket]",
        f"ListenStream=127.0.0.2:{desk.port}",
        "FileDescriptorName=work",
    )
    desk.machine.systemctl("daemon-reload")
    (step,) = wrong(desk, code=2)
    assert step["mend"] == f"systemctl --user restart {desk.gitweb}"


def test_a_file_of_all_instances_is_named_once(desk: Desk) -> None:
    desk.drop_in(
        "qrexec-connect-tcp@.socket",
        "all",
        "[Socket]",
        f"ListenStream=127.0.0.1:{desk.port}",
        "FileDescriptorName=work",
    )
    units = [f"qrexec-connect-tcp@{number}.socket" for number in (1, 2, 3)]
    desk.machine.systemctl("daemon-reload")
    desk.machine.systemctl("enable", *units)
    texts = [step["text"] for step in wrong(desk, code=2)]
    assert len([one for one in texts if "exclude each other" in one]) == 1


def test_two_files_that_claim_one_address_are_both_named(desk: Desk) -> None:
    for name in ("one", "two"):
        desk.drop_in(
            desk.tcp,
            name,
            "[Socket]",
            f"ListenStream=127.0.0.1:{desk.port}",
            f"FileDescriptorName={name}",
        )
    desk.drop_in(
        "qrexec-connect-tcp@1.socket",
        "three",
        "[Socket]",
        f"ListenStream={desk.port}",
        "FileDescriptorName=x",
    )
    desk.machine.systemctl("daemon-reload")
    steps = {step["text"]: step["mend"] for step in wrong(desk, code=2)}
    (text,) = [
        text for text in steps if "one.conf" in text and "two.conf" in text
    ]
    assert steps[text].startswith("qrexec-activate edit /")
    assert "/two.conf " in steps[text]
    (text,) = [text for text in steps if "exclude each other" in text]
    assert "three.conf" in text


def test_a_file_that_takes_the_addresses_of_others_is_pointed_out(
    desk: Desk,
) -> None:
    desk.drop_in(
        desk.tcp,
        "gitweb",
        "[Socket]",
        f"ListenStream=127.0.0.1:{desk.port}",
        "FileDescriptorName=gitweb",
    )
    desk.drop_in(
        desk.tcp,
        "work",
        "[Socket]",
        f"ListenStreem=127.0.0.2:{desk.port}",
        "FileDescriptorName=work",
    )
    desk.start(desk.tcp)
    assert desk.routes() == {f"127.0.0.1:{desk.port}": "work"}
    texts = [step["text"] for step in wrong(desk, code=1)]
    assert any(
        f"so 127.0.0.1:{desk.port} reaches work and not gitweb" in text
        for text in texts
    )


def test_a_unix_socket_that_others_can_reach_is_pointed_out(desk: Desk) -> None:
    desk.drop_in(
        "qrexec-connect-unix@open.socket",
        "work",
        "[Socket]",
        f"ListenStream=/tmp/qa-open-{desk.port}/socket",
        "SocketMode=0666",
        "DirectoryMode=0755",
        "FileDescriptorName=work",
    )
    try:
        desk.start("qrexec-connect-unix@open.socket")
        (step,) = wrong(desk, code=1)
        assert (
            "so every user of this machine can reach it: set SocketMode=0600"
            in step["text"]
        )
    finally:
        desk.machine.systemctl("stop", "qrexec-connect-unix@open.socket")
        shutil.rmtree(f"/tmp/qa-open-{desk.port}")


def test_an_old_copy_of_a_unit_is_pointed_out(desk: Desk) -> None:
    text = (
        desk.machine.directory / "units" / "qrexec-connect-tcp.service"
    ).read_text()
    desk.machine.write_unit(
        "qrexec-connect-tcp.service",
        text.replace("KillMode=process", "KillMode=control-group"),
    )
    desk.machine.systemctl("daemon-reload")
    desk.run("add", "tcp", str(desk.port), "gitweb")
    texts = [step["text"] for step in wrong(desk, code=1)]
    assert any("qrexec-connect-tcp.service hides" in text for text in texts)
    assert any("KillMode=control-group" in text for text in texts)


def test_without_qubes_and_without_systemd_check_is_of_use(desk: Desk) -> None:
    nowhere = {
        "XDG_RUNTIME_DIR": "/nowhere",
        "DBUS_SESSION_BUS_ADDRESS": "unix:path=/nowhere/bus",
    }
    result = desk.try_("check", environment=nowhere)
    assert result.returncode == 2
    assert "error   systemd: cannot reach systemd" in result.stdout


def test_a_client_that_is_not_there_is_an_error(desk: Desk) -> None:
    desk.run("add", "tcp", str(desk.port), "gitweb")
    desk.scene.options(CLIENT="/nowhere/qrexec-client-vm")
    desk.machine.systemctl("daemon-reload")
    texts = [step["text"] for step in wrong(desk, code=2)]
    assert any(
        text.startswith("/nowhere/qrexec-client-vm is not there")
        for text in texts
    )


@pytest.mark.parametrize(
    ("version", "takes"),
    [
        ("4.2.18", "takes no sockets, so bytes go through pipes"),
        # Its --help does not say so; that of 4.3.0 does.
        ("4.2.19", "takes sockets (--use-stdin-socket)"),
        ("4.3.0", "takes sockets (--use-stdin-socket)"),
    ],
)
def test_what_the_client_takes_is_told(
    desk: Desk, version: str, takes: str
) -> None:
    desk.run("add", "tcp", str(desk.port), "gitweb")
    known = desk.machine.loopback / "version"
    known.write_text(f"{version}\n")
    try:
        assert f"qrexec-client-vm {takes}\n" in desk.run("check")
    finally:
        known.unlink()


def test_of_a_client_that_does_not_say_so_nothing_is_claimed(
    desk: Desk,
) -> None:
    desk.run("add", "tcp", str(desk.port), "gitweb")
    desk.scene.options(CLIENT="/bin/false")
    desk.machine.systemctl("daemon-reload")
    assert "does not say whether it takes sockets" in desk.run("check")


# ---------------------------------------------------------------------- publish


def agent(desk: Desk) -> Path:
    """A socket unit as that of an agent, which listens."""
    desk.machine.write_unit(
        "my-agent.socket", "[Socket]\nListenStream=%t/agent\nSocketMode=0600\n"
    )
    desk.machine.write_unit(
        "my-agent.service", "[Service]\nExecStart=/bin/cat\n"
    )
    desk.machine.systemctl("daemon-reload")
    desk.machine.systemctl("start", "my-agent.socket")
    return desk.machine.runtime / "agent"


def test_publishing_the_socket_of_a_unit_needs_no_restart_and_lasts(
    desk: Desk,
) -> None:
    socket_path = agent(desk)
    before = desk.machine.property(
        "my-agent.socket", "ActiveEnterTimestampMonotonic"
    )
    printed = desk.run("publish", "agent", "--unit", "my-agent.socket")
    desk.is_golden("publish.txt", printed)
    assert (
        desk.machine.property(
            "my-agent.socket", "ActiveEnterTimestampMonotonic"
        )
        == before
    )
    link = desk.machine.runtime / "qubes.ConnectUnix" / "agent"
    assert link.resolve() == socket_path
    text = (
        desk.machine.unit_dir / "my-agent.socket.d" / "qrexec-agent.conf"
    ).read_text()
    assert text == "[Socket]\nSymlinks=%t/qubes.ConnectUnix/agent\n"
    # systemd makes the same link by itself.
    desk.machine.systemctl("stop", "my-agent.socket")
    link.unlink()
    desk.machine.systemctl("start", "my-agent.socket")
    assert link.resolve() == socket_path
    desk.run("publish", "agent", "--unit", "my-agent.socket")
    # Whether there is a journal differs from machine to machine.
    desk.is_golden(
        "published.txt",
        desk.run("published"),
        lambda text: re.sub(r" 0$", " -", text, flags=re.MULTILINE),
    )
    desk.is_golden(
        "published.json",
        desk.run("published", "--json"),
        lambda text: re.sub(r'("calls\w*"): 0', r"\1: null", text),
    )


def test_a_name_can_be_taken_back(desk: Desk) -> None:
    agent(desk)
    desk.run("publish", "agent", "--unit", "my-agent")
    desk.run("publish", "other", "--unit", "my-agent.socket")
    desk.run("unpublish", "agent")
    assert [one["name"] for one in desk.json("published")] == ["other"]
    assert "my-agent.socket.d/qrexec-agent.conf" not in desk.files()
    assert desk.run("unpublish", "other", "other").count("other is not") == 1
    assert desk.json("published") == []
    assert not any("conf" in name for name in desk.files())
    assert "my-agent.socket" in desk.active()
    assert "is not published" in desk.fails("unpublish", "agent", code=2)


def test_a_line_among_others_is_taken_out_by_itself(desk: Desk) -> None:
    agent(desk)
    path = desk.drop_in(
        "my-agent.socket",
        "mine",
        "# mine",
        "[Socket]",
        "Symlinks=%t/qubes.ConnectUnix/agent",
        "Backlog=5",
    )
    desk.machine.systemctl("daemon-reload")
    desk.machine.systemctl("restart", "my-agent.socket")
    (one,) = desk.json("published")
    assert (one["alive"], one["file"]) == (True, str(path))
    desk.run("unpublish", "agent")
    assert path.read_text() == "# mine\n[Socket]\nBacklog=5\n"


def test_a_path_is_published_until_the_session_ends(desk: Desk) -> None:
    path = str(desk.machine.runtime / "program")
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(path)
        sock.listen()
        assert "alive" in desk.run("publish", "program", "--unix", path)
        (one,) = desk.json("published")
        assert (one["socket"], one["unit"], one["alive"]) == (path, None, True)
    (one,) = desk.json("published")
    assert (one["alive"], one["problem"]) == (
        False,
        f"nobody listens on {path}; start the program that should",
    )
    (step,) = [
        step
        for step in desk.json("check", code=2)["steps"]
        if "program cannot be called" in step["text"]
    ]
    assert step["mend"] == "qrexec-activate unpublish program"
    Path(path).unlink()
    assert "is not there" in desk.run("published")
    desk.run("unpublish", "program")


IMPOSSIBLE = [
    (("publish", "x"), "either --unit"),
    (("publish", ".x", "--unix", "/x"), "may not begin with a dot"),
    (("publish", "x" * 106, "--unix", "/x"), "too long"),
    (("publish", "x", "--unix", "relative"), "is no path"),
    (
        ("publish", "x", "--unit", "my-nothing.socket"),
        "systemd has no my-nothing.socket",
    ),
    (("publish", "x", "--unit", "a b.socket"), "is no unit name"),
]


def test_what_cannot_be_published_is_refused(desk: Desk) -> None:
    for words, said in IMPOSSIBLE:
        assert said in desk.fails(*words, code=2), words
    assert desk.files() == set()


def test_a_name_that_is_published_again_leads_elsewhere(desk: Desk) -> None:
    agent(desk)
    socket_path = str(desk.machine.runtime / "agent")
    bus = str(desk.machine.runtime / "bus")
    other = str(desk.machine.runtime / "other")
    desk.machine.write_unit(
        "my-other.socket", "[Socket]\nListenStream=%t/other\n"
    )
    desk.machine.write_unit("my-other.service", "[Service]\nExecStart=/bin/cat")
    desk.machine.systemctl("daemon-reload")

    def leads(target: str, unit: str | None, *words: str) -> str:
        said = desk.run("publish", "agent", *words)
        (one,) = desk.json("published")
        assert (one["socket"], one["unit"]) == (target, unit)
        drop_ins = [name for name in desk.files() if "qrexec-agent" in name]
        assert drop_ins == ([f"{unit}.d/qrexec-agent.conf"] if unit else [])
        return said

    leads(bus, None, "--unix", bus)
    assert f"agent led to {bus} before" in leads(
        socket_path, "my-agent.socket", "--unit", "my-agent.socket"
    )
    started = desk.machine.property(
        "my-agent.socket", "ActiveEnterTimestampMonotonic"
    )
    assert "led to" not in leads(
        socket_path, "my-agent.socket", "--unit", "my-agent"
    )
    said = leads(bus, None, "--unix", bus)
    assert "Removed: " in said
    assert f"agent led to {socket_path} before" in said
    leads(socket_path, "my-agent.socket", "--unit", "my-agent.socket")
    # It does not listen yet, and nobody else is reached until then.
    desk.run("publish", "agent", "--unit", "my-other.socket")
    assert desk.json("published")[0]["socket"] is None
    desk.machine.systemctl("start", "my-other.socket")
    leads(other, "my-other.socket", "--unit", "my-other.socket")
    # Nothing of the old one is restarted.
    assert started == desk.machine.property(
        "my-agent.socket", "ActiveEnterTimestampMonotonic"
    )
    desk.run("unpublish", "agent")
    assert desk.json("published") == []


def test_what_is_no_link_is_not_bent(desk: Desk) -> None:
    bus = str(desk.machine.runtime / "bus")
    (desk.machine.runtime / "qubes.ConnectUnix").mkdir(exist_ok=True)
    (desk.machine.runtime / "qubes.ConnectUnix" / "file").touch()
    assert "no symbolic link" in desk.fails(
        "publish", "file", "--unix", bus, code=2
    )
