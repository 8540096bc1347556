"""Find what a call runs in a pretend qube: a script, a TCP or unix-socket
service; and its rpc-config.

It looks as qrexec looks in /etc/qubes-rpc: `SERVICE+ARGUMENT` wins over
`SERVICE`, a symlink to `/dev/tcp/HOST[/PORT]` is a TCP service, a socket is a
socket service, and everything else is a program. `qubes.ConnectTCP` is there
unless the qube has its own.
"""

from __future__ import annotations

import os
import stat

from . import rpc_config

CONNECT_TCP = "qubes.ConnectTCP"
NAME_MAX = 255
OWN_LOOPBACK = "127.0.0.1"


class NoService(Exception):
    """The qube has no such service: exit code 127."""


class CannotStart(Exception):
    """The service is there and cannot be started: exit code 125, and nothing on
    stderr."""


class Service:
    """What to run: a program at `path`. Or where to connect: the unix socket
    `path`; or `host`, `port`."""

    __slots__ = ("config", "host", "kind", "path", "port")

    def __init__(
        self,
        kind: str,
        config: rpc_config.Config,
        path: str = "",
        host: str = "",
        port: int = 0,
    ) -> None:
        self.kind = kind
        self.config = config
        self.path = path
        self.host = host
        self.port = port


def find(qube: str, service: str, argument: str) -> Service:
    """The service of the pretend qube in the folder `qube`. NoService or
    CannotStart say why, for the log."""
    names = [f"{service}+{argument}", service] if argument else [service]
    path = next(
        (
            path
            for path in (f"{qube}/rpc/{name}" for name in names)
            if _is_there(path)
        ),
        "",
    )
    config = _config(qube, names)
    if not path:
        if service != CONNECT_TCP:
            raise NoService(f"no {service} in {qube}/rpc")
        if config is None:
            config = rpc_config.Config()
            config.skip_service_descriptor = True
            config.exit_on_service_eof = True
        return _tcp_service(qube, "127.0.0.1", argument, config)
    config = config or rpc_config.Config()
    link = os.readlink(path) if os.path.islink(path) else ""
    if link == "/dev/tcp":
        host, _, port = argument.rpartition("+")
        return _tcp_service(qube, host.replace("+", ":"), port, config)
    if link.startswith("/dev/tcp/"):
        host, slash, port = link[len("/dev/tcp/") :].partition("/")
        if slash and argument:
            raise CannotStart(f"{path} has a port, and the call another one")
        return _tcp_service(qube, host, port or argument, config)
    if stat.S_ISSOCK(os.stat(path).st_mode):
        return Service("unix", config, path)
    if not os.access(path, os.X_OK):
        raise CannotStart(f"{path} is neither a socket nor a program")
    return Service("script", config, path)


def _is_there(path: str) -> bool:
    if len(os.path.basename(path)) > NAME_MAX:
        # No file has so long a name; without its argument it may be found.
        return False
    return os.path.exists(path) or (
        os.path.islink(path) and os.readlink(path).startswith("/dev/tcp")
    )


def _config(qube: str, names: list[str]) -> rpc_config.Config | None:
    for name in names:
        try:
            with open(
                f"{qube}/rpc-config/{name}", encoding="utf-8", errors="replace"
            ) as file:
                return rpc_config.parse(file.read())
        except rpc_config.ConfigError as error:
            raise CannotStart(f"{qube}/rpc-config/{name}: {error}") from None
        except OSError:
            continue
    return None


def _tcp_service(
    qube: str, host: str, port: str, config: rpc_config.Config
) -> Service:
    if not (
        port.isascii()
        and port.isdigit()
        and len(port) <= 5
        and 0 < int(port) <= 65535
    ):
        raise CannotStart(f"{port!r} is no port")
    if not host:
        raise CannotStart("/dev/tcp names no host")
    if host == OWN_LOOPBACK:
        # Many pretend qubes share one machine: each may have a loopback address
        # that stands for its own 127.0.0.1.
        try:
            with open(f"{qube}/address", encoding="ascii") as file:
                host = file.read().strip()
        except FileNotFoundError:
            pass
    return Service("tcp", config, host=host, port=int(port))
