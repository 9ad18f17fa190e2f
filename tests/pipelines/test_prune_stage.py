"""Pruning of heads and neurons: budgets, costs, surgery, and the stage from end to end."""

import copy
import json
import re
from pathlib import Path

import pytest
import torch
import transformers

from dqrm.compress.lower.shapes import layer_units
from dqrm.compress.recon.capture import LayerStream
from dqrm.compress.signals.units import Kept
from dqrm.pipelines.config import load_pipeline
from dqrm.pipelines.runner import run_pipeline
from dqrm.pipelines.text.batches import EncodedText
from dqrm.pipelines.text.calibration import draw_rows, forwards, valid_tokens
from dqrm.pipelines.text.classifier import load_any, load_tokenizer
from dqrm.pipelines.text.labelled import LabelledText
from dqrm.pipelines.text.mask_tuning import tune_masks
from dqrm.pipelines.text.pruning import PruneRecipe, prune_units
from dqrm.pipelines.text.tables import find_columns, read_table, take_examples
from dqrm.pipelines.text.unit_masks import UnitCosts, UnitMasks
from dqrm.profiling.tree import profile

HIDDEN, HEADS, NEURONS, LAYERS = 32, 4, 64, 3
RECIPE = PruneRecipe(macs=0.5, round_to=16, tune=True, damping=0.1, batch_size=16, seed=0)


@pytest.fixture
def model():
    config = transformers.BertConfig(
        vocab_size=40,
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=NEURONS,
        max_position_embeddings=64,
        num_labels=2,
        problem_type="single_label_classification",
        initializer_range=0.2,
    )
    torch.manual_seed(0)
    return transformers.BertForSequenceClassification(config).eval()


@pytest.fixture
def rows(tiny_bert, sentence_files):
    table = read_table(sentence_files / "train.tsv")
    examples = draw_rows(take_examples(table, find_columns(table, "t"), "t"), 96, 0)
    text = EncodedText(load_tokenizer(tiny_bert), examples, 64)
    return LabelledText(text, torch.tensor(examples.labels.to_numpy()))


def nothing(*_):
    pass


def logits(model, rows):
    with torch.no_grad():
        return model(**rows.text.batch(range(len(rows.text)))).logits


def some_units(seed):
    generator = torch.Generator().manual_seed(seed)
    return Kept(
        [torch.rand(HEADS, generator=generator) < 0.6 for _ in range(LAYERS)],
        [torch.rand(NEURONS, generator=generator) < 0.5 for _ in range(LAYERS)],
    )


def test_masked_equals_removed(model, rows):
    masks = UnitMasks(model)
    kept = some_units(0)
    kept.heads[1][:] = False
    masks.keep(kept)
    # Values of tuned masks go into the matrices.
    masks.heads[0] = masks.heads[0] * 1.5
    masks.neurons[2] = masks.neurons[2] * 0.25
    before = logits(model, rows)
    with masks.attached():
        masked = logits(model, rows)
    assert not torch.allclose(before, masked, atol=1e-2)
    assert torch.equal(logits(model, rows), before)
    masks.cut()
    torch.testing.assert_close(logits(model, rows), masked, rtol=1e-5, atol=1e-5)
    for units, heads, neurons in zip(layer_units(model), kept.heads, kept.neurons, strict=True):
        assert (units.num_heads, units.num_neurons) == (int(heads.sum()), int(neurons.sum()))


def test_costs_are_those_that_the_profiler_counts(model):
    tokens = 11
    inputs = {"input_ids": torch.full((3, tokens), 7)}
    whole = profile(model, lambda: model(**inputs), 1).tree.macs
    costs = UnitCosts.of(model, [tokens] * 3)
    before = costs.total(model)
    masks = UnitMasks(model)
    kept = some_units(1)
    masks.keep(kept)
    masks.cut()
    removed = whole - profile(model, lambda: model(**inputs), 1).tree.macs
    assert removed == 3 * (before - costs.total(model))
    # Sentences of several lengths cost what each of them does.
    mixed = UnitCosts.of(model, [4, 20])
    apart = [UnitCosts.of(model, [n]).head for n in (4, 20)]
    assert mixed.head == sum(apart) / 2


@pytest.mark.parametrize("tune", [False, True])
def test_a_budget_for_everything_changes_nothing(model, rows, tmp_path, tune):
    before = logits(model, rows)
    recipe = PruneRecipe(1.0, 16, tune, 0.1, 16, 0)
    pruned = prune_units(model, rows, rows, recipe, tmp_path, nothing, nothing)
    assert pruned.macs_kept == 1.0
    assert pruned.heads == [HEADS] * LAYERS
    assert pruned.neurons == [NEURONS] * LAYERS
    assert pruned.tuned == []
    assert torch.equal(logits(model, rows), before)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_tuning_a_whole_model_returns_ones(model, rows, tmp_path):
    teacher = copy.deepcopy(model)
    masks = UnitMasks(model)
    batches = list(rows.text.in_order_of_length(32))
    losses = iter(range(0, -100, -1))
    with masks.attached():
        streams = tuple(
            LayerStream(
                list(m.bert.encoder.layer),
                forwards(m, rows.text, batches),
                tmp_path / name,
                1 << 20,
            )
            for name, m in (("student", model), ("teacher", teacher))
        )
        tuned = tune_masks(
            masks,
            layer_units(teacher),
            streams,
            valid_tokens(rows.text, batches),
            lambda: next(losses),
            0.0,
        )
    # Every fit was accepted, and none changed anything.
    assert len(tuned.accepted) == 2 * LAYERS
    for mask in [*masks.heads, *masks.neurons]:
        torch.testing.assert_close(mask, torch.ones_like(mask), rtol=0, atol=1e-3)


def test_a_fit_that_does_not_lower_the_held_out_loss_is_not_kept(model, rows, tmp_path):
    recipe = PruneRecipe(0.5, 16, True, 0.1, 16, 0)
    wrong = LabelledText(rows.text, 1 - logits(model, rows).argmax(1))
    tuned = prune_units(model, rows, wrong, recipe, tmp_path, nothing, nothing)
    losses = tuned.held_out_loss
    assert losses["tuned"] <= losses["rearranged"]
    assert (losses["tuned"] < losses["rearranged"]) == bool(tuned.tuned)


def test_the_budget_is_kept_and_used(model, rows, tmp_path):
    pruned = prune_units(model, rows, rows, RECIPE, tmp_path, nothing, nothing)
    assert all(count % 16 == 0 for count in pruned.neurons)
    costs = UnitCosts.of(model, rows.text.lengths)
    whole = LAYERS * (HEADS * costs.head + NEURONS * costs.neuron)
    assert pruned.macs_kept == pytest.approx(costs.total(model) / whole)
    # Less than a block of neurons is left over.
    assert 0.5 - 16 * costs.neuron / whole < pruned.macs_kept <= 0.5
    assert [units.num_heads for units in layer_units(model)] == pruned.heads


PIPELINE = """\
threads: 1
tracking: {{system_metrics: false, flush_seconds: 0.2}}
stages:
  - stage: finetune
    model: {model}
    data: &data {{train: {text}/train.tsv, dev: {text}/dev.tsv.gz, test: {text}/dev.tsv.gz}}
    lr: 3e-3
    epochs: 4
    batch_size: 16
    precision: fp32
  - stage: prune
    model: stage:finetune
    data: *data
    samples: 128
    held_out: 64
    batch_size: 16
    budget: {{macs: 0.6}}
  - stage: finetune
    name: again
    model: stage:prune
    data: *data
    max_steps: 2
    precision: fp32
  - stage: report
"""


def test_the_stage_from_end_to_end(tiny_bert, sentence_files, recorded_runs, dqrm):
    Path("tiny.yaml").write_text(PIPELINE.format(model=tiny_bert, text=sentence_files))
    plan = dqrm("pipeline", "run", "tiny.yaml", "--dry-run")
    assert "calibration rows  128 of 320" in plan.stdout, plan.stderr
    macs = re.search(r"encoder MACs +at most ([\d,]+) of ([\d,]+) a sentence", plan.stdout)
    least, most = (int(number.replace(",", "")) for number in macs.groups())
    assert least == pytest.approx(0.6 * most, rel=1e-3)
    # 13.5 tokens, 3 to 20 words and two marks: 8 d**2 a token and layer, and 2 d s of attention.
    assert most == pytest.approx(13.5 * 2 * (8 * 32**2 + 2 * 32 * 13.5), rel=0.1)
    result = run_pipeline(load_pipeline(Path("tiny.yaml")))
    finetune, prune, again, _ = result.stages
    whole, pruned = finetune.record.metrics, prune.record.metrics
    assert pruned["prune/macs_kept"] <= 0.6
    assert pruned["size/parameters"] < whole["size/parameters"]
    assert pruned["test/accuracy"] > 0.8 * whole["test/accuracy"]
    told = json.loads((prune.folder / "pruning.json").read_text())
    assert list(told["held_out_loss"]) == ["whole", "searched", "rearranged", "tuned"]
    model = load_any(prune.folder / "model")
    assert [units.num_neurons for units in layer_units(model)] == told["neurons"]
    # What trains it again has the same widths.
    after = load_any(again.folder / "model")
    assert {n: p.shape for n, p in after.named_parameters()} == {
        n: p.shape for n, p in model.named_parameters()
    }
    _, children = recorded_runs()
    assert children["prune"].data.metrics["prune/heads"] == sum(told["heads"])
    profiled = dqrm("profile", prune.folder / "model", "--batch-size", 2, "--length", 8)
    assert profiled.exit_code == 0, profiled.stderr


def test_what_cannot_be_pruned_is_told(tiny_bert, sentence_files, dqrm):
    Path("tiny.yaml").write_text(PIPELINE.format(model=tiny_bert, text=sentence_files))
    raw = dqrm("pipeline", "validate", "tiny.yaml", f"stages.prune.model={tiny_bert}")
    assert raw.exit_code == 2
    assert "stages.prune.model: " in raw.stderr
    assert "BertModel has no head; fine-tune it first" in raw.stderr
    many = dqrm("pipeline", "run", "tiny.yaml", "stages.prune.held_out=400", "--no-track",
                "stages.finetune.max_steps=1")  # fmt: skip
    assert many.exit_code == 2
    assert "stages.prune.held_out: held_out=400: there are 320 training rows" in many.stderr
    untuned = ("pipeline", "validate", "tiny.yaml", "stages.prune.tune=false")
    assert dqrm(*untuned).exit_code == 0
    damped = dqrm(*untuned, "stages.prune.damping=3")
    assert damped.exit_code == 2
    assert "damping has no effect with tune=false; leave it out" in damped.stderr
    for stage, message in (
        ("{stage: reconstruct, model: stage:prune, data: *data, transforms: "
         "[{kind: quant, match: '.*qurey', weight: {bits: 8}}]}",
         "stages.reconstruct.transforms: match=.*qurey: no Linear or Embedding has this name"),
        ("{stage: allocate, model: stage:prune, data: *data, match: nothing, ratio: 4, options: "
         "[[{kind: quant, weight: {bits: 8}}], [{kind: quant, weight: {bits: 4}}]]}",
         "stages.allocate.match: match=nothing: no Linear has this name"),
    ):  # fmt: skip
        Path("behind.yaml").write_text(Path("tiny.yaml").read_text() + f"  - {stage}\n")
        behind = dqrm("pipeline", "validate", "behind.yaml")
        assert behind.exit_code == 2
        assert message in behind.stderr, behind.stderr
    config = transformers.DistilBertConfig(
        vocab_size=40, dim=32, hidden_dim=64, n_layers=1, n_heads=2
    )
    config.architectures = ["DistilBertForSequenceClassification"]
    config.save_pretrained("distilled")
    transformers.AutoTokenizer.from_pretrained(tiny_bert).save_pretrained("distilled")
    other = dqrm("pipeline", "validate", "tiny.yaml", "stages.prune.model=distilled")
    assert other.exit_code == 2
    assert "stages.prune.model: DistilBertForSequenceClassification" in other.stderr
