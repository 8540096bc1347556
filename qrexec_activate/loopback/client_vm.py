"""The loopback `qrexec-client-vm`: one process is the client, dom0's policy and
the service's qube together.

What its caller can see is that of the real one (qrexec 4.2.18 to 4.4.2):
options, exit codes, messages, and above all these rules. Nothing is read from
fd 0, and O_NONBLOCK is not set on it, until the target has taken the call;
pipes are made blocking again as they are closed, a socket is shut down both
ways. A service that is missing or cannot be started is found out after that.
Between dom0's answer and the target's, the vchan shows in /proc/PID/fd. It must
start in a few milliseconds, so it imports only what is built into Python.

The root, QREXEC_LOOPBACK, is an absolute folder:

  name           this qube's name, by default `client`
  policy         5.0 format; without it every call to a pretend qube is allowed
  answer         `allow` or `deny`, to the prompt of an `ask` line; until it is
                 there, the call waits
  qubes/NAME/    a pretend qube: rpc/, rpc-config/, home/, run/, and optionally
                 `address` (the loopback address that stands for its own
                 127.0.0.1), `halted`, `agent-down`
  agent-down     this qube's own agent does not run
  version        stand in for this version, for example 4.2.18
                 (QREXEC_LOOPBACK_VERSION wins)
  faults         see faults.py
  calls          written here: a JSON object a line. `call` (pid, target,
                 policy_target, resolved, service, argument, source, decision,
                 reason), then `prompt` if a person is asked, `no-slot` if the
                 agent has none left, `established`, and `exit` (code, reason);
                 a call that is killed or hangs has no `exit`
"""

from __future__ import annotations

# socket itself imports enum and selectors, which doubles the start time.
import _socket
import errno
import fcntl
import os
import select
import stat
import sys
import time

from . import faults, policy, services

# typing.TYPE_CHECKING without its import: the client must start quickly.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import NoReturn

DEFAULT_VERSION = "4.4.2"
STDIN_SOCKET_SINCE = (4, 2, 19)
STDIN_SOCKET_IN_HELP_SINCE = (4, 3, 0)

EXIT_FAILURE = 1
EXIT_USAGE = 2
EXIT_CANNOT_START = 125
EXIT_REFUSED = 126
EXIT_NO_SERVICE = 127
EXIT_VCHAN_CLOSED = 255

MAX_ARGUMENT = 3900
"""An argument longer than this wedges the agent of qrexec 4.4.2 for good: the
call hangs."""
MAX_CONNECTIONS = 128
"""Open connections to one target; the next one is refused."""
AGENT_SLOTS = 256
"""Open connections of one qube. Above that its agent logs `No free slot for
child -1`, and leaks a descriptor with each."""
AGENT_DESCRIPTORS = 700
"""So many leaked ones are the end of the agent: 1,024, less what it needs."""
LOST_TIMEOUT = 120
"""So long qrexec-client-vm waits for a target that does not connect."""
NO_GRANTS = (
    "gntshr: error: ioctl failed: No space left on device\n"
    "Data vchan connection failed"
)
CHUNK = 256 * 1024
PROMPT_POLL = 0.02
SIGKILL, SIGPIPE = 9, 13  # the signal module imports enum

# What a terminal could be tricked with becomes `_` under
# --filter-escape-chars-stdout.
FILTER = bytes(
    byte if 32 <= byte <= 126 or byte in b"\t\n\r\b\a" else ord("_")
    for byte in range(256)
)

# Of the caller's environment only this reaches a service: it stands for a
# program in another qube.
PASSED_ENVIRONMENT = (
    "PATH",
    "LANG",
    "LANGUAGE",
    "LC_ALL",
    "LC_CTYPE",
    "USER",
    "LOGNAME",
    "SHELL",
    "TMPDIR",
    "TZ",
)


class Ended(Exception):
    """The call is over: exit with `code`, after `message` on stderr. `reason`
    is for the log of calls."""

    def __init__(self, code: int, message: str = "", reason: str = "") -> None:
        super().__init__(code, message, reason)
        self.code = code
        self.message = message
        self.reason = reason or message


# -- options -------------------------------------------------------------------

HELP_STDIN_SOCKET = (
    "  --use-stdin-socket - use stdin, which must be a stream socket, for"
    " both directions instead of stdout\n"
)
HELP = """\
usage: {name} [options] target_vmname program_ident \
[local_program [local program arguments]]
Options:
  --buffer-size=BUFFER_SIZE - minimum vchan buffer size (default: 64k)
  -t, --filter-escape-chars-stdout - filter non-ASCII and control characters \
on stdout (default if stdout is a terminal)
  -T, --filter-escape-chars-stderr - filter non-ASCII and control characters \
on stderr (default if stderr is a terminal)
  --no-filter-escape-chars-stdout - opposite to --filter-escape-chars-stdout
  --no-filter-escape-chars-stderr - opposite to --filter-escape-chars-stderr
  --agent-socket=PATH - path to connect to, default: /var/run/qubes/qrexec-agent
  -h, --help - print this message
  -p PREFIX-DATA, --prefix-data=PREFIX-DATA - send the given data before the \
provided stdin (can only be used once)
"""

LONG_OPTIONS = {
    "buffer-size": True,
    "filter-escape-chars-stdout": False,
    "filter-escape-chars-stderr": False,
    "no-filter-escape-chars-stdout": False,
    "no-filter-escape-chars-stderr": False,
    "agent-socket": True,
    "prefix-data": True,
    "use-stdin-socket": False,
    "help": False,
}
SHORT_OPTIONS = {
    "t": "filter-escape-chars-stdout",
    "T": "filter-escape-chars-stderr",
    "a": "agent-socket",
    "p": "prefix-data",
    "h": "help",
}


class Options:
    """A parsed command line. `filter_stdout` is None where the terminal
    decides."""

    def __init__(self) -> None:
        self.target = ""
        self.service = ""
        self.agent_socket = ""
        self.prefix: bytes | None = None
        self.stdin_socket = False
        self.filter_stdout: bool | None = None


def parse_version(text: str) -> tuple[int, ...]:
    return tuple(
        int(part)
        for part in text.strip().split(".")
        if part.isascii() and part.isdigit()
    )


def parse_options(argv: list[str], version: tuple[int, ...]) -> Options:
    """As getopt_long with `+`: options end at the first word that is none; a
    long one may be abbreviated."""
    name = argv[0]
    usage = HELP.format(name=name)
    if version >= STDIN_SOCKET_IN_HELP_SINCE:
        usage += HELP_STDIN_SOCKET
    known = [
        key
        for key in LONG_OPTIONS
        if key != "use-stdin-socket" or version >= STDIN_SOCKET_SINCE
    ]

    def bad(problem: str) -> Ended:
        return Ended(
            EXIT_USAGE, f"{name}: {problem}\n{usage}".rstrip("\n"), problem
        )

    options = Options()
    words = argv[1:]
    while words and words[0].startswith("-") and words[0] != "-":
        word = words.pop(0)
        if word == "--":
            break
        if word.startswith("--"):
            written, equals, value = word[2:].partition("=")
            found = [key for key in known if key == written] or [
                key for key in known if key.startswith(written)
            ]
            if not found:
                raise bad(f"unrecognized option '--{written}'")
            if len(found) > 1:
                raise bad(f"option '--{written}' is ambiguous")
            key = found[0]
            if equals and not LONG_OPTIONS[key]:
                raise bad(f"option '--{key}' doesn't allow an argument")
            if LONG_OPTIONS[key] and not equals:
                if not words:
                    raise bad(f"option '--{key}' requires an argument")
                value = words.pop(0)
            apply_option(options, key, value, usage)
            continue
        letters = word[1:]
        while letters:
            letter, letters = letters[0], letters[1:]
            if letter not in SHORT_OPTIONS:
                raise bad(f"invalid option -- '{letter}'")
            key = SHORT_OPTIONS[letter]
            value = ""
            if LONG_OPTIONS[key]:
                if not letters and not words:
                    raise bad(f"option requires an argument -- '{letter}'")
                value, letters = letters or words.pop(0), ""
            apply_option(options, key, value, usage)
    if len(words) < 2:
        raise Ended(EXIT_USAGE, usage.rstrip("\n"), "usage")
    if len(words) > 2:
        raise Ended(
            EXIT_USAGE,
            f"{name}: a local program is not supported by the loopback",
        )
    options.target, options.service = words
    return options


def apply_option(options: Options, key: str, value: str, usage: str) -> None:
    if key == "help":
        raise Ended(0, usage.rstrip("\n"), "help")
    if key == "buffer-size":
        if not value[:1].isdigit():
            raise Ended(
                EXIT_FAILURE, "Bad buffer size: does not begin with a number"
            )
        if not (value.isascii() and value.isdigit()):
            raise Ended(EXIT_FAILURE, "Bad buffer size: trailing junk")
    elif key == "prefix-data":
        if options.prefix is not None:
            raise Ended(
                EXIT_USAGE, usage.rstrip("\n"), "prefix data given twice"
            )
        options.prefix = os.fsencode(value)
    elif key == "agent-socket":
        options.agent_socket = value
    elif key == "use-stdin-socket":
        if options.stdin_socket:
            raise Ended(
                EXIT_USAGE, "qrexec-client-vm: --use-stdin-socket passed twice"
            )
        check_stdin_socket()
        options.stdin_socket = True
    elif key.endswith("stdout"):
        options.filter_stdout = not key.startswith("no-")
    # Filters of stderr are taken and do nothing: a service writes to the
    # client's own stderr.


def check_stdin_socket() -> None:
    try:
        sock = _socket.socket(fileno=0)
    except OSError as error:
        problem = "--use-stdin-socket passed, but stdin not a socket"
        if error.errno != errno.ENOTSOCK:
            problem = (
                f"getsockopt(0, SOL_SOCKET, SO_TYPE):"
                f" {os.strerror(error.errno or 0)}"
            )
        raise Ended(EXIT_USAGE, f"qrexec-client-vm: {problem}") from None
    kind = sock.type
    sock.detach()
    if kind != _socket.SOCK_STREAM:
        message = (
            f"stdin was a socket of type {kind}, not SOCK_STREAM"
            f" ({_socket.SOCK_STREAM})"
        )
        raise Ended(EXIT_USAGE, f"qrexec-client-vm: {message}")


# -- the loopback root ---------------------------------------------------------


class Root:
    """The folder that describes every qube, and the log of calls in it."""

    def __init__(self, path: str) -> None:
        if not path:
            raise Ended(
                EXIT_FAILURE,
                "loopback qrexec-client-vm: QREXEC_LOOPBACK is not set; it"
                " names the folder of pretend qubes",
            )
        if not path.startswith("/"):
            raise Ended(
                EXIT_FAILURE,
                f"loopback qrexec-client-vm: QREXEC_LOOPBACK={path} is not an"
                f" absolute path",
            )
        if not os.path.isdir(path):
            raise Ended(
                EXIT_FAILURE,
                f"loopback qrexec-client-vm: QREXEC_LOOPBACK={path} is not a"
                f" folder",
            )
        self.path = path.rstrip("/")

    def text(self, name: str) -> str | None:
        try:
            with open(
                f"{self.path}/{name}",
                encoding="utf-8",
                errors="surrogateescape",
            ) as file:
                return file.read()
        except (FileNotFoundError, NotADirectoryError):
            return None

    def has(self, name: str) -> bool:
        return os.path.lexists(f"{self.path}/{name}")

    def qube(self, name: str) -> str:
        return f"{self.path}/qubes/{name}"

    def is_known(self, name: str) -> bool:
        return os.path.isdir(self.qube(name))

    def log(self, event: str, **fields: str | int) -> None:
        """Append one line to `calls`, by a single write: calls that run at once
        do not mix their lines."""
        values: dict[str, str | int] = {
            "event": event,
            "pid": os.getpid(),
            **fields,
        }
        line = ", ".join(
            f'"{key}": {json_value(value)}' for key, value in values.items()
        )
        try:
            log = os.open(
                f"{self.path}/calls",
                os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC,
                0o600,
            )
        except OSError:
            return  # a root that cannot be written to still serves
        os.write(log, f"{{{line}}}\n".encode("ascii"))
        os.close(log)

    def take_place(self, name: str, places: int) -> int:
        """Hold one of so many places until this process ends or closes the
        returned fd; -1 if all are taken.

        A place is a byte of a file, locked: the kernel gives it back, however
        the process ends.
        """
        try:
            file = os.open(
                f"{self.path}/{name}",
                os.O_RDWR | os.O_CREAT | os.O_CLOEXEC,
                0o600,
            )
        except OSError:
            return 0  # nowhere to count: let it pass
        for attempt in range(places):
            try:
                fcntl.lockf(
                    file,
                    fcntl.LOCK_EX | fcntl.LOCK_NB,
                    1,
                    (os.getpid() + attempt) % places,
                )
            except OSError:
                continue
            return file
        os.close(file)
        return -1

    def leak(self, call: Call) -> None:
        """This qube's agent has no slot for another call: it loses a
        descriptor, and in the end exits."""
        self.log("no-slot")
        file = os.open(
            f"{self.path}/leaked",
            os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC,
            0o600,
        )
        os.write(file, b".")
        if os.lseek(file, 0, os.SEEK_CUR) >= AGENT_DESCRIPTORS:
            os.close(os.open(f"{self.path}/agent-down", os.O_CREAT, 0o600))
        os.close(file)

    def nth_call(self, line: faults.Line) -> int:
        """Count the calls that a faults line with `first=` has met since the
        file was written."""
        written = os.stat(f"{self.path}/faults").st_mtime_ns
        os.makedirs(f"{self.path}/.faults", exist_ok=True)
        counter = os.open(
            f"{self.path}/.faults/{written}.{line.number}",
            os.O_WRONLY | os.O_APPEND | os.O_CREAT,
            0o600,
        )
        os.write(counter, b".")
        count = os.lseek(
            counter, 0, os.SEEK_CUR
        )  # where this process's own byte ended, whoever else appends
        os.close(counter)
        return count


def json_value(value: str | int) -> str:
    """One JSON value; the json module costs as much as everything else here."""
    if isinstance(value, int):
        return str(value)
    quoted = []
    for char in value:
        code = ord(char)
        if char in '"\\':
            quoted.append("\\" + char)
        elif 32 <= code < 127:
            quoted.append(char)
        elif code < 0x10000:
            quoted.append(f"\\u{code:04x}")
        else:
            code -= 0x10000
            quoted.append(
                f"\\u{0xD800 + (code >> 10):04x}"
                f"\\u{0xDC00 + (code & 0x3FF):04x}"
            )
    return '"' + "".join(quoted) + '"'


# -- the answer ----------------------------------------------------------------


class Call:
    """A call that policy has decided, and the faults that meet it."""

    def __init__(self, root: Root, options: Options) -> None:
        self.root = root
        self.source = (root.text("name") or "client").strip()
        service, _, argument = options.service.partition("+")
        self.service = policy.sanitise(service)
        self.argument = policy.sanitise(argument)

        def is_known(name: str) -> bool:
            return name == self.source or root.is_known(name)

        target = policy.effective_target(options.target, is_known)
        text = root.text("policy")
        try:
            rules = None if text is None else policy.parse(text)
            decision = policy.decide(
                rules,
                self.service,
                self.argument,
                self.source,
                target,
                is_known,
            )
        except policy.PolicyError as error:
            decision = policy.Decision("refuse", "", f"policy: {error}")
        if not self.service:
            decision = policy.Decision("refuse", "", "no service is named")
        self.decision = decision
        try:
            lines = faults.parse(root.text("faults") or "")
        except faults.FaultsError as error:
            raise Ended(
                EXIT_FAILURE,
                f"loopback qrexec-client-vm: {root.path}/faults: {error}",
            ) from None
        self.faults = faults.chosen(
            lines, decision.resolved or options.target, root.nth_call
        )
        root.log(
            "call",
            target=options.target,
            policy_target=target,
            resolved=decision.resolved,
            service=self.service,
            argument=self.argument,
            source=self.source,
            decision=decision.action,
            reason=decision.reason,
        )

    @property
    def full_name(self) -> str:
        return f"{self.service}+{self.argument}"

    def happens(self, fault: str) -> bool:
        probability = self.faults.get(fault, 0)
        return probability > 0 and int.from_bytes(
            os.urandom(6), "big"
        ) < probability * (1 << 48)


def refused(reason: str) -> Ended:
    return Ended(EXIT_REFUSED, "Request refused", reason)


def vchan_failure(reason: str) -> Ended:
    return Ended(EXIT_FAILURE, "Data vchan connection failed", reason)


def hang() -> NoReturn:
    while True:
        select.select([], [], [])


def wait_for_answer(root: Root, call: Call) -> None:
    """Everything between the request and the data phase.

    Meanwhile the client may go, and this does not see it: nor does qrexec while
    a prompt is open.
    """
    if len(call.argument) > MAX_ARGUMENT:
        hang()
    setups = (
        root.take_place("setups", int(call.faults["max-setups"]))
        if "max-setups" in call.faults
        else 0
    )
    time.sleep(call.faults.get("delay", 0))
    if call.happens("lose"):
        hang()
    if call.decision.action == "refuse":
        raise refused(call.decision.reason)
    if call.happens("refuse"):
        raise refused("fault: refuse")
    if call.decision.action == "ask" and not prompt(root):
        raise refused("the prompt was answered with deny")
    if "exit" in call.faults:
        raise Ended(int(call.faults["exit"]), "", "fault: exit")
    resolved = call.decision.resolved
    qube = root.qube(resolved)
    for state in ("halted", "agent-down"):
        if os.path.lexists(f"{qube}/{state}"):
            raise refused(f"{resolved} is {state}")
    places = MAX_CONNECTIONS - int(call.faults.get("busy", 0))
    if root.take_place(f"qubes/{resolved}/connections", places) < 0:
        raise refused(f"{MAX_CONNECTIONS} connections to {resolved} are open")
    with_vchan(root, call, setups)


def with_vchan(root: Root, call: Call, setups: int) -> None:
    """From dom0's answer on, until the target has taken the call."""
    open_vchan()
    if setups < 0:
        raise vchan_failure("fault: max-setups")
    limit = call.faults.get("max-open")
    if limit is not None and root.take_place("open", int(limit)) < 0:
        raise Ended(EXIT_FAILURE, NO_GRANTS, "fault: max-open")
    if root.take_place("slots", AGENT_SLOTS) < 0:
        root.leak(call)
    if call.happens("vchan-failure"):
        raise vchan_failure("fault: vchan-failure")
    if call.happens("lose-late"):
        time.sleep(call.faults.get("lost-timeout", LOST_TIMEOUT))
        raise vchan_failure("fault: lose-late")
    time.sleep(call.faults.get("connect-delay", 0))
    if setups > 0:
        os.close(setups)


def open_vchan() -> int:
    """What a vchan over sockets is at this end: a unix socket that listens, for
    as long as the call lasts."""
    sock = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
    sock.bind("")
    sock.listen(1)
    return sock.detach()


def prompt(root: Root) -> bool:
    root.log("prompt")
    while True:
        answer = (root.text("answer") or "").strip()
        if answer in ("allow", "deny"):
            return answer == "allow"
        time.sleep(PROMPT_POLL)


def find_service(qube: str, call: Call) -> services.Service:
    try:
        return services.find(qube, call.service, call.argument)
    except services.NoService as error:
        raise Ended(EXIT_NO_SERVICE, "", str(error)) from None
    except services.CannotStart as error:
        raise Ended(EXIT_CANNOT_START, "", str(error)) from None


# -- the service ---------------------------------------------------------------


class Running:
    """A started service: where its input goes, where its output comes from, and
    its process, if it is one."""

    __slots__ = (
        "exit_on_client_eof",
        "exit_on_service_eof",
        "pid",
        "preamble",
        "reads",
        "writes",
    )

    def __init__(self, reads: int, writes: int) -> None:
        self.reads = reads
        self.writes = writes
        self.pid = -1
        self.preamble = b""
        self.exit_on_service_eof = False
        self.exit_on_client_eof = False


def start(root: Root, call: Call, service: services.Service) -> Running:
    try:
        if service.kind == "script":
            return start_script(root, call, service)
        return connect(call, service)
    except OSError as error:
        raise Ended(
            EXIT_CANNOT_START, "", f"{service.path or service.host}: {error}"
        ) from None


def start_script(root: Root, call: Call, service: services.Service) -> Running:
    qube = root.qube(call.decision.resolved)
    environment = {
        key: value
        for key, value in os.environ.items()
        if key in PASSED_ENVIRONMENT
    }
    environment.setdefault(
        "PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    )
    environment |= {
        "HOME": f"{qube}/home",
        "XDG_RUNTIME_DIR": f"{qube}/run",
        "QREXEC_REMOTE_DOMAIN": call.source,
        "QREXEC_SERVICE_FULL_NAME": call.full_name,
        "QREXEC_SERVICE_ARGUMENT": call.argument,
    }
    for folder in ("home", "run"):
        try:
            os.mkdir(f"{qube}/{folder}", 0o700)
        except FileExistsError:
            continue
    # Two socket pairs, as in qrexec: a service that leaves without reading all
    # its input loses none of its output.
    own_input, its_input = _socket.socketpair()
    own_output, its_output = _socket.socketpair()
    argv = [service.path] + ([call.argument] if call.argument else [])
    # posix_spawn has no folder of its own to give, and nothing here needs the
    # old one.
    os.chdir(f"{qube}/home")

    def spawn(argv: list[str]) -> int:
        return os.posix_spawn(
            argv[0],
            argv,
            environment,
            file_actions=[
                (os.POSIX_SPAWN_DUP2, its_input.fileno(), 0),
                (os.POSIX_SPAWN_DUP2, its_output.fileno(), 1),
            ],
            setsigdef=[
                SIGPIPE
            ],  # Python ignores it, and a service would inherit that
        )

    try:
        pid = spawn(argv)
    except OSError:
        # qrexec leaves it to a shell, which runs what has no #! line, and for
        # what it cannot run ends with 126 or 127.
        pid = spawn(["/bin/sh", "-c", 'exec "$0" "$@"', *argv])
    its_input.close()
    its_output.close()
    running = Running(own_input.detach(), own_output.detach())
    running.pid = pid
    return running


def connect(call: Call, service: services.Service) -> Running:
    if service.kind == "unix":
        sock = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
        connect_unix(sock, service.path)
    else:
        # As qrexec does, which takes no names.
        ((family, kind, protocol, _, address),) = _socket.getaddrinfo(
            service.host,
            service.port,
            type=_socket.SOCK_STREAM,
            flags=_socket.AI_NUMERICHOST,
        )
        sock = _socket.socket(family, kind, protocol)
        sock.connect(address)
        sock.setsockopt(_socket.IPPROTO_TCP, _socket.TCP_NODELAY, 1)
    fd = sock.detach()
    running = Running(fd, fd)
    if not service.config.skip_service_descriptor:
        running.preamble = (
            os.fsencode(f"{call.full_name} {call.source}") + b"\0"
        )
    running.exit_on_service_eof = service.config.exit_on_service_eof
    running.exit_on_client_eof = service.config.exit_on_client_eof
    return running


def connect_unix(sock: _socket.socket, path: str) -> None:
    """Connect to a socket whose path may be longer than the 107 bytes that an
    address holds."""
    place = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        sock.connect(f"/proc/self/fd/{place}")
    finally:
        os.close(place)


# -- the data phase ------------------------------------------------------------


class Ends:
    """The client's two ends, fd 0 and fd 1, or one socket for both.

    The data phase begins by setting O_NONBLOCK on them, for all to see. A
    socket is shut down one way or the other; what is no socket of both ways is
    made blocking again, and closed.
    """

    def __init__(self, options: Options) -> None:
        self.single = options.stdin_socket
        self.writes = 0 if self.single else 1
        os.set_blocking(0, False)
        os.set_blocking(self.writes, False)
        self._open = {_socket.SHUT_RD, _socket.SHUT_WR}

    def close_reading(self) -> None:
        self._close(0, _socket.SHUT_RD)

    def close_writing(self) -> None:
        self._close(self.writes, _socket.SHUT_WR)

    def _close(self, fd: int, way: int) -> None:
        if way not in self._open:
            return
        self._open.discard(way)
        if self.single:
            sock = _socket.socket(fileno=fd)
            try:
                sock.shutdown(way)
            except OSError:  # ENOTCONN: the peer has gone already
                pass
            finally:
                sock.detach()
        else:
            os.set_blocking(fd, True)
            # Nothing else is to get this number.
            nothing = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
            os.dup2(nothing, fd)
            os.close(nothing)


class Way:
    """One direction. The end of its source finishes its sink and nothing else:
    the other direction goes on.

    Reads only when all that was read has been written, so that a slow reader
    slows the writer. A sink that is gone is not an end: what still comes is
    read and dropped, and the sender is not told, as in qrexec.
    """

    __slots__ = (
        "end_sink",
        "end_source",
        "moved",
        "pending",
        "sink",
        "sink_state",
        "source",
        "table",
    )

    def __init__(
        self,
        source: int,
        sink: int,
        first: bytes = b"",
        table: bytes | None = None,
        end_source: Callable[[], None] | None = None,
        end_sink: Callable[[], None] | None = None,
    ) -> None:
        self.end_source = end_source
        self.end_sink = end_sink or (lambda: shut_writing(sink))
        self.source = source
        self.sink = sink
        self.pending = memoryview(first)
        self.table = table
        self.moved = 0
        self.sink_state = "open"

    @property
    def done(self) -> bool:
        return self.sink_state == "finished"

    def loses_sink(self) -> None:
        """Nobody reads what goes into the sink any more."""
        self.sink_state = "gone"
        self.pending = self.pending[:0]

    def waits_for(self) -> tuple[int, int]:
        """The fd and the poll events that this direction can go on with; fd -1
        if it is done."""
        if self.pending:
            return self.sink, select.POLLOUT
        return self.source, select.POLLIN

    def move(self) -> None:
        """Write what is pending, or read and write one chunk, as far as it goes
        without waiting."""
        try:
            if not self.pending and self.source >= 0:
                chunk = read_chunk(self.source)
                if chunk:
                    self.moved += len(chunk)
                    self.pending = memoryview(
                        chunk.translate(self.table) if self.table else chunk
                    )
                else:
                    self.end_of_source()
            if self.pending and self.sink_state == "open":
                self.pending = self.pending[os.write(self.sink, self.pending) :]
        except BlockingIOError:
            return
        except OSError:  # EPIPE, ECONNRESET: nobody takes the bytes any more
            self.loses_sink()
        if self.sink_state == "gone":
            self.pending = self.pending[:0]
        if self.source < 0 and not self.pending:
            self.finish()

    def finish(self) -> None:
        """Let the reader see the end; what is pending is dropped."""
        self.end_of_source()
        self.pending = self.pending[:0]
        if self.sink_state != "finished":
            self.sink_state = "finished"
            self.end_sink()

    def end_of_source(self) -> None:
        if self.source >= 0:
            self.source = -1
            if self.end_source:
                self.end_source()


def read_chunk(fd: int) -> bytes:
    """Bytes, or none at the end of the stream; a reset is one too.
    BlockingIOError if there are none yet."""
    try:
        return os.read(fd, CHUNK)
    except BlockingIOError:
        raise
    except OSError:
        return b""


def shut_writing(fd: int) -> None:
    """End one direction of a socket; close what is no socket."""
    try:
        sock = _socket.socket(fileno=fd)
    except OSError:
        os.close(fd)
        return
    try:
        sock.shutdown(_socket.SHUT_WR)
    except OSError:  # ENOTCONN: the peer has gone already
        pass
    finally:
        sock.detach()


def relay(call: Call, options: Options, running: Running, ends: Ends) -> int:
    """The data phase; returns the exit code."""
    out = ends.writes
    os.set_blocking(running.reads, False)
    os.set_blocking(running.writes, False)
    filtered = options.filter_stdout or (
        options.filter_stdout is None and os.isatty(out)
    )
    up = Way(
        0,
        running.reads,
        running.preamble + (options.prefix or b""),
        end_source=ends.close_reading,
    )
    down = Way(
        running.writes,
        out,
        table=FILTER if filtered else None,
        end_sink=ends.close_writing,
    )
    child = os.pidfd_open(running.pid) if running.pid >= 0 else -1
    code = 0
    limit = (
        int(call.faults.get("end-early-after", 1))
        if call.happens("end-early")
        else -1
    )
    dies_at = (
        time.monotonic() + call.faults["die-after"]
        if "die-after" in call.faults
        else 0.0
    )

    poller = select.poll()
    polled: dict[int, int] = {}
    while True:
        if 0 <= limit <= up.moved + down.moved:
            ends.close_writing()
            ends.close_reading()
            raise Ended(EXIT_VCHAN_CLOSED, "", "fault: end-early")
        if running.pid >= 0:
            if child < 0 and down.done:
                return code
        elif (
            (up.sink_state != "open" and down.done)
            or (running.exit_on_service_eof and down.done)
            or (running.exit_on_client_eof and up.done)
        ):
            ends.close_reading()
            ends.close_writing()
            return 0

        wanted = {child: select.POLLIN} if child >= 0 else {}
        for fd, events in (up.waits_for(), down.waits_for()):
            if fd >= 0:
                wanted[fd] = wanted.get(fd, 0) | events
        if up.sink_state == "open":
            # That a service reads no more is seen before anything is written.
            wanted.setdefault(up.sink, 0)
        # An fd without a wish is not polled at all: its hang-up would be
        # reported again and again.
        for fd in polled.keys() - wanted.keys():
            poller.unregister(fd)
        for fd, events in wanted.items():
            if polled.get(fd) != events:
                poller.register(fd, events)
        polled = wanted

        timeout = None
        if dies_at:
            left = dies_at - time.monotonic()
            if left <= 0:
                os.kill(os.getpid(), SIGKILL)
            timeout = left * 1000 + 1
        ready = dict(poller.poll(timeout))
        if up.sink_state == "open" and ready.get(up.sink, 0) & (
            select.POLLHUP | select.POLLERR
        ):
            up.loses_sink()
        for way in (up, down):
            if way.waits_for()[0] in ready:
                way.move()
        if child in ready:
            code = exit_code(os.waitpid(running.pid, 0)[1])
            poller.unregister(child)
            del polled[child]
            os.close(child)
            child = -1
            up.finish()  # nobody is left to read it


def exit_code(status: int) -> int:
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


# -- main ----------------------------------------------------------------------


def check_agent(root: Root, options: Options) -> None:
    if root.has("agent-down") or (
        options.agent_socket and not is_socket(options.agent_socket)
    ):
        raise Ended(
            EXIT_FAILURE,
            "connect: No such file or directory",
            "no agent socket",
        )


def is_socket(path: str) -> bool:
    try:
        return stat.S_ISSOCK(os.stat(path).st_mode)
    except OSError:
        return False


def run(argv: list[str], root: Root) -> int:
    version = (
        os.environ.get("QREXEC_LOOPBACK_VERSION")
        or root.text("version")
        or DEFAULT_VERSION
    )
    options = parse_options(argv, parse_version(version))
    check_agent(root, options)
    call = Call(root, options)
    wait_for_answer(root, call)
    ends = Ends(options)
    try:
        qube = root.qube(call.decision.resolved)
        running = start(root, call, find_service(qube, call))
    except Ended:
        # The target had taken the call before it found that out, and what the
        # client had sent was read.
        read_early()
        ends.close_reading()
        ends.close_writing()
        raise
    root.log("established")
    return relay(call, options, running, ends)


def read_early() -> None:
    try:
        os.read(0, CHUNK)
    except OSError:
        return  # there is nothing


def tell(message: str) -> None:
    try:
        os.write(2, os.fsencode(message + "\n"))
    except OSError:
        return  # nobody listens to stderr


def main() -> NoReturn:
    """Run the client on sys.argv and end the process with its exit code."""
    root = None
    code, message, reason = EXIT_FAILURE, "", ""
    try:
        root = Root(os.environ.get("QREXEC_LOOPBACK", ""))
        code = run(sys.argv, root)
    except Ended as ended:
        code, message, reason = ended.code, ended.message, ended.reason
    except KeyboardInterrupt:
        code = 130
    if message:
        tell(message)
    if root:
        root.log("exit", code=code, reason=reason)
    # At once: nothing is buffered, and Python's own way out costs milliseconds.
    os._exit(code)
