"""A recommender through a pipeline: the figures of `dqrm train`, kills, plans, nested runs."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from killing import kill_once_written
from safetensors.torch import load_file

from dqrm.comparison.folders import read_folder
from dqrm.pipelines.config import load_pipeline
from dqrm.pipelines.runner import run_pipeline
from dqrm.tracking.config import TrackingConfig
from dqrm.training.run import train
from dqrm.training.saved import evaluate_saved

SECONDS = 180

PIPELINE = """\
tracking: {{system_metrics: false, flush_seconds: 0.2}}
threads: 1
stages:
  - stage: train
    settings:
      data: {{path: {data}, batch_size: 64}}
      model: {{embedding_dim: 8, bottom_mlp: [16], top_mlp: [16]}}
      train: {{epochs: 2}}
      checkpoint: {{every_steps: 20}}
  - stage: report
"""


@pytest.fixture
def file(clicks_data):
    path = Path("clicks.yaml")
    path.write_text(PIPELINE.format(data=clicks_data))
    return path


def killed_in_training(file):
    """Kill a run once it has saved something."""
    kill_once_written(
        "runs/clicks/runs/train-*/checkpoints/step-*/state.json",
        *("pipeline", "run", str(file), "--no-track"),
    )
    assert not Path("runs/clicks/stages/train").exists()


def test_killed_and_resumed_it_gives_the_figures_of_train(file, dqrm):
    killed_in_training(file)
    plan = dqrm("pipeline", "run", file, "--dry-run")
    assert plan.exit_code == 0, plan.stderr
    assert "go on" in plan.stdout
    assert "parameters" in plan.stdout

    done = dqrm("pipeline", "run", file, "--no-track")
    assert done.exit_code == 0, done.stderr
    assert "resuming" in done.stderr
    report = json.loads(Path("runs/clicks/stages/report/report.json").read_text())
    row = report["models"][0]

    config = load_pipeline(file).stages[0].resolved()
    alone = train(
        config.model_copy(update={"name": "alone", "tracking": TrackingConfig(enabled=False)})
    )
    assert row["metrics"]["test/auc"] == alone.test.auc
    assert row["metrics"]["test/log_loss"] == alone.test.log_loss
    model = Path("runs/clicks/stages/train/model")
    packed = alone.run_dir / "artifact"
    weights = "model.safetensors"
    piped, own = load_file(model / weights), load_file(packed / weights)
    assert piped.keys() == own.keys()
    assert all(torch.equal(piped[name], own[name]) for name in own)
    assert row["weight_bytes"] == (packed / weights).stat().st_size
    assert f"{row['metrics']['test/auc']:.4f}" in done.stdout
    measured = evaluate_saved(model, data=config.data.path, tracking=TrackingConfig(enabled=False))
    assert measured.auc == alone.test.auc

    again = dqrm("pipeline", "run", file, "--no-track")
    assert again.stdout.count("complete before") == 2


def test_int4_gives_the_figures_of_the_command(file, dqrm):
    settings = [
        *("quant.bits=4", "quant.mlp_bits=4", "quant.granularity=row", "optim.name=adagrad"),
        *("train.max_steps=30", "train.seed=5"),
    ]
    staged = [f"stages.train.settings.{setting}" for setting in settings]
    piped = dqrm("pipeline", "run", file, "--no-track", *staged)
    assert piped.exit_code == 0, piped.stderr
    resolved = load_pipeline(file, staged).stages[0].settings
    own = [
        *(f"data.path={resolved['data']['path']}", "data.batch_size=64", "train.epochs=2"),
        *("model.embedding_dim=8", "model.bottom_mlp=[16]", "model.top_mlp=[16]"),
        *("checkpoint.every_steps=20", "train.threads=1", "name=alone"),
    ]
    alone = dqrm("train", "--no-track", *own, *settings)
    assert alone.exit_code == 0, alone.stderr
    there, here = (
        json.loads(path.read_text())
        for path in (Path("runs/alone/summary.json"), Path("runs/clicks/stages/train/summary.json"))
    )
    for name in ("samples_per_second", "run_id"):
        del there[name], here[name]
    assert here == there
    assert 3 < here["fp32_bytes"] / here["packed_bytes"] < 8
    weights = "model.safetensors"
    piped_model = load_file(Path("runs/clicks/stages/train/model") / weights)
    own_model = load_file(Path("runs/alone/artifact") / weights)
    assert piped_model.keys() == own_model.keys()
    assert all(torch.equal(piped_model[name], own_model[name]) for name in own_model)


def test_runs_are_nested_in_mlflow(file, recorded_runs):
    config = load_pipeline(file, ["stages.train.settings.train.max_steps=5"])
    result = run_pipeline(config)
    assert [done.ran for done in result.stages] == [True, True]
    parent, children = recorded_runs()
    assert set(children) == {"train", "report"}
    for run in (parent, *children.values()):
        assert run.info.status == "FINISHED"
    for run in children.values():
        assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
    auc = children["train"].data.metrics["test/auc"]
    assert parent.data.metrics["train/test/auc"] == auc
    assert [done.record.run_id for done in result.stages] == [
        children[name].info.run_id for name in ("train", "report")
    ]
    assert children["train"].data.params["optim.lr"] == str(config.stages[0].resolved().optim.lr)
    assert children["report"].data.tags["mlflow.note.content"] == "report of clicks"
    # The whole run of the stage is what is compared; a report measures no model.
    [compared] = read_folder(Path("runs/clicks"))
    assert compared.name == "clicks/train"
    assert compared.run_id == children["train"].info.run_id
    assert compared.metrics["test/auc"] == auc
    assert compared.curves["val/auc"]
    assert compared.settings["optim.lr"] == children["train"].data.params["optim.lr"]


def test_sigterm_saves_and_leaves_the_code_of_the_signal(file):
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "dqrm", "pipeline", "run", str(file), "--no-track"),
            "stages.train.settings.train.epochs=1000",
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    deadline = time.monotonic() + SECONDS
    try:
        while not list(Path("runs").glob("clicks/runs/train-*/checkpoints/step-*/state.json")):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=SECONDS)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 128 + signal.SIGTERM, errors
    # Without what was set it would begin another run.
    again = "go on with: dqrm pipeline run clicks.yaml stages.train.settings.train.epochs=1000"
    assert again in errors
    assert "Traceback" not in errors


def test_bits_of_tables_are_chosen_and_trained_with(file, dqrm):
    text = file.read_text()
    chosen = """\
  - {stage: table_bits, recommender: stage:train, like: 4, batches: 20}
  - stage: train
    name: mixed
    table_bits: stage:table_bits
"""
    settings = text.partition("  - stage: train\n")[2].partition("  - stage: report")[0]
    file.write_text(text.replace("  - stage: report", f"{chosen}{settings}  - stage: report"))
    fp32 = "stages.train.settings.quant={bits: 32}"
    plan = dqrm("pipeline", "run", file, "--dry-run", fp32)
    assert plan.exit_code == 0, plan.stderr
    assert "packed as stage:table_bits comes to" in plan.stdout
    done = dqrm("pipeline", "run", file, "--no-track", fp32)
    assert done.exit_code == 0, done.stderr
    stages = Path("runs/clicks/stages")
    told = json.loads((stages / "table_bits" / "table_bits.json").read_text())
    config = yaml.safe_load((stages / "mixed" / "config.yaml").read_text())
    assert config["quant"]["table_bits"] == told["table_bits"]
    command = dqrm("bits", stages / "train", "--like", "4", "--batches", "20", "--json")
    assert json.loads(command.stdout) == told

    again = dqrm("pipeline", "run", file, "--no-track", fp32, "stages.table_bits.like=8")
    assert again.exit_code == 0, again.stderr
    other = json.loads((stages / "table_bits" / "table_bits.json").read_text())
    assert other["bytes"] > told["bytes"]
    config = yaml.safe_load((stages / "mixed" / "config.yaml").read_text())
    assert config["quant"]["table_bits"] == other["table_bits"]

    for override, message in (
        ("stages.table_bits.recommender=runs/x", "name a stage, stage:NAME"),
        ("stages.table_bits.recommender=stage:none", "no earlier stage is called so"),
        ("stages.table_bits.ratio=4", "set ratio or like"),
        ("stages.table_bits.like=16", "name one of the options, 8, 4, 2"),
        ("stages.table_bits.options=[8, 8]", "name each once"),
        ("stages.table_bits.granularity=row", "set granularity: table in table_bits"),
        ("stages.mixed.table_bits=stage:train", "a stage train makes no bits of tables"),
        ("stages.mixed.settings.quant={table_bits: {user: 8}}", "say the same; leave one out"),
    ):
        refused = dqrm("pipeline", "validate", file, override)
        assert refused.exit_code == 2, (override, refused.stderr)
        assert message in refused.stderr, (override, refused.stderr)
