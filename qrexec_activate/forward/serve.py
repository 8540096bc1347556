"""qrexec-activate serve: from the passed sockets to a running daemon.

Reads the command line, and asks systemd which file opened which socket, once,
before anything is accepted; in a fork, while trio is imported, so that neither
click nor D-Bus stays with a process that lives as long as a session.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import sys
import time

from ..errors import ActivateError, BadName, ManagerError, UsageProblem
from ..printable import printable
from ..routing.claim import Claim, PassedSocket
from ..systemd.passed import passed_sockets
from .background import Background
from .process import takes_sockets
from .settings import CARETAKER, STOP_SIGNALS, Relay, Request

__all__ = ["main"]

#: Who looks after connections without a daemon begins to do so after so many
#: seconds: most often the next daemon is there by then.
CARETAKER_DELAY = 1.0

HOW_TO_START = (
    "no socket was passed: this command is started by systemd when a"
    " connection comes, not by hand."
    " Write a drop-in for {socket} with ListenStream= and"
    " FileDescriptorName=, and"
    " systemctl --user enable --now it; or try it out with:"
    " systemd-socket-activate -l 127.0.0.1:8000 --fdname=QUBE qrexec-activate"
    " serve {service} --argument 8000"
)
#: The units that ship, by RPC.
_PREFIXES = {
    "qubes.ConnectTCP": "qrexec-connect-tcp@1234.socket",
    "qubes.ConnectUnix": "qrexec-connect-unix@NAME.socket",
    "qubes.ConnectTCPBind": "qrexec-connect-tcp-bind@PORT-ADDRESS.socket",
}


def _sockets() -> list[PassedSocket]:
    try:
        return passed_sockets()
    # SystemError: systemd-python 235 stumbles over names that are no UTF-8.
    except (OSError, ValueError, RuntimeError, SystemError) as error:
        raise UsageProblem(
            f"LISTEN_FDS, LISTEN_FDNAMES and the open descriptors do not"
            f" agree ({error}); let systemd set them"
        ) from error


def _started_by_manager() -> bool:
    """Whether a systemd manager has started this very process (systemd 248 up),
    not a shell or socket-activate."""
    return os.environ.get("SYSTEMD_EXEC_PID") == str(os.getpid())


def _decide(
    sockets: list[PassedSocket], by_manager: bool
) -> tuple[Request, list[Claim]]:
    """Decide on every socket. In the fork only: it imports what the daemon does
    without."""
    from ..routing.routes import by_name, by_unit
    from .serve_options import parse

    request = parse(sys.argv[2:])
    service, unit, argument, settings, _ = request
    if not sockets:
        raise UsageProblem(
            HOW_TO_START.format(
                service=service, socket=_PREFIXES.get(service, "a socket unit")
            )
        )
    if settings.relay is Relay.AUTO and takes_sockets(settings.client) is False:
        settings = dataclasses.replace(settings, relay=Relay.SPLICE)
        request = request._replace(settings=settings)
    if unit is None:
        shared_name = len({socket.name for socket in sockets}) < len(sockets)
        if by_manager and (argument is None or shared_name):
            raise UsageProblem(
                "systemd gives all sockets of a unit one name, so a service"
                " unit must say which one it is:"
                " add --unit %n to ExecStart="
            )
        return request, by_name(service, argument or "", sockets)

    from ..systemd.manager import Manager, runs_in_user_manager

    with Manager.open(user=runs_in_user_manager()) as systemd:
        units = systemd.socket_units(
            systemd.trigger_units(unit), only_active=True
        )
        claims = by_unit(service, units, sockets, systemd.specifiers())
        if (timeout := systemd.stop_timeout(unit)) is not None:
            request = request._replace(
                settings=dataclasses.replace(settings, stop_timeout=timeout)
            )
        request = request._replace(stopping=systemd.is_stopping(unit))
        # The system's manager takes orders of root alone: of its daemons a line
        # of the unit resets the count.
        with contextlib.suppress(ManagerError):
            systemd.reset_start_limit(unit)
    return request, claims


def _serve() -> None:
    sockets = _sockets()
    # Asked here, as the fork is not the process that systemd has started.
    by_manager = _started_by_manager()
    decision = Background(
        lambda: _decide(sockets, by_manager),
        without=[socket.fd for socket in sockets],
    )
    try:
        # Here and not above: this is what takes time while the fork asks
        # systemd.
        import trio

        from ..systemd.journal import Log
        from .daemon import Daemon
    finally:
        request, claims = decision.result()
    if request.stopping:
        signal.raise_signal(signal.SIGTERM)

    async def run() -> None:
        daemon = Daemon(request.service, request.settings, Log())
        daemon.add_listeners(sockets, claims)
        await daemon.run()

    trio.run(run)


def _look_after() -> None:
    """See to what an earlier daemon left, until the next one comes."""
    time.sleep(CARETAKER_DELAY)
    # What has a daemon is left to it; one may take its time to end.
    while str(os.getppid()) == os.environ[CARETAKER]:
        time.sleep(CARETAKER_DELAY)
    from .serve_options import parse

    request = parse(sys.argv[2:])

    import trio

    from ..systemd.journal import Log
    from .daemon import Daemon

    daemon = Daemon(request.service, request.settings, Log())
    trio.run(daemon.look_after)


def main() -> None:
    """Serve the passed sockets until told to stop. An error that a person can
    mend is one line."""
    try:
        if CARETAKER in os.environ:
            _look_after()
        else:
            # Whoever waits for this start is served before an order to stop is
            # heard: else changes of units that come faster than Python starts
            # would keep everybody waiting. The daemon unblocks them.
            signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
            _serve()
    except ActivateError as error:
        print(f"qrexec-activate: {printable(str(error))}", file=sys.stderr)
        sys.exit(2 if isinstance(error, (UsageProblem, BadName)) else 1)
