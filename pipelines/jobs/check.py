"""Faults of a file of jobs that show before anything runs."""

from datetime import UTC, date, datetime
from pathlib import Path

from dqrm.configuration import ConfigError
from dqrm.pipelines.config import find_pipeline, load_pipeline
from dqrm.pipelines.jobs.config import Job, JobsFile
from dqrm.pipelines.jobs.recording import tracking_beside
from dqrm.yaml_text import parse_document


def check_jobs(jobs: JobsFile, file: Path) -> None:
    """Look into the pipelines that the jobs name, with the overrides of today.

    Raises:
        ConfigError: naming file, line, job and field of every fault found.
    """
    lines = parse_document(file.read_text(encoding="utf-8-sig"), str(file)).lines
    base = file.absolute().parent
    faults = []
    for name, job in jobs.jobs.items():
        for field, message in _problems(job, base, datetime.now(UTC).date()):
            line = lines.get(("jobs", name, field), lines["jobs", name])
            faults.append(f"{file}:{line}: jobs.{name}.{field}: {message}")
    if len(faults) == 1:
        raise ConfigError(faults[0])
    if faults:
        listed = "".join(f"\n  {fault}" for fault in faults)
        raise ConfigError(f"{len(faults)} faults in the jobs:{listed}")


def _problems(job: Job, base: Path, day: date) -> list[tuple[str, str]]:
    problems = []
    try:
        tracking_beside(job.tracking, base)
    except ValueError as error:
        problems.append(("tracking", str(error)))
    if job.pipeline is not None:
        try:
            place = base / job.pipeline
            path = place if place.is_file() else find_pipeline(job.pipeline)
            load_pipeline(path, job.rendered_overrides(day))
        except FileNotFoundError as error:
            problems.append(("pipeline", str(error)))
        except (OSError, ValueError) as error:
            problems.append(("overrides" if job.overrides else "pipeline", str(error)))
    return problems
