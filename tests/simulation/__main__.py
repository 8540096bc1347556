"""python -m tests.simulation: run scenarios for as long as it is told."""

from __future__ import annotations

import argparse
import gc
import sys
import time

from .simulation import Simulation, failure, shrunk
from .world import FAULTS, Scenario

#: A scenario that is not told how long it is to be.
EVENTS = 5000


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.simulation",
        description="Run the pure core in pretend worlds, each made from one seed, and say what does not hold.",
    )
    parser.add_argument(
        "--minutes", type=float, default=1.0, help="how long (1)"
    )
    parser.add_argument(
        "--from",
        type=int,
        default=0,
        dest="first",
        metavar="SEED",
        help="the first seed (0)",
    )
    parser.add_argument(
        "--count", type=int, help="so many scenarios, however long that takes"
    )
    parser.add_argument("--seed", type=int, help="this one only")
    parser.add_argument(
        "--events",
        type=int,
        default=EVENTS,
        help=f"of one scenario, before it calms down ({EVENTS})",
    )
    parser.add_argument(
        "--targets", type=int, help="with --seed: so many qubes"
    )
    parser.add_argument(
        "--limits",
        help="with --seed: set-ups, connections and total, as 8,120,240",
    )
    parser.add_argument(
        "--without",
        default="",
        help="with --seed: not with these of " + ",".join(FAULTS),
    )
    told = parser.parse_args()
    # A connection and its qrexec-client-vm know each other, and are few.
    gc.set_threshold(100_000)
    if told.seed is not None:
        return report(
            Scenario.of(told.seed, told.events).but(
                told.targets, told.limits, told.without
            )
        )
    begun, events, looks, seed, failed = (
        time.process_time(),
        0,
        0,
        told.first,
        0,
    )
    end = time.monotonic() + told.minutes * 60
    while (
        seed < told.first + told.count if told.count else time.monotonic() < end
    ):
        scenario = Scenario.of(seed, told.events)
        simulation = Simulation(scenario)
        if simulation.problem() is not None:
            failed |= report(scenario)
        events += simulation.events
        looks += simulation.looks
        seed += 1
    used = time.process_time() - begun
    print(
        f"{seed - told.first} scenarios, {events:,} events, {looks:,} looks at calls,"
        f" {used:.0f} s of CPU: {events / used:,.0f} events/s,"
        f" {(events + looks) / used:,.0f}/s with the looks"
    )
    return failed


def report(scenario: Scenario) -> int:
    problem = failure(scenario)
    if problem is None:
        return 0
    print(f"{problem}\n    {scenario}", flush=True)
    print(f"the least that repeats it:\n    {shrunk(scenario)}", flush=True)
    return 1


sys.exit(main())
