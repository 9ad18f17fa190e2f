"""A tracking server that is away, dies, comes back or never answers."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from dqrm.tracking.errors import StoreAway
from dqrm.tracking.quiet import import_mlflow
from dqrm.tracking.sync import find_spools, sync_spool


def points(uri: str, run_id: str) -> list[tuple[int, float]]:
    history = import_mlflow().MlflowClient(uri).get_metric_history(run_id, "train/loss")
    return sorted((point.step, point.value) for point in history)


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]


def test_run_of_which_the_server_saw_nothing(
    session_server: Any, start: Any, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    session_server.kill()
    tracker = start(uri=session_server.uri)
    assert tracker.run_id is None
    [warning] = warnings(caplog)
    assert session_server.uri in warning
    assert "kept in runs/run/spool" in warning
    assert "dqrm tracking sync runs/run" in warning
    assert "\n" not in warning
    started = time.time() * 1000
    for step in range(100):
        tracker.log_metrics({"train/loss": float(step)}, step)
    file = tmp_path / "summary.json"
    file.write_text("{}")
    tracker.log_artifact(file, "results")
    file.unlink()
    assert not tracker.flush()
    assert not tracker.finish("FINISHED")
    assert len(warnings(caplog)) == 2
    ended = time.time() * 1000
    with pytest.raises(StoreAway, match="cannot be reached"):
        sync_spool(Path("runs/run"))

    session_server.start()
    result = sync_spool(Path("runs/run"))
    assert result.status == "FINISHED"
    client = import_mlflow().MlflowClient(session_server.uri)
    run = client.get_run(result.run_id)
    assert run.info.start_time <= started <= run.info.end_time <= ended
    assert (run.info.run_name, run.info.status) == ("run", "FINISHED")
    assert points(session_server.uri, result.run_id) == [(s, float(s)) for s in range(100)]
    assert [a.path for a in client.list_artifacts(result.run_id, "results")] == [
        "results/summary.json"
    ]
    assert find_spools([Path("runs")]) == []


def test_server_killed_and_restarted_in_the_middle(
    server: Any, start: Any, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    stays, ends = start("stays", uri=server.uri), start("ends", uri=server.uri)
    for tracker in (stays, ends):
        assert tracker.run_url == f"{server.uri}/#/experiments/1/runs/{tracker.run_id}"
        for step in range(50):
            tracker.log_metrics({"train/loss": float(step)}, step)
        assert tracker.flush()
    server.kill()
    for tracker in (stays, ends):
        for step in range(50, 100):
            tracker.log_metrics({"train/loss": float(step)}, step)
        assert not tracker.flush()
    file = tmp_path / "curves.png"
    file.write_bytes(b"picture")
    stays.log_artifact(file, "plots")
    assert not ends.finish("FAILED")

    server.start()
    assert stays.finish("FINISHED")
    assert sync_spool(Path("runs/ends")).status == "FAILED"
    client = import_mlflow().MlflowClient(server.uri)
    for tracker, status in ((stays, "FINISHED"), (ends, "FAILED")):
        assert points(server.uri, tracker.run_id) == [(s, float(s)) for s in range(100)]
        assert client.get_run(tracker.run_id).info.status == status
    assert [a.path for a in client.list_artifacts(stays.run_id, "plots")] == ["plots/curves.png"]
    # Each run: one line when the server went; the run that ended without it: one more.
    assert len(warnings(caplog)) == 3


BLACK_HOLE = """
import sys
from pathlib import Path
from dqrm.tracking import tracker as module
from dqrm.tracking.config import TrackingConfig
module._CONNECT_SECONDS = 1.0
config = TrackingConfig(uri=sys.argv[1], finish_seconds=1.0)
tracker = module.start_tracker(config, run_name="run", run_dir=Path("runs/run"))
for step in range(1000):
    tracker.log_metrics({"train/loss": float(step)}, step)
assert tracker.run_id is None
assert not tracker.flush()
assert not tracker.finish("FINISHED")
print("done")
"""


def test_server_that_never_answers(
    black_hole: str, server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # One request would hang longer than this test waits: the process must end without it.
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "600")
    done = subprocess.run(
        [sys.executable, "-c", BLACK_HOLE, black_hole], capture_output=True, text=True, timeout=100
    )
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr
    assert "no answer for 1 s" in done.stderr
    assert "dqrm tracking sync runs/run" in done.stderr
    assert "Traceback" not in done.stderr
    header = Path("runs/run/spool/run.json")
    header.write_text(json.dumps(json.loads(header.read_text()) | {"uri": server.uri}))
    result = sync_spool(Path("runs/run"))
    assert points(server.uri, result.run_id) == [(s, float(s)) for s in range(1000)]
