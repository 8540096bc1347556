"""qrexec-activate serve: from the passed sockets to a running daemon.

Asks systemd which file opened which socket, once, before anything is accepted; in a fork, while trio is imported,
so that neither D-Bus nor its memory stays with a process that lives as long as a session.
"""

from __future__ import annotations

import dataclasses
import os

from .background import Background
from .errors import UsageProblem
from .passed import passed_sockets
from .routes import Claim, PassedSocket, by_name, by_unit
from .settings import Settings

__all__ = ["serve"]

HOW_TO_START = (
    "no socket was passed: this command is started by systemd when a connection comes, not by hand."
    " Write a drop-in for {socket} with ListenStream= and FileDescriptorName=, and"
    " systemctl --user enable --now it; or try it out with:"
    " systemd-socket-activate -l 127.0.0.1:8000 --fdname=QUBE qrexec-activate serve {service} --argument 8000"
)
#: The units that ship, by RPC.
_PREFIXES = {
    "qubes.ConnectTCP": "qrexec-connect-tcp@1234.socket",
    "qubes.ConnectUnix": "qrexec-connect-unix@NAME.socket",
    "qubes.ConnectTCPBind": "qrexec-connect-tcp-bind@PORT-ADDRESS.socket",
}


def _sockets(service: str) -> list[PassedSocket]:
    try:
        passed = passed_sockets()
    # SystemError: systemd-python 235 stumbles over names that are no UTF-8.
    except (OSError, ValueError, RuntimeError, SystemError) as error:
        raise UsageProblem(
            f"LISTEN_FDS, LISTEN_FDNAMES and the open descriptors do not agree ({error}); let systemd set them"
        ) from error
    if not passed:
        raise UsageProblem(HOW_TO_START.format(service=service, socket=_PREFIXES.get(service, "a socket unit")))
    return passed


def _started_by_manager() -> bool:
    """Whether a systemd manager has started this very process (systemd 248 up), not a shell or socket-activate."""
    return os.environ.get("SYSTEMD_EXEC_PID") == str(os.getpid())


def _claims(
    service: str, unit: str | None, argument: str | None, sockets: list[PassedSocket], by_manager: bool
) -> tuple[list[Claim], float | None]:
    """Decide on every socket; also returns how long systemd gives the service to stop, where it is known."""
    if unit is None:
        shared_name = len({socket.name for socket in sockets}) < len(sockets)
        if by_manager and (argument is None or shared_name):
            raise UsageProblem(
                "systemd gives all sockets of a unit one name, so a service unit must say which one it is:"
                " add --unit %n to ExecStart="
            )
        return by_name(service, argument or "", sockets), None
    # In the fork only.
    from . import manager

    with manager.open_manager(user=manager.runs_in_user_manager()) as systemd:
        units = systemd.socket_units(systemd.trigger_units(unit), only_active=True)
        claims = by_unit(service, units, sockets, systemd.specifiers())
        timeout = systemd.stop_timeout(unit)
        systemd.reset_start_limit(unit)
    return claims, timeout


def serve(service: str, unit: str | None, argument: str | None, settings: Settings) -> None:
    """Serve the passed sockets until told to stop; raises ActivateError where that cannot be done."""
    sockets = _sockets(service)
    # Asked here, as the fork is not the process that systemd has started.
    by_manager = _started_by_manager()
    resolving = Background(lambda: _claims(service, unit, argument, sockets, by_manager))
    try:
        # Here and not above: this is what takes time while the fork asks systemd.
        import trio

        from .daemon import Daemon
        from .journal import Log
    finally:
        claims, stop_timeout = resolving.result()
    if stop_timeout is not None:
        settings = dataclasses.replace(settings, stop_timeout=stop_timeout)

    async def run() -> None:
        daemon = Daemon(service, settings, Log())
        daemon.add_listeners(sockets, claims)
        await daemon.run()

    trio.run(run)
