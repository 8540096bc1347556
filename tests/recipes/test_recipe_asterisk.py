"""Asterisk 22 in a booted Debian sid: each of its five sockets starts it, and is
reached from `work`."""

from __future__ import annotations

import contextlib
import re
import shutil
import socket
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from booted import SERVICE_QUBE, Container
from recipe import EXAMPLES, PATIENCE, Recipe, require, until

MANAGER_LOGIN = (
    b"Action: Login\r\nUsername: work\r\nSecret: work\r\n\r\nAction:"
    b" CoreSettings\r\n\r\nAction: Logoff\r\n\r\n"
)
#: What its journal has since this was asked last.
NEW_WARNINGS = (
    "journalctl --sync && journalctl --identifier=asterisk --priority=warning"
    " --cursor-file=/root/read"
)


@pytest.fixture(scope="module")
def pbx(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Container]:
    with Container(
        "asterisk",
        "pbx",
        tmp_path_factory.mktemp("pbx"),
        SERVICE_QUBE,
        system="exchange",
    ) as container:
        yield container


@pytest.fixture(scope="module")
def recipe(pbx: Container) -> Iterator[Recipe]:
    with Recipe(
        "asterisk",
        substitutes={"/run/asterisk": f"/proc/{pbx.leader}/root/run/asterisk"},
    ) as recipe:
        qube = recipe["pbx"]
        qube.as_root = pbx.run
        # The container's loopback is not this machine's: its ports are reached
        # by a socket.
        (qube.rpc_config / "qubes.ConnectTCP").write_text(
            "skip-service-descriptor=true\n"
        )
        for port in (5038, 5039, 8088, 8089):
            bridge = qube.machine.directory / f"port-{port}"
            argv = ["nsenter", f"--target={pbx.leader}", "--net", "socat"]
            argv += [f"UNIX-LISTEN:{bridge},fork", f"TCP:127.0.0.1:{port}"]
            process = subprocess.Popen(argv)
            recipe.callback(process.wait)
            recipe.callback(process.terminate)
            (qube.rpc / f"qubes.ConnectTCP+{port}").symlink_to(bridge)
            until("the port is bridged", bridge.exists)
        recipe.follow("The exchange")
        # Debian started it at boot, when there was no key.
        pbx.run(NEW_WARNINGS)
        recipe.follow("Reach it")
        yield recipe


def ask(
    address: tuple[str, int] | str, question: bytes, certificate: str = ""
) -> str:
    with contextlib.ExitStack() as stack:
        client = stack.enter_context(
            socket.socket(
                socket.AF_UNIX if isinstance(address, str) else socket.AF_INET
            )
        )
        client.settimeout(PATIENCE)
        client.connect(address)
        if certificate:
            context = ssl.create_default_context(cadata=certificate)
            client = stack.enter_context(
                context.wrap_socket(client, server_hostname="127.0.0.1")
            )
        client.sendall(question)
        answer = b""
        with contextlib.suppress(ssl.SSLEOFError):
            while chunk := client.recv(1 << 16):
                answer += chunk
    return answer.decode(errors="replace")


@pytest.fixture
def certificate(pbx: Container, recipe: Recipe) -> str:
    return pbx.run("cat /etc/asterisk/keys/pbx.crt")


def state(pbx: Container) -> str:
    return pbx.run("systemctl is-active asterisk.service", check=False).strip()


@pytest.fixture
def stopped(pbx: Container, recipe: Recipe) -> None:
    if state(pbx) != "inactive":
        # One that still starts is waited for: it does not end before.
        pbx.run(
            "systemctl start asterisk.service && systemctl stop"
            " asterisk.service"
        )
    # Started and stopped so often within seconds, systemd would refuse it.
    pbx.run("systemctl reset-failed asterisk.service")
    assert state(pbx) == "inactive"


def test_its_command_line(
    pbx: Container, recipe: Recipe, stopped: None
) -> None:
    path = str(recipe["work"].machine.runtime / "qrexec" / "asterisk.ctl")
    # What `asterisk -rx` sends. Its commands come by and by while it starts.
    until(
        "it answers",
        lambda: (
            "Asterisk 22" in ask(path, b"cli quit after core show version\0")
        ),
    )
    until("it has started", lambda: state(pbx) == "active")
    mode = pbx.run(
        "stat --format='%U %G %a' /run/asterisk/asterisk.ctl"
    ).split()
    assert mode == ["asterisk", "asterisk", "660"]


def test_its_manager_interface(
    pbx: Container, recipe: Recipe, stopped: None
) -> None:
    answer = ask((recipe["work"].host, 5038), MANAGER_LOGIN)
    assert "Authentication accepted" in answer
    assert "AsteriskVersion: 22" in answer
    until("it has started", lambda: state(pbx) == "active")


def gives_its_status(
    pbx: Container, recipe: Recipe, port: int, certificate: str = ""
) -> None:
    """Its first connection starts it; its pages come by and by."""
    page = b"GET /httpstatus HTTP/1.0\r\nConnection: close\r\n\r\n"
    address = (recipe["work"].host, port)
    assert ask(address, page, certificate).startswith("HTTP/1.1 ")
    until(
        "it gives the page",
        lambda: "Asterisk HTTP Status" in ask(address, page, certificate),
    )
    until("it has started", lambda: state(pbx) == "active")


def test_its_web_server(pbx: Container, recipe: Recipe, stopped: None) -> None:
    gives_its_status(pbx, recipe, 8088)


def test_its_manager_interface_by_tls(
    pbx: Container, recipe: Recipe, stopped: None, certificate: str
) -> None:
    answer = ask((recipe["work"].host, 5039), MANAGER_LOGIN, certificate)
    assert "Authentication accepted" in answer
    until("it has started", lambda: state(pbx) == "active")


def test_its_web_server_by_tls(
    pbx: Container, recipe: Recipe, stopped: None, certificate: str
) -> None:
    gives_its_status(pbx, recipe, 8089, certificate)


def test_what_the_user_of_its_qube_may(pbx: Container, recipe: Recipe) -> None:
    assert "asterisk" in pbx.run("id --name --groups user").split()
    assert (
        pbx.run("stat --format='%U %a' /etc/asterisk/keys/pbx.key")
        == "asterisk 600\n"
    )


def test_stopping_does_not_start_it_again(
    pbx: Container, stopped: None
) -> None:
    pbx.run(
        "systemctl start asterisk.service && systemctl stop asterisk.service"
        " && sleep 1"
    )
    assert state(pbx) == "inactive"
    assert (
        pbx.run("systemctl show --value -p ExecStop asterisk.service").strip()
        == ""
    )


def test_a_socket_that_it_does_not_use_is_reported(
    pbx: Container, stopped: None
) -> None:
    # All were used up to now.
    assert "does not use it" not in pbx.run(NEW_WARNINGS)
    pbx.run(
        "sed -i 's/^enabled = yes/enabled = no/' /etc/asterisk/http.conf &&"
        " systemctl start asterisk.service"
    )
    said = pbx.run(NEW_WARNINGS)
    assert (
        "asterisk.socket: Asterisk was given 127.0.0.1:8088 and does not use it"
        in said
    )
    assert "127.0.0.1:5038" not in said


def test_its_units_are_well_formed(tmp_path: Path) -> None:
    """Also where no container boots, as far as this machine's systemd can
    tell."""
    require("asterisk", "systemd-analyze")
    units = EXAMPLES / "asterisk" / "pbx" / "etc" / "systemd" / "system"
    shutil.copytree(units, tmp_path, dirs_exist_ok=True)
    (tmp_path / "asterisk.service").write_text(
        "[Service]\nType=notify\nExecStart=/bin/true\n"
    )
    (tmp_path / "asterisk.service.d" / "here.conf").write_text(
        "[Service]\nExecStartPost=\n"
    )
    argv = ["systemd-analyze", "verify", "--man=no", "asterisk.socket"]
    result = subprocess.run(
        argv, capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert [
        line for line in result.stderr.splitlines() if "asterisk" in line
    ] == []


def test_asterisk_overlooks_none_of_its_sockets() -> None:
    """One of TCP that is the first of all it does not see, nor one under
    another name than that of its configuration."""
    folder = EXAMPLES / "asterisk" / "pbx" / "etc" / "systemd" / "system"
    assert [path.name for path in folder.glob("*.socket")] == [
        "asterisk.socket"
    ]
    first, *others = re.findall(
        r"^ListenStream=(.*)$",
        (folder / "asterisk.socket").read_text(),
        re.MULTILINE,
    )
    assert first == "/run/asterisk/asterisk.ctl"
    assert others == [f"127.0.0.1:{port}" for port in (5038, 5039, 8088, 8089)]
