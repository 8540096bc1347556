"""`python -m qrexec_activate` is the command qrexec-activate."""

import signal
import sys


def main() -> None:
    """Run the command that the command line names; `serve` does without what
    the others need."""
    # Ctrl-C ends the process without a word, until there is somebody to see to
    # it.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    if sys.argv[1:2] == ["serve"]:
        from .forward.serve import main as run
    else:
        from .cli import main as run
    run()


if __name__ == "__main__":
    main()
