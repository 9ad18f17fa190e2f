"""MACs against closed forms, for the operators that torch's counter takes for nothing."""

import itertools
import json
from pathlib import Path

import pytest
import torch
import transformers
from click.testing import CliRunner
from torch import nn

from dqrm.cli import cli
from dqrm.config import RunConfig
from dqrm.data.dataset import PreparedDataset
from dqrm.profiling.roofline import Machine
from dqrm.profiling.tree import profile
from dqrm.training.run import train


@pytest.fixture(autouse=True)
def no_measuring(monkeypatch):
    """What the machine can do is another test's matter."""
    known = Machine(1, dict.fromkeys(("float32", "bfloat16", "int8"), 1e11), 1e10, 1e-6)
    monkeypatch.setattr("dqrm.profiling.tree.measure", lambda types: known)


def small_bert(heads):
    """A classifier of 2 layers with random weights."""
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=heads,
        intermediate_size=64,
    )
    return transformers.BertForSequenceClassification(config)


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
    tree = profile(model, lambda: model(x), repeats=1).tree
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
    tree = profile(layer, lambda: layer(x), repeats=1).tree
    rows = batch * tokens
    attention = 2 * batch * tokens * tokens * dim
    assert tree.macs == rows * (4 * dim * dim + 2 * dim * inner) + attention
    assert torch.backends.mha.get_fastpath_enabled() is before


def test_a_transformer_in_hugging_faces_format(tmp_path):
    model = small_bert(heads=2)
    model.save_pretrained(tmp_path)
    command = ["profile", str(tmp_path), "--batch-size", "3", "--length", "24", "--repeats", "1"]
    done = CliRunner().invoke(cli, [*command, "--json"])
    assert done.exit_code == 0, done.stderr
    tree = json.loads(done.stdout)["tree"]
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


def operator_calls():
    """By name, calls of operators that torch's counter takes for nothing, [5, 16] by [8, 16]."""
    x, weight = torch.randn(5, 16), torch.randn(8, 16)
    codes = torch.randint(-127, 128, (8, 16), dtype=torch.int8)
    inputs = torch.randint(0, 255, (5, 16), dtype=torch.uint8)
    packed = torch.ops.onednn.qlinear_prepack(codes, [5, 16])
    ones, zeros = torch.ones(8), torch.zeros(8, dtype=torch.int32)
    dynamic = torch.ao.nn.quantized.dynamic.Linear(16, 8)
    half = weight.bfloat16()
    prepacked = torch.ops.mkldnn._reorder_linear_weight(half, 5)
    return {
        "qlinear": lambda: torch.ops.onednn.qlinear_pointwise(
            inputs, 1.0, 0, packed, ones, zeros, None, 1.0, 0, torch.float32, "none", [], ""
        ),
        "int_mm": lambda: torch._int_mm(codes.new_ones(5, 16), codes.T.contiguous()),
        "int8pack": lambda: torch._weight_int8pack_mm(x.bfloat16(), codes, ones.bfloat16()),
        "linear_dynamic": lambda: dynamic(x),
        "linear_pointwise": lambda: torch.ops.mkldnn._linear_pointwise(
            x.bfloat16(), prepacked, None, "none", [], ""
        ),
    }


@pytest.mark.parametrize(
    "name", ["qlinear", "int_mm", "int8pack", "linear_dynamic", "linear_pointwise"]
)
def test_operators_that_torchs_counter_takes_for_nothing(name):
    call = operator_calls()[name]

    class Calls(nn.Module):
        def forward(self):
            return call()

    model = Calls()
    tree = profile(model, model, repeats=1).tree
    assert tree.macs == 5 * 8 * 16
    assert tree.gflops == pytest.approx(1e-9 * tree.flops / tree.seconds)


def test_rows_of_a_table_are_no_multiplications():
    bag = nn.EmbeddingBag(10, 4, mode="sum")
    tree = profile(bag, lambda: bag(torch.arange(6), torch.tensor([0, 3])), repeats=1).tree
    assert (tree.macs, tree.parameters) == (0, 40)


@pytest.mark.parametrize("target", ["int8", "bf16", "fp32"])
def test_a_lowered_transformer_counts_what_it_was_made_of(tmp_path, target):
    from dqrm.compress.grids.granularity import Granularity
    from dqrm.compress.grids.record import WeightRecord, dequantize, fit, set_weight_record
    from dqrm.compress.lower.folder import write_lowered

    model = small_bert(heads=2)
    dense = model.num_parameters()
    row = Granularity("row")
    for name, module in model.named_modules():
        if (".layer." in name and isinstance(module, nn.Linear)) or "word_emb" in name:
            codes, scale = fit(module.weight.detach(), "symmetric", 8, row)
            activations = 8 if isinstance(module, nn.Linear) else 32
            record = WeightRecord("symmetric", 8, row, scale, None, activations)
            module.weight.data = dequantize(codes, record)
            set_weight_record(module, record)
    write_lowered(model, tmp_path, target=target)
    command = ["profile", str(tmp_path), "--batch-size", "3", "--length", "24", "--repeats", "1"]
    done = CliRunner().invoke(cli, [*command, "--json"])
    assert done.exit_code == 0, done.stderr
    tree = json.loads(done.stdout)["tree"]
    rows = 3 * 24
    encoder = 2 * (rows * (4 * 32 * 32 + 2 * 32 * 64) + 2 * 3 * 24 * 24 * 32)
    assert tree["macs"] == encoder + 3 * (32 * 32 + 32 * 2)
    assert tree["parameters"] == dense
    layer = tree["children"][0]["children"][1]["children"][0]["children"][0]
    parts = {child["name"]: child for child in layer["children"][0]["children"][0]["children"]}
    assert parts["query"]["macs"] == parts["value"]["macs"] == rows * 32 * 32
    if target == "int8":
        assert parts["query"]["kind"] == "Int8Linear"
        assert parts["query"]["bytes"] == 32 * 32 + 2 * 4 * 32
        assert parts["query"]["flops_by_type"] == {"int8": 2 * rows * 32 * 32}
        assert parts["query"]["moved_bytes"] == 32 * 32 + 2 * 4 * 32 + 4 * rows * (32 + 32)
        times = {parts[name]["seconds"] for name in ("query", "key", "value")}
        assert len(times) == 1, "one product, its time shared out by outputs"
    assert "GFLOP/s" in CliRunner().invoke(cli, command).stdout


def test_a_pruned_transformer_counts_what_is_left(tmp_path):
    from dqrm.compress.lower.shapes import keep_units, layer_units, record_shapes

    model = small_bert(heads=4)
    first, second = layer_units(model)
    keep_units(first, torch.tensor([True, False, True, False]), torch.arange(64) < 24)
    keep_units(second, torch.zeros(4, dtype=torch.bool), torch.arange(64) < 40)
    record_shapes(model)
    model.save_pretrained(tmp_path)
    command = ["profile", str(tmp_path), "--batch-size", "3", "--length", "24", "--repeats", "1"]
    done = CliRunner().invoke(cli, [*command, "--json"])
    assert done.exit_code == 0, done.stderr
    tree = json.loads(done.stdout)["tree"]
    rows, width = 3 * 24, 2 * 8
    encoder = rows * (4 * 32 * width + 2 * 32 * 24) + 2 * 3 * 24 * 24 * width + rows * 2 * 32 * 40
    assert tree["macs"] == encoder + 3 * (32 * 32 + 32 * 2)
    assert tree["parameters"] == model.num_parameters()


def looked_up(folder, batch, dim, training):
    """Bytes of rows, ids and results: rows are FP32 in training, of 4 bits when packed."""
    first = next(iter(PreparedDataset.open(folder).split("train").batches(batch)))
    tables, row_bytes = 3, 4 * dim if training else dim // 2
    bags = itertools.pairwise(first.offsets.tolist())
    read = {
        (bag // batch, int(first.indices[place]))
        for bag, (begin, end) in enumerate(bags)
        for place in range(begin, end)
    }
    ids = first.indices.nbytes + first.offsets.nbytes
    return len(read) * row_bytes + 4 * tables + ids + 4 * batch * tables * dim


@pytest.mark.parametrize("activation_bits", [32, 8])
def test_a_recommender_in_training_form_and_packed(clicks_data, tmp_path, activation_bits):
    config = RunConfig.model_validate(
        {
            "output": str(tmp_path),
            "name": "run",
            "data": {"path": str(clicks_data), "batch_size": 64},
            "model": {"embedding_dim": 8, "bottom_mlp": [16], "top_mlp": [12]},
            "quant": {"bits": 4, "activation_bits": activation_bits},
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
        tree = json.loads(done.stdout)["tree"]
        parts = {child["name"]: child for child in tree["children"]}
        assert parts["bot_l"]["macs"] == bottom
        assert parts["interaction"]["macs"] == rows * pairs * dim
        assert parts["top_l"]["macs"] == top
        assert parts["emb_l"]["macs"] == 0
        assert tree["macs"] == bottom + top + rows * pairs * dim
        assert sum(layer["macs"] for layer in parts["top_l"]["children"]) == top
        assert tree["parameters"] == result.fp32_bytes // 4
        assert parts["emb_l"]["moved_bytes"] == looked_up(
            clicks_data, rows, dim, form == checkpoint
        )
    assert tree["flops"] == 2 * tree["macs"] + rows * (16 + dim + 12), "ReLU has one a value"
    assert tree["bytes"] < result.fp32_bytes, "the packed form is kept packed"


def test_what_cannot_be_profiled(tmp_path):
    (tmp_path / "stage" / "model").mkdir(parents=True)
    (tmp_path / "stage" / "model" / "config.json").write_text("{}")
    stage = tmp_path / "stage"
    for arguments, message in (
        (["absent"], "absent: no such run"),
        ([stage], f"{stage}: holds no model itself; name {stage / 'model'}"),
        ([stage, "--length", "7"], "--length is for transformers"),
        ([stage / "model", "--data", "clicks"], "--data is for recommenders"),
    ):
        done = CliRunner().invoke(cli, ["profile", *map(str, arguments)])
        assert done.exit_code == 2
        assert message in done.stderr
