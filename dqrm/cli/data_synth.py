"""``dqrm data synth``: data with a known best AUC and log loss."""

import json
from datetime import datetime
from pathlib import Path

import click

from dqrm.cli.framework import DqrmCommand
from dqrm.cli.options import config_option, overrides_argument
from dqrm.text import pairs

SYNTH_MODEL = "dqrm.data.synth:SynthConfig"

_EXAMPLES = [
    ("dqrm data synth --scale 0.02 -o prepared/synth", "Criteo Kaggle's shape at a fiftieth"),
    ("dqrm data synth -o prepared/small rows=100000 seed=1", "a small one, another seed"),
    (
        "dqrm data synth -o days --days 8 --first-day 2026-03-01 --scale 0.001",
        "raw rows of eight days, days/2026-03-01.parquet and on, with new ids every day",
    ),
]


@click.command("synth", cls=DqrmCommand, examples=_EXAMPLES)
@config_option()
@click.option("--scale", type=float, metavar="X", help="Rows and tables next to Criteo (scale).")
@click.option(
    "--output",
    "-o",
    type=click.Path(path_type=Path),
    required=True,
    help="New folder to write; train on it with data.path.",
)
@click.option(
    "--days",
    type=click.IntRange(min=2),
    metavar="N",
    help="Write raw rows of N days instead, with ids that come up from some day on.",
)
@click.option(
    "--first-day",
    type=click.DateTime(["%Y-%m-%d"]),
    default="2026-01-01",
    show_default=True,
    metavar="DATE",
    help="Name of the first of them.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
@overrides_argument(SYNTH_MODEL)
def synth(
    source: str | None,
    scale: float | None,
    output: Path,
    days: int | None,
    first_day: datetime,
    as_json: bool,
    overrides: tuple[str, ...],
) -> None:
    """Generate data whose best possible AUC is known.

    A teacher with Criteo Kaggle's columns and Zipf-distributed ids draws the labels, so the AUC
    and log loss of the true probabilities are known. `dqrm config --for synth --fields` lists
    the keys.
    """
    from dqrm.cli.progress import ProgressDisplay
    from dqrm.configuration import load
    from dqrm.data.synth import SynthConfig, synthesize

    given = [f"scale={scale}"] if scale is not None else []
    if given and any(override.startswith("scale=") for override in overrides):
        raise click.UsageError("--scale and scale= are the same; give only one of them")
    config = load(SynthConfig, source, [*given, *overrides])
    if days is not None:
        from dqrm.data.days import synthesize_days

        with ProgressDisplay() as display:
            best_of_days = synthesize_days(
                output,
                config,
                days,
                first_day.date(),
                progress=lambda done, total: display.show("rows", done, total, "rows"),
            )
        click.echo(json.dumps(best_of_days, indent=2) if as_json else _days(output, best_of_days))
        return
    with ProgressDisplay() as display:
        manifest = synthesize(
            output, config, progress=lambda done, total: display.show("rows", done, total, "rows")
        )
    if as_json:
        report = {"path": str(output), "digest": manifest.digest, **manifest.report}
        click.echo(json.dumps(report, indent=2))
        return
    splits = ", ".join(f"{info.num_rows:,} {name}" for name, info in manifest.splits.items())
    best = manifest.report["bayes_test"]
    click.echo(
        pairs(
            [
                ("data set", str(output)),
                ("digest", manifest.digest),
                ("rows", splits),
                ("tables", f"{sum(table.num_rows for table in manifest.tables):,} rows"),
                ("best test AUC", f"{best['auc']:.4f} (of the true probabilities)"),
                ("best log loss", f"{best['log_loss']:.4f}"),
                ("train on it", f"dqrm train data.path={output}"),
            ]
        )
    )


def _days(output: Path, best: dict[str, dict[str, float]]) -> str:
    return pairs(
        [
            (
                str(output / f"{day}.parquet"),
                f"best AUC {found['auc']:.4f}, log loss {found['log_loss']:.4f}",
            )
            for day, found in best.items()
        ]
    )
