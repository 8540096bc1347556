"""qrexec-activate completion: what a shell needs to complete commands, routes,
units and qubes."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from ..errors import ActivateError
from .options import debug_option

__all__ = ["command"]


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
    kind = get_completion_class(shell)
    if kind is None:
        raise ActivateError(
            f"this version of click knows no completion for {shell}: install"
            f" click 8.1 or later"
        )
    root = ctx.find_root().command
    completer = kind(root, {}, "qrexec-activate", "_QREXEC_ACTIVATE_COMPLETE")
    # source() would run bash to see its version first; the script does not
    # depend on it.
    click.echo(completer.source_template % completer.source_vars())
