"""``dqrm bench replicas``: what training in several processes costs in accuracy."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from dqrm.cli.bench.seeds import seeds_option
from dqrm.cli.framework import DqrmCommand
from dqrm.cli.options import config_option, overrides_argument
from dqrm.cli.text import bytes_text, table

if TYPE_CHECKING:
    from dqrm.bench.replicas import Result

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
@click.option(
    "--json", "json_file", type=click.Path(path_type=Path), help="Write all that was measured."
)
@overrides_argument()
def replicas(
    source: str | None,
    nproc: int,
    only: str | None,
    seeds: tuple[int, ...],
    json_file: Path | None,
    overrides: tuple[str, ...],
) -> None:
    """Compare one process with several, by codecs of the exchange.

    Batches are the same whole ones in every arm. Each run is selected on validation and tested
    once. Bytes are what a rank sends in a step; their ratio is to the same collectives in FP32.
    """
    from dqrm.bench.replicas import arms, compare_replicas
    from dqrm.config import RunConfig
    from dqrm.configuration import load
    from dqrm.data.files import write_json
    from dqrm.tracking.environment import environment_tags

    chosen = arms(nproc)
    if only is not None:
        try:
            chosen = [chosen[int(number)] for number in only.split(",")]
        except (ValueError, IndexError):
            raise click.BadParameter(
                f"--only {only!r}: give numbers from 0 to {len(chosen) - 1}"
            ) from None
    config = load(RunConfig, source, ["tracking.enabled=false", *overrides])
    results = []
    for result in compare_replicas(config, chosen, seeds, Path(source or "train").stem):
        results.append(result)
        if json_file is not None:
            record = {
                "environment": environment_tags(),
                "config": config.model_dump(mode="json"),
                "seeds": seeds,
                "arms": [done.as_dict() for done in results],
            }
            write_json(json_file, json.loads(json.dumps(record)))
    click.echo(_summary(results))


def _summary(results: "list[Result]") -> str:
    header = ("", "processes", "test AUC", "spread", "test log loss", "bytes a step", "ratio")
    rows = []
    for result in results:
        rows.append(
            (
                result.arm.name,
                str(result.arm.processes),
                f"{sum(result.auc) / len(result.auc):.4f}",
                f"{result.spread:.4f}",
                f"{sum(result.log_loss) / len(result.log_loss):.4f}",
                "-" if result.sent_bytes is None else bytes_text(int(result.sent_bytes)),
                "-" if result.ratio is None else f"{result.ratio:.1f}",
            )
        )
    return table(header, rows)
