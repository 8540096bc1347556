"""Policy of the loopback qrexec: parse the 5.0 format, decide one call.

Text and names in, a decision out: no I/O. As in dom0, the first line that
matches decides, and what no line allows is refused. What this parser does not
know (tags, includes) is an error, never a line that is skipped: a skipped
`deny` would allow.
"""

from __future__ import annotations

# typing.TYPE_CHECKING without its import: the client must start quickly.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

DEFAULT = "@default"
ADMIN = "@adminvm"
DISPOSABLE = "@dispvm"
DEFAULT_TEMPLATE = "default-dvm"
"""The pretend qube whose services answer a call to a plain `@dispvm`."""

MAX_QUBE_NAME = 31
NAME_CHARACTERS = frozenset(
    "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_-."
)
CALL_CHARACTERS = NAME_CHARACTERS | {"+"}
ACTIONS = ("allow", "deny", "ask")
IGNORED_PARAMETERS = ("user", "notify", "autostart")


class PolicyError(ValueError):
    """A policy line that cannot be read; the text names the line and what is
    wrong with it."""


class Rule:
    """One policy line. `argument` is `*`, or `+` and the exact argument."""

    __slots__ = (
        "action",
        "argument",
        "default_target",
        "line",
        "redirect",
        "service",
        "source",
        "target",
    )

    def __init__(
        self,
        line: int,
        service: str,
        argument: str,
        source: str,
        target: str,
        action: str,
        redirect: str = "",
        default_target: str = "",
    ) -> None:
        self.line = line
        self.service = service
        self.argument = argument
        self.source = source
        self.target = target
        self.action = action
        self.redirect = redirect
        self.default_target = default_target

    def matches(
        self, service: str, argument: str, source: str, target: str
    ) -> bool:
        return (
            self.service in ("*", service)
            and self.argument in ("*", "+" + argument)
            and (self.source in ("*", "@anyvm") or self.source == source)
            and (
                self.target == "*"
                or (self.target == "@anyvm" and target != ADMIN)
                or self.target == target
            )
        )


class Decision:
    """What policy says: `allow`, `ask` or `refuse`; the qube that would run the
    service; and why."""

    __slots__ = ("action", "reason", "resolved")

    def __init__(self, action: str, resolved: str, reason: str) -> None:
        self.action = action
        self.resolved = resolved
        self.reason = reason


def sanitise(name: str) -> str:
    """Service or argument as policy sees it: every byte outside `A-Za-z0-9_-.+`
    silently becomes `_`."""
    if all(char in CALL_CHARACTERS for char in name):
        return name
    name = name.encode("utf-8", "surrogateescape").decode(
        "latin-1"
    )  # by byte, as qrexec does, not by character
    return "".join(char if char in CALL_CHARACTERS else "_" for char in name)


def is_qube_name(name: str) -> bool:
    return (
        0 < len(name) <= MAX_QUBE_NAME
        and name[0].isascii()
        and name[0].isalpha()
        and all(char in NAME_CHARACTERS for char in name)
    )


def effective_target(asked: str, is_known: Callable[[str], bool]) -> str:
    """The target as policy sees it: a name that is unknown or malformed
    silently becomes `@default`. Empty for a keyword that is none, or a
    disposable of an unknown qube, which are refused."""
    asked = asked.replace("$", "@")
    if asked in ("dom0", ADMIN):
        return ADMIN
    if asked in (DEFAULT, DISPOSABLE):
        return asked
    name = asked.removeprefix(DISPOSABLE + ":")
    if is_qube_name(name) and is_known(name):
        return asked
    return "" if asked.startswith("@") else DEFAULT


def parse(text: str) -> list[Rule]:
    """The lines of one policy file. PolicyError names the first line that is no
    policy line."""
    rules = []
    for number, line in enumerate(text.split("\n"), 1):
        words = line.split()
        if words and not words[0].startswith("#"):
            rules.append(_parse_line(number, words))
    return rules


def _parse_line(number: int, words: list[str]) -> Rule:
    def fail(problem: str) -> PolicyError:
        return PolicyError(f"line {number}: {problem}")

    if words[0].startswith("!"):
        raise fail(f"the directive {words[0]} is not known here")
    if len(words) < 5:
        raise fail(
            "five fields are needed: SERVICE +ARGUMENT|* SOURCE TARGET ACTION"
        )
    service, argument, source, target, action = words[:5]
    if service != "*" and not all(char in NAME_CHARACTERS for char in service):
        raise fail(f"{service!r} is no service")
    if argument != "*" and not (
        argument[0] == "+" and all(char in CALL_CHARACTERS for char in argument)
    ):
        raise fail(f"{argument!r} is neither * nor +ARGUMENT")
    if service == "*" and argument != "*":
        raise fail("the service * needs the argument *")
    if source not in ("*", "@anyvm") and not is_qube_name(source):
        raise fail(f"{source!r} is no source known here")
    target = _rule_target(target)
    if not target:
        raise fail(f"{words[3]!r} is no target known here")
    if action not in ACTIONS:
        raise fail(f"{action!r} is none of {', '.join(ACTIONS)}")
    rule = Rule(number, service, argument, source, target, action)
    for word in words[5:]:
        key, equals, value = word.partition("=")
        if not equals:
            raise fail(f"{word!r} is no parameter=value")
        if key in IGNORED_PARAMETERS:
            continue
        place = _rule_target(value)
        if not place or place in ("*", "@anyvm", DEFAULT):
            raise fail(f"{word!r} names no qube")
        if key == "target" and action != "deny":
            rule.redirect = place
        elif key == "default_target" and action == "ask":
            rule.default_target = place
        else:
            raise fail(f"{key!r} does not belong to {action}")
    return rule


def _rule_target(word: str) -> str:
    """A target as written in a policy line, dom0 under one name; empty if it is
    none."""
    if word in ("dom0", ADMIN):
        return ADMIN
    if word in ("*", "@anyvm", DEFAULT, DISPOSABLE) or is_qube_name(
        word.removeprefix(DISPOSABLE + ":")
    ):
        return word
    return ""


def decide(
    rules: list[Rule] | None,
    service: str,
    argument: str,
    source: str,
    target: str,
    is_known: Callable[[str], bool],
) -> Decision:
    """Decide one call to an effective target. Without rules (None) a call to
    any known qube is allowed."""
    if not target:
        return Decision("refuse", "", "that is no target")
    if rules is None:
        if target == ADMIN:
            return Decision(
                "refuse", "dom0", "dom0 needs a policy line of its own"
            )
        return _resolve(
            "allow", target, source, is_known, "there is no policy file"
        )
    for rule in rules:
        if rule.matches(service, argument, source, target):
            why = f"policy line {rule.line}"
            if rule.action == "deny":
                return Decision("refuse", "", f"{why} denies it")
            place = rule.redirect or target
            if place == DEFAULT:
                place = rule.default_target or DEFAULT
            return _resolve(rule.action, place, source, is_known, why)
    return Decision("refuse", "", "no policy line matches")


def _resolve(
    action: str,
    place: str,
    source: str,
    is_known: Callable[[str], bool],
    why: str,
) -> Decision:
    if place == DEFAULT:
        return Decision("refuse", "", f"{why}, but @default names no qube")
    if place == ADMIN:
        qube = "dom0"
    elif place == DISPOSABLE:
        qube = DEFAULT_TEMPLATE
    else:
        qube = place.removeprefix(DISPOSABLE + ":")
    if place == source:
        return Decision("refuse", qube, f"{why}, but a qube cannot call itself")
    if not is_known(qube):
        return Decision("refuse", qube, f"{why}, but there is no qube {qube}")
    return Decision(action, qube, why)
