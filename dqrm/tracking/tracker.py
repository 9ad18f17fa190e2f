"""Tracking of runs: ``start_tracker`` and the classes it returns.

A run is written to ``<run folder>/spool`` first and uploaded to MLflow by a thread every few
seconds. Training neither waits for the store nor dies of it. What the store did not take stays in
the spool for ``dqrm tracking sync``. ``<run folder>/tracking.json`` says which MLflow run the
folder belongs to.

This module does not import MLflow; the thread does. See ``dqrm.tracking.quiet`` for what is said
to MLflow about telemetry (off unless MLFLOW_DISABLE_TELEMETRY=false), and
``dqrm.tracking.uploader`` for what becomes of steps that a resumed run repeats.
"""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from dqrm.tracking.base import NullTracker, Status, Tracker
from dqrm.tracking.config import TrackingConfig
from dqrm.tracking.datasets import DatasetRecord
from dqrm.tracking.environment import environment_tags
from dqrm.tracking.identity import RecordedRun, recorded_run
from dqrm.tracking.mlflow_tracker import MlflowTracker
from dqrm.tracking.spool import RunHeader, Spool
from dqrm.tracking.uri import experiment_name, resolve_uri

__all__ = [
    "DatasetRecord",
    "MlflowTracker",
    "NullTracker",
    "RecordedRun",
    "Status",
    "Tracker",
    "recorded_run",
    "start_tracker",
]

# Importing MLflow and making a fresh SQLite store takes 3 to 10 s. A server that has not answered
# by then is waited for in the background.
_CONNECT_SECONDS = 20.0


def start_tracker(
    config: TrackingConfig,
    *,
    run_name: str,
    run_dir: Path,
    run_id: str | None = None,
    description: str = "",
    tags: Mapping[str, str] | None = None,
) -> Tracker:
    """Open a run in MLflow, or a tracker that records nothing.

    Which run: records that an earlier process left in ``run_dir`` are uploaded first and their
    run goes on. Otherwise ``run_id`` goes on, else the run of the same name that ``run_dir`` was
    recorded in before, else the run of MLFLOW_RUN_ID as ``mlflow run`` sets it, else a new run is
    made. A run that goes on has the status RUNNING again.

    Only rank 0 of a distributed job (variable RANK) records.

    Waits until the run exists, but not for a store that does not answer.

    Args:
        config: where and what to record.
        run_name: name shown in MLflow.
        run_dir: folder of this run and no other; made when it is not there. Its ``spool`` and
            ``tracking.json`` belong to tracking.
        run_id: MLflow run to continue, see ``recorded_run``.
        description: shown on the run's page, as Markdown.
        tags: more tags, over ``config.tags`` and those of ``environment_tags``.

    Raises:
        ValueError: the store's address cannot work, or the store refuses this run, or ``run_dir``
            is in use or holds records of another run; the message names the fix.
    """
    if not config.enabled or os.environ.get("RANK", "0") != "0":
        return NullTracker()
    uri = resolve_uri(config.uri)
    # Taken in any case, or the next run of this process, a stage of a pipeline, would be given it.
    run_of_parent = _run_id_of_parent()
    before = recorded_run(run_dir)
    if run_id is None and before and (before.uri, before.run_name) == (uri, run_name):
        run_id = before.run_id
    header = RunHeader(
        uri=uri,
        experiment=experiment_name(config.experiment),
        run_name=run_name,
        run_id=run_id or run_of_parent,
        description=description,
    )
    spool = Spool.open(run_dir, header)
    try:
        _check_same_run(spool, uri, run_id, run_name)
        tracker = MlflowTracker(
            spool,
            tags={**environment_tags(), **config.tags, **(tags or {})},
            resumed=run_id is not None or not spool.fresh,
            flush_seconds=config.flush_seconds,
            finish_seconds=config.finish_seconds,
            system_metrics=config.system_metrics,
        )
    except BaseException:
        spool.close()
        raise
    try:
        tracker.wait_started(_CONNECT_SECONDS)
    except ValueError:
        if spool.fresh:
            shutil.rmtree(spool.folder, ignore_errors=True)
        raise
    return tracker


def _run_id_of_parent() -> str | None:
    # Taken out, as MLflow does: the next run of this process is another one.
    return os.environ.pop("MLFLOW_RUN_ID", None) or None


def _check_same_run(spool: Spool, uri: str, run_id: str | None, run_name: str) -> None:
    known = spool.state.run_id or spool.header.run_id
    fix = f"upload it first with: dqrm tracking sync {spool.folder.parent}"
    if spool.header.uri != uri:
        raise ValueError(f"{spool.folder} holds records for {spool.header.uri}, not {uri}; {fix}")
    if run_id is not None and known is not None and run_id != known:
        raise ValueError(f"{spool.folder} holds records of run {known}, not {run_id}; {fix}")
    if run_name != spool.header.run_name:
        raise ValueError(
            f"{spool.folder} holds records of run {spool.header.run_name}, not {run_name}; {fix}"
        )
