"""A week of daily retraining: the server killed, a day of bad data, days on which nothing ran."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from datetime import UTC, date, datetime
from itertools import pairwise
from pathlib import Path

import pandas as pd
import psutil
import pytest

from dqrm.data.days import synthesize_days
from dqrm.data.synth import SynthConfig
from dqrm.pipelines.jobs.clock import VARIABLE
from dqrm.pipelines.jobs.config import load_jobs
from dqrm.pipelines.jobs.processes import MARK
from dqrm.pipelines.jobs.server import decide
from dqrm.pipelines.jobs.state import JobFolder

WAIT_SECONDS = 900
"""After which something has not happened, also on a machine that is busy with other things."""

JOBS = {
    "jobs": {
        "retrain": {
            "schedule": {"cron": "0 3 2-8 3 *"},
            "pipeline": "daily.yaml",
            "overrides": [
                "stages.prepare.train=[days/{{ date - 2 days }}.parquet]",
                "stages.prepare.test=[days/{{ yesterday }}.parquet]",
            ],
            "overlap": "queue",
            "missed": "once",
            "grace": "20h",
            "tracking": {"system_metrics": False},
        }
    }
}


@pytest.fixture
def serve():
    """Start a server; whatever is left of them and their runs in the end is killed."""
    started = []

    def start(clock):
        process = subprocess.Popen(
            [sys.executable, "-m", "dqrm", "jobs", "serve"],
            env={**os.environ, VARIABLE: clock},
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        kill(process)
    kill_runs()


def kill_runs():
    """Kill every process of a run of this folder; return how many there were."""
    here, count = str(Path.cwd()), 0
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            line = process.cmdline()
            runner = "run" in line and f"{here}/jobs.yaml" in line
            if runner or process.environ().get(MARK, "").startswith(here):
                process.kill()
                count += 1
    return count


def state():
    return JobFolder(Path("jobs/retrain")).read()


def wait_until(condition, what):
    deadline = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"{what}: {state()}"
        time.sleep(0.1)


def clock_at(moment, day_seconds=86400.0):
    """A clock that shows ``moment`` now, with days of so many seconds of the machine."""
    return f"{moment}+00:00 @ {time.time()} x {86400 / day_seconds}"


def done():
    return len([event for event in state().events if event.run])


def kill(process):
    process.kill()
    process.wait()


def output(day):
    return Path(f"jobs/retrain/runs/202603{day:02d}T030000Z/output/daily")


@pytest.mark.slow
def test_a_week(serve, daily_file):
    synthesize_days(Path("days"), SynthConfig(scale=0.0002, rows=18_000), 9, date(2026, 2, 28))
    daily_file("absent", "absent-too")
    Path("jobs.yaml").write_text(json.dumps(JOBS))

    # On Sunday the job is met for the first time: earlier days are none of its business.
    job = load_jobs(Path("jobs.yaml")).jobs["retrain"]
    with JobFolder(Path("jobs/retrain")).changing() as met:
        decide(job, met, datetime(2026, 3, 1, 12, tzinfo=UTC), busy=False)

    # Monday, at the machine's pace; the server dies when all is done. How long a run takes here
    # is how long a day is from now on.
    server = serve(clock_at("2026-03-02T02:59:59"))
    wait_until(lambda: len(state().events) == 1, "Monday is done")
    kill(server)
    day_seconds = max(6.0, state().events[0].seconds)
    # Sunday's rows, on which Tuesday's model trains, get labels that mean nothing.
    bad = Path("days/2026-03-01.parquet")
    frame = pd.read_parquet(bad)
    frame["label"] = 1 - frame["label"].sample(frac=1, random_state=0).to_numpy()
    frame.to_parquet(bad)

    # While Tuesday's run trains, the server and all of it are killed.
    server = serve(clock_at("2026-03-03T02:00:00", day_seconds))
    trained = "runs/train-*/checkpoints/step-*/state.json"
    wait_until(lambda: list(output(3).glob(trained)), "Tuesday's run trains")
    kill(server)
    assert kill_runs() > 0
    assert state().running.scheduled[8:10] == "03"
    decided = [moment[8:10] for moment in state().pending]
    assert decided[0] == "03", "what was begun is still to be done"

    # The machine is off until the second day after those decided on.
    last = int(decided[-1])
    assert last <= 6, "the week is long enough for a kill, a missed day and the rest"
    clock = clock_at(f"2026-03-{last + 2:02d}T03:30:00", day_seconds)
    server = serve(clock)
    wait_until(lambda: done() >= 2, "Tuesday is done")
    # This time only the server dies: the run goes on, and the next server leaves it alone.
    wait_until(lambda: state().running is not None, "a run goes on")
    left = state().running
    kill(server)
    server = serve(clock)
    wait_until(lambda: len(state().events) == 7, "the week is over")
    server.send_signal(signal.SIGTERM)
    assert server.wait(WAIT_SECONDS) == 128 + signal.SIGTERM

    check_history(f"{last + 1:02d}")
    check_champion(left)


def check_history(missed):
    """Every day once, in order of the schedule where it ran; one was missed."""
    events = {event.scheduled[8:10]: event for event in state().events}
    assert sorted(events) == [f"{day:02d}" for day in range(2, 9)]
    assert len(state().events) == 7
    assert (state().pending, state().running) == ([], None)
    expected = {**dict.fromkeys(events, "succeeded"), "03": "gate not met", missed: "missed"}
    assert {day: event.outcome for day, event in events.items()} == expected
    ran = [event.run for event in state().events if event.run]
    assert ran == sorted(ran)


def check_champion(left):
    """MLflow says the same, and the champion is the last model that was good enough."""
    events = {event.scheduled[8:10]: event for event in state().events if event.run}
    starts = {day: 2 if day == "03" else 1 for day in events}
    from dqrm.tracking.quiet import import_mlflow

    client = import_mlflow().MlflowClient(f"sqlite:///{Path('mlflow.db').absolute()}")
    experiment = client.get_experiment_by_name("dqrm")
    runs = client.search_runs([experiment.experiment_id], max_results=1000)
    of_jobs = {
        run.data.tags["dqrm.job.date"][8:]: run for run in runs if "dqrm.job" in run.data.tags
    }
    assert {day: run.data.tags["dqrm.job.outcome"] for day, run in of_jobs.items()} == {
        day: events[day].outcome for day in starts
    }
    assert {day: int(run.data.tags["dqrm.job.starts"]) for day, run in of_jobs.items()} == starts
    assert left.starts == 1
    trained_runs = [run for run in runs if run.data.tags.get("stage") == "train"]
    assert len(trained_runs) == len(starts), "one for each day, also where it was cut off"
    promoted = sorted(set(starts) - {"03"})
    versions = sorted(client.search_model_versions("name = 'clicks'"), key=lambda v: int(v.version))
    assert [int(version.version) for version in versions] == list(range(1, len(promoted) + 1))
    place = re.compile(r"/retrain/runs/202603(\d\d)T")
    day_of = {
        run.info.run_id: place.search(run.data.params["data.path"])[1] for run in trained_runs
    }
    assert [day_of[version.run_id] for version in versions] == promoted
    aliases = client.get_registered_model("clicks").aliases
    count = len(versions)
    assert {a: int(v) for a, v in aliases.items()} == {"champion": count, "previous": count - 1}
    # Each began with the champion of its time, and tables only ever grew.
    sizes = []
    for day in promoted:
        folder = output(int(day))
        promotion = json.loads((folder / "stages/promote/promotion.json").read_text())
        references = json.loads((folder / "references.json").read_text())
        over = promotion["dqrm.promotion.over"]
        assert references["train"]["references"] == {"warm_start": over}
        assert over == (str(promoted.index(day)) if day != promoted[0] else "none")
        manifest = json.loads((folder / "stages/prepare/data/dataset.json").read_text())
        sizes.append([table["num_rows"] for table in manifest["tables"]])
    for before, after in pairwise(sizes):
        assert all(old <= new for old, new in zip(before, after, strict=True))
        assert sum(before) < sum(after)
