"""Where jobs are, for the scheduler that starts them."""

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path

from dqrm.pipelines.jobs.config import Job

URI_VARIABLE = "MLFLOW_TRACKING_URI"

STOP_SECONDS = 90
"""How long a run that is asked to stop may take to save and record what it has."""


@dataclass(frozen=True)
class Place:
    """Where the jobs are, for the scheduler that starts them."""

    file: Path
    """Absolute path of the file of jobs."""
    image: str | None = None
    """Container image with dqrm in it."""
    claim: str | None = None
    """Volume claim that holds the folder of the file."""
    day: date = field(default_factory=date.today)
    """Day whose dates stand in a job that is written for one run."""

    @property
    def command(self) -> list[str]:
        """Start of the command line, with this environment's Python."""
        return [sys.executable, "-m", "dqrm", "jobs", "run"]


def named_store(jobs: Mapping[str, Job]) -> str | None:
    """The store that this environment names and another would not."""
    uri = os.environ.get(URI_VARIABLE)
    used = any(job.tracking.enabled and job.tracking.uri is None for job in jobs.values())
    return uri if used and uri else None
