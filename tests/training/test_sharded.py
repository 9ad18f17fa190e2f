"""Runs whose large tables are shared out among processes: the result is that of one process."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from worlds import run_ranks

from dqrm.training.checkpoint import list_checkpoints, read_checkpoint

PLAIN = {"rows": "fp32", "dense": "fp32", "vectors": "fp32", "vector_gradients": "fp32"}


def settings(data, output, name, **sections):
    config = {
        "output": str(output),
        "name": name,
        # 67 leaves a last batch of 45 rows that ranks share unevenly.
        "data": {"path": str(data), "batch_size": 67, "window_rows": 1000},
        "model": {"embedding_dim": 8, "bottom_mlp": [16], "top_mlp": [16], "dropout": 0.2},
        "quant": {},
        "optim": {"name": "adagrad", "lr": 0.05},
        "train": {"epochs": 2, "threads": 1, "log_every": 10, "max_steps": 30},
        "checkpoint": {"every_steps": 25},
        # Of the tables, user and item are sharded; item is split where there are three processes.
        "exchange": {"timeout_seconds": 30.0, "placement": "shard", "shard_over_rows": 50},
        "tracking": {"enabled": False},
    }
    for section, values in sections.items():
        config[section] = {**config[section], **values}
    return config


def train_rank(rank, world_size, *, runs):
    from dqrm.config import RunConfig
    from dqrm.training.run import train

    results = []
    for config, resume in runs:
        result = train(
            RunConfig.model_validate(config), resume=None if resume is None else Path(resume)
        )
        results.append(None if result.test is None else result.test.auc)
    return results


def train_world(world_size, *runs, backend="gloo"):
    """Train some runs in so many processes; return the folder and the test AUC of each."""
    runs = [
        ({**config, "exchange": {**config["exchange"], "backend": backend}}, resume)
        for config, resume in ((run if isinstance(run, tuple) else (run, None)) for run in runs)
    ]
    outcomes = run_ranks(train_rank, world_size, backend=None, timeout=120, runs=runs)
    for outcome in outcomes:
        assert outcome.returned, f"rank {outcome.rank}: {outcome.error}\n{outcome.output}"
    return [
        (Path(config["output"]) / config["name"], auc)
        for (config, _), auc in zip(runs, outcomes[0].result, strict=True)
    ]


def newest(folder):
    return list_checkpoints(folder / "checkpoints")[-1]


def tensors(folder):
    path = newest(folder)
    return {
        f"{name}/{key}": tensor
        for name in ("model", "optimizer")
        for key, tensor in load_file(path / f"{name}.safetensors").items()
    }


def assert_close(folder, expected, rtol=2e-2, atol=2e-3):
    found, wanted = tensors(folder), tensors(expected)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].shape == tensor.shape, name
        if tensor.is_floating_point():
            torch.testing.assert_close(found[name], tensor, rtol=rtol, atol=atol, msg=name)
    histories = [read_checkpoint(newest(run)).state.history for run in (folder, expected)]
    losses = [[e["train/loss"] for e in history if "train/loss" in e] for history in histories]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("sharded")


CASES = {
    "sgd": {"optim": {"name": "sgd"}},
    "adagrad": {},
    "adam": {"optim": {"name": "adam", "lr": 0.01}},
    "mean": {"model": {"pooling": "mean"}},
    "all": {"exchange": {"shard_over_rows": 0}},
    "fp32": {"quant": {"bits": 32}},
    "by_row": {"quant": {"granularity": "row"}},
    "periodic": {"quant": {"scale_period": 7}},
}


@pytest.fixture(scope="module")
def alone(clicks_data, folder):
    """Each case in one process."""
    runs = [settings(clicks_data, folder, f"{case}1", **CASES[case]) for case in CASES]
    return dict(zip(CASES, train_world(1, *runs), strict=True))


@pytest.mark.parametrize("size", [2, 3])
def test_without_codecs_the_run_is_that_of_one_process(clicks_data, folder, alone, size):
    runs = []
    for case, changes in CASES.items():
        exchange = {**changes.get("exchange", {}), **PLAIN}
        changed = {**changes, "exchange": exchange}
        runs.append(settings(clicks_data, folder, f"{case}{size}", **changed))
    for case, (run, auc) in zip(CASES, train_world(size, *runs), strict=True):
        expected, expected_auc = alone[case]
        assert_close(run, expected)
        assert auc == pytest.approx(expected_auc, abs=1e-3), case
        summaries = [json.loads((path / "summary.json").read_text()) for path in (run, expected)]
        assert summaries[0]["packed_bytes"] == summaries[1]["packed_bytes"]
