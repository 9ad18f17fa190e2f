"""What a run leaves in an SQLite store, read back through MLflow's client."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from dqrm.tracking.quiet import import_mlflow
from dqrm.tracking.spool import Spool
from dqrm.tracking.store import Store
from dqrm.tracking.sync import find_spools, sync_spool
from dqrm.tracking.tracker import DatasetRecord, NullTracker, recorded_run
from dqrm.tracking.uploader import Uploader


def points(uri: str, run_id: str, key: str) -> list[tuple[int, float]]:
    history = import_mlflow().MlflowClient(uri).get_metric_history(run_id, key)
    return sorted((point.step, point.value) for point in history)


def read(uri: str, run_id: str) -> Any:
    return import_mlflow().MlflowClient(uri).get_run(run_id)


def test_contents_of_a_run(store: str, start: Any, tmp_path: Path) -> None:
    tracker = start("first", experiment="clicks", tags={"team": "ads"})
    assert tracker.uri == store
    assert tracker.run_url is None
    before = time.time() * 1000
    tracker.log_params({"quant": {"bits": 4}, "seed": 0, "long": "x" * 7000})
    for step in range(1500):
        tracker.log_metrics({"train/loss": 1 / (step + 1), "note": None}, step)  # type: ignore[dict-item]
    tracker.log_metrics({"val/auc": float("nan"), "val/log_loss": float("inf")}, 10)
    tracker.log_params({f"p{n}": n for n in range(120)})
    config = tmp_path / "config.yaml"
    config.write_text("seed: 0\n")
    tracker.log_artifact(config)
    config.write_text("changed after it was logged\n")
    plots = tmp_path / "plots"
    plots.mkdir()
    (plots / "curves.png").write_bytes(b"picture")
    tracker.log_artifact(plots, "pictures")
    tracker.describe("test AUC 0.95\n1 MB packed")
    assert tracker.flush()
    assert len(points(store, tracker.run_id, "train/loss")) == 1500
    assert tracker.finish("FINISHED")

    run = read(store, tracker.run_id)
    client = import_mlflow().MlflowClient(store)
    assert client.get_experiment(run.info.experiment_id).name == "clicks"
    assert (run.info.run_name, run.info.status) == ("first", "FINISHED")
    assert before <= run.info.end_time <= time.time() * 1000
    assert run.data.params["quant.bits"] == "4"
    assert run.data.params["p119"] == "119"
    assert run.data.params["long"].endswith("[cut: 7000 characters, whole in config.yaml]")
    assert points(store, tracker.run_id, "train/loss") == [(s, 1 / (s + 1)) for s in range(1500)]
    assert run.data.metrics["val/auc"] != run.data.metrics["val/auc"]
    assert "note" not in run.data.metrics
    tags = run.data.tags
    assert tags["team"] == "ads"
    assert tags["mlflow.note.content"] == "test AUC 0.95\n1 MB packed"
    assert {"version.torch", "version.dqrm", "cpu.model", "cpu.threads", "host"} <= set(tags)
    # A parallel run starts its workers with `python -c`.
    assert any(word in tags["mlflow.source.name"] for word in ("tests/tracking", "pytest", "-c"))
    artifacts = Path(run.info.artifact_uri)
    assert artifacts.is_relative_to(tmp_path / "mlruns")
    assert (artifacts / "config.yaml").read_text() == "seed: 0\n"
    assert (artifacts / "pictures" / "plots" / "curves.png").read_bytes() == b"picture"
    assert [path.name for path in Path("runs/first").iterdir()] == ["tracking.json"]


def test_git_commit_and_dirty_flag(store: str, start: Any, tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        command = ["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init", "-q", "-b", "topic")
    (tmp_path / "code.py").write_text("1")
    git("add", "code.py")
    git("commit", "-qm", "code")
    runs = []
    for name, text in (("clean", "1"), ("dirty", "2")):
        (tmp_path / "code.py").write_text(text)
        tracker = start(name)
        tracker.finish("FINISHED")
        runs.append(read(store, tracker.run_id).data.tags)
    assert [tags["mlflow.source.git.commit"] for tags in runs] == [git("rev-parse", "HEAD")] * 2
    assert [tags["git.dirty"] for tags in runs] == ["false", "true"]
    assert runs[0]["mlflow.source.git.branch"] == "topic"


def test_datasets_are_inputs_with_digest_schema_and_context(store: str, start: Any) -> None:
    sample = pd.DataFrame({"age": [1, 2], "city": ["a", None], "tags": [["x"], []]})
    tracker = start()
    for split, context in (("train", "training"), ("test", "test")):
        tracker.log_dataset(
            DatasetRecord(f"set/{split}", "/data/set", "d" * 64, context, sample, {"num_rows": 9})
        )
    tracker.finish("FINISHED")
    inputs = read(store, tracker.run_id).inputs.dataset_inputs
    found = {i.dataset.name: (i.tags[0].value, i.dataset.digest) for i in inputs}
    assert found == {"set/train": ("training", "d" * 36), "set/test": ("test", "d" * 36)}
    dataset = inputs[0].dataset
    assert dataset.source == '{"uri": "/data/set"}'
    assert dataset.profile == '{"num_rows": 9}'
    assert '"type": "string", "name": "city"' in dataset.schema
    assert '"type": "double", "name": "age"' in dataset.schema


def test_system_metrics_are_sampled_and_stop(
    store: str, start: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.1")
    tracker = start(system_metrics=True)
    time.sleep(0.5)
    assert tracker.finish("FINISHED")
    assert len(points(store, tracker.run_id, "system/rank0/cpu_utilization_percentage")) >= 2
    usage = points(store, tracker.run_id, "system/rank0/system_memory_usage_percentage")
    assert all(0 < value < 100 for _, value in usage)
    tracker = start(run_id=tracker.run_id, system_metrics=True)
    tracker.finish("FINISHED")
    steps = [s for s, _ in points(store, tracker.run_id, "system/rank0/disk_usage_percentage")]
    assert steps == list(range(len(usage) + 1))


def test_resumed_run_goes_on_without_repeating_points(store: str, start: Any) -> None:
    tracker = start()
    tracker.log_params({"epochs": 1})
    for step in range(30):
        tracker.log_metrics({"train/loss": float(step)}, step)
    tracker.log_metrics({"val/auc": 0.5}, 20)
    tracker.finish("KILLED")
    first = tracker.run_id

    tracker = start(run_id=first)  # from a checkpoint at step 10
    assert tracker.run_id == first
    assert tracker.flush()
    assert read(store, first).info.status == "RUNNING"
    tracker.log_params({"epochs": 2, "new": 1})
    for step in range(10, 40):
        tracker.log_metrics({"train/loss": float(step)}, step)
        if step % 10 == 0:
            tracker.log_metrics({"val/auc": 0.5}, step)
    tracker.finish("FINISHED")

    run = read(store, first)
    assert run.info.status == "FINISHED"
    assert points(store, first, "train/loss") == [(s, float(s)) for s in range(40)]
    assert points(store, first, "val/auc") == [(20, 0.5), (30, 0.5)]
    assert run.data.params == {"epochs": "1", "new": "1"}
    assert run.data.tags["changed.epochs"] == "1 -> 2"
    assert run.data.tags["resumed"] == "1"


TRAIN = """
import sys, time
from pathlib import Path
from dqrm.tracking.config import TrackingConfig
from dqrm.tracking.tracker import start_tracker
config = TrackingConfig(system_metrics=False, flush_seconds=float(sys.argv[3]))
tracker = start_tracker(config, run_name=sys.argv[1], run_dir=Path("runs") / sys.argv[1])
for step in range(int(sys.argv[2])):
    tracker.log_metrics({"train/loss": float(step)}, step)
if sys.argv[4:] == ["wait"]:
    print(tracker.run_id, flush=True)
    time.sleep(600)
assert tracker.finish("FINISHED")
print(tracker.run_id)
"""


def spawn(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", TRAIN, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def kill_while_waiting(name: str, steps: int) -> str:
    """Run a trainer that records ``steps`` points, never uploads them and dies."""
    process = spawn(name, str(steps), "1000", "wait")
    assert process.stdout is not None
    run_id = process.stdout.readline().strip()
    process.send_signal(signal.SIGKILL)
    process.communicate()
    return run_id


def test_killed_process_loses_no_point_and_resumes(store: str, start: Any) -> None:
    run_id = kill_while_waiting("killed", 500)
    assert points(store, run_id, "train/loss") == []
    tracker = start("killed")
    assert tracker.run_id == run_id
    tracker.log_metrics({"train/loss": 9.0}, 499)  # repeated after the checkpoint: left out
    tracker.log_metrics({"train/loss": 500.0}, 500)
    assert tracker.finish("FINISHED")
    assert points(store, run_id, "train/loss") == [(s, float(s)) for s in range(501)]


def test_sync_ends_the_run_of_a_dead_process(store: str, left_behind: Any) -> None:
    left_behind(store, 10)
    before = time.time() * 1000
    [run_dir] = find_spools([Path("runs")])
    result = sync_spool(run_dir)
    assert (result.status, result.records, result.rejected) == ("KILLED", 13, 0)
    run = read(store, result.run_id)
    assert run.info.status == "KILLED"
    assert run.info.start_time <= run.info.end_time <= before
    assert "its process died" in run.data.tags["ended"]
    assert len(points(store, result.run_id, "train/loss")) == 10
    assert find_spools([Path("runs")]) == []


def test_run_goes_on_by_its_folder_alone(store: str, start: Any, left_behind: Any) -> None:
    """The checkpoint of a run whose store was away knows no run id; sync has made it since."""
    run_id = sync_spool(left_behind(store, 10)).run_id
    recorded = recorded_run(Path("runs/run"))
    assert recorded is not None
    assert (recorded.run_id, recorded.uri, recorded.experiment) == (run_id, store, "dqrm")
    tracker = start("run")
    assert tracker.run_id == run_id
    tracker.log_metrics({"train/loss": 10.0}, 10)
    tracker.finish("FINISHED")
    assert read(store, run_id).info.status == "FINISHED"
    assert len(points(store, run_id, "train/loss")) == 11


def test_moved_folder_is_told(store: str, start: Any, caplog: pytest.LogCaptureFixture) -> None:
    client = import_mlflow().MlflowClient(store)
    client.create_experiment("dqrm", "/no/such/folder/dqrm")
    start().finish("FINISHED")
    assert "a path fixed when it was made" in caplog.text


def test_upload_repeated_after_a_kill_stores_each_point_once(store: str, left_behind: Any) -> None:
    """A kill may fall between the store's answer and our note of it: take the note back."""
    run_dir = left_behind(store, 2000)
    note = run_dir / "spool" / "state.json"
    spool = Spool.open(run_dir)
    notes = []
    with pytest.raises(StopUploadError):
        Uploader(spool, on_progress=stop_after(3, lambda: notes.append(note.read_text()))).drain(
            threading.Event()
        )
    spool.close()
    note.write_text(notes[1])  # behind the second batch, as if the third had not been noted
    result = sync_spool(run_dir)
    assert points(store, result.run_id, "train/loss") == [(s, float(s)) for s in range(2000)]
    assert read(store, result.run_id).data.tags.get("resumed") is None


class StopUploadError(BaseException):
    pass


def stop_after(steps: int, note: Callable[[], None]) -> Callable[[], None]:
    left = iter(range(steps))

    def on_progress() -> None:
        note()
        if next(left, None) is None:
            raise StopUploadError

    return on_progress


def test_creation_cut_off_by_a_kill_is_found_again(store: str, left_behind: Any) -> None:
    run_dir = left_behind(store, 5)
    spool = Spool.open(run_dir)
    made = Store(store)
    run_id = made.create_run(spool.header, made.experiment_id("dqrm"))
    spool.state.creating = True  # written before the store was asked
    spool.save_state()
    spool.close()
    assert sync_spool(run_dir).run_id == run_id
    run = read(store, run_id)
    assert run.info.start_time == spool.header.started_ms
    assert len(import_mlflow().MlflowClient(store).search_runs(["1"])) == 1


SYNC = """
from pathlib import Path
from dqrm.tracking.sync import sync_spool
sync_spool(Path("runs/run"))
"""


def uploaded(state: Path) -> int:
    return json.loads(state.read_text())["offset"] if state.is_file() else 0


def test_sync_survives_kills(store: str, left_behind: Any) -> None:
    run_dir = left_behind(store, 12_000)
    state = run_dir / "spool" / "state.json"
    kills = 0
    for _ in range(2):
        before = uploaded(state)
        process = subprocess.Popen([sys.executable, "-c", SYNC])
        while process.poll() is None and uploaded(state) == before:
            time.sleep(0.002)
        process.kill()
        kills += process.wait() == -signal.SIGKILL
    assert kills == 2
    result = sync_spool(run_dir)
    client = import_mlflow().MlflowClient(store)
    history = client.get_metric_history(result.run_id, "train/loss")
    assert sorted(point.step for point in history) == list(range(12_000))
    assert len(client.search_runs(["1"])) == 1


def test_two_processes_share_one_fresh_file(tmp_path: Path) -> None:
    processes = [spawn(name, "300", "0.1") for name in ("a", "b")]
    for process in processes:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        assert err == ""
        run_id = out.strip()
        uri = f"sqlite:///{tmp_path}/mlflow.db"
        assert len(points(uri, run_id, "train/loss")) == 300
    client = import_mlflow().MlflowClient(uri)
    assert [e.name for e in client.search_experiments(filter_string="name != 'Default'")] == [
        "dqrm"
    ]


def test_bad_record_is_put_aside_and_the_rest_arrives(
    store: str, start: Any, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = start()
    tracker.log_metrics({"good": 1.0}, 1)
    tracker._spool.append("tags", values={"": "a tag without a name"})
    tracker.log_metrics({"good": 2.0}, 2)
    assert tracker.finish("FINISHED")
    assert points(store, tracker.run_id, "good") == [(1, 1.0), (2, 2.0)]
    [line] = Path("runs/run/tracking-rejected.jsonl").read_text().splitlines()
    assert "a tag without a name" in line
    assert [r.getMessage() for r in caplog.records if r.levelname == "WARNING"] == [
        message for message in (r.getMessage() for r in caplog.records) if "refused" in message
    ]


def test_trainer_never_sees_an_error(
    store: str, start: Any, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = start()
    tracker.log_artifact(Path("no/such/file"))
    tracker.log_artifact(Path("nor/this"))
    tracker.log_metrics(None, 3)
    assert tracker.finish("FINISHED")
    tracker.log_metrics({"late": 1.0}, 4)
    assert tracker.finish("FAILED")
    assert read(store, tracker.run_id).info.status == "FINISHED"
    warnings = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert len(warnings) == 1
    assert "log_artifact could not be recorded" in warnings[0]


def test_run_of_mlflow_run_is_used_once(
    store: str, start: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    created = import_mlflow().MlflowClient(store).create_run("0", run_name="from outside")
    monkeypatch.setenv("MLFLOW_RUN_ID", created.info.run_id)
    tracker = start("inside")
    tracker.log_metrics({"a": 1.0}, 0)
    tracker.finish("FINISHED")
    run = read(store, created.info.run_id)
    assert (tracker.run_id, run.info.run_name) == (created.info.run_id, "from outside")
    assert run.data.metrics == {"a": 1.0}
    assert "resumed" not in run.data.tags
    assert "MLFLOW_RUN_ID" not in os.environ
    assert start("next").run_id != created.info.run_id


def test_tracking_off_and_other_ranks_record_nothing(
    start: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert isinstance(start(enabled=False), NullTracker)
    monkeypatch.setenv("RANK", "1")
    tracker = start()
    assert isinstance(tracker, NullTracker)
    tracker.log_metrics({"a": 1.0}, 0)
    assert tracker.flush()
    assert tracker.finish("FINISHED")
    assert list(tmp_path.iterdir()) == []
