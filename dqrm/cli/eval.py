"""``dqrm eval``: measure a trained model, and hold it to a quality gate."""

import json
from dataclasses import asdict
from pathlib import Path

import click

from dqrm.cli.errors import ExitCode
from dqrm.cli.framework import DqrmCommand
from dqrm.text import pairs

_EXAMPLES = [
    ("dqrm eval runs/fp32", "the packed model of a run on its own test split"),
    ("dqrm eval runs/fp32 --split validation --json", "another split, for a script"),
    ("dqrm eval runs/fp32 --min-auc 0.94", "exit code 3 when the AUC is lower"),
]


@click.command("eval", cls=DqrmCommand, examples=_EXAMPLES)
@click.argument("model", type=click.Path(path_type=Path), metavar="RUN|CHECKPOINT|ARTIFACT")
@click.option("--data", metavar="PATH", help="Prepared data set; by default the run's own.")
@click.option(
    "--split",
    type=click.Choice(["train", "validation", "test"]),
    default="test",
    show_default=True,
    help="Which rows.",
)
@click.option("--min-auc", type=float, metavar="X", help="Exit with 3 when the AUC is below X.")
@click.option(
    "--max-log-loss", type=float, metavar="X", help="Exit with 3 when the log loss is above X."
)
@click.option(
    "--batch-size", type=click.IntRange(min=1), default=16384, show_default=True, help="Rows."
)
@click.option("--experiment", metavar="NAME", help="MLflow experiment.")
@click.option("--tracking-uri", metavar="URI", help="MLflow store or server.")
@click.option("--no-track", is_flag=True, help="Do not record the evaluation in MLflow.")
@click.option("--json", "as_json", is_flag=True, help="Print the metrics as JSON.")
def evaluate(
    model: Path,
    data: str | None,
    split: str,
    min_auc: float | None,
    max_log_loss: float | None,
    batch_size: int,
    experiment: str | None,
    tracking_uri: str | None,
    no_track: bool,
    as_json: bool,
) -> int:
    """Measure a trained model on a prepared data set.

    The model is a run's folder (its packed model), a checkpoint, or a packed model; the
    measurement is recorded in MLflow as a run of its own.
    """
    if not model.exists():
        raise click.UsageError(f"{model}: no such run, checkpoint or artifact")

    # Before torch is imported: it reads thread counts and the waiting policy only once.
    from dqrm.runtime import prepare_threads

    prepare_threads()

    from dqrm.tracking.config import TrackingConfig
    from dqrm.training.saved import evaluate_saved

    tracking = TrackingConfig(enabled=not no_track, uri=tracking_uri, experiment=experiment)
    metrics = evaluate_saved(
        model, data=data, split=split, batch_size=batch_size, tracking=tracking
    )
    if as_json:
        click.echo(json.dumps(asdict(metrics), indent=2))
    else:
        click.echo(
            pairs(
                [
                    ("AUC", f"{metrics.auc:.4f}"),
                    ("log loss", f"{metrics.log_loss:.4f}"),
                    ("normalized entropy", f"{metrics.normalized_entropy:.4f}"),
                    ("accuracy", f"{metrics.accuracy:.4f}"),
                    ("calibration", f"{metrics.calibration:.3f}"),
                    ("rows", f"{metrics.num_rows:,} of {split}"),
                ]
            )
        )
    missed = []
    # Written so that NaN, a split of one class only, misses the gate.
    if min_auc is not None and not metrics.auc >= min_auc:
        missed.append(f"AUC {metrics.auc:.6f} is below --min-auc {min_auc:g}")
    if max_log_loss is not None and not metrics.log_loss <= max_log_loss:
        missed.append(f"log loss {metrics.log_loss:.6f} is above --max-log-loss {max_log_loss:g}")
    for line in missed:
        click.echo(f"quality gate not met: {line}", err=True)
    return ExitCode.GATE_NOT_MET if missed else ExitCode.DONE
