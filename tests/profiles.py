"""How property tests choose their examples, here and where a package is built:
the same ones each time, and with no word about how busy the machine is.
`--hypothesis-profile=others` looks for what these do not find."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("same", derandomize=True, deadline=None)
settings.register_profile("others", deadline=None)
#: For `make mutants`, which runs each test very often.
settings.register_profile("few", max_examples=10)
settings.load_profile("same")
