"""The MLflow run of a job's run, which the command it starts goes on with.

The command finds the run in the variables that MLflow reads (MLFLOW_RUN_ID and the store), so that
what it records stands in the same run.
"""

import logging
import os
from datetime import date
from pathlib import Path

from dqrm.pipelines.jobs.config import Job
from dqrm.pipelines.jobs.state import Event, JobFolder, Outcome, Running
from dqrm.tracking.base import Status
from dqrm.tracking.config import TrackingConfig
from dqrm.tracking.errors import StoreError
from dqrm.tracking.spool import FOLDER as SPOOL
from dqrm.tracking.tracker import recorded_run, start_tracker
from dqrm.tracking.uri import DEFAULT_URI, experiment_name, resolve_uri, sqlite_file
from dqrm.yaml_text import dump_value

log = logging.getLogger(__name__)

JOB_TAG = "dqrm.job"


class RunRecord:
    """Opens the run; ``finish`` ends it."""

    def __init__(
        self, job: Job, folder: JobFolder, base: Path, running: Running, day: date
    ) -> None:
        self._job = job
        self._folder = folder
        self._running = running
        self._config = tracking_beside(job.tracking, base)
        if job.pipeline is not None:  # it samples the machine itself
            self._config = self._config.model_copy(update={"system_metrics": False})
        self._tracker = start_tracker(
            self._config,
            run_name=f"{folder.name} {running.run}",
            run_dir=folder.run_dir(running.run),
            tags={
                JOB_TAG: folder.name,
                f"{JOB_TAG}.scheduled": running.scheduled,
                f"{JOB_TAG}.date": day.isoformat(),
                f"{JOB_TAG}.schedule": job.schedule.text,
                f"{JOB_TAG}.starts": str(running.starts),
            },
        )

    @property
    def run_id(self) -> str | None:
        """Id of the run; None when it is not recorded, or the store is away."""
        return self._tracker.run_id

    @property
    def uri(self) -> str | None:
        """The store."""
        return self._tracker.uri

    def environment(self) -> dict[str, str]:
        """Variables for the command."""
        if self.uri is None:
            return {}
        given = {
            "MLFLOW_TRACKING_URI": self.uri,
            "MLFLOW_EXPERIMENT_NAME": experiment_name(self._config.experiment),
        }
        return given | ({"MLFLOW_RUN_ID": self.run_id} if self.run_id else {})

    def overrides(self) -> list[str]:
        """Settings that have a pipeline record its run in the same place."""
        if self.uri is None:
            return ["tracking.enabled=false"]
        experiment = experiment_name(self._config.experiment)
        return [
            f"tracking.uri={dump_value(self.uri)}",
            f"tracking.experiment={dump_value(experiment)}",
        ]

    def metric(self, name: str) -> float:
        """Last value of a metric that the command recorded.

        Raises:
            LookupError: there is none of that name, or the run is not in the store.
            OSError: the store does not answer.
        """
        from dqrm.tracking.store import Store

        if self.uri is None or self.run_id is None:
            raise LookupError("the run is not in the store yet")
        metrics = Store(self.uri).run(self.run_id).data.metrics
        if name not in metrics:
            known = ", ".join(sorted(k for k in metrics if not k.startswith("system/"))) or "none"
            raise LookupError(f"the run has no metric {name}; it has: {known}")
        return float(metrics[name])

    def finish(self, event: Event, status: Status) -> None:
        """Record the outcome and the log, and end the run."""
        self._tracker.set_tags(
            {f"{JOB_TAG}.outcome": event.outcome, f"{JOB_TAG}.detail": event.detail}
            | ({f"{JOB_TAG}.attempts": "; ".join(event.attempts)} if event.tries > 1 else {})
            | ({f"{JOB_TAG}.hook": f"failed: {event.hook_fault}"} if event.hook_fault else {})
        )
        values = {"job/seconds": event.seconds, "job/tries": float(event.tries)}
        self._tracker.log_metrics(values, step=0)
        log = self._folder.log(self._running.run)
        if log.is_file():
            self._tracker.log_artifact(log, "job")
        self._tracker.finish(status)


def tracking_beside(config: TrackingConfig, base: Path) -> TrackingConfig:
    """The same settings, with an SQLite file named relative to ``base`` made absolute."""
    if not config.enabled:
        return config
    uri = config.uri or os.environ.get("MLFLOW_TRACKING_URI") or DEFAULT_URI
    file = sqlite_file(uri)
    if file is not None and not file.is_absolute():
        uri = uri.replace(str(file), str(base / file), 1)
    return config.model_copy(update={"uri": resolve_uri(uri)})


def settle(folder: JobFolder, run: str, outcome: Outcome, status: Status) -> None:
    """End the MLflow run of a run whose process was killed, as far as its store answers.

    Nothing is done for one whose records are all in the store.
    """
    run_dir = folder.run_dir(run)
    recorded = recorded_run(run_dir)
    if recorded is None or not (run_dir / SPOOL).is_dir():
        return
    config = TrackingConfig(uri=recorded.uri, experiment=recorded.experiment, system_metrics=False)
    try:
        tags = {f"{JOB_TAG}.outcome": outcome}
        start_tracker(config, run_name=recorded.run_name, run_dir=run_dir, tags=tags).finish(status)
    except (StoreError, ValueError) as error:
        log.warning("%s: its MLflow run stays open: %s", run_dir, error)
