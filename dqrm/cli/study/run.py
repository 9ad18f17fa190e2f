"""What every command of ``dqrm study`` does with its options."""

from collections.abc import Sequence
from pathlib import Path

import click

from dqrm.cli.progress import ProgressDisplay
from dqrm.config import RunConfig
from dqrm.configuration import load
from dqrm.data.files import write_json
from dqrm.runtime import choose_threads, prepare_threads
from dqrm.study.arms import Arm
from dqrm.study.document import Block, Heading, Paragraph, Table
from dqrm.study.kinds import KINDS
from dqrm.study.plan import Plan, make_plan
from dqrm.study.teacher import teacher_data
from dqrm.text import pairs, seconds_text, table

_TEACHER_RECIPE = "synth"
_TEACHER_SCALE = 0.02


def run_study(
    kind: str,
    *,
    source: str | None,
    seeds: tuple[int, ...],
    scale: float | None,
    output: Path,
    jobs: int,
    dry_run: bool,
    json_file: Path | None,
    experiment: str | None,
    tracking_uri: str | None,
    no_track: bool,
    overrides: tuple[str, ...],
    nproc: int = 2,
    bags: Sequence[int] = (),
) -> int:
    """Run or plan a study and print its report; the result is the exit code."""
    own_data = source is not None or any(text.startswith("data.path=") for text in overrides)
    if own_data and scale is not None:
        raise click.UsageError("--scale is for the teacher's data; leave out --config or data.path")
    given = [
        *overrides,
        *([f"tracking.experiment={experiment}"] if experiment else []),
        *([f"tracking.uri={tracking_uri}"] if tracking_uri else []),
        *(["tracking.enabled=false"] if no_track else []),
    ]
    threads = choose_threads(load(RunConfig, source or _TEACHER_RECIPE, given).train.threads).count
    share = max(1, threads // jobs)
    prepare_threads(threads)
    output = output.absolute()
    with ProgressDisplay() as display:
        if own_data:
            config = load(RunConfig, source or _TEACHER_RECIPE, given)
            name = Path(source).stem if source else Path(config.data.path).name
            bases = [("", config)]
        else:
            size = _TEACHER_SCALE if scale is None else scale
            name = f"teacher-{size:g}"
            bases = []
            lengths: Sequence[int | None] = bags or [None]
            for length in lengths:
                folder = teacher_data(output, size, display.show, length)
                config = load(RunConfig, _TEACHER_RECIPE, [*given, f"data.path={folder}"])
                bases.append(("" if length is None else f"bags to {length}", config))
        plan = make_plan(kind, KINDS[kind], bases, seeds, output, name, nproc)
        _require_lists(kind, plan)
        if dry_run:
            click.echo(_describe(plan, jobs, share))
            return 0
        return _conduct(plan, jobs, share, display, json_file)


def _conduct(
    plan: Plan, jobs: int, threads: int, display: ProgressDisplay, json_file: Path | None
) -> int:
    from dqrm.study.report import make_report, record_in, write_report
    from dqrm.study.study import Conductor, Study
    from dqrm.tracking.base import Tracker

    def conclude(study: Study, tracker: Tracker) -> None:
        report = make_report(study)
        write_report(report, plan.folder)
        record_in(tracker, report, plan.folder)
        if json_file is not None:
            write_json(json_file, report.record)
        click.echo(_terminal(report.blocks))

    tracking = plan.cases[0].base.tracking
    study = Conductor(plan, jobs, threads, tracking, display.show).run(conclude)
    click.echo(f"report  {plan.folder / 'report.html'}")
    if study.interrupted is not None:
        click.echo("interrupted; the same command goes on", err=True)
        return 128 + study.interrupted
    return 1 if study.failed else 0


def _require_lists(kind: str, plan: Plan) -> None:
    for case in plan.cases:
        if kind == "multihot" and not any(info.multi_hot for info in case.dataset.tables):
            raise click.UsageError(
                f"{case.dataset.path} has no column of lists (multi_hot) to pool; leave out "
                "data.path for the teacher's data"
            )


def _terminal(blocks: Sequence[Block]) -> str:
    parts = []
    for block in blocks:
        match block:
            case Heading(text):
                parts.append(f"{text}\n{'-' * len(text)}")
            case Paragraph(text):
                parts.append(click.wrap_text(text, width=100))
            case Table(header, rows):
                parts.append(table(header, rows))
    return "\n\n".join(parts) + "\n"


def _describe(plan: Plan, jobs: int, threads: int) -> str:
    """What would run: a line an arm, then how long it would take."""
    from dqrm.training.estimate import time_steps

    lines: list[tuple[str, ...]] = []
    total = 0.0
    unknown = 0
    for case in plan.cases:
        for arm in case.question.arms:
            trials = case.trials[arm.key]
            missing = [trial for trial in trials if trial.state != "complete"]
            seconds = 0.0
            if arm.after is None and missing:
                config = missing[0].config
                batches = case.dataset.split("train").num_batches(config.data.batch_size)
                steps = min(config.train.epochs * batches, config.train.max_steps or 10**18)
                timing = time_steps(config, case.dataset, steps)
                unknown += timing is None
                seconds = 0.0 if timing is None else timing.step_seconds * steps * len(missing)
            total += seconds
            lines.append(
                (
                    " ".join(part for part in (case.label, arm.title) if part),
                    str(len(missing)),
                    str(len(trials) - len(missing)),
                    _how(arm),
                    seconds_text(seconds) if seconds else "-",
                )
            )
    header = ("arm", "to run", "complete", "how", "training")
    about = seconds_text(total / jobs)
    rows = [
        ("data", ", ".join(str(case.dataset.path) for case in plan.cases)),
        ("seeds", ", ".join(map(str, plan.seeds))),
        ("runs", str(plan.output / "runs")),
        ("report", str(plan.folder)),
        ("at a time", f"{jobs}, {threads} threads each"),
        ("time", f"about {about}, starting, validating and recording not counted"),
    ]
    if unknown:
        rows.append(("", f"{unknown} arms are too short to be timed"))
    return f"{table(header, lines, left=1)}\n\n{pairs(rows)}"


def _how(arm: Arm) -> str:
    if arm.after is not None:
        return "quantized afterwards"
    if arm.processes > 1:
        return f"{arm.processes} processes"
    return "candidate" if arm.candidate else "trained"
