"""``dqrm sweep``: search for configuration values, each trial a training run."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import click

from dqrm.cli.framework import DqrmCommand
from dqrm.cli.options import config_option, overrides_argument
from dqrm.text import pairs, table

if TYPE_CHECKING:
    from dqrm.sweeps.folder import SweepFolder
    from dqrm.sweeps.report import Report, TrialRow

_ROWS = 10
_DIGITS = 4

_EXAMPLES = [
    (
        "dqrm sweep --config census --trials 20 optim.lr=log:1e-3..1e-1 quant.bits=4,8",
        "a range by its logarithm, and choices; any other key=value is fixed",
    ),
    (
        "dqrm sweep -c census model.dropout=0..0.5 model.top_mlp=[64],[128,64] train.epochs=2",
        "a plain range, and lists",
    ),
    ("dqrm sweep -c census optim.lr=log:1e-3..1e-1 --dry-run", "check and show what would run"),
    ("dqrm sweep --resume sweeps/census-20261121-020000", "go on after a crash or Ctrl-C"),
    ("dqrm sweep --resume sweeps/lr --trials 40", "go on with more trials"),
]


@click.command("sweep", cls=DqrmCommand, examples=_EXAMPLES)
@config_option()
@click.option(
    "--trials",
    type=click.IntRange(min=1),
    metavar="N",
    help="How many runs in all, with those that are pruned or fail (20).",
)
@click.option(
    "--timeout", metavar="TIME", help="Begin no further trial after this time, such as 30m or 8h."
)
@click.option("--name", "-n", metavar="NAME", help="Name of the sweep and of its folder.")
@click.option(
    "--output",
    "-o",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("sweeps"),
    show_default=True,
    help="Folder under which the sweep's own is made.",
)
@click.option("--seed", type=click.IntRange(min=0), metavar="N", help="Of the sampler (0).")
@click.option(
    "--pruner",
    type=click.Choice(["median", "none"]),
    help="What ends bad trials early: the median of others at the same epoch (median).",
)
@click.option(
    "--resume",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="FOLDER",
    help="Go on with a sweep; what it searches stands in its folder.",
)
@click.option("--dry-run", is_flag=True, help="Print what is searched and what a run needs; stop.")
@overrides_argument()
def sweep(
    source: str | None,
    trials: int | None,
    timeout: str | None,
    name: str | None,
    output: Path,
    seed: int | None,
    pruner: str | None,
    resume: Path | None,
    dry_run: bool,
    overrides: tuple[str, ...],
) -> int:
    """Search for configuration values.

    KEY=LOW..HIGH is a range, KEY=log:LOW..HIGH one whose logarithm is searched, KEY=A,B,C are
    choices. Trials are compared on the validation split by what `train.select` names, AUC or log
    loss; the test split is read once, by the winner, at the end.
    """
    from dqrm.launch import find_place
    from dqrm.pipelines.jobs.durations import parse_duration

    if find_place().world_size > 1:
        raise click.UsageError("each trial trains in one process: start the sweep without torchrun")
    seconds = None if timeout is None else parse_duration(timeout).total_seconds()
    if resume is not None:
        given = [
            flag
            for flag, value in (
                ("--config", source),
                ("--name", name),
                ("--seed", seed),
                ("--pruner", pruner),
                ("KEY=VALUE", overrides or None),
            )
            if value is not None
        ]
        if given:
            raise click.UsageError(
                f"{', '.join(given)}: of the sweep that goes on, and stands in {resume}; start a "
                "new one to change it"
            )
    from dqrm.sweeps.folder import SweepFolder, SweepSettings, new_sweep
    from dqrm.sweeps.space import check_space, split_arguments

    if resume is not None:
        folder = SweepFolder(resume)
        settings, base = folder.settings, folder.base
        if trials is not None:
            settings = settings.model_copy(update={"trials": trials})
    else:
        searches, fixed = split_arguments(overrides)
        base, _ = check_space(searches, source, fixed)
        chosen = {"trials": trials, "seed": seed, "pruner": pruner}
        settings = SweepSettings.model_validate(
            {key: value for key, value in chosen.items() if value is not None}
            | {"search": {key: search.text for key, search in searches.items()}}
        )

    # Before torch is imported: it reads thread counts and the waiting policy only once.
    from dqrm.runtime import prepare_threads

    prepare_threads(base.train.threads)
    from dqrm.sweeps.run import check_data, run_sweep
    from dqrm.sweeps.study import import_optuna

    check_data(base)
    import_optuna()
    if dry_run:
        from dqrm.cli.dry_run import describe

        rows = [(key, text) for key, text in settings.search.items()]
        click.echo(f"{settings.trials} trials over\n{table(('key', 'values'), rows, left=2)}\n")
        click.echo(f"a run with the values of the configuration:\n{describe(base)}")
        return 0
    if resume is None:
        recipe = Path(source).stem if source else "sweep"
        folder = new_sweep(output, name, recipe, base, settings)
    elif trials is not None:
        folder = folder.with_trials(trials)
    result = run_sweep(folder, seconds)
    click.echo(_summary(result.report, folder))
    again = f"dqrm sweep --resume {shlex.quote(str(folder.path))}"
    if result.interrupted is not None:
        click.echo(f"interrupted; go on with: {again}", err=True)
        return 128 + result.interrupted
    left = settings.trials - len(result.report.rows)
    if left > 0:
        click.echo(f"{left} of {settings.trials} trials are left; go on with: {again}", err=True)
    return 0


def _summary(report: "Report", folder: "SweepFolder") -> str:
    counts = [
        f"{report.count(outcome)} {outcome}"
        for outcome in ("finished", "pruned", "failed", "cut off")
        if report.count(outcome)
    ]
    lines = []
    if report.best is not None:
        keys = list(folder.space.searches)
        header = ("trial", *keys, report.metric, "best step")
        lines += [table(header, [_cells(row, keys) for row in report.ranked()[:_ROWS]]), ""]
    rows = [("sweep", report.folder), ("trials", ", ".join(counts) or "none")]
    if report.importance:
        shares = [f"{key} {100 * share:.0f} %" for key, share in report.importance.items()]
        rows.append(("importance", ", ".join(shares)))
    if report.best is not None:
        best = report.best
        rows.append(("best", f"trial {best.number}: {report.metric} {best.value:.4f}"))
        if report.test is not None:
            test = report.test
            rows.append(("its test", f"AUC {test['auc']:.4f}, log loss {test['log_loss']:.4f}"))
        config = shlex.quote(str(folder.path / "best.yaml"))
        rows.append(("train it again", f"dqrm train --config {config}"))
    if report.run_id is not None:
        rows.append(("MLflow run", f"{report.run_id} in {report.tracking_uri}"))
    return "\n".join([*lines, pairs(rows)])


def _cells(row: "TrialRow", keys: list[str]) -> tuple[str, ...]:
    from dqrm.yaml_text import dump_value

    values = [row.params[key] for key in keys]
    shown = [
        f"{value:.{_DIGITS}g}"
        if isinstance(value, float)
        else value
        if isinstance(value, str)
        else dump_value(value)
        for value in values
    ]
    return (str(row.number), *shown, f"{row.value:.4f}", str(row.best_step))
