"""Play every scene on every way, and write docs/compare.md."""

from __future__ import annotations

import argparse
import datetime
import functools
import platform
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from qrexec_activate.errors import ActivateError
from qrexec_activate.loopback.client_vm import DEFAULT_VERSION
from qrexec_activate.loopback.machine import Machine

from .play import play
from .report import Verdict, markdown
from .scenes import SCENES
from .ways import WAYS, Command

ROOT = Path(__file__).resolve().parents[1]


def main() -> int:
    options = _options()
    commands = dict(options.command)
    ways = {
        title: make
        for title, make in WAYS.items()
        if not options.way or title.strip("`") in options.way
    }
    scenes = {
        title: scene
        for title, scene in SCENES.items()
        if not options.scene or title in options.scene
    }
    for title, line in commands.items():
        ways[title] = functools.partial(Command, command=line)
    seen: dict[str, dict[str, Verdict]] = {}
    with Machine() as machine:
        for title, make in ways.items():
            seen[title] = {}
            for name, scene in scenes.items():
                seen[title][name] = play(scene, machine, make)
                _say(f"{title}, {name}: {seen[title][name]}")
    page = markdown(seen, _versions(), commands)
    if options.output:
        options.output.write_text(page)
    else:
        print(page, end="")
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m compare",
        description="Play each scene on each way to another qube.",
    )
    parser.add_argument(
        "--way",
        action="append",
        metavar="TITLE",
        choices=[title.strip("`") for title in WAYS],
        help=f"only this way; may be repeated: {', '.join(WAYS)}",
    )
    parser.add_argument(
        "--scene",
        action="append",
        metavar="TITLE",
        choices=list(SCENES),
        help="only this scene; may be repeated",
    )
    parser.add_argument(
        "--command",
        action="append",
        default=[],
        metavar="NAME=COMMAND",
        type=_command,
        help="one more way: a program that is started for each address. It"
        " finds the address in {listen}, or {host} and {port}; and"
        " {client} {qube} {service}, the call to make, or {to}, the service's"
        " own address",
    )
    parser.add_argument(
        "--output",
        metavar="FILE",
        type=Path,
        help="where the page goes; by default it is printed",
    )
    return parser.parse_args()


def _command(text: str) -> tuple[str, str]:
    name, equals, line = text.partition("=")
    try:
        if not (name and equals and shlex.split(line)):
            raise ValueError("NAME=COMMAND is needed")
        line.format_map(dict.fromkeys(_PLACES, ""))
    except (ValueError, LookupError) as error:
        raise argparse.ArgumentTypeError(f"{text}: {error}") from None
    return name, line


_PLACES = ("listen", "host", "port", "client", "qube", "service", "to")


def _say(text: str) -> None:
    print(f"compare: {text}", file=sys.stderr, flush=True)


def _versions() -> dict[str, str]:
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "kernel": f"{platform.system()} {platform.release()}",
        "qrexec-activate": f"{(ROOT / 'version').read_text().strip()}, on"
        f" Python {platform.python_version()} and trio"
        f" {metadata.version('trio')}",
        "qrexec": f"the stand-in for {DEFAULT_VERSION} of this tree",
        "socat": _said("socat", "-V").partition("socat version ")[2].split()[0],
        "systemd": _said("systemctl", "--version").split()[1],
    }


def _said(*argv: str) -> str:
    return subprocess.check_output(argv, text=True)


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except ActivateError as error:
        raise SystemExit(f"compare: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
