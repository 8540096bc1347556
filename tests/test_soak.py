"""A short soak: the load with all its faults, and that the reckoning finds what
is wrong. See `make soak`."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import trio

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "soak"))

import harness

#: Of load, and of calm; `make soak` takes minutes, and 100,000.
SECONDS = 25
CALM = 1000


@pytest.mark.slow
@pytest.mark.parametrize("relay", ["hand-over", "splice"])
def test_nothing_is_lost_misrouted_or_leaked_whatever_goes_wrong(
    relay: str,
) -> None:
    table = harness.with_faults(SECONDS, relay=relay)
    print(table)
    assert table.good
    assert table.endings["right bytes"] > 0
    assert table.faults


@pytest.mark.slow
@pytest.mark.skipif(
    shutil.which("cc") is None, reason="the stand-in client has to be compiled"
)
def test_memory_and_descriptors_stay_flat() -> None:
    calm = harness.calm(CALM)
    print(calm)
    assert calm.good


# -- the reckoning itself


async def talk(
    service_of: str, plan: harness.Plan, table: harness.Table
) -> str:
    """Let a client with this plan meet the service of this qube, with no daemon
    in between."""
    soak = harness.Soak(None, table, random.Random(1), "auto")  # type: ignore[arg-type]  # no machine is asked
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with listener, trio.open_nursery() as nursery:
        nursery.start_soon(
            trio.serve_listeners,
            harness.Service(service_of, table).serve,
            [listener],
        )
        route = harness.Route("unit", listener.socket.getsockname(), plan.qube)
        ending = await soak.stream(route, plan)
        nursery.cancel_scope.cancel()
    return ending


@pytest.mark.parametrize("order", ["client", "service", "both"])
async def test_right_bytes_are_right(order: str) -> None:
    table = harness.Table()
    plan = harness.Plan(1, "work", 100_000, 50_000, order, 0, dies=False)
    assert await talk("work", plan, table) == "right bytes"
    assert table.good
    assert table.bytes_moved == 150_200


async def test_the_wrong_qube_is_found_out() -> None:
    table = harness.Table()
    await talk(
        "gitweb", harness.Plan(2, "work", 10, 10, "both", 0, dies=False), table
    )
    assert "gitweb saw bytes that were for work" in table.misrouted[0]


async def test_an_end_without_a_reason_is_a_loss(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def stops_early(
        stream: trio.SocketStream, data: bytes, pause: float
    ) -> None:
        await stream.send_all(data[:-1] if len(data) == 50_000 else data)

    monkeypatch.setattr(harness, "send_slowly", stops_early)
    table = harness.Table()
    plan = harness.Plan(3, "work", 10, 50_000, "both", 0, dies=False)
    assert await talk("work", plan, table) == "lost"
    assert "ended after 49999 of 50000 bytes" in table.lost[0]


async def test_wrong_bytes_are_a_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    async def garbles(
        stream: trio.SocketStream, data: bytes, pause: float
    ) -> None:
        await stream.send_all(bytes(len(data)))

    monkeypatch.setattr(harness, "send_slowly", garbles)
    table = harness.Table()
    assert (
        await talk(
            "work",
            harness.Plan(4, "work", 10, 50_000, "both", 0, dies=False),
            table,
        )
        == "lost"
    )
    assert not table.good


def test_one_that_is_asked_what_it_takes_is_no_call(tmp_path: Path) -> None:
    machine = SimpleNamespace(client=tmp_path / "qrexec-client-vm")
    soak = harness.Soak(machine, harness.Table(), random.Random(1), "auto")  # type: ignore[arg-type]  # it is asked for its client alone
    begun = []
    for word in ("--help", "work"):
        # Not over before its input is.
        argv = ["sh", "-c", "echo; read word", str(machine.client), word]
        pipe = subprocess.PIPE
        one = subprocess.Popen(argv, stdin=pipe, stdout=pipe)
        assert one.stdout is not None
        assert one.stdout.read(1)
        begun.append(one)
    try:
        assert soak.clients() == [begun[1].pid]
    finally:
        for one in begun:
            one.communicate()


def test_a_table_tells_all_that_is_asked_of_it() -> None:
    table = harness.Table(lost=["stream 1 hangs"])
    text = str(table)
    for word in (
        "connections",
        "bytes",
        "faults",
        "lost",
        "misrouted",
        "leaked",
        "stream 1 hangs",
    ):
        assert word in text
    assert not table.good
    assert harness.Calm(1, memory=[1, 1, 1], descriptors=[os.getpid()] * 3).good
    assert not harness.Calm(1, memory=[1, 1, 9000], descriptors=[3] * 3).good
