"""A pretend QubesDB: a folder with a file for each path, and the programs
qubesdb-list, -read and -watch over it, as far as those of Qubes OS are
asked.

A file holds what qubesdb-read prints: one line, each byte that is not printable
as `\\xNN`. Without the folder, no QubesDB answers. As the genuine programs are
written in C, these start as quickly, and write lines to a terminal, but not to
a pipe, at once.
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

__all__ = ["GENERATOR", "put", "write_programs"]

_HEAD = """\
#!/bin/sh
cd {folder} 2>/dev/null || {{
    echo 'Failed connect to local daemon' >&2
    exit 1
}}
full=
while getopts fq option; do [ "$option" != f ] || full=yes; done
shift $((OPTIND - 1))
"""
_LIST = """\
for path in ".$1"*; do
    path=${path#.}
    [ ! -f ".$path" ] || printf '%s\\n' "${full:+$1}${path#"$1"}"
done
"""
_READ = """\
code=0
for path; do
    if IFS= read -r value 2>/dev/null <".$path"; then
        printf '%s\\n' "${full:+$path = }$value"
    else
        code=2
    fi
done
exit $code
"""
_WATCH = """\
#!{python} -IS
import os, sys, time

def see():
    found = {{}}
    for top, _, names in os.walk({folder!r}):
        for name in names:
            path = os.path.join(top, name)
            with open(path, "rb") as file:
                found[path.removeprefix({folder!r})] = file.read()
    return found

_, _, _, path = sys.argv
seen = see()
while os.path.isdir({folder!r}):
    time.sleep(0.02)
    try:
        now = see()
    except FileNotFoundError:
        continue
    for name in sorted(seen.keys() | now.keys()):
        if seen.get(name) != now.get(name) and name.startswith(path):
            print(name)
    seen = now
print("Failed to read watch", file=sys.stderr)
sys.exit(1)
"""
#: What a package installs as /usr/libexec/qrexec-activate/from-dom0.
GENERATOR = """\
#!/bin/sh
# A user manager gives its own PATH to generators.
PATH={programs}:$PATH
command -v qubesdb-list >/dev/null || exit 0
what=generator
[ "$1" != watch ] || what=watch
exec {python} -IS -c "import sys; sys.path.append(sys.argv.pop(1))
from qrexec_activate.given.$what import main; main()" {package} "$@"
"""


def write_programs(programs: Path, folder: Path, generators: Path) -> None:
    """Write the programs of a QubesDB that lies in this folder, and the
    generator that asks them."""
    quoted = shlex.quote(str(folder))
    head = _HEAD.format(folder=quoted)
    package = shlex.quote(str(Path(__file__).resolve().parents[2]))
    for path, text in (
        (programs / "qubesdb-list", head + _LIST),
        (programs / "qubesdb-read", head + _READ),
        (
            programs / "qubesdb-watch",
            _WATCH.format(python=sys.executable, folder=str(folder)),
        ),
        (
            generators / "qrexec-activate",
            GENERATOR.format(
                programs=shlex.quote(str(programs)),
                python=shlex.quote(sys.executable),
                package=package,
            ),
        ),
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)


def put(folder: Path, path: str, value: str | None) -> None:
    """Set a path, in one step, or remove it."""
    file = folder / path.lstrip("/")
    if value is None:
        file.unlink(missing_ok=True)
        return
    raw = value.encode(errors="surrogateescape")
    line = "".join(
        chr(byte) if 0x20 <= byte < 0x80 else f"\\x{byte:02x}" for byte in raw
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = folder.with_name(f"{folder.name}.new")
    unfinished.write_text(f"{line}\n")
    unfinished.rename(file)
