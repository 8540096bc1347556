"""What is asked of a qrexec-client-vm before it makes a call."""

from __future__ import annotations

from pathlib import Path

import pytest

from qrexec_activate.forward.process import takes_sockets


def client(folder: Path, script: str) -> str:
    path = folder / "qrexec-client-vm"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    ("code", "takes"), [(0, True), (2, False), (1, None), (127, None)]
)
def test_a_client_is_asked_without_making_a_call(
    tmp_path: Path, code: int, takes: bool | None
) -> None:
    knows = f'test "$*" = "--use-stdin-socket --help" && exit {code}'
    assert takes_sockets(client(tmp_path, knows)) is takes


def test_one_that_is_not_there_does_not_say(tmp_path: Path) -> None:
    assert takes_sockets(str(tmp_path / "missing")) is None


def test_one_that_does_not_answer_is_not_waited_for(tmp_path: Path) -> None:
    assert takes_sockets(client(tmp_path, "exec sleep 1h"), 0.1) is None


def test_one_that_reads_all_the_same_finds_the_end(tmp_path: Path) -> None:
    read = tmp_path / "read"
    assert takes_sockets(client(tmp_path, f"cat; echo over >{read}"))
    assert read.read_text() == "over\n"
