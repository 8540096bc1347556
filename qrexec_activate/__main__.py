"""`python -m qrexec_activate` is the command qrexec-activate."""

import sys


def main() -> None:
    """Run the command that the command line names; `serve` does without what the others need."""
    if sys.argv[1:2] == ["serve"]:
        from .serve import main as run
    else:
        from .cli import main as run
    run()


if __name__ == "__main__":
    main()
