"""The loopback keeps every row of the contract."""

from __future__ import annotations

from pathlib import Path

import pytest

from .place import Place
from .rows import ROWS, Row

#: What the loopback does not do yet. A row that it keeps must go from here.
PENDING = {
    "pipes-are-blocking-again",
    "no-such-service",
    "nobody-listens",
    "a-port-of-the-service-and-one-of-the-call",
    "a-broken-rpc-config",
    "the-end-of-a-service-tcp",
    "the-end-of-a-service-unix",
    "a-reply-that-is-lost",
    "a-service-without-an-argument",
    "bytes-of-a-service",
    "an-open-call-has-a-vchan",
    "a-lost-call",
    "a-socket-service-without-an-argument",
}


@pytest.mark.parametrize(
    "row",
    [
        pytest.param(
            row,
            id=row.name,
            marks=[pytest.mark.xfail(strict=True)] * (row.name in PENDING),
        )
        for row in ROWS
    ],
)
def test_the_loopback_does_as_qrexec(row: Row, tmp_path: Path) -> None:
    with Place.of_loopback(tmp_path) as place:
        assert row.broken(row.probe(place, **row.arguments)) == [], row.says


def test_the_names_of_rows_differ() -> None:
    assert len({row.name for row in ROWS}) == len(ROWS)
