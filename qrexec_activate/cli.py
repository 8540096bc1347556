"""The command line: one click group, whose commands import only what they need.

`serve` is what the units run, and starts in the time that trio takes to import; the rest are for people.
"""

from __future__ import annotations

import importlib
import re
from typing import TYPE_CHECKING, Any

import click

from .errors import ActivateError, BadName, UsageProblem

__all__ = ["main"]

#: Commands for people, each a module of control/ with a click command of the same name.
_COMMANDS = {
    "demo": "Show it working on this machine, without Qubes.",
}

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


class LazyGroup(click.Group):
    """A group that lists its commands without importing them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted([*super().list_commands(ctx), *_COMMANDS])

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name in _COMMANDS:
            command = importlib.import_module(f".control.{cmd_name}", __package__).command
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


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="qrexec-activate", prog_name="qrexec-activate")
def cli() -> None:
    """Make local sockets reach other qubes: qrexec-client-vm, socket-activated by systemd.

    A drop-in for qrexec-connect-tcp@PORT.socket names a local address (ListenStream=) and a qube
    (FileDescriptorName=). Every connection to that address becomes a qrexec call to that qube.
    """


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
) -> None:
    """Serve the sockets that systemd passes, by calls of RPC. This is what the units run.

    Every option can be set by an environment variable too, as in Environment=QREXEC_ACTIVATE_MAX_SETUPS=4.
    """
    from .serve import serve as run
    from .settings import Relay, Settings

    if unit is not None and argument is not None:
        raise UsageProblem("--unit and --argument exclude each other: a unit's instance name is the argument")
    settings = Settings(
        client=client,
        relay=Relay(relay),
        max_setups=max_setups,
        max_connections=max_connections,
        setup_timeout=setup_timeout,
        exit_idle_time=exit_idle_time or None,
    )
    run(rpc, unit, argument, settings)


def main() -> None:
    """Run the command; every error a person can mend is one line, and its exit code 2 if it is one of usage."""
    try:
        cli(prog_name="qrexec-activate")
    except (UsageProblem, BadName) as error:
        click.echo(f"qrexec-activate: {error}", err=True)
        raise SystemExit(2) from None
    except ActivateError as error:
        click.echo(f"qrexec-activate: {error}", err=True)
        raise SystemExit(1) from None
