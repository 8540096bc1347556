"""Where a qrexec-client-vm under test reaches a qube: the folders into which
services and policy go. What a place lacks, its rows cannot be tried.

Whatever is put there is gone when the `with` block of a Place ends.
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from qrexec_activate.loopback.install import write_client

__all__ = ["CannotTry", "Place"]

PREFIX = "contract."
"""Begins the name of every service that is put into a target."""
POLICY_FILE = "10-contract.policy"
LET_ALL = "* * @anyvm @anyvm allow autostart=no"


class CannotTry(Exception):
    """A row cannot be tried here; the text says what is missing."""


class Place:
    """A client program and what it takes to reach targets through it.

    `services` and `configs` hold `{}` where the name of a target goes. `policy`
    is a folder as dom0's policy.d, or one file. `answer` is a file that answers
    an open prompt with `allow` or `deny`, `faults` the loopback's.
    """

    def __init__(
        self,
        client: str,
        *,
        targets: Sequence[str] = ("work",),
        source: str = "client",
        services: str = "",
        configs: str = "",
        policy: Path | None = None,
        answer: Path | None = None,
        faults: Path | None = None,
        second: str = "",
        kill_parent: bool = False,
        agent: int = 0,
        options: Sequence[str] = (),
    ) -> None:
        self.client = client
        self.targets = list(targets)
        self.source = source
        self.second = second
        #: Whether the parent of a service is its side of the data path.
        self.kill_parent = kill_parent
        #: The process of the target's agent, which may be stopped.
        self.agent = agent
        self.options = list(options)
        self._services = services
        self._configs = configs
        self._policy = policy
        self._answer = answer
        self._faults = faults
        self._undo = contextlib.ExitStack()

    @classmethod
    def of_loopback(cls, folder: Path) -> Place:
        """A loopback root of its own in `folder`, with three pretend qubes and
        two that call."""
        root = folder / "root"
        targets = ("work", "gitweb", "vault")
        for qube in targets:
            for part in ("rpc", "rpc-config"):
                (root / "qubes" / qube / part).mkdir(parents=True)
        client = folder / "qrexec-client-vm"
        write_client(str(client), str(root), sys.executable)
        other = folder / "other"
        other.mkdir()
        (other / "name").write_text("other\n")
        (other / "qubes").symlink_to(root / "qubes")
        second = folder / "qrexec-client-vm-of-other"
        write_client(str(second), str(other), sys.executable)
        return cls(
            str(client),
            targets=targets,
            services=f"{root}/qubes/{{}}/rpc",
            configs=f"{root}/qubes/{{}}/rpc-config",
            policy=root / "policy",
            answer=root / "answer",
            faults=root / "faults",
            second=str(second),
        )

    def __enter__(self) -> Place:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._undo.close()

    @functools.cached_property
    def hands_over(self) -> bool:
        """Whether a client may be handed over: since 4.2.19."""
        ours, theirs = socket.socketpair()
        with ours, theirs:
            said = subprocess.run(
                [self.client, "--use-stdin-socket"],
                stdin=theirs,
                capture_output=True,
                check=False,
            ).stderr
        return b"--use-stdin-socket'" not in said

    @property
    def target(self) -> str:
        return self.targets[0]

    # What a probe puts there

    def service(self, name: str, text: str, target: str = "") -> Path:
        """Put a script into a target."""
        path = self._service_path(name, target)
        path.write_text(text)
        path.chmod(0o755)
        return path

    def link(self, name: str, to: str) -> None:
        """Put a symlink into the target: a socket service."""
        self._service_path(name, "").symlink_to(to)

    def config(self, name: str, text: str) -> None:
        if not self._configs:
            raise CannotTry("where rpc-config lies is not known (--rpc-config)")
        folder = Path(self._configs.format(self.target))
        self._written(folder / name, text)

    def _service_path(self, name: str, target: str) -> Path:
        if not self._services:
            raise CannotTry("where services lie is not known (--services)")
        folder = Path(self._services.format(target or self.target))
        if not folder.is_dir():
            raise CannotTry(f"{folder} is no folder for services")
        path = folder / name
        self._undo.callback(path.unlink, missing_ok=True)
        return path

    def policy(self, *lines: str) -> None:
        """Put lines before all that policy says."""
        if self._policy is None:
            raise CannotTry("policy cannot be written (--policy)")
        text = "".join(f"{line}\n" for line in lines)
        if self._policy.is_dir():
            self._written(self._policy / POLICY_FILE, text)
        else:
            self._written(self._policy, f"{text}{LET_ALL}\n")

    def answer(self, word: str) -> None:
        """Answer the prompt that is open."""
        if self._answer is None:
            raise CannotTry("a prompt cannot be answered (--answer)")
        self._written(self._answer, word)

    def unanswered(self) -> None:
        if self._answer is None:
            raise CannotTry("a prompt cannot be answered (--answer)")
        self._written(self._answer, "")

    def fault(self, line: str) -> None:
        if self._faults is None:
            raise CannotTry("it makes no faults on demand (--faults)")
        self._written(self._faults, line + "\n")

    def lose(self) -> None:
        """Let the next call be lost between policy's answer and the target."""
        if self._faults is not None:
            self.fault("lose-late=1")
        elif self.agent:
            os.kill(self.agent, signal.SIGSTOP)
            self._undo.callback(os.kill, self.agent, signal.SIGCONT)
        else:
            raise CannotTry("it loses no call on demand (--faults, --agent)")

    @property
    def makes_faults(self) -> bool:
        return self._faults is not None

    def _written(self, path: Path, text: str) -> None:
        before = path.read_text() if path.exists() else None
        if before is None:
            self._undo.callback(path.unlink, missing_ok=True)
        else:
            self._undo.callback(path.write_text, before)
        new = path.with_name(f".{path.name}.new")
        new.write_text(text)
        new.rename(path)

    # Calls

    def call(
        self,
        *words: str,
        client: str = "",
        stdin: int | socket.socket,
        stdout: int | socket.socket = subprocess.DEVNULL,
    ) -> subprocess.Popen[bytes]:
        """Start the client; it is killed at the latest when the block ends."""
        process = subprocess.Popen(
            [client or self.client, *words],
            stdin=stdin,
            stdout=stdout,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        self._undo.callback(_end, process)
        return process

    def closing(self, *things: socket.socket | int) -> None:
        for thing in things:
            if isinstance(thing, int):
                self._undo.callback(_close, thing)
            else:
                self._undo.callback(thing.close)


def _close(fd: int) -> None:
    with contextlib.suppress(OSError):
        os.close(fd)


def _end(process: subprocess.Popen[bytes]) -> None:
    # Its group: the loopback's services are its children.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if process.stderr:
        process.stderr.close()
