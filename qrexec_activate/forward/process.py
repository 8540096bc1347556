"""The process of the daemon: its limits, the environment that it passes on, and
who looks after its connections when it is gone; and what its qrexec-client-vm
takes."""

from __future__ import annotations

import contextlib
import os
import resource
import socket
import sys

from .settings import CARETAKER

__all__ = [
    "client_environment",
    "leave_caretaker",
    "raise_descriptor_limit",
    "takes_sockets",
]

#: So long it may take to ask qrexec-client-vm what it takes.
CLIENT_PATIENCE = 2.0


def leave_caretaker() -> None:
    """Start this program once more, to look after what goes on without a
    daemon. Where that cannot be, it goes on by itself."""
    environment = client_environment() | {
        key: value
        for key, value in os.environ.items()
        if key.startswith("QREXEC_ACTIVATE_")
    }
    with contextlib.suppress(OSError):
        os.posix_spawnp(
            sys.orig_argv[0],
            sys.orig_argv,
            {**environment, CARETAKER: str(os.getpid())},
            setpgroup=0,
            setsigmask=(),
        )


def client_environment() -> dict[str, str]:
    """The environment for qrexec-client-vm: ours, without what systemd meant
    for this process only."""
    ours = ("LISTEN_", "NOTIFY_", "WATCHDOG_", "QREXEC_ACTIVATE_")
    return {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(ours)
    }


def raise_descriptor_limit() -> None:
    """Use as many descriptors as we are allowed to; the soft limit is low for
    programs that call select()."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def takes_sockets(
    client: str, patience: float = CLIENT_PATIENCE
) -> bool | None:
    """Whether this qrexec-client-vm takes sockets, or is older than 4.2.19: an
    option that it does not know ends it with 2 before --help does with 0
    (4.2.18 to 4.4.2). None: it does not say, and its first call will show it.
    """
    import subprocess

    ours, theirs = socket.socketpair()
    # A program that reads all the same finds the end.
    ours.close()
    with theirs, contextlib.suppress(OSError, subprocess.SubprocessError):
        asked = subprocess.run(
            [client, "--use-stdin-socket", "--help"],
            stdin=theirs.fileno(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=client_environment(),
            timeout=patience,
            check=False,
        )
        return {0: True, 2: False}.get(asked.returncode)
    return None
