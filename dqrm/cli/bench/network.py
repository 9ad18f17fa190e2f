"""``dqrm bench network``: the exchange across a network of a given rate."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

from dqrm.cli.bench.exchange import conclude, show_cases, study_options, write_cases
from dqrm.cli.bench.speed import Numbers
from dqrm.cli.framework import DqrmCommand

if TYPE_CHECKING:
    from dqrm.bench.exchange.plan import Case, Part

_PARTS = ("rows", "steps")
_EXAMPLES = [
    ("dqrm bench network", "two and four ranks at 1 Gbit/s and 100 Mbit/s, as root"),
    ("dqrm bench network --nproc 2 --rate 10gbit --scale 0.1", "one world, smaller tables"),
]


class Rates(click.ParamType[tuple[str, ...], str]):
    """Rates as tc writes them, by commas."""

    name = "rate,rate..."

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, ...]:
        """Refuse anything else."""
        rates = tuple(part.strip() for part in str(value).split(","))
        for rate in rates:
            if not re.fullmatch(r"[1-9][0-9]*(mbit|gbit)", rate):
                self.fail(f"{rate!r}: give rates such as 1gbit,100mbit", param, ctx)
        return rates


@click.command("network", cls=DqrmCommand, examples=_EXAMPLES)
@click.option("--nproc", type=Numbers(), default="2,4", show_default=True, help="Ranks.")
@click.option(
    "--rate", type=Rates(), default="1gbit,100mbit", show_default=True, help="Of every cable."
)
@click.option(
    "--backend",
    type=click.Choice(["ccl", "gloo"]),
    default="ccl",
    show_default=True,
    help="What gradients travel over.",
)
@study_options(parts=_PARTS, batch="2048", indices="uniform", repeats=15)
def network(
    only: tuple[str, ...],
    nproc: tuple[int, ...],
    rate: tuple[str, ...],
    batch: tuple[int, ...],
    indices: tuple[str, ...],
    backend: str,
    repeats: int,
    scale: float,
    seed: int,
    json_file: Path | None,
    plot_file: Path | None,
) -> None:
    """Time the exchange and training steps of ranks on machines of their own.

    The machines are private network namespaces, joined by a switch whose cables let through a
    rate and no more; they are removed in the end, however it comes. rows and steps are those of
    dqrm bench exchange; the bytes that each machine's network interface counted, TCP/IP headers
    apart, are put beside the meter's. It takes root, and says so where it cannot run.
    """
    from dqrm.runtime import prepare_threads

    prepare_threads()

    from dqrm.bench.exchange.plan import Plan
    from dqrm.bench.network.machines import why_not
    from dqrm.bench.network.study import run_network

    reason = why_not()
    if reason is not None:
        click.echo(f"skipped: {reason}")
        return
    plan = Plan(
        parts=cast("tuple[Part, ...]", only),
        batches=batch,
        indices=indices,
        backends=(backend,),
        rounds=repeats,
        scale=scale,
        seed=seed,
        turn_seconds=0.0,
    )
    cases: list[Case] = []
    for found in run_network(plan, nproc, rate):
        cases += found
        show_cases(found)
        write_cases("bench network", plan, cases, json_file)
    conclude(cases, plot_file)
