"""Runs of jobs as real processes: outcomes, time-outs, retries, gates, hooks, kills."""

import contextlib
import http.server
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from datetime import UTC, datetime
from pathlib import Path

import psutil
import pytest

from dqrm.pipelines.jobs.clock import VARIABLE
from dqrm.pipelines.jobs.state import JobFolder

WAIT_SECONDS = 60
UNTRACKED = {"tracking": {"enabled": False}}


@pytest.fixture
def processes():
    """Start command lines; whatever is left of them in the end is killed."""
    started = []

    def start(*arguments, **variables):
        process = subprocess.Popen(
            [sys.executable, "-m", "dqrm", "jobs", *map(str, arguments)],
            env={**os.environ, **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()


def write_jobs(path=Path("jobs.yaml"), **jobs):
    schedule = {"schedule": {"cron": "0 0 * * *"}}
    tree = {"jobs": {name: schedule | UNTRACKED | job for name, job in jobs.items()}}
    temporary = path.with_name("jobs.new")
    temporary.write_text(json.dumps(tree))
    temporary.rename(path)


def python(code):
    return [sys.executable, "-c", textwrap.dedent(code)]


def job_folder(name):
    return JobFolder(Path("jobs") / name)


def outcomes(name):
    return [event.outcome for event in job_folder(name).read().events]


def wait_until(condition, what):
    deadline = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def test_outcomes_exit_codes_and_logs(dqrm):
    once = """
        import pathlib, sys
        tried = pathlib.Path('tried')
        tried.write_text(tried.read_text() + 'x' if tried.exists() else 'x')
        print('tries', tried.read_text())
        sys.exit(len(tried.read_text()) < 3)
        """
    sleep = "import signal, time\nsignal.signal(15, signal.SIG_DFL)\ntime.sleep(600)"
    tell = "import sys; open('told', 'w').write(sys.stdin.read())"
    fail = {"command": "false", "on_failure": {"command": python(tell)}}
    write_jobs(
        good={"command": python("print('{{ yesterday }}')")},
        again={"command": python(once), "retries": {"times": 2, "wait": "1s"}},
        bad=fail,
        slow={"command": python(sleep), "timeout": "1s"},
        absent={"command": "no-such-program"},
        gated={"command": python("raise SystemExit(3)"), "retries": {"times": 5}},
        deaf={**fail, "on_failure": {"command": python("raise SystemExit('nobody home')")}},
    )
    assert dqrm("jobs", "validate").exit_code == 0
    done = dqrm("jobs", "run", "good", "--date", "2026-03-01")
    assert done.exit_code == 0, done.output
    assert "\n2026-02-28\n" in dqrm("jobs", "logs", "good").output
    assert dqrm("jobs", "run", "again").exit_code == 0
    event = job_folder("again").read().events[0]
    assert event.tries == 3
    assert [how.partition(" after")[0] for how in event.attempts] == ["exit code 1"] * 2 + [
        "exit code 0"
    ]
    assert "try 2: exit code 1 after" in dqrm("jobs", "history", "again").output
    log = dqrm("jobs", "logs", "again").output
    assert [line for line in log.splitlines() if line.startswith("tries")][-1] == "tries xxx"
    for name, code, outcome in [
        ("bad", 1, "failed"),
        ("slow", 1, "timed out"),
        ("absent", 1, "failed"),
        ("gated", 3, "gate not met"),
        ("deaf", 1, "failed"),
    ]:
        assert dqrm("jobs", "run", name).exit_code == code, name
        assert outcomes(name) == [outcome], name
    told = json.loads(Path("told").read_text())
    assert (told["job"], told["outcome"], told["tries"]) == ("bad", "failed", 1)
    assert Path(told["log"]).is_file()
    assert job_folder("gated").read().events[0].tries == 1
    assert "the hook failed: exit code 1 nobody home" in dqrm("jobs", "history", "deaf").output
    assert "failed" in dqrm("jobs", "history", "bad").output
    listed = dqrm("jobs", "list").output
    assert "gate not met" in listed
    assert "there is no job godo" in dqrm("jobs", "run", "godo").output


def alive(pid):
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


def test_the_time_out_takes_the_whole_process_group(dqrm):
    child = "import time; open('child', 'w').write(str(__import__('os').getpid())); time.sleep(600)"
    code = f"""
        import subprocess, sys, time
        subprocess.Popen([sys.executable, '-c', {child!r}])
        time.sleep(600)
        """
    write_jobs(tree={"command": python(code), "timeout": "3s"})
    assert dqrm("jobs", "run", "tree").exit_code == 1
    assert outcomes("tree") == ["timed out"]
    wait_until(lambda: not alive(int(Path("child").read_text())), "the child is dead")


def test_the_command_goes_with_its_runner(processes):
    """Killed, a runner can do nothing; all that its command started goes within moments."""
    child = (
        "open('child', 'w').write(str(__import__('os').getpid())); __import__('time').sleep(600)"
    )
    code = f"""
        import os, pathlib, subprocess, sys, time
        # As torchrun does: a session of its own.
        subprocess.Popen([sys.executable, '-c', {child!r}], start_new_session=True)
        pathlib.Path('parent').write_text(str(os.getpid()))
        time.sleep(600)
        """
    write_jobs(one={"command": python(code)})
    runner = processes("run", "one")
    wait_until(lambda: Path("child").is_file() and Path("child").read_text(), "all have begun")
    started = [int(Path(name).read_text()) for name in ("parent", "child")]
    leashes = [p.pid for p in psutil.Process(runner.pid).children()]
    assert all(alive(pid) for pid in started)
    runner.kill()
    runner.wait()
    wait_until(lambda: not any(map(alive, [*started, *leashes])), "they are gone")


def test_old_logs_go_but_that_of_the_last_failure(dqrm):
    code = "import os, sys; sys.exit(os.environ['DQRM_JOB_DATE'] == '2026-03-02')"
    write_jobs(one={"command": python(code), "logs": {"keep": 2}})
    for day in range(1, 6):
        dqrm("jobs", "run", "one", "--date", f"2026-03-0{day}")
    logs = sorted(path.name[:8] for path in Path("jobs/one/logs").iterdir())
    assert logs == ["20260302", "20260304", "20260305"]
    assert outcomes("one").count("failed") == 1


WAITING = """
    import pathlib, time
    with open('began', 'a') as file: file.write('x')
    while not pathlib.Path('go').exists(): time.sleep(0.05)
    with open('done', 'a') as file: file.write('x')
    """


def test_one_at_a_time_and_a_killed_run_frees_the_job(dqrm, processes):
    write_jobs(
        one={"command": python(WAITING)},
        two={"command": python(WAITING), "overlap": "queue"},
    )
    first = processes("run", "one", "--date", "2026-03-01")
    wait_until(Path("began").exists, "it begins")
    assert "running" in dqrm("jobs", "list").output
    skipped = dqrm("jobs", "run", "one", "--date", "2026-03-02")
    assert (skipped.exit_code, outcomes("one")) == (0, [])
    assert "is left out" in skipped.output
    # Killed: what it left running goes with the next run, which is the same one.
    first.kill()
    first.wait()
    assert "cut off" in dqrm("jobs", "list").output
    second = processes("run", "one", "--date", "2026-03-01")
    wait_until(lambda: Path("began").read_text() == "xx", "it begins again")
    Path("go").touch()
    assert second.wait(WAIT_SECONDS) == 0
    assert Path("done").read_text() == "x"
    (event,) = job_folder("one").read().events
    assert (event.outcome, event.run) == ("succeeded", "20260301T000000Z")
    # Done once more, it is another run.
    assert dqrm("jobs", "run", "one", "--date", "2026-03-01").exit_code == 0
    assert job_folder("one").read().events[-1].run == "20260301T000000Z.2"

    for file in ("go", "began", "done"):
        Path(file).unlink()
    waiting = [processes("run", "two", "--date", f"2026-03-0{n}") for n in (1, 2)]
    wait_until(Path("began").exists, "one of them begins")
    Path("go").touch()
    assert [process.wait(WAIT_SECONDS) for process in waiting] == [0, 0]
    assert outcomes("two") == ["succeeded"] * 2


def test_a_run_outlives_its_server_and_is_begun_again_when_it_dies(processes):
    write_jobs(one={"command": python(WAITING), "grace": "100d", "overlap": "queue"})
    clock = rehearsal(86400)
    server = processes("serve", **clock)
    wait_until(Path("began").exists, "it begins")
    server.kill()
    server.wait()
    assert job_folder("one").held(), "the run goes on"
    server = processes("serve", **clock)
    first = job_folder("one").read().pending[0]
    wait_until(lambda: len(job_folder("one").read().pending) > 4, "the new server counts days")
    assert Path("began").read_text() == "x", "and does not begin it a second time"
    # Both die: nothing but the state is left.
    server.kill()
    server.wait()
    for process in psutil.process_iter():
        if {"run", str(Path.cwd() / "jobs.yaml")} <= set(command_line(process)):
            process.kill()
    wait_until(lambda: not job_folder("one").held(), "it is cut off")
    server = processes("serve", **clock)
    wait_until(lambda: Path("began").read_text() == "xx", "it is begun again")
    state = job_folder("one").read()
    assert (state.running.scheduled, state.running.starts) == (first, 2)
    # Asked to stop, it is interrupted, and the next server goes on.
    server.terminate()
    assert server.wait(WAIT_SECONDS) == 128 + signal.SIGTERM
    state = job_folder("one").read()
    assert (state.running, state.events, state.pending[0]) == (None, [], first)
    Path("go").touch()
    processes("serve", **clock)
    wait_until(lambda: len(days("one")) >= 3, "it is done, and the next ones")
    assert [day for day, _ in days("one")[:3]] == [moment[5:10] for moment in state.pending[:3]]


def command_line(process):
    with contextlib.suppress(psutil.Error):
        return process.cmdline()
    return []


def test_a_signal_interrupts(processes):
    write_jobs(one={"command": python(WAITING)})
    run = processes("run", "one")
    wait_until(Path("began").exists, "it begins")
    run.terminate()
    assert run.wait(WAIT_SECONDS) == 128 + signal.SIGTERM
    assert outcomes("one") == ["interrupted"]


@pytest.fixture
def webhook():
    """An address, and what was posted to it; the first post is answered with an error."""
    posts = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            posts.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(503 if len(posts) == 1 else 204)
            self.end_headers()

        def log_message(self, *arguments):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/", posts
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.slow
def test_one_mlflow_run_with_gate_and_webhook(dqrm, webhook, tmp_path, monkeypatch):
    address, posts = webhook
    base = tmp_path / "project"
    base.mkdir()
    measure = """
        import mlflow
        with mlflow.start_run():
            mlflow.log_metric('auc', 0.75)
        """
    job = {
        "on_failure": {"webhook": address},
        "tracking": {"experiment": "clicks"},
        "gate": {"metric": "auc", "at_least": 0.8},
    }
    file = base / "jobs.yaml"
    write_jobs(file, nightly={**job, "command": python(measure)})
    # From any folder, as schedulers do.
    call = ("jobs", "run", "nightly", "-f", file, "--date", "2026-03-01")
    done = dqrm(*call)
    assert done.exit_code == 3, done.output

    from dqrm.tracking.quiet import import_mlflow

    client = import_mlflow().MlflowClient(f"sqlite:///{base / 'mlflow.db'}")

    def recorded():
        experiment = client.get_experiment_by_name("clicks")
        (run,) = client.search_runs([experiment.experiment_id])
        return run

    run = recorded()
    assert run.info.status == "FAILED"
    tags = run.data.tags
    assert (tags["dqrm.job"], tags["dqrm.job.outcome"]) == ("nightly", "gate not met")
    assert tags["dqrm.job.scheduled"] == "2026-03-01T00:00:00+00:00"
    assert run.data.metrics["auc"] == 0.75
    (log,) = client.list_artifacts(run.info.run_id, "job")
    assert log.path == "job/20260301T000000Z.log"
    # The error was not the last word.
    assert [post["mlflow_run_id"] for post in posts] == [run.info.run_id] * 2
    assert run.info.run_id in dqrm("jobs", "history", "nightly", "-f", file).output

    # Tried again for the same day, it is the same run.
    write_jobs(file, nightly={**job, "command": "true", "gate": {"metric": "auc", "at_most": 0.8}})
    done = dqrm(*call)
    assert done.exit_code == 0, done.output
    run = recorded()
    assert (run.info.status, run.data.tags["dqrm.job.outcome"]) == ("FINISHED", "succeeded")
    assert len(posts) == 2


PIPELINE = """\
threads: 1
stages:
  - stage: train
    settings:
      data: {{path: {data}, batch_size: 64}}
      model: {{embedding_dim: 8, bottom_mlp: [16], top_mlp: [16]}}
      train: {{epochs: 1}}
      checkpoint: {{every_steps: 20}}
  - stage: report
"""


@pytest.mark.slow
def test_a_pipeline_cut_off_goes_on_in_the_same_mlflow_run(clicks_data, dqrm, processes):
    Path("clicks.yaml").write_text(PIPELINE.format(data=clicks_data.parent / "day"))
    (clicks_data.parent / "day-2026-02-28").symlink_to(clicks_data)
    job = {
        "pipeline": "clicks.yaml",
        "overrides": [
            f"stages.train.settings.data.path={clicks_data.parent}/day-{{{{ yesterday }}}}"
        ],
        "tracking": {"system_metrics": False, "tags": {"team": "ads"}},
        "gate": {"metric": "train/test/auc", "at_least": 0.4},
    }
    write_jobs(nightly=job)
    call = ("run", "nightly", "--date", "2026-03-01")
    run = processes(*call)
    output = Path("jobs/nightly/runs/20260301T000000Z/output/clicks")
    wait_until(lambda: list(output.glob("runs/train-*/checkpoints/step-*/state.json")), "it trains")
    run.kill()
    run.wait()
    done = dqrm("jobs", *call)
    assert done.exit_code == 0, done.output + dqrm("jobs", "logs", "nightly").output
    assert (output / "stages/report/report.txt").is_file()

    from dqrm.tracking.quiet import import_mlflow

    client = import_mlflow().MlflowClient(f"sqlite:///{Path('mlflow.db').absolute()}")
    (experiment,) = (e for e in client.search_experiments() if e.name == "dqrm")
    runs = client.search_runs([experiment.experiment_id])
    (parent,) = (run for run in runs if "stage" not in run.data.tags)
    assert parent.data.tags["dqrm.job"] == "nightly"
    assert parent.data.tags["dqrm.job.starts"] == "2"
    assert parent.info.status == "FINISHED"
    stages = {run.data.tags["stage"]: run for run in runs if "stage" in run.data.tags}
    assert sorted(stages) == ["report", "train"]
    assert {r.data.tags["mlflow.parentRunId"] for r in stages.values()} == {parent.info.run_id}


def rehearsal(speed):
    return {VARIABLE: f"2026-03-01T12:00:00+00:00 @ {time.time()} x {speed}"}


def days(name):
    events = job_folder(name).read().events
    return [(event.scheduled[5:10], event.outcome) for event in events]


@pytest.mark.slow
def test_a_week_with_kills_of_server_and_runs(processes):
    """Seven days of half a second to some: each day is run once, whatever is killed."""
    note = """
        import os, sys
        with open(sys.argv[1], 'a') as file: file.write(os.environ['DQRM_JOB_DATE'] + '\\n')
        """
    daily = {"command": [*python(note), "daily"], "missed": "all", "overlap": "queue"}
    write_jobs(
        daily=daily,
        latest={"command": [*python(note), "latest"], "grace": "20h"},
        paused={"command": [*python(note), "paused"]},
    )
    clock = rehearsal(86400 / 2)
    assert processes("pause", "paused").wait(WAIT_SECONDS) == 0
    server = processes("serve", **clock)
    wait_until(lambda: len(days("daily")) >= 2, "two days have passed")
    server.kill()
    server.wait()
    seen = len(days("latest"))
    time.sleep(5)  # two days that nobody sees
    # A second server of the same file is refused; a run that was cut off is done again.
    server = processes("serve", **clock)
    wait_until((Path("jobs") / "serve.lock").exists, "it serves")
    wait_until(lambda: len(days("daily")) >= 5, "it has caught up")
    second = processes("serve", **clock)
    assert second.wait(WAIT_SECONDS) == 2
    assert "another server" in second.communicate()[0]
    # A fault in the file stops nothing that was decided; a new job is found.
    Path("jobs.yaml").write_text("jobs: [")
    time.sleep(1.5)
    write_jobs(daily=daily, new={"command": [*python(note), "new"]})
    wait_until(lambda: len(days("new")) >= 1, "the new job runs")
    server.terminate()
    assert server.wait(WAIT_SECONDS) == 128 + signal.SIGTERM
    told = server.communicate()[0]
    assert "nothing is started until this is mended" in told

    history = days("daily")
    dates = [day for day, _ in history]
    assert dates == sorted(set(dates)), "each day once, in order"
    span = [datetime(2026, int(d[:2]), int(d[3:]), tzinfo=UTC).toordinal() for d in dates]
    assert span == list(range(span[0], span[0] + len(span))), "and none is lost"
    noted = Path("daily").read_text().split()
    assert noted == [f"2026-{day}" for day, outcome in history if outcome == "succeeded"]
    assert all(outcome in ("succeeded", "interrupted") for _, outcome in history)
    missed = [outcome for _, outcome in days("latest")[seen:]]
    assert "missed" in missed
    assert days("paused") == []
    assert not Path("paused").exists()
