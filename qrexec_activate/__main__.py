"""`python -m qrexec_activate` is the command qrexec-activate."""

from .cli import main

if __name__ == "__main__":
    main()
