"""``dqrm bench kernels``: the loops under training and serving, one by one."""

from typing import Unpack

import click

from dqrm.cli.bench.speed import Names, Settings, prepare_process, run, speed_options
from dqrm.cli.framework import DqrmCommand

GROUPS = (
    *("forward", "sgd", "adagrad", "adam"),
    *("packed", "packed-one-table", "interaction", "mlp"),
)
_EXAMPLES = [
    ("dqrm bench kernels", "everything; about an hour"),
    ("dqrm bench kernels --only sgd --batch 2048 --threads 1", "one group, one setting"),
    (
        "dqrm bench kernels --scale 0.01 --repeats 5 --json out.json --plot out.png",
        "small tables, with everything measured and a picture",
    ),
]


@click.command("kernels", cls=DqrmCommand, examples=_EXAMPLES)
@click.option(
    "--only",
    type=Names(GROUPS),
    default=",".join(GROUPS),
    show_default=True,
    help="Groups to measure.",
)
@speed_options(batch="128,2048", dim="16,64", repeats=15)
def kernels(only: tuple[str, ...], **settings: Unpack[Settings]) -> None:
    """Time the compiled loops beside those of peers.

    All contestants of a group live in one process, with huge pages, and take short turns in a new
    order every round. Shown are medians over the turns of CPU time, which waiting for a core does
    not change; ratios are taken round by round. A peer that is not installed is left out and
    named. Times mean little while other programs compute.
    """
    prepare_process(settings["threads"])

    from dqrm.bench.speed.groups import KERNELS

    run("bench kernels", [group for group in KERNELS if group.name in only], settings)
