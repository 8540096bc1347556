"""`python -m qrexec_activate` is the command qrexec-activate."""

import gc
import signal
import sys

#: Importing makes tens of thousands of objects, none of which is garbage; to
#: look for some as often as Python does takes 6 % of the daemon's start, and
#: 9 % of --help.
COLLECT_AFTER = 10_000


def main() -> None:
    """Run the command that the command line names; `serve` does without what
    the others need."""
    gc.set_threshold(COLLECT_AFTER)
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
