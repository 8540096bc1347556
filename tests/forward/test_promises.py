"""What SECURITY.md promises, and nothing else tries to break."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
from collections.abc import Iterator

import pytest
from scenario import (
    Scene,
    connect,
    echo,
    echoes,
    is_reset,
    receive_exactly,
    send,
)


async def test_every_connection_is_decided_by_dom0(
    scene: Scene, relay: str
) -> None:
    """That one was allowed says nothing of the next."""
    address = await scene.route(echo)
    async with await connect(address) as allowed:
        assert await echoes(allowed)
        scene.policy("* * client * deny")
        assert await is_reset(address)
        assert await echoes(allowed)
        scene.policy("* * client * allow")
        async with await connect(address) as again:
            assert await echoes(again)
    assert len(scene.calls()) == 3


def writable_memory(pid: int) -> Iterator[bytes]:
    with (
        open(f"/proc/{pid}/maps") as maps,
        open(f"/proc/{pid}/mem", "rb", buffering=0) as memory,
    ):
        for line in maps:
            found = re.match(r"(\w+)-(\w+) rw", line)
            if found is None:
                continue
            start, end = (int(part, 16) for part in found.groups())
            with contextlib.suppress(OSError, OverflowError):
                memory.seek(start)
                yield memory.read(end - start)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can read its memory")
async def test_the_daemon_has_seen_nothing_of_what_passed(
    scene: Scene, relay: str
) -> None:
    address = await scene.route(echo)
    secret = secrets.token_bytes(32)
    async with await connect(address) as stream:
        for _ in range(3):
            await send(stream, secret)
            assert await receive_exactly(stream, len(secret)) == secret
        # The daemon's own words are there, so this looks in the right place.
        pages = list(writable_memory(scene.pid()))
        assert any(b"qubes.ConnectTCP" in page for page in pages)
        assert not any(secret[:16] in page for page in pages)
    assert secret.hex() not in scene.log()
    assert repr(secret) not in scene.log()
