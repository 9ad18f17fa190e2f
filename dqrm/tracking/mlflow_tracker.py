"""The tracker that writes to MLflow, by way of the spool and one background thread."""

import functools
import logging
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec

from dqrm.tracking.base import Status, Tracker
from dqrm.tracking.datasets import DatasetRecord
from dqrm.tracking.errors import Refused
from dqrm.tracking.spool import Spool, now_ms
from dqrm.tracking.system_metrics import SystemMetrics
from dqrm.tracking.uploader import Uploader
from dqrm.tracking.uri import run_url
from dqrm.tracking.values import MAX_TAG_LENGTH, clean_key, cut, flatten, numbers

if TYPE_CHECKING:
    import pandas as pd

_log = logging.getLogger(__name__)

P = ParamSpec("P")

_MAX_BACKOFF_SECONDS = 60.0
# A store that refuses connections at the end gets one more chance after this time.
_LAST_TRIES = 2
_LAST_TRY_SECONDS = 1.0
# Entries a journal line holds: 25 values of 8,000 characters stay far below one request's limit.
_ENTRIES_PER_RECORD = 25


def _guarded(method: "Callable[P, None]") -> "Callable[P, None]":
    """Keep what goes wrong with a record from the trainer; warn about the first one."""

    @functools.wraps(method)
    def call(*args: P.args, **kwargs: P.kwargs) -> None:
        tracker = args[0]
        assert isinstance(tracker, MlflowTracker)
        try:
            method(*args, **kwargs)
        except Exception as error:
            tracker.lost += 1
            if tracker.lost == 1:
                _log.warning(
                    "%s could not be recorded (%s: %s); training goes on",
                    method.__name__,
                    type(error).__name__,
                    error,
                )
            else:
                _log.debug("%s could not be recorded", method.__name__, exc_info=True)

    return call


class MlflowTracker(Tracker):
    """Writes records to the spool at once and lets a thread upload them every few seconds.

    Args:
        spool: held by this tracker until ``finish``.
        tags: tags of the run, set each time it is opened.
        resumed: whether the run has been written to before.
        flush_seconds: time between uploads.
        finish_seconds: how long ``flush`` and ``finish`` wait without seeing progress.
        system_metrics: whether to sample the machine.
    """

    def __init__(
        self,
        spool: Spool,
        *,
        tags: Mapping[str, str],
        resumed: bool,
        flush_seconds: float,
        finish_seconds: float,
        system_metrics: bool,
    ) -> None:
        self.lost = 0
        """Records that could not even be written to the spool."""
        self._spool = spool
        self._flush_seconds = flush_seconds
        self._finish_seconds = finish_seconds
        self._uploader = Uploader(spool, on_progress=self._progressed)
        self._changed = threading.Condition()
        self._wake = threading.Event()
        self._stop = threading.Event()
        self._starting = True
        self._finishing = False
        self._finished = False
        self._done = False
        self._complete = False
        self._failures = 0
        self._last_error: Exception | None = None
        self._warned = False
        self._progress = time.monotonic()
        spool.append("open", time=now_ms(), resumed=resumed, tags=_text_tags(tags))
        self._thread = threading.Thread(target=self._upload, name="tracking", daemon=True)
        self._thread.start()
        self._system = SystemMetrics(self._log_system) if system_metrics else None

    @property
    def run_id(self) -> str | None:
        """Id of the run; None while the store has not answered yet."""
        return self._spool.state.run_id or self._spool.header.run_id

    @property
    def uri(self) -> str:
        """The store; the path of an SQLite file is absolute."""
        return self._spool.header.uri

    @property
    def run_url(self) -> str | None:
        """Page of the run, when a server keeps it and has answered."""
        state = self._spool.state
        if state.run_id is None or state.experiment_id is None:
            return None
        return run_url(self.uri, state.experiment_id, state.run_id)

    def wait_started(self, timeout_seconds: float) -> None:
        """Wait until the run exists in the store, the store failed, or the time is over.

        Raises:
            ValueError: the store answered that it will not take this run. The tracker has let go
                of the spool.
        """
        with self._changed:
            self._changed.wait_for(
                lambda: self._spool.state.run_id is not None or self._failures > 0,
                timeout_seconds,
            )
            error = self._last_error
            self._starting = False
        if isinstance(error, Refused):
            self._finished = True
            self._stop.set()
            self._wake.set()
            self._thread.join()
            raise ValueError(f"tracking store {self.uri}: {error}") from error
        # Not before: making a store can take longer than the first sample, and MLflow's page
        # begins a comparison with the first metric of a run.
        if self._system:
            self._system.start()
        if error is not None:
            self._warn(error)

    @_guarded
    def log_params(self, params: Mapping[str, object]) -> None:
        """Record settings; nested mappings become dotted keys."""
        self._entries("params", dict(flatten(params)))

    @_guarded
    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Record one point of each metric at ``step``, now; what is no number is left out."""
        if values := numbers(metrics):
            self._append("metrics", time=now_ms(), step=int(step), values=values)

    @_guarded
    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags, over those of the same name."""
        self._entries("tags", _text_tags(tags))

    def describe(self, outcome: str) -> None:
        """Put the outcome, a line or two, under the description given at the start."""
        parts = [self._spool.header.description, outcome]
        self.set_tags({"mlflow.note.content": "\n\n".join(part for part in parts if part)})

    @_guarded
    def log_artifact(self, path: Path, folder: str = "") -> None:
        """Record a file or a folder as it is now, into ``folder`` of the run's artifacts."""
        self._append("artifact", file=self._spool.keep(Path(path)), folder=folder.strip("/"))

    @_guarded
    def log_dataset(self, dataset: DatasetRecord) -> None:
        """Record a split that the run reads."""
        self._append("dataset", dataset=dataset.entity(), context=dataset.context)

    @_guarded
    def log_model(
        self, artifact_dir: Path, example: "pd.DataFrame", register_as: str | None
    ) -> None:
        """Record the packed model, and register it under a name if one is given."""
        rows = self._spool.new_file("example.parquet")
        example.to_parquet(self._spool.kept(rows))
        self._append(
            "model",
            file=self._spool.keep(Path(artifact_dir)),
            example=rows,
            register_as=register_as,
        )

    def flush(self) -> bool:
        """Wait until all so far is in the store; False when the store did not take it in time."""
        with self._changed:
            if self._done:
                return self._complete
            target, failures = self._spool.size, self._failures
            self._wake.set()
            self._wait(
                lambda: (
                    self._spool.state.offset >= target or self._failures > failures or self._done
                )
            )
            return self._spool.state.offset >= target

    def finish(self, status: Status) -> bool:
        """End the run and upload the rest; return whether all of it is in the store.

        Waits while the store takes records, at most ``finish_seconds`` for the next one.
        """
        if self._finished:
            return self._complete
        if self._system:
            self._system.stop(self._flush_seconds)
        self._end(status)
        self._finished = True
        with self._changed:
            self._finishing = True
            self._wake.set()
            self._wait(lambda: self._done)
            self._stop.set()
            if self._complete:
                return True
        _log.warning(
            "not all of this run is in %s (%s); upload the rest with: dqrm tracking sync %s",
            self.uri,
            self._last_error or f"no answer for {self._finish_seconds:g} s",
            self._spool.folder.parent,
        )
        return False

    @_guarded
    def _end(self, status: Status) -> None:
        self._append("end", time=now_ms(), status=status)

    @_guarded
    def _log_system(self, values: Mapping[str, float], step: int) -> None:
        self._append("system", time=now_ms(), step=step, values=numbers(values))

    def _entries(self, kind: str, values: Mapping[str, str]) -> None:
        items = list(values.items())
        for begin in range(0, len(items), _ENTRIES_PER_RECORD):
            self._append(kind, values=dict(items[begin : begin + _ENTRIES_PER_RECORD]))

    def _append(self, kind: str, **values: Any) -> None:
        if self._finished:
            raise RuntimeError("the run has ended")
        self._spool.append(kind, **values)

    # The uploading thread.

    def _upload(self) -> None:
        delay = 0.0
        last_tries = _LAST_TRIES
        while not self._stop.is_set():
            self._wake.wait(delay)
            self._wake.clear()
            finishing = self._finishing
            try:
                self._uploader.drain(self._stop)
            except Exception as error:
                self._failed(error)
                last_tries -= finishing
                if last_tries == 0:
                    break
                delay = min(2.0**self._failures, _MAX_BACKOFF_SECONDS)
                if finishing:
                    delay = _LAST_TRY_SECONDS
            else:
                self._answered()
                if finishing:
                    break
                delay = self._flush_seconds
        self._let_go()

    def _let_go(self) -> None:
        complete = self._spool.state.ended and self._spool.state.offset >= self._spool.size
        if complete:
            self._spool.remove()
        else:
            self._spool.close()
        with self._changed:
            self._complete, self._done = complete, True
            self._changed.notify_all()

    def _failed(self, error: Exception) -> None:
        with self._changed:
            first = self._failures == 0
            self._failures += 1
            self._last_error = error
            self._changed.notify_all()
        _log.debug("upload failed", exc_info=error)
        if first and not self._warned and not self._starting:
            self._warn(error)

    def _warn(self, error: Exception) -> None:
        self._warned = True
        _log.warning(
            "the tracking store %s does not take records (%s); they are kept in %s and uploaded "
            "when it is back, or later with: dqrm tracking sync %s",
            self.uri,
            error,
            self._spool.folder,
            self._spool.folder.parent,
        )

    def _answered(self) -> None:
        with self._changed:
            back, self._failures, self._last_error = self._failures > 0, 0, None
            self._changed.notify_all()
        if back:
            _log.info("the tracking store %s takes records again", self.uri)

    def _progressed(self) -> None:
        with self._changed:
            self._progress = time.monotonic()
            self._changed.notify_all()

    def _wait(self, done: Callable[[], bool]) -> None:
        """Wait for ``done`` while there is progress. Called with the condition held."""
        self._progress = time.monotonic()
        while not done():
            left = self._progress + self._finish_seconds - time.monotonic()
            if left <= 0:
                return
            self._changed.wait(left)


def _text_tags(tags: Mapping[str, str]) -> dict[str, str]:
    return {
        clean_key(key): cut(str(value), MAX_TAG_LENGTH, "too long for a tag")
        for key, value in tags.items()
    }
