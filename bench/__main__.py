"""``python3 -m bench``: measure this tree against what one would use otherwise.

Runs over the loopback only, in a systemd user manager of its own, and stops
whatever it starts.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

from qrexec_activate.errors import ActivateError
from qrexec_activate.loopback.machine import Machine

from . import plot, stack
from .measures import AT_ONCE, FULL, MEASURES, QUICK, STREAMS, Bench
from .report import Figures, markdown, targets
from .rivals import NOT_INSTALLED, RIVALS, build, rivals

HERE = Path(__file__).resolve().parent
IN_ROUNDS = {
    "first-byte",
    *(f"connections-{at_once}" for at_once in AT_ONCE),
    *(f"throughput-{one}" for one in STREAMS),
}


def main() -> int:
    """Run it; the exit code is 1 if something that has to answer did not."""
    options = _options()
    sizes = QUICK if options.quick else FULL
    measures = [name for name in MEASURES if name in options.only] or list(
        MEASURES
    )
    names = [name for name in RIVALS if name in options.only or name == "limit"]
    if len(names) == 1 and "limit" not in options.only:
        names = list(RIVALS)
    if options.stack is not None:
        measures = [name for name in measures if name in stack.END_TO_END]
        sizes = replace(sizes, seconds=sizes.seconds * stack.LONGER)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="qa-bench-") as folder:
        programs = build(Path(folder), options.client, options.qrexec_connect)
        environment = {"QREXEC_ACTIVATE_CLIENT": str(programs.client)}
        with (
            contextlib.nullcontext()
            if options.stack is None
            else stack.serving(
                options.stack, options.target, linked=programs.hands_over
            ),
            Machine(environment=environment) as machine,
            rivals(machine, programs, options.target, names) as (
                found,
                problems,
            ),
        ):
            for name, problem in problems.items():
                _say(f"{RIVALS[name]} is left out: {problem}")
            if not found:
                raise SystemExit("bench: nothing answers")
            bench = Bench(machine, programs, found, sizes)
            bench.run(measures, _say)
    rounds = 1 + max(
        (
            one.get("round", 0)
            for one in bench.results
            if one["measure"] in IN_ROUNDS
        ),
        default=0,
    )
    about = _machine(options.client, rounds, time.monotonic() - began)
    # A rival may be missing on this machine; what this is about may not.
    broken = [
        {"measure": "start", "rival": name, "error": problem}
        for name, problem in problems.items()
        if problem != NOT_INSTALLED
    ]
    figures = Figures([*broken, *bench.results])
    text = markdown(figures, about)
    print(text, end="")
    partly = options.quick or options.only or options.stack
    output = options.output or (None if partly else HERE)
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        (output / "results.md").write_text(text)
        (output / "results.svg").write_text(plot.svg(figures, about))
        kept = {
            "machine": about,
            "targets": _kept(figures),
            "results": [*broken, *bench.results],
        }
        (output / "results.json").write_text(
            json.dumps(kept, indent=1, ensure_ascii=False) + "\n"
        )
        _say(f"written to {output}")
    return 1 if figures.errors() else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python3 -m bench", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="less of everything, in two minutes",
    )
    parser.add_argument(
        "--only",
        metavar="NAME",
        action="append",
        default=[],
        choices=[*MEASURES, *RIVALS],
        help=f"only this measure ({', '.join(MEASURES)}) or this rival,"
        f" beside the limit ({', '.join(RIVALS)});"
        " may be repeated",
    )
    parser.add_argument(
        "--client",
        metavar="PATH",
        type=_program,
        help="the genuine qrexec-client-vm in place of the stand-in; the"
        " target qube must run the TCP services echo"
        " (port 7), discard (9) and chargen (19), and policy must allow them"
        " by qubes.ConnectTCP",
    )
    parser.add_argument(
        "--target", metavar="QUBE", help="the target qube, with --client"
    )
    parser.add_argument(
        "--stack",
        metavar="FOLDER",
        type=Path,
        default=os.environ.get("QREXEC_STACK") or None,
        help="a qrexec on this machine, as docs/testing.md has it: first bytes"
        " and connections end to end, to --target [work];"
        " by default $QREXEC_STACK",
    )
    parser.add_argument(
        "--qrexec-connect",
        metavar="PATH",
        type=_program,
        help="bcduggan's qrexec-connect, measured with the others",
    )
    parser.add_argument(
        "--output",
        metavar="FOLDER",
        type=Path,
        help="where results.md, results.svg and results.json go; by default"
        " bench/, or nowhere with --quick, --only or --stack",
    )
    options = parser.parse_args()
    if options.stack is not None:
        if options.client is not None:
            parser.error("--stack has a client of its own")
        options.stack = options.stack.absolute()
        options.client = stack.client_of(options.stack)
        options.target = options.target or "work"
    if (options.client is None) != (options.target is None):
        parser.error("--client and --target go together")
    return options


def _program(text: str) -> Path:
    path = Path(text).absolute()
    if not os.access(path, os.X_OK):
        raise argparse.ArgumentTypeError(f"no program {path}")
    return path


def _say(text: str) -> None:
    print(f"bench: {text}", file=sys.stderr, flush=True)


def _kept(figures: Figures) -> list[dict[str, Any]]:
    return [
        {
            "what": one.what,
            "value": one.value,
            "relation": one.relation,
            "bound": one.bound,
            "reached": one.reached,
        }
        for one in targets(figures)
    ]


def _machine(
    client: Path | None, rounds: int, seconds: float
) -> dict[str, str]:
    """What it was measured on, and with."""
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime(
            "%Y-%m-%d %H:%M UTC"
        ),
        "CPU": f"{_cpu_model()}, {len(os.sched_getaffinity(0))} cores",
        "kernel": f"{platform.system()} {platform.release()}"
        f" {platform.machine()}",
        "Python": f"{platform.python_version()}, trio"
        f" {metadata.version('trio')}",
        "systemd": _first(r"systemd (\S+)", "systemctl", "--version"),
        "socat": _first(r"socat version (\S+)", "socat", "-V"),
        "C compiler": _first(r"(.+)", "cc", "--version"),
        "qrexec-activate": (HERE.parent / "version").read_text().strip(),
        "qrexec-client-vm": str(client or "a stand-in, bench/client.c"),
        "rounds": f"{rounds}, {seconds:.0f} s in all",
    }


def _cpu_model() -> str:
    found = re.search(
        r"^model name\s*:\s*(.+)$",
        Path("/proc/cpuinfo").read_text(),
        re.MULTILINE,
    )
    return found[1] if found else platform.machine()


def _first(pattern: str, *argv: str) -> str:
    if shutil.which(argv[0]) is None:
        return "not installed"
    said = subprocess.run(
        argv, capture_output=True, text=True, check=False
    ).stdout
    found = re.search(pattern, said)
    return found[1] if found else "unknown"


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except ActivateError as error:
        raise SystemExit(f"bench: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
