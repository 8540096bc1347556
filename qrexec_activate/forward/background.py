"""A value worked out in a forked process, while this one does something else.

What the work imports and allocates is gone with that process, and on two cores
it costs no time.
"""

from __future__ import annotations

import os
import pickle
import sys
import time
from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

from ..errors import ActivateError

__all__ = ["Background"]

T = TypeVar("T")


class Background(Generic[T]):
    """Runs `work` in a fork from construction on. Must be made before there are
    threads; result() must be called.

    The fork closes `without` at once: copies of listening sockets that outlived
    this process would keep systemd from binding their addresses again. So that
    it gets to do so, SIGTERM must be blocked.
    """

    def __init__(
        self, work: Callable[[], T], *, without: Iterable[int] = ()
    ) -> None:
        self._reader, writer = os.pipe()
        while True:
            try:
                self._pid = os.fork()
                break
            except OSError as error:
                # Ended for that, and started again, too many times, its sockets
                # would be closed.
                print(f"cannot start yet: {error.strerror}", file=sys.stderr)
                time.sleep(1)
        if self._pid == 0:
            for fd in without:
                os.close(fd)
            self._run(work, writer)
        os.close(writer)

    @staticmethod
    def _run(work: Callable[[], T], writer: int) -> None:
        """In the fork: write the pickled value or error, and end without
        running anything of the parent's."""
        try:
            try:
                said: object = (work(), None)
            except (ActivateError, SystemExit) as error:
                said = (None, error)
            sys.stdout.flush()
            with open(writer, "wb") as file:
                pickle.dump(said, file)
        except BaseException as error:
            os.write(
                2,
                f"qrexec-activate: internal error: {type(error).__name__}:"
                f" {error}\n".encode(),
            )
            os._exit(1)
        os._exit(0)

    def result(self) -> T:
        """Wait for the value; raises the error that `work` raised, if it is one
        that a person can mend."""
        with open(self._reader, "rb") as file:
            said = file.read()
        os.waitpid(self._pid, 0)
        if not said:
            raise ActivateError(
                "could not find out from systemd what to serve; see the line"
                " before"
            )
        value: T
        value, error = pickle.loads(said)
        if error is not None:
            raise error
        return value
