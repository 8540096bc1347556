"""`python -m qrexec_activate` is the command qrexec-activate."""

import gc
import importlib
import signal
import sys
import types

#: Importing makes tens of thousands of objects, none of which is garbage; to
#: look for some as often as Python does takes 6 % of the daemon's start, and
#: 9 % of --help.
COLLECT_AFTER = 10_000
#: What trio imports for what no daemon does: TLS, names of hosts, processes of
#: trio's own. A tenth of the start, and 5 MiB.
NOT_NEEDED = ("ssl", "hmac", "idna", "subprocess", "ipaddress")


class Later(types.ModuleType):
    """A module that is imported when something of it is asked for."""

    def __getattr__(self, name: str) -> object:
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]
        module = importlib.import_module(self.__name__)
        vars(self).update(vars(module))
        return getattr(module, name)


def main() -> None:
    """Run the command that the command line names; `serve` does without what
    the others need."""
    gc.set_threshold(COLLECT_AFTER)
    # Ctrl-C ends the process without a word, until there is somebody to see to
    # it.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    if sys.argv[1:2] == ["serve"]:
        sys.modules.update({name: Later(name) for name in NOT_NEEDED})
        from .forward.serve import main as run
    else:
        from .cli import main as run
    run()


if __name__ == "__main__":
    main()
