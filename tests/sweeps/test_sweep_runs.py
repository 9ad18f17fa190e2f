"""Sweeps as a user runs them: killed, resumed, nested in MLflow, with one test at the end."""

import csv
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command_line import clean_environment, run_dqrm

from dqrm.config import RunConfig
from dqrm.configuration import load

WAIT_SECONDS = 300
TRIALS = 7


@pytest.fixture(autouse=True)
def a_clean_environment(monkeypatch, tmp_path):
    clean_environment(monkeypatch, tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def search(data, *more):
    return (
        *("sweep", "--trials", TRIALS, f"data.path={data}", "train.epochs=2", "train.threads=1"),
        *("model.bottom_mlp=[16]", "model.embedding_dim=4", "data.batch_size=64"),
        *("optim.lr=log:1e-3..1", "quant.bits=4,8", "model.top_mlp=[16],[32,16]"),
        *("train.patience=1..2e0", *more),
    )


def trials(name):
    with Path(f"sweeps/{name}/trials.csv").open() as file:
        return list(csv.DictReader(file))


def killed_when(condition, *arguments):
    """Run a command line as a process, and kill it as soon as ``condition`` holds."""
    process = subprocess.Popen(
        [sys.executable, "-m", "dqrm", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        deadline = time.monotonic() + WAIT_SECONDS
        while not condition():
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.002)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == -signal.SIGKILL


@pytest.mark.slow
def test_a_sweep_killed_twice_is_the_sweep_that_was_not(clicks_data):
    done = run_dqrm(*search(clicks_data, "--name", "whole", "tracking.enabled=false"))
    assert done.exit_code == 0, done.output
    whole = trials("whole")
    assert [row["trial"] for row in whole] == [str(n) for n in range(TRIALS)]
    outcomes = {row["outcome"] for row in whole}
    assert outcomes == {"finished", "pruned"}

    # Once before the first checkpoint of a trial, once after.
    folder = Path("sweeps/cut/trials")
    killed_when(
        (folder / "cut-001/config.yaml").is_file,
        *search(clicks_data, "--name", "cut", "tracking.system_metrics=false"),
    )
    assert not list(folder.glob("cut-001/checkpoints/step-*"))
    resume = ("sweep", "--resume", "sweeps/cut")
    killed_when(lambda: list(folder.glob("cut-004/checkpoints/step-*")), *resume)
    refused = run_dqrm(*resume, "quant.bits=4")
    assert refused.exit_code == 2
    assert "of the sweep that goes on" in refused.output
    done = run_dqrm(*resume)
    assert done.exit_code == 0, done.output
    assert trials("cut") == whole

    values = {row["trial"]: float(row["val_auc"]) for row in whole if row["outcome"] == "finished"}
    best = max(values, key=values.get)
    name = f"cut-{int(best):03d}"
    summary = json.loads(Path("sweeps/cut/summary.json").read_text())
    tested = json.loads((folder / name / "summary.json").read_text())
    assert summary["test"] == tested["test"]
    assert f"its test        AUC {tested['test']['auc']:.4f}" in done.output
    assert "dqrm train --config sweeps/cut/best.yaml" in done.output
    assert [path.parent.name for path in folder.glob("*/summary.json")] == [name]
    row = whole[int(best)]
    config = load(RunConfig, "sweeps/cut/best.yaml")
    assert config.optim.lr == float(row["optim.lr"])
    assert (config.quant.bits, config.name) == (int(row["quant.bits"]), None)
    plots = Path("sweeps/cut/plots").iterdir()
    assert sorted(path.name for path in plots) == ["history.png", "slices.png"]

    from dqrm.tracking.quiet import import_mlflow

    client = import_mlflow().MlflowClient(f"sqlite:///{Path('mlflow.db').absolute()}")
    (experiment,) = (e for e in client.search_experiments() if e.name == "dqrm")
    runs = client.search_runs([experiment.experiment_id])
    assert {run.info.status for run in runs} == {"FINISHED"}
    (parent,) = (run for run in runs if run.info.run_name == "cut")
    children = {run.info.run_name: run for run in runs if run is not parent}
    assert sorted(children) == [f"cut-{n:03d}" for n in range(TRIALS)]
    assert {c.data.tags["mlflow.parentRunId"] for c in children.values()} == {parent.info.run_id}
    assert [n for n, run in children.items() if "test/auc" in run.data.metrics] == [name]
    stopped = {n for n, run in children.items() if "dqrm.stopped" in run.data.tags}
    assert stopped == {f"cut-{int(r['trial']):03d}" for r in whole if r["outcome"] == "pruned"}
    assert parent.data.metrics["best/val_auc"] == pytest.approx(values[best])
    shares = [v for key, v in parent.data.metrics.items() if key.startswith("importance/")]
    assert sum(shares) == pytest.approx(1)
    artifacts = {file.path for file in client.list_artifacts(parent.info.run_id)}
    assert {"best.yaml", "trials.csv", "summary.json", "plots"} <= artifacts

    # More trials; those there are stay as they are.
    more = ("sweep", "--resume", "sweeps/whole", "--trials", TRIALS + 1)
    done = run_dqrm(*more, "--timeout", "1h")
    assert done.exit_code == 0, done.output
    assert trials("whole")[:TRIALS] == whole
    assert len(trials("whole")) == TRIALS + 1


def test_faults_and_the_dry_run_leave_nothing(clicks_data, monkeypatch):
    fault = run_dqrm(*search(clicks_data, "optim.momentum=0..1"))
    assert fault.exit_code == 2
    assert "optim.momentum: unknown key" in fault.output
    shown = run_dqrm(*search(clicks_data, "--dry-run"))
    assert shown.exit_code == 0, shown.output
    assert f"{TRIALS} trials over" in shown.output
    assert "log:1e-3..1" in shown.output
    assert not Path("sweeps").exists()
    assert "no sweep" in run_dqrm("sweep", "--resume", "nowhere").output
    torchrun = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in torchrun.items():
        monkeypatch.setenv(name, value)
    assert "start the sweep without torchrun" in run_dqrm(*search(clicks_data)).output


def test_trials_that_fail_are_told(clicks_data):
    diverging = ("optim.lr=1e30..1e35", "optim.name=sgd", "tracking.enabled=false")
    small = ("train.epochs=1", "train.threads=1", "model.embedding_dim=4", "quant.bits=32")
    bad = ("sweep", "-n", "bad", "--trials", 2, f"data.path={clicks_data}")
    done = run_dqrm(*bad, *small, *diverging)
    assert done.exit_code == 1
    assert "none of 2 trials trained to its end" in done.output
    assert [row["outcome"] for row in trials("bad")] == ["failed"] * 2
