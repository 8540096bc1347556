"""rpc-config of one service: text in, a Config out, no I/O.

Each line is `key=value`. The keys, and the rule that a boolean is `true` or
`false` and nothing else, are those of qrexec 4.4.2; a file that breaks them
keeps its service from starting (exit code 125).
"""

from __future__ import annotations

BOOLEANS = (
    "skip-service-descriptor",
    "exit-on-service-eof",
    "exit-on-client-eof",
    "wait-for-session",
)


class ConfigError(ValueError):
    """A line that qrexec would not take; the text names the line and what is
    wrong with it."""


class Config:
    """What an rpc-config file asks for; without one, all is off.

    `wait_for_session` and `force_user` act on scripts, and change nothing on
    one machine with one user; the other three act on socket services only.
    """

    __slots__ = (
        "exit_on_client_eof",
        "exit_on_service_eof",
        "force_user",
        "skip_service_descriptor",
        "wait_for_session",
    )

    def __init__(self) -> None:
        self.skip_service_descriptor = False
        self.exit_on_service_eof = False
        self.exit_on_client_eof = False
        self.wait_for_session = False
        self.force_user = ""


def parse(text: str) -> Config:
    """Read an rpc-config file; a later line overrides an earlier one.
    ConfigError for what qrexec refuses."""
    config = Config()
    for number, line in enumerate(text.split("\n"), 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        key, equals, value = (part.strip() for part in line.partition("="))
        if len(value) > 1 and value[0] == value[-1] and value[0] in "'\"":
            value = value[1:-1]
        if not equals:
            raise ConfigError(f"line {number}: no key=value")
        if key in BOOLEANS:
            if value not in ("true", "false"):
                raise ConfigError(
                    f"line {number}: {key} is {value!r}, neither true nor false"
                )
            setattr(config, key.replace("-", "_"), value == "true")
        elif key == "force-user":
            if not value:
                raise ConfigError(f"line {number}: force-user names no user")
            config.force_user = value
        else:
            raise ConfigError(f"line {number}: {key!r} is no key")
    return config
