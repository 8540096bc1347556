"""Connections outlive the daemon: it may be stopped, restarted, upgraded or
killed, and none notices."""

from __future__ import annotations

import contextlib
import os
import signal
from contextlib import AsyncExitStack

import pytest
import trio
from scenario import (
    PATIENCE,
    SERVICE,
    Scene,
    Stack,
    ask,
    connect,
    echo,
    echoes,
    flood,
    free_port,
    receive_exactly,
    sees_reset,
    send,
    until,
)


@pytest.fixture(autouse=True)
def _hand_over() -> None:
    """By pipes a connection ends with its daemon."""
    if stack := Stack.given():
        stack.needs_hand_over()


async def open_many(
    scene: Scene, stack: AsyncExitStack, address: tuple[str, int], count: int
) -> list[trio.SocketStream]:
    streams = []
    for _ in range(count):
        streams.append(await stack.enter_async_context(await connect(address)))
        await send(streams[-1], b"ping")
    for stream in streams:
        assert await receive_exactly(stream, 4) == b"ping"
    return streams


@pytest.mark.slow
@pytest.mark.parametrize("end", ["stop", "restart", "SIGKILL"])
async def test_a_hundred_connections_do_not_notice_the_end_of_the_daemon(
    scene: Scene, end: str
) -> None:
    address = await scene.route(echo)
    async with AsyncExitStack() as stack:
        streams = await open_many(scene, stack, address, 100)
        pid = scene.pid()
        if end == "SIGKILL":
            os.kill(pid, signal.SIGKILL)
            await until("systemd sees it", lambda: scene.pid() != pid)
        else:
            await scene.systemctl(end, SERVICE)
        for stream in streams:
            assert await echoes(stream, b"pong")
        # The next one starts the daemon again; 100 are open already, by which
        # it has room for 20 more.
        assert await ask(address, b"new") == "new"
        for stream in streams:
            assert await echoes(stream, b"still")
    await scene.nobody_stays()


async def test_a_stop_says_how_many_go_on_without_the_daemon(
    scene: Scene,
) -> None:
    address = await scene.route(echo)
    async with AsyncExitStack() as stack:
        await open_many(scene, stack, address, 3)
        await scene.systemctl("stop", SERVICE)
        await scene.logged("open connections that go on without it: 3")


async def test_a_hang_up_is_an_order_to_stop(scene: Scene) -> None:
    """Killed by it, the daemon would be gone for good, to systemd: nobody would
    look after its connections."""
    address = await scene.route(echo)
    async with AsyncExitStack() as stack:
        await open_many(scene, stack, address, 3)
        os.kill(scene.pid(), signal.SIGHUP)
        await scene.logged("open connections that go on without it: 3")


async def test_the_next_daemon_watches_over_the_connections_of_the_last_one(
    scene: Scene,
) -> None:
    """Else qrexec-client-vm would drain a service that goes on sending, for
    ever, once its client has gone."""
    address = await scene.route(flood)
    async with await connect(address) as stream:
        await receive_exactly(stream, 1 << 20)
        await scene.systemctl("restart", SERVICE)
        await scene.logged("watching over 1 connection of an earlier daemon")
        await receive_exactly(stream, 1 << 20)
    await scene.nobody_stays()


async def test_a_prompt_that_is_open_at_a_stop_can_still_be_answered(
    scene: Scene,
) -> None:
    address = await scene.route(echo)
    scene.policy("* * client * ask default_target=work")
    async with await connect(address) as stream:
        await send(stream, b"ping")
        await until("the call is made", scene.calls)
        await trio.sleep(2.2)
        await scene.systemctl("stop", SERVICE)
        scene.answer("allow")
        assert await receive_exactly(stream, 4) == b"ping"


@pytest.mark.slow
async def test_connections_made_while_the_daemon_is_restarted_again_and_again_are_all_served(
    scene: Scene,
) -> None:
    """What was accepted is started, and what was not stays in the backlog."""
    address = await scene.route(echo)
    assert await ask(address, b"first") == "first"
    over = False
    served = 0

    async def customer(number: int) -> None:
        nonlocal served
        while not over:
            word = f"{number} {served}".encode()
            assert await ask(address, word) == word.decode()
            served += 1

    async with AsyncExitStack() as stack, trio.open_nursery() as nursery:
        streams = await open_many(scene, stack, address, 10)
        for number in range(4):
            nursery.start_soon(customer, number)
        for _ in range(100):
            await scene.systemctl("restart", SERVICE)
        over = True
        for stream in streams:
            assert await echoes(stream)
    assert served >= 50
    assert scene.state() == "active"
    assert scene.state(scene.unit) == "active"
    await scene.nobody_stays()


async def test_killing_the_daemon_again_and_again_leaves_open_connections_alone(
    scene: Scene,
) -> None:
    address = await scene.route(echo)
    async with AsyncExitStack() as stack:
        streams = await open_many(scene, stack, address, 10)
        for _ in range(10):
            pid = scene.pid()
            os.kill(pid, signal.SIGKILL)
            await until(
                "systemd has started the next one",
                lambda pid=pid: scene.pid() not in (0, pid),
            )
            for stream in streams:
                assert await echoes(stream)
    await scene.nobody_stays()


# ---------------------------------------------------------------------- spliced


async def test_a_stop_lets_spliced_connections_end_in_their_own_time(
    scene: Scene,
) -> None:
    scene.options(RELAY="splice")
    address = await scene.route(echo)
    async with AsyncExitStack() as stack, trio.open_nursery() as nursery:
        streams = await open_many(scene, stack, address, 5)
        nursery.start_soon(scene.systemctl, "stop", SERVICE)
        await until("it stops", lambda: scene.state() == "deactivating")
        await trio.sleep(0.5)
        for stream in streams:
            assert await echoes(stream)
            await stream.send_eof()
            assert await stream.receive_some() == b""
    assert len(await scene.logged("ended,", times=5)) == 5
    assert not scene.lines("cut off")


async def test_a_stop_resets_spliced_connections_that_outstay_it_and_says_so(
    scene: Scene,
) -> None:
    scene.options(RELAY="splice")
    scene.write("stop", "[Service]", "TimeoutStopSec=2s", unit=SERVICE)
    address = await scene.route(echo)
    async with AsyncExitStack() as stack:
        streams = await open_many(scene, stack, address, 5)
        await scene.systemctl("stop", SERVICE)
        for stream in streams:
            assert await sees_reset(stream)
    await scene.logged("cut off by a stop of the daemon", times=5)
    assert scene.machine.property(SERVICE, "Result") == "success"
    await scene.nobody_stays()


async def test_what_a_killed_daemon_spliced_leaves_no_process_behind(
    scene: Scene,
) -> None:
    scene.options(RELAY="splice")
    address = await scene.route(flood)
    async with await connect(address) as stream:
        await receive_exactly(stream, 1 << 20)
        os.kill(scene.pid(), signal.SIGKILL)
        # By an end of file, or by a reset if bytes were on their way: either
        # way the connection ends.
        with (
            contextlib.suppress(trio.BrokenResourceError),
            trio.fail_after(PATIENCE),
        ):
            async for _ in stream:
                pass
    await scene.nobody_stays()


async def test_a_lost_call_by_pipes_ends_with_its_daemon(scene: Scene) -> None:
    """What waits in its pipe keeps no process that will never read it."""
    scene.options(RELAY="splice")
    address = await scene.route(echo)
    scene.faults("lose=1 first=1 lost-timeout=3600")
    async with await connect(address) as stream:
        await send(stream, b"ping")
        await until("the call is made", scene.calls)
        (lost,) = scene.clients()
        os.kill(scene.pid(), signal.SIGKILL)
        assert await sees_reset(stream)
    assert await ask(address, b"quick") == "quick"
    await until("it has gone", lambda: lost not in scene.clients())


async def test_a_denial_while_no_daemon_runs_is_a_reset_and_is_logged(
    scene: Scene,
) -> None:
    address = await scene.route(echo)
    scene.policy("* * client * ask default_target=work")
    async with await connect(address) as stream:
        await until("the call is made", scene.calls)
        await trio.sleep(2.2)
        await scene.systemctl("stop", SERVICE)
        await scene.logged("watching over 1 connection of an earlier daemon")
        assert scene.state() == "inactive"
        scene.answer("deny")
        assert await sees_reset(stream)
    await scene.logged("ended before the call was set up")


async def test_a_client_vm_killed_while_no_daemon_runs_is_a_reset(
    scene: Scene,
) -> None:
    address = await scene.route(echo)
    async with await connect(address) as stream:
        assert await echoes(stream)
        await scene.systemctl("stop", SERVICE)
        await scene.logged("watching over 1 connection of an earlier daemon")
        os.kill(*scene.clients(), signal.SIGKILL)
        assert await sees_reset(stream)
    await scene.logged("cut off: qrexec-client-vm was killed")


async def test_a_client_vm_killed_under_a_later_daemon_is_a_reset(
    scene: Scene,
) -> None:
    address = await scene.route(echo)
    async with await connect(address) as stream:
        assert await echoes(stream)
        await scene.systemctl("restart", SERVICE)
        await scene.logged("watching over 1 connection of an earlier daemon")
        os.kill(*scene.clients(), signal.SIGKILL)
        assert await sees_reset(stream)
    await scene.logged("cut off: qrexec-client-vm was killed")


async def test_a_later_daemon_relieves_who_looked_after_the_connections(
    scene: Scene,
) -> None:
    address = await scene.route(echo)
    async with await connect(address) as stream:
        assert await echoes(stream)
        await scene.systemctl("stop", SERVICE)
        await scene.logged("watching over 1 connection of an earlier daemon")
        assert await ask(address, b"new") == "new"
        await scene.logged(
            "watching over 1 connection of an earlier daemon", times=2
        )
        assert await echoes(stream)
    await scene.nobody_stays()
    # One record for each connection, and not one of each watcher.
    await scene.logged("lasted", times=2)
    await trio.sleep(0.5)
    assert len(scene.lines("lasted")) == 2


async def test_a_lost_call_is_made_again_by_a_later_daemon(
    scene: Scene,
) -> None:
    """Nothing was read of it, so nothing can be lost or done twice."""
    address = await scene.route(echo)
    scene.faults("lose=1 first=1")
    async with await connect(address) as stream:
        await send(stream, b"ping")
        await until("the call is made", scene.calls)
        await scene.systemctl("restart", SERVICE)
        await scene.logged("watching over 1 connection of an earlier daemon")
        for _ in range(2):
            assert await ask(address, b"quick") == "quick"
        assert await receive_exactly(stream, 4) == b"ping"
    await scene.logged("after 2 tries")


async def test_a_daemon_killed_between_two_tries_resets_its_client(
    scene: Scene,
) -> None:
    address = await scene.route(echo)
    scene.faults("vchan-failure=1")
    async with await connect(address) as stream:
        await until("the call has failed", lambda: scene.calls("exit"))
        os.kill(scene.pid(), signal.SIGKILL)
        assert await sees_reset(stream)


async def test_changes_that_come_fast_do_not_keep_anybody_waiting(
    scene: Scene,
) -> None:
    """Each daemon serves who waited for it before it obeys."""
    address = await scene.route()
    other = f"qrexec-connect-tcp@{free_port()}.socket"
    scene.drop_in("other", scene.address(), "work", unit=other)
    await scene.start(other)
    served = False

    async def customer() -> None:
        nonlocal served
        for _ in range(5):
            assert await ask(address) == "work"
        served = True

    async with trio.open_nursery() as nursery:
        nursery.start_soon(customer)
        with trio.fail_after(PATIENCE):
            while not served:
                await scene.systemctl("restart", other)
