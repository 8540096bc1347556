"""A daemon that is killed: what qrexec-client-vm holds goes on, and what the
daemon held itself is reset."""

from __future__ import annotations

import pytest
from scenario import SERVICE, Scene, ask, connect, echo, echoes, sees_reset


async def kill(scene: Scene) -> None:
    await scene.systemctl("kill", "--kill-whom=main", "--signal=KILL", SERVICE)


async def test_what_was_handed_over_goes_on(scene: Scene) -> None:
    if scene.stack:
        scene.stack.needs_hand_over()
    scene.options(RELAY="hand-over")
    address = await scene.route(echo)
    async with await connect(address) as stream:
        assert await echoes(stream)
        await kill(scene)
        assert await echoes(stream)


async def test_what_was_spliced_is_reset_and_does_not_seem_to_end(
    scene: Scene,
) -> None:
    scene.options(RELAY="splice")
    address = await scene.route(echo)
    async with await connect(address) as stream:
        assert await echoes(stream)
        await kill(scene)
        assert await sees_reset(stream)
    assert await ask(address) == "who?"


@pytest.mark.parametrize("half_closed", [False, True])
async def test_a_spliced_connection_that_ends_well_is_not_reset(
    scene: Scene, half_closed: bool
) -> None:
    scene.options(RELAY="splice")
    address = scene.address()
    script = scene.add_qube("work") / "rpc" / "qubes.ConnectTCP"
    script.write_text("#!/bin/sh\nhead -c 50000 /dev/zero\n")
    script.chmod(0o755)
    scene.drop_in("work", address)
    await scene.start()
    async with await connect(address) as stream:
        if half_closed:
            await stream.send_eof()
        await scene.logged("ended, ")
        received = 0
        async for chunk in stream:
            received += len(chunk)
    assert received == 50_000
