"""``dqrm completion``: scripts that make a shell complete commands, keys and values."""

import os
from typing import Any

import click
from click.shell_completion import BashComplete, add_completion_class, get_completion_class

from dqrm.cli.framework import COMPLETE_VARIABLE, DqrmCommand

_HOW_TO = {
    "bash": '# add to ~/.bashrc:  eval "$(dqrm completion bash)"',
    "zsh": '# add to ~/.zshrc, after compinit:  eval "$(dqrm completion zsh)"',
    "fish": "# once:  dqrm completion fish > ~/.config/fish/completions/dqrm.fish",
}

_BASH_SCRIPT = """\
%(complete_func)s() {
    local IFS=$'\\n'
    local response type value
    # A word break at "=" would cut quant.bits=4 into three words.
    response=$(env COMP_WORDS="${COMP_WORDS[*]}" COMP_CWORD=$COMP_CWORD \\
        %(complete_var)s=bash_complete "$1")
    for completion in $response; do
        IFS=',' read type value <<< "$completion"
        if [[ $type == dir ]]; then
            COMPREPLY=()
            compopt -o dirnames
        elif [[ $type == file ]]; then
            COMPREPLY=()
            compopt -o default
        elif [[ $type == plain ]]; then
            COMPREPLY+=("$value")
            if [[ $value == *= ]]; then compopt -o nospace; fi
        fi
    done
    return 0
}
complete -o nosort -F %(complete_func)s %(prog_name)s
"""


class KeyValueBashComplete(BashComplete):
    """Completion in bash that understands ``key=value`` although bash cuts words at ``=``."""

    name = "bash"
    source_template = _BASH_SCRIPT

    def get_completion_args(self) -> tuple[list[str], str]:
        """Join what bash cut; of a joined word only the part behind ``=`` is bash's word."""
        words = os.environ["COMP_WORDS"].split("\n")
        position = int(os.environ["COMP_CWORD"])
        joined: list[str] = []
        for word in [*words, ""][1 : position + 1]:
            before = joined[-1] if joined else ""
            if before.startswith("-") and word == "=":
                joined.append("")  # --config=census: the value is a word of its own for click
            elif joined and (before == "" or before.endswith("=") or word == "="):
                joined[-1] += word
            else:
                joined.append(word)
        return joined[:-1], joined[-1]

    def format_completion(self, item: Any) -> str:
        """Write the part of a word that bash replaces."""
        value = str(item.value)
        key, equals, rest = value.partition("=")
        in_value = "=" in self.get_completion_args()[1]
        shown = rest if equals and in_value and not key.startswith("-") else value
        return f"{item.type},{shown}"


add_completion_class(KeyValueBashComplete)


@click.command(
    "completion",
    cls=DqrmCommand,
    examples=[
        ('eval "$(dqrm completion bash)"', "for this shell; put the line into ~/.bashrc to keep"),
        ("dqrm completion zsh", "the script for zsh"),
    ],
)
@click.argument("shell", type=click.Choice(list(_HOW_TO)))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print the completion script of a shell.

    It completes commands, options, override keys and their values, and shipped configurations.
    """
    root = ctx.find_root()
    kind = get_completion_class(shell)
    assert kind is not None
    script = kind(root.command, {}, "dqrm", COMPLETE_VARIABLE).source()
    click.echo(f"{_HOW_TO[shell]}\n{script}")
