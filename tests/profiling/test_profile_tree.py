"""MACs against closed forms, for the operators that torch's counter takes for nothing."""

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torch import nn

from dqrm.cli import cli
from dqrm.config import RunConfig
from dqrm.profiling.tree import profile
from dqrm.training.run import train


def everything(node, path=""):
    yield path, node
    for child in node.children:
        yield from everything(child, f"{path}.{child.name}".lstrip("."))


def by_path(tree):
    return dict(everything(tree))


class Odd(nn.Module):
    """A layer that is called twice, a product outside of any layer, and a shared weight."""

    def __init__(self):
        super().__init__()
        self.twice = nn.Linear(8, 8)
        self.tied = nn.Linear(8, 8)
        self.tied.weight = self.twice.weight
        self.idle = nn.Linear(8, 3)

    def forward(self, x):
        return self.tied(self.twice(self.twice(x))) @ x.T


def test_layers_called_twice_shared_and_not_at_all():
    model = Odd()
    model.train()
    x = torch.randn(5, 8)
    tree = profile(model, lambda: model(x), repeats=1)
    assert model.training
    nodes = by_path(tree)
    assert nodes["twice"].macs == 2 * 5 * 8 * 8
    assert nodes["twice"].calls == 2
    assert nodes["idle"].macs == 0
    assert nodes["idle"].seconds is None
    assert tree.macs == 3 * 5 * 8 * 8 + 5 * 5 * 8
    assert tree.parameters == sum(p.numel() for p in model.parameters())
    assert nodes["tied"].parameters == 72, "a shared weight counts in each that has it"
    assert tree.bytes == 4 * tree.parameters
    assert tree.seconds >= nodes["twice"].seconds + nodes["tied"].seconds


def test_attention_and_the_fast_path_of_encoder_layers():
    batch, tokens, dim, inner = 2, 16, 32, 64
    layer = nn.TransformerEncoderLayer(dim, 4, inner, batch_first=True)
    x = torch.randn(batch, tokens, dim)
    before = torch.backends.mha.get_fastpath_enabled()
    tree = profile(layer, lambda: layer(x), repeats=1)
    rows = batch * tokens
    attention = 2 * batch * tokens * tokens * dim
    assert tree.macs == rows * (4 * dim * dim + 2 * dim * inner) + attention
    assert torch.backends.mha.get_fastpath_enabled() is before


def test_a_transformer_in_hugging_faces_format(tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
    )
    model = transformers.BertForSequenceClassification(config)
    model.save_pretrained(tmp_path)
    command = ["profile", str(tmp_path), "--batch-size", "3", "--length", "24", "--repeats", "1"]
    done = CliRunner().invoke(cli, [*command, "--json"])
    assert done.exit_code == 0, done.stderr
    tree = json.loads(done.stdout)
    rows, layers = 3 * 24, 2
    encoder = layers * (rows * (4 * 32 * 32 + 2 * 32 * 64) + 2 * 3 * 24 * 24 * 32)
    head = 3 * (32 * 32 + 32 * 2)
    assert tree["macs"] == encoder + head
    assert tree["parameters"] == sum(p.numel() for p in model.parameters())
    parts = {child["name"]: child for child in tree["children"][0]["children"]}
    (listed,) = parts["encoder"]["children"]
    assert listed["macs"] == parts["encoder"]["macs"] == encoder, "a list has what is in it"
    assert 0 < listed["seconds"] < parts["encoder"]["seconds"]
    shown = CliRunner().invoke(cli, [*command, "--depth", "1"])
    assert "classifier" in shown.stdout
    assert "query" not in shown.stdout
    too_long = CliRunner().invoke(cli, ["profile", str(tmp_path), "--length", "1000"])
    assert too_long.exit_code == 2
    assert "takes up to 512 tokens" in too_long.stderr


@pytest.mark.parametrize("activation_bits", [32, 8])
def test_a_recommender_in_training_form_and_packed(clicks_data, tmp_path, activation_bits):
    config = RunConfig.model_validate(
        {
            "output": str(tmp_path),
            "name": "run",
            "data": {"path": str(clicks_data), "batch_size": 64},
            "model": {"embedding_dim": 8, "bottom_mlp": [16], "top_mlp": [12]},
            "quant": {"activation_bits": activation_bits},
            "train": {"max_steps": 2, "threads": 1},
            "tracking": {"enabled": False},
        }
    )
    result = train(config)
    rows, tables, dim = 64, 3, 8
    vectors = tables + 1
    pairs = vectors * (vectors - 1) // 2
    bottom = rows * (2 * 16 + 16 * dim)
    top = rows * ((dim + pairs) * 12 + 12)
    checkpoint = next(Path(result.run_dir / "checkpoints").iterdir())
    for form in (checkpoint, result.run_dir):
        command = ["profile", str(form), "--batch-size", str(rows), "--repeats", "1", "--json"]
        done = CliRunner().invoke(cli, command)
        assert done.exit_code == 0, done.stderr
        tree = json.loads(done.stdout)
        parts = {child["name"]: child for child in tree["children"]}
        assert parts["bot_l"]["macs"] == bottom
        assert parts["interaction"]["macs"] == rows * pairs * dim
        assert parts["top_l"]["macs"] == top
        assert parts["emb_l"]["macs"] == 0
        assert tree["macs"] == bottom + top + rows * pairs * dim
        assert sum(layer["macs"] for layer in parts["top_l"]["children"]) == top
        assert tree["parameters"] == result.fp32_bytes // 4
    assert tree["bytes"] < result.fp32_bytes, "the packed form is kept packed"


def test_an_absent_model():
    done = CliRunner().invoke(cli, ["profile", "absent"])
    assert done.exit_code == 2
    assert "absent: no such run" in done.stderr
