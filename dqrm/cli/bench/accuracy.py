"""``dqrm bench accuracy``: what 4 bits cost or gain."""

import itertools
import statistics
from pathlib import Path
from typing import TYPE_CHECKING

import click

from dqrm.cli.bench.compared import compare, exit_code, test_figures
from dqrm.cli.bench.seeds import seeds_option
from dqrm.cli.framework import DqrmCommand
from dqrm.cli.options import config_option, overrides_argument
from dqrm.cli.outputs import OutputFile, PictureFile
from dqrm.text import bytes_text, table

if TYPE_CHECKING:
    from dqrm.study.study import Answered

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
@click.option("--json", "json_file", type=OutputFile(), help="Write all that was measured.")
@click.option("--plot", "plot_file", type=PictureFile(), help="Write curves of validation.")
@overrides_argument()
def accuracy(
    source: str | None,
    seeds: tuple[int, ...],
    json_file: Path | None,
    plot_file: Path | None,
    overrides: tuple[str, ...],
) -> int:
    """Compare a recipe in FP32, quantized afterwards, and trained at its low bits.

    Each run is selected on validation, tested once and recorded in MLflow. A third line
    quantizes the FP32 model row by row without training. Spread is the standard deviation over
    seeds. Runs are those of `dqrm study`, in <output>/study: complete ones are not run again.
    """
    from dqrm.config import RunConfig
    from dqrm.configuration import load
    from dqrm.runtime import prepare_threads

    config = load(RunConfig, source, overrides)
    prepare_threads(config.train.threads)

    from dqrm.bench.accuracy import question

    study = compare("accuracy", question, config, seeds, json_file)
    (answered,) = study.answered
    if plot_file is not None:
        from dqrm.study.plots import PICTURES

        _, draw = PICTURES["curves"]
        draw(study.answered, [], plot_file)
    click.echo(_summary(answered))
    click.echo()
    click.echo(_curves(answered))
    return exit_code(study)


def _summary(answered: "Answered") -> str:
    header = ("", "test AUC", "spread", "test log loss", "spread", "validation AUC", "size")
    rows = []
    for arm in answered.arms:
        outcomes = answered.outcomes[arm.key]
        if outcomes:
            rows.append(
                (
                    arm.title,
                    *test_figures(outcomes, "auc"),
                    *test_figures(outcomes, "log_loss"),
                    f"{statistics.fmean(o.validation['auc'] for o in outcomes):.4f}",
                    bytes_text(outcomes[0].packed_bytes),
                )
            )
    return table(header, rows)


def _curves(answered: "Answered") -> str:
    """Validation by epoch, the mean over seeds; only what every seed reached."""
    curves = {
        arm.title: [o.curve for o in answered.outcomes[arm.key] if o.curve] for arm in answered.arms
    }
    trained = {title: of_arm for title, of_arm in curves.items() if of_arm}
    header = ["epoch", *(f"{title} {metric}" for title in trained for metric in ("AUC", "loss"))]
    rows = []
    for points in zip(*itertools.chain(*trained.values()), strict=False):
        row, rest = [f"{points[0].epoch:.2f}"], list(points)
        for of_arm in trained.values():
            own, rest = rest[: len(of_arm)], rest[len(of_arm) :]
            row.append(f"{statistics.fmean(point.auc for point in own):.4f}")
            row.append(f"{statistics.fmean(point.log_loss for point in own):.4f}")
        rows.append(row)
    return table(header, rows)
