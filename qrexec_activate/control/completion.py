"""qrexec-activate completion: what a shell needs to complete commands, routes,
units and qubes.

click's own scripts, where they do; addresses have colons, at which bash ends a
word, and which stand before a description in zsh.
"""

from __future__ import annotations

import os

import click
from click.shell_completion import (
    BashComplete,
    CompletionItem,
    FishComplete,
    ShellComplete,
    ZshComplete,
    add_completion_class,
    split_arg_string,
)

from .options import debug_option

__all__ = ["command"]


class _Bash(BashComplete):
    """Goes by the line, in which a word is what the user takes for one."""

    name = "bash"
    source_template = """\
%(complete_func)s() {
    local IFS=$'\\n' line=${COMP_LINE:0:COMP_POINT} type value before=
    # What bash does not see as part of the word stays where it is.
    local word=${line##*[[:space:]]}
    if [[ $COMP_WORDBREAKS == *:* && $word == *:* ]]; then
        before=${word%%"${word##*:}"}
    fi
    COMPREPLY=()
    while IFS=, read -r type value; do
        case $type in
            dir) compopt -o dirnames ;;
            file) compopt -o default ;;
            plain) COMPREPLY+=("${value#"$before"}") ;;
        esac
    done < <(COMP_WORDS=$line %(complete_var)s=bash_complete "$1")
    return 0
}

complete -o nosort -F %(complete_func)s %(prog_name)s
"""

    def get_completion_args(self) -> tuple[list[str], str]:
        line = os.environ["COMP_WORDS"]
        words = split_arg_string(line)[1:]
        if not words or line[-1:].isspace():
            return words, ""
        return words[:-1], words[-1]

    def source(self) -> str:
        # Not so, click runs bash first to see its version.
        return ShellComplete.source(self)


class _Zsh(ZshComplete):
    name = "zsh"

    def format_completion(self, item: CompletionItem) -> str:
        # click escapes colons since 8.2 only.
        value, about = item.value, item.help or "_"
        if item.help:
            value = value.replace("\\:", ":").replace(":", "\\:")
        return f"{item.type}\n{value}\n{about}"


_CLASSES: dict[str, type[ShellComplete]] = {
    "bash": _Bash,
    "zsh": _Zsh,
    "fish": FishComplete,
}
for _name, _class in _CLASSES.items():
    add_completion_class(_class, _name)


@click.command(
    "completion",
    epilog="""\b
Examples:
    $ cd ~/.local/share/bash-completion/completions
    $ qrexec-activate completion bash >qrexec-activate
    $ qrexec-activate completion zsh >~/.zfunc/_qrexec-activate
    $ cd ~/.config/fish/completions
    $ qrexec-activate completion fish >qrexec-activate.fish
""",
)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@debug_option
@click.pass_context
def command(ctx: click.Context, shell: str) -> None:
    """Print the completion script for a shell. The packages bring it along;
    this is for all others."""
    root = ctx.find_root().command
    completer = _CLASSES[shell](
        root, {}, "qrexec-activate", "_QREXEC_ACTIVATE_COMPLETE"
    )
    click.echo(completer.source())
