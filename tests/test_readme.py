"""The README's examples, word for word: its files are written, its commands
run, its policy lines are dom0's policy.

All that differs is what one machine cannot give: a server and a local address
on the same port of 127.0.0.1; and the port, as tests run side by side.
"""

from __future__ import annotations

import re
import shlex
import socket
import socketserver
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from scenario import free_port

from qrexec_activate.loopback.machine import Machine

ROOT = Path(__file__).parent.parent
PATIENCE = 60.0
HEADER = re.compile(r"# (?:\w+: )?~/\.config/systemd/user/(\S+)")
COMMANDS = (
    "systemctl",
    "qrexec-activate",
    "export",
    "ssh-add",
    "make",
    "journalctl",
)


@dataclass
class Section:
    """What one section of the README has to say to a machine."""

    files: dict[str, str] = field(default_factory=dict)
    commands: list[str] = field(default_factory=list)
    policy: list[str] = field(default_factory=list)


def readme(title: str, **replaced: object) -> Section:
    text = (ROOT / "README.md").read_text()
    for old, new in replaced.items():
        text = text.replace(old.removeprefix("_"), str(new))
    body = re.search(
        rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)",
        text,
        re.MULTILINE | re.DOTALL,
    )
    assert body, f"the README has no section {title!r}"
    section = Section()
    for block in re.findall(r"(?:^(?:    .*)?\n)+", body[1], re.MULTILINE):
        path = ""
        for line in (line.removeprefix("    ") for line in block.splitlines()):
            if header := HEADER.fullmatch(line):
                path = header[1]
                section.files[path] = ""
            elif line.startswith(COMMANDS):
                section.commands.append(line)
                path = ""
            elif path:
                section.files[path] += f"{line}\n"
            elif line:
                section.policy.append(line)
    return section


class Server(socketserver.ThreadingTCPServer):
    """A service that reads all and answers with its own name and the address
    that it was reached from."""

    allow_reuse_address = True
    daemon_threads = True
    address_family = socket.AF_INET

    def __init__(self, name: str, address: tuple[str, int] | str) -> None:
        outer = name

        class Handler(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                said = self.rfile.read().decode()
                peer = self.client_address[0] if self.client_address else ""
                self.wfile.write(f"{outer} heard {said} from {peer}".encode())

        if isinstance(address, str):
            self.address_family = socket.AF_UNIX
        super().__init__(address, Handler)  # type: ignore[arg-type]  # its stubs know addresses of IP only

    def server_bind(self) -> None:
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)


@contextmanager
def serving(name: str, address: tuple[str, int] | str) -> Iterator[None]:
    with Server(name, address) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield
        server.shutdown()
        thread.join()


def ask(address: tuple[str, int] | str) -> str:
    with socket.socket(
        socket.AF_UNIX if isinstance(address, str) else socket.AF_INET
    ) as client:
        client.settimeout(PATIENCE)
        client.connect(address)
        client.sendall(b"me")
        client.shutdown(socket.SHUT_WR)
        answer = b""
        while chunk := client.recv(4096):
            answer += chunk
    return answer.decode()


@pytest.fixture
def machine() -> Iterator[Machine]:
    with Machine() as machine:
        yield machine


def follow(
    machine: Machine,
    section: Section,
    change: Callable[[str], str] = lambda text: text,
) -> None:
    """Do what the section says, from its files to its commands, as the person
    who reads it."""
    for path, text in section.files.items():
        target = machine.unit_dir / path
        target.parent.mkdir(parents=True, exist_ok=True)
        # The units call the installed command, which on this machine is another
        # one.
        target.write_text(
            change(text).replace(
                "/usr/bin/qrexec-activate", machine.command_line()
            )
        )
    (machine.loopback / "policy").write_text(
        "".join(f"{line}\n" for line in section.policy)
    )
    (machine.loopback / "answer").write_text("allow\n")
    machine.systemctl("daemon-reload")
    for command in section.commands:
        if command.startswith("systemctl"):
            machine.run(shlex.split(command))


def test_two_qubes_one_port(machine: Machine) -> None:
    number = free_port()
    section = readme("Two qubes, one port", _1234=number)
    assert set(section.files) == {
        f"qrexec-connect-tcp@{number}.socket.d/{qube}.conf"
        for qube in ("gitweb", "work")
    }
    assert [line.split()[0] for line in section.policy] == [
        "qubes.ConnectTCP"
    ] * 2
    for qube in ("gitweb", "work"):
        machine.add_qube(qube)
    with (
        serving("gitweb", (machine.address("gitweb"), number)),
        serving("work", (machine.address("work"), number)),
    ):
        follow(machine, section)
        assert ask(("127.0.0.1", number)).startswith("gitweb heard me")
        assert ask(("127.0.0.2", number)).startswith("work heard me")


def test_a_unit_for_each_route(machine: Machine) -> None:
    hosts = [f"127.0.0.{last}" for last in (1, 2, 3)]
    number = free_port()
    units = [
        readme(title, _1234=number)
        for title in ("Two qubes, one port", "A unit for each route")
    ]
    assert set(units[1].files) == {
        f"qrexec-connect-tcp@{number}:mail.socket.d/mail.conf"
    }
    with ExitStack() as stack:
        for qube in ("gitweb", "work", "mail"):
            machine.add_qube(qube)
            stack.enter_context(serving(qube, (machine.address(qube), number)))
        for section in units:
            follow(machine, section)
        assert ask((hosts[2], number)).startswith("mail heard me")
        (line,) = (
            line
            for line in (ROOT / "README.md").read_text().splitlines()
            if "`systemctl --user stop " in line
        )
        stop = line.split("`")[1].replace("1234", str(number))
        machine.run(shlex.split(stop))
        with pytest.raises(ConnectionRefusedError):
            ask((hosts[2], number))
        (machine.loopback / "policy").write_text(
            "".join(f"{line}\n" for line in units[0].policy)
        )
        assert ask((hosts[0], number)).startswith("gitweb heard me")


def test_split_ssh(machine: Machine) -> None:
    section = readme("Split SSH")
    vault = machine.add_qube("vault")
    (machine.loopback / "name").write_text("work\n")
    # One manager plays both qubes' managers, so they share its runtime
    # directory.
    (vault / "run").rmdir()
    (vault / "run").symlink_to(machine.runtime)
    (vault / "rpc" / "qubes.ConnectUnix").symlink_to(
        ROOT / "rpc" / "qubes.ConnectUnix"
    )
    machine.write_unit(
        "gpg-agent-ssh.socket",
        "[Socket]\nListenStream=%t/gnupg/S.gpg-agent.ssh\nService=agent.service\n",
    )
    machine.write_unit(
        "agent.service", "[Service]\nExecStart=/bin/true\nRemainAfterExit=yes\n"
    )
    follow(machine, section)
    link = machine.runtime / "qubes.ConnectUnix" / "gpg-agent-ssh"
    assert link.is_symlink(), "the drop-in of the service qube made no symlink"
    # From here on an agent of the test's own answers in the place of gpg-agent.
    machine.systemctl("stop", "gpg-agent-ssh.socket")
    agent = machine.runtime / "gnupg" / "S.gpg-agent.ssh"
    agent.unlink()
    with serving("agent", str(agent)):
        (path,) = re.findall(
            r"SSH_AUTH_SOCK=(\S+)", "\n".join(section.commands)
        )
        assert ask(
            path.replace("$XDG_RUNTIME_DIR", str(machine.runtime))
        ).startswith("agent heard me")


def test_a_source_address_of_its_own(machine: Machine) -> None:
    number = free_port()
    section = readme("A source address of its own", _2049=number)
    nfs = machine.add_qube("nfs")
    (nfs / "rpc" / "qubes.ConnectTCPBind").symlink_to(
        ROOT / "rpc" / "qubes.ConnectTCPBind"
    )
    with serving("nfs", ("127.0.0.1", number)):
        follow(
            machine,
            section,
            lambda text: text.replace(
                f"127.0.0.1:{number}", f"127.0.0.9:{number}"
            ),
        )
        assert ask(("127.0.0.9", number)) == "nfs heard me from 127.0.1.1"


def test_your_own_rpc(machine: Machine) -> None:
    section = readme("Your own RPC")
    service = machine.add_qube("archive") / "rpc" / "my.Rpc"
    service.write_text(
        '#!/bin/sh\nprintf "%s in archive heard " "$1"\nexec cat\n'
    )
    service.chmod(0o755)
    follow(machine, section)
    assert ask(str(machine.runtime / "backup")) == "backup in archive heard me"


def test_the_policy_lines_are_what_lets_the_calls_through(
    machine: Machine,
) -> None:
    number = free_port()
    section = readme("Two qubes, one port", _1234=number)
    section.policy = [line for line in section.policy if "gitweb" in line]
    for qube in ("gitweb", "work"):
        machine.add_qube(qube)
    with (
        serving("gitweb", (machine.address("gitweb"), number)),
        serving("work", (machine.address("work"), number)),
    ):
        follow(machine, section)
        assert ask(("127.0.0.1", number)).startswith("gitweb heard me")
        with pytest.raises(ConnectionResetError):
            ask(("127.0.0.2", number))
    assert "refused: by the policy in dom0" in machine.daemon_log.read_text()
