"""A port that is open to the network: by sys-net and its firewall, to one qube;
and closed again."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from recipe import Recipe, listens, require, until

NEEDS_ROOT = "it sets up a firewall, in a network of its own"
#: Of Qubes' own rules those that count: what is not answered for is dropped.
FIREWALL = """\
table ip qubes {
    chain custom-input {
    }
    chain input {
        type filter hook input priority filter; policy drop;
        jump custom-input
        ct state established,related accept
    }
}
"""
#: Whether a connection to the port gets through.
PROBE = """\
import socket
with socket.create_server(("127.0.0.1", 8080)):
    try:
        socket.create_connection(("127.0.0.1", 8080), 2).close()
        print("open")
    except TimeoutError:
        print("shut")
"""


class Network:
    """The network of sys-net, with its firewall."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            ["unshare", "--net", "sh", "-c", "echo made; exec cat"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self.process.stdout
        assert self.process.stdout.readline() == b"made\n"
        self.run("ip link set lo up")
        self.run("nft -f -", FIREWALL)

    def run(self, command: str, input: str = "") -> str:
        return subprocess.run(
            [
                "nsenter",
                f"--target={self.process.pid}",
                "--net",
                "sh",
                "-c",
                command,
            ],
            input=input,
            capture_output=True,
            text=True,
            check=True,
        ).stdout

    def probe(self) -> str:
        return self.run("/usr/bin/python3 -", PROBE).strip()

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def network() -> Iterator[Network]:
    require("open-port", "nft", "curl", "ip", root=NEEDS_ROOT)
    with contextlib.closing(Network()) as network:
        yield network


def test_it_is_open_and_closed_again(network: Network, tmp_path: Path) -> None:
    with Recipe(
        "open-port", substitutes={"/rw/config": str(tmp_path)}
    ) as recipe:
        web, outside = recipe["web"], recipe["sys-net"]
        # Of the whole network sys-net has but the one address here.
        units = outside.machine.unit_dir
        route = units / "qrexec-connect-tcp@8080.socket.d" / "web.conf"
        assert "ListenStream=0.0.0.0:8080\n" in route.read_text()
        route.write_text(route.read_text().replace("0.0.0.0", outside.host))
        outside.as_root = lambda line: network.run(outside.local(line))
        recipe.follow("The server")
        until("the server listens", lambda: listens((web.host, 8080)))
        assert network.probe() == "shut"
        recipe.follow("Open it")
        assert network.probe() == "open"
        get = f"curl --silent --show-error http://{outside.host}:8080/"
        assert "For everyone" in web.run(get)
        # No other way leads there, and none from there.
        calls = (outside.machine.loopback / "policy").read_text().splitlines()
        assert calls == ["qubes.ConnectTCP +8080 sys-net web allow"]
        assert "MAX_CONNECTIONS=32" in outside.run(
            "systemctl --user show -p Environment qrexec-connect-tcp.service"
        )
        recipe.follow("Close it")
        assert network.probe() == "shut"
        assert (tmp_path / "qubes-firewall-user-script").read_text() == ""
        assert not listens((outside.host, 8080))
