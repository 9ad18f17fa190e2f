"""``dqrm bench accuracy``: what 4 bits cost or gain."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from dqrm.cli.bench.seeds import seeds_option
from dqrm.cli.framework import DqrmCommand
from dqrm.cli.options import config_option, overrides_argument
from dqrm.cli.text import bytes_text, table

if TYPE_CHECKING:
    from dqrm.bench.accuracy import Arm

_EXAMPLES = [
    ("dqrm bench accuracy --config census", "three seeds of each on the built-in example"),
    (
        "dqrm bench accuracy --config census --seeds 0 --json out.json --plot out.png",
        "one seed, with everything measured and a picture",
    ),
]


@click.command("accuracy", cls=DqrmCommand, examples=_EXAMPLES)
@config_option()
@seeds_option()
@click.option(
    "--json", "json_file", type=click.Path(path_type=Path), help="Write all that was measured."
)
@click.option(
    "--plot", "plot_file", type=click.Path(path_type=Path), help="Write curves of validation."
)
@overrides_argument()
def accuracy(
    source: str | None,
    seeds: tuple[int, ...],
    json_file: Path | None,
    plot_file: Path | None,
    overrides: tuple[str, ...],
) -> None:
    """Compare a recipe in FP32, quantized afterwards, and trained at its low bits.

    Each run is selected on validation, tested once and recorded in MLflow. A third line
    quantizes the FP32 model row by row without training. Spread is the standard deviation over
    seeds.
    """
    from dqrm.config import RunConfig
    from dqrm.configuration import load
    from dqrm.runtime import prepare_threads

    config = load(RunConfig, source, overrides)
    prepare_threads(config.train.threads)

    from dqrm.bench.accuracy import compare_accuracy
    from dqrm.data.files import write_json
    from dqrm.tracking.environment import environment_tags

    arms = compare_accuracy(config, seeds, Path(source).stem if source else None)
    if json_file is not None:
        record = {
            "environment": environment_tags(),
            "config": config.model_dump(mode="json"),
            "seeds": seeds,
            "arms": [arm.as_dict() for arm in arms],
        }
        write_json(json_file, json.loads(json.dumps(record)))
    if plot_file is not None:
        from dqrm.bench.plots import plot_validation

        plot_validation(arms, plot_file)
    click.echo(_summary(arms))
    click.echo()
    click.echo(_curves(arms))


def _summary(arms: "list[Arm]") -> str:
    header = ("", "test AUC", "spread", "test log loss", "spread", "validation AUC", "size")
    rows = []
    for arm in arms:
        validation = [measured.auc for measured in arm.validation]
        rows.append(
            (
                arm.name,
                f"{arm.mean('auc'):.4f}",
                f"{arm.spread('auc'):.4f}",
                f"{arm.mean('log_loss'):.4f}",
                f"{arm.spread('log_loss'):.4f}",
                f"{sum(validation) / len(validation):.4f}" if validation else "-",
                bytes_text(arm.packed_bytes),
            )
        )
    return table(header, rows)


def _curves(arms: "list[Arm]") -> str:
    """Validation by epoch, the mean over seeds; only what every seed reached."""
    trained = [arm for arm in arms if arm.curves and arm.curves[0]]
    header = ["epoch", *(f"{arm.name} {metric}" for arm in trained for metric in ("AUC", "loss"))]
    rows = []
    for points in zip(*(curve for arm in trained for curve in arm.curves), strict=False):
        row, rest = [f"{points[0]['epoch']:.2f}"], list(points)
        for arm in trained:
            own, rest = rest[: len(arm.curves)], rest[len(arm.curves) :]
            for metric in ("auc", "log_loss"):
                row.append(f"{sum(point[metric] for point in own) / len(own):.4f}")
        rows.append(row)
    return table(header, rows)
