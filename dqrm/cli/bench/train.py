"""``dqrm bench train``: whole training steps."""

from typing import Unpack

import click

from dqrm.cli.bench.speed import Names, Settings, prepare_process, run, speed_options
from dqrm.cli.framework import DqrmCommand

CONTESTANTS = (
    *("dqrm INT4", "dqrm int8", "dqrm FP32", "torch eager FP32", "torch eager BF16"),
    *("torch.compile BF16", "FBGEMM + eager BF16", "FBGEMM + torch.compile BF16", "TorchRec BF16"),
)
_EXAMPLES = [
    ("dqrm bench train", "everybody, with 14 GiB of tables; about ten minutes"),
    (
        "dqrm bench train --only 'dqrm INT4,FBGEMM + torch.compile BF16' --threads 1",
        "two contestants on one thread",
    ),
    (
        "dqrm bench train --scale 0.01 --repeats 5 --json out.json --plot out.png",
        "small tables, with everything measured and a picture",
    ),
]


@click.command("train", cls=DqrmCommand, examples=_EXAMPLES)
@click.option(
    "--only",
    type=Names(CONTESTANTS),
    default=",".join(CONTESTANTS),
    show_default=True,
    help="Contestants.",
)
@speed_options(batch="128,2048", dim="16", repeats=15)
def train(only: tuple[str, ...], **settings: Unpack[Settings]) -> None:
    """Time whole training steps beside those of peers.

    The model is that of the Criteo Kaggle recipe: 26 tables, MLPs 13-512-256-64-16 and 512-256-1,
    SGD. A step is forward, loss, backward and update on a batch that is ready; ours multiply in
    bfloat16 as the peers do, "dqrm int8" multiplies 8-bit codes. All contestants
    live in one process, with huge pages, and take turns in a new order every round; medians over
    the turns are shown, ratios are taken round by round. A peer that is not installed is left out
    and named. Times mean little while other programs compute.
    """
    prepare_process(settings["threads"])

    from dqrm.bench.speed.groups import TRAIN

    run("bench train", [TRAIN], settings, only)
