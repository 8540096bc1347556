"""A daemon that has nothing to do ends, systemd goes on listening, and nobody
can tell."""

from __future__ import annotations

import random

import trio
from scenario import SERVICE, Scene, ask, connect, echo, echoes, until


async def test_an_idle_daemon_ends_and_the_next_connection_starts_it(
    scene: Scene,
) -> None:
    scene.options(EXIT_IDLE_TIME="1s")
    address = await scene.route()
    for turn in (1, 2):
        assert await ask(address) == "work"
        await until("it ends", lambda: scene.state() == "inactive")
        await scene.logged("no connection for 1.000 s", times=turn)
        assert scene.state(scene.unit) == "active"
        assert scene.machine.property(SERVICE, "Result") == "success"


async def test_an_open_connection_keeps_it_running(scene: Scene) -> None:
    scene.options(EXIT_IDLE_TIME="500ms")
    address = await scene.route(echo)
    async with await connect(address) as stream:
        assert await echoes(stream)
        pid = scene.pid()
        await trio.sleep(1.5)
        assert scene.pid() == pid
        assert await echoes(stream)
    await until("it ends", lambda: scene.state() == "inactive")


async def test_no_connection_is_lost_at_the_edge(scene: Scene) -> None:
    """Connections come just when the daemon is about to end, has stopped
    accepting, or has ended."""
    scene.options(EXIT_IDLE_TIME="50ms")
    address = await scene.route()
    await ask(address)
    rng = random.Random(7)
    for _ in range(60):
        await trio.sleep(rng.uniform(0.03, 0.12))
        assert await ask(address) == "work"
    assert len(scene.lines("no connection for 0.050 s")) >= 5
    assert scene.state(scene.unit) == "active"
    await scene.logged("ended,", times=61)


async def test_idle_exit_can_be_switched_off(scene: Scene) -> None:
    scene.options(EXIT_IDLE_TIME="0")
    address = await scene.route()
    assert await ask(address) == "work"
    pid = scene.pid()
    await trio.sleep(1)
    assert scene.pid() == pid
