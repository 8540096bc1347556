"""qrexec-activate check: what is right and what is wrong on the whole way, and
what mends it."""

from __future__ import annotations

import contextlib
import os
import shlex
import socket
import sys
import time
from dataclasses import replace

import click

from ..errors import ActivateError
from ..routing.address import address_key
from ..systemd.journalreader import records
from .checks import Level, Step, walk
from .options import json_option, managers_option
from .survey import Entry
from .table import (
    BAD,
    DOUBTFUL,
    GOOD,
    print_json,
    say,
    styled,
    with_short_paths,
)

__all__ = ["command"]

STYLES = {Level.OK: GOOD, Level.WARNING: DOUBTFUL, Level.ERROR: BAD}
#: A call that is refused is reset within a fraction of a second; one that stays
#: open so long has begun, or waits for a person's answer.
TRY_PATIENCE = 5.0
#: The record of a connection that has ended comes at once; where there is no
#: journal, it never comes.
RECORD_PATIENCE = 2.0


@click.command(
    "check",
    epilog="""\b
Examples:
    $ qrexec-activate check
    $ qrexec-activate check --try
    $ qrexec-activate check --json | jq '.steps[] | select(.level != "ok")'
""",
)
@click.option(
    "--try",
    "tries",
    is_flag=True,
    help="Also make one connection on each route, after asking.",
)
@click.option("-y", "--yes", is_flag=True, help="Do not ask before --try.")
@click.option("-q", "--quiet", is_flag=True, help="Show only what is wrong.")
@json_option
@managers_option
@click.pass_context
def command(
    ctx: click.Context,
    tries: bool,
    yes: bool,
    quiet: bool,
    as_json: bool,
    which: str | None,
) -> None:
    """Walk the whole way and say of each step whether it is right; with what is
    wrong comes the command that mends it ($) or, where none can, what you have
    to do (→).

    Nothing is changed, and nothing is called unless you say --try. The exit
    code is 0, 1 if there are warnings, or 2 if there are errors. It is of use
    on a machine without Qubes, too.
    """
    steps, entries = walk(which)
    marked = which is None and any(one.manager == "system" for one in steps)
    if not as_json:
        for step in steps:
            _show(step, quiet, marked)
    routes = [one for one in entries if not one.refused and one.listens]
    if tries and routes and (yes or _may_call(len(routes))):
        for entry in routes:
            steps.append(replace(_try(entry), manager=entry.manager))
            if not as_json:
                _show(steps[-1], quiet, marked)
    worst = max(step.level for step in steps)
    if as_json:
        print_json(
            {
                "level": worst.word,
                "steps": [
                    {
                        "area": one.area,
                        "manager": one.manager,
                        "level": one.level.word,
                        "text": one.text,
                        "mend": one.mend or None,
                        "advice": one.advice or None,
                    }
                    for one in steps
                ],
            }
        )
    else:
        _conclude(steps)
    ctx.exit(int(worst))


def _show(step: Step, quiet: bool, marked: bool) -> None:
    if quiet and step.level is Level.OK:
        return
    whose = " (system)" if marked and step.manager == "system" else ""
    say(
        styled(f"{step.level.word:<8}", STYLES[step.level]),
        f"{step.area}{whose}: {with_short_paths(step.text)}",
    )
    if step.mend:
        click.echo(f"{'':<8}$ {step.mend}")
    if step.advice:
        say(f"{'':<8}→ {with_short_paths(step.advice)}")


def _conclude(steps: list[Step]) -> None:
    errors = sum(step.level is Level.ERROR for step in steps)
    warnings = sum(step.level is Level.WARNING for step in steps)
    if errors or warnings:
        click.echo(
            f"{errors} error{'s' * (errors != 1)}, {warnings}"
            f" warning{'s' * (warnings != 1)}"
        )
    else:
        click.echo("All is well")


# ---------------------------------------------------------------------- --try


def _may_call(count: int) -> bool:
    try:
        return click.confirm(
            f"Connect to {count} route{'s' * (count != 1)}? Each may start a"
            f" qube, or ask you in dom0",
            err=True,
        )
    except click.Abort:
        if sys.stdin.isatty():
            raise
        say("Nobody answers, so nothing was tried; see --yes", err=True)
        return False


def _try(entry: Entry) -> Step:
    """Connect, send nothing, and see whether the connection lasts."""
    route = f"{entry.listener} → {entry.target} {entry.call}"
    user = entry.manager == "user"
    logs = "logs" if user else "logs --system"
    mend = f"qrexec-activate {logs} {shlex.quote(entry.listener)}"
    try:
        with _connect(entry.listener) as sock:
            peer = (
                f"pid {os.getpid()} "
                if sock.family == socket.AF_UNIX
                else _written(sock.getsockname())
            )
            sock.settimeout(TRY_PATIENCE)
            try:
                # Some services greet; others wait for the client, and say
                # nothing.
                greeting = sock.recv(1)
            except TimeoutError:
                return Step(
                    "try",
                    Level.OK,
                    f"{route}: connected, and open after {TRY_PATIENCE:.0f} s",
                )
    except ConnectionResetError:
        return Step(
            "try", Level.ERROR, f"{route}: the call was refused or failed", mend
        )
    except OSError as error:
        return Step(
            "try",
            Level.ERROR,
            f"{route}: cannot connect: {error.strerror or error}",
            mend,
        )
    if greeting:
        return Step("try", Level.OK, f"{route}: the service answers")
    # A unix socket shows no reset to a client that has sent nothing, so the
    # daemon's record has to tell.
    if failure := _failure(entry, peer, user):
        return Step("try", Level.ERROR, f"{route}: {failure}", mend)
    return Step(
        "try",
        Level.WARNING,
        f"{route}: the service closed the connection without a word",
        mend,
    )


def _written(name: tuple[object, ...]) -> str:
    host, port, *_ = name
    return f"[{host}]:{port} " if ":" in str(host) else f"{host}:{port} "


def _failure(entry: Entry, peer: str, user: bool) -> str:
    """What the journal says of this connection, if its call was never
    established; empty if it was, or nobody knows."""
    deadline = time.monotonic() + RECORD_PATIENCE
    with contextlib.suppress(ActivateError):
        while time.monotonic() < deadline:
            with records(
                user=user,
                since=f"-{TRY_PATIENCE + RECORD_PATIENCE:.0f}s",
                latest_first=True,
            ) as found:
                for record in found:
                    fields = record.fields
                    if (
                        fields.get("LISTENER") == entry.listener
                        and f"{fields.get('PEER', '')} ".startswith(peer)
                    ):
                        return (
                            record.message.partition(f"{entry.call}: ")[2]
                            if fields["ESTABLISHED"] == "0"
                            else ""
                        )
            time.sleep(0.1)
    return ""


def _connect(listener: str) -> socket.socket:
    key = address_key(listener)
    if key is None:
        raise OSError("its address is of a kind that cannot be tried from here")
    family, host, port = key
    if family == "ip":
        # Who listens on all addresses listens on loopback, too.
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
        return socket.create_connection((host, port), timeout=TRY_PATIENCE)
    if family == "vsock":
        raise OSError("a vsock address cannot be tried from this side")
    sock = socket.socket(socket.AF_UNIX)
    try:
        sock.settimeout(TRY_PATIENCE)
        sock.connect("\0" + host[1:] if family == "abstract" else host)
    except BaseException:
        sock.close()
        raise
    return sock
