"""Which processes are counted as calls that others have open."""

from __future__ import annotations

import shutil
import subprocess
import time
from pathlib import Path

import pytest

from qrexec_activate.forward import census
from qrexec_activate.forward.census import Census


class AllBut:
    """Everybody is ours, but one."""

    def __init__(self, pid: int) -> None:
        self.pid = pid

    def __contains__(self, pid: object) -> bool:
        return pid != self.pid


@pytest.fixture
def programs(tmp_path: Path) -> dict[str, str]:
    """A shell by its own name, and one that is called as the client is."""
    client = tmp_path / "qrexec-client-vm"
    shutil.copy("/bin/sh", client)
    return {"shell": "/bin/sh", "client": str(client)}


def await_name(pid: int, program: str) -> None:
    """The kernel lets go of the parent before a program has its name."""
    while (
        Path(f"/proc/{pid}/comm").read_text() != f"{Path(program).name[:15]}\n"
    ):
        time.sleep(0.01)


def becomes(first: str, then: str) -> subprocess.Popen[str]:
    """A program that is replaced by another one as soon as it is told."""
    return subprocess.Popen(
        [first, "-c", 'read go; exec "$0" -c "read end"', then],
        stdin=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize(
    ("first", "then", "counts"),
    [("client", "shell", [1, 0]), ("shell", "client", [0, 1])],
)
def test_a_process_counts_as_what_it_has_become(
    programs: dict[str, str], first: str, then: str, counts: list[int]
) -> None:
    """What a client forks bears its name until it is another program."""
    with becomes(programs[first], programs[then]) as process:
        await_name(process.pid, programs[first])
        counted = Census()
        others = AllBut(process.pid)
        found = [counted.others(others)]
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
        await_name(process.pid, programs[then])
        found.append(counted.others(others))
        process.kill()
    assert found == counts
    assert counted.others(others) == 0


def test_a_process_is_looked_at_no_more_than_some_times(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looked: list[int] = []

    def look(pid: int) -> bool:
        looked.append(pid)
        return pid == 1

    monkeypatch.setattr(census, "_is_client", look)
    counted = Census()
    for _ in range(10):
        assert counted.others(()) == 1
        assert counted.others((1,)) == 0
    assert looked.count(1) == census._LOOKS
