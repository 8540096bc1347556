"""How often each name was called, and how often that or its program failed,
since the qube was started: what the journal has of it.

qubes.ConnectUnix writes a line for each call that has ended. What comes another
way, through Caddy or from a program of this qube, is in none of them. Where the
journal cannot be read, nothing is known, and nothing is said.
"""

from __future__ import annotations

import os
import pwd
import re
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

from ..control.publications import RPC
from ..errors import ActivateError
from ..systemd.journalreader import messages

__all__ = ["Calls", "count_calls", "count_failures", "failures", "parse_calls"]

_CALL = re.compile(
    r"(?:unknown caller|[A-Za-z0-9_.@:+-]+): (?:"
    r"(?P<how>connected|could not connect) to (?P<name>[A-Za-z0-9_.+-]+),"
    r" exit code (?P<code>[0-9]+)"
    r"|failed: cannot connect to .*?/(?P<missing>[A-Za-z0-9_.+-]+): .*)",
    re.ASCII,
)
#: socat's exit code where the caller has gone before the service was done.
CALLER_GONE = "143"
#: systemd's id of what it says of a unit that has failed.
UNIT_FAILED = "d9b373ed55a64feb8242e02dbe79a49c"


class Calls(NamedTuple):
    """Calls of a name that have ended, and those of them that failed."""

    ended: int = 0
    failed: int = 0


def parse_calls(lines: Iterable[str]) -> dict[str, Calls]:
    """Count what qubes.ConnectUnix has written, by name."""
    ended: Counter[str] = Counter()
    failed: Counter[str] = Counter()
    for line in lines:
        if (match := _CALL.fullmatch(line)) is None:
            continue
        name = match["name"] or match["missing"]
        ended[name] += 1
        failed[name] += match["how"] != "connected" or match["code"] not in (
            "0",
            CALLER_GONE,
        )
    return {name: Calls(ended[name], failed[name]) for name in ended}


def failures(lines: Iterable[str]) -> Counter[str]:
    """Count what systemd has written of units that have failed, by unit."""
    return Counter(line.partition(": ")[0] for line in lines)


def count_calls(caller: str) -> dict[str, Calls] | None:
    """The calls by name; `caller` is as whom qrexec runs services, for root.
    None where they are not known."""
    uids = {os.geteuid()}
    if os.geteuid() == 0 and caller:
        uids.add(pwd.getpwnam(caller).pw_uid)
    matches = [f"SYSLOG_IDENTIFIER={RPC}", "_TRANSPORT=syslog"]
    found = _messages(
        *matches, *(f"_UID={uid}" for uid in sorted(uids)), user=True
    )
    return None if found is None else parse_calls(found)


def count_failures(*, user: bool) -> Counter[str] | None:
    """How often units of this manager have failed; None where that is not
    known."""
    whose = f"_UID={os.geteuid()}" if user else "_PID=1"
    found = _messages(f"MESSAGE_ID={UNIT_FAILED}", whose, user=user)
    return None if found is None else failures(found)


def _messages(*matches: str, user: bool) -> list[str] | None:
    try:
        return messages(*matches, user=user)
    except ActivateError:
        return None
