"""Files for cron, systemd and Kubernetes, judged by what reads them."""

import json
import os
import re
import shutil
import subprocess
from datetime import UTC, datetime, timedelta
from itertools import islice
from pathlib import Path

import pytest
import yaml

from dqrm.pipelines.jobs.config import load_jobs
from dqrm.pipelines.jobs.export import crontab_fields, on_calendar

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

    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("kubectl is not installed")
    # Without a server, this one reads a file by the types of the API: it refuses wrong values and
    # drops what it does not know.
    for name, ours in trees.items():
        read = subprocess.run(
            [
                *(kubectl, "set", "image", "--local", "-o", "json", "-f", f"k8s/{name}.yaml"),
                "job=registry/dqrm:2",
            ],
            capture_output=True,
            text=True,
            check=False,
        )
        assert read.returncode == 0, read.stderr
        theirs = json.loads(read.stdout.replace("registry/dqrm:2", "registry/dqrm:1"))
        assert kept(ours, theirs) == ours


def kept(ours, theirs):
    """Those values of ours that are the same in theirs."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        return {key: kept(value, theirs[key]) for key, value in ours.items() if key in theirs}
    if isinstance(ours, list) and isinstance(theirs, list):
        return [kept(a, b) for a, b in zip(ours, theirs, strict=True)]
    return theirs


@pytest.mark.parametrize(
    ("job", "to", "message"),
    [
        ({"schedule": {"every": "7h"}}, "cron", "schedule.every: only parts of an hour"),
        ({"schedule": {"every": "30s"}}, "systemd", "schedule.every: only parts of an hour"),
        ({"missed": "all", "overlap": "queue"}, "k8s", "missed=all: k8s catches up on one"),
        ({}, "k8s", "needs --image"),
    ],
)
def test_what_a_scheduler_cannot_do_is_refused(dqrm, job, to, message):
    tree = {"schedule": {"every": "6h"}, "command": "echo x", **job}
    Path("jobs.yaml").write_text(json.dumps({"jobs": {"one": tree}}))
    done = dqrm("jobs", "export", "--to", to)
    assert done.exit_code == 2
    assert message in done.output


def test_the_command_of_a_cron_job_runs_as_it_stands(dqrm, tmp_path):
    tree = {"schedule": {"every": "6h"}, "command": "touch ran", "tracking": {"enabled": False}}
    Path("jobs.yaml").write_text(json.dumps({"jobs": {"one": tree}}))
    for to, extra in [("k8s", ("--image", "i", "--claim", "c")), ("cron", ())]:
        text = dqrm("jobs", "export", "--to", to, *extra).output
        if to == "k8s":
            pod = yaml.safe_load(text)["spec"]["jobTemplate"]["spec"]["template"]["spec"]
            words, folder = pod["containers"][0]["command"], tmp_path
            program = shutil.which(words[0])
            if program is None:
                continue
            command = [program, *words[1:]]
        else:
            command = ["sh", "-c", text.splitlines()[-1].split(" ", 5)[5]]
            folder = Path("/")
        Path("ran").unlink(missing_ok=True)
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert Path("ran").exists()
    assert datetime.now(UTC) - datetime.fromtimestamp(Path("ran").stat().st_mtime, UTC) < timedelta(
        hours=1
    )
