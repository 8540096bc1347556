"""A whole Tor network on one machine, for a client to build real circuits in:
one authority and three relays."""

from __future__ import annotations

import re
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from recipe import PATIENCE, free_host, until

AUTHORITY_PORT = 7000
RELAY = """\
ORPort {host}:{port}
SocksPort 0
ExitRelay 1
ExitPolicyRejectPrivate 0
ExitPolicy accept *:*
"""
#: Votes in seconds instead of hours, and every relay is good for everything.
AUTHORITY = f"""\
DirPort {{host}}:{AUTHORITY_PORT}
AuthoritativeDirectory 1
V3AuthoritativeDirectory 1
ContactInfo nobody@localhost
TestingV3AuthInitialVotingInterval 5
TestingV3AuthInitialVoteDelay 2
TestingV3AuthInitialDistDelay 2
V3AuthVotingInterval 10
V3AuthVoteDelay 2
V3AuthDistDelay 2
V3AuthNIntervalsValid 2
TestingAuthDirTimeToLearnReachability 0
TestingDirAuthVoteExit *
TestingDirAuthVoteGuard *
TestingMinExitFlagThreshold 0
"""


class TorNetwork:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.host = free_host()
        self.authority = ""
        self.processes: list[subprocess.Popen[bytes]] = []

    def common(self, name: str) -> str:
        """What every member of the network needs, also a client."""
        place = self.folder / name
        place.mkdir(mode=0o700, exist_ok=True)
        return (
            f"TestingTorNetwork 1\nDataDirectory {place}\nLog notice file"
            f" {place}/log\nRunAsDaemon 0\n"
            f"Address {self.host}\nAddressDisableIPv6 1\nAssumeReachable"
            f" 1\nShutdownWaitLength 0\n"
            f"PathsNeededToBuildCircuits 0.25\nClientRejectInternalAddresses"
            f" 0\n{self.authority}"
        )

    def start(self, name: str, torrc: str) -> None:
        file = self.folder / f"{name}.torrc"
        file.write_text(torrc)
        empty = self.folder / "empty"
        empty.touch()
        self.processes.append(
            subprocess.Popen(
                ["tor", "--quiet", "-f", file, "--defaults-torrc", empty]
            )
        )

    def control(self, name: str, *commands: str) -> str:
        """What a Tor says on its control socket."""
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(PATIENCE)
            client.connect(str(self.folder / name / "control"))
            client.sendall(
                "".join(
                    f"{line}\r\n"
                    for line in ("AUTHENTICATE", *commands, "QUIT")
                ).encode()
            )
            said = b""
            while chunk := client.recv(1 << 16):
                said += chunk
        return said.decode()

    def is_ready(self, name: str) -> bool:
        try:
            return "PROGRESS=100" in self.control(
                name, "GETINFO status/bootstrap-phase"
            )
        except OSError:
            return False

    def start_relays(self) -> None:
        names = ["authority", "relay1", "relay2", "relay3"]
        for name in names:
            self.common(name)
        keys = self.folder / "authority" / "keys"
        keys.mkdir(mode=0o700)
        subprocess.run(
            [
                "tor-gencert",
                "--create-identity-key",
                "--passphrase-fd",
                "0",
                "-a",
                f"{self.host}:{AUTHORITY_PORT}",
            ],
            input=b"secret\n",
            cwd=keys,
            check=True,
            capture_output=True,
        )
        certificate = (keys / "authority_certificate").read_text()
        identity = re.search(r"^fingerprint (\w+)", certificate, re.MULTILINE)
        assert identity
        self.authority = (
            f"DirAuthority authority orport=5000 no-v2 v3ident={identity[1]}"
            f" {self.host}:{AUTHORITY_PORT} "
            f"{self.fingerprint('authority')}\n"
        )
        for port, name in enumerate(names, 5000):
            more = (
                AUTHORITY.format(host=self.host) if name == "authority" else ""
            )
            self.start(
                name,
                self.common(name)
                + f"Nickname {name}\n"
                + RELAY.format(host=self.host, port=port)
                + more,
            )

    def fingerprint(self, name: str) -> str:
        (self.folder / "empty").touch()
        argv = [
            "tor",
            "-f",
            "empty",
            "--defaults-torrc",
            "empty",
            "--list-fingerprint",
            "--orport",
            "1",
        ]
        argv += ["--datadirectory", str(self.folder / name), "--nickname", name]
        said = subprocess.run(
            argv, cwd=self.folder, capture_output=True, text=True, check=True
        ).stdout
        return (
            said.strip()
            .splitlines()[-1]
            .removeprefix(f"{name} ")
            .replace(" ", "")
        )


@contextmanager
def tor_network(folder: Path) -> Iterator[TorNetwork]:
    network = TorNetwork(folder)
    try:
        network.start_relays()
        yield network
    finally:
        # Told to end, one of them once had not done so after two minutes; what
        # they write is gone with the folder.
        for process in network.processes:
            process.kill()
        for process in network.processes:
            process.wait()


def wait_ready(network: TorNetwork, name: str) -> None:
    until(f"{name} has built circuits", lambda: network.is_ready(name))
