"""What is asked of a qrexec-client-vm before it makes a call."""

from __future__ import annotations

from pathlib import Path

import pytest

from qrexec_activate.forward.process import takes_no_socket


def client(folder: Path, script: str) -> str:
    path = folder / "qrexec-client-vm"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize("code", [0, 1, 2, 127])
def test_only_one_that_does_not_know_the_option_takes_no_socket(
    tmp_path: Path, code: int
) -> None:
    knows = f'test "$*" = "--use-stdin-socket --help" && exit {code}'
    assert takes_no_socket(client(tmp_path, knows)) is (code == 2)


def test_one_that_is_not_there_is_not_said_to_take_none(tmp_path: Path) -> None:
    assert not takes_no_socket(str(tmp_path / "missing"))


def test_one_that_reads_all_the_same_finds_the_end(tmp_path: Path) -> None:
    read = tmp_path / "read"
    assert not takes_no_socket(client(tmp_path, f"cat; echo over >{read}"))
    assert read.read_text() == "over\n"
