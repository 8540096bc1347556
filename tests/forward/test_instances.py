"""Instances come and go while the daemon runs, and connections that are open
notice nothing of it."""

from __future__ import annotations

import os
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
import trio
from scenario import (
    SERVICE,
    Scene,
    ask,
    connect,
    echo,
    echoes,
    free_port,
    is_reset,
    refuses,
    says,
    until,
    write_script,
)


def instance(port: int) -> str:
    return f"qrexec-connect-tcp@{port}.socket"


def label(scene: Scene, label: str) -> str:
    return f"qrexec-connect-tcp@{scene.port}:{label}.socket"


async def another(scene: Scene) -> tuple[str, tuple[str, int]]:
    """A second instance for the qube `work`, written but not yet loaded."""
    port = free_port()
    address = scene.address(port)
    await scene.serve("work", says(f"work {port}"), port)
    scene.drop_in("work", address, unit=instance(port))
    return instance(port), address


async def test_an_instance_is_enabled_while_the_daemon_runs(
    scene: Scene,
) -> None:
    first = await scene.route()
    assert await ask(first) == "work"
    assert scene.state() == "active"
    unit, second = await another(scene)
    await scene.start(unit)
    assert await ask(second) == f"work {second[1]}"
    assert await ask(first) == "work"


async def test_stopping_an_instance_closes_its_port_and_no_other(
    scene: Scene,
) -> None:
    first = await scene.route()
    unit, second = await another(scene)
    await scene.start(unit)
    assert await ask(first) == "work"
    assert await ask(second) == f"work {second[1]}"
    await scene.systemctl("stop", scene.unit)
    assert refuses(first)
    assert await ask(second) == f"work {second[1]}"
    await scene.systemctl("disable", "--now", unit)
    assert refuses(second)


async def test_who_comes_between_the_end_of_the_daemon_and_the_port_is_reset(
    scene: Scene, tmp_path: Path
) -> None:
    """systemd accepts and closes, itself, what comes to a socket that is still
    to be stopped after its service: no empty answer may come of that."""
    first = await scene.route()
    assert await ask(first) == "work"
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    scene.machine.write_unit(
        "slow.service",
        f"[Unit]\nAfter={scene.unit}\n[Service]\nType=oneshot\n"
        "RemainAfterExit=yes\nExecStart=true\n"
        f"ExecStop=sh -c 'read line < {fifo}'\n",
    )
    scene.write("slow", "[Unit]", "PropagatesStopTo=slow.service")
    await scene.systemctl("daemon-reload")
    await scene.systemctl("start", "slow.service")
    await scene.systemctl("stop", "--no-block", scene.unit)
    await until("the daemon ends", lambda: scene.state() == "inactive")
    try:
        assert await is_reset(first, b"")
    finally:
        await trio.Path(fifo).write_text("now\n")
    await until("the port is closed", lambda: refuses(first))


async def test_a_labelled_unit_is_a_route_that_stops_alone(
    scene: Scene,
) -> None:
    """Three units of one port: two with labels, beside one of the plain
    kind."""
    plain = await scene.route()
    labelled = {}
    for qube in ("gitweb", "mail"):
        await scene.qube(qube)
        labelled[qube] = scene.address()
        scene.drop_in(qube, labelled[qube], unit=label(scene, qube))
    await scene.start(*(label(scene, qube) for qube in labelled))
    for qube, address in [("work", plain), *labelled.items()]:
        assert await ask(address) == qube
    async with await connect(labelled["gitweb"]) as stream:
        await scene.systemctl("stop", label(scene, "mail"))
        assert refuses(labelled["mail"])
        await stream.send_eof()
        assert await stream.receive_some() == b"gitweb"
    for qube, address in [("work", plain), ("gitweb", labelled["gitweb"])]:
        assert await ask(address) == qube
    await scene.systemctl("start", label(scene, "mail"))
    assert await ask(labelled["mail"]) == "mail"


async def test_a_labelled_unit_without_a_target_leaves_its_neighbours_alone(
    scene: Scene,
) -> None:
    """systemd then passes the unit's own name, whose colon is that by which it
    joins names."""
    plain = await scene.route()
    nameless = scene.address()
    unit = label(scene, "a:b")
    scene.drop_in("nameless", nameless, target="", unit=unit)
    await scene.start(unit)
    assert await is_reset(nameless)
    assert await ask(plain) == "work"


async def test_a_stopped_instance_can_be_started_again(scene: Scene) -> None:
    first = await scene.route()
    assert await ask(first) == "work"
    await scene.systemctl("stop", scene.unit)
    assert refuses(first)
    await scene.systemctl("start", scene.unit)
    assert await ask(first) == "work"


async def test_changes_while_a_client_waits_in_the_backlog_lose_nobody(
    scene: Scene,
) -> None:
    """With a single place and an answer that takes its time, the second client
    waits in the kernel."""
    scene.options(MAX_CONNECTIONS="1")
    first = await scene.route(echo)
    async with await connect(first) as running:
        assert await echoes(running)
        async with await connect(first) as waiting:
            await waiting.send_all(b"ping")
            unit, second = await another(scene)
            await scene.start(unit)
            assert await echoes(running)
            await running.aclose()
            assert await waiting.receive_some() == b"ping"
    assert await ask(second) == f"work {second[1]}"


async def test_open_connections_survive_every_change_of_the_instances(
    scene: Scene,
) -> None:
    first = await scene.route(echo)
    unit, _ = await another(scene)
    changes = [
        ("start", unit),
        ("restart", unit),
        ("stop", unit),
        ("enable", "--now", unit),
        ("restart", scene.unit),
        ("daemon-reload",),
        ("stop", scene.unit),
        ("start", scene.unit),
        ("disable", "--now", unit),
        ("restart", "qrexec-connect-tcp.service"),
        ("stop", "qrexec-connect-tcp.service"),
    ]
    async with AsyncExitStack() as stack:
        streams = [
            await stack.enter_async_context(await connect(first))
            for _ in range(10)
        ]
        for stream in streams:
            assert await echoes(stream)
        await scene.systemctl("daemon-reload")
        for change in changes:
            await scene.systemctl(*change)
            for stream in streams:
                assert await echoes(stream), change
        # A new connection starts the daemon again, beside the old ones.
        assert await ask(first, b"new") == "new"
    await scene.nobody_stays()


@pytest.mark.slow
async def test_restarts_in_a_row_never_refuse_the_next_connection(
    scene: Scene,
) -> None:
    first = await scene.route()
    for _ in range(15):
        await scene.systemctl("restart", scene.unit)
        assert await ask(first) == "work"
    assert scene.state(scene.unit) == "active"


async def test_the_changes_of_one_prefix_leave_the_other_prefixes_alone(
    scene: Scene,
) -> None:
    script = scene.machine.add_qube("vault") / "rpc" / "qubes.ConnectUnix"
    write_script(script, "#!/bin/sh\nexec cat\n")
    path = str(scene.machine.runtime / "notes")
    scene.drop_in("vault", path, unit="qrexec-connect-unix@notes.socket")
    await scene.start("qrexec-connect-unix@notes.socket")
    assert await ask(path, b"hello") == "hello"
    pid = scene.pid("qrexec-connect-unix.service")
    first = await scene.route()
    assert await ask(first) == "work"
    await scene.systemctl("restart", scene.unit)
    await scene.systemctl("stop", scene.unit)
    assert scene.pid("qrexec-connect-unix.service") == pid
    assert await ask(path, b"hello") == "hello"


async def test_a_bind_address_reaches_the_service_side_as_port_and_address(
    scene: Scene,
) -> None:
    """The third prefix: the instance is PORT-ADDRESS, and a dash in it stays a
    dash."""
    script = scene.machine.add_qube("nas") / "rpc" / "qubes.ConnectTCPBind"
    write_script(
        script,
        '#!/bin/sh\ncat >/dev/null\nprintf %s "$QREXEC_SERVICE_ARGUMENT"\n',
    )
    address = scene.address()
    six = scene.address()
    scene.drop_in(
        "nas", address, unit="qrexec-connect-tcp-bind@2049-127.0.1.1.socket"
    )
    scene.drop_in(
        "nas", six, unit="qrexec-connect-tcp-bind@2049-fd00\\x2b\\x2b7.socket"
    )
    await scene.start(
        "qrexec-connect-tcp-bind@2049-127.0.1.1.socket",
        "qrexec-connect-tcp-bind@2049-fd00\\x2b\\x2b7.socket",
    )
    assert await ask(address) == "2049-127.0.1.1"
    assert await ask(six) == "2049-fd00++7"


@pytest.mark.parametrize("verb", ["stop", "restart"])
async def test_a_daemon_that_is_told_to_go_at_once_after_its_start_goes(
    scene: Scene, verb: str
) -> None:
    first = await scene.route()
    async with await connect(first) as stream:
        # It may not even be up by now. But it begins to: else systemd cancels
        # an order to stop for the connection that comes behind it.
        await until("it starts", lambda: scene.state(SERVICE) != "inactive")
        await scene.systemctl(verb, "qrexec-connect-tcp.service")
        await stream.send_eof()
        with trio.fail_after(60):
            assert await stream.receive_some() == b"work"


@pytest.mark.slow
async def test_starts_that_come_to_something_are_never_too_many(
    scene: Scene,
) -> None:
    """Also where a change ends the daemon before it is up."""
    limit = ("[Unit]", "StartLimitIntervalSec=1h", "StartLimitBurst=3")
    # A daemon that did not hear of it would be killed in the end.
    limit = (*limit, "[Service]", "TimeoutStopSec=50s")
    scene.write("limit", *limit, unit=SERVICE)
    first = await scene.route()
    for number in range(10):
        async with await connect(first) as stream:
            if number % 2:
                await until("it starts", lambda: scene.state() != "inactive")
                await scene.systemctl("stop", SERVICE)
                assert scene.machine.property(SERVICE, "Result") == "success"
            await stream.send_eof()
            with trio.fail_after(60):
                assert await stream.receive_some() == b"work"
        await scene.systemctl("stop", SERVICE)
    assert scene.state(scene.unit) == "active"
