"""The study of several processes trains for real; the published exchange rounds as published."""

import json
import os
import subprocess
import sys

import pytest
import torch
from worlds import run_world

from dqrm.study.kinds import exchange_arms


def published(rank, world_size):
    from dqrm.bench.published import PublishedExchange
    from dqrm.compress.config import QuantConfig
    from dqrm.kernels.tables import RowGradient
    from dqrm.models.config import ModelConfig
    from dqrm.models.dlrm import build_dlrm
    from dqrm.training.config import OptimConfig
    from dqrm.training.optimizer import Optimizer

    shape = ModelConfig(embedding_dim=4, bottom_mlp=(3,), top_mlp=(3,))
    model = build_dlrm(shape, QuantConfig(), num_dense=2, tables=[("a", 3), ("b", 5)])
    exchange = PublishedExchange(Optimizer(model, OptimConfig()), seed=0)
    # Row 2 of table a and row 1 of table b; ranks' largest values are 127 and 381.
    size = 127.0 * (1 + 2 * rank)
    rows = torch.tensor([2, 4])
    values = torch.tensor([[size, 1.4, -1.0, 0.0], [size / 127, 0.0, 0.0, 0.0]])
    merged = exchange.reduce_rows("emb_l", RowGradient(rows, values)).wait()
    bias = torch.tensor([size, 0.0, 0.0])
    exchange.reduce_dense({"bot_l.0.bias": bias}).wait()
    again = torch.zeros(3)
    exchange.reduce_dense({"bot_l.0.bias": again}).wait()
    return merged.rows.tolist(), merged.values.tolist(), bias.tolist(), again.tolist()


def test_scales_are_means_of_ranks_and_clip():
    for rows, values, bias, again in run_world(published, 2):
        assert rows == [2, 4]
        # The mean of the largest is 254, so the scale 2: 127 is 63.5 steps, rounded to 64, and
        # 381 is clipped to 254.
        assert values[0] == [(128 + 254) / 2, (2 + 2) / 2, 0.0, 0.0]
        # Table b has a grid of its own: 1 and 3, clipped to 2.
        assert values[1] == pytest.approx([(64 / 63.5 + 2) / 2, 0.0, 0.0, 0.0])
        assert bias == [(128 + 254) / 2, 0.0, 0.0]
        # Owed are 127 - 191 and 381 - 191, whose scale is now 1: -64, and 190 clipped to 127.
        assert again == [(127 - 64) / 2, 0.0, 0.0]


def test_the_command_compares_real_runs(clicks_data, tmp_path):
    report = tmp_path / "out.json"
    shape = ["model.embedding_dim=4", "model.bottom_mlp=[8]", "model.top_mlp=[8]"]
    last = len(exchange_arms(2)) - 1
    done = subprocess.run(
        [sys.executable, "-m", "dqrm", "bench", "replicas", f"data.path={clicks_data}", *shape,
         "train.max_steps=20", "exchange.backend=gloo", "--seeds", "0", "--only", f"0,2,{last}",
         "--json", str(report)],
        capture_output=True, text=True, timeout=150, cwd=tmp_path, env=dict(os.environ),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    record = json.loads(report.read_text())
    names = [arm["name"] for arm in record["arms"]]
    assert names == ["1 process", "INT8 rows, INT8 MLPs", "published: clipped mean scales"]
    for arm in record["arms"]:
        assert 0.4 < arm["outcomes"][0]["test"]["auc"] < 1
        assert arm["name"] in done.stdout
    assert record["arms"][1]["outcomes"][0]["ratio"] > 2
    assert record["arms"][2]["outcomes"][0]["sent_bytes"] is None
