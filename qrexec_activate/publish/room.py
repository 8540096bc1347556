"""What a program is shut in with: the directives of its units that say what it
sees, and what it does not.

No network, unless one is asked for. With a Linux user of its own it also has no
way to the sockets of others: of /run it sees what is named here, and no more.

systemd goes on without a network namespace where it cannot make one, and only
logs that. So whether it can is tried before anything is written.
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

from ..errors import ActivateError, UsageProblem
from ..systemd.programs import run
from .accounts import home

__all__ = [
    "BY_ITSELF",
    "BY_USERS",
    "POSTGRESQL",
    "confinement",
    "ensure_private_network",
    "is_hidden",
    "private_network",
]

#: What any user may take from a program, and what no program needs that serves
#: a socket.
CONFINED = """\
NoNewPrivileges=yes
RestrictSUIDSGID=yes
RestrictRealtime=yes
LockPersonality=yes
SystemCallArchitectures=native
"""
#: What only the system's systemd can take. A program writes into its home, and
#: sees no other home, no other process and no socket of another's. io_uring
#: would open sockets and files past the filters. Folders of its own in place of
#: PrivateTmp=, with which systemd 257 at times fails to restart a socket.
SHUT_IN = """\
CapabilityBoundingSet=
PrivateDevices=yes
PrivateIPC=yes
ProcSubset=pid
ProtectClock=yes
ProtectControlGroups=yes
ProtectHome=yes
ProtectHostname=yes
ProtectKernelLogs=yes
ProtectKernelModules=yes
ProtectKernelTunables=yes
ProtectProc=invisible
ProtectSystem=strict
RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6
RestrictNamespaces=yes
SystemCallErrorNumber=EPERM
SystemCallFilter=@system-service
SystemCallFilter=~io_uring_setup io_uring_enter io_uring_register
TemporaryFileSystem=/run:ro /tmp:mode=1777 /var/tmp:mode=1777
TemporaryFileSystem=/dev/shm:mode=1777
UMask=0077
"""
#: Where programs that have the network look up names; the files, as the folders
#: hold sockets, too.
RESOLVERS = (
    "/run/NetworkManager/resolv.conf",
    "/run/resolvconf/resolv.conf",
    "/run/systemd/resolve/resolv.conf",
    "/run/systemd/resolve/stub-resolv.conf",
)
POSTGRESQL = "/run/postgresql"
#: How a manager makes a network namespace: with its own rights, or, as one
#: without any, in a user namespace.
BY_ITSELF = "PrivateNetwork=yes\n"
BY_USERS = "PrivateUsers=yes\nPrivateNetwork=yes\n"


def confinement(user: str, network: str, *, sees: tuple[str, ...] = ()) -> str:
    """The directives of a program of this user, or of the person who publishes
    it; `network` are those that take the network away, `sees` what there is in
    /run."""
    if not user:
        return f"{network}{CONFINED}"
    place = home(user)
    if not network:
        # What listens in the qube, and routes to other qubes, are no part of
        # the network that was asked for.
        network = "IPAddressDeny=localhost\n"
        sees += RESOLVERS
    shown = " ".join(f"-{path}" for path in sees)
    return (
        f"User={user}\nWorkingDirectory={place}\nReadWritePaths={place}\n"
        f"{network}{CONFINED}{SHUT_IN}"
        + (f"BindReadOnlyPaths={shown}\n" if shown else "")
    )


@cache
def private_network(*, user: bool) -> str:
    """The directives by which this manager gives a program a network namespace
    of its own; raises UsageProblem where it has none to give.

    The system's is asked by ensure_private_network(), as a dry run may not.
    """
    if not user:
        return BY_ITSELF
    for way in (BY_ITSELF, BY_USERS):
        if _is_private(way, user=True):
            return way
    raise UsageProblem(
        f"{_NONE}: the kernel gives you no user namespaces (sysctl"
        f" user.max_user_namespaces). The system can with --user; {_INSTEAD}"
    )


def ensure_private_network() -> None:
    """Raise ActivateError where the system's systemd cannot give a program a
    network namespace."""
    if not _is_private(BY_ITSELF, user=False):
        raise ActivateError(
            f"{_NONE}: it may make no network namespaces. {_INSTEAD}"
        )


_NONE = "systemd cannot keep a program from the network here"
_INSTEAD = "with --network the program has this qube's"


def _is_private(way: str, *, user: bool) -> bool:
    ours = {
        kind: os.readlink(f"/proc/self/ns/{kind}") for kind in ("net", "user")
    }
    # systemd makes one dollar of two.
    script = f'test "$$(readlink /proc/self/ns/net)" != "{ours["net"]}"'
    if way == BY_ITSELF:
        # From 257 on, a user's own makes a user namespace also unasked, which
        # the proxy of a port cannot join so.
        script += (
            f' && test "$$(readlink /proc/self/ns/user)" = "{ours["user"]}"'
        )
    try:
        run(
            "systemd-run",
            *(["--user"] if user else []),
            "--quiet",
            "--wait",
            "--collect",
            *(f"--property={line}" for line in way.splitlines()),
            "/bin/sh",
            "-c",
            script,
        )
    except ActivateError:
        return False
    return True


def is_hidden(path: Path) -> bool:
    """Whether a program with a user of its own does not see this path."""
    return any(
        path.is_relative_to(hidden)
        for hidden in ("/home", "/root", "/run", "/tmp", "/var/tmp")
    )
