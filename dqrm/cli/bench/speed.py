"""What ``dqrm bench kernels`` and ``dqrm bench train`` share."""

from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict, TypeVar, cast

import click

from dqrm.cli.outputs import OutputFile, PictureFile
from dqrm.cli.progress import ProgressDisplay
from dqrm.text import table

if TYPE_CHECKING:
    from dqrm.bench.speed.groups import Group
    from dqrm.bench.speed.study import Case, Plan
    from dqrm.bench.speed.traffic import IndexKind

Function = TypeVar("Function", bound=Callable[..., Any])

KINDS = ("uniform", "zipf")


class Settings(TypedDict):
    """The options of both commands, by the names of their parameters."""

    batch: tuple[int, ...]
    dim: tuple[int, ...]
    indices: tuple[str, ...]
    threads: tuple[int, ...]
    repeats: int
    scale: float
    max_rows: int | None
    seed: int
    json_file: Path | None
    plot_file: Path | None
    track: bool
    tracking_uri: str | None


class Numbers(click.ParamType[tuple[int, ...], str]):
    """Whole numbers above 0, by commas."""

    name = "n,n..."

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        """Refuse anything else."""
        try:
            numbers = tuple(int(part) for part in str(value).split(","))
        except ValueError:
            numbers = ()
        if not numbers or min(numbers) < 1:
            self.fail(f"{value!r}: give whole numbers above 0, for example 128,2048", param, ctx)
        return numbers


class Names(click.ParamType[tuple[str, ...], str]):
    """Names out of a few, by commas."""

    name = "name,name..."

    def __init__(self, known: tuple[str, ...]) -> None:
        self.known = known

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, ...]:
        """Refuse unknown names."""
        names = tuple(part.strip() for part in str(value).split(","))
        for name in names:
            if name not in self.known:
                self.fail(f"{name!r}: must be among {', '.join(self.known)}", param, ctx)
        return names


def speed_options(*, batch: str, dim: str, repeats: int) -> Callable[[Function], Function]:
    """Return a decorator that adds the options both commands take."""
    options = [
        click.option(
            "--batch", type=Numbers(), default=batch, show_default=True, help="Batch sizes."
        ),
        click.option(
            "--dim", type=Numbers(), default=dim, show_default=True, help="Widths of the tables."
        ),
        click.option(
            "--indices",
            type=Names(KINDS),
            default="uniform,zipf",
            show_default=True,
            help="How ids are spread: uniform, zipf or both.",
        ),
        click.option(
            "--threads", type=Numbers(), default="1,2", show_default=True, help="Thread counts."
        ),
        click.option(
            "--repeats",
            type=click.IntRange(min=1),
            default=repeats,
            show_default=True,
            help="Turns of each contestant.",
        ),
        click.option(
            "--scale",
            type=click.FloatRange(min=0, max=1, min_open=True),
            default=1.0,
            show_default=True,
            help="Share of the Criteo Kaggle tables' 33.8 million rows.",
        ),
        click.option(
            "--max-rows",
            type=click.IntRange(min=1),
            help="Largest table; by default no limit at d=16 and a million rows above.",
        ),
        click.option("--seed", type=int, default=0, show_default=True, help="Of ids and turns."),
        click.option("--json", "json_file", type=OutputFile(), help="Write all that was measured."),
        click.option("--plot", "plot_file", type=PictureFile(), help="Draw work per CPU-second."),
        click.option("--track", is_flag=True, help="Record the study in MLflow."),
        click.option("--tracking-uri", metavar="URI", help="MLflow store or server."),
    ]

    def decorate(function: Function) -> Function:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


def prepare_process(threads: tuple[int, ...]) -> None:
    """Start again with huge pages forced, then set threads up; before torch is imported."""
    from dqrm.bench.speed.pages import start_again_with_huge_pages

    start_again_with_huge_pages()

    from dqrm.runtime import prepare_threads

    prepare_threads(max(threads))


def run(
    command: str, groups: "Sequence[Group]", settings: Settings, only: tuple[str, ...] = ()
) -> None:
    """Measure the groups, and print, write and record what came out."""
    from dqrm.bench.speed.report import BAR_HEADER, as_record, bar_lines, case_rows, phase_rows
    from dqrm.bench.speed.study import environment, run_study
    from dqrm.data.files import write_json

    plan = _plan(settings)
    record = {"command": command, **environment(plan), "cases": []}
    cases: list[Case] = []
    with ProgressDisplay() as display:
        study = run_study(
            groups,
            plan,
            progress=lambda key, done, total: display.show(key, done, total, "turns"),
            only=only,
        )
        for case in study:
            cases.append(case)
            click.echo(f"{case.label}\n{table(*case_rows(case))}")
            if (phases := phase_rows(case))[1]:
                click.echo(table(*phases))
            for name, reason in case.skipped.items():
                click.echo(f"{name}: left out: {reason}")
            click.echo()
            if settings["json_file"] is not None:
                # After every case: hours of measuring should survive a kill.
                record["cases"] = as_record(cases)
                write_json(settings["json_file"], record)
    bars = bar_lines(cases)
    if bars:
        click.echo(table(BAR_HEADER, bars, left=3))
    if settings["plot_file"] is not None:
        from dqrm.bench.speed.plots import plot_cases

        plot_cases(cases, settings["plot_file"])
    if settings["track"]:
        _record(command, cases, settings)


def _plan(settings: Settings) -> "Plan":
    from dqrm.bench.speed.study import Plan

    return Plan(
        batches=settings["batch"],
        dims=settings["dim"],
        kinds=cast("tuple[IndexKind, ...]", settings["indices"]),
        threads=settings["threads"],
        rounds=settings["repeats"],
        scale=settings["scale"],
        max_rows=settings["max_rows"],
        seed=settings["seed"],
    )


def _record(command: str, cases: "Sequence[Case]", settings: Settings) -> None:
    """Record the study as a run; after measuring, because MLflow's thread takes CPU time too."""
    from dqrm.bench.speed.report import as_metrics
    from dqrm.tracking.config import TrackingConfig
    from dqrm.tracking.tracker import start_tracker

    name = f"{command.replace(' ', '-')}-{datetime.now():%Y%m%d-%H%M%S}"
    config = TrackingConfig(uri=settings["tracking_uri"], system_metrics=False)
    tracker = start_tracker(config, run_name=name, run_dir=Path("runs") / name)
    files = [settings["json_file"], settings["plot_file"]]
    status: Literal["FINISHED", "FAILED"] = "FAILED"
    try:
        hidden = ("json_file", "plot_file", "track", "tracking_uri")
        tracker.log_params({key: value for key, value in settings.items() if key not in hidden})
        tracker.log_metrics(as_metrics(cases), step=0)
        for file in files:
            if file is not None:
                tracker.log_artifact(file)
        status = "FINISHED"
    finally:
        tracker.finish(status)
    click.echo(f"recorded as {name} in {tracker.uri}")
