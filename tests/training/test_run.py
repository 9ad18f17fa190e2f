"""Whole runs: selection, resume after kill -9, signals, errors, the run folder."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml
from safetensors.torch import load_file

from dqrm.config import RunConfig
from dqrm.data.dataset import PreparedDataset
from dqrm.tracking.config import TrackingConfig
from dqrm.training.build import build_model
from dqrm.training.checkpoint import list_checkpoints, read_checkpoint
from dqrm.training.errors import TrainingError
from dqrm.training.run import train
from dqrm.training.saved import evaluate_saved

NETWORK = {"embedding_dim": 8, "bottom_mlp": [16], "top_mlp": [16], "dropout": 0.2}
INT8_NETWORK = {"embedding_dim": 8, "bottom_mlp": [40, 32], "top_mlp": [40, 32]}


def settings(data, output, **changes):
    config = {
        "output": str(output),
        "name": "run",
        "data": {"path": str(data), "batch_size": 64, "window_rows": 1000},
        "model": NETWORK,
        "optim": {"name": "adam", "lr": 0.01},
        "train": {"epochs": 2, "threads": 1, "log_every": 10},
        "checkpoint": {"every_steps": 20},
        "tracking": {"enabled": False},
    }
    for key, value in changes.items():
        section = config
        *parents, last = key.split("__")
        for parent in parents:
            section = section.setdefault(parent, {})
        section[last] = value
    return config


def run(data, output, resume=None, **changes):
    return train(RunConfig.model_validate(settings(data, output, **changes)), resume=resume)


def tensors(run_dir):
    newest = list_checkpoints(run_dir / "checkpoints")[-1]
    return {
        **load_file(newest / "model.safetensors"),
        **load_file(newest / "optimizer.safetensors"),
        **load_file(run_dir / "artifact" / "model.safetensors"),
    }


def assert_same_run(left, right):
    a, b = tensors(left), tensors(right)
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name
    states = [
        read_checkpoint(list_checkpoints(folder / "checkpoints")[-1]).state
        for folder in (left, right)
    ]
    for name in ("step", "epoch", "batch", "best_step", "best_value", "validations_since_best"):
        assert getattr(states[0], name) == getattr(states[1], name), name
    # The pace differs from run to run; what was measured must not.
    histories = [
        [{k: v for k, v in entry.items() if not k.startswith("perf/")} for entry in state.history]
        for state in states
    ]
    assert histories[0] == histories[1]


@pytest.fixture(scope="module")
def whole(clicks_data, tmp_path_factory):
    """An unbroken run."""
    return run(clicks_data, tmp_path_factory.mktemp("whole"))


def test_the_model_learns_and_is_selected_on_validation(whole, clicks_data):
    summary = json.loads((whole.run_dir / "summary.json").read_text())
    state = read_checkpoint(list_checkpoints(whole.run_dir / "checkpoints")[-1]).state
    measured = {e["step"]: e["val/auc"] for e in state.history if "val/auc" in e}
    assert measured[whole.best_step] == max(measured.values())
    assert whole.test.auc > 0.65
    assert summary["test"]["auc"] == whole.test.auc
    assert {path.name for path in whole.run_dir.iterdir()} == {
        "config.yaml",
        "checkpoints",
        "artifact",
        "plots",
        "measurements.json",
        "summary.json",
    }
    # The run's own packed model, measured again, gives the reported figure exactly.
    again = evaluate_saved(whole.run_dir, tracking=TrackingConfig(enabled=False))
    assert again.as_dict() == whole.test.as_dict()


def test_a_best_checkpoint_measures_like_the_run(whole):
    best = whole.run_dir / "checkpoints" / f"step-{whole.best_step:08d}"
    off = TrackingConfig(enabled=False)
    assert evaluate_saved(best, split="validation", tracking=off) == whole.validation


def test_only_the_last_checkpoints_and_the_best_are_kept(whole):
    kept = [int(p.name[5:]) for p in list_checkpoints(whole.run_dir / "checkpoints")]
    last = 2 * PreparedDataset.open(read_config(whole)["data"]["path"]).split("train").num_batches(
        64
    )
    assert kept[-1] == last
    assert set(kept) - {whole.best_step} <= set(kept[-2:])


def read_config(result):
    return yaml.safe_load((result.run_dir / "config.yaml").read_text())


@pytest.mark.parametrize(
    "changes",
    [
        {"optim__name": "adam"},
        {"optim__name": "adagrad", "quant__scale_period": 7},
        {"optim__name": "adam", "quant__storage": "bf16"},
        {
            "optim__name": "adagrad",
            "quant": {"storage": "int8", "bits": 8, "granularity": "row"},
        },
        {"model": INT8_NETWORK, "train__precision": "int8"},
    ],
    ids=[
        "adam-exact-scales",
        "adagrad-periodic-scales",
        "adam-bf16-rows",
        "adagrad-int8-rows",
        "adam-int8-products",
    ],
)
def test_kill_9_then_resume_equals_an_unbroken_run(clicks_data, tmp_path, changes):
    whole = run(clicks_data, tmp_path / "whole", **changes)
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(settings(clicks_data, tmp_path / "broken", **changes)))
    command = [sys.executable, "-m", "dqrm", "train", "--config", str(config)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    broken = tmp_path / "broken" / "run"
    wait_for(lambda: list_checkpoints(broken / "checkpoints"), process)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (broken / "summary.json").exists()
    resumed = run(clicks_data, tmp_path / "broken", resume=broken, **changes)
    assert_same_run(whole.run_dir, resumed.run_dir)
    assert resumed.test == whole.test


def wait_for(condition, process, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, "the run ended before it could be stopped"
        assert time.monotonic() < end, "no checkpoint in time"
        time.sleep(0.005)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_a_checkpoint_and_names_itself_in_the_exit_code(
    clicks_data, tmp_path, number
):
    changes = {"train__epochs": 200, "checkpoint__every_steps": 5}
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(settings(clicks_data, tmp_path, **changes)))
    command = [sys.executable, "-m", "dqrm", "train", "--config", str(config)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    folder = tmp_path / "run" / "checkpoints"
    wait_for(lambda: list_checkpoints(folder), process)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert "Traceback" not in errors
    state = read_checkpoint(list_checkpoints(folder)[-1]).state
    assert state.step > 0
    # Asking for no more steps than were done ends the run and tests the model.
    done = run(clicks_data, tmp_path, resume="auto", train__max_steps=state.step)
    assert done.test is not None
    assert done.run_dir == tmp_path / "run"


def test_early_stopping(clicks_data, tmp_path):
    result = run(
        clicks_data,
        tmp_path,
        train__epochs=50,
        train__eval_every=20,
        train__patience=2,
        optim__lr=0.1,
    )
    state = read_checkpoint(list_checkpoints(result.run_dir / "checkpoints")[-1]).state
    assert state.validations_since_best == 2
    assert state.epoch < 50


def test_a_diverging_run_says_what_to_change(clicks_data, tmp_path):
    with pytest.raises(TrainingError, match=r"loss became nan at step \d+; lower optim.lr"):
        run(clicks_data, tmp_path, optim={"name": "sgd", "lr": 1e30})


def test_the_last_model_is_tested_without_a_validation_split(clicks_frame, tmp_path):
    from dqrm.data.config import PrepareConfig
    from dqrm.data.prepare import prepare

    schema = {"label": "clicked", "dense": ["price"], "categorical": ["user"]}
    split = {"by": "fraction", "validation": 0, "test": 0.2}
    config = PrepareConfig.model_validate(
        {"schema": schema, "format": "parquet", "split": split, "workers": 1}
    )
    prepare(clicks_frame, tmp_path / "data", config)
    result = run(tmp_path / "data", tmp_path)
    assert result.validation is None
    assert (
        result.best_step
        == read_checkpoint(list_checkpoints(result.run_dir / "checkpoints")[-1]).state.step
    )


def test_an_existing_run_is_not_overwritten(whole, clicks_data):
    with pytest.raises(ValueError, match=r"the run .*run exists; give another name, or go on"):
        run(clicks_data, whole.run_dir.parent)


def test_other_settings_are_refused_on_resume(whole, clicks_data):
    with pytest.raises(ValueError, match=r"optim.lr was 0.01, is 0.5; quant.bits was 4, is 8"):
        run(
            clicks_data,
            whole.run_dir.parent,
            resume=whole.run_dir,
            optim__lr=0.5,
            quant={"bits": 8},
        )


def test_other_data_is_refused_on_resume(whole):
    with pytest.raises(ValueError, match=r"was trained on data set .* is data set"):
        run("census", whole.run_dir.parent, resume=whole.run_dir)


def test_auto_starts_anew_when_nothing_is_unfinished(clicks_data, tmp_path):
    changes = {"train__max_steps": 3, "name": None}
    first = run(clicks_data, tmp_path, resume="auto", **changes)
    second = run(clicks_data, tmp_path, resume="auto", **changes)
    assert first.run_dir != second.run_dir


def test_a_damaged_checkpoint_is_named(whole, clicks_data, tmp_path):
    import shutil

    folder = tmp_path / "run"
    shutil.copytree(whole.run_dir, folder)
    newest = list_checkpoints(folder / "checkpoints")[-1]
    (newest / "model.safetensors").write_bytes(b"half")
    with pytest.raises(ValueError, match=r"model.safetensors cannot be read.*earlier checkpoint"):
        run(clicks_data, tmp_path, resume=folder, train__epochs=3)


def test_bf16_trains(clicks_data, tmp_path):
    result = run(clicks_data, tmp_path, train__precision="bf16")
    assert result.test.auc > 0.65


def test_an_unknown_split_is_named(whole):
    with pytest.raises(ValueError, match="no nightly split"):
        evaluate_saved(whole.run_dir, split="nightly", tracking=TrackingConfig(enabled=False))


def test_int8_trains(clicks_data, tmp_path):
    result = run(clicks_data, tmp_path, model=INT8_NETWORK, train__precision="int8")
    assert result.test.auc > 0.65


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quant__mlp_bits": 32}, r"train.precision=int8 .*quant.mlp_bits=32 does not quantize"),
        ({"quant__activation_bits": 8}, r"train.precision=int8 .*not to quant.activation_bits=8"),
    ],
    ids=["mlp-bits", "activation-bits"],
)
def test_int8_is_refused_where_it_cannot_be(clicks_data, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        run(clicks_data, tmp_path, **{"model": INT8_NETWORK, "train__precision": "int8", **changes})


def test_a_checkpoint_of_another_storage_is_refused(whole, clicks_data):
    newest = read_checkpoint(list_checkpoints(whole.run_dir / "checkpoints")[-1])
    changed = settings(clicks_data, "unused", quant={"storage": "bf16"})
    model = build_model(RunConfig.model_validate(changed), PreparedDataset.open(clicks_data))
    message = r"emb_l.weight holds torch.float32, the model torch.bfloat16; was quant.storage"
    with pytest.raises(ValueError, match=message):
        newest.load_model(model)
