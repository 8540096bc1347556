"""The command line: one click group, whose commands import only what they need.

`serve` is what the units run, and starts in the time that trio takes to import; the rest are for people.
Nobody gets to see a traceback, unless they ask with --debug; the daemon's goes to the journal.
"""

from __future__ import annotations

import importlib
import os
import re
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .control.options import Invocation, debug_option
from .errors import ActivateError, BadName, UsageProblem

__all__ = ["main"]

#: Commands for people, each a module of control/ of the same name (with _ for -), which has a click command.
_COMMANDS = {
    "add": "Let a local address reach a qube.",
    "add-rpc": "Write the units for an RPC of your own.",
    "check": "Say what is wrong on the whole way, and how to mend it.",
    "completion": "Print the completion script for a shell.",
    "demo": "Show it working on this machine, without Qubes.",
    "disconnect": "End open connections.",
    "edit": "Edit the file of a route, and check it.",
    "list": "List every route, whoever wrote it.",
    "logs": "Show what became of connections.",
    "policy": "Print the policy that dom0 needs.",
    "publish": "Let other qubes reach a socket of this one.",
    "published": "List what other qubes can reach in this one.",
    "remove": "Remove a route, and leave the others alone.",
    "status": "Show the routes and what is alive on them.",
    "unpublish": "Take back what was published.",
}

#: The user id that the kernel shows for all that have none in this user namespace, and the one that is none.
OVERFLOW_UID = 65534
NO_UID = 2**32 - 1

_TIME = re.compile(r"(\d+(?:\.\d+)?) ?(ms|s|sec|min|m|h|d)?", re.ASCII)
_SECONDS = {"ms": 0.001, "s": 1, "sec": 1, "": 1, "min": 60, "m": 60, "h": 3600, "d": 86400}


if TYPE_CHECKING:
    _FloatType = click.ParamType[float]
else:
    # It is generic since click 8.4, and Debian 12 has 8.1.
    _FloatType = click.ParamType


class Duration(_FloatType):
    """A time span as in unit files: `90`, `90s`, `1min 30s`, `10min`."""

    name = "time"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, (int, float)):
            return float(value)
        text = str(value).strip()
        if not text or _TIME.sub("", text).strip():
            self.fail(f"{text!r} is no time span; write it like 90, 90s, 10min or 1h", param, ctx)
        return sum(float(number) * _SECONDS[unit] for number, unit in _TIME.findall(text))


class UserId(click.ParamType[int]):
    """A user's number, which is what the kernel tells of a connection."""

    name = "uid"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        text = str(value)
        if not (text.isascii() and text.isdigit() and int(text) < NO_UID):
            self.fail(f"{text!r} is no user id; it is a number, which id -u NAME prints", param, ctx)
        if int(text) == OVERFLOW_UID:
            self.fail(f"{text} stands for all users that the kernel cannot show, and so for nobody", param, ctx)
        return int(text)


class LazyGroup(click.Group):
    """A group that lists its commands without importing them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted([*super().list_commands(ctx), *_COMMANDS])

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name in _COMMANDS:
            command = importlib.import_module(f".control.{cmd_name.replace('-', '_')}", __package__).command
            assert isinstance(command, click.Command)
            return command
        return super().get_command(ctx, cmd_name)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        rows = [
            (name, _COMMANDS.get(name) or self.commands[name].get_short_help_str(limit=90))
            for name in self.list_commands(ctx)
        ]
        with formatter.section("Commands"):
            formatter.write_dl(rows)


def _print_version(ctx: click.Context, _param: click.Parameter, value: bool) -> None:
    if not value or ctx.resilient_parsing:
        return
    from importlib import metadata

    try:
        version = metadata.version("qrexec-activate")
    except metadata.PackageNotFoundError:
        # A source tree that was not installed.
        version = Path(__file__).parents[1].joinpath("version").read_text().strip()
    click.echo(f"qrexec-activate {version}")
    ctx.exit()


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_print_version, help="Show the version."
)
@debug_option
@click.pass_context
def cli(ctx: click.Context) -> None:
    """Make local sockets reach other qubes: qrexec-client-vm, socket-activated by systemd.

    A drop-in for qrexec-connect-tcp@PORT.socket names a local address (ListenStream=) and a qube
    (FileDescriptorName=). Every connection to that address becomes a qrexec call to that qube.
    """
    if isinstance(ctx.obj, Invocation):
        ctx.obj.command = ctx.invoked_subcommand


@cli.command(
    context_settings={"auto_envvar_prefix": "QREXEC_ACTIVATE", "show_default": True},
    epilog="""Try it out, with the qube "work" as the target:

    systemd-socket-activate -l 127.0.0.1:8000 --fdname=work qrexec-activate serve qubes.ConnectTCP --argument 8000
""",
)
@click.argument("rpc", envvar=[])
@click.option(
    "--unit",
    metavar="UNIT",
    help="The service unit that this is (%n): ask systemd which file opened which socket.",
)
@click.option(
    "--argument",
    metavar="ARG",
    help="Serve the passed sockets with this RPC argument; their names are the targets.",
)
@click.option(
    "--relay",
    type=click.Choice(["auto", "hand-over", "splice"]),
    default="auto",
    help="Hand the socket to qrexec-client-vm (4.2.19 up), or splice it to its pipes.",
)
@click.option("--client", metavar="PATH", default="/usr/bin/qrexec-client-vm", help="The qrexec-client-vm to start.")
@click.option("--max-setups", metavar="N", type=click.IntRange(1, 1000), default=8, help="Calls being set up at once.")
@click.option(
    "--max-connections",
    metavar="N",
    type=click.IntRange(1, 100000),
    default=120,
    help="Connections open to one target at once; more wait.",
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
    help="Let in only this user; may be given several times.  [default: all who can reach the listener]",
)
def serve(
    rpc: str,
    unit: str | None,
    argument: str | None,
    relay: str,
    client: str,
    max_setups: int,
    max_connections: int,
    setup_timeout: float,
    exit_idle_time: float | None,
    allow_uid: tuple[int, ...],
) -> None:
    """Serve the sockets that systemd passes, by calls of RPC. This is what the units run.

    Every option can be set by an environment variable too, as in Environment=QREXEC_ACTIVATE_MAX_SETUPS=4.
    """
    from .serve import serve as run
    from .settings import Relay, Settings

    if unit is not None and argument is not None:
        raise UsageProblem("--unit and --argument exclude each other: a unit's instance name is the argument")
    if not allow_uid and "QREXEC_ACTIVATE_ALLOW_UID" in os.environ:
        # click takes an empty variable for none, and none lets everybody in.
        raise UsageProblem("QREXEC_ACTIVATE_ALLOW_UID is empty; set it to the ids of users, or do not set it")
    settings = Settings(
        client=client,
        relay=Relay(relay),
        max_setups=max_setups,
        max_connections=max_connections,
        setup_timeout=setup_timeout,
        exit_idle_time=exit_idle_time or None,
        allow_uids=allow_uid,
    )
    run(rpc, unit, argument, settings)


def main() -> None:
    """Run the command; every error is one line that says what to do, and its exit code 2 if it is one of usage."""
    invocation = Invocation()
    try:
        cli(prog_name="qrexec-activate", obj=invocation)
    except Exception as error:
        if invocation.command == "serve" and not isinstance(error, ActivateError):
            raise
        if invocation.debug:
            traceback.print_exc()
        click.echo(f"qrexec-activate: {_in_words(error)}", err=True)
        raise SystemExit(2 if isinstance(error, (UsageProblem, BadName)) else 1) from None


def _in_words(error: Exception) -> str:
    """Say in one line what went wrong, where, and what to do."""
    if isinstance(error, ActivateError):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}: this is a bug; run it again with --debug, and report what it prints"
