"""``dqrm bench transformers``: what compression costs transformers."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dqrm.cli.bench.seeds import seeds_option
from dqrm.cli.framework import DqrmCommand
from dqrm.cli.outputs import OutputFile, OutputFolder
from dqrm.text import bytes_text, table

if TYPE_CHECKING:
    from dqrm.pipelines.study.merge import StudySettings
    from dqrm.pipelines.study.run import Measured, Trial
    from dqrm.pipelines.study.table import Row, Spread

_EXAMPLES = [
    ("dqrm bench transformers --data glue", "all tasks and recipes with three seeds"),
    (
        "dqrm bench transformers --data glue --tasks sst2 --recipes zeroquant,prune --seeds 0",
        "what needs no training but the fine-tuning",
    ),
    ("dqrm bench transformers --data glue --dry-run", "what is complete, and its table"),
    (
        "dqrm bench transformers --data glue --json glue.json --plots plots",
        "with everything measured and a picture",
    ),
]
_DOING = {"complete": "complete", "go on": "cut off", "run": "-"}


class _Chosen(click.ParamType[tuple[str, ...], str]):
    """Names by commas; which there are is only known when the command runs."""

    name = "name,name..."

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, ...]:
        """Refuse none at all and the same one twice."""
        names = tuple(part.strip() for part in str(value).split(","))
        if not all(names) or len(set(names)) < len(names):
            self.fail(f"{value!r}: give different names, by commas", param, ctx)
        return names


@click.command("transformers", cls=DqrmCommand, examples=_EXAMPLES)
@click.option(
    "--data",
    type=click.Path(path_type=Path, file_okay=False),
    required=True,
    help="Folder of GLUE's files: sst2_train.tsv.gz, sst2_dev.tsv.gz, ... (.tsv as well).",
)
@click.option(
    "--tasks", type=_Chosen(), default="sst2,cola,mrpc,stsb", show_default=True, help="GLUE tasks."
)
@click.option(
    "--recipes", type=_Chosen(), help="The part behind sst2- of `dqrm pipeline ls`; all by default."
)
@seeds_option()
@click.option("--model", metavar="FOLDER|package:NAME", help="Another encoder than the recipes'.")
@click.option(
    "--max-steps",
    type=click.IntRange(min=1),
    help="Train no longer, schedules as much shorter; to try the command.",
)
@click.option(
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("runs/transformers"),
    show_default=True,
    help="Folder of the pipelines, one for each task and seed.",
)
@click.option("--threads", type=click.IntRange(min=1), help="Threads; the free cores by default.")
@click.option(
    "--json",
    "json_file",
    type=OutputFile(),
    help="Write all that was measured.",
)
@click.option(
    "--plots",
    type=OutputFolder(),
    help="Write quality.png, quality against size, into this folder.",
)
@click.option("--dry-run", is_flag=True, help="Say what is complete, run nothing.")
@click.option("--no-track", is_flag=True, help="Do not record the pipelines in MLflow.")
def transformers(
    data: Path,
    tasks: tuple[str, ...],
    recipes: tuple[str, ...] | None,
    seeds: tuple[int, ...],
    model: str | None,
    max_steps: int | None,
    output: Path,
    threads: int | None,
    json_file: Path | None,
    plots: Path | None,
    dry_run: bool,
    no_track: bool,
) -> int:
    """Compress transformers by every shipped recipe, beside the uncompressed model.

    For each task and seed the recipes are stages of one pipeline: B, the fine-tuned model, is
    trained once, and what was complete before is not run again. Models are selected on rows of the
    training file; GLUE's dev file is measured once, as test (MRPC, here without one, sets training
    rows apart). The figures of an arm are those of its packed model: quality on the test rows as
    mean and standard deviation over seeds, in hundredths, and the difference to B with the same
    seed (of several tasks the difference alone), both with the number of seeds in brackets where B
    has more or fewer; bytes of the encoder on the disk; minutes of its stage; and how many times
    faster a sentence of 64 tokens is than with B on one thread. Every arm is kept in FP32 and
    packed, for each task and seed.
    """
    from dqrm.pipelines.study.merge import StudySettings, recipe_names
    from dqrm.pipelines.study.tasks import TASKS
    from dqrm.runtime import prepare_threads

    prepare_threads(threads)
    chosen = recipes or recipe_names()
    _require_known("--tasks", tasks, tuple(TASKS))
    _require_known("--recipes", chosen, recipe_names())
    settings = StudySettings(
        data=data,
        tasks=tasks,
        recipes=chosen,
        seeds=seeds,
        output=output,
        model=model,
        max_steps=max_steps,
        threads=threads,
        track=not no_track,
    )
    from dqrm.pipelines.study.run import check_trials, measured, run_trials, trials

    planned = trials(settings)
    interrupted = None
    if dry_run:
        click.echo(_overview(planned))
        click.echo()
    else:
        from dqrm.cli.progress import ProgressDisplay

        check_trials(planned)
        with ProgressDisplay() as display:
            interrupted = run_trials(planned, display.show)
    found = [result for trial in planned for result in measured(trial)]
    _tell(settings, [arm.label for arm in planned[0].arms], found, json_file, plots)
    if interrupted is None:
        return 0
    click.echo("interrupted; the same command goes on", err=True)
    return 128 + interrupted


def _require_known(option: str, names: Sequence[str], known: Sequence[str]) -> None:
    for name in names:
        if name not in known:
            raise click.UsageError(f"{option} {name}: must be among {', '.join(known)}")


def _overview(planned: "list[Trial]") -> str:
    """How far everything is: a line an arm, a column a task and seed."""
    from dqrm.pipelines.study.run import states

    columns = [states(trial) for trial in planned]
    header = ("", *(f"{trial.task} {trial.seed}" for trial in planned))
    lines = [(label, *(_DOING[column[label]] for column in columns)) for label in columns[0]]
    return table(header, lines, left=len(header))


def _tell(
    settings: "StudySettings",
    arms: Sequence[str],
    found: "list[Measured]",
    json_file: Path | None,
    plots: Path | None,
) -> None:
    from dqrm.pipelines.study.table import rows

    compared = rows(found, settings.tasks, arms)
    told = comparison_table(compared, settings.tasks) if compared else "nothing is complete yet"
    click.echo(told)
    if json_file is not None:
        from dqrm.data.files import finite_or_null, write_json
        from dqrm.tracking.environment import environment_tags

        record = {
            "environment": environment_tags(),
            "settings": asdict(settings),
            "rows": [asdict(row) for row in compared],
            "measured": [asdict(result) for result in found],
        }
        write_json(json_file, finite_or_null(json.loads(json.dumps(record, default=str))))
    if plots is not None and compared:
        from dqrm.pipelines.study.plots import plot_quality

        plot_quality(compared, settings.tasks, plots / "quality.png")


def comparison_table(compared: "list[Row]", tasks: Sequence[str]) -> str:
    """Return a line for the baseline, which comes first, and for each arm, as it is printed.

    Of several tasks, to fit a terminal, arms show their difference to the baseline alone, and
    sizes and times are a table of their own.
    """
    quality = _quality(compared, tasks)
    costs = [["encoder", "smaller", "minutes", "x FP32", "x bf16"], *map(_costs, compared)]
    names = ["", *(row.arm for row in compared)]
    if len(tasks) == 1:
        both = [[*first, *second] for first, second in zip(quality, costs, strict=True)]
        return _named(names, both)
    return f"{_named(['to B', *names[1:]], quality)}\n\n{_named(names, costs)}"


def _named(names: list[str], cells: list[list[str]]) -> str:
    header, *lines = ([name, *line] for name, line in zip(names, cells, strict=True))
    return table(header, lines)


def _quality(compared: "list[Row]", tasks: Sequence[str]) -> list[list[str]]:
    from dqrm.pipelines.study.tasks import TASKS

    base = compared[0]
    most = {task: spread.seeds for task, spread in base.quality.items()}
    header = [f"{TASKS[task].title} {TASKS[task].metric}" for task in tasks]
    if len(tasks) == 1:
        header.append("to B")
    lines = [header]
    for row in compared:
        values = [_spread_text(row.quality.get(task), "", most.get(task, 0)) for task in tasks]
        apart = [_spread_text(row.to_baseline.get(task), "+", most.get(task, 0)) for task in tasks]
        if len(tasks) == 1:
            lines.append([*values, *apart])
        else:
            lines.append(values if row is base else apart)
    return lines


def _costs(row: "Row") -> list[str]:
    times = row.times_faster
    return [
        *(bytes_text(row.encoder_bytes), f"{row.times_smaller:.1f}", f"{row.minutes:.1f}"),
        *(f"{times[name]:.2f}" if name in times else "-" for name in ("fp32", "bf16")),
    ]


def _spread_text(spread: "Spread | None", sign: str, most: int) -> str:
    """The mean, its deviation, and in brackets how many seeds there are if not ``most``."""
    if spread is None:
        return "-"
    text = f"{spread.mean:{sign}.2f}"
    if spread.deviation is not None:
        text += f" +- {spread.deviation:.2f}"
    return text if spread.seeds == most else f"{text} ({spread.seeds})"
