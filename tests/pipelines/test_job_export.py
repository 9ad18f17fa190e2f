"""Files for cron, systemd and Kubernetes, judged by what reads them."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path

import pytest
import yaml

from dqrm.pipelines.jobs.config import load_jobs
from dqrm.pipelines.jobs.crontab import crontab_fields
from dqrm.pipelines.jobs.export import on_calendar
from dqrm.pipelines.jobs.state import JobFolder

SCHEMAS = Path(__file__).parent / "schemas"
PROGRAMS = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])

SCHEDULES = {
    "nightly": {"cron": "30 2 * * *", "timezone": "Europe/Berlin"},
    "workdays": {"cron": "*/15 8-18/2 * jan-mar,dec 1-5", "timezone": "America/New_York"},
    "sundays": {"cron": "5,35 0 * * 7"},
    "monthly": {"cron": "@monthly", "timezone": "Asia/Kolkata"},
    "odd-days": {"cron": "0 12 1-31/2 */3 *"},
    "ten": {"every": "10m"},
    "six": {"every": "6h"},
    "daily": {"every": "1d"},
    "weekly": {"every": "7d"},
}
START = datetime(2026, 10, 20, 11, 7, tzinfo=UTC)


@pytest.fixture
def jobs():
    folder = Path("50% of it")
    folder.mkdir()
    os.chdir(folder)
    tree = {"jobs": {n: {"schedule": s, "command": "echo x"} for n, s in SCHEDULES.items()}}
    tree["jobs"]["workdays"] |= {"missed": "skip", "overlap": "queue"}
    Path("jobs.yaml").write_text(json.dumps(tree))
    return load_jobs(Path("jobs.yaml")).jobs


def test_lines_of_cron(jobs, dqrm):
    import croniter

    lines = dqrm("jobs", "export", "--to", "cron").output.splitlines()
    assert "CRON_TZ=America/New_York" in lines
    commands = [line for line in lines if line[0] in "0123456789*"]
    for line, (name, job) in zip(commands, jobs.items(), strict=True):
        fields = " ".join(line.split(" ", 5)[:5])
        assert fields == " ".join(crontab_fields(name, job))
        assert line.endswith(rf"{name} --file '{Path.cwd()}/jobs.yaml'".replace("%", r"\%"))
        # Winter: croniter runs twice in the hour that comes twice.
        start = datetime(2026, 11, 5, 11, 7, tzinfo=job.schedule.zone)
        times = croniter.croniter(fields, start, ret_type=datetime)
        theirs = [times.get_next().astimezone(UTC) for _ in range(12)]
        assert theirs == list(islice(job.schedule.after(start.astimezone(UTC)), 12)), name
    if crontab := shutil.which("crontab"):
        Path("lines").write_text("\n".join(lines) + "\n")
        subprocess.run([crontab, "-T", "lines"], check=True)


def test_units_of_systemd(jobs, dqrm, monkeypatch):
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("systemd-analyze is not installed")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://example.org/?a=%20$b")
    assert dqrm("jobs", "export", "--to", "systemd", "-o", "units").exit_code == 0
    units = sorted(map(str, Path("units").iterdir()))
    assert len(units) == 2 * len(jobs)
    verified = subprocess.run(
        [analyze, "verify", *units], capture_output=True, text=True, check=False
    )
    assert verified.returncode == 0, verified.stderr
    assert "units/" not in verified.stderr
    service = Path("units/dqrm-ten.service").read_text()
    assert "Environment=MLFLOW_TRACKING_URI=http://example.org/?a=%%20$b" in service
    assert "50%% of it" in service
    for name, job in jobs.items():
        shown = subprocess.run(
            [
                *(analyze, "calendar", "--iterations=12"),
                *(f"--base-time={START:%Y-%m-%d %H:%M:%S} UTC", on_calendar(name, job)),
            ],
            capture_output=True,
            text=True,
            check=True,
            env=os.environ | {"TZ": "UTC", "LC_ALL": "C"},
        ).stdout
        found = re.findall(r": \w{3} (\d{4}-\d\d-\d\d \d\d:\d\d:\d\d) UTC$", shown, re.MULTILINE)
        theirs = [datetime.fromisoformat(time).replace(tzinfo=UTC) for time in found]
        assert theirs == list(islice(job.schedule.after(START), len(theirs))), name
        assert len(theirs) >= 11


def test_cron_jobs_of_kubernetes(jobs, dqrm):
    call = ("jobs", "export", "--to", "k8s", "--image", "registry/dqrm:1", "--claim", "clicks")
    assert dqrm(*call, "-o", "k8s").exit_code == 0
    trees = {path.stem: yaml.safe_load(path.read_text()) for path in Path("k8s").iterdir()}
    assert set(trees) == {f"dqrm-{name}" for name in jobs}
    spec = trees["dqrm-workdays"]["spec"]
    assert spec["schedule"] == "*/15 8-18/2 * 1-3,12 1,2,3,4,5"
    assert (spec["concurrencyPolicy"], spec["startingDeadlineSeconds"]) == ("Allow", 300)
    assert list(yaml.safe_load_all(dqrm(*call).output)) == [trees[f"dqrm-{n}"] for n in jobs]

    check = validator("cronjob-batch-v1")
    for tree in trees.values():
        check.validate(tree)
    # The schema refuses what the API would drop.
    trees["dqrm-ten"]["spec"]["retries"] = 2
    assert not check.is_valid(trees["dqrm-ten"])


def validator(name):
    """Of a schema whose source stands in it."""
    import jsonschema

    schema = json.loads((SCHEMAS / f"{name}.json").read_text())
    return jsonschema.Draft7Validator(schema)


BIG = {
    "schedule": {"cron": "0 3 * * *", "timezone": "Europe/Berlin"},
    "command": "dqrm train --print-config data.path=clicks/{{ yesterday }}",
    "nodes": 2,
    "timeout": "6h",
    "retries": {"times": 2},
    "tracking": {"experiment": "clicks", "uri": "http://mlflow:5000"},
}


@pytest.mark.slow
def test_a_train_job_on_several_nodes(dqrm, tmp_path):
    Path("jobs.yaml").write_text(json.dumps({"jobs": {"big": BIG, "one": {**BIG, "nodes": 1}}}))
    for to in ("cron", "systemd"):
        done = dqrm("jobs", "export", "big", "--to", to)
        assert done.exit_code == 2
        assert "jobs.big.nodes=2: only Kubernetes starts it" in done.output
    assert "jobs.big.nodes=2: only Kubernetes" in dqrm("jobs", "run", "big").output
    place = ("--image", "registry/dqrm:1", "--claim", "clicks", "--date", "2026-03-01")
    text = dqrm("jobs", "export", "--to", "k8s", *place).output
    assert "# A TrainJob does not keep these settings of the job: retries." in text
    train, cron = yaml.safe_load_all(text)
    assert cron["kind"] == "CronJob"
    check = validator("trainjob-v1alpha1")
    check.validate(train)
    # Its rule for names, with the five letters that take the place of generateName's end.
    rule = next(r["rule"] for r in check.schema["x-kubernetes-validations"] if "match" in r["rule"])
    name = train["metadata"]["generateName"] + "x7f2k"
    assert re.match(re.search("'(.*)'", rule)[1], name)
    spec = train["spec"]
    assert spec["runtimeRef"] == {"name": "torch-distributed"}
    assert spec["activeDeadlineSeconds"] == 6 * 3600
    trainer = spec["trainer"]
    assert (trainer["numNodes"], trainer["numProcPerNode"]) == (2, 1)
    variables = {entry["name"]: entry["value"] for entry in trainer["env"]}
    assert variables["MLFLOW_TRACKING_URI"] == "http://mlflow:5000"
    assert variables["MLFLOW_EXPERIMENT_NAME"] == "clicks"
    # Two pods as they stand, with what the runtime tells torchrun, and the volume's folder as ours.
    words = [*trainer["command"], *trainer["args"]]
    assert words[3:6] == ["/project", "torchrun", "-m"]
    words[3] = str(tmp_path)
    # What torchrun is, for environments that see torch without having its programs.
    Path("torchrun").write_text(f'#!/bin/sh\nexec {sys.executable} -m torch.distributed.run "$@"\n')
    Path("torchrun").chmod(0o755)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pods = [
        subprocess.Popen(
            words,
            cwd="/",
            env=os.environ
            | {"PATH": f"{PROGRAMS}:{tmp_path}", **variables}
            | {"PET_NNODES": "2", "PET_NPROC_PER_NODE": "1", "PET_NODE_RANK": str(rank)}
            | {"PET_MASTER_ADDR": "127.0.0.1", "PET_MASTER_PORT": str(port)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [pod.communicate(timeout=120)[0] for pod in pods]
    finally:
        for pod in pods:
            pod.kill()
            pod.wait()
    assert [pod.returncode for pod in pods] == [0, 0], outputs
    assert all("path: clicks/2026-02-28" in output for output in outputs)


@pytest.mark.parametrize(
    ("job", "to", "message"),
    [
        ({"schedule": {"every": "7h"}}, "cron", "schedule.every: only parts of an hour"),
        ({"schedule": {"every": "30s"}}, "systemd", "schedule.every: only parts of an hour"),
        ({"missed": "all", "overlap": "queue"}, "k8s", "missed=all: k8s catches up on one"),
        ({}, "k8s", "needs --image"),
        ({"nodes": 2}, "k8s", "nodes=2: only a command `dqrm train`"),
        ({"processes": 2}, "k8s", "processes=2: is of several nodes; for one machine write"),
    ],
)
def test_what_a_scheduler_cannot_do_is_refused(dqrm, job, to, message):
    tree = {"schedule": {"every": "6h"}, "command": "echo x", **job}
    Path("jobs.yaml").write_text(json.dumps({"jobs": {"one": tree}}))
    done = dqrm("jobs", "export", "--to", to)
    assert done.exit_code == 2
    assert message in done.output


def test_the_command_of_a_cron_job_runs_as_it_stands(dqrm, tmp_path, monkeypatch):
    """In the folder of the volume; with its words, folder and variables alone."""
    import sqlite3

    store = f"sqlite:///{tmp_path / 'runs.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    tree = {"schedule": {"every": "6h"}, "command": "touch ran"}
    tree["tracking"] = {"finish_seconds": 100}
    Path("jobs.yaml").write_text(json.dumps({"jobs": {"one": tree}}))
    text = dqrm("jobs", "export", "--to", "k8s", "--image", "i", "--claim", "c").output
    cron_line = dqrm("jobs", "export", "--to", "cron").output.splitlines()[-1]
    monkeypatch.delenv("MLFLOW_TRACKING_URI")

    pod = yaml.safe_load(text)["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    (mount,) = container["volumeMounts"]
    assert container["workingDir"] == mount["mountPath"] == "/project"
    words = [*container["command"], *container.get("args", [])]
    given = {entry["name"]: entry["value"] for entry in container["env"]}
    done = subprocess.run(
        words,
        cwd=tmp_path,
        env={"PATH": PROGRAMS, "HOME": str(tmp_path), **given},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert Path("ran").exists()
    history = dqrm("jobs", "history", "one").output
    assert "succeeded" in history
    (event,) = JobFolder(tmp_path / "jobs" / "one").read().events
    assert (event.outcome, event.tries) == ("succeeded", 1)
    with sqlite3.connect(tmp_path / "runs.db") as database:
        # Not by its id: a slow store answers after the job knows how it went.
        assert database.execute("select status from runs").fetchall() == [("FINISHED",)]

    # Cron's line: from any folder, through a shell.
    tree["tracking"] = {"enabled": False}
    Path("jobs.yaml").write_text(json.dumps({"jobs": {"one": tree}}))
    Path("ran").unlink()
    command = cron_line.split(" ", 5)[5]
    done = subprocess.run(
        ["sh", "-c", command], cwd="/", capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert Path("ran").exists()
