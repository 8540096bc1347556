"""`python -m tests.contract --client PATH ...`: which rows of the contract a
qrexec-client-vm keeps, which not, and which cannot be tried here."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from subprocess import SubprocessError

from .place import CannotTry, Place
from .rows import ALL, ROWS


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.contract",
        description=__doc__,
        epilog="Services, rpc-config and policy are written for as long as a"
        " row takes. Without --services only refusals can be tried.",
    )
    add = parser.add_argument
    add(
        "--stack",
        metavar="DIR",
        help="a stack as QREXEC_STACK: gives all of the following but the targets",
    )
    add("--client", metavar="PATH", help="the qrexec-client-vm")
    add(
        "--option",
        action="append",
        default=[],
        metavar="WORD",
        help="give it this option in every call",
    )
    add(
        "--target",
        action="append",
        metavar="QUBE",
        help="a qube that may be called; three for all rows (default: work)",
    )
    add(
        "--source",
        metavar="QUBE",
        default="client",
        help="the calling qube (default: client)",
    )
    add(
        "--second-client",
        default="",
        metavar="PATH",
        help="a qrexec-client-vm that calls as another qube; the last target's domain id must be above those of both",
    )
    add(
        "--services",
        default="",
        metavar="DIR",
        help="where a target's services lie; {} stands for its name",
    )
    add(
        "--rpc-config",
        default="",
        metavar="DIR",
        help="the same for rpc-config",
    )
    add(
        "--policy",
        type=Path,
        metavar="PATH",
        help="the folder policy.d, or one file of policy",
    )
    add(
        "--answer",
        type=Path,
        metavar="FILE",
        help="what answers a prompt: allow or deny",
    )
    add("--faults", type=Path, metavar="FILE", help="the loopback's faults")
    add(
        "--kill-parent",
        action="store_true",
        help="a service's parent is the target's side of its data path",
    )
    add(
        "--agent",
        type=int,
        default=0,
        metavar="PID",
        help="the target's agent, which is stopped for a moment to lose a call",
    )
    add(
        "--version",
        default=ALL[-1],
        metavar="X.Y.Z",
        help="the qrexec that it belongs to: only rows that were seen with it are tried (default: %(default)s)",
    )
    add("--row", action="append", metavar="NAME", help="try this row alone")
    arguments = parser.parse_args(argv)
    if arguments.stack:
        stack = Path(arguments.stack)
        arguments.client = arguments.client or str(
            stack / "bin" / "qrexec-client-vm"
        )
        arguments.services = (
            arguments.services or f"{stack}/qubes/{{}}/qubes-rpc"
        )
        arguments.rpc_config = (
            arguments.rpc_config or f"{stack}/qubes/{{}}/rpc-config"
        )
        arguments.policy = arguments.policy or stack / "policy.d"
    if not arguments.client:
        parser.error("--client or --stack is needed")
    return arguments


def main() -> int:
    arguments = parse()
    words = {"kept": 0, "BROKEN": 0, "not tried": 0}
    for row in ROWS:
        if arguments.row and row.name not in arguments.row:
            continue
        if not row.holds_for(arguments.version):
            continue
        place = Place(
            arguments.client,
            targets=arguments.target or ("work",),
            source=arguments.source,
            services=arguments.services,
            configs=arguments.rpc_config,
            policy=arguments.policy,
            answer=arguments.answer,
            faults=arguments.faults,
            second=arguments.second_client,
            kill_parent=arguments.kill_parent,
            agent=arguments.agent,
            options=arguments.option,
        )
        lines = []
        try:
            with place:
                lines = row.broken(row.probe(place, **row.arguments))
            word = "BROKEN" if lines else "kept"
        except CannotTry as reason:
            word, lines = "not tried", [str(reason)]
        except (AssertionError, OSError, SubprocessError) as error:
            word, lines = "BROKEN", [f"{type(error).__name__}: {error}"]
        words[word] += 1
        print(f"{word:9}  {row.name}", flush=True)
        for line in [row.says, *lines] if word == "BROKEN" else lines:
            print(f"           {line}", flush=True)
    print(", ".join(f"{count} {word}" for word, count in words.items()))
    return 1 if words["BROKEN"] else 0


if __name__ == "__main__":
    sys.exit(main())
