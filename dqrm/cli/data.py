"""``dqrm data``: from raw rows, or from none, to a data set that training reads."""

import click

from dqrm.cli.framework import LazyGroup

_COMMANDS = {
    "prepare": ("dqrm.cli.data_prepare:prepare", "Turn raw rows into a data set to train on."),
    "apply": ("dqrm.cli.data_apply:apply", "Prepare new rows with the vocabulary of a data set."),
    "describe": ("dqrm.cli.data_describe:describe", "Show what is in a data set."),
    "synth": ("dqrm.cli.data_synth:synth", "Generate data whose best possible AUC is known."),
}


@click.group(
    "data",
    cls=LazyGroup,
    lazy=_COMMANDS,
    help="Prepare, describe, apply and generate data sets.",
)
def data() -> None:
    """Hold the commands."""
