"""The contract, as data: what genuine qrexec-client-vm does in each probe.

A row holds the probe's arguments and what it must see. A frozenset means any of
its values. `versions` are those of qrexec with which the row was seen, over a
socket vchan.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from . import probes

__all__ = ["ALL", "ROWS", "Row"]

ALL = ("4.2.18", "4.4.2")
HAND_OVER = ("4.2.19", "4.4.2")
"""--use-stdin-socket is there since 4.2.19."""
NEWEST = ("4.4.2",)

WAYS = (("tcp", HAND_OVER), ("unix", HAND_OVER), ("pipes", ALL))

END = "end"
DENY = "contract.Ends * {source} @anyvm deny"


@dataclass(frozen=True)
class Row:
    """`says` is the sentence that the row keeps; `versions` the first and the
    last qrexec with which it was seen."""

    name: str
    says: str
    versions: tuple[str, ...]
    probe: Callable[..., probes.Seen]
    expected: Mapping[str, object]
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def holds_for(self, version: str) -> bool:
        """Whether the row was seen with that qrexec, or with older and newer
        ones."""
        first, last = self.versions[0], self.versions[-1]
        return _numbers(first) <= _numbers(version) <= _numbers(last)

    def broken(self, seen: Mapping[str, object]) -> list[str]:
        """What the probe saw and should not have."""
        problems = []
        for what, expected in self.expected.items():
            allowed = (
                expected
                if isinstance(expected, frozenset)
                else frozenset([expected])
            )
            if seen[what] not in allowed:
                wanted = " or ".join(sorted(map(repr, allowed)))
                problems.append(f"{what}: {seen[what]!r} instead of {wanted}")
        return problems


def _numbers(version: str) -> list[int]:
    return [int(number) for number in version.split(".")]


NOTHING_READ = {
    "non-blocking at exit": False,
    "parent's duplicate reads": b"secret",
    "client got": b"",
    "client saw": "open",
}
"""Before the data phase the client's bytes stay where they are, and its socket
is left alone."""

ENDED = {
    "non-blocking at exit": True,
    "client got": b"",
}

BY_PIPES = {"client got": b"", "client saw": "FIN"}

ROWS = (
    # fd 0 and O_NONBLOCK
    *(
        Row(
            f"a-socket-stays-non-blocking-{way}",
            "By hand-over fd 0 is non-blocking from the data phase on, and stays so at exit.",
            HAND_OVER,
            probes.non_blocking,
            {"during": True, "code": 0, "at exit": True},
            {"way": way},
        )
        for way in ("tcp", "unix")
    ),
    Row(
        "pipes-are-blocking-again",
        "By pipes fd 0 is non-blocking in the data phase, and blocking again at exit.",
        ALL,
        probes.non_blocking,
        {"during": True, "code": 0, "at exit": False},
        {"way": "pipes"},
    ),
    # Exit codes, and what the client's socket saw
    *(
        Row(
            f"exit-code-{code}-of-the-service",
            "The service's own exit code is that of the call.",
            HAND_OVER,
            probes.ends,
            {**ENDED, "code": code, "client saw": "FIN", "stderr": ""},
            {"script": f"#!/bin/sh\nexit {code}\n"},
        )
        for code in (0, 1, 5, 125, 126, 127, 255)
    ),
    Row(
        "a-service-killed-by-a-signal",
        "A service that dies of a signal ends the call with 128 and its number.",
        HAND_OVER,
        probes.ends,
        {**ENDED, "code": 143, "client saw": "FIN"},
        {"script": "#!/bin/sh\nkill -TERM $$\n"},
    ),
    Row(
        "refused-by-policy",
        "What policy refuses ends with 126, before a byte was read, and says so on stderr.",
        HAND_OVER,
        probes.ends,
        {**NOTHING_READ, "code": 126, "stderr": "Request refused"},
        {"script": probes.ECHO, "policy": DENY, "sends": b"secret"},
    ),
    Row(
        "refused-for-dom0",
        "A call to dom0 that policy does not allow ends with 126.",
        HAND_OVER,
        probes.ends,
        {**NOTHING_READ, "code": 126, "stderr": "Request refused"},
        {"target": "dom0", "sends": b"secret"},
    ),
    Row(
        "no-agent",
        "Without its own qube's agent it ends with 1, before a byte was read.",
        HAND_OVER,
        probes.ends,
        {**NOTHING_READ, "code": 1},
        {
            "script": probes.ECHO,
            "options": ("--agent-socket=/nonexistent/agent",),
            "sends": b"secret",
        },
    ),
    Row(
        "an-unknown-option",
        "An option that it does not know ends with 2, before a byte was read.",
        HAND_OVER,
        probes.ends,
        {**NOTHING_READ, "code": 2},
        {
            "script": probes.ECHO,
            "options": ("--no-such-option",),
            "sends": b"secret",
        },
    ),
    Row(
        "no-such-service",
        "A service that is not there ends with 127 after the data phase began: the client sees a FIN.",
        HAND_OVER,
        probes.ends,
        {**ENDED, "code": 127, "stderr": "", "client saw": "FIN"},
        {"name": "contract.NotThere"},
    ),
    Row(
        "nobody-listens",
        "A socket service that cannot be connected to ends with 125 after the data phase began.",
        HAND_OVER,
        probes.nobody_listens,
        # What is sent may come too late, which it says on a busy machine.
        {**ENDED, "code": 125},
    ),
    Row(
        "a-port-of-the-service-and-one-of-the-call",
        "A link to /dev/tcp/HOST/PORT takes no argument.",
        NEWEST,
        probes.ends,
        {**ENDED, "code": 125, "stderr": "", "client saw": "FIN"},
        {
            "link": "/dev/tcp/127.0.0.1/1",
            "called": "contract.Ends+1",
        },
    ),
    Row(
        "a-broken-rpc-config",
        "A service whose rpc-config cannot be read ends with 125 after the data phase began.",
        HAND_OVER,
        probes.ends,
        {**ENDED, "code": 125, "stderr": "", "client saw": "FIN"},
        {"script": probes.ECHO, "config": "skip-service-descriptor=maybe\n"},
    ),
    *(
        Row(
            f"an-rpc-config-with-{what}",
            "A service starts with no rpc-config that has what qrexec does not take of TOML.",
            NEWEST,
            probes.ends,
            {**ENDED, "code": 125, "client saw": "FIN"},
            {"script": probes.ECHO, "config": config},
        )
        for what, config in (
            ("a-bare-word", "force-user=root\n"),
            ("double-quotes", 'force-user="root"\n'),
            ("a-space-before-a-key", " wait-for-session=false\n"),
            ("a-key-twice", 2 * "wait-for-session=false\n"),
        )
    ),
    Row(
        "an-rpc-config-with-more",
        "Keys that qrexec does not know, comments and single quotes do no harm.",
        NEWEST,
        probes.ends,
        {"code": 0, "client got": b"hi\n"},
        {
            "script": "#!/bin/sh\necho hi\n",
            "config": "no-such-key=7\nforce-user='root'  # who\n",
        },
    ),
    Row(
        "a-program-that-may-not-run",
        "A service that is neither a socket nor may be run ends with 125.",
        NEWEST,
        probes.ends,
        {**ENDED, "code": 125, "stderr": "", "client saw": "FIN"},
        {"script": probes.ECHO, "mode": 0o644},
    ),
    Row(
        "a-program-without-an-interpreter",
        "A service that begins with no #! is run by a shell.",
        NEWEST,
        probes.ends,
        {"code": 3, "client got": b"hi\n", "client saw": "FIN"},
        {"script": "echo hi\nexit 3\n"},
    ),
    Row(
        "a-program-whose-interpreter-is-gone",
        "That a service cannot be run is the shell's exit code: 126 or 127.",
        NEWEST,
        probes.ends,
        {**ENDED, "code": frozenset([126, 127]), "client saw": "FIN"},
        {"script": "#!/nonexistent/interpreter\n"},
    ),
    Row(
        "the-vchan-closes-early",
        "If the target's side dies in the data phase, the client sees a FIN and the code is 255, or 1.",
        HAND_OVER,
        probes.vchan_closed_early,
        {
            "non-blocking at exit": True,
            "client saw": "FIN",
            "code": frozenset([255, 1]),
        },
    ),
    # The same by pipes, which every version has
    *(
        Row(
            f"exit-code-{code}-of-the-service-pipes",
            "By pipes, too, the service's own exit code is that of the call.",
            ALL,
            probes.ends,
            {**BY_PIPES, "code": code, "stderr": ""},
            {"script": f"#!/bin/sh\nexit {code}\n", "way": "pipes"},
        )
        for code in (0, 1, 5, 125, 126, 127, 255)
    ),
    Row(
        "refused-by-policy-pipes",
        "By pipes, too, what policy refuses ends with 126, before a byte was read.",
        ALL,
        probes.ends,
        {
            **BY_PIPES,
            "code": 126,
            "stderr": "Request refused",
            "parent's duplicate reads": b"secret",
        },
        {
            "script": probes.ECHO,
            "policy": DENY,
            "sends": b"secret",
            "way": "pipes",
        },
    ),
    Row(
        "no-agent-pipes",
        "By pipes, too, it ends with 1 without its own qube's agent.",
        ALL,
        probes.ends,
        {**BY_PIPES, "code": 1, "parent's duplicate reads": b"secret"},
        {
            "script": probes.ECHO,
            "options": ("--agent-socket=/nonexistent/agent",),
            "sends": b"secret",
            "way": "pipes",
        },
    ),
    Row(
        "no-such-service-pipes",
        "By pipes, too, a service that is not there ends with 127, and an end that looks like an empty answer.",
        ALL,
        probes.ends,
        {**BY_PIPES, "code": 127},
        {"name": "contract.NotThere", "way": "pipes"},
    ),
    Row(
        "the-vchan-closes-early-pipes",
        "By pipes, too, the code is 255, or 1, if the target's side dies in the data phase.",
        ALL,
        probes.vchan_closed_early,
        {**BY_PIPES, "code": frozenset([255, 1])},
        {"way": "pipes"},
    ),
    # Half-close
    *(
        Row(
            f"the-client-half-closes-{way}",
            "A half-close of the client reaches the service, whose later answer reaches the client.",
            versions,
            probes.client_half_closes,
            {"client got": b"late question\n", "client saw": "FIN", "code": 0},
            {"way": way},
        )
        for way, versions in WAYS
    ),
    *(
        Row(
            f"the-service-half-closes-{way}",
            "A half-close of the service reaches the client, whose later bytes reach the service.",
            versions,
            probes.service_half_closes,
            {
                "client got": b"done",
                "client saw": "FIN",
                "runs on": True,
                "service got": "afterwards",
                "code": 0,
            },
            {"way": way},
        )
        for way, versions in WAYS
    ),
    # The ends of a service and of a client
    Row(
        "the-end-of-a-service-tcp",
        "When the service has left, the client's socket is shut down for reading, then for writing: a TCP client that sends is reset.",
        HAND_OVER,
        probes.service_ends,
        {
            "code": 0,
            "parent's duplicate reads": END,
            "client got": b"answer\n",
            "client saw": "FIN",
            "a client that goes on sending": frozenset(
                ["ConnectionResetError", "BrokenPipeError"]
            ),
        },
        {"way": "tcp"},
    ),
    Row(
        "the-end-of-a-service-unix",
        "When the service has left, a unix client that sends is told that nobody reads.",
        HAND_OVER,
        probes.service_ends,
        {
            "code": 0,
            "parent's duplicate reads": END,
            "client got": b"answer\n",
            "client saw": "FIN",
            "a client that goes on sending": "BrokenPipeError",
        },
        {"way": "unix"},
    ),
    Row(
        "a-reply-that-is-lost",
        "A TCP client that sends after the end of the service loses what it has not read of the reply.",
        HAND_OVER,
        probes.unread_reply,
        {"code": 0, "whole reply": False, "client saw": "reset"},
    ),
    Row(
        "the-client-goes",
        "If the client goes while the service sends, qrexec-client-vm never ends, and the service is not told.",
        HAND_OVER,
        probes.client_goes,
        {"runs on": True, "the service goes on sending": True},
    ),
    # Limits
    Row(
        "the-129th-call-to-a-target",
        "With 128 calls open to one target, the next is refused, until one has ended.",
        ALL,
        probes.limit_of_target,
        {
            "open": 128,
            "the 129th's code": 126,
            "the 129th's stderr": "Request refused",
        },
    ),
    Row(
        "the-129th-call-of-two-callers",
        "The 128 calls to a target are counted over all qubes that call it and whose domain ids are on the same side of its own.",
        ALL,
        probes.limit_of_target,
        {"open": 128, "the 129th's code": 126},
        {"callers": 2},
    ),
    Row(
        "the-257th-call-of-a-qube",
        "256 calls of one qube are open at once; one more is served, but its agent has no slot for it and never closes its connection.",
        ALL,
        probes.slots_of_caller,
        {"open": 256, "the 257th is established": True},
    ),
    # Names and policy
    Row(
        "a-service-is-told-its-argument",
        "A script gets its argument, its full name and its caller.",
        ALL,
        probes.names,
        {
            "service said": "contract.Who arg contract.Who+arg [arg] SOURCE 1",
            "code": 0,
        },
        {"called": "contract.Who+arg", "file": "contract.Who"},
    ),
    Row(
        "a-service-without-an-argument",
        "Without an argument its variable is there and empty, there is no word for it, and the full name ends with +.",
        NEWEST,
        probes.names,
        {"service said": "contract.Who none contract.Who+ [] SOURCE 0"},
        {"called": "contract.Who", "file": "contract.Who"},
    ),
    Row(
        "a-service-for-one-argument",
        "A file NAME+ARGUMENT is the service of that argument.",
        ALL,
        probes.names,
        {
            "service said": "contract.Who+arg arg contract.Who+arg [arg] SOURCE 1",
            "code": 0,
        },
        {"called": "contract.Who+arg", "file": "contract.Who+arg"},
    ),
    Row(
        "bytes-of-an-argument",
        "Every byte of an argument but A-Za-z0-9_-.+ becomes _.",
        ALL,
        probes.names,
        {
            "service said": "contract.Who a_b_c_d___.-+ contract.Who+a_b_c_d___.-+ [a_b_c_d___.-+] SOURCE 1"
        },
        {"called": "contract.Who+a/b:c dé@.-+", "file": "contract.Who"},
    ),
    Row(
        "bytes-of-a-service",
        "Every byte of a service's name but A-Za-z0-9_-. becomes _.",
        NEWEST,
        probes.names,
        {"service said": "contract.Who_x none contract.Who_x+ [] SOURCE 0"},
        {"called": "contract.Who:x", "file": "contract.Who_x"},
    ),
    Row(
        "the-default-target",
        "@default reaches the target that policy gives it.",
        ALL,
        probes.default_target,
        {"code": 0, "client got": b"here\n"},
        {"called": "@default"},
    ),
    Row(
        "an-unknown-target-is-the-default-one",
        "A target that no qube is called is taken for @default.",
        ALL,
        probes.default_target,
        {"code": 0, "client got": b"here\n"},
        {"called": "no-such-qube-here"},
    ),
    Row(
        "a-malformed-target-is-the-default-one",
        "A target that is no name of a qube is taken for @default.",
        ALL,
        probes.default_target,
        {"code": 0, "client got": b"here\n"},
        {"called": "no such qube"},
    ),
    Row(
        "an-explicit-target-is-not-the-default-one",
        "A line of policy for @default does not meet a call that names its target.",
        ALL,
        probes.default_target,
        {"code": 126, "client got": b""},
        {"called": "{target}"},
    ),
    *(
        Row(
            f"a-target-that-is-none-{number}",
            "A keyword that is no target, or a disposable of a qube that is not there, is refused, and no @default.",
            ALL,
            probes.default_target,
            {"code": 126, "client got": b""},
            {"called": target},
        )
        for number, target in enumerate(
            ("@dispvm:no-such-qube-here", "@dispvm:", "@anyvm", "@"), 1
        )
    ),
    Row(
        "a-qube-that-calls-itself",
        "A qube that calls itself by its name is refused, and not taken for @default.",
        ALL,
        probes.default_target,
        {"code": 126, "client got": b""},
        {"called": "{source}"},
    ),
    # Prompts
    Row(
        "a-prompt-that-is-allowed",
        "At a prompt the call waits, with no vchan and fd 0 as it was; then it is served.",
        ALL,
        probes.prompt_answered,
        {
            "waits": True,
            "vchans at the prompt": 0,
            "code": 0,
            "stderr": "",
            "client got": b"here\n",
        },
        {"answer": "allow"},
    ),
    Row(
        "a-prompt-that-is-denied",
        "A prompt that is denied is a refusal.",
        ALL,
        probes.prompt_answered,
        {
            "waits": True,
            "vchans at the prompt": 0,
            "code": 126,
            "stderr": "Request refused",
            "client got": b"",
        },
        {"answer": "deny"},
    ),
    Row(
        "a-prompt-whose-client-goes",
        "At a prompt it does not see the client go.",
        ALL,
        probes.prompt_answered,
        {"waits": True, "code": 126},
        {"answer": "deny", "goes": True},
    ),
    # The vchan
    Row(
        "an-open-call-has-a-vchan",
        "A call whose policy was answered has its vchan open: on the socket vchan one listening unix socket.",
        ALL,
        probes.vchan_of_open_call,
        {"vchans": 1},
    ),
    Row(
        "a-lost-call",
        "A lost call has its vchan open, reads nothing, and hangs for ever.",
        ALL,
        probes.lost,
        {
            "runs on": True,
            "established": False,
            "vchans": 1,
            "parent's duplicate reads": b"secret",
        },
    ),
    # Socket services
    Row(
        "a-socket-service",
        "A unix socket as a service first gets SERVICE+ARGUMENT, the caller and a zero byte.",
        ALL,
        probes.socket_service,
        {"service got": b"contract.Socket+arg SOURCE\0hello", "code": 0},
        {"config": ""},
    ),
    Row(
        "a-socket-service-without-an-argument",
        "Without an argument the service's name ends with + there, too.",
        NEWEST,
        probes.socket_service,
        {"service got": b"contract.Socket+ SOURCE\0hello", "code": 0},
        {"config": "", "argument": ""},
    ),
    Row(
        "a-socket-service-without-descriptor",
        "With skip-service-descriptor=true it gets the client's bytes alone.",
        HAND_OVER,
        probes.socket_service,
        {"service got": b"hello", "code": 0},
        {"config": "skip-service-descriptor=true\n"},
    ),
    Row(
        "a-socket-service-that-leaves",
        "A unix socket that its service closes ends the call, though the client goes on; what it said arrives.",
        HAND_OVER,
        probes.socket_service_leaves,
        {
            "code": 0,
            "parent's duplicate reads": END,
            "client got": b"bye",
            "client saw": "FIN",
        },
    ),
)
