"""The RPC services, really run, with random arguments: nothing but what was
meant reaches a command line.

A service finds no program but tracers (tracer.c), which write down how they
were called. After each run, the record must be exactly the one command line
that a validator of its own, in Python, computes from the argument, or none at
all; and after it the one line of the journal that says what came of the call.
"""

from __future__ import annotations

import ipaddress
import os
import random
import re
import select
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["SERVICES", "check", "fuzz", "laboratory"]

HERE = Path(__file__).resolve().parent
RPC = HERE.parent / "rpc"
SERVICES = ("qubes.ConnectTCPBind", "qubes.ConnectUnix")

#: Names of sockets that are there, for qubes.ConnectUnix to find.
SOCKETS = ("ssh-agent", "a", "-V", "+x", "_.", "A.b-c_d+e", "x" * 60)
_PORT = re.compile(rb"[1-9][0-9]{0,4}")
_NAME = re.compile(rb"[A-Za-z0-9_+-][A-Za-z0-9_.+-]{0,104}")
_CALLER = re.compile(rb"[A-Za-z0-9_.@:+-]+")
#: What is logged of a call: printable, of one line, and no longer than the
#: longest path of a socket.
_OUTCOME = re.compile(rb"(?:refused|failed|could not connect)[ -~]{0,300}")

WORDS = [
    *(
        b"2049",
        b"-",
        b"127.0.0.1",
        b"fd00++7",
        b"++1",
        b"+",
        b"++",
        b".",
        b"0",
        b"00",
        b"65535",
        b"65536",
        b"255",
        b"256",
    ),
    *(
        b"$(x)",
        b"`x`",
        b"\n",
        b" ",
        b";x",
        b"|x",
        b"&",
        b"'",
        b'"',
        b"\\",
        b"*",
        b"?",
        b"[a-z]",
        b"~",
        b"$IFS",
        b"${HOME}",
    ),
    *(
        b"/",
        b"../",
        b"..",
        b"--",
        b"-n",
        b",fork",
        b":",
        b"!!",
        b"EXEC",
        b"\xc3\xa9",
        b"\xff",
        b"\t",
        b"\r",
        b"\x01",
        b"%s",
    ),
    *(
        b"0x10",
        b"1e3",
        b"+5",
        b"\xd9\xa1",
        b"1.2.3",
        b"1.2.3.4.5",
        b"0.0.0.0",
        b"1.2.3.04",
        b"++ffff+1.2.3.4",
        b"fe80++1%lo",
    ),
    *(name.encode() for name in SOCKETS),
]
SAFE = b"abcdefABCDEF0123456789_-.+"


def random_argument(service: str, rng: random.Random) -> bytes:
    """Nearly right ones, pieces that are special to some program, and noise."""
    match rng.randrange(5):
        case 0:
            return _nearly_right(service, rng)
        case 1:
            near = bytearray(_nearly_right(service, rng))
            at = rng.randint(0, len(near))
            near[at : at + rng.randint(0, 1)] = rng.choice(WORDS)
            return bytes(near).replace(b"\0", b"")
        case 2:
            return b"".join(rng.choice(WORDS) for _ in range(rng.randint(0, 8)))
        case 3:
            return bytes(rng.choice(SAFE) for _ in range(rng.randint(0, 120)))
        case _:
            return rng.randbytes(rng.randint(0, 60)).replace(b"\0", b"")


def _nearly_right(service: str, rng: random.Random) -> bytes:
    if service == "qubes.ConnectUnix":
        return rng.choice(SOCKETS).encode()
    port = str(rng.choice((rng.randint(0, 70000), rng.randint(1, 9)))).encode()
    if rng.random() < 0.5:
        return (
            port
            + b"-"
            + ".".join(
                str(rng.randint(0, 260))
                for _ in range(rng.choice((4, 4, 4, 3, 5)))
            ).encode()
        )
    address = ipaddress.IPv6Address(
        rng.choice(
            (
                rng.getrandbits(128),
                rng.getrandbits(16),
                rng.getrandbits(64) << 64,
            )
        )
    )
    written = rng.choice((str(address), address.exploded)).replace(":", "+")
    return port + b"-" + rng.choice((written, written.upper())).encode()


def expected(service: str, argument: bytes, folder: str) -> list[bytes] | None:
    """The command line of socat that is right for an argument; None: there must
    be none."""
    options = [
        b"socat",
        b"-d",
        b"-d",
        b"-b",
        b"65536",
        b"-t",
        b"604800",
        b"-lp",
    ]
    if service == "qubes.ConnectUnix":
        if not _NAME.fullmatch(argument) or argument.decode() not in SOCKETS:
            return None
        label = b"qubes.ConnectUnix to " + os.fsencode(folder) + b"/" + argument
        if len(label) > 200:
            label = b"qubes.ConnectUnix to " + argument
        return [
            *options,
            label,
            b"STDIN!!STDOUT,shut-down",
            b"UNIX-CONNECT:./" + argument,
        ]
    port, dash, address = argument.partition(b"-")
    if not dash or not _PORT.fullmatch(port) or int(port) > 65535:
        return None
    if not address or not set(address) <= set(SAFE):
        return None
    try:
        text = address.decode("ascii").replace("+", ":")
        parsed = ipaddress.ip_address(text)
        family = socket.AF_INET6 if parsed.version == 6 else socket.AF_INET
        canonical = socket.inet_ntop(family, parsed.packed)
    except (ValueError, UnicodeDecodeError):
        return None
    if canonical != text or int(parsed) == 0 or parsed.is_multicast:
        return None
    if parsed.version == 6 and "." in text:
        return None
    if parsed.version == 4:
        first, last = parsed.packed[0], parsed.packed[-1]
        if not 0 < first < 224 or last in (0, 255):
            return None
    # As it was written, with : for +.
    source, target = address.replace(b"+", b":"), b"127.0.0.1:" + port
    kind = b"TCP4"
    if parsed.version == 6:
        source, target, kind = b"[" + source + b"]", b"[::1]:" + port, b"TCP6"
    return [
        *(
            *options,
            b"qubes.ConnectTCPBind to " + target + b" from " + source,
            b"STDIN!!STDOUT,shut-down",
        ),
        kind + b":" + target + b",bind=" + source + b",sndbuf=212992,nodelay",
    ]


@contextmanager
def laboratory() -> Iterator[tuple[Path, Path]]:
    """A folder of tracers in place of all programs, and a runtime folder with
    sockets in it."""
    top = Path(tempfile.mkdtemp(prefix="qa-rpc-", dir="/tmp"))
    sockets = []
    try:
        programs = top / "bin"
        programs.mkdir()
        subprocess.run(
            [
                "cc",
                "-O1",
                "-static",
                "-o",
                str(programs / "socat"),
                str(HERE / "tracer.c"),
            ],
            check=True,
        )
        # Whatever else a service might run, by any name that there is on this
        # machine.
        for folder in ("/bin", "/usr/bin"):
            for program in os.listdir(folder):
                if not (programs / program).exists():
                    (programs / program).symlink_to("socat")
        folder = top / "run" / "qubes.ConnectUnix"
        folder.mkdir(parents=True)
        for name in SOCKETS:
            sock = socket.socket(socket.AF_UNIX)
            sock.bind(str(folder / name))
            sockets.append(sock)
        yield programs, top / "run"
    finally:
        for sock in sockets:
            sock.close()
        shutil.rmtree(top)


def check(service: str, argument: bytes, programs: Path, runtime: Path) -> str:
    """Run a service once, on sockets, as qrexec does, and called by a qube
    whose name is as odd as the argument; returns what happened: `ran` or
    `refused`. AssertionError if anything else did."""
    reader, writer = os.pipe()
    ours, theirs = socket.socketpair()
    try:
        environment = {
            b"PATH": os.fsencode(programs),
            b"XDG_RUNTIME_DIR": os.fsencode(runtime),
            b"QREXEC_SERVICE_ARGUMENT": argument,
            b"QREXEC_REMOTE_DOMAIN": argument,
            b"HOME": b"/",
        }
        script = RPC / service
        process = os.posix_spawn(
            script,
            # Without an argument there is no word for it, as with qrexec.
            [os.fsencode(script), *([argument] if argument else [])],
            environment,
            file_actions=[
                (os.POSIX_SPAWN_DUP2, theirs.fileno(), 0),
                (os.POSIX_SPAWN_DUP2, theirs.fileno(), 1),
                (os.POSIX_SPAWN_OPEN, 2, "/dev/null", os.O_WRONLY, 0),
                (os.POSIX_SPAWN_DUP2, writer, 9),
            ],
        )
        code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        recorded = (
            os.read(reader, 1 << 16)
            if select.select([reader], [], [], 0)[0]
            else b""
        )
    finally:
        os.close(reader)
        os.close(writer)
        ours.close()
        theirs.close()
    ran = f"{service}+{argument!r} ran {recorded!r}"
    *relays, logged = command_lines(recorded) or [[]]
    caller = argument if _CALLER.fullmatch(argument) else b"unknown caller"
    # After `--` nothing is an option, and its word begins with the caller.
    command = f"timeout 5 logger -t {service} -p daemon.info --"
    options = command.encode().split()
    assert logged[:-1] == options, ran
    said = logged[-1].removeprefix(caller + b": ")
    assert said != logged[-1], ran
    assert _OUTCOME.fullmatch(said), ran
    wanted = expected(service, argument, str(runtime / service))
    assert relays == ([] if wanted is None else [wanted]), ran
    # The tracer connects to nothing.
    assert said.startswith(b"could not") == (wanted is not None), ran
    assert code in ((1, 2) if wanted is None else (0,)), ran
    return "refused" if wanted is None else "ran"


def command_lines(recorded: bytes) -> list[list[bytes]]:
    """What the tracers wrote down, in order."""
    lines = []
    while recorded:
        (count,) = struct.unpack_from("i", recorded)
        *words, recorded = recorded[4:].split(b"\0", count)
        lines.append(words)
    return lines


def fuzz(cases: int, seed: int) -> int:
    """Run each service so many times; returns how many of the runs were wrong,
    of which the first of each is told."""
    wrong = 0
    rng = random.Random(seed)
    with laboratory() as (programs, runtime):
        for service in SERVICES:
            happened: Counter[str] = Counter()
            for _ in range(cases):
                argument = random_argument(service, rng)
                try:
                    happened[check(service, argument, programs, runtime)] += 1
                except AssertionError as error:
                    wrong += 1
                    if not happened["wrong"]:
                        print(error, file=sys.stderr)
                    happened["wrong"] += 1
            print(f"{service:22} {dict(happened)}", flush=True)
    return wrong
