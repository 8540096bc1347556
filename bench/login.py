"""``python3 -m bench.login``: how long a login waits for routes from dom0.

The generator is started as systemd starts it, over a pretend QubesDB, whose
programs are shell scripts and take longer than the genuine ones. All files lie
in memory, as they do at a login.
"""

from __future__ import annotations

import argparse
import os
import pwd
import resource
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from statistics import median_high

from qrexec_activate.loopback.qubesdb import put, write_programs

MEMORY = Path("/dev/shm")
FIRST_PORT = 20000


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python3 -m bench.login", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--routes", type=int, default=100, help="[100]")
    parser.add_argument("--rounds", type=int, default=50, help="[50]")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=MEMORY) as name:
        rounds = _measure(Path(name), arguments.routes, arguments.rounds)
    print("| | least | median | most |\n|---|---:|---:|---:|")
    for what, times in zip(
        ("CPU time", "elapsed"), zip(*rounds, strict=True), strict=True
    ):
        figures = min(times), median_high(times), max(times)
        shown = " | ".join(f"{1000 * figure:.1f} ms" for figure in figures)
        print(f"| {what} | {shown} |")


def _measure(
    place: Path, routes: int, rounds: int
) -> list[tuple[float, float]]:
    """CPU time and elapsed time of each round, in seconds."""
    write_programs(place / "bin", place / "db", place)
    put(place / "db", "/default-user", pwd.getpwuid(os.getuid()).pw_name)
    for port in range(FIRST_PORT, FIRST_PORT + routes):
        put(
            place / "db",
            f"/vm-config/connect-tcp-{port}",
            f"tcp {port} gitweb 127.0.0.1:{port}",
        )
    return [_once(place, routes) for _ in range(rounds)]


def _once(place: Path, routes: int) -> tuple[float, float]:
    folders = [place / name for name in ("normal", "early", "late")]
    for folder in folders:
        folder.mkdir()
    cpu, began = _cpu(), time.perf_counter()
    subprocess.run(
        [place / "qrexec-activate", *folders],
        env={
            "PATH": os.defpath,
            "HOME": str(place / "home"),
            "XDG_RUNTIME_DIR": str(place / "run"),
            "SYSTEMD_SCOPE": "user",
        },
        check=True,
    )
    took = _cpu() - cpu, time.perf_counter() - began
    wanted = list(folders[0].glob("sockets.target.wants/*"))
    if len(wanted) != routes:
        raise SystemExit(f"{len(wanted)} units of {routes} were made")
    for folder in folders:
        shutil.rmtree(folder)
    return took


def _cpu() -> float:
    """What the children have used, and theirs."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    main()
