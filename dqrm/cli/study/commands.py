"""The commands of ``dqrm study``, all made in the same way."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from dqrm.cli.bench.seeds import seeds_option
from dqrm.cli.framework import DqrmCommand
from dqrm.cli.options import config_option, overrides_argument
from dqrm.cli.outputs import OutputFile

Function = TypeVar("Function", bound=Callable[..., Any])

_ABOUT_DATA = (
    "Without --config and data.path the data are a teacher's, whose best AUC and log loss are "
    "known, made once into the output folder (`dqrm data synth`), and the recipe is `synth`."
)


def _common(function: Function) -> Function:
    """Add what every study takes."""
    for decorator in (
        overrides_argument(),
        click.option("--no-track", is_flag=True, help="Do not record the runs in MLflow."),
        click.option("--tracking-uri", metavar="URI", help="MLflow store (tracking.uri)."),
        click.option("--experiment", metavar="NAME", help="MLflow experiment."),
        click.option(
            "--json",
            "json_file",
            type=OutputFile(),
            help="Write all that was measured here as well.",
        ),
        click.option("--dry-run", is_flag=True, help="Say what would run and how long, and stop."),
        click.option(
            "--jobs",
            type=click.IntRange(min=1),
            default=1,
            show_default=True,
            help="Runs at a time; each gets a share of the threads.",
        ),
        click.option(
            "--output",
            "-o",
            type=click.Path(path_type=Path, file_okay=False),
            default=Path("runs/study"),
            show_default=True,
            help="Folder of all studies; they share runs.",
        ),
        click.option(
            "--scale",
            type=click.FloatRange(min=0, min_open=True, max=1),
            metavar="X",
            help="Size of the teacher's data beside Criteo Kaggle (0.02).",
        ),
        seeds_option(),
        config_option(),
    ):
        function = decorator(function)
    return function


def _examples(kind: str) -> list[tuple[str, str]]:
    return [
        (f"dqrm study {kind} --dry-run", "what would run, and how long it would take"),
        (f"dqrm study {kind} --config census --seeds 0,1,2", "on the bundled example"),
    ]


@click.command("overfit", cls=DqrmCommand, examples=_examples("overfit"))
@_common
def overfit(**options: Any) -> int:
    """Examine whether FP32 overfits where 4 bits do not.

    The rival is tuned FP32: rate, dropout, weight decay and one epoch are tried, and the best on
    validation stands for it. Beside it: FP32 quantized afterwards, the published DQRM, exact
    scales, rows without a master copy, and 2 bits.
    """
    return _run("overfit", **options)


@click.command("bits", cls=DqrmCommand, examples=_examples("bits"))
@_common
def bits(**options: Any) -> int:
    """Compare 16, 8, 4 and 2 bits with tuned FP32, trained and quantized afterwards."""
    return _run("bits", **options)


@click.command("scale-period", cls=DqrmCommand, examples=_examples("scale-period"))
@_common
def scale_period(**options: Any) -> int:
    """Compare exact scales with scales refreshed every 1, 10, 100, 1000 steps and every epoch.

    The rival is T=1, which scans every table at every step.
    """
    return _run("scale-period", **options)


@click.command("exchange", cls=DqrmCommand, examples=_examples("exchange"))
@click.option(
    "--nproc",
    type=click.IntRange(min=2),
    default=2,
    show_default=True,
    help="Processes that train together.",
)
@_common
def exchange(**options: Any) -> int:
    """Compare codecs of the exchange between processes with the exchange in FP32."""
    return _run("exchange", **options)


@click.command("memory", cls=DqrmCommand, examples=_examples("memory"))
@_common
def memory(**options: Any) -> int:
    """Compare rows kept in FP32, BF16, INT8 and INT4 while they are trained."""
    return _run("memory", **options)


@click.command("multihot", cls=DqrmCommand, examples=_examples("multihot"))
@click.option(
    "--bags",
    default="2,8,32",
    show_default=True,
    metavar="N,N...",
    help="Longest bags of the teacher's data sets, one each.",
)
@_common
def multihot(bags: str, **options: Any) -> int:
    """Compare rows quantized before they are pooled with sums quantized afterwards.

    Data of your own need a column of lists; then there is one case, and --bags is without effect.
    """
    try:
        lengths = [int(part) for part in bags.split(",")]
    except ValueError:
        lengths = []
    if not lengths or min(lengths) < 1 or len(set(lengths)) < len(lengths):
        raise click.UsageError(f"--bags {bags}: give different whole numbers from 1, by commas")
    return _run("multihot", bags=lengths, **options)


for _command in (overfit, bits, scale_period, exchange, memory, multihot):
    _command.help = f"{_command.help}\n\n{_ABOUT_DATA}"


def _run(kind: str, **options: Any) -> int:
    from dqrm.cli.study.run import run_study

    return run_study(kind, **options)
