"""What a client sent before it went arrives, however slowly it is read, as long
as the service lives."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import trio
from scenario import SERVICE, Scene, connect, send, until, vanish

#: Reads by so much, with a pause after each; the first pause may be longer, or
#: last until a file is gone.
READER = """\
#!{python}
import os, sys, time
while os.path.exists({wait}):
    time.sleep(0.01)
time.sleep({first})
count = 0
while chunk := sys.stdin.buffer.raw.read({step}):
    count += len(chunk)
    os.write(1, {says})
    time.sleep({pause})
open({result}, "w").write(str(count))
"""


def add_reader(
    scene: Scene,
    *,
    first: float = 0,
    step: int = 50_000,
    pause: float = 0.5,
    says: bytes = b"",
) -> Path:
    """Let the qube have a service that reads slowly, says something after each
    read, and then writes how much it has read into a file."""
    qube = scene.add_qube("work")
    result = qube / "count"
    script = qube / "rpc" / "qubes.ConnectTCP"
    script.write_text(
        READER.format(
            python=shlex.quote(sys.executable),
            first=first,
            step=step,
            pause=pause,
            says=says,
            wait=repr(str(qube / "wait")),
            result=repr(str(result)),
        )
    )
    script.chmod(0o755)
    return result


async def unix_route(scene: Scene) -> str:
    path = str(scene.machine.runtime / "work.sock")
    scene.drop_in("work", path)
    await scene.start()
    return path


async def arrives(scene: Scene, result: Path, count: int) -> None:
    def read() -> str:
        return result.read_text() if result.exists() else ""

    await until("the service is done", read)
    assert read() == str(count)
    await scene.nobody_stays()


async def test_bytes_of_a_unix_client_that_has_gone_are_read_in_time(
    scene: Scene, relay: str
) -> None:
    """Also those that qrexec-client-vm has read, when nothing more is seen. In
    qrexec, they are lost with it where the service writes."""
    result = add_reader(scene, step=25_000, says=b"so far")
    async with await connect(await unix_route(scene)) as stream:
        await send(stream, bytes(700_000))
    await arrives(scene, result, 700_000)


async def test_a_service_that_pauses_loses_nothing(
    scene: Scene, relay: str
) -> None:
    """It has taken nothing when the client has gone for long."""
    result = add_reader(scene, first=13, step=1 << 20, pause=0)
    async with await connect(await unix_route(scene)) as stream:
        await send(stream, bytes(700_000))
    await arrives(scene, result, 700_000)


async def test_a_tcp_client_that_has_half_closed_and_gone_loses_nothing(
    scene: Scene, relay: str
) -> None:
    result = add_reader(scene, first=4)
    address = scene.address()
    scene.drop_in("work", address)
    await scene.start()
    async with await connect(address) as stream:
        await send(stream, bytes(300_000))
    await arrives(scene, result, 300_000)


async def test_a_stop_of_the_daemon_leaves_the_last_bytes_their_time(
    scene: Scene, relay: str
) -> None:
    result = add_reader(scene, pause=0)
    wait = result.with_name("wait")
    wait.touch()
    count = 0
    async with await connect(await unix_route(scene)) as stream:
        await until("it is established", lambda: scene.calls("established"))
        # As much as there is room for on the way; by pipes, only what there is
        # room for behind the daemon, which carries the rest.
        with trio.move_on_after(1):
            while relay == "hand-over" or count < 520_000:
                count += await stream.socket.send(bytes(10_000))
    # Until the daemon has seen the client go.
    await trio.sleep(1)
    await scene.systemctl("stop", SERVICE)
    await scene.logged("watching over 1 connection of an earlier daemon")
    # Longer than one is left that has nothing to do.
    await trio.sleep(2.5)
    wait.unlink()
    await arrives(scene, result, count)


async def test_bytes_sent_before_the_set_up_wait_for_it(
    scene: Scene, relay: str
) -> None:
    """The client has gone long before the qube has started."""
    result = add_reader(scene, pause=0)
    path = await unix_route(scene)
    scene.faults("delay=4")
    async with await connect(path) as stream:
        await send(stream, bytes(1000))
    await arrives(scene, result, 1000)


async def test_a_client_that_says_nothing_is_not_counted_below_zero(
    scene: Scene,
) -> None:
    address = await scene.route()
    for how in ("close", "reset"):
        async with await connect(address) as stream:
            await until("it is accepted", scene.calls)
            if how == "reset":
                vanish(stream)
        await scene.nobody_stays()
    await scene.logged("lasted", times=2)
    assert not scene.lines("-1 B")
