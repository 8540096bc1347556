"""What the daemons wrote to the journal: the record of every connection, and
what they warned of; and what other units wrote."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..errors import ActivateError
from .journal import IDENTIFIER
from .shown import plain_address
from .unitdirs import unit_words

if TYPE_CHECKING:
    from .units import Manager

__all__ = [
    "Record",
    "control_groups_of",
    "messages",
    "records",
    "unit_records",
]

FIELDS = (
    "MESSAGE",
    "PRIORITY",
    "CONNECTION_ID",
    "QREXEC_TARGET",
    "QREXEC_SERVICE",
    "PEER",
    "LISTENER",
    "UNIT",
    "OUTCOME",
    "ESTABLISHED",
    "EXIT_CODE",
    "TRIES",
    "SETUP_USEC",
    "DURATION_USEC",
    "BYTES_TO_QUBE",
    "BYTES_FROM_QUBE",
    "_SYSTEMD_CGROUP",
    "_SYSTEMD_UNIT",
    "_SYSTEMD_USER_UNIT",
)
_WARNING = 4
#: What journalctl says to whom it does not show all (systemd 252 to 257; it has
#: no translations).
_NO_JOURNALCTL = "journalctl is not installed: the log is in the journal"
_NO_JOURNAL = "No journal files were found"
_CLOSED = ("You are currently not seeing messages", "insufficient permissions")


@dataclass(frozen=True, slots=True)
class Record:
    """One journal record; `fields` holds what the daemon wrote, as text."""

    when: float
    message: str
    priority: int
    fields: dict[str, str]
    cursor: str

    @property
    def connection(self) -> str:
        return self.fields.get("CONNECTION_ID", "")

    @property
    def unit(self) -> str:
        """The service that wrote it, by its control group: the journal's own
        fields name it only below a manager that logind has started."""
        return self.fields.get("_SYSTEMD_CGROUP", "").rpartition("/")[2]

    @property
    def is_warning(self) -> bool:
        return self.priority <= _WARNING

    def matches(self, word: str) -> bool:
        """Whether a person who writes this word may mean this record."""
        names = (
            "CONNECTION_ID",
            "LISTENER",
            "QREXEC_TARGET",
            "QREXEC_SERVICE",
            "OUTCOME",
        )
        return word in unit_words(self.fields.get("UNIT", "")) or word in (
            self.fields.get(name) for name in names
        )


@contextmanager
def records(
    *,
    user: bool,
    control_group: str = "",
    daemons: Collection[str] | None = None,
    follow: bool = False,
    since: str | None = None,
    until: str | None = None,
    after: str | None = None,
    latest_first: bool = False,
) -> Iterator[Iterator[Record]]:
    """Yield the records of this manager's daemons; raises ActivateError where
    the journal cannot be read.

    A user may have several managers; the control group tells them apart, where
    it is known. What is not of one of the `daemons`, where these are known, is
    not believed; nor is what a qube has its end of a call say on stderr, which
    the journal takes from the daemon's unit, too, but not as a record.
    """
    matches = [f"SYSLOG_IDENTIFIER={IDENTIFIER}", "_TRANSPORT=journal"]
    matches += [f"_UID={os.getuid()}"] if user else []
    choice = _choice(follow, since, until, after, latest_first)
    with _journal([*choice, *matches], user=user) as found:
        yield (
            record
            for record in found
            if (daemons is None or record.unit in daemons)
            and _is_of(record, user, control_group)
        )


def control_groups_of(
    manager: Manager, services: Sequence[str]
) -> dict[str, str]:
    """In which control group each service runs, or would."""
    (top,) = manager.manager_properties("ControlGroup")
    rows = manager.unit_properties(services, "Service", ["Slice"])
    return {
        unit: "/".join([top or "", *_slices(row["Slice"] or ""), unit])
        for unit, row in zip(services, rows, strict=True)
    }


def _slices(name: str) -> list[str]:
    """A slice, and before it those that it is in, as its name says."""
    parts = name.removesuffix(".slice").split("-")
    return [f"{'-'.join(parts[: at + 1])}.slice" for at in range(len(parts))]


@contextmanager
def unit_records(
    control_groups: Mapping[str, str],
    *,
    user: bool,
    **choice: Any,
) -> Iterator[Iterator[Record]]:
    """Yield what these units of this manager write, and what systemd says of
    them, without the fields that a program may choose; each has the control
    group in which it runs. The rest is as with records()."""
    matches: list[str] = []
    for unit, group in control_groups.items():
        of_unit = (
            [f"_SYSTEMD_USER_UNIT={unit}", f"_UID={os.getuid()}"],
            [f"USER_UNIT={unit}", f"_UID={os.getuid()}"],
            # Of a program that has ended before the journal looked at it, which
            # it takes from root alone that it is of this unit.
            [
                f"SYSLOG_IDENTIFIER={unit.removesuffix('.service')}",
                f"_UID={os.getuid()}",
                "_TRANSPORT=stdout",
            ],
        )
        of_system = [f"_SYSTEMD_UNIT={unit}"], [f"UNIT={unit}", "_PID=1"]
        for words in (
            [f"_SYSTEMD_CGROUP={group}"],
            *(of_unit if user else of_system),
        ):
            matches += ["+"] * bool(matches) + words
    with _journal([*_choice(**choice), *matches], user=user) as found:
        yield (
            replace(
                record,
                fields={
                    name: text
                    for name, text in record.fields.items()
                    if name == "_SYSTEMD_CGROUP"
                },
            )
            for record in found
        )


def _choice(
    follow: bool = False,
    since: str | None = None,
    until: str | None = None,
    after: str | None = None,
    latest_first: bool = False,
) -> list[str]:
    """Which records journalctl is to show, of those that match."""
    words = ["--follow"] if follow else []
    words += ["--reverse"] if latest_first else []
    words += [f"--since={since}"] if since else []
    words += [f"--until={until}"] if until else []
    words += (
        [f"--after-cursor={after}"]
        if after
        else ["--lines=0"]
        if follow
        else []
    )
    return words


@contextmanager
def _journal(choice: list[str], *, user: bool) -> Iterator[Iterator[Record]]:
    words = [
        "journalctl",
        "--no-pager",
        "--output=json",
        f"--output-fields={','.join(FIELDS)}",
        *choice,
    ]
    with tempfile.TemporaryFile() as said:
        try:
            process = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=said,
                encoding="utf-8",
                errors="backslashreplace",
            )
        except FileNotFoundError:
            raise ActivateError(_NO_JOURNALCTL) from None

        def found() -> Iterator[Record]:
            assert process.stdout is not None
            for line in process.stdout:
                if record := _parse(line):
                    yield record
            # It has come to its end by itself.
            code = process.wait()
            said.seek(0)
            _complain(code, said.read().decode(errors="backslashreplace"), user)

        with process:
            try:
                yield found()
            finally:
                process.kill()


def messages(*matches: str, user: bool) -> list[str]:
    """The text of what matches, since this machine was started; raises
    ActivateError where the journal cannot be read."""
    words = ["journalctl", "--no-pager", "--boot", "--output=cat", *matches]
    try:
        done = subprocess.run(
            words,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="backslashreplace",
            check=False,
        )
    except FileNotFoundError:
        raise ActivateError(_NO_JOURNALCTL) from None
    _complain(done.returncode, done.stderr, user)
    if _NO_JOURNAL in done.stderr:
        raise ActivateError("there is no journal")
    return done.stdout.splitlines()


def _complain(code: int, said: str, user: bool) -> None:
    """Raise ActivateError where journalctl has failed, or shows nothing of what
    it was asked for."""
    closed = any(words in said for words in _CLOSED)
    if closed and (code or not user):
        whose = "your journal" if user else "the system's journal"
        raise ActivateError(
            f"{whose} is closed to you: use sudo, or join the group"
            f" systemd-journal"
        )
    if code:
        raise ActivateError(f"journalctl: {' '.join(said.split()) or code}")


def _parse(line: str) -> Record | None:
    try:
        raw: dict[str, Any] = json.loads(line)
        fields = {
            name: _text(raw[name])
            for name in FIELDS
            if raw.get(name) is not None
        }
        if "LISTENER" in fields:
            # As the files have it, and so everybody who asks.
            fields["LISTENER"] = plain_address(fields["LISTENER"])
        return Record(
            int(raw["__REALTIME_TIMESTAMP"]) / 1e6,
            fields.get("MESSAGE", ""),
            int(fields.get("PRIORITY", "6")),
            fields,
            str(raw["__CURSOR"]),
        )
    except (ValueError, LookupError, TypeError):
        return None


def _text(value: Any) -> str:
    """journalctl writes what is no UTF-8 as a list of bytes, and repeated
    fields as a list of texts."""
    if isinstance(value, list):
        if all(isinstance(item, int) for item in value):
            return bytes(value).decode(errors="backslashreplace")
        return str(value[-1])
    return str(value)


def _is_of(record: Record, user: bool, control_group: str) -> bool:
    """Whether a record is of a daemon of the user's manager, or else of the
    system's."""
    fields = record.fields
    if user and control_group and (own := fields.get("_SYSTEMD_CGROUP")):
        return own.startswith(f"{control_group}/")
    of_system = "_SYSTEMD_USER_UNIT" not in fields and fields.get(
        "_SYSTEMD_UNIT", ""
    ).endswith(".service")
    return user is not (
        of_system and not fields["_SYSTEMD_UNIT"].startswith("user@")
    )
