"""What the record of a connection says, in words that a user understands."""

from __future__ import annotations

import contextlib
import signal
import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qrexec_activate.forward.outcome import (
    DISCONNECT,
    TCP_INFO,
    Ending,
    Outcome,
    format_bytes,
    format_seconds,
)


def ended(code: int | None, *, established: bool = True) -> Outcome:
    return Outcome(Ending.CLIENT_EXITED, established, 1.5, exit_code=code)


@pytest.mark.parametrize(
    ("count", "words"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1536, "1.5 KiB"),
        (1024**2 - 400, "1023.6 KiB"),
        (1024**2 - 41, "1.0 MiB"),
        (1024**2 - 1, "1.0 MiB"),
        (64 * 1024**2, "64.0 MiB"),
        (5 * 1024**5, "5120.0 TiB"),
    ],
)
def test_bytes_are_written_for_people(count: int, words: str) -> None:
    assert format_bytes(count) == words


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0, "0.000 s"),
        (0.0123, "0.012 s"),
        (9.7, "9.700 s"),
        (9.9999, "10.0 s"),
        (42, "42.0 s"),
        (59.7, "59.7 s"),
        (59.96, "1 min 0 s"),
        (200, "3 min 20 s"),
        (3599.9, "1 h 0 min"),
        (7500, "2 h 5 min"),
    ],
)
def test_durations_are_written_for_people(seconds: float, words: str) -> None:
    assert format_seconds(seconds) == words


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (0, "ended"),
        (3, "ended with the service's exit code 3"),
        (126, "ended with the service's exit code 126"),
        (128, "ended with the service's exit code 128"),
        (
            129,
            "ended with exit code 129: the service's own, or it was killed by"
            " SIGHUP",
        ),
        (
            137,
            "ended with exit code 137: the service's own, or it was killed by"
            " SIGKILL",
        ),
        (
            254,
            "ended with exit code 254: the service's own, or it was killed by"
            " signal 126",
        ),
        (
            255,
            "ended with exit code 255: the service's own, or the target qube"
            " closed the call early",
        ),
        (-signal.SIGTERM, "cut off: qrexec-client-vm was killed by SIGTERM"),
        (None, "ended"),
    ],
)
def test_a_call_that_was_set_up_never_blames_qrexec_for_the_exit_code(
    code: int | None, words: str
) -> None:
    assert ended(code).words() == f"{words}, lasted 1.500 s"


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (0, "before the call was set up"),
        (1, "qubes-qrexec-agent"),
        (2, "called wrongly"),
        (125, "nothing listens on that port"),
        (126, "refused: by the policy in dom0"),
        (127, "no such service"),
        (255, "closed the call before"),
        (42, ": the service ended before the call was set up, lasted"),
    ],
)
def test_a_call_that_was_never_set_up_says_what_the_code_means(
    code: int, words: str
) -> None:
    outcome = ended(code, established=False)
    assert outcome.failed
    assert outcome.words().startswith(f"failed with exit code {code}: ")
    assert words in outcome.words()


@pytest.mark.parametrize(
    ("code", "count", "without"),
    [
        (125, 0, True),
        (125, None, True),
        (127, 1, False),
        (255, 0, True),
        (255, None, False),
        (255, 1, False),
        (0, 0, False),
        (1, 0, False),
    ],
)
def test_an_empty_answer_of_a_call_that_failed_is_said_to_be_none(
    code: int, count: int | None, without: bool
) -> None:
    outcome = ended(code)
    outcome.bytes_from_qube = count
    assert outcome.without_a_byte is without
    assert ("an empty answer" in outcome.words()) is without
    outcome.established = False
    assert not outcome.without_a_byte


def test_a_client_that_was_killed_before_the_call_was_set_up_says_by_what() -> (
    None
):
    assert (
        "killed by SIGKILL before the call was set up"
        in ended(-9, established=False).words()
    )


def test_all_that_is_known_is_told() -> None:
    outcome = Outcome(Ending.CLIENT_EXITED, True, 75, 0.025, 0, 3, 512, 2048)
    assert outcome.words() == (
        "ended, after 3 tries, set up in 0.025 s, lasted 1 min 15 s, 512 B to"
        " the qube, 2.0 KiB from it"
    )
    outcome = Outcome(Ending.TIMED_OUT, False, 300, tries=2)
    assert (
        outcome.words() == "no answer in time, after 2 tries, lasted 5 min 0 s"
    )


def test_without_an_exit_code_as_much_is_said_as_can_be_seen() -> None:
    """That of an earlier daemon's child nobody knows."""
    outcome = ended(None, established=False)
    assert outcome.words() == (
        "failed: qrexec-client-vm ended before the call was set up, lasted"
        " 1.500 s"
    )
    outcome = ended(None)
    outcome.cut = True
    assert outcome.words() == (
        "cut off: qrexec-client-vm was killed, lasted 1.500 s"
    )


def test_a_detail_takes_the_place_of_the_exit_code() -> None:
    outcome = Outcome(
        Ending.NOT_STARTED, False, 0, exit_code=1, detail="no such file"
    )
    assert outcome.words() == "not started: no such file, lasted 0.000 s"


@pytest.mark.parametrize(
    ("outcome", "failed"),
    [
        (ended(0), False),
        (ended(3), False),
        (ended(None), False),
        (ended(1), True),
        (ended(255), True),
        (ended(-9), True),
        (ended(0, established=False), True),
        (Outcome(Ending.CLIENT_GONE, False, 1), False),
        (Outcome(Ending.CLIENT_GONE, True, 1), False),
        (Outcome(Ending.TIMED_OUT, False, 1), True),
        (Outcome(Ending.LOST, False, 1), True),
        (Outcome(Ending.NOT_STARTED, False, 1), True),
        (Outcome(Ending.STOPPED, True, 1), True),
    ],
)
def test_a_client_that_left_by_itself_is_no_failure(
    outcome: Outcome, failed: bool
) -> None:
    assert outcome.failed is failed


@given(
    st.sampled_from(Ending),
    st.booleans(),
    st.floats(0, 1e7),
    st.none() | st.floats(0, 1e6),
    st.none() | st.integers(-100, 300),
    st.integers(1, 9),
    st.none() | st.integers(0, 2**70),
)
def test_every_outcome_has_one_line_of_words(
    ending: Ending,
    set_up: bool,
    duration: float,
    setup: float | None,
    code: int | None,
    tries: int,
    count: int | None,
) -> None:
    words = Outcome(
        ending, set_up, duration, setup, code, tries, count, count
    ).words()
    assert words
    assert len(words.splitlines()) == 1


@pytest.mark.parametrize("established", [True, False])
def test_an_end_by_a_person_is_no_failure(established: bool) -> None:
    outcome = ended(-DISCONNECT, established=established)
    outcome.cut = established
    assert not outcome.failed
    assert outcome.words().startswith(
        "ended by a person, with qrexec-activate disconnect, lasted"
    )
    outcome.exit_code = -signal.SIGTERM
    assert outcome.failed


@pytest.mark.parametrize(
    ("outcome", "cleanly"),
    [
        (ended(0), True),
        (ended(5), True),
        (ended(None), True),
        (ended(-9), False),
        (ended(0, established=False), False),
        (Outcome(Ending.STOPPED, True, 1), False),
        (Outcome(Ending.CLIENT_EXITED, True, 1, exit_code=1, cut=True), False),
        (
            Outcome(
                Ending.CLIENT_EXITED, True, 1, exit_code=127, bytes_from_qube=0
            ),
            False,
        ),
    ],
)
def test_only_what_may_be_a_whole_answer_ends_cleanly(
    outcome: Outcome, cleanly: bool
) -> None:
    assert outcome.ends_cleanly is cleanly


def test_an_answer_that_qrexec_cut_off_says_so() -> None:
    outcome = ended(1)
    outcome.cut = True
    assert outcome.failed
    assert outcome.words().startswith(
        "cut off: qrexec-client-vm failed with exit code 1"
    )


(
    ESTABLISHED,
    FIN_WAIT_1,
    FIN_WAIT_2,
    TIME_WAIT,
    CLOSE,
    CLOSE_WAIT,
    LAST_ACK,
    CLOSING,
) = (
    1,
    4,
    5,
    6,
    7,
    8,
    9,
    11,
)


def counted(
    state: int,
    received: int,
    ending: Ending = Ending.CLIENT_EXITED,
    unsent: int = 0,
) -> tuple[int | None, int | None]:
    outcome = Outcome(ending, True, 1.5)
    outcome.count(TCP_INFO.pack(state, received, unsent, 5000, 1000))
    return outcome.bytes_to_qube, outcome.bytes_from_qube


def test_what_tcp_sent_twice_counts_once() -> None:
    assert counted(ESTABLISHED, 10) == (10, 4000)


@pytest.mark.parametrize("state", [TIME_WAIT, CLOSE_WAIT, LAST_ACK, CLOSING])
def test_the_end_of_what_the_client_sends_is_no_byte_of_it(state: int) -> None:
    assert counted(state, 10) == (9, 4000)
    assert counted(FIN_WAIT_2, 10) == (10, 4000)


def test_a_closed_socket_has_had_an_end_unless_its_client_was_reset() -> None:
    assert counted(CLOSE, 10) == (9, 4000)
    assert counted(CLOSE, 10, Ending.CLIENT_GONE) == (10, 4000)


def test_a_client_that_was_reset_before_a_byte_has_sent_none() -> None:
    assert counted(CLOSE, 0) == (0, 4000)


@pytest.mark.parametrize(
    ("state", "sent"),
    [
        (ESTABLISHED, 4300),
        (CLOSE_WAIT, 4300),
        # The end of the stream is the last of them.
        (FIN_WAIT_1, 4299),
        (LAST_ACK, 4299),
        (CLOSING, 4299),
        # It was reset, and never had them.
        (CLOSE, 4000),
    ],
)
def test_what_is_yet_to_be_sent_counts_if_it_will_be(
    state: int, sent: int
) -> None:
    _, from_qube = counted(state, 10, unsent=300)
    assert from_qube == sent


def test_a_slow_client_that_half_closes_gets_all_that_is_counted() -> None:
    """The last of it is sent when nobody looks any more."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = socket.create_connection(listener.getsockname())
        ours, _ = listener.accept()
    with client, ours:
        client.sendall(b"question")
        client.shutdown(socket.SHUT_WR)
        client.settimeout(60)
        ours.settimeout(60)
        while ours.recv(100):
            pass
        ours.setblocking(False)
        given = 0
        with contextlib.suppress(BlockingIOError):
            while True:
                given += ours.send(bytes(1 << 20))

        def counts() -> tuple[int | None, int | None]:
            outcome = Outcome(Ending.CLIENT_EXITED, True, 1.5)
            outcome.count(
                ours.getsockopt(
                    socket.IPPROTO_TCP, socket.TCP_INFO, TCP_INFO.size
                )
            )
            return outcome.bytes_to_qube, outcome.bytes_from_qube

        assert counts() == (8, given)
        ours.shutdown(socket.SHUT_WR)
        assert counts() == (8, given)
        got = 0
        while data := client.recv(1 << 20):
            got += len(data)
        assert got == given
        assert counts() == (8, given)


def test_a_kernel_that_does_not_count_is_no_reason_to_guess() -> None:
    outcome = Outcome(Ending.CLIENT_EXITED, True, 1.5)
    outcome.count(bytes(TCP_INFO.size - 1))
    assert outcome.bytes_to_qube is None
    assert outcome.bytes_from_qube is None


@pytest.mark.parametrize(
    ("code", "may"), [(None, True), (1, True), (0, False), (255, False)]
)
def test_only_what_may_have_been_killed_is_looked_at_for_a_cut(
    code: int | None, may: bool
) -> None:
    assert ended(code).may_be_cut is may
    assert not ended(code, established=False).may_be_cut
    gone = Outcome(Ending.CLIENT_GONE, True, 1.5, exit_code=code)
    assert not gone.may_be_cut
    assert not gone.has_run
