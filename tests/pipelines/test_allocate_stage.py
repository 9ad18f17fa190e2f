"""Grids chosen matrix by matrix: what is written, that it fits, and who takes it."""

import json
import re
from pathlib import Path

import pytest
import torch

from dqrm.compress.grids.granularity import Granularity
from dqrm.compress.grids.nm import NM
from dqrm.compress.grids.records_file import read_records
from dqrm.compress.signals.candidates import WeightOption
from dqrm.pipelines.config import load_pipeline
from dqrm.pipelines.runner import run_pipeline
from dqrm.pipelines.stages.allocate import _weight_option
from dqrm.pipelines.stages.allocation import read_allocation, with_match
from dqrm.pipelines.text.allocation import weight_curvature
from dqrm.pipelines.text.batches import EncodedText
from dqrm.pipelines.text.labelled import LabelledText
from dqrm.pipelines.text.tables import Labels, find_columns, read_table, take_examples

PIPELINE = """\
threads: 1
tracking: {{system_metrics: false, flush_seconds: 0.2, enabled: false}}
data: {{train: {text}/train.tsv, dev: {text}/dev.tsv.gz}}
stages:
  - {{stage: finetune, model: {model}, max_steps: 20, batch_size: 16, lr: 3e-3, precision: fp32}}
  - stage: allocate
    model: stage:finetune
    samples: 64
    batch_size: 16
    match: '.*encoder.*(query|key|value|dense)'
    options:
      - [{{kind: quant, weight: {{bits: 8}}, act: {{bits: 8}}}}]
      - [{{kind: quant, weight: {{bits: 4}}, act: {{bits: 8}}}}]
      - [{{kind: quant, weight: {{bits: 3}}, act: {{bits: 8}}}}]
    ratio: 6
  - {{stage: reconstruct, model: stage:finetune, allocation: stage:allocate, samples: 64}}
"""
SPARSE = "[{kind: nm, keep: 2, group: 4, via: one_shot}, {kind: quant, weight: {bits: 8}}]"


@pytest.fixture
def file(tiny_bert, sentence_files):
    path = Path("tiny.yaml")
    path.write_text(PIPELINE.format(model=tiny_bert, text=sentence_files))
    return path


def test_the_choice_fits_and_is_taken(file):
    _, allocate, reconstruct = run_pipeline(load_pipeline(file)).stages
    metrics = allocate.record.metrics
    assert metrics["allocate/times_smaller"] >= 6
    assert metrics["allocate/expected_loss"] <= metrics["allocate/uniform_expected_loss"]
    told = json.loads((allocate.folder / "allocation.json").read_text())["matrices"]
    assert len(told) == 12
    chosen = {name: (8, 4, 3)[matrix["chosen"]] for name, matrix in told.items()}
    assert len(set(chosen.values())) > 1
    spent = sum(matrix["bytes"][matrix["chosen"]] for matrix in told.values())
    assert spent == metrics["allocate/bytes"]
    for matrix in told.values():
        assert matrix["bytes"] == sorted(matrix["bytes"], reverse=True)
        assert matrix["expected_loss"] == sorted(matrix["expected_loss"])
    records = read_records(reconstruct.folder / "model")
    assert {name: record.bits for name, record in records.items()} == chosen
    assert {record.activation_bits for record in records.values()} == {8}
    assert read_allocation(allocate.folder)[0].model_fields_set == {
        "kind",
        "match",
        "weight",
        "act",
    }


def test_stages_from_before_there_were_signals_stay_complete(file):
    stages = {stage.key: stage for stage in load_pipeline(file).stages}
    assert "signal" not in stages["allocate"].identity()
    traced = load_pipeline(file, ["stages.allocate.signal=trace"])
    identities = {stage.key: stage.identity() for stage in traced.stages}
    assert identities["allocate"] == {**stages["allocate"].identity(), "signal": "trace"}


def test_the_loss_may_be_foreseen_by_traces(file):
    by_trace = run_pipeline(load_pipeline(file, ["stages.allocate.signal=trace"])).stages[1]
    told = json.loads((by_trace.folder / "allocation.json").read_text())["matrices"]
    by_fisher = run_pipeline(load_pipeline(file)).stages[1]
    other = json.loads((by_fisher.folder / "allocation.json").read_text())["matrices"]
    for name, matrix in told.items():
        assert matrix["bytes"] == other[name]["bytes"]
        assert min(matrix["expected_loss"]) > 0
        # Every weight of a matrix counts alike: what differs is the error of the grid alone.
        assert matrix["expected_loss"] == sorted(matrix["expected_loss"])
    assert by_trace.record.metrics["allocate/times_smaller"] >= 6


def test_the_curvature_of_a_matrix_is_its_trace_over_its_weights(tiny_bert, sentence_files):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    table = read_table(sentence_files / "train.tsv")[:16]
    examples = take_examples(table, find_columns(table, "here"), "here")
    text = EncodedText(AutoTokenizer.from_pretrained(tiny_bert), examples, 32)
    rows = LabelledText(
        text, Labels.of(examples.labels, "auto", "here").encode(table.label, "here")
    )
    model = AutoModelForSequenceClassification.from_pretrained(tiny_bert).eval()
    modules = {"classifier": model.classifier}
    batches = [list(range(16))] * 5
    found = weight_curvature(model, modules, "trace", rows, batches, 0)["classifier"]
    assert model.config._attn_implementation != "eager"

    features = model.bert(**text.batch(batches[0])).pooler_output
    weight = model.classifier.weight.detach()

    def loss(weight):
        logits = features @ weight.T + model.classifier.bias
        return torch.nn.functional.cross_entropy(logits, rows.labels)

    hessian = torch.autograd.functional.hessian(loss, weight).reshape(weight.numel(), -1)
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randint(0, 2, weight.shape, generator=generator) for _ in batches]
    probes = torch.stack(drawn).flatten(1).float() * 2 - 1
    traces = ((probes @ hessian) * probes).sum(1)
    assert float(found) == pytest.approx(float(traces.mean()) / weight.numel(), rel=1e-4)


def test_a_budget_may_be_that_of_an_option(file, dqrm):
    overrides = ("stages.allocate.ratio=null", "stages.allocate.like=1")
    plan = dqrm("pipeline", "run", file, "--dry-run", *overrides).stdout
    # Four matrices of d x d and two of d x 2 d in each of two layers, of width 32.
    assert re.search(r"budget +as option 1 of 65,536 bytes\n", plan), plan
    plan = dqrm("pipeline", "run", file, "--dry-run").stdout
    assert re.search(r"budget +10,922 of 65,536 bytes\n", plan), plan
    assert re.search(r"packed +as stage:allocate comes to\n", plan), plan
    allocate = run_pipeline(load_pipeline(file, overrides)).stages[1]
    metrics = allocate.record.metrics
    told = json.loads((allocate.folder / "allocation.json").read_text())["matrices"]
    assert metrics["allocate/bytes"] <= sum(matrix["bytes"][1] for matrix in told.values())
    assert metrics["allocate/uniform_option"] == 1
    assert metrics["allocate/expected_loss"] < metrics["allocate/uniform_expected_loss"]


def test_what_cannot_be_allocated_is_told(file, dqrm):
    patterns = ("stages.allocate.ratio=4", f"stages.allocate.options=[{SPARSE}, {SPARSE}]")
    for overrides, message in (
        (("stages.allocate.ratio=40",), "the cheapest candidates cost"),
        (patterns, "has patterns, which take training"),
    ):
        done = dqrm("pipeline", "run", file, *overrides, "stages.finetune.max_steps=1")
        assert done.exit_code == 2, overrides
        assert message in done.stderr
    again = (
        "  - {stage: reconstruct, name: again, model: stage:reconstruct, samples: 8,"
        " transforms: [{kind: quant, match: '.*pooler.*', weight: {bits: 8}}]}\n"
    )
    whole = file.read_text()
    file.write_text(whole + again)
    done = dqrm("pipeline", "run", file, "stages.finetune.max_steps=1")
    assert done.exit_code == 2
    assert "stage again: stage:reconstruct: its weights are on grids already" in done.stderr
    file.write_text(whole)
    for override, message in (
        ("stages.allocate.match=.*querry", "no Linear has this name; near it are"),
        (
            "stages.allocate.options=[[{kind: quant, weight: {bits: 99}}], []]",
            "option 0: 0.weight.bits",
        ),
        ("stages.reconstruct.allocation=finetune", "must be stage:NAME"),
        ("stages.allocate.ratio=null", "set ratio or like"),
        ("stages.allocate.like=1", "set ratio or like"),
    ):
        done = dqrm("pipeline", "validate", file, override)
        assert done.exit_code == 2, override
        assert message in done.stderr


def test_an_option_states_its_bytes_and_its_loss():
    weight = torch.randn(8, 32, generator=torch.Generator().manual_seed(0))
    fisher = torch.ones_like(weight)
    whole = WeightOption("fp32", 32).candidate(weight, fisher)
    assert (whole.cost, whole.loss) == (4 * weight.numel(), 0.0)
    sparse = WeightOption("symmetric", 8, Granularity("row"), NM(2, 4))
    value, nbytes = sparse.applied(weight)
    assert NM(2, 4).holds(value)
    # A byte for half of the weights, two bits for the place of each, a scale a row.
    assert nbytes <= weight.numel() // 2 + weight.numel() // 8 + 8 * 4
    candidate = sparse.candidate(weight, fisher)
    assert candidate.loss == pytest.approx(float((value - weight).square().sum() / 2))


def test_an_option_has_the_range_that_is_set():
    weight = torch.randn(8, 32, generator=torch.Generator().manual_seed(0))
    for chosen, steps in (("restricted", 7), ("full", 8)):
        grid = {"bits": 4, "range": chosen}
        option = _weight_option(with_match([{"kind": "quant", "weight": grid}], [".*"]))
        value, _ = option.applied(weight)
        step = weight.abs().amax(1, keepdim=True) / steps
        torch.testing.assert_close(value / step, (value / step).round())
