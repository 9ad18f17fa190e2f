"""``dqrm bench exchange``: gradients between processes, beside what torch offers."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

import click

from dqrm.cli.bench.speed import KINDS, Function, Names, Numbers
from dqrm.cli.framework import DqrmCommand
from dqrm.cli.outputs import OutputFile, PictureFile
from dqrm.text import table

if TYPE_CHECKING:
    from dqrm.bench.exchange.plan import Case, Part, Plan

_PARTS = ("rows", "messages", "steps")
_EXAMPLES = [
    ("dqrm bench exchange", "everything, with 2.2 GB of tables a process; some minutes"),
    ("dqrm bench exchange --only rows --batch 2048", "touched rows only, at one batch size"),
    (
        "dqrm bench exchange --scale 0.01 --repeats 5 --json out.json --plot out.png",
        "small tables, with everything measured and a picture",
    ),
]


def study_options(
    *, parts: tuple[str, ...], batch: str, indices: str, repeats: int
) -> Callable[[Function], Function]:
    """Return a decorator that adds the options of every study of the exchange."""
    options = [
        click.option(
            "--only", type=Names(parts), default=",".join(parts), show_default=True, help="Parts."
        ),
        click.option(
            "--batch",
            type=Numbers(),
            default=batch,
            show_default=True,
            help="Samples of each rank.",
        ),
        click.option(
            "--indices",
            type=Names(KINDS),
            default=indices,
            show_default=True,
            help="How ids are spread.",
        ),
        click.option(
            "--repeats",
            type=click.IntRange(min=1),
            default=repeats,
            show_default=True,
            help="Turns of each contestant.",
        ),
        click.option(
            "--scale",
            type=click.FloatRange(min=0, max=1, min_open=True),
            default=1.0,
            show_default=True,
            help="Share of the Criteo Kaggle tables' 33.8 million rows, which each rank holds.",
        ),
        click.option("--seed", type=int, default=0, show_default=True, help="Of ids and turns."),
        click.option("--json", "json_file", type=OutputFile(), help="Write all that was measured."),
        click.option("--plot", "plot_file", type=PictureFile(), help="Draw times and bytes."),
    ]

    def decorate(function: Function) -> Function:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


@click.command("exchange", cls=DqrmCommand, examples=_EXAMPLES)
@click.option("--nproc", type=click.IntRange(min=2), default=2, show_default=True, help="Ranks.")
@click.option(
    "--backend",
    type=Names(("ccl", "gloo")),
    default="ccl,gloo",
    show_default=True,
    help="What ours travels over; whole steps use the first.",
)
@study_options(parts=_PARTS, batch="128,2048", indices="uniform,zipf", repeats=25)
def exchange(
    nproc: int,
    only: tuple[str, ...],
    batch: tuple[int, ...],
    indices: tuple[str, ...],
    backend: tuple[str, ...],
    repeats: int,
    scale: float,
    seed: int,
    json_file: Path | None,
    plot_file: Path | None,
) -> None:
    """Time the exchange of gradients beside what torch offers.

    Real processes with a core each take turns in lock step; a turn lasts as long as the slowest
    takes. rows: from pooled gradients of touched rows to updated tables, beside torch's sparse
    all-reduce and gathers of FP32 rows. messages: collectives alone, oneCCL beside Gloo. steps:
    whole training steps, beside one process alone. Bytes are those a rank sends, counted where
    the collective is called, and calculated. Times mean little while other programs compute.
    """
    from dqrm.bench.speed.pages import start_again_with_huge_pages

    start_again_with_huge_pages()

    from dqrm.runtime import prepare_threads

    prepare_threads()

    from dqrm.bench.exchange.plan import Plan
    from dqrm.bench.exchange.study import run_exchange, usable_backends

    backends, absent = usable_backends(backend)
    if absent:
        click.echo(absent, err=True)
    if not backends:
        raise click.UsageError("no backend is left; see dqrm doctor")
    plan = Plan(
        parts=cast("tuple[Part, ...]", only),
        batches=batch,
        indices=indices,
        backends=backends,
        rounds=repeats,
        scale=scale,
        seed=seed,
    )
    cases: list[Case] = []
    for found in run_exchange(plan, nproc):
        cases += found
        show_cases(found)
        write_cases("bench exchange", plan, cases, json_file)
    conclude(cases, plot_file)


def show_cases(cases: "Sequence[Case]") -> None:
    """Print tables of times and bytes, and of where the time goes."""
    from dqrm.bench.exchange.report import case_table, phase_table, title

    for case in cases:
        click.echo(f"{title(case)}\n{table(*case_table(case))}\n")
        header, lines = phase_table(case)
        if lines:
            click.echo(f"{table(header, lines)}\n")


def write_cases(command: str, plan: "Plan", cases: "Sequence[Case]", path: Path | None) -> None:
    """Write everything so far; after every part, as hours of measuring should survive a kill."""
    if path is None:
        return
    import json
    import os
    from dataclasses import asdict
    from datetime import UTC, datetime

    from dqrm.bench.exchange.bars import verdicts
    from dqrm.data.files import write_json
    from dqrm.tracking.environment import environment_tags

    record = {
        "command": command,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "tags": environment_tags(),
        "load_average": os.getloadavg(),
        "plan": asdict(plan),
        "cases": [case.as_dict() for case in cases],
        "bars": [{**asdict(bar), "met": bar.met} for bar in verdicts(cases)],
    }
    write_json(path, json.loads(json.dumps(record)))


def conclude(cases: "Sequence[Case]", plot_file: Path | None) -> None:
    """Print which bars are met, and draw."""
    from dqrm.bench.exchange.bars import verdicts
    from dqrm.bench.exchange.report import BAR_HEADER, bar_lines, dense_on_paper

    for line in dense_on_paper(cases):
        click.echo(line)
    bars = bar_lines(verdicts(cases))
    if bars:
        click.echo(f"\n{table(BAR_HEADER, bars, left=3)}")
    if plot_file is not None:
        from dqrm.bench.exchange.plots import plot_exchange

        plot_exchange(cases, plot_file)
