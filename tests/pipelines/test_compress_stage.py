"""Training under compression of a tiny BERT made here: kills, what is selected, what is written."""

import signal
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from killing import kill_once_written
from safetensors.torch import load_file

from dqrm.pipelines.config import load_pipeline
from dqrm.pipelines.runner import run_pipeline

PIPELINE = """\
threads: 1
tracking: {{system_metrics: false, flush_seconds: 0.2, enabled: false}}
stages:
  - stage: finetune
    model: {model}
    data: {{train: {text}/train.tsv, dev: {text}/dev.tsv.gz, test: {text}/dev.tsv.gz}}
    lr: 3e-3
    epochs: 3
    batch_size: 16
    precision: fp32
  - stage: compress
    model: stage:finetune
    data: {{train: {text}/train.tsv, dev: {text}/dev.tsv.gz, test: {text}/dev.tsv.gz}}
    lr: 3e-3
    epochs: 2
    batch_size: 16
    precision: fp32
    layers: [1]
    distill: {{teacher: "stage:finetune"}}
    transforms:
      - kind: quant
        match: 'bert\\.encoder\\..*(query|key|value|dense)'
        weight: {{bits: 2}}
        act: {{bits: 8}}
      - kind: quant
        match: bert\\.embeddings\\.word_embeddings
        weight: {{bits: 8}}
"""


@pytest.fixture(scope="module")
def finished(tiny_bert, sentence_files, tmp_path_factory):
    """A folder in which the pipeline ran."""
    folder = tmp_path_factory.mktemp("compressed")
    file = folder / "small.yaml"
    file.write_text(PIPELINE.format(model=tiny_bert, text=sentence_files))
    torch.set_num_threads(1)
    return file, run_pipeline(load_pipeline(file, [f"output={folder}/runs"]))


def test_the_shipped_model_is_the_measured_one(finished, sentence_files):
    from dqrm.compress.grids.record import codes
    from dqrm.compress.grids.records_file import load_records
    from dqrm.pipelines.text.batches import EncodedText
    from dqrm.pipelines.text.classifier import load_any, load_tokenizer, predict_text
    from dqrm.pipelines.text.quality import measure_text
    from dqrm.pipelines.text.tables import find_columns, read_table, take_examples

    _, result = finished
    base, small = result.stages
    folder = small.folder / "model"
    model = load_any(folder)
    records = load_records(folder, model)
    assert model.config.num_hidden_layers == 1
    layer = "bert.encoder.layer.0"
    assert {name for name in records if name.startswith(layer)} == {
        f"{layer}.{name}"
        for name in (
            *(f"attention.self.{part}" for part in ("query", "key", "value")),
            *("attention.output.dense", "intermediate.dense", "output.dense"),
        )
    }
    for name, record in records.items():
        weight = model.get_submodule(name).weight.detach()
        found = set(codes(weight, record).unique().tolist())
        assert record.bits == (8 if "embeddings" in name else 2)
        assert len(found) > 100 or found <= {-1.0, 0.0, 1.0}, name
    table = read_table(sentence_files / "dev.tsv.gz")
    examples = take_examples(table, find_columns(table, "dev"), "dev")
    text = EncodedText(load_tokenizer(folder), examples, 128)
    measured = measure_text(predict_text(model, text, 32), torch.tensor(examples.labels.array), 2)
    metrics = small.record.metrics
    assert measured["accuracy"] == metrics["test/accuracy"] == metrics["best/val_accuracy"]
    assert measured["loss"] == pytest.approx(metrics["test/loss"], rel=1e-5)
    assert metrics["test/accuracy"] > 0.7
    assert metrics["size/parameters"] < base.record.metrics["size/parameters"]
    # 1.6 bits a ternary weight; a scale a row, biases and norms in FP32.
    linear = 4 * 32 * 32 + 2 * 32 * 64
    ternary = sum(-(-n // 5) for n in (*[32 * 32] * 4, *[32 * 64] * 2))
    rest = 4 * (2 * (4 * 32 + 64 + 32) + 4 * 32)
    assert metrics["size/encoder_packed_bytes"] == ternary + rest
    assert metrics["size/encoder_fp32_bytes"] == 4 * linear + 4 * (4 * 32 + 64 + 32 + 4 * 32)


def test_a_killed_stage_comes_to_the_same_weights(finished, tiny_bert, sentence_files, dqrm):
    file, unbroken = finished
    run = ("pipeline", "run", str(file), "output=again", "threads=1")
    kill_once_written(
        "again/small/work/compress-*/scratch/step-0000002*",
        *run,
        "stages.compress.save_minutes=1e-6",
    )
    resumed = dqrm(*run, "stages.compress.save_minutes=9")
    assert resumed.exit_code == 0, resumed.stderr
    assert "going on at step" in resumed.stderr
    ours = Path("again/small/stages/compress/model")
    theirs = unbroken.stages[1].folder / "model"
    for name in ("model.safetensors", "compression.safetensors"):
        left, right = load_file(ours / name), load_file(theirs / name)
        assert left.keys() == right.keys()
        for key in left:
            assert torch.equal(left[key], right[key]), key


def whole_and_halves(tiny_bert, text, transforms):
    """A stage of 36 steps that ran at once, and one that a signal ended in step 7."""
    Path("short.yaml").write_text(
        "tracking: {enabled: false}\n"
        f"data: {{train: {text}/train.tsv}}\n"
        "stages:\n"
        f"  - {{stage: compress, model: {tiny_bert}, epochs: 2, batch_size: 16, precision: fp32,\n"
        f"     eval_every: 4, transforms: {transforms}}}\n"
    )
    (whole,) = run_pipeline(load_pipeline(Path("short.yaml"), ["name=whole"])).stages

    def interrupt(phase, done, total, unit):
        if done == 7:
            signal.raise_signal(signal.SIGINT)

    halves = load_pipeline(Path("short.yaml"), ["name=halves"])
    assert run_pipeline(halves, progress=interrupt).interrupted == signal.SIGINT
    (other,) = run_pipeline(halves).stages
    for name in ("model.safetensors", "compression.safetensors"):
        left = load_file(whole.folder / "model" / name)
        right = load_file(other.folder / "model" / name)
        assert left.keys() == right.keys()
        assert all(torch.equal(left[key], right[key]) for key in left)
    return whole


def test_a_schedule_asks_how_sensitive_layers_are(tiny_bert, sentence_files, caplog):
    with caplog.at_level("INFO", logger="dqrm"):
        whole = whole_and_halves(
            tiny_bert,
            sentence_files,
            "[{kind: quant, match: 'bert\\.encoder.*dense', weight: {bits: 4},"
            " schedule: {start: 6, period: 2, sensitivity: eigenvalue}}]",
        )
    told = [r.message for r in caplog.records if r.message.startswith("sensitivity of layers: ")]
    assert len(told) == 2, "once a stage, and not again when it goes on"
    shares = [float(share) for share in told[0].partition(": ")[2].split(", ")]
    assert len(shares) == 2
    assert max(shares) == 1.0
    assert any("not yet fully compressed" in r.message for r in caplog.records)
    # Factor 5 of the most sensitive layer: bits change in the steps 2 and 20.
    assert whole.record.metrics["best/step"] > 20


def test_a_pattern_is_selected_when_it_is_decided(tiny_bert, sentence_files):
    from dqrm.compress.grids.nm import NM
    from dqrm.compress.grids.records_file import load_records
    from dqrm.pipelines.text.account import planned_account
    from dqrm.pipelines.text.classifier import load_any

    whole = whole_and_halves(
        tiny_bert,
        sentence_files,
        "[{kind: nm, match: 'bert\\.encoder.*dense', rho: 100, updates: 4, joint: true},"
        " {kind: quant, match: 'bert\\.encoder.*dense', weight: {bits: 8}, act: {bits: 8}}]",
    )
    assert whole.record.metrics["best/step"] > 25, "the search takes 25 of 36 steps"
    (stage,) = load_pipeline(Path("short.yaml")).stages
    planned = planned_account(stage.skeleton({}), stage.transforms).metrics()
    assert planned.items() <= whole.record.metrics.items()
    model = load_any(whole.folder / "model")
    records = load_records(whole.folder / "model", model)
    assert len(records) == 6
    for name, record in records.items():
        assert (record.mask, record.bits, record.activation_bits) == (NM(2, 4), 8, 8)
        weight = model.get_submodule(name).weight.detach()
        assert int((weight != 0).view(len(weight), -1, 4).sum(2).max()) == 2


def test_a_regression_of_pairs_learns_from_its_teacher(tiny_bert, caplog):
    rng = np.random.default_rng(3)
    score = rng.uniform(0, 5, 96).round(2)
    first = [" ".join(f"w{n}" for n in rng.integers(0, 35, 5)) for _ in score]
    frame = pd.DataFrame({"sentence1": first, "sentence2": first, "score": score})
    frame.to_parquet("pairs.parquet")
    shared = "epochs: 1, batch_size: 16"
    Path("pairs.yaml").write_text(
        "tracking: {enabled: false}\n"
        "data: {train: pairs.parquet}\n"
        "stages:\n"
        f"  - {{stage: finetune, model: {tiny_bert}, {shared}}}\n"
        f"  - {{stage: compress, model: 'stage:finetune', {shared}, precision: bf16,\n"
        "     distill: {teacher: 'stage:finetune', labels: 0.5}, layers: 1,\n"
        "     transforms: [{kind: nm, match: '.*dense', via: sr_ste, keep: 1}]}\n"
        f"  - {{stage: compress, name: again, model: 'stage:compress', {shared},\n"
        "     distill: {teacher: 'stage:finetune', map: uniform},\n"
        "     transforms: [{kind: quant, match: 'bert\\.encoder.*dense', weight: {bits: 1}}]}\n"
    )
    with caplog.at_level("WARNING", logger="dqrm"):
        _, compress, again = run_pipeline(load_pipeline(Path("pairs.yaml"))).stages
    assert "stage:compress is compressed already; training takes it off its grids" in caplog.text
    assert "best/val_pearson" in compress.record.metrics
    weights = load_file(again.folder / "model" / "model.safetensors")
    name = "bert.encoder.layer.0.output.dense.weight"
    assert all(len(row.abs().unique()) == 1 for row in weights[name])
    sparse = load_file(compress.folder / "model" / "model.safetensors")[name]
    assert int((sparse != 0).view(len(sparse), -1, 4).sum(2).max()) == 1


def test_faults_show_before_anything_runs(finished, dqrm, tiny_bert):
    file, result = finished
    for override, message in (
        ("stages.compress.layers=3", "compress.layers: 3 layers cannot be spread over 2"),
        ("stages.compress.layers=[]", "layers=[]: at least one layer has to stay"),
        ("stages.compress.layers=[0,2]", "compress.layers: layer 2: there are 2, 0 to 1"),
        ("stages.compress.distill.map=[0,1]", "distill.map: it names 2 layers, and the student"),
        ("stages.compress.distill.teacher=stage:prune", "distill.teacher=stage:prune: no earlier"),
        ("stages.compress.distill.teacher=absent", "distill.teacher: absent: no such folder"),
        ("stages.compress.transforms.0.match=bert.head", "transforms: match=bert.head: no Linear"),
    ):
        done = dqrm("pipeline", "validate", file, override)
        assert done.exit_code == 2, override
        assert message in done.stderr
        assert "faults" not in done.stderr, done.stderr
    plan = dqrm("pipeline", "run", file, "--dry-run", "output=planned")
    assert plan.exit_code == 0, plan.stderr
    assert "steps           60" in plan.stdout
    assert "steps           40" in plan.stdout
    assert plan.stdout.count("taken now with random weights") == 2
    done = result.stages[1].record.metrics
    assert f"encoder         {int(done['size/encoder_packed_bytes']):,} bytes, 8.7 x" in plan.stdout
    assert f"packed          {int(done['size/packed_bytes']):,} bytes, " in plan.stdout
    assert not Path("planned").exists()


def test_faults_of_rows_are_no_faults_of_transforms(dqrm, tiny_bert):
    # Behind the rows that are looked at before steps are counted.
    Path("rows.tsv").write_text("sentence\tlabel\n" + "w1\t1\n" * 250 + "w2\t\n")
    Path("rows.yaml").write_text(
        f"stages:\n  - stage: compress\n    model: {tiny_bert}\n    data: {{train: rows.tsv}}\n"
        "    transforms: [{kind: quant, match: '.*dense', weight: {bits: 4}}]\n"
    )
    done = dqrm("pipeline", "validate", "rows.yaml")
    assert done.exit_code == 2
    message = "rows.yaml:4: stages.compress.data: rows.tsv: row 251 has no label"
    assert message in done.stderr


PRUNED = """\
threads: 1
tracking: {{enabled: false}}
data: {{train: {text}/train.tsv, dev: {text}/dev.tsv.gz}}
stages:
  - {{stage: finetune, model: {model}, max_steps: 2, precision: fp32}}
  - {{stage: prune, model: 'stage:finetune', budget: {{macs: 0.2}}, round_to: 4, samples: 64,
     held_out: 32}}
  - {{stage: finetune, name: again, model: 'stage:prune', max_steps: 2, precision: fp32}}
  - stage: compress
    model: stage:again
    max_steps: 1
    precision: fp32
    distill: {{teacher: 'stage:finetune', attention: 0}}
"""


def test_attentions_of_pruned_models_are_not_compared(dqrm, tiny_bert, sentence_files):
    file = Path("pruned.yaml")
    file.write_text(PRUNED.format(model=tiny_bert, text=sentence_files))
    assert dqrm("pipeline", "validate", file).exit_code == 0
    attention = "stages.compress.distill.attention=1"
    # Whether heads go is known when the model has been cut.
    done = dqrm("pipeline", "run", file, attention, "stages.compress.model=stage:prune",
                "stages.compress.distill.teacher=stage:finetune")  # fmt: skip
    assert done.exit_code == 2
    assert "stage compress: layer 1 of the model has no heads" in done.stderr
    assert "set distill.attention to 0" in done.stderr
    # Both have lost the same heads, but a layer that has none left tells no attention.
    same = "stages.compress.distill.teacher=stage:prune"
    valid = dqrm("pipeline", "validate", file, attention, same)
    assert valid.exit_code == 0, valid.stderr
    done = dqrm("pipeline", "run", file, attention, same)
    assert done.exit_code == 2
    assert "stage compress: layer 1 of the model has no heads" in done.stderr
    assert "set distill.attention to 0" in done.stderr
    done = dqrm("pipeline", "run", file)
    assert done.exit_code == 0, done.stderr


def test_heads_of_models_from_outside_are_compared(dqrm, tiny_bert, sentence_files):
    config = transformers.AutoConfig.from_pretrained(tiny_bert, num_attention_heads=4)
    transformers.BertForSequenceClassification(config).save_pretrained("four")
    transformers.AutoTokenizer.from_pretrained(tiny_bert).save_pretrained("four")
    Path("heads.yaml").write_text(
        f"stages:\n  - stage: compress\n    model: {tiny_bert}\n"
        f"    data: {{train: {sentence_files}/train.tsv}}\n    distill: {{teacher: four}}\n"
    )
    done = dqrm("pipeline", "validate", "heads.yaml")
    assert done.exit_code == 2
    text = "layer 0 has 2 heads, and layer 0 of the teacher has 4; attentions are compared"
    assert f"heads.yaml:5: stages.compress.distill.attention: {text}" in done.stderr
    without = dqrm("pipeline", "validate", "heads.yaml", "stages.compress.distill.attention=0")
    assert without.exit_code == 0, without.stderr


def test_settings_of_logits_that_are_not_compared_are_told(finished, dqrm):
    file, _ = finished
    for setting in ("temperature=9", "average=elements"):
        override = f"stages.compress.distill.{setting}"
        assert dqrm("pipeline", "validate", file, override).exit_code == 0
        done = dqrm("pipeline", "validate", file, override, "stages.compress.distill.logits=0")
        assert done.exit_code == 2
        field = setting.partition("=")[0]
        assert f"{field} has no effect with logits=0; leave it out" in done.stderr


def test_a_trained_head_is_not_replaced(finished, sentence_files):
    file, result = finished
    frame = pd.read_csv(sentence_files / "train.tsv", sep="\t")
    frame.astype({"label": float}).replace({"label": {1.0: 0.5}}).to_csv(
        "halves.tsv", sep="\t", index=False
    )
    overrides = [f"stages.compress.data.{split}=halves.tsv" for split in ("train", "dev", "test")]
    config = load_pipeline(file, [f"output={file.parent}/runs", *overrides])
    message = r"stage compress: model=stage:finetune: it has 2 outputs, and the data 1 \(a regress"
    with pytest.raises(ValueError, match=message):
        run_pipeline(config)
    # A pruned model has the head of the one it was cut from.
    Path("chain.yaml").write_text(
        "stages:\n"
        f"  - {{stage: prune, model: {result.stages[0].folder}/model, budget: {{macs: 0.5}},\n"
        f"     samples: 64, held_out: 32, data: {{train: {sentence_files}/train.tsv}}}}\n"
        "  - {stage: compress, model: 'stage:prune', data: {train: halves.tsv},\n"
        "     transforms: [{kind: quant, match: '.*dense', weight: {bits: 4}}]}\n"
    )
    (problem,) = (
        load_pipeline(Path("chain.yaml"))
        .stages[1]
        .problems({"prune": load_pipeline(Path("chain.yaml")).stages[0]})
    )
    assert problem.field == "model"
    assert "model=stage:prune: it has 2 outputs, and the data 1" in problem.message


def test_patterns_are_held_against_the_model_before_it_is_pruned(dqrm, tiny_bert, sentence_files):
    file = Path("pruned.yaml")
    file.write_text(PRUNED.format(model=tiny_bert, text=sentence_files))
    match = "stages.compress.transforms=[{kind: quant, match: %s, weight: {bits: 4}}]"
    assert dqrm("pipeline", "validate", file, match % ".*query").exit_code == 0
    done = dqrm("pipeline", "validate", file, match % ".*qurey")
    assert done.exit_code == 2
    assert "stages.compress.transforms: match=.*qurey: no Linear or Embedding" in done.stderr
    done = dqrm("pipeline", "validate", file, match % ".*qurey", "stages.finetune.model=absent")
    assert done.stderr.count("stages.") == 1, "a fault of a stage is told once"
