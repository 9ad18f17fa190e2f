"""Runs that begin with an earlier model, on the same ids and on more of them."""

import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
import yaml
from safetensors.torch import load_file

from dqrm.config import RunConfig
from dqrm.data.base import base_of, inherited
from dqrm.data.config import PrepareConfig
from dqrm.data.dataset import PreparedDataset
from dqrm.data.prepare import prepare
from dqrm.training.checkpoint import list_checkpoints, read_checkpoint
from dqrm.training.evaluate import predict
from dqrm.training.run import train
from dqrm.training.saved import load_saved
from dqrm.training.warm_start import find_model

SPLIT = {"by": "fraction", "validation": 0.1, "test": 0.2}
SCHEMA = {"label": "clicked", "dense": ["price", "age"]}
TABLES = ["user", "item", {"name": "tags", "multi_hot": True}]


@pytest.fixture(scope="module")
def days(clicks_frame, tmp_path_factory):
    """Two data sets: the second has the ids of the first and more."""
    folder = tmp_path_factory.mktemp("days")
    config = PrepareConfig.model_validate(
        {"schema": {**SCHEMA, "categorical": TABLES}, "split": SPLIT, "workers": 1}
        | {"format": "parquet", "min_frequency": 2}
    )
    prepare(clicks_frame[:2000], folder / "first", config)
    base, manifest = base_of(folder / "first")
    again = PrepareConfig.model_validate({**inherited(manifest), "split": SPLIT, "workers": 1})
    prepare(clicks_frame[2000:], folder / "second", again, base=base)
    prepare(clicks_frame[2000:], folder / "unrelated", again)
    return folder


def settings(data, output, name, **changes):
    config = {
        "output": str(output),
        "name": name,
        "data": {"path": str(data), "batch_size": 64},
        "model": {"embedding_dim": 8, "bottom_mlp": [16], "top_mlp": [16], "dropout": 0.2},
        "optim": {"name": "adagrad", "lr": 0.05},
        "train": {"epochs": 1, "threads": 1},
        "checkpoint": {"every_steps": 10},
        "tracking": {"enabled": False},
    }
    for key, value in changes.items():
        section, _, last = key.partition("__")
        config[section] = {**config.get(section, {}), last: value}
    return config


def run(*arguments, **changes):
    return train(RunConfig.model_validate(settings(*arguments, **changes)))


def newest(folder):
    return list_checkpoints(folder / "checkpoints")[-1]


NARROW = {"quant__storage": "int8", "quant__bits": 8, "quant__granularity": "row"}


@pytest.mark.parametrize(
    "changes",
    [
        {"quant__bits": 4},
        {"quant__granularity": "row", "optim__name": "adam"},
        {"quant__storage": "bf16", "quant__bits": 32, "optim__name": "sgd"},
        NARROW,
    ],
    ids=["exact", "row-adam", "bf16", "int8-rows"],
)
def test_without_growth_and_without_a_rate_it_says_the_same(changes, days, tmp_path):
    first = run(days / "first", tmp_path, "first", **changes)
    slow = {"optim__lr": 1e-30, "train__warm_start": str(first.run_dir), **changes}
    second = run(days / "first", tmp_path, "second", **slow)
    dataset = PreparedDataset.open(days / "first")
    split = dataset.split("test")
    before, after = (
        predict(load_saved(folder, dataset).model, split, 512)[0]
        for folder in (first.run_dir, second.run_dir)
    )
    assert torch.equal(before, after)
    assert before.std() > 0.02


@pytest.mark.parametrize("changes", [{"quant__bits": 4}, NARROW], ids=["int4", "int8-rows"])
def test_tables_grow_by_new_rows(changes, days, tmp_path):
    first = run(days / "first", tmp_path, "first", **changes)
    options = {"train__warm_start": str(first.run_dir), "optim__lr": 1e-30, **changes}
    grown = run(days / "second", tmp_path, "grown", **options)
    cold = run(days / "second", tmp_path, "cold", optim__lr=1e-30, **changes)
    sizes = [
        [table.num_rows for table in PreparedDataset.open(days / name).tables]
        for name in ("first", "second")
    ]
    assert [old < new for old, new in zip(*sizes, strict=True)] == [True, True, False]
    parts = [
        [of.split(sizes[number]) for of in (saved["emb_l.weight"], state["rows.sum"])]
        for number, saved, state in (
            (
                number,
                load_file(path / "model.safetensors"),
                load_file(path / "optimizer.safetensors"),
            )
            for number, path in (
                (0, find_model(first.run_dir).path),
                (1, newest(grown.run_dir)),
                (1, newest(cold.run_dir)),
            )
        )
    ]
    before, after, anew = parts
    for t, old in enumerate(sizes[0]):
        assert torch.equal(after[0][t][:old], before[0][t]), "rows of known ids are kept"
        assert torch.equal(after[0][t][old:], anew[0][t][old:]), "the others begin anew"
        # Adagrad goes on: what was summed before is still there.
        assert (after[1][t][:old] >= before[1][t]).all()
        assert (before[1][t] > 0).any()
    # Known rows say what they said: the new model is right about the old one's test rows.
    assert grown.test.auc > cold.test.auc + 0.05


def test_killed_and_resumed_it_gives_the_same_bits(days, tmp_path):
    first = run(days / "first", tmp_path, "first")
    options = {"train__warm_start": str(first.run_dir), "train__epochs": 2}
    whole = run(days / "second", tmp_path, "whole", **options)
    again = run(days / "second", tmp_path, "again", **options)
    config = settings(days / "second", tmp_path, "killed", **options)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    code = """
import os, signal, sys
import dqrm.training.loop as loop
saved = loop.save_checkpoint
def save(*arguments, **more):
    path = saved(*arguments, **more)
    if path.name == "step-00000020":
        os.kill(os.getpid(), signal.SIGKILL)
    return path
loop.save_checkpoint = save
from dqrm.config import RunConfig
from dqrm.configuration import load
from dqrm.training.run import train
train(load(RunConfig, sys.argv[1]))
"""
    killed = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "config.yaml")],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    # Whoever resumes needs the earlier model no more.
    shutil.rmtree(first.run_dir)
    resumed = train(RunConfig.model_validate(config), resume=tmp_path / "killed")
    for other in (again, resumed):
        for name in ("model", "optimizer"):
            left, right = (
                load_file(newest(folder) / f"{name}.safetensors")
                for folder in (whole.run_dir, other.run_dir)
            )
            assert all(torch.equal(left[key], right[key]) for key in left | right)
        assert other.test == whole.test


def test_what_does_not_go_on_is_refused(days, tmp_path):
    first = run(days / "first", tmp_path, "first")

    def refused(message, data="first", source=first.run_dir, **changes):
        with pytest.raises(ValueError, match=message):
            run(days / data, tmp_path, "refused", train__warm_start=str(source), **changes)
        shutil.rmtree(tmp_path / "refused", ignore_errors=True)

    refused("table 'user' of .*unrelated has other ids", "unrelated")
    assert not (tmp_path / "refused").exists()
    refused("holds no checkpoint", source=tmp_path)
    refused("must be the same", model__embedding_dim=16)
    refused("bot_l.0.bias has shape", model__bottom_mlp=[32])
    refused("quant.storage must be the same", quant__storage="bf16")
    # Back to fewer ids: those of the second data set are no base of the first.
    second = run(days / "second", tmp_path, "second", train__warm_start=str(first.run_dir))
    refused("table 'user'", source=second.run_dir)
    (second.run_dir / "summary.json").unlink()
    refused("has not finished.*name a checkpoint", "second", second.run_dir)
    # Another optimizer: the weights go on, its state does not.
    other = run(
        days / "second",
        tmp_path,
        "other",
        train__warm_start=str(newest(second.run_dir)),
        optim__name="adam",
    )
    assert read_checkpoint(newest(other.run_dir)).state.step > 0
