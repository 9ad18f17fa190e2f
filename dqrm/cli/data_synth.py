"""``dqrm data synth``: data with a known best AUC and log loss."""

import json
from pathlib import Path

import click

from dqrm.cli.framework import DqrmCommand
from dqrm.cli.options import config_option, overrides_argument
from dqrm.cli.text import pairs

SYNTH_MODEL = "dqrm.data.synth:SynthConfig"

_EXAMPLES = [
    ("dqrm data synth --scale 0.02 -o prepared/synth", "Criteo Kaggle's shape at a fiftieth"),
    ("dqrm data synth -o prepared/small rows=100000 seed=1", "a small one, another seed"),
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
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
@overrides_argument(SYNTH_MODEL)
def synth(
    source: str | None,
    scale: float | None,
    output: Path,
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
