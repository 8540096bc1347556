"""Changes that are not left half done because somebody presses Ctrl-C."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator

__all__ = ["finishing"]


@contextlib.contextmanager
def finishing() -> Iterator[None]:
    """Hold back Ctrl-C and its like until what was begun is done or undone."""
    held = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, held)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
