"""rpc-config of one service: text in, a Config out, no I/O.

Each line is `key=value`, in what of TOML qrexec 4.4.2 takes (its toml.c): no
space before a key, strings in single quotes only, no known key twice. Keys that
it does not know it leaves alone. A file that breaks the rules keeps its service
from starting (exit code 125).
"""

from __future__ import annotations

BOOLEANS = (
    "skip-service-descriptor",
    "exit-on-service-eof",
    "exit-on-client-eof",
    "wait-for-session",
)
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
DIGITS = "0123456789"
SPACE = " \t"
LARGEST = (1 << 64) - 1


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
        self.force_user: str | None = None


def parse(text: str) -> Config:
    """Read an rpc-config file. ConfigError for what qrexec refuses."""
    config, seen = Config(), set[str]()
    for number, line in enumerate(text.split("\n"), 1):
        try:
            _take(config, seen, line.removesuffix("\r"))
        except ConfigError as error:
            raise ConfigError(f"line {number}: {error}") from None
    return config


def _take(config: Config, seen: set[str], line: str) -> None:
    if not line or line.startswith("#"):
        return
    key, value = _key(line)
    if key not in (*BOOLEANS, "force-user"):
        return
    if key in seen:
        raise ConfigError(f"{key} is there already")
    seen.add(key)
    if key == "wait-for-session" and value in (0, 1):
        value = bool(value)
    if type(value) is not (str if key == "force-user" else bool):
        raise ConfigError(f"{key} cannot be {value!r}")
    setattr(config, key.replace("-", "_"), value)
    if config.force_user is not None and (
        config.skip_service_descriptor
        or config.exit_on_service_eof
        or config.exit_on_client_eof
    ):
        raise ConfigError("force-user goes with none of the other three")


def _key(line: str) -> tuple[str, bool | int | str]:
    """A key and its value."""
    if line[0] not in LETTERS or "\0" in line:
        raise ConfigError("a key begins with a letter, and is at the beginning")
    rest = line.lstrip(LETTERS + DIGITS + ".-_")
    key = line[: len(line) - len(rest)]
    rest = rest.lstrip(SPACE)
    if not rest.startswith("="):
        raise ConfigError("no key=value")
    value, rest = _value(rest[1:].lstrip(SPACE))
    if rest.lstrip(SPACE)[:1] not in ("", "#"):
        raise ConfigError(f"{rest!r} comes after the value")
    return key, value


def _value(text: str) -> tuple[bool | int | str, str]:
    """The value that the text begins with, and what comes after it."""
    for word, value in (("true", True), ("false", False)):
        if text.startswith(word):
            return value, text[len(word) :]
    if text.startswith("'") and not text.startswith("'''"):
        string, quote, rest = text[1:].partition("'")
        if quote:
            return string, rest
    rest = text[1:] if text.startswith("0") else text.lstrip(DIGITS)
    digits = text[: len(text) - len(rest)]
    if not digits or len(digits) > len(str(LARGEST)) or int(digits) > LARGEST:
        raise ConfigError(
            f"{text!r} is neither true, false, a number nor in single quotes"
        )
    return int(digits), rest
