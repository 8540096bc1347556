"""What is said, and concluded, of Xen's limit and its device."""

from __future__ import annotations

from pathlib import Path

import pytest

from qrexec_activate.forward import xen


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(xen, "_LIMIT", str(tmp_path / "limit"))
    monkeypatch.setattr(xen, "_DEVICE", str(tmp_path / "gntalloc"))
    return tmp_path


@pytest.mark.parametrize(
    ("text", "scarce"),
    [
        (None, True),
        ("1024\n", True),
        (f"{240 * 33 - 1}\n", True),
        (f"{240 * 33}\n", False),
        ("1073741824\n", False),
        ("\n", True),
    ],
)
def test_grants_are_scarce_unless_there_are_enough(
    files: Path, text: str | None, scarce: bool
) -> None:
    if text is not None:
        (files / "limit").write_text(text)
    assert xen.grants_are_scarce(240) is scarce


def test_the_limit_is_named_where_there_is_one(files: Path) -> None:
    assert xen.limit() == ""
    (files / "limit").write_text("1024\n")
    assert f"{files}/limit allows 1024: " in xen.limit()


def test_a_device_that_may_not_be_opened_is_named_with_the_group(
    files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert xen.denial() == ""
    (files / "gntalloc").touch()
    assert xen.denial() == ""
    # Root may open everything.
    monkeypatch.setattr("os.access", lambda path, mode: False)
    assert f"{files}/gntalloc cannot be opened" in xen.denial()
    assert "group qubes" in xen.denial()
