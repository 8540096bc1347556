"""The command line: one click group, whose commands import only what they need.

The commands are for people, but for `serve`, which starts in serve.py and is
here to be listed. Nobody gets to see a traceback, unless they ask with --debug.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import sys

import click

from .control.options import Invocation, debug_option, did_you_mean
from .control.terminal import guard_streams, say, silence
from .errors import ActivateError, BadName, UsageProblem

__all__ = ["main"]

#: Where commands live, and what they are for. Each is a module of that name
#: (with _ for -), which has a click command.
_COMMANDS = {
    "control": {
        "add": "Let a local address reach a qube.",
        "add-rpc": "Write the units for an RPC of your own.",
        "check": "Say what is wrong on the whole way, and how to mend it.",
        "completion": "Print the completion script for a shell.",
        "disable": "Let routes not start by themselves any more.",
        "disconnect": "End open connections.",
        "edit": "Edit the file of a route, and check it.",
        "enable": "Let routes start at login or boot.",
        "list": "List every route, whoever wrote it.",
        "logs": "Show what became of connections.",
        "notify": "Show a notification when a connection is refused or waits.",
        "policy": "Print the file of policy that dom0 needs.",
        "remove": "Remove a route, and leave the others alone.",
        "remove-rpc": "Take away the units of an RPC of your own.",
        "retarget": "Let a route reach another qube.",
        "start": "Let routes listen now.",
        "status": "Show the routes and what is alive on them.",
        "stop": "Close routes, until they are started again.",
    },
    "publish": {
        "publish": "Let other qubes reach a socket or a program of this one.",
        "published": "List what other qubes can reach in this one.",
        "unpublish": "Take back what was published.",
    },
    "forward": {
        "serve": "Serve the sockets that systemd passes. This is what the"
        " units run."
    },
    "loopback": {"demo": "Show it working on this machine, without Qubes."},
}


def _installed() -> dict[str, tuple[str, str]]:
    """Return each command that is there, with its room and its line of help:
    `publish` is a package of its own."""
    here = os.path.dirname(__file__)
    return {
        name: (room, line)
        for room, commands in _COMMANDS.items()
        if os.path.isdir(os.path.join(here, room))
        for name, line in commands.items()
    }


class LazyGroup(click.Group):
    """A group that lists its commands without importing them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted([*super().list_commands(ctx), *_installed()])

    def get_command(
        self, ctx: click.Context, cmd_name: str
    ) -> click.Command | None:
        if (found := _installed().get(cmd_name)) is not None:
            module = (
                "serve_options"
                if cmd_name == "serve"
                else cmd_name.replace("-", "_")
            )
            command = importlib.import_module(
                f".{found[0]}.{module}", __package__
            ).command
            assert isinstance(command, click.Command)
            return command
        return super().get_command(ctx, cmd_name)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        word = args[0]
        if word.startswith("-") or self.get_command(ctx, word):
            return super().resolve_command(ctx, args)
        if word in _COMMANDS["publish"]:
            raise UsageProblem(
                f"{word} is not installed here: it comes with the package"
                " qrexec-activate-publish"
            )
        known = self.list_commands(ctx)
        raise UsageProblem(
            f"there is no command {word!r}{did_you_mean(word, known)};"
            f" qrexec-activate --help lists all"
        )

    def format_commands(
        self, ctx: click.Context, formatter: click.HelpFormatter
    ) -> None:
        rows = [
            (
                name,
                found[1]
                if (found := _installed().get(name))
                else self.commands[name].get_short_help_str(limit=90),
            )
            for name in self.list_commands(ctx)
        ]
        with formatter.section("Commands"):
            formatter.write_dl(rows)


def _print_version(
    ctx: click.Context, _param: click.Parameter, value: bool
) -> None:
    if not value or ctx.resilient_parsing:
        return
    from importlib import metadata
    from pathlib import Path

    try:
        version = metadata.version("qrexec-activate")
    except metadata.PackageNotFoundError:
        # A source tree that was not installed.
        version = (
            Path(__file__).parents[1].joinpath("version").read_text().strip()
        )
    click.echo(f"qrexec-activate {version}")
    ctx.exit()


@click.group(
    cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]}
)
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_print_version,
    help="Show the version.",
)
@debug_option
@click.pass_context
def cli(ctx: click.Context) -> None:
    """Make local sockets reach other qubes: qrexec-client-vm, socket-activated
    by systemd.

    A drop-in for qrexec-connect-tcp@PORT.socket names a local address
    (ListenStream=) and a qube (FileDescriptorName=). Every connection to that
    address becomes a qrexec call to that qube.
    """
    if isinstance(ctx.obj, Invocation):
        ctx.obj.command = ctx.invoked_subcommand


def _complete_commands(
    ctx: click.Context, _param: click.Parameter, incomplete: str
) -> list[str]:
    names = cli.list_commands(ctx.find_root())
    return [name for name in names if name.startswith(incomplete)]


@cli.command(
    "help",
    short_help="Show the help of a command.",
    epilog="""\b
Example:
    $ qrexec-activate help add
""",
)
@click.argument("name", required=False, shell_complete=_complete_commands)
@click.pass_context
def show_help(ctx: click.Context, name: str | None) -> None:
    """Show the help of the command NAME, as NAME --help does; without one, that
    of all."""
    root = ctx.find_root()
    if name is None:
        click.echo(root.get_help())
        return
    name, command, _ = cli.resolve_command(root, [name])
    assert command is not None
    settings = command.context_settings
    with click.Context(command, root, name, **settings) as inner:
        click.echo(inner.get_help())


def main() -> None:
    """Run the command; every error is one line that says what to do, and its
    exit code 2 if it is one of usage."""
    if sys.getfilesystemencoding() == "ascii":
        # systemd names files in UTF-8, whatever the locale.
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    invocation = Invocation()
    # While Python imports and ends, a KeyboardInterrupt would be a traceback.
    hears = signal.getsignal(signal.SIGINT) is signal.SIG_DFL
    if hears:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        guard_streams()
        if "_QREXEC_ACTIVATE_COMPLETE" in os.environ:
            # Its classes take the place of click's.
            importlib.import_module(".control.completion", __package__)
        cli(prog_name="qrexec-activate", obj=invocation)
    except Exception as error:
        with contextlib.suppress(Exception):
            if invocation.debug:
                import traceback

                traceback.print_exc()
            say(f"qrexec-activate: {_in_words(error)}", err=True)
        raise SystemExit(
            2 if isinstance(error, (UsageProblem, BadName)) else 1
        ) from None
    finally:
        silence()
        if hears:
            signal.signal(signal.SIGINT, signal.SIG_DFL)


def _in_words(error: Exception) -> str:
    """Say in one line what went wrong, where, and what to do."""
    if isinstance(error, ActivateError):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        return (
            f"{error.filename}: {error.strerror}"
            if error.filename
            else error.strerror
        )
    text = " ".join(str(error).split())
    return (
        f"{type(error).__name__}: {text}: this is a bug; run it again with"
        f" --debug, and report what it prints"
    )
