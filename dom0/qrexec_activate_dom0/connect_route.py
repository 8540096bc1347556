"""qvm-connect-route: give a qube routes, and write the policy that goes with
them, both or neither.

The routes are features of the qube, which others may have written as well: each
is validated as the qube itself does it, and nothing is printed as it is.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import shlex
from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

import qubesadmin.exc
import qubesadmin.tools

from .decisions import Decisions
from .errors import ActivateError, UsageProblem
from .given.address import parse_address
from .given.kinds import KINDS, port_of
from .given.line import Bad, Given, decide
from .policyfile import Call, PolicyFile, rules, with_rule, without_rule
from .printable import printable
from .routing.address import AddressKey
from .routing.names import call_name, check_target
from .rule import policy_line
from .steps import Step, all_or_none

__all__ = ["main"]

#: Where qubesd takes from what it tells a qube.
FEATURE = "vm-config."
PREFIX = "connect-"
#: QubesDB's limit for a name after vm-config.
LONGEST_NAME = 52
#: QubesDB's limit for a value.
LONGEST_VALUE = 3072
#: In a qube, they are other paths; here, they only tell addresses apart.
SPECIFIERS = {"t": "/run/user/1000", "h": "/home/user"}


def main(args: Sequence[str] | None = None, app: Any = None) -> int:
    """Run the tool; returns its exit status."""
    parser = _parser()
    try:
        options = parser.parse_args(args, app=app)
        return int(options.act(options))
    except (ActivateError, OSError, qubesadmin.exc.QubesException) as error:
        return parser.error_runtime(printable(str(error))) or 1
    except KeyboardInterrupt:
        return (
            parser.error_runtime(
                "interrupted; a change was made as a whole or not at all, and"
                " list shows which"
            )
            or 1
        )


def _parser() -> Any:
    try:
        ours = version("qrexec-activate-dom0")
    except PackageNotFoundError:
        ours = "unknown"
    parser = qubesadmin.tools.QubesArgumentParser(
        prog="qvm-connect-route",
        version=f"%(prog)s {ours}",
        description="Give a qube an address that reaches another one, and"
        " write the policy that goes with it: both or neither.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    kind = f"{', '.join(KINDS)}"
    address = "127.0.0.2[:PORT], [::1]:PORT, a path (%%t/name) or @name"

    add = commands.add_parser(
        "add",
        help="give a qube a route",
        description="Set a feature of QUBE, by which it opens an address for"
        " itself, and write the line of policy for it.",
    )
    add.add_argument("qube", metavar="QUBE", help="whose programs connect")
    add.add_argument("kind", metavar="KIND", help=kind)
    add.add_argument(
        "argument",
        metavar="ARGUMENT",
        help="a port, the name of a socket, or PORT-ADDRESS",
    )
    add.add_argument(
        "target",
        metavar="TARGET",
        help="a qube, @default, @dispvm or @dispvm:NAME",
    )
    add.add_argument(
        "addresses",
        metavar="ADDRESS",
        nargs="*",
        help=f"where QUBE listens: {address}; without one it is the same port"
        " on 127.0.0.1, and for unix %%t/qrexec/NAME",
    )
    action = add.add_mutually_exclusive_group()
    action.add_argument(
        "--ask",
        dest="action",
        action="store_const",
        const="ask",
        help="let dom0 ask at each connection; so it is, if nothing is said",
    )
    action.add_argument(
        "--allow",
        dest="action",
        action="store_const",
        const="allow",
        help="let each connection through",
    )
    add.add_argument(
        "--target",
        dest="redirect",
        metavar="QUBE",
        help="the qube that dom0 is to choose for @default",
    )
    add.add_argument(
        "--source",
        metavar="@tag:TAG",
        help="let the policy be for all qubes with this tag, which QUBE has:"
        " so have the disposables of a template",
    )
    add.set_defaults(act=_add)

    show = commands.add_parser(
        "list",
        help="show routes, and what policy says of them",
        description="Show the routes that dom0 gives to qubes, what policy"
        " says of each, and where both do not agree.",
    )
    show.add_argument("qubes", metavar="QUBE", nargs="*", help="only of these")
    show.set_defaults(act=_list)

    remove = commands.add_parser(
        "remove",
        help="take a route from a qube",
        description="Take back from QUBE what the words name, with the line of"
        " policy that add has written; no line that a person wrote.",
    )
    remove.add_argument("qube", metavar="QUBE", help="from which qube")
    remove.add_argument("kind", metavar="KIND", nargs="?", help=kind)
    remove.add_argument("argument", metavar="ARGUMENT", nargs="?")
    remove.add_argument("target", metavar="TARGET", nargs="?")
    remove.add_argument("addresses", metavar="ADDRESS", nargs="*")
    remove.add_argument(
        "--all", action="store_true", help="all that the words name, if many"
    )
    remove.set_defaults(act=_remove)
    for one in (add, remove):
        one.add_argument(
            "--dry-run",
            "-n",
            action="store_true",
            help="only show what would be done",
        )
    return parser


# --------------------------------------------------------- what a qube is given


class Routes(NamedTuple):
    """What the features of a qube say."""

    values: dict[str, str]
    given: list[Given]
    bad: list[Bad]


def _routes(values: dict[str, str]) -> Routes:
    """Read features as the qube does, for both of its managers. Where two say
    the same, both are there."""
    given: list[Given] = []
    bad: dict[str, Bad] = {}
    for system in (False, True):
        for name, value in values.items():
            given += decide({name: value}, SPECIFIERS, {}, system=system)[0]
        _, wrong = decide(values, SPECIFIERS, {}, system=system)
        bad |= {str(one): one for one in wrong}
    return Routes(values, given, list(bad.values()))


def _values(qube: Any) -> dict[str, str]:
    """The features of a qube that give it routes, without their prefix."""
    found = {}
    for name in sorted(qube.features):
        if name.startswith(FEATURE + PREFIX):
            # Another tool may take it away at any time.
            with contextlib.suppress(KeyError):
                found[name.removeprefix(FEATURE)] = qube.features[name]
    return found


def _call(qube: str, one: Given) -> Call:
    return Call(qube, one.kind, one.argument, one.target)


def _feature(qube: Any, name: str, old: str | None, new: str | None) -> Step:
    """The step from one value of a feature to another; None is none."""

    def put(value: str | None) -> None:
        if value is not None:
            qube.features[FEATURE + name] = value
            return
        with contextlib.suppress(KeyError):
            del qube.features[FEATURE + name]

    words = (
        ["--unset", qube.name, FEATURE + name]
        if old is None
        else [qube.name, FEATURE + name, old]
    )
    return Step(
        lambda: put(new),
        lambda: put(old),
        f"run qvm-features {shlex.join(words)}",
    )


# ------------------------------------------------------------------------ qubes


def _qube(app: Any, name: str, what: str = "") -> Any:
    check_target(name)
    if name == "dom0":
        raise UsageProblem(f"dom0 is no qube for {what or 'a route'}")
    try:
        return app.domains[name]
    except KeyError:
        raise UsageProblem(
            f"there is no qube {name}: qvm-ls shows those there are"
        ) from None


def _check_reached(app: Any, qube: Any, target: str) -> None:
    """Refuse a target that no call could reach."""
    if target == qube.name:
        raise UsageProblem(f"{target} cannot call itself")
    if target == "@dispvm":
        if not qube.default_dispvm:
            raise UsageProblem(
                f"{qube.name} has no default_dispvm: qvm-prefs {qube.name}"
                " default_dispvm TEMPLATE"
            )
    elif target.startswith("@dispvm:"):
        template = _qube(app, target.removeprefix("@dispvm:"))
        if not getattr(template, "template_for_dispvms", False):
            raise UsageProblem(
                f"{template.name} is no template for disposables: qvm-prefs"
                f" {template.name} template_for_dispvms True"
            )
    elif target != "@default":
        _qube(app, target)


def _source(qube: Any, source: str | None) -> str:
    if source is None:
        return str(qube.name)
    tag = source.removeprefix("@tag:")
    if tag == source or not re.fullmatch(r"[A-Za-z0-9_.-]{1,64}", tag):
        raise UsageProblem(f"{source!r} is no source: write it like @tag:web")
    if tag not in qube.tags:
        raise UsageProblem(
            f"{qube.name} has no tag {tag}: qvm-tags {qube.name} add {tag}"
        )
    return source


# ---------------------------------------------------------------------- changes


class Change(NamedTuple):
    """What is to be done: lines that say so, new values of features (None:
    none), and the text of the file of policy."""

    said: list[str]
    values: dict[str, str | None]
    text: str


def _carry_out(
    file: PolicyFile,
    before: str,
    change: Change,
    qube: Any,
    values: dict[str, str],
    *,
    opens: bool,
) -> None:
    """Make a change as a whole. At no moment is there a permission without
    the route that it is for."""
    steps = [
        _feature(qube, name, values.get(name), value)
        for name, value in change.values.items()
    ]
    with contextlib.ExitStack() as stack:
        if change.text != before:
            step = stack.enter_context(file.replacing(change.text))
            steps = [*steps, step] if opens else [step, *steps]
        all_or_none(steps)


def _tell(change: Change, dry_run: bool) -> None:
    print("This would be done:" if dry_run else "Done:")
    for line in change.said:
        print(f"    {printable(line)}")


def _add(options: argparse.Namespace) -> int:
    app = options.app
    qube = _qube(app, options.qube)
    if qube.klass not in ("AppVM", "DispVM", "StandaloneVM", "TemplateVM"):
        raise UsageProblem(
            f"{qube.name} is a {qube.klass}, which has no routes"
        )
    wanted = _wanted(options)
    call = _call(qube.name, wanted[0])
    _check_reached(app, qube, call.target)
    if options.redirect is not None:
        if call.target != "@default":
            raise UsageProblem("--target goes with @default only")
        _check_reached(app, qube, options.redirect)
    elif call.target == "@default" and options.action == "allow":
        raise UsageProblem(
            "who is to be reached? --allow for @default needs --target QUBE"
        )
    source = _source(qube, options.source)

    file = PolicyFile()
    with file.locked():
        there = _routes(_values(qube))
        missing = _missing(qube.name, wanted, there)
        before = file.text()
        rule = rules(before).get(call)
        words = list(rule.words) if rule else []
        decides = (options.action, options.redirect, options.source)
        if not words or any(decides):
            words = policy_line(
                call.service,
                call.argument,
                source,
                call.target,
                options.action or "ask",
                options.redirect,
            )
        text = before
        if rule is None or list(rule.words) != words:
            text = with_rule(before, call, words)
        change = Change([], {}, text)
        if missing:
            name = _free_name(call, there)
            value = " ".join(
                [*call[1:], *(one.address.written for one in missing)]
            )
            if len(value) > LONGEST_VALUE:
                raise UsageProblem(
                    f"a feature holds {LONGEST_VALUE} characters, and this is"
                    " longer"
                )
            change.values[name] = value
            change.said.append(
                f"+ feature of {qube.name}: {FEATURE}{name} '{value}'"
            )
        if text != before:
            if rule and rule.words:
                change.said.append(f"- {file.path}: {' '.join(rule.words)}")
            change.said.append(f"+ {file.path}: {' '.join(words)}")
            file.check(text)
        if change.said and not options.dry_run:
            _carry_out(file, before, change, qube, there.values, opens=True)
    if change.said:
        _tell(change, options.dry_run)
    else:
        print(f"{_shown(wanted)} of {qube.name}: it is all there already.")
    if not options.dry_run or not change.said:
        _tell_decision(app, call, wanted)
    if not options.source and getattr(qube, "template_for_dispvms", False):
        print(
            f"Note: disposables of {qube.name} get the address as well, but"
            f" policy knows them by other names. Give {qube.name} a tag, which"
            " they have from it, and add the route with --source @tag:TAG."
        )
    return 0


def _shown(wanted: Iterable[Given]) -> str:
    return ", ".join(one.address.written for one in wanted)


def _wanted(options: argparse.Namespace) -> list[Given]:
    """The routes of the command line, one for each address."""
    words = [
        options.kind,
        options.argument,
        options.target,
        *options.addresses,
    ]
    for word in words:
        if not word or not re.fullmatch(r"[!-:<-~]+", word, re.ASCII):
            raise UsageProblem(
                f"{printable(word)!r} cannot be in a feature: printable ASCII"
                " only, no blank and no ';'"
            )
    routes = _routes({PREFIX: " ".join(words)})
    if routes.bad:
        raise UsageProblem(routes.bad[0].reason)
    if not routes.given:
        raise UsageProblem("a route does not begin with '#'")
    return routes.given


def _missing(qube: str, wanted: list[Given], there: Routes) -> list[Given]:
    """What of it the qube has not; an error where an address is another's."""
    by_address: dict[AddressKey, Given] = {}
    for one in there.given:
        by_address.setdefault(one.address.key, one)
    missing = []
    for one in wanted:
        other = by_address.get(one.address.key)
        if other is None:
            missing.append(one)
        elif _call(qube, other) != _call(qube, one):
            raise UsageProblem(
                f"{one.address.written} of {qube} is for {other.target} by"
                f" {other.kind} {other.argument} already"
                f" ({FEATURE}{other.key}): choose another address, or remove"
                " that"
            )
    return missing


def _free_name(call: Call, there: Routes) -> str:
    """A name for a feature, that a person can read and nobody has taken."""
    text = "-".join([PREFIX.rstrip("-"), *call[1:]]).replace("@", "")
    base = re.sub(r"[^A-Za-z0-9_.-]", "-", text)[:LONGEST_NAME]
    name, number = base, 2
    while name in there.values:
        end = f"-{number}"
        name = base[: LONGEST_NAME - len(end)] + end
        number += 1
    return name


def _tell_decision(app: Any, call: Call, wanted: list[Given]) -> None:
    decision = Decisions(app).of(call)
    name = call_name(call.service, call.argument)
    print(
        f"{_shown(wanted)} of {call.qube} calls {name} of {call.target}, of"
        f" which dom0's policy says: {decision}"
    )
    if decision.denies:
        print(
            "Warning: so no connection gets through; a line that comes first"
            " decides."
        )


# ----------------------------------------------------------------------- remove


def _remove(options: argparse.Namespace) -> int:
    app = options.app
    check_target(options.qube)
    qube = app.domains.get(options.qube, None)
    file = PolicyFile()
    with file.locked():
        there = _routes(_values(qube) if qube else {})
        before = file.text()
        ours = {
            call: rule
            for call, rule in rules(before).items()
            if call.qube == options.qube
        }
        calls = {_call(options.qube, one): None for one in there.given}
        chosen = [
            call for call in {**calls, **ours} if _is_meant(call, options)
        ]
        if not chosen:
            if qube is None:
                raise UsageProblem(
                    f"there is no qube {options.qube}, nor a route"
                )
            raise UsageProblem(
                f"{options.qube} has no such route from dom0: qvm-connect-route"
                f" list {options.qube} shows those there are"
            )
        if len(chosen) > 1 and not options.all:
            raise UsageProblem(
                "which of them, or --all?"
                + "".join(f" {' '.join(call[1:])};" for call in chosen)[:-1]
            )
        change = _without(options, chosen, there, ours, file, before)
        file.check(change.text)
        if not options.dry_run:
            _carry_out(file, before, change, qube, there.values, opens=False)
    _tell(change, options.dry_run)
    return 0


def _is_meant(call: Call, options: argparse.Namespace) -> bool:
    words = (options.kind, options.argument, options.target)
    if options.kind is None and not options.all:
        raise UsageProblem(
            f"write remove {call.qube} KIND ARGUMENT [TARGET [ADDRESS...]], or"
            " --all"
        )
    return all(
        word is None or word == own
        for word, own in zip(words, call[1:], strict=True)
    )


def _without(
    options: argparse.Namespace,
    chosen: list[Call],
    there: Routes,
    ours: dict[Call, Any],
    file: PolicyFile,
    before: str,
) -> Change:
    """Take away the addresses that are meant, and the rules of calls that have
    none left."""
    change = Change([], {}, before)
    text = before
    for call in chosen:
        mine = [one for one in there.given if _call(options.qube, one) == call]
        keys = {one.address.key for one in mine}
        if options.addresses:
            keys = {_key(call, address) for address in options.addresses}
        gone = [one for one in mine if one.address.key in keys]
        if options.addresses and not gone:
            raise UsageProblem(
                f"{' '.join(call[1:])} has no such address, but"
                f" {_shown(mine) or 'none'}"
            )
        for one in gone:
            old = change.values.get(one.key, there.values[one.key])
            new = _value_without(old or "", one)
            change.values[one.key] = new or None
        if call in ours and len(gone) == len(mine):
            text = without_rule(text, call)
            if ours[call].words:
                words = " ".join(ours[call].words)
                change.said.append(f"- {file.path}: {words}")
            else:
                change.said.append(f"- {file.path}: {call.mark}")
    for name, value in change.values.items():
        old = there.values[name]
        change.said.append(
            f"- feature of {options.qube}: {FEATURE}{name} '{old}'"
        )
        if value is not None:
            change.said.append(
                f"+ feature of {options.qube}: {FEATURE}{name} '{value}'"
            )
    return change._replace(text=text)


def _key(call: Call, address: str) -> AddressKey:
    port = port_of(call.kind, call.argument)
    return parse_address(address, port, SPECIFIERS).key


def _value_without(value: str, gone: Given) -> str:
    """A feature's value without one address; what else is in there stays as
    it was written."""
    kept = []
    for part in re.split(r"[;\n\r]", value):
        given = _routes({gone.key: part}).given
        left = [one for one in given if one.address.key != gone.address.key]
        if len(left) == len(given):
            kept.append(part.strip())
        elif left:
            words = part.split()[:3]
            kept.append(
                " ".join([*words, *(one.address.written for one in left)])
            )
    return "; ".join(part for part in kept if part)


# ------------------------------------------------------------------------- list


class Row(NamedTuple):
    """A line of the list."""

    qube: str
    kind: str
    argument: str
    target: str
    address: str
    policy: str


def _list(options: argparse.Namespace) -> int:
    app = options.app
    text = PolicyFile().text()
    names = sorted(vm.name for vm in app.domains if vm.name != "dom0")
    for name in options.qubes:
        check_target(name)
        if name not in names and not _left_of(name, text):
            raise UsageProblem(
                f"there is no qube {name}: qvm-ls shows those there are"
            )
    found: list[tuple[Row | None, str]] = []
    decisions = Decisions(app)
    gone = sorted({call.qube for call in rules(text)} - set(names))
    for name in [*names, *gone]:
        if options.qubes and name not in options.qubes:
            continue
        there = _routes(_values(app.domains[name]) if name in names else {})
        found += _rows(name, there, text, decisions, name in names)
    _show(found)
    return 0


def _left_of(name: str, text: str) -> bool:
    return any(call.qube == name for call in rules(text))


def _rows(
    name: str, there: Routes, text: str, decisions: Decisions, exists: bool
) -> Iterator[tuple[Row | None, str]]:
    ours = {
        call: rule for call, rule in rules(text).items() if call.qube == name
    }
    seen = set()
    for one in there.given:
        call = _call(name, one)
        decision = decisions.of(call)
        words = f"{name} {one.kind} {one.argument} {one.target}"
        note = ""
        if call in seen:
            pass
        elif decision.denies:
            rule = ours.get(call)
            note = (
                f"{words}: there is an address, and policy denies what it is"
                " for"
            )
            if rule is None or not rule.words:
                note += (
                    f"; qvm-connect-route add {words}"
                    f" {one.address.written} would write a line"
                )
        seen.add(call)
        yield Row(*call, one.address.written, str(decision)), note
    for call, rule in ours.items():
        if call in seen:
            continue
        yield (
            Row(*call, "-", str(decisions.of(call)) if exists else "-"),
            f"{call}: there is a line of policy (line {rule.number}), and no"
            f" {'address' if exists else 'such qube'}; qvm-connect-route remove"
            f" {call} takes it away",
        )
    for bad in there.bad:
        yield (
            None,
            f"{name}: {bad}; qvm-features --unset {name} {FEATURE}{bad.key}"
            " takes it away",
        )


def _show(found: list[tuple[Row | None, str]]) -> None:
    """A table of the rows, and below it what does not agree."""
    rows = [row for row, _ in found if row]
    if not rows:
        print("dom0 gives no routes.")
    else:
        rows.insert(0, Row(*(name.upper() for name in Row._fields)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (
            printable(cell).ljust(width)
            for cell, width in zip(row, widths, strict=True)
        )
        print("  ".join(cells).rstrip())
    for _, note in found:
        if note:
            print(f"! {printable(note)}")
