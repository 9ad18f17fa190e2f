"""``dqrm bench prepare``: text to shards, beside pandas."""

from pathlib import Path

import click

from dqrm.cli.framework import DqrmCommand
from dqrm.cli.outputs import OutputFile
from dqrm.text import bytes_text, table


@click.command(
    "prepare",
    cls=DqrmCommand,
    examples=[
        ("dqrm bench prepare", "a million rows, three repeats"),
        ("dqrm bench prepare --rows 100000 --repeats 1 --json out.json", "a quick look"),
    ],
)
@click.option(
    "--rows",
    type=click.IntRange(min=1),
    default=1_000_000,
    show_default=True,
    help="Rows to generate.",
)
@click.option(
    "--repeats", type=click.IntRange(min=1), default=3, show_default=True, help="Times each is run."
)
@click.option("--json", "json_file", type=OutputFile(), help="Write all that was measured.")
def prepare(rows: int, repeats: int, json_file: Path | None) -> None:
    """Time preparation beside pandas only parsing.

    Criteo-format rows are generated, then read by each contestant in turn, in a process of its
    own. CPU time counts all processes; the median over repeats is shown.
    """
    from dataclasses import asdict
    from statistics import median

    from dqrm.bench.preparation import compare_preparation
    from dqrm.data.files import write_json
    from dqrm.tracking.environment import environment_tags

    contestants, size = compare_preparation(rows, repeats, lambda line: click.echo(line, err=True))
    if json_file is not None:
        measured = [asdict(contestant) for contestant in contestants]
        record = {"environment": environment_tags(), "rows": rows, "bytes": size}
        write_json(json_file, {**record, "contestants": measured})
    header = ("", "rows/CPU-s", "without start-up", "CPU s", "wall s", "peak memory")
    lines = [
        (
            contestant.name,
            f"{contestant.rows_per_cpu_second(rows, start_up=True):,.0f}",
            f"{contestant.rows_per_cpu_second(rows, start_up=False):,.0f}",
            f"{median(contestant.cpu_seconds):.2f}",
            f"{median(contestant.wall_seconds):.2f}",
            bytes_text(median(contestant.peak_bytes)),
        )
        for contestant in contestants
    ]
    click.echo(f"{rows:,} rows, {bytes_text(size)}")
    click.echo(table(header, lines))
