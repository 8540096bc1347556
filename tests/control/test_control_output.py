"""What leaves the commands: printable text, whole, to whatever they are given
as their output; and nothing is believed that other users can forge."""

from __future__ import annotations

import json
import os
import pty
import select
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from desk import PATIENCE, Desk

from qrexec_activate.control.netproc import listening
from qrexec_activate.loopback.machine import Machine
from qrexec_activate.printable import printable

#: A locale that knows ASCII only, and a Python that takes it at its word.
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
ESCAPE = "\x1b]0;forged\x07\x9b31m\u202e"


@pytest.fixture
def desk(shared_machine: Machine) -> Iterator[Desk]:
    desk = Desk(shared_machine)
    yield desk
    desk.leave()


def by_shell(desk: Desk, words: str, redirection: str) -> tuple[int, str]:
    """Run a command with the shell's redirection; returns its code, and what it
    says in all."""
    command = shlex.join(desk.argv(*shlex.split(words)))
    done = subprocess.run(
        ["sh", "-c", f"{command} {redirection}"],
        env=desk.machine.environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def on_a_terminal(desk: Desk, *words: str, **environment: str) -> str:
    """What a terminal gets to see of a command."""
    pid, fd = pty.fork()
    if not pid:
        environment = {"TERM": "xterm", "COLUMNS": "100", **environment}
        os.execve(
            sys.executable,
            desk.argv(*words),
            {**desk.machine.environment, **environment},
        )
    shown = b""
    try:
        while select.select([fd], [], [], PATIENCE)[0]:
            shown += os.read(fd, 65536)
    except OSError:
        # The terminal's other end is closed.
        pass
    finally:
        os.close(fd)
        os.waitpid(pid, 0)
    return shown.decode()


@pytest.mark.parametrize(
    ("words", "redirection"),
    [
        ("list", ">&-"),
        ("list", ">&- 2>&- <&-"),
        ("list --json", ">&-"),
        ("check --quiet --try", "<&-"),
        ("status", "2>&-"),
    ],
)
def test_a_stream_that_is_closed_is_no_bug(
    desk: Desk, words: str, redirection: str
) -> None:
    desk.run("add", "tcp", str(desk.port), "work")
    code, said = by_shell(desk, words, redirection)
    assert code == 0 or (words.startswith("check") and code in (1, 2))
    assert "Traceback" not in said
    assert "bug" not in said


@pytest.mark.parametrize("words", ["list", "list --json", "status", "--help"])
def test_a_full_disk_is_one_line(desk: Desk, words: str) -> None:
    desk.run("add", "tcp", str(desk.port), "work")
    assert by_shell(desk, words, ">/dev/full") == (
        1,
        "qrexec-activate: cannot write to its output: No space left on device\n",
    )


def test_a_locale_without_utf_8_is_no_bug(desk: Desk) -> None:
    unit = desk.tcp
    desk.drop_in(
        unit,
        "größe",
        "[Socket]",
        f"ListenStream=127.0.0.1:{desk.port}",
        "FileDescriptorName=work",
        "FileDescriptorName=grö",
    )
    desk.start(unit)
    for words in (["list"], ["status"], ["policy"], ["list", "nösuch"]):
        said = desk.try_(*words, environment=ASCII)
        assert "bug" not in said.stderr, (words, said.stderr)
    routes = desk.try_("list", "--json", environment=ASCII).stdout
    assert json.loads(routes)[0]["listener"] == f"127.0.0.1:{desk.port}"
    desk.try_("check", environment=ASCII)


def test_any_abstract_name_leaves_every_command_in_peace(desk: Desk) -> None:
    desk.run("add", "tcp", str(desk.port), "work")
    with socket.socket(socket.AF_UNIX) as hostile:
        hostile.bind(f"\0x{desk.port}\n\nx")
        hostile.listen()
        for words in (["list"], ["status"], ["check"], ["published"]):
            said = desk.try_(*words)
            assert "bug" not in said.stderr, words
        desk.run("add", "tcp", str(desk.port), "gitweb")
        desk.run("remove", "gitweb")


def test_nobody_can_forge_that_a_socket_listens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = "0000000000000000: 00000002 00000000 00010000 0001 01 1234567"
    monkeypatch.chdir(tmp_path)
    with (
        socket.socket(socket.AF_UNIX) as abstract,
        socket.socket(socket.AF_UNIX) as relative,
        socket.socket(socket.AF_UNIX) as honest,
    ):
        abstract.bind(f"\0x\n{line} /run/forged.sock\n")
        relative.bind("127.1.2.3:4567")
        honest.bind(str(tmp_path / "honest"))
        for sock in (abstract, relative, honest):
            sock.listen()
        now = listening()
        assert now.holds(str(tmp_path / "honest"))
        assert now.holds("/run/forged.sock") is False
        assert now.holds("127.1.2.3:4567") is False


def test_an_abstract_name_is_found(tmp_path: Path) -> None:
    name = f"{tmp_path}\xe9 x"
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(f"\0{name}")
        sock.listen()
        assert listening().holds(f"@{name}")
        assert listening().holds("@nosuch") is False


def test_printable_text_has_nothing_that_a_terminal_obeys() -> None:
    assert printable(ESCAPE) == "\\x1b]0;forged\\x07\\x9b31m\\u202e"
    assert printable("a\nb", keep="\n") == "a\nb"
    assert printable("größe → ✓") == "größe → ✓"


@pytest.mark.parametrize(
    "words",
    [
        ["list", ESCAPE],
        ["logs", "--since", ESCAPE],
        ["disconnect", ESCAPE],
        [f"nosuch{ESCAPE}"],
        ["add", ESCAPE, "1234", "work"],
        ["add", "tcp", ESCAPE, "work"],
        ["publish", ESCAPE, "--unix", "/x"],
        ["list", f"--{ESCAPE}"],
    ],
)
def test_no_word_of_anybody_reaches_a_terminal_raw(
    desk: Desk, words: list[str]
) -> None:
    shown = on_a_terminal(desk, *words)
    assert "forged" in shown
    assert shown.replace("\r\n", "").isprintable(), ascii(shown)


def test_nothing_gets_past_the_streams() -> None:
    """Also what nobody has thought of making printable."""
    program = (
        "import sys, click\n"
        "from qrexec_activate.control.terminal import guard_streams, say, styled\n"
        "guard_streams()\n"
        "click.echo(sys.argv[1])\n"
        "print(sys.argv[1], file=sys.stderr)\n"
        "sys.stdout.writelines([sys.argv[1], '\\n'])\n"
        "say(styled(sys.argv[1], 'red'), sys.argv[1])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, ESCAPE],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == f"{printable(ESCAPE)}\n"
    one = printable(ESCAPE)
    assert done.stdout == f"{one}\n{one}\n{one}{one}\n"


def test_json_holds_no_control_characters_and_is_complete(desk: Desk) -> None:
    file = desk.drop_in(
        desk.tcp,
        "a\x85b",
        "[Socket]",
        f"ListenStream=127.0.0.1:{desk.port}",
        "FileDescriptorName=work",
    )
    desk.start(desk.tcp)
    printed = desk.run("list", "--json")
    assert "\x85" not in printed
    assert json.loads(printed)[0]["file"] == str(file)
