"""How many at once: what waits, waits in the backlog, and everybody's turn
comes."""

from __future__ import annotations

from contextlib import AsyncExitStack

import pytest
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
    vanish,
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
        # Others that run here may have been counted first, as a new daemon
        # cannot tell where they lead to.
        await scene.logged(
            "connections open to work; more wait until there is room"
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


@pytest.mark.slow
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
    # Who has the answer goes, maybe before its service has ended.
    await scene.logged(", lasted ", times=501)


@pytest.mark.slow
async def test_a_qube_that_others_have_filled_is_waited_for(
    scene: Scene,
) -> None:
    """qrexec refuses the 129th connection to a qube, whoever has the others."""
    scene.options(MAX_CONNECTIONS="1000", MAX_TOTAL="1000")
    address = await scene.route(echo)
    async with AsyncExitStack() as stack:
        streams = [
            await stack.enter_async_context(await connect(address))
            for _ in range(128)
        ]
        for stream in streams:
            assert await echoes(stream)
        late = [
            await stack.enter_async_context(await connect(address))
            for _ in range(2)
        ]
        for stream in late:
            await send(stream, b"ping")
        await scene.logged("taken for full")
        for stream in streams[:8]:
            await stream.aclose()
        for stream in late:
            assert await receive_exactly(stream, 4) == b"ping"


@pytest.mark.slow
async def test_all_daemons_of_a_qube_share_its_limit(scene: Scene) -> None:
    """qrexec's agent has 256 slots for all calls of a qube."""
    unix = "qrexec-connect-unix.service"
    scene.options(MAX_TOTAL="60")
    scene.options(service=unix, MAX_TOTAL="60")
    address = scene.address()
    await scene.qube("work", echo)
    scene.drop_in("work", address)
    path = str(scene.machine.runtime / "echo.sock")
    instance = "qrexec-connect-unix@echo.socket"
    scene.drop_in("work", path, unit=instance)
    script = scene.machine.loopback / "qubes/work/rpc/qubes.ConnectUnix"
    script.write_text("#!/bin/sh\nexec cat\n")
    script.chmod(0o755)
    await scene.start(scene.unit, instance)
    async with AsyncExitStack() as stack:
        streams = [
            await stack.enter_async_context(await connect(where))
            for _ in range(50)
            for where in (address, path)
        ]
        await scene.logged(
            "of others in this qube; more wait until there is room"
        )
        # Nobody is served yet, and so none of them has ended.
        most = len(scene.clients())
        for stream in streams:
            await send(stream, b"ping")
        # In the order in which they come to be served.
        waiting = set(streams)

        async def served(stream: trio.SocketStream) -> None:
            nonlocal most
            assert await receive_exactly(stream, 4) == b"ping"
            most = max(most, len(scene.clients()))
            waiting.discard(stream)
            await stream.aclose()

        async with trio.open_nursery() as nursery:
            for stream in streams:
                nursery.start_soon(served, stream)
    assert not waiting
    # Two daemons that look at the same moment may each find the last places.
    # And what a qrexec-client-vm forks has its name until it execs.
    assert 40 < most <= 60 + 8


@pytest.mark.slow
async def test_more_than_its_own_agent_takes_wait_instead_of_ending_it(
    scene: Scene,
) -> None:
    """qrexec's agent has 256 slots for all calls of a qube, and ends sooner or
    later if there are more."""
    names = ("work", "gitweb", "vault")
    addresses = {name: scene.address() for name in names}
    for name, address in addresses.items():
        await scene.qube(name, echo)
        scene.drop_in(name, address)
    await scene.start()
    answered = 0
    full = trio.Event()

    async def customer(address: tuple[str, int]) -> None:
        nonlocal answered
        async with await connect(address) as stream:
            await send(stream, b"ping")
            with trio.fail_after(180):
                assert await stream.receive_some() == b"ping"
            answered += 1
            await full.wait()

    async with trio.open_nursery() as nursery:
        for _ in range(100):
            for address in addresses.values():
                nursery.start_soon(customer, address)
        # None ends before there are as many as there may be.
        await scene.logged("connections open", "more wait until")
        full.set()
    assert answered == 300
    assert not scene.calls("no-slot")
    assert len(scene.calls("established")) == 300
    assert not scene.lines("failed")


async def test_clients_that_have_gone_cause_no_calls(scene: Scene) -> None:
    address = await scene.route()
    scene.policy("* * client * ask default_target=work")
    for _ in range(300):
        vanish(await connect(address))
    await scene.logged("the client hung up", times=300)
    assert len(scene.calls()) <= 10
    await scene.nobody_stays()


async def test_the_log_speaks_of_a_limit_once(scene: Scene) -> None:
    scene.options(MAX_CONNECTIONS="2")
    address = await scene.route(echo)
    for _ in range(5):
        async with AsyncExitStack() as stack:
            streams = [
                await stack.enter_async_context(await connect(address))
                for _ in range(4)
            ]
            for stream in streams:
                assert await echoes(stream)
                await stream.aclose()
    assert len(scene.lines("open to work; more wait")) == 1
