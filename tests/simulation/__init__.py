"""The pure core in a pretend world that one seed drives.

    python -m tests.simulation --minutes 5
    python -m tests.simulation --seed 17

`world` is all that the core cannot tell from the truth: clients, qubes, people
at prompts, crashes and the clock. `driver` calls the core as daemon.py and
connection.py do. What must hold is checked after each event. A failure is
reported with the least that repeats it.
"""
