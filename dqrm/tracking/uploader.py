"""Send the journal of a run to its store, each record once.

After every step the state on disk says how far it came. A process killed between the store's
answer and that note repeats one step, and all steps may be repeated (see ``store``).

**Repeated steps of a resumed run.** A run resumed from a checkpoint at step 1000 may have
recorded up to step 1300 before it was stopped. MLflow cannot remove points, so the first point of
a step stays: for each metric, steps up to the last one in the store when the run was resumed are
left out.
"""

import json
import logging
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

from dqrm.data.files import write_json
from dqrm.tracking.errors import Refused
from dqrm.tracking.identity import IDENTITY, RecordedRun
from dqrm.tracking.models import upload_model
from dqrm.tracking.spool import Record, Spool
from dqrm.tracking.store import Store

_log = logging.getLogger(__name__)

# Limits of one log_batch (mlflow/utils/validation.py: MAX_METRICS_PER_BATCH,
# MAX_PARAMS_TAGS_PER_BATCH, MAX_ENTITIES_PER_BATCH and MAX_BATCH_LOG_REQUEST_SIZE of 1 MB).
_MAX_METRICS = 900
_MAX_PARAMS = 50
_MAX_TAGS = 50
_MAX_BYTES = 500_000

REJECTED = "tracking-rejected.jsonl"


@dataclass
class _Batch:
    """Consecutive records that go into one request."""

    metrics: list[tuple[str, float, int, int]] = field(default_factory=list)
    params: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    records: list[tuple[Record, int]] = field(default_factory=list)


class Uploader:
    """Uploads one spool. Not to be used by two threads at once.

    ``on_progress`` is called after each step that the store took.
    """

    def __init__(self, spool: Spool, on_progress: Callable[[], None] = lambda: None) -> None:
        self._spool = spool
        self._on_progress = on_progress
        self._store: Store | None = None
        self._params: dict[str, str] | None = None
        """Parameters that the run has in the store; None before it was asked."""

    def drain(self, stop: threading.Event) -> None:
        """Send all records of the journal, or until ``stop`` is set.

        Raises:
            StoreAway: the store does not answer; call again later.
            Refused: the run itself cannot be created or written.
        """
        batch = _Batch()
        for record, offset in self._spool.records(self._spool.state.offset):
            if stop.is_set():
                return
            if record["t"] not in ("metrics", "system", "params", "tags"):
                self._send(batch)
                batch = _Batch()
                self._single(record, offset)
                continue
            if _full(batch, record, self._spool.state.offset, offset):
                self._send(batch)
                batch = _Batch()
            self._collect(batch, record, offset)
        if not stop.is_set():
            self._send(batch)

    # One step at a time: what is sent, then the note that it was.

    def _send(self, batch: _Batch) -> None:
        if not batch.records:
            return
        store, run_id = self._open_store()
        try:
            store.log_batch(run_id, batch.metrics, batch.params, batch.tags)
        except Refused as refusal:
            # Either the run is gone, which is not for us to mend, or one record is bad.
            store.run(run_id)
            if len(batch.records) == 1:
                self._reject(batch.records[0][0], refusal)
            else:
                for record, offset in batch.records:
                    one = _Batch()
                    self._collect(one, record, offset)
                    self._send(one)
                return
        if self._params is not None:
            self._params.update(batch.params)
        self._advance(batch.records[-1][1])

    def _single(self, record: Record, offset: int) -> None:
        store, run_id = self._open_store()
        try:
            match record["t"]:
                case "open":
                    self._reopen(store, run_id, record)
                case "artifact":
                    path = self._spool.kept(record["file"])
                    if not path.exists():
                        raise Refused(f"{path} was removed before it was uploaded")
                    store.log_artifact(run_id, path, record["folder"])
                case "dataset":
                    store.log_dataset(run_id, record["dataset"], record["context"])
                case "model":
                    upload_model(store, self._spool, run_id, record)
                case "end":
                    store.end_run(run_id, record["status"], record["time"])
                    self._spool.state.ended = True
        except Refused as refusal:
            store.run(run_id)
            self._reject(record, refusal)
        self._advance(offset)
        for name in ("file", "example"):
            if name in record:
                self._spool.discard(record[name])

    def _reopen(self, store: Store, run_id: str, record: Record) -> None:
        state, header = self._spool.state, self._spool.header
        tags = dict(record["tags"])
        if header.run_id is not None or record["resumed"]:
            run = store.run(run_id)
            self._params = dict(run.data.params)
            if run.data.tags.get("mlflow.source.type") == "PROJECT":
                # `mlflow run` has said where the project comes from.
                tags = {k: v for k, v in tags.items() if not k.startswith("mlflow.source.")}
            if record["resumed"]:
                state.stored_steps = store.last_steps(run_id)
                tags["resumed"] = str(int(run.data.tags.get("resumed", "0")) + 1)
        if header.description:
            tags["mlflow.note.content"] = header.description
        state.ended = False
        store.set_running(run_id)
        store.log_batch(run_id, tags=tags)

    def _collect(self, batch: _Batch, record: Record, offset: int) -> None:
        batch.records.append((record, offset))
        stored = self._spool.state.stored_steps
        known = self._params or {}
        match record["t"]:
            case "metrics":
                for key, value in record["values"].items():
                    if record["step"] > stored.get(key, -1):
                        batch.metrics.append((key, value, record["time"], record["step"]))
            case "system":
                # Samples are counted from zero in each process: go on counting.
                for key, value in record["values"].items():
                    step = record["step"] + stored.get(key, -1) + 1
                    batch.metrics.append((key, value, record["time"], step))
            case "tags":
                batch.tags.update(record["values"])
            case "params":
                for key, value in record["values"].items():
                    before = known.get(key, batch.params.get(key, value))
                    if before == value:
                        batch.params[key] = value
                    else:
                        # A parameter of a run cannot change in MLflow: the first value stays.
                        batch.tags[f"changed.{key}"] = f"{before} -> {value}"[:5000]

    def _open_store(self) -> tuple[Store, str]:
        """Return the store and the id of the run in it, which is created when needed."""
        state, header = self._spool.state, self._spool.header
        if self._store is None:
            self._store = Store(header.uri)
        store = self._store
        if state.run_id is None and header.run_id is not None:
            try:
                run = store.run(header.run_id)
            except Refused as refusal:
                raise Refused(
                    f"{refusal}; name the store the run was recorded in: tracking.uri=..."
                ) from refusal
            state.experiment_id = str(run.info.experiment_id)
            self._params = dict(run.data.params)
            self._found(header.run_id)
        elif state.run_id is None:
            state.experiment_id = store.experiment_id(header.experiment)
            run_id = store.find_run(header, state.experiment_id) if state.creating else None
            if run_id is None:
                state.creating = True
                self._spool.save_state()
                run_id = store.create_run(header, state.experiment_id)
            self._params = {}
            self._found(run_id)
        elif self._params is None:
            self._params = dict(store.run(state.run_id).data.params)
        assert state.run_id is not None
        return store, state.run_id

    def _found(self, run_id: str) -> None:
        state, header = self._spool.state, self._spool.header
        state.run_id = run_id
        self._spool.save_state()
        assert state.experiment_id is not None
        identity = RecordedRun(
            header.uri, header.experiment, state.experiment_id, run_id, header.run_name
        )
        write_json(self._spool.folder.parent / IDENTITY, asdict(identity))
        self._on_progress()

    def _advance(self, offset: int) -> None:
        self._spool.state.offset = offset
        self._spool.save_state()
        self._on_progress()

    def _reject(self, record: Record, refusal: Refused) -> None:
        self._spool.state.rejected += 1
        path = self._spool.folder.parent / REJECTED
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"reason": str(refusal), "record": record}) + "\n")
        if self._spool.state.rejected == 1:
            _log.warning("the tracking store refused a record (%s); it is in %s", refusal, path)


def _full(batch: _Batch, record: Record, start: int, end: int) -> bool:
    values = len(record["values"])
    return (
        end - start > _MAX_BYTES
        or len(batch.metrics) + values > _MAX_METRICS
        or len(batch.params) + values > _MAX_PARAMS
        or len(batch.tags) + values > _MAX_TAGS
    )
