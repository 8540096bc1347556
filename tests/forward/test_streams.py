"""What goes through a connection arrives, in either direction, whoever ends
first, by each way of carrying bytes."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable

import pytest
import trio
from scenario import (
    PATIENCE,
    Address,
    Scene,
    ask,
    connect,
    echo,
    echoes,
    flood,
    hash_of_all,
    receive_all,
    receive_exactly,
    says,
    sees_reset,
    send,
    send_pattern,
    silent,
    until,
    vanish,
    write_script,
)

pytestmark = pytest.mark.usefixtures("relay")

#: What socat's default would cut off, with room to spare.
LATE = 1.2


async def test_a_reply_long_after_the_clients_half_close_arrives(
    scene: Scene,
) -> None:
    async def late(stream: trio.SocketStream) -> None:
        question = await receive_all(stream)
        await trio.sleep(LATE)
        await stream.send_all(b"late: " + question)

    address = await scene.route(late)
    assert await ask(address, b"question") == "late: question"
    (line,) = await scene.logged("ended")
    assert "8 B to the qube" in line
    assert "14 B from it" in line


async def test_a_service_may_half_close_first_and_still_hear_the_client(
    scene: Scene,
) -> None:
    """With a script, as qubes.ConnectTCP itself ends the call when the service
    half-closes."""
    folder = await scene.qube("work")
    script = folder / "rpc" / f"qubes.ConnectTCP+{scene.port}"
    write_script(
        script, '#!/bin/sh\nprintf "hello"\nexec >&-\ncat >"$0.heard"\n'
    )
    address = scene.address()
    scene.drop_in("work", address)
    await scene.start()
    async with await connect(address) as stream:
        assert await receive_all(stream) == b"hello"
        await trio.sleep(0.3)
        await send(stream, b"the rest")
        await stream.send_eof()
        heard = script.with_name(f"{script.name}.heard")
        await until(
            "the service hears the rest",
            lambda: heard.exists() and heard.read_bytes() == b"the rest",
        )
    await scene.nobody_stays()


async def test_a_service_that_ends_leaves_its_last_words_to_a_client_that_goes_on_sending(
    scene: Scene, relay: str
) -> None:
    """Unread input at the end would turn into a reset, and destroy the answer
    on its way. Handed over, that is as qrexec-client-vm leaves the socket: what
    the client's kernel has by then is kept, and no more."""
    size = 200_000 if relay == "splice" else 20_000

    async def rude(stream: trio.SocketStream) -> None:
        await stream.receive_some()
        await stream.send_all(bytes(size) + b"done")
        await stream.send_eof()
        await trio.sleep(0.2)

    address = await scene.route(rude)
    async with await connect(address) as stream, trio.open_nursery() as nursery:

        async def chatter() -> None:
            with contextlib.suppress(trio.BrokenResourceError):
                while True:
                    await stream.send_all(bytes(1000))
                    await trio.sleep(0.001)

        nursery.start_soon(chatter)
        await trio.sleep(0.5)
        answer = await receive_all(stream)
        assert answer[-4:] == b"done"
        assert len(answer) == size + 4
        nursery.cancel_scope.cancel()
    await scene.nobody_stays()


@pytest.mark.parametrize("size", [0, 2_000_000])
async def test_a_client_that_cannot_send_more_is_told_of_the_end(
    scene: Scene, size: int
) -> None:
    """A service has ended without reading: a client whose kernel waits for room
    would not find out by itself for a minute or two."""
    full, heard = trio.Event(), trio.Event()

    async def deaf(stream: trio.SocketStream) -> None:
        await full.wait()
        await stream.send_all(bytes(size) + b"done")
        await stream.send_eof()
        # Where a script stands for qubes.ConnectTCP, that ends no call.
        await heard.wait()

    address = await scene.route(deaf)
    async with await connect(address) as stream:
        sock = stream.socket

        def fill() -> None:
            while True:
                sock._sock.send(bytes(1 << 16), socket.MSG_DONTWAIT)

        def is_stuck() -> bool:
            with contextlib.suppress(BlockingIOError):
                fill()
            # tcpi_probes: its kernel asks for room, and is told of none.
            info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 4)
            return info[3] > 0

        await until("the client can send no more", is_stuck)
        full.set()
        received = 0
        with trio.fail_after(PATIENCE):
            async for chunk in stream:
                received += len(chunk)
                await trio.sleep(0.01)
        assert received == size + 4
        heard.set()
        await scene.logged("ended")
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            fill()
    await scene.nobody_stays()


async def test_a_byte_out_of_band_is_left_out_and_the_rest_arrives(
    scene: Scene, relay: str
) -> None:
    address = await scene.route(echo)
    async with await connect(address) as stream:
        assert await echoes(stream)
        await stream.socket.send(b"!", socket.MSG_OOB)
        assert await echoes(stream, b"goes on")


async def test_both_ends_may_close_without_a_word(scene: Scene) -> None:
    async def close(stream: trio.SocketStream) -> None:
        await stream.send_eof()

    address = await scene.route(close)
    async with await connect(address) as stream:
        assert await receive_all(stream) == b""
    (line,) = await scene.logged("ended")
    assert "0 B to the qube, 0 B from it" in line


async def test_sixty_four_mebibytes_go_both_ways_at_once_unharmed(
    scene: Scene,
) -> None:
    size = 64
    hashes: dict[str, str] = {}

    async def serve(stream: trio.SocketStream) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(keep, "sent down", send_pattern, stream, size, 1)
            nursery.start_soon(keep, "received up", hash_of_all, stream)

    async def keep(
        name: str, work: Callable[..., object], *arguments: object
    ) -> None:
        hashes[name] = await work(*arguments)  # type: ignore[misc]  # each with arguments of its own

    # qubes.ConnectTCP ends when the service half-closes, and what the client
    # still sends is lost: so a plain service.
    folder = await scene.qube("work", serve)
    name = f"qubes.ConnectTCP+{scene.port}"
    if not scene.stack:
        (folder / "rpc" / name).symlink_to("/dev/tcp/127.0.0.1")
    (folder / "rpc-config" / name).write_text("skip-service-descriptor=true\n")
    address = scene.address()
    scene.drop_in("work", address)
    await scene.start()
    with trio.fail_after(2 * PATIENCE):
        async with (
            await connect(address) as stream,
            trio.open_nursery() as nursery,
        ):
            nursery.start_soon(keep, "sent up", send_pattern, stream, size, 2)
            nursery.start_soon(keep, "received down", hash_of_all, stream)
        await until("the service has all", lambda: len(hashes) == 4)
    assert hashes["received up"] == hashes["sent up"]
    assert hashes["received down"] == hashes["sent down"]
    (line,) = await scene.logged("ended")
    assert "64.0 MiB to the qube, 64.0 MiB from it" in line


async def test_an_echo_of_more_than_every_buffer_holds_goes_through(
    scene: Scene,
) -> None:
    """Client and service both write before they read on: each side's
    back-pressure meets the other's."""
    address = await scene.route(echo)
    with trio.fail_after(PATIENCE):
        async with (
            await connect(address) as stream,
            trio.open_nursery() as nursery,
        ):
            sent: list[str] = []

            async def up() -> None:
                sent.append(await send_pattern(stream, 24, 3))

            nursery.start_soon(up)
            await trio.sleep(0.3)
            received = await hash_of_all(stream)
        assert [received] == sent


async def test_single_bytes_are_not_held_back(scene: Scene) -> None:
    address = await scene.route(echo)
    async with await connect(address) as stream:
        for number in range(200):
            assert await echoes(stream, bytes([number]))


# ---------------------------------------------------------- clients that vanish


async def test_a_client_that_does_not_read_a_flood_stops_it_and_nobody_else(
    scene: Scene,
) -> None:
    address, other = await scene.route(flood), scene.address()
    await scene.qube("gitweb")
    scene.drop_in("gitweb", other)
    await scene.systemctl("daemon-reload")
    await scene.systemctl("restart", scene.unit)
    async with await connect(address) as stream:
        await receive_exactly(stream, 10)
        await trio.sleep(0.3)
        assert await ask(other) == "gitweb"
        before = ticks(scene)
        await trio.sleep(0.5)
        assert ticks(scene) - before < 25, "something spins"
        await receive_exactly(stream, 1 << 20)
        vanish(stream)
    await scene.nobody_stays()


def ticks(scene: Scene) -> int:
    """The CPU time of the daemon and every qrexec-client-vm, in hundredths of a
    second."""
    spent = 0
    for pid in (scene.pid(), *scene.clients()):
        with open(f"/proc/{pid}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
        spent += int(fields[11]) + int(fields[12])
    return spent


async def test_a_client_that_vanishes_under_a_flood_leaves_no_process(
    scene: Scene,
) -> None:
    """qrexec-client-vm itself would drain such a service for ever."""
    address = await scene.route(flood)
    async with await connect(address) as stream:
        await receive_exactly(stream, 1 << 20)
        vanish(stream)
    await scene.nobody_stays()
    await scene.logged("the client hung up")


async def test_a_client_that_just_closes_under_a_flood_leaves_no_process(
    scene: Scene,
) -> None:
    address = await scene.route(flood)
    async with await connect(address) as stream:
        await receive_exactly(stream, 100)
    await scene.nobody_stays()


@pytest.mark.parametrize("how", ["reset", "close"])
async def test_a_client_that_vanishes_from_an_idle_connection_leaves_no_process(
    scene: Scene, how: str
) -> None:
    address = await scene.route(silent)
    async with await connect(address) as stream:
        await send(stream, b"hello")
        await until(
            "the call is established", lambda: scene.calls("established")
        )
        if how == "reset":
            vanish(stream)
    await scene.nobody_stays()
    await scene.logged("qubes.ConnectTCP", "lasted")


async def test_a_client_that_vanishes_while_a_prompt_is_open_leaves_no_process(
    scene: Scene,
) -> None:
    address = await scene.route()
    scene.policy("* * client * ask default_target=work")
    stream = await connect(address)
    await until("the call is made", scene.calls)
    assert len(scene.clients()) == 1
    vanish(stream)
    await scene.nobody_stays()
    await scene.logged("the client hung up")
    assert scene.calls("established") == []


async def test_a_client_that_vanishes_in_set_up_leaves_no_process(
    scene: Scene,
) -> None:
    address = await scene.route()
    scene.faults("delay=0.3")
    stream = await connect(address)
    await until("qrexec-client-vm runs", scene.clients)
    vanish(stream)
    await scene.nobody_stays()
    await scene.logged("lasted")


async def test_a_client_that_vanishes_before_it_is_accepted_harms_nobody(
    scene: Scene,
) -> None:
    address = await scene.route()
    for _ in range(20):
        vanish(await connect(address))
    assert await ask(address) == "work"
    await scene.nobody_stays()


async def test_a_unix_client_that_vanishes_is_seen(scene: Scene) -> None:
    path = str(scene.machine.runtime / "work.sock")
    await scene.qube("work", flood)
    scene.drop_in("work", path)
    await scene.start()
    async with await connect(path) as stream:
        await receive_exactly(stream, 1 << 20)
    await scene.nobody_stays()
    (line,) = await scene.logged("the client hung up")
    assert "pid " in line


# ---------------------------------------------------------------------- many


async def gather(
    address: Address, count: int, expected: str, *, at_once: int
) -> None:
    limit = trio.CapacityLimiter(at_once)

    async def one() -> None:
        async with limit:
            assert await ask(address) == expected

    with trio.fail_after(5 * PATIENCE):
        async with trio.open_nursery() as nursery:
            for _ in range(count):
                nursery.start_soon(one)


@pytest.mark.slow
async def test_two_hundred_at_once_are_all_served(scene: Scene) -> None:
    address = await scene.route(says("work"))
    await ask(address)
    async with scene.same_descriptors():
        await gather(address, 200, "work", at_once=200)
    await scene.logged("ended,", times=201)


@pytest.mark.slow
async def test_connections_in_a_row_leave_no_descriptor_open(
    scene: Scene, relay: str
) -> None:
    address = await scene.route(says("work"))
    await ask(address)
    # The same number for both would only take longer: what one leaves open, so
    # do a hundred.
    count = 1000 if relay == "hand-over" else 200
    async with scene.same_descriptors():
        await gather(address, count, "work", at_once=2)


@pytest.mark.slow
async def test_a_storm_of_all_kinds_leaves_no_descriptor_open(
    scene: Scene,
) -> None:
    """Some are served, some refused, some break off, some vanish: afterwards,
    what is open is what was open."""
    address = await scene.route(says("work"))
    await ask(address)
    async with scene.same_descriptors():
        scene.faults("refuse=0.2 vchan-failure=0.1 end-early=0.1")

        async def one(number: int) -> None:
            with contextlib.suppress(
                trio.BrokenResourceError, ConnectionResetError
            ):
                async with await connect(address) as stream:
                    if number % 5 == 0:
                        vanish(stream)
                    else:
                        await stream.send_eof()
                        assert b"work".startswith(await receive_all(stream))

        with trio.fail_after(5 * PATIENCE):
            async with trio.open_nursery() as nursery:
                for number in range(150):
                    nursery.start_soon(one, number)
    scene.faults()
    assert await ask(address) == "work"


async def test_a_refused_call_is_a_reset_and_no_empty_answer(
    scene: Scene,
) -> None:
    address = await scene.route()
    scene.policy("* * client * deny")
    async with await connect(address) as stream:
        assert await sees_reset(stream)
