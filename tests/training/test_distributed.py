"""Runs of several processes: the same result for any world size, exact resumption, clear ends."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from worlds import run_ranks

from dqrm.training.checkpoint import list_checkpoints, read_checkpoint

NETWORK = {"embedding_dim": 8, "bottom_mlp": [16], "top_mlp": [16], "dropout": 0.2}
PLAIN = {"rows": "fp32", "dense": "fp32"}
# Both keep residuals: INT8 rows alone would not.
CODES = {"rows": "int4", "dense": "int8"}


def settings(path, output, name, **sections):
    config = {
        "output": str(output),
        "name": name,
        # 67 leaves a last batch of 45 rows that two ranks share unevenly.
        "data": {"path": str(path), "batch_size": 67, "window_rows": 1000},
        "model": NETWORK,
        "optim": {"name": "adagrad", "lr": 0.05},
        "train": {"epochs": 2, "threads": 1, "log_every": 10, "max_steps": 60},
        "checkpoint": {"every_steps": 25},
        "exchange": {"timeout_seconds": 30.0},
        "tracking": {"enabled": False},
    }
    for section, values in sections.items():
        config[section] = {**config[section], **values}
    return config


def train_rank(rank, world_size, *, config, resume=None):
    from dqrm.config import RunConfig
    from dqrm.training.run import train

    result = train(
        RunConfig.model_validate(config), resume=None if resume is None else Path(resume)
    )
    return None if result.test is None else result.test.auc


def train_world(world_size, config, resume=None, backend="gloo"):
    """Train in so many processes; return the run's folder and its test AUC."""
    config = {**config, "exchange": {**config["exchange"], "backend": backend}}
    outcomes = run_ranks(
        train_rank, world_size, backend=None, timeout=90, config=config, resume=resume
    )
    for outcome in outcomes:
        assert outcome.returned, f"rank {outcome.rank}: {outcome.error}\n{outcome.output}"
    # Rank 0 alone tests.
    assert [outcome.result is None for outcome in outcomes] == [False] + [True] * (world_size - 1)
    return Path(config["output"]) / config["name"], outcomes[0].result


def newest(folder):
    return list_checkpoints(folder / "checkpoints")[-1]


def tensors(folder):
    path = newest(folder)
    names = ("model", "optimizer", "residuals")
    return {
        f"{name}/{key}": tensor
        for name in names
        if (path / f"{name}.safetensors").is_file()
        for key, tensor in load_file(path / f"{name}.safetensors").items()
    }


def assert_same_bits(left, right):
    a, b = tensors(left), tensors(right)
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("distributed")


@pytest.fixture(scope="module")
def compressed(clicks_data, folder):
    """Two processes that owe each other something of every gradient."""
    return train_world(2, settings(clicks_data, folder, "compressed", exchange=CODES))


def test_without_codecs_any_world_size_gives_the_same_run(clicks_data, folder):
    runs = {
        size: train_world(size, settings(clicks_data, folder, f"plain{size}", exchange=PLAIN))
        for size in (1, 2, 3)
    }
    alone = tensors(runs[1][0])
    for size in (2, 3):
        together = tensors(runs[size][0])
        for name, tensor in alone.items():
            if tensor.is_floating_point():
                # Sums of other parts round otherwise, and a step size of Adagrad at the first
                # touch of a row does not depend on how small its gradient is.
                torch.testing.assert_close(together[name], tensor, rtol=2e-2, atol=2e-3, msg=name)
        assert runs[size][1] == pytest.approx(runs[1][1], abs=1e-3)
        states = [read_checkpoint(newest(run)).state for run in (runs[1][0], runs[size][0])]
        histories = [[(e["step"], e.get("train/loss")) for e in s.history] for s in states]
        assert [step for step, _ in histories[0]] == [step for step, _ in histories[1]]
        for (_, a), (_, b) in zip(*histories, strict=True):
            assert b == (None if a is None else pytest.approx(a, rel=1e-4))


def test_compressed_gradients_train_as_well(compressed, clicks_data, folder):
    _, plain = train_world(1, settings(clicks_data, folder, "alone"))
    assert compressed[1] == pytest.approx(plain, abs=0.01)
    history = read_checkpoint(newest(compressed[0])).state.history
    logged = [entry for entry in history if "comm/ratio" in entry]
    assert [entry["step"] for entry in logged] == [10, 20, 30, 40, 50, 60]
    for entry in logged:
        assert entry["comm/ratio"] > 2
        assert 0 < entry["comm/sent_bytes_per_step"] == entry["comm/received_bytes_per_step"]
        assert entry["comm/exposed_seconds"] > 0
        assert entry["comm/residual_norm"] > 0
    residuals = load_file(newest(compressed[0]) / "residuals.safetensors")
    assert {name.partition("/")[0] for name in residuals} == {"0", "1"}
    assert any(bool(tensor.any()) for tensor in residuals.values())


def test_a_resumed_run_has_the_bits_of_an_unbroken_one(compressed, clicks_data, folder):
    short = settings(clicks_data, folder, "broken", train={"max_steps": 33}, exchange=CODES)
    run, _ = train_world(2, short)
    (run / "summary.json").unlink()
    whole = settings(clicks_data, folder, "broken", exchange=CODES)
    assert_same_bits(train_world(2, whole, resume=str(run))[0], compressed[0])


@pytest.mark.parametrize("size", [1, 3])
def test_a_run_goes_on_in_another_number_of_processes_over_another_backend(
    clicks_data, folder, compressed, size
):
    name = f"grown{size}"
    short = settings(clicks_data, folder, name, train={"max_steps": 33}, exchange=CODES)
    run, _ = train_world(2, short)
    whole = settings(clicks_data, folder, name, exchange=CODES)
    again, auc = train_world(size, whole, resume=str(run), backend="auto")
    assert read_checkpoint(newest(again)).state.step == 60
    assert auc == pytest.approx(compressed[1], abs=0.01)


def test_batches_of_fewer_rows_than_ranks(clicks_data, folder):
    tiny = settings(clicks_data, folder, "tiny", data={"batch_size": 2}, train={"max_steps": 8})
    run, _ = train_world(3, tiny)
    assert read_checkpoint(newest(run)).state.samples == 16


def train_alike_but(rank, world_size, *, config):
    config["train"]["seed"] = rank // 2
    return train_rank(rank, world_size, config=config)


def test_ranks_with_other_settings_are_named(clicks_data, folder):
    config = settings(clicks_data, folder, "unlike", exchange={"backend": "gloo"})
    outcomes = run_ranks(train_alike_but, 3, backend=None, timeout=90, config=config)
    for outcome in outcomes:
        assert "train.seed is 1 on rank 2 and 0 on rank 0" in outcome.error, outcome.error


def command(data, folder, *arguments):
    overrides = [f"data.path={data}", f"output={folder}", "tracking.enabled=false"]
    overrides += ["model.embedding_dim=8", "model.bottom_mlp=[16]", "model.top_mlp=[16]"]
    environment = {**os.environ, "DQRM_REQUIRE_KERNELS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "dqrm", "train", "--nproc", "2", *overrides, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    )


def finish(process, timeout=90):
    try:
        return process.communicate(timeout=timeout)[0]
    except subprocess.TimeoutExpired:
        process.kill()
        raise


def test_the_command_starts_workers_stops_them_together_and_goes_on(clicks_data, tmp_path):
    endless = command(clicks_data, tmp_path, "name=cli", "train.epochs=100000")
    checkpoints = tmp_path / "cli" / "checkpoints"
    deadline = time.monotonic() + 60
    while not list_checkpoints(checkpoints):
        assert time.monotonic() < deadline
        assert endless.poll() is None, endless.communicate()[0]
        time.sleep(0.1)
    endless.send_signal(signal.SIGTERM)
    output = finish(endless)
    assert endless.returncode == 128 + signal.SIGTERM, output
    assert "stopped by SIGTERM after step" in output
    stopped = read_checkpoint(list_checkpoints(checkpoints)[-1]).state
    again = command(
        clicks_data, tmp_path, "name=cli", "--resume", "auto",
        f"train.max_steps={stopped.step + 5}", "train.epochs=100000",
    )  # fmt: skip
    output = finish(again)
    assert again.returncode == 0, output
    assert f"resuming {tmp_path / 'cli'} at step {stopped.step}" in output
    assert output.count("test AUC") == 1


def test_a_mistake_is_told_and_ends_all_workers(tmp_path):
    process = command(tmp_path / "nothing", tmp_path)
    output = finish(process)
    assert process.returncode == 2, output
    assert "nothing" in output
