"""``dqrm pipeline``: run a file of stages, or look at what a run would do."""

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from dqrm.cli.errors import ExitCode
from dqrm.cli.framework import DqrmCommand, LazyGroup
from dqrm.cli.options import OverrideType
from dqrm.cli.workers import nproc_option, workers_to_start
from dqrm.text import pairs, seconds_text, table

if TYPE_CHECKING:
    from dqrm.pipelines.config import PipelineConfig
    from dqrm.pipelines.runner import PipelineResult
    from dqrm.pipelines.stage import Stage

PIPELINE_MODEL = "dqrm.pipelines.config:PipelineConfig"


@click.group(
    "pipeline",
    cls=LazyGroup,
    lazy={
        "run": ("dqrm.cli.pipeline:run", "Run the stages of a file that are not complete."),
        "validate": ("dqrm.cli.pipeline:validate", "Look for faults without running anything."),
        "ls": ("dqrm.cli.pipeline:ls", "List the shipped pipelines."),
        "cp": ("dqrm.cli.pipeline:cp", "Copy one to edit it."),
        "import": (
            "dqrm.cli.pipeline_import:import_",
            "Turn DeepSpeed's compression settings into a pipeline.",
        ),
    },
    help="Run files of stages: train, fine-tune, report.",
)
def pipeline() -> None:
    """Hold the commands."""


@click.command(
    "run",
    cls=DqrmCommand,
    examples=[
        ("dqrm pipeline run census", "a shipped one: 32, 8 and 4 bits side by side"),
        ("dqrm pipeline run sst2.yaml", "every stage, or what a killed run left to do"),
        ("dqrm pipeline run sst2.yaml stages.finetune.lr=3e-5", "again from the changed stage on"),
        ("dqrm pipeline run sst2.yaml --from report", "a stage again though it is complete"),
        ("dqrm pipeline run sst2.yaml --dry-run", "what would run, on what, and how large"),
        ("dqrm pipeline run sst2.yaml --nproc 2", "stages that train in two processes"),
    ],
)
@click.argument("source", metavar="FILE|NAME")
@click.argument("overrides", nargs=-1, type=OverrideType(PIPELINE_MODEL), metavar="[KEY=VALUE]...")
@click.option(
    "--from",
    "start",
    metavar="STAGE",
    help="Run this stage and those after it again. Leave it out to go on after a stop.",
)
@click.option("--dry-run", is_flag=True, help="Print what would run, and stop.")
@click.option("--no-track", is_flag=True, help="Do not record the pipeline in MLflow.")
@nproc_option()
def run(
    source: str,
    overrides: tuple[str, ...],
    start: str | None,
    dry_run: bool,
    no_track: bool,
    nproc: int | None,
) -> int:
    """Run the stages of a file that are not complete.

    A stage is complete when it ran with the same settings, data and inputs. SIGINT and SIGTERM
    save what the running stage can save; the same command goes on. Exit code 3: a promotion was
    refused.
    """
    more = ["tracking.enabled=false"] if no_track else []
    from dqrm.launch import find_place, start_workers

    place = find_place()
    workers = workers_to_start(nproc)
    if workers is not None and not dry_run:
        # What is wrong with the file is told once, by this process.
        _loaded(source, (*overrides, *more))
        return start_workers(workers, sys.argv[1:])
    config = _checked(source, (*overrides, *more), look=place.rank == 0)
    if dry_run:
        click.echo(_plan(config, start))
        return 0

    from dqrm.cli.progress import ProgressDisplay
    from dqrm.pipelines.runner import run_pipeline
    from dqrm.pipelines.stage import GateNotMet

    try:
        with ProgressDisplay() as display:
            result = run_pipeline(config, start=start, progress=display.show)
    except GateNotMet as unmet:
        click.echo(f"gate not met: {unmet}", err=True)
        return ExitCode.GATE_NOT_MET
    if place.rank == 0:
        click.echo(_summary(result))
    if result.interrupted is None:
        return 0
    if place.rank == 0:
        again = ["dqrm", "pipeline", "run", source, *overrides]
        again += ["--no-track"] if no_track else []
        again += [] if nproc is None else ["--nproc", str(nproc)]
        click.echo(f"interrupted; go on with: {shlex.join(again)}", err=True)
    return 128 + result.interrupted


@click.command(
    "validate",
    cls=DqrmCommand,
    examples=[("dqrm pipeline validate sst2.yaml", "keys, values, data and models")],
)
@click.argument("source", metavar="FILE|NAME")
@click.argument("overrides", nargs=-1, type=OverrideType(PIPELINE_MODEL), metavar="[KEY=VALUE]...")
def validate(source: str, overrides: tuple[str, ...]) -> None:
    """Look for faults without running anything."""
    config = _checked(source, overrides)
    names = ", ".join(stage.key for stage in config.stages)
    click.echo(f"{source}: {len(config.stages)} stages ({names}) into {config.folder}")


@click.command(
    "ls", cls=DqrmCommand, examples=[("dqrm pipeline ls", "names and what they are for")]
)
def ls() -> None:
    """List the shipped pipelines."""
    from dqrm.pipelines.config import shipped_recipes

    click.echo(pairs(list(shipped_recipes().items())))


@click.command(
    "cp",
    cls=DqrmCommand,
    examples=[
        ("dqrm pipeline cp sst2-moq", "writes sst2-moq.yaml in this folder"),
        ("dqrm pipeline cp sst2-moq mine.yaml", "under another name"),
    ],
)
@click.argument("name")
@click.argument("destination", type=click.Path(path_type=Path), required=False)
@click.option("--force", "-f", is_flag=True, help="Overwrite an existing file.")
def cp(name: str, destination: Path | None, force: bool) -> None:
    """Copy one to edit it.

    DESTINATION is a file or a folder; NAME.yaml in this folder when not given.
    """
    from dqrm.cli.configs import copy_shipped
    from dqrm.pipelines.config import find_pipeline

    text = find_pipeline(name).read_text(encoding="utf-8")
    copy_shipped(text, f"{Path(name).stem}.yaml", destination, force=force)


def _loaded(source: str, overrides: tuple[str, ...]) -> "tuple[PipelineConfig, Path]":
    from dqrm.pipelines.config import find_pipeline, load_pipeline

    file = find_pipeline(source)
    return load_pipeline(file, overrides), file


def _checked(source: str, overrides: tuple[str, ...], *, look: bool = True) -> "PipelineConfig":
    """Read the file and look for faults, with the threads set before torch is imported."""
    from dqrm.runtime import prepare_threads

    config, file = _loaded(source, overrides)
    prepare_threads(config.threads)
    if look:
        from dqrm.pipelines.check import check_pipeline

        check_pipeline(config, file)
    return config


def _plan(config: "PipelineConfig", start: str | None) -> str:
    from dqrm.pipelines.runner import plan_pipeline

    planned = plan_pipeline(config, start)
    parts = [
        table(
            ("stage", "kind", "takes", "would", "because"),
            [
                (step.key, step.stage.stage, ", ".join(step.inputs), step.action, step.reason)
                for step in planned
            ],
            left=5,
        )
    ]
    earlier: dict[str, Stage] = {}
    for step in planned:
        rows = step.stage.plan(dict(earlier))
        earlier[step.key] = step.stage
        if rows:
            parts.append(f"{step.key}\n{pairs([(f'  {name}', value) for name, value in rows])}")
    return "\n\n".join([*parts, f"folder  {config.folder}"])


def _summary(result: "PipelineResult") -> str:
    rows = [
        (
            done.key,
            seconds_text(done.record.seconds) if done.ran else "complete before",
            str(done.folder),
        )
        for done in result.stages
    ]
    parts = [table(("stage", "time", "output"), rows, left=3)] if rows else []
    for done in result.stages:
        report = done.folder / "report.txt"
        if report.is_file():
            parts.append(report.read_text(encoding="utf-8").rstrip())
    return "\n\n".join(parts)
