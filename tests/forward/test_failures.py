"""What a user sees when a call fails: a reset, a line that says why, and all
others served."""

from __future__ import annotations

import contextlib

import pytest
import trio
from scenario import (
    PATIENCE,
    SERVICE,
    Scene,
    ask,
    connect,
    echo,
    is_reset,
    receive_all,
    receive_exactly,
    says,
    sees_reset,
    send,
    silent,
    until,
    write_script,
)

#: Times that are the daemon's own choice are never measured here, but retries
#: and lost calls need them.
LONG = 6 * PATIENCE


async def ask_many(scene: Scene, address: tuple[str, int], count: int) -> None:
    """So many at once, each of which must get its answer."""

    async def one() -> None:
        async with await connect(address) as stream:
            await send(stream, b"who?")
            await stream.send_eof()
            with trio.fail_after(LONG):
                assert b"".join([chunk async for chunk in stream]) == b"work"

    async with trio.open_nursery() as nursery:
        for _ in range(count):
            nursery.start_soon(one)


# --------------------------------------------------------------------- one call


async def test_a_missing_client_is_named_with_its_package(scene: Scene) -> None:
    scene.options(CLIENT="/nowhere/qrexec-client-vm")
    address = await scene.route()
    assert await is_reset(address)
    assert await is_reset(address)
    await scene.logged(
        "cannot start /nowhere/qrexec-client-vm",
        "qubes-core-qrexec",
        "--client",
        times=2,
    )
    assert scene.state() == "active"


async def test_a_client_that_cannot_be_run_is_named(scene: Scene) -> None:
    scene.options(CLIENT=str(scene.machine.home))
    address = await scene.route()
    assert await is_reset(address)
    await scene.logged(f"cannot start {scene.machine.home}: Permission denied")


@pytest.mark.parametrize(
    ("arrange", "code", "words"),
    [
        ("policy", 126, "refused: by the policy in dom0"),
        ("no service", 127, "no such service in the target qube"),
        ("closed port", 125, "nothing listens on that port"),
        ("exit=2", 2, "called wrongly"),
        ("exit=255", 255, "the target qube closed the call"),
    ],
)
async def test_a_call_that_never_comes_about_is_a_reset_with_its_reason(
    scene: Scene, relay: str, arrange: str, code: int, words: str
) -> None:
    address, service = scene.address(), SERVICE
    folder = scene.add_qube("work")
    if arrange == "policy":
        scene.policy("* * client gitweb allow")
    elif arrange == "no service":
        unit = "qrexec-connect-tcp-bind@2049-127.0.1.1.socket"
        service = "qrexec-connect-tcp-bind.service"
        scene.options(service=service, RELAY=relay)
    elif arrange == "closed port" and scene.stack:
        # 125 is of services that are sockets, and so of 4.2.19 and newer.
        scene.stack.needs_hand_over()
        scene.stack.serve("work", scene.port, "127.0.0.1")
    elif arrange.startswith("exit"):
        await scene.serve("work", says("work"))
        scene.faults(arrange)
    if arrange == "no service":
        # qubes.ConnectTCP is always there, so this one of the bind prefix,
        # which nobody has installed in the qube.
        scene.drop_in("work", address, unit=unit)
        await scene.start(unit)
    else:
        scene.drop_in("work", address)
        await scene.start()
    assert folder.exists()
    async with await connect(address) as stream:
        # That a service is missing is found out after the target has taken the
        # call: then qrexec-client-vm itself has ended a stream that it holds.
        late = code in (125, 127) and relay == "hand-over"
        assert await sees_reset(stream) is not late
    (line,) = await scene.logged(f"failed with exit code {code}: ")
    assert words in line
    assert ("may have seen an empty answer" in line) is (code in (125, 127))
    await until(
        "it is counted",
        lambda: " 1 failed" in scene.machine.property(service, "StatusText"),
    )
    assert len(scene.calls()) == 1


async def test_a_halted_qube_is_a_refusal(scene: Scene) -> None:
    address = await scene.route()
    halted = scene.loopback / "qubes" / "work" / "halted"
    halted.touch()
    assert await is_reset(address)
    await scene.logged("failed with exit code 126", "halted")
    halted.unlink()
    assert await ask(address) == "work"


async def test_a_refusal_is_not_tried_again(scene: Scene) -> None:
    address = await scene.route()
    scene.faults("refuse=1")
    for _ in range(3):
        assert await is_reset(address)
    assert len(scene.calls()) == 3


@pytest.mark.usefixtures("relay")
async def test_a_call_that_breaks_off_midway_says_so(scene: Scene) -> None:
    """The target qube's side went: qrexec-client-vm half-closes, as at any end,
    then exits 255."""
    address = await scene.route(echo)
    scene.faults("end-early=1 end-early-after=6")
    async with await connect(address) as stream:
        await send(stream, b"ping")
        await receive_all(stream)
    (line,) = await scene.logged("ended with exit code 255")
    assert "the target qube closed the call early" in line
    await scene.nobody_stays()


async def test_a_call_that_breaks_off_before_a_byte_is_no_empty_answer(
    scene: Scene, relay: str
) -> None:
    address = await scene.route(silent)
    scene.faults("end-early=1 end-early-after=1")
    async with await connect(address) as stream:
        # By hand-over, qrexec-client-vm itself has ended a stream that it
        # holds: then only the log can tell.
        assert await sees_reset(stream, b"hello") is (relay == "splice")
    await scene.logged(
        "failed with exit code 255: the target qube closed the call before it"
        " had said anything",
        "may have seen an empty answer",
    )


@pytest.mark.usefixtures("relay")
async def test_a_client_that_is_killed_midway_is_a_reset(scene: Scene) -> None:
    """Nobody could tell a clean end from half an answer."""
    address = await scene.route(echo)
    scene.faults("die-after=0.3")
    async with await connect(address) as stream:
        await send(stream, b"ping")
        assert await receive_exactly(stream, 4) == b"ping"
        assert await sees_reset(stream)
    await scene.logged("qrexec-client-vm was killed by SIGKILL")


async def test_the_services_own_exit_code_is_told_and_blames_nobody(
    scene: Scene,
) -> None:
    folder = await scene.qube("work")
    script = folder / "rpc" / f"qubes.ConnectTCP+{scene.port}"
    write_script(script, "#!/bin/sh\ncat\nexit 126\n")
    address = scene.address()
    scene.drop_in("work", address)
    await scene.start()
    assert await ask(address, b"hello") == "hello"
    (line,) = await scene.logged("exit code 126")
    assert "the service's exit code 126" in line
    assert "policy" not in line


async def test_what_the_client_says_on_stderr_is_in_the_log(
    scene: Scene,
) -> None:
    address = await scene.route()
    scene.faults("refuse=1")
    assert await is_reset(address)
    assert await is_reset(address)
    await until(
        "both messages are there",
        lambda: scene.log().splitlines().count("Request refused") == 2,
    )


# ------------------------------------------ calls that fail and are tried again


@pytest.mark.usefixtures("relay")
async def test_a_call_whose_data_channel_fails_five_times_succeeds_at_the_sixth(
    scene: Scene,
) -> None:
    address = await scene.route()
    scene.faults("vchan-failure=1 first=5")
    async with await connect(address) as stream:
        await send(stream, b"who?")
        await stream.send_eof()
        with trio.fail_after(LONG):
            assert await stream.receive_some() == b"work"
    await scene.logged("ended, after 6 tries")
    assert len(scene.calls()) == 6


@pytest.mark.slow
@pytest.mark.usefixtures("relay")
async def test_a_storm_in_which_half_of_all_set_ups_fail_is_weathered_by_all(
    scene: Scene,
) -> None:
    address = await scene.route()
    # After so many calls it is over, so that no connection can be unlucky six
    # times in a row.
    scene.faults("vchan-failure=0.5 first=60")
    await ask_many(scene, address, 60)
    tries = [
        line
        for line in await scene.logged("ended,", times=60)
        if "tries" in line
    ]
    assert tries
    assert len(scene.calls("established")) == 60


async def test_more_set_ups_than_xen_takes_are_spread_by_retries(
    scene: Scene,
) -> None:
    address = await scene.route()
    scene.faults("max-setups=5")
    await ask_many(scene, address, 60)
    await scene.logged("ended,", times=60)


@pytest.mark.slow
@pytest.mark.usefixtures("relay")
async def test_lost_calls_are_made_again_once_others_have_overtaken_them(
    scene: Scene,
) -> None:
    """About one in twelve here, and in qrexec 4.4.2 about 0.3 % of many at
    once."""
    address = await scene.route()
    scene.faults("lose=1 first=4")
    found, asked = trio.Event(), 0

    async def others() -> None:
        # On a busy machine none of many at once is quick, but one alone is,
        # sooner or later.
        nonlocal asked
        await until(
            "the others' calls", lambda: len(scene.calls("established")) >= 44
        )
        while not found.is_set():
            assert await ask(address) == "work"
            asked += 1
            with trio.move_on_after(1):
                await found.wait()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(others)
        await ask_many(scene, address, 48)
        found.set()
    lines = await scene.logged("ended,", times=48 + asked)
    assert sum("after 2 tries" in line for line in lines) == 4
    assert len(scene.calls("established")) == 48 + asked
    await scene.nobody_stays()


async def test_an_agent_that_is_away_for_a_moment_is_waited_for(
    scene: Scene,
) -> None:
    address = await scene.route()
    away = scene.loopback / "agent-down"
    away.touch()
    async with await connect(address) as stream:
        await send(stream, b"who?")
        await stream.send_eof()
        await scene.logged("connect: No such file or directory", times=2)
        away.unlink()
        assert await receive_all(stream) == b"work"
    assert await ask(address) == "work"


async def test_an_agent_that_stays_away_is_a_reset_after_some_tries(
    scene: Scene,
) -> None:
    address = await scene.route()
    away = scene.loopback / "agent-down"
    away.touch()
    async with await connect(address) as stream:
        with trio.fail_after(LONG):
            assert await sees_reset(stream)
    await scene.logged(
        "failed with exit code 1: qrexec could not set the call up",
        "after 6 tries",
    )
    away.unlink()
    assert await ask(address) == "work"


# ------------------------------------------------------------------ old clients


def be_old(scene: Scene) -> None:
    """Know no --use-stdin-socket."""
    if scene.stack:
        if scene.stack.hands_over:
            scene.stack.lacks("is newer than 4.2.18")
        return
    (scene.loopback / "version").write_text("4.2.18\n")


async def test_an_old_client_is_served_without_the_user_seeing_anything(
    scene: Scene,
) -> None:
    be_old(scene)
    address = await scene.route()
    assert await ask(address) == "work"
    assert await ask(address) == "work"
    await scene.logged("ended,", times=2)
    assert "unrecognized option" not in scene.log()
    assert "usage" not in scene.log()
    assert "tries" not in scene.log()


async def test_many_first_calls_of_an_old_client_are_all_served(
    scene: Scene,
) -> None:
    """Eight are under way before the first has shown that it takes no
    socket."""
    be_old(scene)
    address = await scene.route()
    await ask_many(scene, address, 20)
    await scene.logged("ended,", times=20)
    assert "unrecognized option" not in scene.log()


async def test_a_client_that_is_replaced_by_an_older_one_loses_nobody(
    scene: Scene,
) -> None:
    """What it takes was asked when the daemon started."""
    address = await scene.route()
    assert await ask(address) == "work"
    daemon = scene.pid()
    be_old(scene)
    await ask_many(scene, address, 20)
    await scene.logged("ended,", times=21)
    assert scene.pid() == daemon


async def test_an_old_client_with_hand_over_forced_fails_with_its_message(
    scene: Scene,
) -> None:
    be_old(scene)
    scene.options(RELAY="hand-over")
    address = await scene.route()
    assert await is_reset(address)
    await scene.logged("unrecognized option '--use-stdin-socket'")
    await scene.logged("failed with exit code 2", "called wrongly")


async def test_the_first_call_of_an_old_client_may_be_refused_or_fail(
    scene: Scene,
) -> None:
    be_old(scene)
    address = await scene.route()
    scene.faults("refuse=1 first=1")
    assert await is_reset(address)
    assert await ask(address) == "work"


# ----------------------------------------- a machine that is short of something


@pytest.mark.slow
@pytest.mark.usefixtures("relay")
async def test_a_daemon_short_of_descriptors_serves_all_in_its_own_time(
    scene: Scene,
) -> None:
    """What cannot be accepted waits in the backlog; what was accepted waits for
    a descriptor."""
    scene.write(
        "limit",
        "[Service]",
        "LimitNOFILE=40",
        unit="qrexec-connect-tcp.service",
    )

    async def slow(stream: trio.SocketStream) -> None:
        await receive_all(stream)
        await trio.sleep(0.3)
        await stream.send_all(b"work")

    address = await scene.route(slow)
    await ask(address)
    async with scene.same_descriptors():
        await ask_many(scene, address, 60)
    short = await scene.logged("the machine is short of something: ")
    assert all("Too many open files" in line for line in short)
    assert len(short) == 1, "it says so again and again"
    assert not scene.lines("internal error")


# ------------------------------------------------------------ short calls, often

#: What the service does, the question, the answer, and the exit code.
SHORT = {
    "answers": ("cat; echo done", b"word", b"worddone\n", 0),
    "speaks-first": ("echo hello", b"", b"hello\n", 0),
    "exits-0": ("exit 0", b"word", b"", 0),
    "exits-1": ("exit 1", b"word", b"", 1),
    "exits-5": ("exit 5", b"", b"", 5),
    "reads-and-exits-1": ("head -c 4; exit 1", b"word", b"word", 1),
}
TIMES = 200


def add_short(scene: Scene, name: str, script: str) -> tuple[str, int]:
    """A qube whose service does this, and counts how often it has run."""
    folder = scene.add_qube(name)
    service = folder / "rpc" / "qubes.ConnectTCP"
    write_script(service, f"#!/bin/sh\necho >>{folder}/runs\n{script}\n")
    address = scene.address()
    scene.drop_in(name, address)
    return address


def runs(scene: Scene, name: str) -> int:
    return len((scene.machine.loopback / "qubes" / name / "runs").read_text())


@pytest.mark.slow
async def test_short_calls_by_pipes_have_their_answer_and_run_once(
    scene: Scene,
) -> None:
    """The signs of the data phase are gone when it has ended."""
    if scene.stack and scene.stack.hands_over:
        scene.options(RELAY="splice")
    else:
        be_old(scene)
    addresses = {
        name: add_short(scene, name, script)
        for name, (script, *_) in SHORT.items()
    }
    await scene.start()

    async def customer(name: str) -> None:
        _, question, answer, _ = SHORT[name]
        for _ in range(TIMES // 2):
            async with await connect(addresses[name]) as stream:
                with contextlib.suppress(trio.BrokenResourceError):
                    await send(stream, question)
                    await stream.send_eof()
                assert await receive_all(stream) == answer

    async with trio.open_nursery() as nursery:
        for name in 2 * tuple(SHORT):
            nursery.start_soon(customer, name)
    await scene.logged("lasted", times=len(SHORT) * TIMES)
    if not scene.stack:
        # qrexec itself loses some calls, which are made again.
        assert not scene.lines("tries")
    for name, (_, _, _, code) in SHORT.items():
        assert runs(scene, name) == TIMES
        words = f"exit code {code}," if code else "ended, "
        assert len(scene.lines(f"→ {name} ", words)) == TIMES


@pytest.mark.slow
async def test_short_calls_after_a_prompt_run_once(scene: Scene) -> None:
    be_old(scene)
    scene.options(MAX_SETUPS="100")
    address = add_short(scene, "work", "cat; exit 1")
    # A person who takes that long; each answers one prompt.
    scene.policy("* * client * ask")
    scene.faults("delay=2.2")
    scene.answer("allow")
    await scene.start()

    async def customer() -> None:
        async with await connect(address) as stream:
            await send(stream, b"word")
            await stream.send_eof()
            with trio.fail_after(LONG):
                assert await stream.receive_some() == b"word"
            assert await receive_all(stream) == b""

    for _ in range(TIMES // 100):
        async with trio.open_nursery() as nursery:
            for _ in range(100):
                nursery.start_soon(customer)
    assert runs(scene, "work") == TIMES
    assert len(scene.calls("prompt")) == TIMES


async def test_a_service_that_fails_after_a_prompt_runs_once(
    scene: Scene, relay: str
) -> None:
    folder = scene.machine.add_qube("work")
    service = folder / "rpc" / "qubes.ConnectTCP"
    service.write_text(f"#!/bin/sh\necho >>{folder}/runs\nexit 1\n")
    service.chmod(0o755)
    address = scene.address()
    scene.drop_in("work", address)
    await scene.start()
    scene.policy("* * client * ask default_target=work")
    async with await connect(address) as stream:
        await until("a person is asked", lambda: scene.calls("prompt"))
        await trio.sleep(2.2)
        (scene.machine.loopback / "answer").write_text("allow\n")
        assert await receive_all(stream) == b""
    await scene.logged("ended with the service's exit code 1")
    assert len(scene.calls("prompt")) == 1
    assert len((folder / "runs").read_text()) == 1
