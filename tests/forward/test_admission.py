"""How many at once: what waits, waits in the backlog, and everybody's turn
comes."""

from __future__ import annotations

from contextlib import AsyncExitStack

import trio
from scenario import (
    Scene,
    ask,
    connect,
    echo,
    echoes,
    receive_exactly,
    send,
    until,
)


async def test_no_more_set_ups_at_once_than_allowed(scene: Scene) -> None:
    scene.options(MAX_SETUPS="3")
    address = await scene.route()
    # More than three at once would fail, be tried again, and so show in the
    # log.
    scene.faults("delay=0.05 max-setups=3")
    async with trio.open_nursery() as nursery:
        for _ in range(20):
            nursery.start_soon(ask, address)
    await scene.logged("ended,", times=20)
    assert "tries" not in scene.log()


async def test_open_prompts_do_not_keep_others_waiting(scene: Scene) -> None:
    scene.options(MAX_SETUPS="2")
    asked, other = await scene.route(), scene.address()
    await scene.qube("gitweb")
    scene.drop_in("gitweb", other)
    await scene.systemctl("daemon-reload")
    await scene.systemctl("restart", scene.unit)
    scene.policy("* * client work ask", "* * client * allow")
    async with AsyncExitStack() as stack:
        streams = [
            await stack.enter_async_context(await connect(asked))
            for _ in range(4)
        ]
        assert await ask(other) == "gitweb"
        await until(
            "all four wait", lambda: "4 waiting for an answer" in status(scene)
        )
        scene.answer("allow")
        for stream in streams:
            await stream.send_eof()
            assert await receive_exactly(stream, 4) == b"work"


def status(scene: Scene) -> str:
    return scene.machine.property("qrexec-connect-tcp.service", "StatusText")


async def test_a_full_qube_keeps_its_own_clients_waiting_and_nobody_elses(
    scene: Scene,
) -> None:
    scene.options(MAX_CONNECTIONS="4")
    full, again, other = scene.address(), scene.address(), scene.address()
    await scene.qube("work", echo)
    await scene.qube("gitweb", echo)
    scene.drop_in("full", full, "work")
    scene.drop_in("again", again, "work")
    scene.drop_in("other", other, "gitweb")
    await scene.start()
    async with AsyncExitStack() as stack:
        streams = [
            await stack.enter_async_context(await connect(full))
            for _ in range(4)
        ]
        for stream in streams:
            assert await echoes(stream)
        waiting = [
            await stack.enter_async_context(await connect(address))
            for address in (full, again)
        ]
        for stream in waiting:
            await send(stream, b"ping")
        await scene.logged(
            "4 connections are open to work; more wait until one ends"
        )
        assert await ask(other, b"hello") == "hello"
        assert len(scene.calls()) == 5
        for stream in streams:
            await stream.aclose()
        for stream in waiting:
            assert await receive_exactly(stream, 4) == b"ping"


async def test_more_than_qrexec_allows_to_one_qube_wait_instead_of_failing(
    scene: Scene,
) -> None:
    address = await scene.route(echo)
    async with AsyncExitStack() as stack:
        streams = [
            await stack.enter_async_context(await connect(address))
            for _ in range(140)
        ]
        for stream in streams:
            await send(stream, b"ping")
        for stream in streams:
            assert await receive_exactly(stream, 4) == b"ping"
            await stream.aclose()
    assert len(scene.calls("established")) == 140
    await scene.logged("ended,", times=140)


async def test_five_hundred_at_once_leave_no_descriptor_open(
    scene: Scene,
) -> None:
    address = await scene.route()
    await ask(address)
    async with scene.same_descriptors(), trio.open_nursery() as nursery:
        streams: list[trio.SocketStream] = []

        async def one(stream: trio.SocketStream) -> None:
            async with stream:
                await send(stream, b"who?")
                await stream.send_eof()
                with trio.fail_after(180):
                    assert await stream.receive_some() == b"work"

        # All are connected before the first has been served.
        for _ in range(500):
            streams.append(await connect(address))
        for stream in streams:
            nursery.start_soon(one, stream)
    await scene.logged("ended,", times=501)
