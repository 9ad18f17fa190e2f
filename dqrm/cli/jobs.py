"""``dqrm jobs``: pipelines and commands on a schedule."""

from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dqrm.cli.errors import ExitCode
from dqrm.cli.framework import DqrmCommand, LazyGroup
from dqrm.text import seconds_text, table

if TYPE_CHECKING:
    from dqrm.pipelines.jobs.config import Job, JobsFile
    from dqrm.pipelines.jobs.export import Target
    from dqrm.pipelines.jobs.state import Event, JobFolder


@click.group(
    "jobs",
    cls=LazyGroup,
    lazy={
        "validate": ("dqrm.cli.jobs:validate", "Look for faults without running anything."),
        "list": ("dqrm.cli.jobs:list_", "List the jobs with their last and next runs."),
        "run": ("dqrm.cli.jobs:run", "Run a job once, now."),
        "serve": ("dqrm.cli.jobs:serve", "Start jobs when their time comes."),
        "pause": ("dqrm.cli.jobs:pause", "Keep the schedule from starting a job."),
        "resume": ("dqrm.cli.jobs:resume", "Let the schedule start a paused job again."),
        "history": ("dqrm.cli.jobs:history", "List the runs of a job."),
        "logs": ("dqrm.cli.jobs:logs", "Print what a run of a job wrote."),
        "export": (
            "dqrm.cli.jobs:export",
            "Write files for cron, systemd or Kubernetes to start the jobs.",
        ),
    },
    help="Run pipelines and commands on a schedule.",
)
def jobs() -> None:
    """Hold the commands."""


def _file_option() -> Callable[[Any], Any]:
    return click.option(
        "--file",
        "-f",
        type=click.Path(path_type=Path),
        default=Path("jobs.yaml"),
        show_default=True,
        help="File of jobs.",
    )


@click.command(
    "validate",
    cls=DqrmCommand,
    examples=[("dqrm jobs validate", "keys, values, pipelines and their overrides")],
)
@_file_option()
def validate(file: Path) -> None:
    """Look for faults without running anything."""
    from dqrm.pipelines.jobs.check import check_jobs

    loaded = _loaded(file)
    check_jobs(loaded, file)
    click.echo(f"{file}: no faults in {', '.join(loaded.jobs)}")


@click.command(
    "list", cls=DqrmCommand, examples=[("dqrm jobs list", "what runs when, and how it went")]
)
@_file_option()
def list_(file: Path) -> None:
    """List the jobs with their last and next runs."""
    from dqrm.pipelines.jobs.clock import Clock

    loaded = _loaded(file)
    now = Clock.from_environment().now()
    rows = []
    for name, job in loaded.jobs.items():
        folder = _folder(loaded, name)
        state = folder.read()
        following = next(job.schedule.after(now), None)
        when = _local(following, job) if following and not state.paused else "paused"
        last = next((event for event in reversed(state.events) if event.run), None)
        if state.running is not None:
            outcome = "running" if folder.held() else "cut off"
        else:
            outcome = last.outcome if last else "never ran"
        rows.append((name, job.schedule.text, when, outcome))
    click.echo(table(("job", "schedule", "next", "last"), rows, left=4))


@click.command(
    "run",
    cls=DqrmCommand,
    examples=[
        ("dqrm jobs run nightly", "as if its time were now"),
        ("dqrm jobs run nightly --date 2026-11-20", "with the parameters of that day"),
    ],
)
@click.argument("name")
@_file_option()
@click.option(
    "--date",
    metavar="DATE|TIME",
    help="Day, or time of the schedule, to run for, as 2026-11-20 or 2026-11-20T02:30+01:00; now "
    "without it.",
)
def run(name: str, file: Path, date: str | None) -> int:
    """Run a job once, now.

    Cron, systemd and every other scheduler can call this. A second run does not start while one
    goes on: it waits or is left out, as the job's `overlap` says.
    """
    from dqrm.pipelines.jobs.clock import Clock
    from dqrm.pipelines.jobs.config import find_job
    from dqrm.pipelines.jobs.runner import run_job
    from dqrm.pipelines.jobs.state import JobBusy

    loaded = _loaded(file)
    job = find_job(loaded, name)
    clock = Clock.from_environment()
    moment = clock.now() if date is None else _moment(date, job)
    try:
        result = run_job(loaded, file.absolute().parent, name, moment, clock)
    except JobBusy as busy:
        click.echo(f"{busy}; this one is left out", err=True)
        return ExitCode.DONE
    event = result.event
    click.echo(
        f"{name}: {event.outcome} after {seconds_text(event.seconds)}, "
        f"{event.tries} {'try' if event.tries == 1 else 'tries'}"
        + (f", MLflow run {event.run_id}" if event.run_id else "")
    )
    if event.outcome != "succeeded":
        click.echo(f"what it wrote: dqrm jobs logs {name} --file {file}", err=True)
    if event.outcome == "interrupted" and result.interrupted is not None:
        return 128 + result.interrupted
    codes = {"succeeded": ExitCode.DONE, "gate not met": ExitCode.GATE_NOT_MET}
    return codes.get(event.outcome, ExitCode.FAILED)


@click.command(
    "serve",
    cls=DqrmCommand,
    examples=[("dqrm jobs serve", "start the jobs of jobs.yaml at their times, until Ctrl-C")],
)
@_file_option()
def serve(file: Path) -> int:
    """Start jobs when their time comes.

    The file is read again when it changes. The server can be killed and started again at any
    moment: no run is lost and none is done twice; runs whose time passed meanwhile are treated as
    the job's `missed` says.
    """
    from dqrm.pipelines.jobs.clock import Clock
    from dqrm.pipelines.jobs.server import serve as serve_file

    return 128 + serve_file(file, Clock.from_environment())


@click.command(
    "pause",
    cls=DqrmCommand,
    examples=[("dqrm jobs pause nightly", "runs by hand remain possible")],
)
@click.argument("name")
@_file_option()
def pause(name: str, file: Path) -> None:
    """Keep the schedule from starting a job."""
    with _known(file, name).changing() as state:
        state.paused = True
    click.echo(f"{name}: paused")


@click.command(
    "resume",
    cls=DqrmCommand,
    examples=[("dqrm jobs resume nightly", "times that passed meanwhile are not caught up on")],
)
@click.argument("name")
@_file_option()
def resume(name: str, file: Path) -> None:
    """Let the schedule start a paused job again."""
    from dqrm.pipelines.jobs.clock import Clock
    from dqrm.pipelines.jobs.state import iso

    with _known(file, name).changing() as state:
        if state.paused:
            state.paused, state.seen = False, iso(Clock.from_environment().now())
    click.echo(f"{name}: goes on")


@click.command(
    "history",
    cls=DqrmCommand,
    examples=[
        ("dqrm jobs history nightly", "the last 20"),
        ("dqrm jobs history nightly -n 5", "fewer"),
    ],
)
@click.argument("name")
@_file_option()
@click.option(
    "--number", "-n", type=click.IntRange(1), default=20, show_default=True, help="How many."
)
def history(name: str, file: Path, number: int) -> None:
    """List the runs of a job.

    Times of the schedule that were skipped or missed stand among them.
    """
    loaded = _loaded(file)
    from dqrm.pipelines.jobs.config import find_job

    job = find_job(loaded, name)
    events = _folder(loaded, name).read().events[-number:]
    if not events:
        click.echo(f"{name}: never ran")
        return
    rows = [
        (
            _local(datetime.fromisoformat(event.scheduled), job),
            event.outcome,
            event.run_id or "",
            _because(event),
            seconds_text(event.seconds) if event.run else "",
            str(event.tries) if event.run else "",
        )
        for event in events
    ]
    header = ("scheduled", "outcome", "MLflow run", "because", "took", "tries")
    click.echo(table(header, rows, left=4))


@click.command(
    "logs",
    cls=DqrmCommand,
    examples=[
        ("dqrm jobs logs nightly", "of the last run, or the one that goes on"),
        ("dqrm jobs logs nightly --date 2026-11-20", "of the last run for that day"),
    ],
)
@click.argument("name")
@_file_option()
@click.option("--date", metavar="DATE", help="Day of the schedule; the last run without it.")
def logs(name: str, file: Path, date: str | None) -> None:
    """Print what a run of a job wrote."""
    from dqrm.pipelines.jobs.config import find_job

    loaded = _loaded(file)
    job = find_job(loaded, name)
    folder = _folder(loaded, name)
    state = folder.read()
    runs = [(event.scheduled, event.run) for event in state.events if event.run]
    if state.running is not None:
        runs.append((state.running.scheduled, state.running.run))
    if date is not None:
        day = _moment(date, job).astimezone(job.schedule.zone).date()
        zone = job.schedule.zone
        runs = [
            (scheduled, run)
            for scheduled, run in runs
            if datetime.fromisoformat(scheduled).astimezone(zone).date() == day
        ]
    if not runs:
        raise click.UsageError(f"{name}: no run{f' for {date}' if date else ''}")
    path = folder.log(runs[-1][1])
    if not path.is_file():
        raise click.UsageError(
            f"{path}: the run wrote nothing, or `logs` of the job kept it no more"
        )
    with path.open("rb") as stream:
        for line in stream:
            click.echo(line, nl=False)


@click.command(
    "export",
    cls=DqrmCommand,
    examples=[
        ("dqrm jobs export --to cron", "lines for `crontab -e`"),
        ("dqrm jobs export --to systemd -o ~/.config/systemd/user", "a timer and a service a job"),
        ("dqrm jobs export --to k8s --image registry/dqrm:1 --claim clicks", "a CronJob a job"),
        ("dqrm jobs export big --to k8s --image I --claim C --date 2026-11-20", "a TrainJob"),
    ],
)
@click.argument("names", nargs=-1, metavar="[NAME]...")
@_file_option()
@click.option(
    "--to", type=click.Choice(["cron", "systemd", "k8s"]), required=True, help="Who starts them."
)
@click.option("--image", help="Container image with dqrm in it (k8s).")
@click.option("--claim", help="Volume claim that holds the folder of the file of jobs (k8s).")
@click.option(
    "--date",
    metavar="DATE",
    help="Day of the dates in a TrainJob, which is one run (k8s); today without it.",
)
@click.option(
    "--output",
    "-o",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder for the files; printed without it.",
)
def export(
    names: tuple[str, ...],
    file: Path,
    to: "Target",
    image: str | None,
    claim: str | None,
    date: str | None,
    output: Path | None,
) -> None:
    """Write files for cron, systemd or Kubernetes to start the jobs.

    They call `dqrm jobs run`, which keeps the lock, the retries, the gate and the record. For a
    job with `nodes`, Kubernetes gets a TrainJob of Kubeflow instead, which is one run of it.
    """
    from dqrm.pipelines.jobs.config import find_job
    from dqrm.pipelines.jobs.export import export as exported
    from dqrm.pipelines.jobs.place import Place

    loaded = _loaded(file)
    chosen = {name: find_job(loaded, name) for name in names or loaded.jobs}
    place = Place(file.absolute(), image, claim)
    if date is not None:
        place = replace(place, day=_time(date).date())
    files = exported(chosen, to, place)
    if output is None:
        separator = "---\n" if to == "k8s" else "\n"
        named = to == "systemd"
        texts = [f"# {name}\n{text}" if named else text for name, text in files.items()]
        click.echo(separator.join(texts), nl=False)
        return
    output.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (output / name).write_text(text, encoding="utf-8")
        click.echo(output / name)


def _loaded(file: Path) -> "JobsFile":
    from dqrm.pipelines.jobs.config import load_jobs

    return load_jobs(file)


def _folder(loaded: "JobsFile", name: str) -> "JobFolder":
    from dqrm.pipelines.jobs.state import JobFolder

    return JobFolder(loaded.folder / name)


def _known(file: Path, name: str) -> "JobFolder":
    from dqrm.pipelines.jobs.config import find_job

    loaded = _loaded(file)
    find_job(loaded, name)
    return _folder(loaded, name)


def _moment(text: str, job: "Job") -> datetime:
    moment = _time(text)
    return moment if moment.tzinfo else moment.replace(tzinfo=job.schedule.zone)


def _time(text: str) -> datetime:
    try:
        return datetime.fromisoformat(text)
    except ValueError:
        raise click.UsageError(
            f"'{text}' is no date; write such as 2026-11-20 or 2026-11-20T02:30+01:00"
        ) from None


def _because(event: "Event") -> str:
    parts = [f"try {number}: {how}" for number, how in enumerate(event.attempts, 1)]
    if len(parts) < 2:
        parts = []
    if event.detail and not (parts and event.attempts[-1].startswith(event.detail)):
        parts.append(event.detail)
    if event.hook_fault:
        parts.append(f"nobody was told, the hook failed: {event.hook_fault}")
    return "; ".join(parts)


def _local(moment: datetime, job: "Job") -> str:
    return moment.astimezone(job.schedule.zone).strftime("%Y-%m-%d %H:%M %Z")
