"""docs/compare.md is whole, what it says of this project holds, and its scenes
notice a way that is broken."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from compare.play import play
from compare.report import CANNOT, RIGHT, WRONG, Verdict, markdown
from compare.scenes import SCENES
from compare.ways import WAYS, Command
from qrexec_activate.loopback.machine import Machine

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "compare.md"
OURS = "qrexec-activate"
#: These take seconds; tests/forward has the like.
LONG = {
    "64 MiB both ways at once",
    "data before the call is set up",
    "send and go",
    "send and go, by a unix socket",
    "a call that qrexec loses",
    "a silent qube beside a good one",
    "200 at once",
    "60 at once, as under Xen",
    "a restart with 100 open",
    "connections during restarts",
    "a kill with 100 open",
    "a change of one port beside another",
}

#: Relays as it is told to; with a fault that its first word names.
RELAY = """\
import socket, sys, threading
fault, host, port, to = sys.argv[1:]
def carry(source, sink):
    while data := source.recv(1 << 16):
        sink.sendall(data.upper() if fault == "bytes" else data)
    sink.shutdown(socket.SHUT_RDWR if fault == "half-close" else socket.SHUT_WR)
listener = socket.create_server(("" if fault == "open" else host, int(port)))
there = to.rsplit(":", 1)
while True:
    client, _ = listener.accept()
    service = socket.create_connection((there[0], int(there[1])))
    for ends in ((client, service), (service, client)):
        threading.Thread(target=carry, args=ends, daemon=True).start()
"""


def verdict(text: str) -> Verdict:
    mark, _, words = text.partition(" ")
    assert mark in (RIGHT, WRONG, CANNOT), text
    return Verdict(mark, words)


def read_page(
    text: str,
) -> tuple[dict[str, dict[str, Verdict]], dict[str, str]]:
    """Way → scene → verdict, and what it was seen on."""
    rows = [
        [cell.strip() for cell in line.strip("|").split(" | ")]
        for line in text.splitlines()
        if line.startswith("| ")
    ]
    (_, *ways), _, *rest = rows
    scene_rows = rest[: [row[0] for row in rest].index("right")]
    seen = {
        way: {row[0]: verdict(row[number]) for row in scene_rows}
        for number, way in enumerate(ways, 1)
    }
    return seen, dict(rest[len(scene_rows) + 2 :])


def test_the_page_has_every_scene_on_every_way() -> None:
    text = PAGE.read_text()
    seen, machine = read_page(text)
    assert list(seen) == list(WAYS)
    for verdicts in seen.values():
        assert list(verdicts) == list(SCENES)
    assert {"qrexec-activate", "qrexec", "socat", "systemd"} <= {*machine}
    # With the words that its scenes have now.
    assert markdown(seen, machine, {}) == text


@pytest.mark.slow
@pytest.mark.parametrize(
    "title",
    [
        title
        for title, seen in read_page(PAGE.read_text())[0][OURS].items()
        if seen.mark == RIGHT and title not in LONG
    ],
)
def test_what_the_page_says_of_this_project_holds(
    title: str, shared_machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compare.stage.PATIENCE", 90.0)
    assert play(SCENES[title], shared_machine, WAYS[OURS]) == Verdict(RIGHT)


@pytest.mark.parametrize(
    ("fault", "title", "words"),
    [
        ("half-close", "a late reply", "an empty answer"),
        ("open", "no other address", "it is open on all addresses"),
        ("bytes", "two targets on one port", "“FIRST”"),
    ],
)
def test_a_scene_notices_a_broken_way(
    fault: str, title: str, words: str, shared_machine: Machine, tmp_path: Path
) -> None:
    program = tmp_path / "relay"
    program.write_text(RELAY)

    def played(fault: str) -> Verdict:
        line = f"{sys.executable} {program} {fault} {{host}} {{port}} {{to}}"
        return play(
            SCENES[title],
            shared_machine,
            lambda machine: Command(machine, line),
        )

    assert played(fault) == Verdict(WRONG, words)
    assert played("none") == Verdict(RIGHT)


def test_a_command_of_ones_own_gets_a_column() -> None:
    argv = [sys.executable, "-m", "compare", "--scene", "IPv6"]
    argv += ["--way", OURS, "--command", "nothing=false {port}"]
    page = subprocess.check_output(argv, cwd=ROOT, text=True)
    seen, _ = read_page(page)
    assert seen == {
        OURS: {"IPv6": Verdict(RIGHT)},
        "nothing": {"IPv6": Verdict(CANNOT, "takes a port, and no address")},
    }
    assert "- nothing: `false {port}`" in page
