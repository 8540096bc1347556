"""What --dry-run shows is what is then done: the same files, the same commands
of systemctl, in the same order. And it does none of it."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from desk import Desk

from qrexec_activate.loopback.machine import Machine

#: Verbs that change nothing.
QUESTIONS = ("is-active", "show", "status", "cat")
#: How the files and links of a person look: not those by which systemd
#: enables units, and no sockets.
LOOK = (
    'find "$UNITS" "$NAMES" -path "*.wants" -prune -o \\( -type f -o -type l'
    ' \\) -printf "%p %i %s %T@ %l\\n" 2>/dev/null | sort | md5sum'
)


class Clerk:
    """Runs commands, and notes what they really do."""

    def __init__(self, desk: Desk, folder: Path) -> None:
        self.desk = desk
        self.units = desk.machine.unit_dir
        self.names = desk.machine.runtime / "qubes.ConnectUnix"
        self.log = folder / "log"
        self.environment = {
            "PATH": f"{folder}:{os.environ['PATH']}",
            "UNITS": str(self.units),
            "NAMES": str(self.names),
        }
        systemctl = folder / "systemctl"
        systemctl.write_text(
            f"#!/bin/sh\nlook=$({LOOK})\n"
            "how=${SYSTEMD_OFFLINE:+env SYSTEMD_OFFLINE=$SYSTEMD_OFFLINE }\n"
            f'echo "$look ${{how}}systemctl $*" >>{self.log}\n'
            f'exec {shutil.which("systemctl")} "$@"\n'
        )
        systemctl.chmod(0o755)

    def look(self) -> str:
        return subprocess.run(
            ["sh", "-c", LOOK],
            env={**os.environ, **self.environment},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()

    def files(self) -> dict[str, str]:
        """Path → text, or where a link leads."""
        return {
            str(path): f"-> {os.readlink(path)}"
            if path.is_symlink()
            else path.read_text()
            for top in (self.units, self.names)
            for path in top.rglob("*")
            if not path.parent.name.endswith(".wants")
            and (path.is_symlink() or path.is_file())
        }

    def run(self, *words: str, **environment: str) -> str:
        return self.desk.run(
            *words, environment={**self.environment, **environment}
        )

    def done(self, before: str, after: str) -> list[str]:
        """The commands of systemctl, and FILES where files changed between
        them."""
        acts = []
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        for line in [*lines, f"{after} systemctl the end"]:
            look, said = line[: len(after)], line[len(after) + 1 :]
            if look != before:
                acts.append("FILES")
                before = look
            verb = said.partition("systemctl ")[2].removeprefix("--user ")
            if verb.split()[0] not in QUESTIONS:
                acts.append(f"$ {said}")
        assert acts.pop() == "$ systemctl the end"
        return acts

    def rehearse(self, *words: str, **environment: str) -> None:
        """Run a command with and without --dry-run, and compare."""
        self.log.unlink(missing_ok=True)
        files, look = self.files(), self.look()
        shown = self.run(*words, "--dry-run", **environment)
        assert self.done(look, self.look()) == []
        self.run(*words, **environment)
        acts, changes = understood(shown, files)
        assert acts
        assert acts == self.done(look, self.look())
        assert {**files, **changes} == {
            **dict.fromkeys({*files, *changes}),
            **self.files(),
        }


def understood(
    shown: str, before: dict[str, str]
) -> tuple[list[str], dict[str, str | None]]:
    """What a person reads there: acts, and what becomes of files."""
    acts: list[str] = []
    changes: dict[str, str | None] = {}
    path = ""
    for line in shown.splitlines(keepends=True):
        if line.startswith("# /"):
            path, _, gone = line[2:].strip().partition(": ")
            assert gone in ("", "removed")
            changes[path] = None if gone else ""
        elif line.startswith(("$ ln -s ", "$ ln -sfT ")):
            target, path = shlex.split(line)[3:]
            changes[path] = f"-> {target}"
        elif line.startswith("$ rm "):
            (path,) = shlex.split(line[len("$ rm ") :])
            changes[path] = None
        elif line.startswith("$ "):
            path = ""
            acts.append(line.strip())
            continue
        else:
            assert path, line
            changes[path] = f"{changes[path]}{line}"
        if acts[-1:] != ["FILES"]:
            acts.append("FILES")
    # An empty line ends a file.
    for path, text in changes.items():
        if text and not text.startswith("-> "):
            changes[path] = text.removesuffix("\n")
    return acts, {
        path: text for path, text in changes.items() if before.get(path) != text
    }


@pytest.fixture
def desk(shared_machine: Machine) -> Iterator[Desk]:
    desk = Desk(shared_machine)
    yield desk
    desk.leave()


@pytest.fixture
def clerk(desk: Desk, tmp_path: Path) -> Clerk:
    return Clerk(desk, tmp_path)


def one(desk: Desk) -> None:
    desk.run("add", "tcp", str(desk.port), "gitweb")


def two_of_a_unit(desk: Desk) -> None:
    for number, target in ((1, "gitweb"), (2, "work")):
        desk.drop_in(
            desk.tcp,
            target,
            "[Socket]",
            f"ListenStream=127.0.0.{number}:{desk.port}",
            f"FileDescriptorName={target}",
        )
    desk.start(desk.tcp)


def one_stopped(desk: Desk) -> None:
    one(desk)
    desk.run("disable", "gitweb", "--now")


def an_rpc(desk: Desk) -> None:
    desk.run("add-rpc", "my-rpc", "my.Rpc")


def nothing(desk: Desk) -> None:
    pass


ROUTES: list[tuple[Callable[[Desk], None], str]] = [
    (nothing, "add tcp PORT gitweb"),
    (nothing, "add tcp PORT gitweb --no-start"),
    (one_stopped, "add tcp PORT gitweb"),
    (two_of_a_unit, "add tcp PORT vault"),
    (one, "remove gitweb"),
    (two_of_a_unit, "remove gitweb"),
    (two_of_a_unit, "remove gitweb work"),
    (two_of_a_unit, "retarget gitweb vault"),
    (one_stopped, "retarget gitweb vault"),
    (one_stopped, "enable gitweb"),
    (one_stopped, "enable gitweb --now"),
    (one_stopped, "start gitweb"),
    (one, "stop gitweb"),
    (one, "disable gitweb"),
    (one, "disable gitweb --now"),
    (nothing, "add-rpc my-rpc my.Rpc"),
    (an_rpc, "add-rpc my-rpc my.Rpc"),
    (an_rpc, "remove-rpc my-rpc"),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("prepare", "line"),
    ROUTES,
    ids=[f"{line} after {prepare.__name__}" for prepare, line in ROUTES],
)
def test_what_is_shown_is_done(
    desk: Desk, clerk: Clerk, prepare: Callable[[Desk], None], line: str
) -> None:
    prepare(desk)
    clerk.rehearse(*line.replace("PORT", str(desk.port)).split())


@pytest.mark.parametrize(
    "change", ["s/=gitweb/=vault/", "s/127.0.0.1/127.0.0.3/", "/=/d"]
)
def test_what_is_shown_of_an_edit_is_done(
    desk: Desk, clerk: Clerk, change: str
) -> None:
    """Another qube, another address, and no address any more."""
    two_of_a_unit(desk)
    clerk.rehearse("edit", "gitweb", EDITOR=f"sed -i {change}")


def agent(desk: Desk, *, starts: bool = True) -> None:
    desk.machine.write_unit(
        "my-agent.socket", "[Socket]\nListenStream=%t/agent\nSocketMode=0600\n"
    )
    desk.machine.write_unit(
        "my-agent.service", "[Service]\nExecStart=/bin/cat\n"
    )
    desk.machine.systemctl("daemon-reload")
    if starts:
        desk.machine.systemctl("start", "my-agent.socket")


@pytest.mark.parametrize("starts", [True, False])
def test_what_is_shown_of_a_published_unit_is_done(
    desk: Desk, clerk: Clerk, starts: bool
) -> None:
    agent(desk, starts=starts)
    clerk.rehearse("publish", "agent", "--unit", "my-agent")
    clerk.rehearse("unpublish", "agent")


def test_a_line_among_others_is_shown_as_it_will_be(
    desk: Desk, clerk: Clerk
) -> None:
    agent(desk)
    desk.drop_in(
        "my-agent.socket",
        "mine",
        "[Socket]",
        "Backlog=5",
        "Symlinks=%t/qubes.ConnectUnix/agent",
    )
    desk.machine.systemctl("daemon-reload")
    clerk.rehearse("unpublish", "agent")


def test_what_is_shown_of_a_published_path_is_done(
    desk: Desk, clerk: Clerk
) -> None:
    clerk.rehearse("publish", "agent", "--unix", "/nowhere/a path")
    clerk.rehearse("unpublish", "agent")


@pytest.mark.parametrize("more", ["", "--idle 5min"])
def test_what_is_shown_of_a_published_program_is_done(
    desk: Desk, clerk: Clerk, more: str
) -> None:
    clerk.rehearse("publish", "notes", "--exec", "/bin/cat", *more.split())
    clerk.rehearse("unpublish", "notes")


def test_what_is_shown_of_a_name_that_is_led_elsewhere_is_done(
    desk: Desk, clerk: Clerk
) -> None:
    agent(desk)
    clerk.rehearse("publish", "agent", "--unix", "/nowhere/a path")
    clerk.rehearse("publish", "agent", "--unix", "/nowhere/another")
    clerk.rehearse("publish", "agent", "--unit", "my-agent")
    clerk.rehearse("publish", "agent", "--unix", "/nowhere/one")
    desk.machine.systemctl("stop", "my-agent.socket")
    clerk.rehearse("publish", "agent", "--unit", "my-agent")
    clerk.rehearse("unpublish", "agent")


def test_what_would_be_refused_is_refused_when_it_is_rehearsed(
    desk: Desk,
) -> None:
    """A link and a program are never made of each other in place."""
    desk.run("publish", "agent", "--unix", "/nowhere/one")
    desk.run("publish", "agent", "--unix", "/nowhere/one")
    desk.run("publish", "notes", "--exec", "/bin/cat")
    for more in ([], ["--dry-run"]):
        said = desk.fails(
            "publish", "notes", "--unix", "/nowhere/two", *more, code=2
        )
        assert "unpublish notes first" in said
        assert "published already" in desk.fails(
            "publish", "agent", "--exec", "/bin/cat", *more, code=2
        )
    one, notes = desk.json("published")
    assert one["socket"] == "/nowhere/one"
    assert notes["state"] == "idle"
    desk.run("unpublish", "agent", "notes")
