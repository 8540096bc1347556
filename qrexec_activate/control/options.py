"""What the commands for people share on the command line: options, and
completion of what is already in use."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    from .survey import Entry

__all__ = [
    "Invocation",
    "complete_files",
    "complete_kinds",
    "complete_own_kinds",
    "complete_routes",
    "complete_targets",
    "complete_units",
    "debug_option",
    "did_you_mean",
    "dry_run_option",
    "json_option",
    "managers_option",
    "system_option",
    "wide_option",
]

_Command = TypeVar("_Command", bound=Callable[..., Any])


class Invocation:
    """What main() has to know when an error comes: click's own contexts are
    gone by then.

    No dataclass, as importing that is a tenth of the time that --help takes.
    """

    __slots__ = ("command", "debug")

    def __init__(self) -> None:
        self.command: str | None = None
        self.debug = False


def _set_debug(
    ctx: click.Context, _param: click.Parameter, value: bool
) -> None:
    invocation = ctx.find_root().obj
    if value and isinstance(invocation, Invocation):
        invocation.debug = True


def debug_option(command: _Command) -> _Command:
    """Add --debug, which shows where in the program an error came from."""
    return click.option(
        "--debug",
        is_flag=True,
        is_eager=True,
        expose_value=False,
        callback=_set_debug,
        help="Show where in the program an error came from.",
    )(command)


def system_option(command: _Command) -> _Command:
    """Add --system and --debug, which every command for people has."""
    option = click.option(
        "--system",
        is_flag=True,
        help="Use the system's systemd instead of your own.",
    )
    return debug_option(option(command))


def dry_run_option(command: _Command) -> _Command:
    """Add --dry-run, for every command that changes something."""
    return click.option(
        "--dry-run",
        is_flag=True,
        help="Show what would be done, and change nothing.",
    )(command)


def managers_option(command: _Command) -> _Command:
    """Add --system, --user and --debug, for commands that change nothing: they
    show both managers' unless one is named."""
    for name, whose in (("user", "your own"), ("system", "the system's")):
        command = click.option(
            f"--{name}",
            "which",
            flag_value=name,
            default=None,
            help=f"Show only {whose}, not both.",
        )(command)
    return debug_option(command)


def json_option(command: _Command) -> _Command:
    """Add --json; docs/json.md says what it prints."""
    return click.option(
        "--json",
        "as_json",
        is_flag=True,
        help="Print JSON, as docs/json.md describes.",
    )(command)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """What a misspelt word may have been meant for, to follow what is said of
    it; empty where nothing is near."""
    import difflib

    near = difflib.get_close_matches(word, known, n=1)
    return f" (did you mean {near[0]}?)" if near else ""


def wide_option(command: _Command) -> _Command:
    """Add --wide, for tables."""
    return click.option(
        "--wide",
        is_flag=True,
        help="Cut nothing, and leave out no column, to fit the terminal.",
    )(command)


def _complete(
    ctx: click.Context,
    incomplete: str,
    words: Callable[[Entry], list[tuple[str, str]]],
) -> list[CompletionItem]:
    from click.shell_completion import CompletionItem

    from .survey import all_entries, survey

    try:
        entries = (
            all_entries(ctx.params["which"])[0]
            if "which" in ctx.params
            else survey(user=not ctx.params.get("system")).entries
        )
    except Exception:
        # A shell that completes a line has no place for messages.
        return []
    found = {
        word: help
        for entry in entries
        for word, help in words(entry)
        if word.startswith(incomplete)
    }
    return [
        CompletionItem(word, help=help) for word, help in sorted(found.items())
    ]


def complete_routes(
    ctx: click.Context, _param: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Offer the addresses, units, labels and targets of all routes; and files,
    which may be theirs, too."""

    def words(entry: Entry) -> list[tuple[str, str]]:
        about = f"{entry.target or 'refused'} {entry.call}"
        names = [entry.listener, entry.unit, entry.label]
        offered = [(name, about) for name in names if name]
        return (
            [*offered, (entry.target, entry.call)] if entry.target else offered
        )

    found = _complete(ctx, incomplete, words)
    return found + complete_files(ctx, _param, incomplete)


def complete_files(
    _ctx: click.Context, _param: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Leave paths to the shell."""
    from click.shell_completion import CompletionItem

    is_path = incomplete.startswith(("/", "~", "./", "../"))
    return [CompletionItem(incomplete, type="file")] if is_path else []


def complete_kinds(
    ctx: click.Context, _param: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Offer the kinds of routes: those that ship, and those of one's own."""
    from click.shell_completion import CompletionItem

    from ..given.kinds import KINDS
    from .kinds import own_kinds

    kinds = dict(KINDS)
    # A shell that completes a line has no place for messages.
    with contextlib.suppress(Exception):
        for prefix in own_kinds(user=not ctx.params.get("system")):
            kinds.setdefault(prefix, "")
    return [
        CompletionItem(kind, help=about or None)
        for kind, about in kinds.items()
        if kind.startswith(incomplete)
    ]


def complete_own_kinds(
    ctx: click.Context, param: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Offer the prefixes that add-rpc has made."""
    from ..given.kinds import KINDS

    return [
        item
        for item in complete_kinds(ctx, param, incomplete)
        if item.value not in KINDS
    ]


def complete_targets(
    ctx: click.Context, _param: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Offer the qubes that routes already reach, and qrexec's keywords."""
    from click.shell_completion import CompletionItem

    found = _complete(
        ctx,
        incomplete,
        lambda entry: [(entry.target, "")] if entry.target else [],
    )
    keywords = ("@default", "@dispvm")
    known = {item.value for item in found}
    return found + [
        CompletionItem(word)
        for word in keywords
        if word.startswith(incomplete) and word not in known
    ]


def complete_units(
    ctx: click.Context, _param: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Offer the socket units that systemd has loaded."""
    from click.shell_completion import CompletionItem

    from ..systemd.units import open_manager

    try:
        with open_manager(user=not ctx.params.get("system")) as manager:
            names = sorted(unit.name for unit in manager.list_units("*.socket"))
    except Exception:
        return []
    return [
        CompletionItem(name) for name in names if name.startswith(incomplete)
    ]
