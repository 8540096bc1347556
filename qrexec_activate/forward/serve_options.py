"""The command line of `qrexec-activate serve`: what it may say, and what that
means.

Read in a fork (see serve.py), so that click does not stay with a process that
lives as long as a session.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from ..errors import UsageProblem
from .settings import Relay, Settings

__all__ = ["Request", "command", "parse"]


class Request(NamedTuple):
    """What is to be served. At most one of unit and argument is given."""

    service: str
    unit: str | None
    argument: str | None
    settings: Settings
    #: Whether systemd has told this unit to stop already.
    stopping: bool = False


#: The user id that the kernel shows for all that have none in this user
#: namespace, and the one that is none.
OVERFLOW_UID = 65534
NO_UID = 2**32 - 1

_TIME = re.compile(r"(\d+(?:\.\d+)?) ?(ms|s|sec|min|m|h|d)?", re.ASCII)
_SECONDS = {
    "ms": 0.001,
    "s": 1,
    "sec": 1,
    "": 1,
    "min": 60,
    "m": 60,
    "h": 3600,
    "d": 86400,
}


if TYPE_CHECKING:
    _FloatType = click.ParamType[float]
    _IntType = click.ParamType[int]
else:
    # It is generic since click 8.4, and Debian 12 has 8.1.
    _FloatType = _IntType = click.ParamType


class Duration(_FloatType):
    """A time span as in unit files: `90`, `90s`, `1min 30s`, `10min`."""

    name = "time"

    def convert(
        self,
        value: Any,
        param: click.Parameter | None,
        ctx: click.Context | None,
    ) -> float:
        if isinstance(value, (int, float)):
            return float(value)
        text = str(value).strip()
        if not text or _TIME.sub("", text).strip():
            self.fail(
                f"{text!r} is no time span; write it like 90, 90s, 10min or 1h",
                param,
                ctx,
            )
        return sum(
            float(number) * _SECONDS[unit]
            for number, unit in _TIME.findall(text)
        )


class UserId(_IntType):
    """A user's number, which is what the kernel tells of a connection."""

    name = "uid"

    def convert(
        self,
        value: Any,
        param: click.Parameter | None,
        ctx: click.Context | None,
    ) -> int:
        text = str(value)
        if not (text.isascii() and text.isdigit() and int(text) < NO_UID):
            self.fail(
                f"{text!r} is no user id; it is a number, which id -u NAME"
                f" prints",
                param,
                ctx,
            )
        if int(text) == OVERFLOW_UID:
            self.fail(
                f"{text} stands for all users that the kernel cannot show,"
                f" and so for nobody",
                param,
                ctx,
            )
        return int(text)


@click.command(
    "serve",
    context_settings={
        "help_option_names": ["-h", "--help"],
        "auto_envvar_prefix": "QREXEC_ACTIVATE",
        "show_default": True,
    },
    epilog="""Try it out, with the qube "work" as the target:

    systemd-socket-activate -l 127.0.0.1:8000 --fdname=work \\
        qrexec-activate serve qubes.ConnectTCP --argument 8000
""",
)
@click.argument("rpc", envvar=[])
@click.option(
    "--unit",
    metavar="UNIT",
    help="The service unit that this is (%n): ask systemd which file opened"
    " which socket.",
)
@click.option(
    "--argument",
    metavar="ARG",
    help="Serve the passed sockets with this RPC argument; their names are"
    " the targets.",
)
@click.option(
    "--relay",
    type=click.Choice(["auto", "hand-over", "splice"]),
    default="auto",
    help="Hand the socket to qrexec-client-vm (4.2.19 up), or splice it to"
    " its pipes.",
)
@click.option(
    "--client",
    metavar="PATH",
    default="/usr/bin/qrexec-client-vm",
    help="The qrexec-client-vm to start.",
)
@click.option(
    "--max-setups",
    metavar="N",
    type=click.IntRange(1, 1000),
    default=8,
    help="Calls being set up at once.",
)
@click.option(
    "--max-connections",
    metavar="N",
    type=click.IntRange(1, 100000),
    default=120,
    help="Connections open to one target at once; more wait.",
)
@click.option(
    "--max-total",
    metavar="N",
    type=click.IntRange(1, 100000),
    default=240,
    help="Calls open in this qube at once, whoever made them; more wait.",
)
@click.option(
    "--setup-timeout",
    metavar="TIME",
    type=Duration(),
    default="5min",
    help="Give up on a call without an answer.",
)
@click.option(
    "--exit-idle-time",
    metavar="TIME",
    type=Duration(),
    help="End after so long without a connection.  [default: never]",
)
@click.option(
    "--allow-uid",
    metavar="UID",
    type=UserId(),
    multiple=True,
    help="Let in only this user; may be given several times.  [default: all"
    " who can reach the listener]",
)
@click.pass_context
def command(
    ctx: click.Context,
    rpc: str,
    unit: str | None,
    argument: str | None,
    relay: str,
    client: str,
    max_setups: int,
    max_connections: int,
    max_total: int,
    setup_timeout: float,
    exit_idle_time: float | None,
    allow_uid: tuple[int, ...],
) -> Request:
    """Serve the sockets that systemd passes, by calls of RPC. This is what the
    units run.

    Every option can be set by an environment variable too, as in
    Environment=QREXEC_ACTIVATE_MAX_SETUPS=4.
    """
    if ctx.parent is not None:
        raise UsageProblem(
            "serve stands first: write qrexec-activate serve RPC, and options"
            " after it"
        )
    if unit is not None and argument is not None:
        raise UsageProblem(
            "--unit and --argument exclude each other: a unit's instance name,"
            " up to the first colon, is the argument"
        )
    if not allow_uid and "QREXEC_ACTIVATE_ALLOW_UID" in os.environ:
        # click takes an empty variable for none, and none lets everybody in.
        raise UsageProblem(
            "QREXEC_ACTIVATE_ALLOW_UID is empty; set it to the ids of users,"
            " or do not set it"
        )
    settings = Settings(
        client=client,
        relay=Relay(relay),
        max_setups=max_setups,
        max_connections=max_connections,
        max_total=max_total,
        setup_timeout=setup_timeout,
        exit_idle_time=exit_idle_time or None,
        allow_uids=allow_uid,
    )
    return Request(rpc, unit, argument, settings)


def parse(arguments: Sequence[str]) -> Request:
    """Read what stands after `serve`. Raises UsageProblem, or SystemExit where
    click has said all there is to say."""
    try:
        said = command.main(
            list(arguments),
            prog_name="qrexec-activate serve",
            standalone_mode=False,
        )
    except click.ClickException as error:
        error.show()
        raise SystemExit(error.exit_code) from None
    if isinstance(said, Request):
        return said
    # --help, whose exit code this is.
    raise SystemExit(said)
