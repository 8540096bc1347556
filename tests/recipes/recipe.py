"""Follow a recipe of examples/ as a person does: copy its files, type its
commands, put its policy into dom0.

Each qube of a recipe is a machine of its own, with a real user manager; the
loopback joins them: what one of them calls by qrexec, runs in the runtime
folder of the other. One machine cannot give everything, so files and commands
differ from what is written in this alone: a qube's 127.0.0.1 is the loopback
address that stands for it.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import ClassVar

import pytest

from qrexec_activate.loopback.machine import Machine, MachineError

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
PATIENCE = 120.0
PROMPT = re.compile(r" {4}([a-z][a-z0-9-]*)([$#]) (.*)")
#: Prompt and command, such as `work$` and `ls`.
Line = tuple[str, str]
VENDOR_UNITS = Path("/usr/lib/systemd/user")

_taken: set[str] = set()


def require(recipe: str, *programs: str, root: str = "") -> None:
    """Skip, by the recipe's name, where its software is not installed, or where
    it needs root and has not."""
    if root and os.geteuid() != 0:
        pytest.skip(f"recipe {recipe}: needs root: {root}")
    if missing := [program for program in programs if not which(program)]:
        pytest.skip(
            f"recipe {recipe}: not installed: {', '.join(missing)}"
            f" (tools/recipes-setup {recipe})"
        )


def which(program: str) -> str:
    """Where a program is, also one that is no command of everyone; empty if it
    is nowhere."""
    if "/" in program:
        return program if os.path.exists(program) else ""
    return (
        shutil.which(
            program,
            path="/usr/local/bin:/usr/bin:/bin:/usr/local/sbin:/usr/sbin:/sbin",
        )
        or ""
    )


def until(what: str, condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"never happened: {what}"
        time.sleep(0.02)


def free_host() -> str:
    """A loopback address that no other qube has, here or, most likely, in other
    tests that run beside these."""
    while True:
        host = f"127.{random.randint(20, 60)}.{random.randint(0, 255)}.{random.randint(1, 254)}"
        if host not in _taken:
            _taken.add(host)
            return host


def listens(address: tuple[str, int] | str) -> bool:
    with socket.socket(
        socket.AF_UNIX if isinstance(address, str) else socket.AF_INET
    ) as probe:
        return probe.connect_ex(address) == 0


class Qube:
    """One qube of a recipe: its name, its machine, and the address that stands
    for its 127.0.0.1."""

    def __init__(
        self, name: str, machine: Machine, substitutes: Mapping[str, str]
    ) -> None:
        self.name = name
        self.machine = machine
        self.host = free_host()
        self.environment = dict(machine.environment)
        self.etc = machine.directory / "etc"
        #: What runs a command of root's, without which a page must show none;
        #: and one of the user's, where that is not this machine.
        self.as_root: Callable[[str], str] | None = None
        self.as_user: Callable[[str], str] | None = None
        self.rpc = self.etc / "qubes-rpc"
        self.rpc_config = self.etc / "qubes" / "rpc-config"
        for folder in (self.rpc, self.rpc_config):
            folder.mkdir(parents=True)
        self.substitutes = {**substitutes, "127.0.0.1": self.host}

    def local(self, text: str) -> str:
        """What is written, in the way that this machine can give it."""
        for written, here in self.substitutes.items():
            text = text.replace(written, here)
        return text

    def copy(self, source: Path, target: Path) -> None:
        """Copy a folder of files to where its README says."""
        for path in sorted(source.rglob("*")):
            place = target / self.local(str(path.relative_to(source)))
            if path.is_dir():
                place.mkdir(parents=True, exist_ok=True)
            else:
                place.parent.mkdir(parents=True, exist_ok=True)
                place.write_text(self.local(path.read_text()))
                place.chmod(path.stat().st_mode & 0o777)
                if "StandardInput=socket\n" in place.read_text():
                    self.add_log(place.name)

    def add_log(self, unit: str) -> None:
        # A machine sends what all services print to its log, by a drop-in that
        # this one takes the place of.
        log = self.machine.directory / "units" / f"{unit}.d" / "log.conf"
        log.parent.mkdir()
        log.write_text(
            f"[Service]\nStandardError=append:{self.machine.daemon_log}\n"
        )

    def add_service(self, name: str) -> None:
        """Give the qube one of this project's RPC services, reaching this
        qube's own 127.0.0.1."""
        script = self.rpc / name
        script.write_text(self.local((ROOT / "rpc" / name).read_text()))
        script.chmod(0o755)
        shutil.copy(ROOT / "rpc" / "rpc-config" / name, self.rpc_config)

    def vendor_units(self, *names: str) -> None:
        """Units that a Debian package ships, which a private machine has not by
        itself."""
        for name in names:
            shutil.copy(VENDOR_UNITS / name, self.machine.directory / "units")

    def run(
        self,
        command: str,
        *,
        check: bool = True,
        input: str | None = None,
        timeout: float = PATIENCE,
    ) -> str:
        """Type one command into this qube's shell; what it prints on stdout.
        MachineError if it fails."""
        command = self.local(command)
        if variable := re.match(r"export (\w+)=", command):
            name = variable[1]
            self.environment[name] = self.run(
                f'{command}; printf %s "${name}"'.removeprefix("export "),
                timeout=timeout,
            )
            return ""
        result = subprocess.run(
            ["/bin/sh", "-c", command],
            env=self.environment,
            cwd=self.machine.home,
            input=input,
            stdin=subprocess.DEVNULL if input is None else None,
            capture_output=True,
            text=True,
            errors="backslashreplace",
            timeout=timeout,
            check=False,
        )
        if check and result.returncode:
            raise MachineError(
                f"{self.name}$ {command}: exit code {result.returncode}:"
                f" {result.stderr or result.stdout}"
            )
        return result.stdout

    def let_in(self, other: Qube) -> str:
        """Let another qube log in here by ssh, with a key of its own; the
        options that its ssh and sftp need for it.

        ssh and sshd go by the home of the user, who is the same in all qubes
        here: they are told where theirs is.
        """
        if os.geteuid() == 0:
            # The folder that sshd locks its unprivileged half into.
            Path("/run/sshd").mkdir(exist_ok=True)
        other.run(
            "mkdir -p ~/.ssh && ssh-keygen -q -t ed25519 -N '' -f"
            " ~/.ssh/id_ed25519"
        )
        keys = self.machine.home / ".ssh" / "authorized_keys"
        keys.parent.mkdir(exist_ok=True)
        shutil.copy(other.machine.home / ".ssh" / "id_ed25519.pub", keys)
        config = self.machine.config / "ssh-login" / "sshd_config"
        config.write_text(f"{config.read_text()}StrictModes no\n")
        other.substitutes["/home/user"] = str(self.machine.home)
        identity = other.machine.home / ".ssh" / "id_ed25519"
        return (
            f"-F none -i {identity} -o StrictHostKeyChecking=no -o"
            f" UserKnownHostsFile=/dev/null -o LogLevel=ERROR"
        )

    @property
    def log(self) -> str:
        return self.machine.daemon_log.read_text(errors="backslashreplace")


class Recipe:
    """A context manager: the machines of a recipe. Its qubes are the folders of
    the recipe, unless given.

    `typed` holds, by the recipe, the lines of pages that were typed.

    `substitutes` are further things that one machine cannot give, such as a
    port that must be free.
    """

    typed: ClassVar[dict[str, set[Line]]] = {}

    def __init__(
        self,
        name: str,
        qubes: Iterable[str] = (),
        *,
        substitutes: Mapping[str, str] | None = None,
        environment: Callable[[str], Mapping[str, str]] = lambda qube: {},
    ) -> None:
        self.folder = EXAMPLES / name
        self.names = list(qubes) or sorted(
            path.name for path in self.folder.iterdir() if path.is_dir()
        )
        self._substitutes = dict(substitutes or {})
        self._environment = environment
        self._stack = contextlib.ExitStack()
        self.qubes: dict[str, Qube] = {}

    def __getitem__(self, name: str) -> Qube:
        return self.qubes[name]

    def __enter__(self) -> Recipe:
        measured = {
            key: value
            for key, value in os.environ.items()
            if key.startswith("COVERAGE_")
        }
        with contextlib.ExitStack() as stack:
            for name in self.names:
                machine = stack.enter_context(
                    Machine(environment={**measured, **self._environment(name)})
                )
                self.qubes[name] = Qube(name, machine, self._substitutes)
            for qube in self.qubes.values():
                self._join(qube)
                for service in ("qubes.ConnectUnix", "qubes.ConnectTCPBind"):
                    qube.add_service(service)
                self._copy(qube)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *failure: object) -> None:
        self._stack.close()

    def callback(
        self, function: Callable[..., object], *arguments: object
    ) -> None:
        """Call this when the recipe ends, before its machines do."""
        self._stack.callback(function, *arguments)

    def _join(self, qube: Qube) -> None:
        """Let a qube see the others: their runtime folders, homes, services and
        addresses are the real ones."""
        machine = qube.machine
        (machine.loopback / "name").write_text(f"{qube.name}\n")
        shutil.copy(self.folder / "policy", machine.loopback / "policy")
        for other in self.qubes.values():
            if other is qube:
                continue
            place = machine.loopback / "qubes" / other.name
            place.mkdir()
            (place / "address").write_text(f"{other.host}\n")
            for name, target in {
                "run": other.machine.runtime,
                "home": other.machine.home,
                "rpc": other.rpc,
                "rpc-config": other.rpc_config,
            }.items():
                (place / name).symlink_to(target)

    def _copy(self, qube: Qube) -> None:
        """QUBE/config goes to ~/.config, and QUBE/etc to /etc, as every README
        says."""
        for part, target in (
            ("config", qube.machine.config),
            ("etc", qube.etc),
        ):
            if (self.folder / qube.name / part).is_dir():
                qube.copy(self.folder / qube.name / part, target)

    def commands(self, section: str = "") -> list[Line]:
        """What a section of the README shows; without a name, what stands
        before all of them."""
        found = sections(self.folder.name)
        assert section in found, (
            f"{self.folder.name}: its README has no section {section!r}"
        )
        return found[section]

    def follow(
        self, section: str = "", timeout: float = PATIENCE
    ) -> dict[str, str]:
        """Type what the README says, in its order; what each command
        printed."""
        said = {
            line[1]: self.type(line, timeout=timeout)
            for line in self.commands(section)
        }
        assert said, (
            f"{self.folder.name}: its README shows no commands in {section!r}"
        )
        return said

    def type(self, line: Line, timeout: float = PATIENCE) -> str:
        """Type one line of the page into its qube; what it printed."""
        prompt, command = line
        qube = self.qubes[prompt[:-1]]
        self.typed.setdefault(self.folder.name, set()).add(line)
        try:
            if prompt.endswith("$"):
                return (
                    qube.as_user(command)
                    if qube.as_user
                    else qube.run(command, timeout=timeout)
                )
            assert qube.as_root, f"nothing runs what root types: {line}"
            return qube.as_root(command)
        except MachineError as error:
            logs = "".join(
                f"\n-- log of {name}:\n{other.log[-2000:]}"
                for name, other in self.qubes.items()
            )
            raise MachineError(f"{error}{logs}") from None


def sections(recipe: str) -> dict[str, list[Line]]:
    """The commands of a page by its sections; what stands before all of them
    has no name.

    All that a page shows is a command: of a user, or of root, in a qube that it
    names.
    """
    page = (EXAMPLES / recipe / "README.md").read_text()
    parts = re.split(r"^## (.+)\n", page, flags=re.MULTILINE)
    found = {}
    for name, text in zip(["", *parts[1::2]], parts[::2], strict=True):
        found[name] = []
        for shown in text.replace("\\\n", "").splitlines():
            if shown.startswith("    "):
                match = PROMPT.fullmatch(shown)
                assert match, f"{recipe}: no qube's command: {shown}"
                qube, prompt, command = match.groups()
                found[name].append(
                    (f"{qube}{prompt}", " ".join(command.split()))
                )
    return found


def never_typed(recipe: str) -> list[Line]:
    """What a page shows, and no test has typed so far."""
    typed = Recipe.typed.get(recipe, set())
    return [
        line
        for lines in sections(recipe).values()
        for line in lines
        if line not in typed
    ]


def forwards_nothing(client: Qube, options: str) -> None:
    """Who may log in by ssh on port 2222 gets no further: not even to what
    answers on that very port."""
    said = client.run(
        f"ssh -o LogLevel=INFO {options} -W 127.0.0.1:2222 -p 2222 127.0.0.1 2>&1",
        check=False,
    )
    assert "administratively prohibited" in said
    assert "SSH-2.0" not in said


def listening_ports(pid: str) -> set[tuple[str, int]]:
    """The TCP addresses that a process itself listens on; of IPv6 the port
    alone."""
    held = set()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            held.add(os.readlink(link))
    found = set()
    for table in ("tcp", "tcp6"):
        lines = Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]
        for fields in map(str.split, lines):
            host, _, port = fields[1].partition(":")
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in held:
                packed = bytes.fromhex(host)[::-1]
                name = socket.inet_ntoa(packed) if table == "tcp" else ""
                found.add((name, int(port, 16)))
    return found


@contextlib.contextmanager
def sshd(folder: Path, authorized_keys: Path) -> Iterator[str]:
    """A host that one logs in to with a key, on a port of its own; the block
    gets the words for ssh."""
    folder.mkdir()
    subprocess.run(
        ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / "host"],
        check=True,
    )
    host, port = free_host(), 2222
    if os.geteuid() == 0:
        # The folder that sshd locks its unprivileged half into.
        Path("/run/sshd").mkdir(exist_ok=True)
    config = folder / "sshd_config"
    config.write_text(
        f"ListenAddress {host}:{port}\nHostKey"
        f" {folder}/host\nAuthorizedKeysFile {authorized_keys}\n"
        "PasswordAuthentication no\nStrictModes no\nUsePAM no\nPidFile none\n"
    )
    process = subprocess.Popen(
        [which("sshd"), "-D", "-E", folder / "log", "-f", config]
    )
    try:
        until(
            "sshd listens",
            lambda: listens((host, port)) or process.poll() is not None,
        )
        yield f"-p {port} -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o BatchMode=yes {host}"
    finally:
        process.terminate()
        process.wait(PATIENCE)
