"""``dqrm study``: the claims, each by one command that anybody can repeat."""

import click

from dqrm.cli.framework import LazyGroup

_COMMANDS = {
    "overfit": (
        "dqrm.cli.study.commands:overfit",
        "Examine whether FP32 overfits where 4 bits do not.",
    ),
    "bits": (
        "dqrm.cli.study.commands:bits",
        "Compare 16, 8, 4 and 2 bits with tuned FP32, trained and quantized afterwards.",
    ),
    "scale-period": (
        "dqrm.cli.study.commands:scale_period",
        "Compare exact scales with scales refreshed every 1, 10, 100, 1000 steps and every epoch.",
    ),
    "exchange": (
        "dqrm.cli.study.commands:exchange",
        "Compare codecs of the exchange between processes with the exchange in FP32.",
    ),
    "memory": (
        "dqrm.cli.study.commands:memory",
        "Compare rows kept in FP32, BF16, INT8 and INT4 while they are trained.",
    ),
    "multihot": (
        "dqrm.cli.study.commands:multihot",
        "Compare rows quantized before they are pooled with sums quantized afterwards.",
    ),
}


@click.group("study", cls=LazyGroup, lazy=_COMMANDS)
def study() -> None:
    """Repeat a claim: arms beside the strongest rival, over seeds, with a verdict by a rule.

    Every arm and seed is a `dqrm` run of its own. Complete runs are not run again, whichever study
    they were made by, and a study that was stopped or killed goes on by the same command.
    """
