"""The loopback keeps every row of the contract."""

from __future__ import annotations

from pathlib import Path

import pytest

from .place import Place
from .rows import ROWS, Row


@pytest.mark.parametrize("row", ROWS, ids=[row.name for row in ROWS])
def test_the_loopback_does_as_qrexec(row: Row, tmp_path: Path) -> None:
    with Place.of_loopback(tmp_path) as place:
        assert row.broken(row.probe(place, **row.arguments)) == [], row.says


def test_the_names_of_rows_differ() -> None:
    assert len({row.name for row in ROWS}) == len(ROWS)
