"""The command line of `qrexec-activate serve`: what it may say, and what that
means.

Read in a fork (see serve.py), so that click does not stay with a process that
lives as long as a session.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from typing import Any

import click

from ..errors import UsageProblem
from .settings import Relay, Request, Settings

__all__ = ["command", "parse"]

#: The user id that the kernel shows for all that have none in this user
#: namespace, and the one that is none.
OVERFLOW_UID = 65534
NO_UID = 2**32 - 1

_TIME = re.compile(r"(\d+(?:\.\d+)?) ?(ms|s|sec|min|m|h|d)?", re.ASCII)
_SECONDS = {"ms": 0.001, "min": 60, "m": 60, "h": 3600, "d": 86400}


def _duration(text: str) -> float:
    """Read a time span as in unit files: `90`, `90s`, `1min 30s`, `10min`."""
    text = text.strip()
    if not text or _TIME.sub("", text).strip():
        raise click.BadParameter(
            f"{text!r} is no time span; write it like 90, 90s, 10min or 1h"
        )
    return sum(
        float(number) * _SECONDS.get(unit, 1)
        for number, unit in _TIME.findall(text)
    )


def _user_id(text: str) -> int:
    """Read a user's number, which is what the kernel tells of a connection."""
    if not (text.isascii() and text.isdigit() and int(text) < NO_UID):
        raise click.BadParameter(
            f"{text!r} is no user id; it is a number, which id -u NAME prints"
        )
    if int(text) == OVERFLOW_UID:
        raise click.BadParameter(
            f"{text} stands for all users that the kernel cannot show, and so"
            f" for nobody"
        )
    return int(text)


@click.command(
    "serve",
    context_settings={
        "help_option_names": ["-h", "--help"],
        "auto_envvar_prefix": "QREXEC_ACTIVATE",
        "show_default": True,
    },
    epilog="""\b
Try it out, with the qube "work" as the target:
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
    type=_duration,
    default="5min",
    help="Give up on a call without an answer; 0: never.",
)
@click.option(
    "--exit-idle-time",
    metavar="TIME",
    type=_duration,
    help="End after so long without a connection; 0: never.  [default: 0]",
)
@click.option(
    "--allow-uid",
    metavar="UID",
    type=_user_id,
    multiple=True,
    help="Let in only this user; may be given several times.  [default: all"
    " who can reach the listener]",
)
@click.pass_context
def command(
    ctx: click.Context,
    /,
    rpc: str,
    unit: str | None,
    argument: str | None,
    relay: str,
    exit_idle_time: float | None,
    allow_uid: tuple[int, ...],
    **limits: Any,
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
    limits["setup_timeout"] = limits["setup_timeout"] or math.inf
    settings = Settings(
        relay=Relay(relay),
        exit_idle_time=exit_idle_time or None,
        allow_uids=allow_uid,
        **limits,
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
