"""The MLflow store, as little of it as a run needs, with its errors sorted into two kinds.

Every call here may be repeated: metrics and parameters that are there already are not stored
twice (MLflow keys a point by run, name, time, step and value), and what would be made twice (run,
model, version) is looked up first.
"""

import contextlib
import fcntl
import logging
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from dqrm.data.files import sync
from dqrm.tracking.errors import Refused, StoreAway, StoreError
from dqrm.tracking.quiet import import_mlflow
from dqrm.tracking.spool import RunHeader
from dqrm.tracking.uri import sqlite_file

# MLflow's pages hide tags whose name begins with `mlflow.`: this one is of no use to a reader.
_log = logging.getLogger(__name__)

KEY_TAG = "mlflow.dqrm.runKey"

# mlflow/protos/databricks.proto: what the caller did wrong, as opposed to the server.
_REFUSALS = {
    "BAD_REQUEST",
    "CUSTOMER_UNAUTHORIZED",
    "ENDPOINT_NOT_FOUND",
    "FEATURE_DISABLED",
    "INVALID_PARAMETER_VALUE",
    "INVALID_STATE",
    "INVALID_STATE_TRANSITION",
    "MALFORMED_REQUEST",
    "NOT_FOUND",
    "NOT_IMPLEMENTED",
    "PERMISSION_DENIED",
    "RESOURCE_ALREADY_EXISTS",
    "RESOURCE_DOES_NOT_EXIST",
    "UNAUTHENTICATED",
}


# Signs in the text of an error (the transports' own types do not survive MLflow), in plain words.
_PLAIN = {
    "Connection refused": "it cannot be reached: connection refused",
    "Name or service not known": "it cannot be reached: its host name is not known",
    "failed with timeout exception": "it does not answer in time",
    "Remote end closed connection": "it closed the connection",
    "Connection reset by peer": "it closed the connection",
    "database is locked": "another process keeps the database locked",
}


@contextlib.contextmanager
def translated() -> Iterator[None]:
    """Turn what MLflow and its transports raise into StoreAway or Refused, in one line."""
    try:
        yield
    except StoreError:
        raise
    except Exception as error:
        text = " ".join(str(error).split()) or type(error).__name__
        for sign, plain in _PLAIN.items():
            if sign in text:
                text = plain
        if len(text) > 300:
            text = f"{text[:300]}..."
        refused = getattr(error, "error_code", None) in _REFUSALS
        raise (Refused if refused else StoreAway)(text) from error


class Store:
    """A tracking store at ``uri``. Every method raises StoreAway or Refused."""

    def __init__(self, uri: str) -> None:
        with translated():
            mlflow = import_mlflow()
            if file := sqlite_file(uri):
                _make_database(file)
            self.uri = uri
            self.client = mlflow.MlflowClient(
                tracking_uri=uri, registry_uri=os.environ.get("MLFLOW_REGISTRY_URI") or uri
            )

    def experiment_id(self, name: str) -> str:
        """Return the id of an experiment; make it when there is none, also beside others."""
        with translated():
            found = self.client.get_experiment_by_name(name)
            if found is None:
                with contextlib.suppress(Refused), translated():
                    # Refused: another process made it since we looked.
                    self.client.create_experiment(name, self._artifacts(name))
                found = self.client.get_experiment_by_name(name)
            if found is None:
                raise StoreAway(f"experiment {name} could not be made in {self.uri}")
            if found.lifecycle_stage != "active":
                raise Refused(
                    f"experiment {name} was deleted; choose another tracking.experiment or bring "
                    f"it back with `mlflow experiments restore -x {found.experiment_id}`"
                )
            self._warn_if_moved(found)
            return str(found.experiment_id)

    def create_run(self, header: RunHeader, experiment_id: str) -> str:
        """Create a run with its true start time; return its id."""
        with translated():
            run = self.client.create_run(
                experiment_id,
                start_time=header.started_ms,
                tags={KEY_TAG: header.key},
                run_name=header.run_name,
            )
            return str(run.info.run_id)

    def find_run(self, header: RunHeader, experiment_id: str) -> str | None:
        """Return the id of the run that an interrupted creation left behind, if it did."""
        with translated():
            runs = self.client.search_runs(
                [experiment_id], f"tags.`{KEY_TAG}` = '{header.key}'", max_results=1
            )
            return str(runs[0].info.run_id) if runs else None

    def run(self, run_id: str) -> Any:
        """Return the ``mlflow.entities.Run``; Refused when it is deleted or not there."""
        with translated():
            run = self.client.get_run(run_id)
            if run.info.lifecycle_stage != "active":
                raise Refused(f"run {run_id} was deleted; `mlflow runs restore` brings it back")
            return run

    def last_steps(self, run_id: str) -> dict[str, int]:
        """Return the last step of each metric of a run."""
        with translated():
            # The public `data.metrics` has the values only.
            return {m.key: int(m.step) for m in self.run(run_id).data._metric_objs}

    def set_running(self, run_id: str) -> None:
        """Mark a run as going on."""
        with translated():
            self.client.update_run(run_id, status="RUNNING")

    def end_run(self, run_id: str, status: str, end_ms: int) -> None:
        """Set the final status and the time at which the run really ended."""
        with translated():
            self.client.set_terminated(run_id, status=status, end_time=end_ms)

    def log_batch(
        self,
        run_id: str,
        metrics: Sequence[tuple[str, float, int, int]] = (),
        params: Mapping[str, str] | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        """Store metrics (name, value, time in ms, step), parameters and tags in one request."""
        from mlflow.entities import Metric, Param, RunTag

        with translated():
            self.client.log_batch(
                run_id,
                metrics=[Metric(*point) for point in metrics],
                params=[Param(*item) for item in (params or {}).items()],
                tags=[RunTag(*item) for item in (tags or {}).items()],
                synchronous=True,
            )

    def log_artifact(self, run_id: str, path: Path, folder: str) -> None:
        """Upload a file, or a folder with its name, into ``folder`` of the run's artifacts."""
        with translated():
            if path.is_dir():
                self.client.log_artifacts(run_id, str(path), f"{folder}/{path.name}".lstrip("/"))
            else:
                self.client.log_artifact(run_id, str(path), folder or None)

    def log_dataset(self, run_id: str, dataset: Mapping[str, str], context: str) -> None:
        """Add a data set to the inputs of a run."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        with translated():
            tags = [InputTag("mlflow.data.context", context)]
            self.client.log_inputs(run_id, [DatasetInput(Dataset(**dataset), tags)])

    def _warn_if_moved(self, experiment: Any) -> None:
        file, folder = sqlite_file(self.uri), Path(experiment.artifact_location)
        if file is None or not folder.is_absolute() or folder.is_relative_to(file.parent):
            return
        if not folder.parent.exists():
            _log.warning(
                "experiment %s puts its artifacts into %s, a path fixed when it was made; if the "
                "folder was moved, name a new experiment with tracking.experiment",
                experiment.name,
                folder,
            )

    def _artifacts(self, experiment: str) -> str | None:
        # MLflow would take `./mlruns` of whatever folder the upload runs in: name the one beside
        # the database. A server decides for itself.
        file = sqlite_file(self.uri)
        if file is None:
            return None
        return str(file.parent / "mlruns" / quote(experiment, safe=" "))


def _make_database(file: Path) -> None:
    """Make an SQLite store, all of it or nothing, unless there is one.

    MLflow builds it in place, in some seconds and without a lock: two processes on a fresh file
    break each other's tables, and a kill leaves a file that no version can open (3.17).
    """
    if file.is_file() and file.stat().st_size:
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    folder = os.open(file.parent, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        if file.is_file() and file.stat().st_size:
            return
        with tempfile.TemporaryDirectory(prefix=f".{file.name}.", dir=file.parent) as temporary:
            new = Path(temporary) / file.name
            import_mlflow().MlflowClient(f"sqlite:///{new}").search_experiments()
            sync(new)
            new.replace(file)
    finally:
        os.close(folder)
