"""``dqrm bench``: studies that produce the figures people quote."""

import click

from dqrm.cli.framework import LazyGroup

_COMMANDS = {
    "accuracy": (
        "dqrm.cli.bench.accuracy:accuracy",
        "Compare a recipe in FP32, quantized afterwards, and trained at its low bits.",
    ),
    "replicas": (
        "dqrm.cli.bench.replicas:replicas",
        "Compare one process with several, by codecs of the exchange.",
    ),
    "prepare": (
        "dqrm.cli.bench.preparation:prepare",
        "Time preparation beside pandas only parsing.",
    ),
    "exactness": (
        "dqrm.cli.bench.exactness:exactness",
        "Count bits in which packed tables and the training forward differ.",
    ),
    "kernels": ("dqrm.cli.bench.kernels:kernels", "Time the compiled loops beside those of peers."),
    "exchange": (
        "dqrm.cli.bench.exchange:exchange",
        "Time the exchange of gradients beside what torch offers.",
    ),
    "network": (
        "dqrm.cli.bench.network:network",
        "Time the exchange and training steps of ranks on machines of their own.",
    ),
    "train": ("dqrm.cli.bench.train:train", "Time whole training steps beside those of peers."),
    "transformers": (
        "dqrm.cli.bench.transformers:transformers",
        "Compress transformers by every shipped recipe, beside the uncompressed model.",
    ),
}


@click.group("bench", cls=LazyGroup, lazy=_COMMANDS)
def bench() -> None:
    """Measure accuracy and speed, with seeds, versions and settings on record."""
