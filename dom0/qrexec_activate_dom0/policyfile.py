"""The file of policy that qvm-connect-route writes in dom0.

Above each rule of its own stands a line that says whose it is, and it changes
no other. A change is one rename, of a file that qrexec does not read before: a
name with a `!`, as the admin API of policy has it until its file is whole, ends
all calls of all qubes for as long as it is there (qrexec 4.4.2).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import qrexec
from qrexec.exc import AccessDenied
from qrexec.policy.parser import ValidateParser

from .errors import ActivateError, BadName
from .given.kinds import RPCS
from .printable import printable
from .routing.names import check_argument, check_target
from .steps import Step

__all__ = ["Call", "PolicyFile", "Rule", "rules", "with_rule", "without_rule"]

#: After what a person writes in 30-user.policy, before what denies the rest.
NAME = "31-qvm-connect-route.policy"
#: qrexec reads no file whose name begins with a dot.
UNFINISHED = f".{NAME}."
HEADER = """\
## Written by qvm-connect-route, each rule below a line that says whose it is.
## Rules of your own belong in 30-user.policy, which comes first.

"""
#: Some megabytes: nobody has written that by hand, nor by this.
LONGEST = 1 << 22

_MARK = re.compile(r"# (\S+): (\S+) (\S+) (\S+) *")


class Call(NamedTuple):
    """What a rule is for: all routes of a qube that make one call."""

    qube: str
    kind: str
    argument: str
    target: str

    def __str__(self) -> str:
        return f"{self.qube} {self.kind} {self.argument} {self.target}"

    @property
    def service(self) -> str:
        return RPCS[self.kind]

    @property
    def mark(self) -> str:
        return f"# {self.qube}: {self.kind} {self.argument} {self.target}"


class Rule(NamedTuple):
    """Where a rule stands, counted from 1, and its words: none where the line
    is another than was written there."""

    number: int
    words: tuple[str, ...]


def _marked(line: str) -> Call | None:
    """The call that a line of ours names."""
    if not (match := _MARK.fullmatch(line)):
        return None
    call = Call(*match.groups())
    try:
        if call.kind not in RPCS or call.qube.startswith("@"):
            return None
        check_target(call.qube)
        check_target(call.target)
        check_argument(call.service, call.argument)
    except BadName:
        return None
    return call


def _words(call: Call, line: str) -> tuple[str, ...]:
    """The words of a rule for this call; a person may have changed what it
    does, but not what it is for."""
    words = tuple(line.split())
    if len(words) < 5 or not line.replace("\t", " ").isprintable():
        return ()
    service, argument, source, target = words[:4]
    if (service, argument, target) != (
        call.service,
        f"+{call.argument}",
        call.target,
    ):
        return ()
    return words if source in (call.qube, *_tag(source)) else ()


def _tag(source: str) -> tuple[str, ...]:
    return (source,) if source.startswith("@tag:") else ()


def _found(lines: list[str]) -> Iterator[tuple[int, Call, tuple[str, ...]]]:
    for index, line in enumerate(lines):
        if call := _marked(line):
            following = lines[index + 1] if index + 1 < len(lines) else ""
            yield index, call, _words(call, following)


def rules(text: str) -> dict[Call, Rule]:
    """The rules that were written by this; of two for one call, the first."""
    found: dict[Call, Rule] = {}
    for index, call, words in _found(text.split("\n")):
        found.setdefault(call, Rule(index + 2, words))
    return found


def without_rule(text: str, call: Call) -> str:
    """Take away the rules for a call, and no line that is another's; empty
    where nothing but the header is left."""
    lines = text.split("\n")
    for index, other, words in reversed(list(_found(lines))):
        if other == call:
            del lines[index : index + (2 if words else 1)]
    left = "\n".join(lines)
    return "" if left.strip() in ("", HEADER.strip()) else left


def with_rule(text: str, call: Call, words: list[str]) -> str:
    """Put a rule in the place of what there is for the call, or at the end."""
    lines = text.split("\n")
    for index, other, old in _found(lines):
        if other == call and old:
            lines[index + 1] = " ".join(words)
            return "\n".join(lines)
    text = without_rule(text, call) or HEADER
    end = "" if text.endswith("\n") else "\n"
    return f"{text}{end}{call.mark}\n{' '.join(words)}\n"


# --------------------------------------------------------------------- on disk


class PolicyFile:
    """The file as it is while nobody else changes policy."""

    def __init__(self) -> None:
        self.folder = Path(qrexec.POLICYPATH)
        self.path = self.folder / NAME

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Take turns with other runs and with the admin API of policy, by the
        lock that the latter has; and tidy up after a run that was killed."""
        try:
            lock = os.open(self.folder, os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise ActivateError(
                f"cannot open {self.folder}: {error.strerror}"
            ) from error
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(
                    "Waiting for another program that changes policy",
                    file=sys.stderr,
                )
                fcntl.flock(lock, fcntl.LOCK_EX)
            for path in self.folder.glob(f"{UNFINISHED}*"):
                with contextlib.suppress(OSError):
                    path.unlink()
            yield
        finally:
            os.close(lock)

    def text(self) -> str:
        """What is in there; empty where there is no file."""
        try:
            descriptor = os.open(self.path, os.O_RDONLY | os.O_NOFOLLOW)
            with open(descriptor, encoding="utf-8", newline="") as file:
                text = file.read(LONGEST)
        except FileNotFoundError:
            return ""
        except (OSError, UnicodeError) as error:
            raise ActivateError(
                f"cannot read {self.path}: {error}; mend it by hand"
            ) from error
        if len(text) == LONGEST:
            raise ActivateError(f"{self.path} is too long; mend it by hand")
        return text

    def check(self, text: str) -> None:
        """Raise ActivateError unless all of dom0's policy parses with this."""
        try:
            ValidateParser(
                policy_path=self.folder,
                overrides={self.path: text or None},
            )
        except (AccessDenied, OSError, UnicodeError) as error:
            raise ActivateError(
                f"the policy would not be valid, so nothing was changed:"
                f" {printable(str(error))}"
            ) from error

    @contextlib.contextmanager
    def replacing(self, text: str) -> Iterator[Step]:
        """The step to this text, which is on the disk already, and so is what
        leads back: neither needs room any more."""
        new = old = None
        try:
            try:
                if text:
                    new = self._written(text)
                if os.path.lexists(self.path):
                    old = self._name()
                    os.link(self.path, old)
                self._sync()
            except OSError as error:
                raise ActivateError(
                    f"cannot write {self.path}, so nothing was changed:"
                    f" {error.strerror}"
                ) from error

            def move(source: Path | None) -> None:
                if source and self._is(source):
                    return
                if source:
                    source.rename(self.path)
                else:
                    self.path.unlink(missing_ok=True)
                self._sync()

            yield Step(
                lambda: move(new), lambda: move(old), f"look at {self.path}"
            )
        finally:
            for path in (new, old):
                if path:
                    with contextlib.suppress(OSError):
                        path.unlink(missing_ok=True)

    def _is(self, path: Path) -> bool:
        try:
            return self.path.samefile(path)
        except FileNotFoundError:
            return False

    def _name(self) -> Path:
        return Path(tempfile.mktemp(prefix=UNFINISHED, dir=self.folder))

    def _written(self, text: str) -> Path:
        """A file with this text, with the rights that files of policy have."""
        descriptor, name = tempfile.mkstemp(prefix=UNFINISHED, dir=self.folder)
        path = Path(name)
        try:
            with open(descriptor, "w", encoding="utf-8", newline="") as file:
                file.write(text)
                file.flush()
                os.fchmod(file.fileno(), 0o664)
                with contextlib.suppress(LookupError, PermissionError):
                    shutil.chown(name, group="qubes")
                os.fsync(file.fileno())
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        return path

    def _sync(self) -> None:
        descriptor = os.open(self.folder, os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
