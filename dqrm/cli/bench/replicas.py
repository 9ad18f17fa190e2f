"""``dqrm bench replicas``: what training in several processes costs in accuracy."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from dqrm.cli.bench.compared import compare, exit_code, test_figures
from dqrm.cli.bench.seeds import seeds_option
from dqrm.cli.framework import DqrmCommand
from dqrm.cli.options import config_option, overrides_argument
from dqrm.cli.outputs import OutputFile
from dqrm.text import bytes_text, table

if TYPE_CHECKING:
    from dqrm.study.study import Answered

_EXAMPLES = [
    ("dqrm bench replicas --config census", "three seeds of each, in two processes"),
    ("dqrm bench replicas --config census --only 0,2 --seeds 0", "two arms, one seed"),
]


@click.command("replicas", cls=DqrmCommand, examples=_EXAMPLES)
@config_option()
@click.option(
    "--nproc", type=click.IntRange(min=2), default=2, show_default=True, help="Processes."
)
@click.option("--only", metavar="N,N...", help="Numbers of the arms, from 0; all by default.")
@seeds_option()
@click.option("--json", "json_file", type=OutputFile(), help="Write all that was measured.")
@overrides_argument()
def replicas(
    source: str | None,
    nproc: int,
    only: str | None,
    seeds: tuple[int, ...],
    json_file: Path | None,
    overrides: tuple[str, ...],
) -> int:
    """Compare one process with several, by codecs of the exchange.

    Batches are the same whole ones in every arm. Each run is selected on validation and tested
    once. Bytes are what a rank sends in a step; their ratio is to the same collectives in FP32.
    Runs are those of `dqrm study exchange`, in <output>/study.
    """
    from dqrm.config import RunConfig
    from dqrm.configuration import load
    from dqrm.study.kinds import Question, exchange_arms

    chosen = exchange_arms(nproc)
    if only is not None:
        try:
            chosen = tuple(chosen[int(number)] for number in only.split(","))
        except (ValueError, IndexError):
            raise click.BadParameter(
                f"--only {only!r}: give numbers from 0 to {len(chosen) - 1}"
            ) from None
    config = load(RunConfig, source, ["tracking.enabled=false", *overrides])
    asked = Question("replicas", "", chosen, chosen[-1].key, chosen[0].key, ())
    study = compare("replicas", lambda *_: asked, config, seeds, json_file, nproc)
    click.echo(_summary(study.answered[0]))
    return exit_code(study)


def _summary(answered: "Answered") -> str:
    header = ("", "processes", "test AUC", "spread", "test log loss", "bytes a step", "ratio")
    rows = []
    for arm in answered.arms:
        outcomes = answered.outcomes[arm.key]
        if outcomes:
            sent, ratio = outcomes[-1].sent_bytes, outcomes[-1].ratio
            rows.append(
                (
                    arm.title,
                    str(arm.processes),
                    *test_figures(outcomes, "auc"),
                    test_figures(outcomes, "log_loss")[0],
                    "-" if sent is None else bytes_text(int(sent)),
                    "-" if ratio is None else f"{ratio:.1f}",
                )
            )
    return table(header, rows)
