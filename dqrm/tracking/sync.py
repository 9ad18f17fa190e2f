"""Upload what runs left in their spools while the store was away."""

import threading
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from dqrm.tracking.errors import StoreAway
from dqrm.tracking.spool import FOLDER, Spool
from dqrm.tracking.uploader import Uploader


@dataclass(frozen=True)
class SyncResult:
    """What one upload did."""

    run_dir: Path
    uri: str
    run_id: str
    status: str
    """Final status the run has now in the store."""
    records: int
    """Records uploaded by this call."""
    rejected: int
    """Records that the store refused; they are in the run folder's tracking-rejected.jsonl."""


def find_spools(folders: Iterable[Path]) -> list[Path]:
    """Return the run folders at or below ``folders`` that wait for an upload, sorted."""
    return sorted(
        {header.parent.parent for root in folders for header in root.rglob(f"{FOLDER}/run.json")}
    )


def sync_spool(run_dir: Path) -> SyncResult:
    """Upload the spool of a run folder and remove it. Safe to kill and to repeat.

    A run whose process died without a word ends as KILLED at the time of its last record, with
    a tag ``ended`` saying so.

    Args:
        run_dir: folder of the run, or its ``spool`` folder.

    Raises:
        FileNotFoundError: nothing waits there.
        ValueError: the run is still going on, or the spool is damaged.
        StoreAway: the store does not answer; what was uploaded stays, call again later.
        Refused: the store will not take the run.
    """
    if run_dir.name == FOLDER and (run_dir / "run.json").is_file():
        run_dir = run_dir.parent
    spool = Spool.open(run_dir)
    try:
        status = _end(spool)
        records = sum(1 for _ in spool.records(spool.state.offset))
        Uploader(spool).drain(threading.Event())
        state = spool.state
        if state.run_id is None:
            raise StoreAway(f"{spool.header.uri} did not make the run")
        result = SyncResult(
            run_dir, spool.header.uri, state.run_id, status, records, state.rejected
        )
    except BaseException:
        spool.close()
        raise
    spool.remove()
    return result


def _end(spool: Spool) -> str:
    """Return the final status in the journal; add one where the process died before it could."""
    last = None
    time = spool.header.started_ms
    for record, _ in spool.records(0):
        last = record
        time = record.get("time", time)
    if last is not None and last["t"] == "end":
        return str(last["status"])
    spool.append("tags", values={"ended": "its process died; the end is its last record"})
    spool.append("end", time=time, status="KILLED")
    return "KILLED"
