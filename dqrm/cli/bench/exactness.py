"""``dqrm bench exactness``: packed tables against the training forward, bit for bit."""

from pathlib import Path

import click

from dqrm.cli.errors import ExitCode
from dqrm.cli.framework import DqrmCommand
from dqrm.cli.outputs import OutputFile
from dqrm.text import table


@click.command(
    "exactness",
    cls=DqrmCommand,
    examples=[
        ("dqrm bench exactness", "ten million look-ups at every instruction set"),
        ("dqrm bench exactness --look-ups 100000 --json out.json", "a quick look"),
    ],
)
@click.option(
    "--look-ups",
    type=click.IntRange(min=1),
    default=10_000_000,
    show_default=True,
    help="Look-ups at each instruction set.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of weights and ids.")
@click.option("--json", "json_file", type=OutputFile(), help="Write all that was counted.")
def exactness(look_ups: int, seed: int, json_file: Path | None) -> int:
    """Count bits in which packed tables and the training forward differ.

    Tables of 2, 4, 8 and 16 bits, with a scale a table or a row, one id a bag or many, at every
    instruction set of this processor; both are held against the training forward without
    vectors. Exit code 3 when any bit differs.
    """
    from dataclasses import asdict

    from dqrm.runtime import prepare_threads

    prepare_threads()

    from dqrm.bench.exactness import compare_exactness
    from dqrm.data.files import write_json
    from dqrm.tracking.environment import environment_tags

    compared = compare_exactness(look_ups, seed, lambda line: click.echo(line, err=True))
    if json_file is not None:
        record = {"environment": environment_tags(), "seed": seed}
        write_json(json_file, {**record, "comparisons": [asdict(each) for each in compared]})
    header = ("level", "bits", "a scale a", "a bag", "look-ups", "packed", "training")
    lines = [
        (
            each.level,
            str(each.bits),
            each.granularity,
            each.bags,
            f"{each.look_ups:,}",
            f"{each.packed_different_bits:,}",
            f"{each.training_different_bits:,}",
        )
        for each in compared
    ]
    click.echo(table(header, lines))
    different = sum(e.packed_different_bits + e.training_different_bits for e in compared)
    total = sum(each.look_ups for each in compared)
    click.echo(f"{total:,} look-ups, {different:,} bits differ")
    return ExitCode.GATE_NOT_MET if different else ExitCode.DONE
