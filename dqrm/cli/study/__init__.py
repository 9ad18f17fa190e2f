"""``dqrm study``: the claims, each by one command that anybody can repeat."""

import click

from dqrm.cli.framework import LazyGroup

_COMMANDS = {
    "overfit": (
        "dqrm.cli.study.commands:overfit",
        "Whether FP32 overfits where 4 bits do not, against tuned FP32.",
    ),
    "bits": ("dqrm.cli.study.commands:bits", "Quality and size by bits of tables and MLPs."),
    "scale-period": (
        "dqrm.cli.study.commands:scale_period",
        "Exact scales beside scales refreshed every T steps.",
    ),
    "exchange": (
        "dqrm.cli.study.commands:exchange",
        "Quality of several processes by the codecs of their exchange.",
    ),
    "memory": (
        "dqrm.cli.study.commands:memory",
        "Quality against the memory of training, by what rows are kept in.",
    ),
    "multihot": (
        "dqrm.cli.study.commands:multihot",
        "Rows quantized before or after they are pooled, by length of bags.",
    ),
}
_EXAMPLES = [
    ("dqrm study overfit --dry-run", "what would run on the built-in teacher set, and how long"),
    ("dqrm study overfit --config census --seeds 0,1,2,3,4", "on the bundled example"),
    ("dqrm study bits data.path=prepared/clicks train.epochs=3", "on your own data"),
]


@click.group("study", cls=LazyGroup, lazy=_COMMANDS, examples=_EXAMPLES)
def study() -> None:
    """Repeat a claim: arms beside the strongest rival, over seeds, with a verdict by a rule.

    Every arm and seed is a `dqrm` run of its own. Complete runs are not run again, whichever study
    they were made by, and a study that was stopped or killed goes on by the same command.
    """
