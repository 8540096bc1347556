"""The process of the daemon: its limits, the environment that it passes on, and
who looks after its connections when it is gone."""

from __future__ import annotations

import contextlib
import os
import resource
import sys

from .settings import CARETAKER

__all__ = ["client_environment", "leave_caretaker", "raise_descriptor_limit"]


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
