"""`dqrm train`, `eval` and `tracking sync` on a small generated data set."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

Run = Callable[..., Result]

SMALL = [
    *("model.bottom_mlp=[16]", "model.top_mlp=[16]", "model.embedding_dim=4"),
    *("data.batch_size=128", "train.threads=1"),
]


def arguments(dataset: Path, *more: str) -> list[str]:
    return ["train", f"data.path={dataset}", *SMALL, *more]


def test_train_prints_what_a_person_wants_to_know(dqrm: Run, dataset: Path) -> None:
    result = dqrm(*arguments(dataset, "--no-track", "-n", "first"))
    assert result.exit_code == 0, result.stderr
    shown = dict(line.split("  ", 1) for line in result.stdout.splitlines())
    shown = {name.strip(): value.strip() for name, value in shown.items()}
    assert shown["run"] == "runs/first"
    summary = json.loads(Path("runs/first/summary.json").read_text())
    assert shown["test AUC"] == f"{summary['test']['auc']:.4f}"
    assert shown["test log loss"] == f"{summary['test']['log_loss']:.4f}"
    assert shown["FP32 size"].endswith("KiB")
    assert shown["INT4 size"].endswith("times smaller)")
    assert shown["speed"].endswith("samples/s")
    assert "MLflow run" not in shown

    again = dqrm(*arguments(dataset, "--no-track", "-n", "first"))
    assert again.exit_code == 2
    assert "--resume" in again.stderr


def test_eval_measures_and_holds_the_gate(dqrm: Run, dataset: Path) -> None:
    assert dqrm(*arguments(dataset, "--no-track", "-n", "model")).exit_code == 0
    measured = dqrm("eval", "runs/model", "--no-track", "--json")
    assert measured.exit_code == 0, measured.stderr
    metrics = json.loads(measured.stdout)
    summary = json.loads(Path("runs/model/summary.json").read_text())
    assert metrics["auc"] == summary["test"]["auc"], "the packed model is the model"
    auc, loss = metrics["auc"], metrics["log_loss"]

    def gate(*options: str) -> Result:
        return dqrm("eval", "runs/model", "--no-track", *options)

    assert gate("--min-auc", str(auc)).exit_code == 0
    missed = gate("--min-auc", str(auc + 1e-3), "--max-log-loss", str(loss - 1e-3))
    assert missed.exit_code == 3
    assert missed.stderr.count("quality gate not met") == 2
    assert "AUC" in missed.stdout
    assert gate("--max-log-loss", str(loss)).exit_code == 0

    for options, message in (
        (["eval", "runs/absent"], "no such run"),
        (["eval", "runs/model", "--split", "last"], "'train', 'validation', 'test'"),
        (["eval", "runs/model", "--data", "absent"], "absent"),
        (["eval", str(dataset)], "synth"),
    ):
        wrong = dqrm(*options)
        assert wrong.exit_code == 2, wrong.stderr
        assert message in wrong.stderr


def test_dry_run_leaves_nothing_behind(dqrm: Run, dataset: Path, tmp_path: Path) -> None:
    result = dqrm(*arguments(dataset, "--dry-run", "train.epochs=3"))
    assert result.exit_code == 0, result.stderr
    for word in ("tables", "FP32 size", "packed size", "memory needed", "time", "C3"):
        assert word in result.stdout
    assert "steps             81 (27 an epoch)" in result.stdout
    assert list(tmp_path.iterdir()) == []


def test_file_then_overrides(dqrm: Run, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("# mine\nquant: {bits: 8}\noptim: {lr: 1e-2}\n")
    shown = dqrm("train", "--print-config", "-c", "mine.yaml", "optim.lr=2e-2", "-n", "1e-3")
    assert shown.exit_code == 0, shown.stderr
    assert "  bits: 8\n" in shown.stdout
    assert "  lr: 0.02\n" in shown.stdout
    assert "name: '1e-3'\n" in shown.stdout
    (tmp_path / "printed.yaml").write_text(shown.stdout)
    assert dqrm("config", "-c", "printed.yaml").stdout == shown.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["optim.lr=0"], "optim.lr=0: must be greater than 0"),
        (["quant.bits=5", "train.epoch=1"], "2 faults"),
        (["mine.yaml"], "did you mean --config mine.yaml?"),
        (["--config", "absent.yaml"], "absent.yaml: no such configuration file"),
        (["--config", "absent"], "no shipped configuration is called 'absent'"),
        (["--resume", "runs/absent"], "--resume runs/absent: no such folder"),
        (["data.path=absent", "--no-track"], "absent: no such folder"),
        (["quant.table_bits.C99=8", "--no-track"], "C99"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else None,
)
def test_mistakes_of_training(
    dqrm: Run, dataset: Path, tmp_path: Path, options: list[str], message: str
) -> None:
    given = [] if options[0].startswith("data.path") else [f"data.path={dataset}"]
    result = dqrm("train", *given, *options)
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["int", "term"])
def test_interrupted_after_a_checkpoint_and_resumed(
    dqrm: Run, dataset: Path, tmp_path: Path, number: signal.Signals
) -> None:
    line = arguments(dataset, "--no-track", "-n", "long", "train.epochs=10000")
    process = subprocess.Popen(
        [sys.executable, "-m", "dqrm", *line],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("runs/long/checkpoints/step-*")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number, err
    assert "dqrm train --resume runs/long" in out
    assert "Traceback" not in err

    # The run knows its configuration; only what may change is given.
    refused = dqrm("train", "--resume", "runs/long", "quant.bits=8")
    assert refused.exit_code == 2
    assert "quant.bits was 4, is 8" in refused.stderr
    resumed = dqrm("train", "--resume", "runs/long", "train.epochs=1")
    assert resumed.exit_code == 0, resumed.stderr
    assert "test AUC" in resumed.stdout


def test_runs_and_evaluations_are_recorded_where_asked(
    dqrm: Run, dataset: Path, tmp_path: Path
) -> None:
    from mlflow.tracking import MlflowClient

    uri = f"sqlite:///{tmp_path}/store.db"
    where = ["--tracking-uri", uri, "--experiment", "clicks"]
    trained = dqrm(*arguments(dataset, "-n", "tracked", "tracking.system_metrics=false", *where))
    assert trained.exit_code == 0, trained.stderr
    assert f"dqrm ui --backend-store-uri {uri}" in trained.stdout
    assert dqrm("eval", "runs/tracked", *where).exit_code == 0
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("clicks")
    assert experiment is not None
    evaluation, training = client.search_runs([experiment.experiment_id])  # the newest first
    assert training.info.run_name == "tracked"
    assert training.info.run_id in trained.stdout
    assert evaluation.info.run_name.startswith("eval-tracked")
    assert evaluation.data.metrics["test/auc"] == training.data.metrics["test/auc"]
    assert dqrm("tracking", "sync").stdout == "nothing waits for an upload\n"


def test_sync_of_a_run_whose_server_is_away(dqrm: Run, dataset: Path, tmp_path: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        uri = f"http://127.0.0.1:{unused.getsockname()[1]}"
    line = ["--tracking-uri", uri, "-n", "lonely", "train.max_steps=2"]
    quick = ["tracking.finish_seconds=0.1", "tracking.system_metrics=false"]
    trained = dqrm(*arguments(dataset, *line, *quick))
    assert trained.exit_code == 0, trained.stderr
    assert (tmp_path / "runs/lonely/spool").is_dir()
    measured = dqrm("eval", "runs/lonely", "--tracking-uri", uri)
    assert measured.exit_code == 0, measured.stderr
    away = dqrm("tracking", "sync")
    assert away.exit_code == 1
    assert "runs/lonely: " in away.stderr
    assert "runs/lonely/evaluations/eval-lonely" in away.stderr
    missing = dqrm("tracking", "sync", "absent")
    assert missing.exit_code == 2
    assert "absent: no such folder" in missing.stderr


def test_threads_are_set_before_torch_is_loaded(dataset: Path, tmp_path: Path) -> None:
    code = (
        "import os, sys\n"
        "from dqrm.cli import cli\n"
        "cli.main(sys.argv[1:], standalone_mode=False)\n"
        "print(os.environ['OMP_WAIT_POLICY'], os.environ['OMP_NUM_THREADS'])\n"
        "import torch; print(torch.get_num_threads())\n"
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith("OMP_")}
    line = arguments(dataset, "--dry-run")
    done = subprocess.run(
        [sys.executable, "-c", code, *line],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-2:] == ["PASSIVE 1", "1"]
