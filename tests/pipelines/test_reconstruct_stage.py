"""Reconstruction from end to end: rounding, distillation and GPTQ of a tiny fine-tuned BERT."""

import re
import signal
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn

from dqrm.compress.grids.nm import NM
from dqrm.compress.grids.record import codes, dequantize, weight_record
from dqrm.compress.grids.records_file import load_records, read_records
from dqrm.compress.lower.shapes import keep_units, layer_units
from dqrm.compress.recon.layerwise import GptqRecipe
from dqrm.compress.recon.lkd import LkdRecipe
from dqrm.compress.transforms.build import build_compression
from dqrm.compress.transforms.config import ActivationGrid, QuantTransform, WeightGrid
from dqrm.pipelines.config import load_pipeline
from dqrm.pipelines.runner import run_pipeline
from dqrm.pipelines.text.batches import EncodedText
from dqrm.pipelines.text.classifier import load_any, load_tokenizer, predict_text
from dqrm.pipelines.text.reconstruction import (
    reconstruct_layers,
    resolve_targets,
    round_weights,
)
from dqrm.pipelines.text.tables import find_columns, read_table, take_examples

GRIDS = """\
    transforms:
      - {kind: quant, match: ".*attention.*(query|key|value|dense)", weight: {bits: 8}, act: {bits: 8}}
      - {kind: quant, match: '.*(intermediate|layer\\.[0-9]+\\.output)\\.dense',
         weight: {bits: 3, group: 16}, act: {bits: 8}}
"""  # noqa: E501
PIPELINE = """\
threads: 1
tracking: {{system_metrics: false, flush_seconds: 0.2, enabled: false}}
stages:
  - stage: finetune
    model: {model}
    data: &data {{train: {text}/train.tsv, dev: {text}/dev.tsv.gz, test: {text}/dev.tsv.gz}}
    lr: 3e-3
    epochs: 4
    batch_size: 16
    precision: fp32
"""
SOLVERS = {
    "none": "",
    "lkd": "solver: lkd, steps: 40, lr: 1e-4, inputs_of: student",
    "gptq": "solver: gptq, act_order: true",
}


def stages(names):
    made = ""
    for name in names:
        extra = "".join(f"    {field}\n" for field in SOLVERS[name].split(", ") if field)
        made += (
            f"  - stage: reconstruct\n    name: {name}\n    model: stage:finetune\n"
            f"    data: *data\n    samples: 128\n    batch_size: 16\n{extra}{GRIDS}"
        )
    return made


@pytest.fixture
def file(tiny_bert, sentence_files):
    path = Path("tiny.yaml")
    text = PIPELINE.format(model=tiny_bert, text=sentence_files)
    path.write_text(text + stages(SOLVERS) + "  - stage: report\n")
    return path


def weights(name, stage):
    return load_file(f"runs/{name}/stages/{stage}/model/model.safetensors")


def test_every_solver_keeps_accuracy_and_a_stopped_one_comes_to_the_same(file, sentence_files):
    result = run_pipeline(load_pipeline(file))
    by_key = {stage.key: stage for stage in result.stages}
    whole = by_key["finetune"].record.metrics["test/accuracy"]
    table = read_table(sentence_files / "dev.tsv.gz")
    examples = take_examples(table, find_columns(table, "t"), "t")
    for name in SOLVERS:
        stage = by_key[name]
        metrics = stage.record.metrics
        assert metrics["test/accuracy"] > whole - 0.05, name
        # 4 d**2 at 8 bits and 2 * 2 d**2 at 3, of hidden width d.
        assert metrics["bits/mean"] == pytest.approx((4 * 8 + 4 * 3) / 8)
        for layer in range(2 if name != "none" else 0):
            error = metrics[f"reconstruct/layer_{layer}_error"]
            assert error < metrics[f"reconstruct/layer_{layer}_error_rounded"]

        # What is on the disk computes what was measured.
        folder = stage.folder / "model"
        model = load_any(folder).eval()
        assert len(load_records(folder, model)) == 12
        text = EncodedText(load_tokenizer(folder), examples, 128)
        chosen = predict_text(model, text, 32).argmax(1)
        right = float((chosen == torch.tensor(examples.labels.to_numpy())).double().mean())
        assert right == metrics["test/accuracy"]
        for module in model.modules():
            record = weight_record(module)
            if record is not None:
                on_grid = dequantize(codes(module.weight, record), record)
                assert torch.equal(module.weight, on_grid)
                assert record.activation_bits == 8

    # Rounding touches nothing but the weights that are named.
    before, after = weights("tiny", "finetune"), weights("tiny", "none")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"{name}.weight" for name in read_records(by_key["none"].folder / "model")}

    def stop_in_the_second_layer(phase, done, total, unit):
        if phase == "lkd: layers" and done == 1:
            signal.raise_signal(signal.SIGINT)

    halves = load_pipeline(file, ["name=halves"])
    stopped = run_pipeline(halves, progress=stop_in_the_second_layer)
    assert stopped.interrupted == signal.SIGINT
    assert [stage.key for stage in stopped.stages] == ["finetune", "none"]
    assert run_pipeline(halves).interrupted is None
    left, right = weights("tiny", "lkd"), weights("halves", "lkd")
    for name in left:
        assert torch.equal(left[name], right[name]), name


def test_what_cannot_be_reconstructed_is_told(file, dqrm):
    for override, message in (
        ("stages.none.transforms.0.match=.*querry", "no Linear has this name; near it are"),
        (
            "stages.none.transforms.0.match=.*dense",
            "has grids already",
        ),
        (
            "stages.none.transforms.0.schedule={start: 16, period: 10}",
            "a schedule is for training",
        ),
        (
            "stages.none.transforms.0.weight={bits: 2, range: full}",
            "range has no effect on a ternary grid",
        ),
        (
            "stages.none.transforms.0.weight={bits: 8, groups: 7}",
            "cannot be cut into 7 groups of rows",
        ),
        (
            "stages.gptq.transforms.1.weight={bits: 2}",
            "GPTQ rounds to symmetric grids, not to ternary ones; set 3 bits or more",
        ),
        ("stages.gptq.damping=0", "damping"),
        ("stages.none.damping=0.1", "damping is for solver=gptq and has no effect with none"),
        ("stages.gptq.steps=9", "steps is for solver=lkd and has no effect with gptq"),
        ("stages.none.inputs_of=student", "inputs_of is for solver=lkd or gptq"),
        ("stages.finetune.model=absent", "tiny.yaml:5: stages.finetune.model: absent: no such"),
    ):
        done = dqrm("pipeline", "validate", file, override)
        assert done.exit_code == 2, override
        assert message in done.stderr
    again = dqrm("pipeline", "validate", file, "stages.gptq.model=stage:none")
    assert again.exit_code == 2
    assert "stages.gptq.model: stage:none: its weights are on grids already" in again.stderr


SPARSE = """\
threads: 1
tracking: {{system_metrics: false, flush_seconds: 0.2, enabled: false}}
data: {{train: {text}/train.tsv, dev: {text}/dev.tsv.gz}}
stages:
  - stage: compress
    model: {model}
    max_steps: 6
    batch_size: 16
    precision: fp32
    transforms: [{{kind: nm, match: &layers '.*layer.*(query|key|value|dense)', via: one_shot}}]
  - stage: reconstruct
    model: stage:compress
    samples: 64
    batch_size: 16
    solver: {solver}
    transforms: [{{kind: quant, match: *layers, weight: {{bits: 8}}, act: {{bits: 8}}}}]
  - stage: lower
    model: stage:reconstruct
    target: int8
    buckets: [[1, 16]]
    seconds: 1.0e-6
"""


@pytest.fixture
def sparse(tiny_bert, sentence_files):
    def write(solver="lkd"):
        path = Path("sparse.yaml")
        told = "lkd\n    steps: 4" if solver == "lkd" else solver
        path.write_text(SPARSE.format(model=tiny_bert, text=sentence_files, solver=told))
        return path

    return write


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_sparse_model_stays_sparse_on_its_grids(sparse, solver, dqrm):
    compress, reconstruct, lower = run_pipeline(load_pipeline(sparse(solver))).stages
    cut = load_file(compress.folder / "model" / "model.safetensors")
    found = load_file(reconstruct.folder / "model" / "model.safetensors")
    records = read_records(reconstruct.folder / "model")
    assert len(records) == 12
    for name, record in records.items():
        assert (record.mask, record.bits, record.activation_bits) == (NM(2, 4), 8, 8)
        zero = cut[f"{name}.weight"] == 0
        assert float(zero.double().mean()) == 0.5
        assert not found[f"{name}.weight"][zero].any()
    # 8 bits for half of the weights, and two for the place of each.
    metrics = lower.record.metrics
    dense = sum(found[f"{name}.weight"].numel() for name in records)
    assert (metrics["size/code_bytes"], metrics["size/place_bytes"]) == (dense / 2, dense / 8)
    assert metrics["size/lowered_bytes"] <= metrics["size/packed_bytes"]
    assert metrics["lower/same_answers"] == 1.0
    assert metrics["lower/max_abs_difference"] < 1e-3
    if solver == "none":
        plan = dqrm("pipeline", "run", "sparse.yaml", "--dry-run")
        size = f"{int(metrics['size/packed_bytes']):,} bytes, "
        told = re.findall(rf"packed +{size}\S+ x smaller(.*)", plan.stdout)
        assert told == ["", " before it is deflated"], plan.stdout
    folder = f"stages.reconstruct.model={reconstruct.folder / 'model'}"
    again = dqrm("pipeline", "validate", "sparse.yaml", folder)
    assert again.exit_code == 2
    assert "its weights are on grids already" in again.stderr


def test_a_stopped_stage_goes_on_with_a_sparse_model_whose_inputs_change_grids(sparse):
    before = "via: one_shot}, {kind: quant, match: *layers, act: {bits: 8, grid: asymmetric}}]"
    file = sparse()
    text, _, _ = file.read_text().partition("  - stage: lower")
    file.write_text(text.replace("via: one_shot}]", before))
    whole = run_pipeline(load_pipeline(file)).stages[-1]

    def stop_in_the_second_layer(phase, done, total, unit):
        if phase == "reconstruct: layers" and done == 1:
            signal.raise_signal(signal.SIGINT)

    halves = load_pipeline(file, ["name=halves"])
    assert run_pipeline(halves, progress=stop_in_the_second_layer).interrupted == signal.SIGINT
    halved = run_pipeline(halves).stages[-1]
    left, right = (load_file(s.folder / "model" / "model.safetensors") for s in (whole, halved))
    assert all(torch.equal(left[name], right[name]) for name in left)
    assert halved.record.metrics["best/val_loss"] == whole.record.metrics["best/val_loss"]
    for record in read_records(halved.folder / "model").values():
        assert (record.mask, record.activation_grid) == (NM(2, 4), "symmetric")


def test_what_comes_too_late_is_told_before_it_runs(sparse, dqrm):
    file = sparse()
    grids = "[{kind: quant, match: '.*layer.*dense', weight: {bits: 8}}]"
    at = "sparse.yaml:12: stages.reconstruct.model: stage:compress: its weights are on grids"
    done = dqrm("pipeline", "validate", file, f"stages.compress.transforms={grids}")
    assert done.exit_code == 2
    assert at in done.stderr
    assert "reconstruct comes before that, name the model from then" in done.stderr
    prune = "  - {stage: prune, model: stage:compress, budget: {macs: 0.5}}\n"
    file.write_text(file.read_text() + prune)
    done = dqrm("pipeline", "validate", file)
    assert done.exit_code == 2
    assert "it has N:M patterns or inputs on grids already; prune comes before" in done.stderr


@pytest.mark.parametrize("weight", [{"bits": 4}, {"bits": 3, "grid": "asymmetric"}], ids=str)
def test_a_full_range_is_that_of_training(weight):
    def layer():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(16, 8))

    rounded = {}
    for chosen in ("restricted", "full"):
        grids = [QuantTransform(kind="quant", match="0", weight={**weight, "range": chosen})]
        trained, model = layer(), layer()
        compression = build_compression(grids)
        compression.attach(trained, 1)
        compression.freeze()
        round_weights(model, resolve_targets(model, grids))
        rounded[chosen] = model[0].weight
        assert torch.equal(model[0].weight, trained[0].weight)
    assert not torch.equal(rounded["restricted"], rounded["full"])


@pytest.mark.parametrize("recipe", [None, LkdRecipe(2, 1e-4, 0), GptqRecipe(0.01, False)])
def test_layers_without_heads_or_neurons(recipe, tiny_bert, sentence_files, tmp_path):
    config = transformers.AutoConfig.from_pretrained(tiny_bert)
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(config).eval()
    first, second = layer_units(model)
    none, some = torch.zeros(64, dtype=torch.bool), torch.arange(64) < 16
    keep_units(first, torch.zeros(2, dtype=torch.bool), some)
    keep_units(second, torch.tensor([True, False]), none)
    table = read_table(sentence_files / "dev.tsv.gz")
    examples = take_examples(table, find_columns(table, "t"), "t").take(range(16))
    text = EncodedText(load_tokenizer(tiny_bert), examples, 128)
    targets = resolve_targets(
        model,
        load_pipeline_transforms(),
    )
    before = predict_text(model, text, 8)
    if recipe is None:
        round_weights(model, targets)
    else:
        batches = text.shuffled(8, 0, 0)
        reconstruct_layers(
            model, targets, recipe, "student", text, batches, tmp_path, lambda: None, print
        )
    assert torch.allclose(before, predict_text(model, text, 8), atol=0.05)


def load_pipeline_transforms():
    return [
        QuantTransform(
            kind="quant",
            match=r".*encoder.*",
            weight=WeightGrid(bits=8, group=16),
            act=ActivationGrid(),
        )
    ]
