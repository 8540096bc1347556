"""The picture of a connection's way: no hop is said to work that is not known
to."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
from desk import WRITE_GOLDEN

from qrexec_activate.control.connections import Connection
from qrexec_activate.control.netproc import Holder
from qrexec_activate.control.survey import Entry
from qrexec_activate.control.table import cells
from qrexec_activate.control.way import Hop, hops, picture, svg
from qrexec_activate.systemd.journalreader import Record

DOCS = Path(__file__).parents[2] / "docs"
ROUTE = Entry(
    "127.0.0.1:1234",
    "gitweb",
    "qubes.ConnectTCP",
    "1234",
    "qrexec-connect-tcp@1234.socket",
    "qrexec-connect-tcp.service",
    "…/qrexec-connect-tcp@1234.socket.d/gitweb.conf",
    "enabled",
    "active",
    True,
)
REFUSED = "a\x1b[31m<b>&"


def connected(state: str = "open") -> Connection:
    return Connection(
        "3dac-1",
        1,
        1,
        0,
        time.clock_gettime(time.CLOCK_BOOTTIME),
        ROUTE.listener,
        "gitweb",
        ROUTE.call,
        ROUTE.unit,
        "127.0.0.1:50000",
        None,
        state,
        peer_process=Holder(4371, "git"),
    )


def ended(established: bool, code: int, priority: int = 6) -> Record:
    fields = {"ESTABLISHED": str(int(established)), "EXIT_CODE": str(code)}
    message = f"3dac-1: peer on x → gitweb {ROUTE.call}: what became of it"
    return Record(0.0, message, priority, fields, "")


def marks(way: list[Hop]) -> str:
    return "".join(hop.mark for hop in way)


def test_a_masked_route_is_told_once_and_no_daemon_blamed() -> None:
    """Nothing comes to the daemon, so that it refuses nothing."""
    masked = replace(ROUTE, enabled="masked", refused="it is masked")
    _, _, unit, daemon, *_ = hops(masked, [], "inactive", None, "me")
    assert unit.note.startswith("masked: it is masked;")
    assert (daemon.mark, daemon.note) == ("✗", "does not serve it")


@pytest.mark.parametrize(
    ("entry", "alive", "daemon", "last", "expected"),
    [
        (ROUTE, [connected()], "active", None, "✓✓✓✓✓✓"),
        # A route of which nothing is known but what this qube can see.
        (ROUTE, [], "inactive", None, "?✓✓✓??"),
        (ROUTE, [connected("waiting")], "active", None, "✓✓✓✓??"),
        (ROUTE, [], "active", ended(True, 0), "?✓✓✓✓✓"),
        (ROUTE, [], "active", ended(False, 126, 4), "?✓✓✓✗?"),
        (ROUTE, [], "active", ended(False, 1, 4), "?✓✓✓??"),
        (ROUTE, [], "active", ended(True, 127, 4), "?✓✓✓✓✗"),
        (ROUTE, [], "failed", None, "?✓✓✗??"),
        (replace(ROUTE, listens=None), [], "inactive", None, "??✓✓??"),
        (
            replace(ROUTE, active="inactive", listens=False),
            [],
            "inactive",
            None,
            "?✗✗✓??",
        ),
        (replace(ROUTE, refused=REFUSED), [], "active", None, "?✓✗✗??"),
        (
            replace(ROUTE, target=None, refused="no target"),
            [],
            "active",
            None,
            "?✓✗✗?✗",
        ),
    ],
)
def test_each_hop_is_as_it_is_known(
    entry: Entry,
    alive: list[Connection],
    daemon: str,
    last: Record | None,
    expected: str,
) -> None:
    way = hops(entry, alive, daemon, last, "personal")
    assert marks(way) == expected
    assert [hop.title for hop in way] == [
        "program",
        "address",
        "unit",
        "daemon",
        "policy",
        "service",
    ]


def test_the_picture_has_no_raw_characters_and_fits() -> None:
    way = hops(replace(ROUTE, refused=REFUSED), [], "active", None, "personal")
    lines = picture(way, 60)
    assert "\\x1b[31m" in "".join(lines)
    for line in lines:
        assert line.isprintable()
        assert not line.startswith("│ ") or cells(line) <= 60


def test_the_svg_is_well_formed_whatever_is_written_in_it() -> None:
    way = hops(replace(ROUTE, refused=REFUSED), [], "active", None, "personal")
    drawing = svg([way, way])
    tree = ElementTree.fromstring(drawing)
    boxes = tree.findall("{http://www.w3.org/2000/svg}rect")
    assert len(boxes) == 12
    assert "\x1b" not in drawing
    assert "prefers-color-scheme: dark" in drawing
    assert ElementTree.fromstring(svg([])) is not None


def test_the_picture_of_the_readme_is_as_it_is_drawn() -> None:
    way = hops(ROUTE, [connected()], "active", None, "personal")
    path = DOCS / "way.svg"
    if WRITE_GOLDEN:
        path.write_text(svg([way]))
    assert path.read_text() == svg([way])
    readme = (DOCS.parent / "README.md").read_text()
    assert readme.splitlines()[2].endswith("(docs/way.svg)")
