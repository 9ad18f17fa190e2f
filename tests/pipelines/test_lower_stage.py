"""The lower stage: what it writes, what it measures, what it refuses, and the report's columns."""

import copy
import json
import math
import re
import signal
from pathlib import Path

import pandas as pd
import pytest
import torch
import transformers
from safetensors.torch import load_file

from dqrm.compress.lower.folder import write_lowered
from dqrm.pipelines.config import load_pipeline
from dqrm.pipelines.runner import run_pipeline
from dqrm.pipelines.stages.lower import LowerStage
from dqrm.pipelines.text.classifier import load_any

PIPELINE = """\
threads: 1
tracking: {{system_metrics: false, flush_seconds: 0.2, enabled: false}}
stages:
  - stage: finetune
    model: {model}
    data: &data {{train: {text}/train.tsv, dev: {text}/dev.tsv.gz, test: {text}/dev.tsv.gz}}
    lr: 3e-3
    epochs: 3
    batch_size: 16
    precision: fp32
  - stage: compress
    model: stage:finetune
    data: *data
    lr: 1e-3
    epochs: 1
    precision: fp32
    transforms:
      - kind: quant
        match: '.*layer.*(query|key|value|dense)'
        weight: {{bits: 8}}
        act: {{bits: 8}}
  - stage: lower
    model: stage:compress
    compare: stage:finetune
    data: *data
    target: {target}
    buckets: [[1, 16], [4, 32]]
    seconds: 1e-6
  - stage: report
"""


@pytest.fixture
def file(tiny_bert, sentence_files):
    def write(target="int8"):
        path = Path("tiny.yaml")
        path.write_text(PIPELINE.format(model=tiny_bert, text=sentence_files, target=target))
        return path

    return write


def test_packs_reads_back_and_measures(file):
    threads = torch.get_num_threads()
    result = run_pipeline(load_pipeline(file()))
    finetune, compress, lower, report = result.stages
    folder = lower.folder / "model"
    metrics = lower.record.metrics
    assert metrics["lower/max_abs_difference"] < 0.05
    assert metrics["lower/same_answers"] == 1.0
    assert metrics["test/accuracy"] == compress.record.metrics["test/accuracy"] > 0.8
    assert metrics["best/val_accuracy"] == metrics["test/accuracy"], "dev and test are one file"

    tensors = load_file(folder / "model.safetensors")
    encoder = sum(tensor.nbytes for name, tensor in tensors.items() if ".layer." in name)
    assert metrics["size/encoder_bytes"] == encoder
    assert metrics["size/lowered_bytes"] == sum(tensor.nbytes for tensor in tensors.values())
    assert not list(folder.glob("compression*"))
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        assert model(**tokenizer("w1 w7", return_tensors="pt")).logits.shape == (1, 2)

    for bucket in ("1x16", "4x32"):
        begin = f"latency/{bucket}/1_thread"
        for name in ("fp32", "bf16"):
            ratio = metrics[f"{begin}/{name}_ms"] / metrics[f"{begin}/lowered_ms"]
            assert metrics[f"{begin}/times_{name}"] == pytest.approx(ratio)
    dense, _, row = json.loads((report.folder / "report.json").read_text())["models"]
    before = load_file(finetune.folder / "model" / "model.safetensors")
    dense_bytes = sum(tensor.nbytes for name, tensor in before.items() if ".layer." in name)
    assert dense["encoder_bytes"] == dense_bytes
    assert row["encoder_bytes"] == encoder
    assert row["encoder_times_smaller"] == dense_bytes / encoder
    assert row["latency"]["1x16, 1 thread"].keys() == {"lowered", "fp32", "bf16"}
    quality, sizes, speed = (report.folder / "report.txt").read_text().split("\n\n")
    assert quality.splitlines()[-1].startswith("lower ")
    assert f"{row['encoder_times_smaller']:.2f} x" in sizes.splitlines()[-1]
    first = metrics["latency/1x16/1_thread/lowered_ms"]
    times = [metrics[f"latency/1x16/1_thread/times_{name}"] for name in ("fp32", "bf16")]
    assert speed.splitlines()[0].split("  ")[-2:] == ["faster than fp32", "faster than bf16"]
    found = re.search(r"lower +1x16, 1 thread +(.+) ms +(.+) x +(.+) x", speed)
    assert list(found.groups()) == [f"{value:.2f}" for value in (first, *times)]

    plain = run_pipeline(load_pipeline(file(), ["stages.lower.shrink=false"])).stages[2]
    sizes = plain.record.metrics
    assert sizes["size/encoder_bytes"] >= metrics["size/encoder_bytes"]
    assert sizes["size/lowered_bytes"] == sizes["size/packed_bytes"], "as it was accounted for"
    assert sizes["test/accuracy"] == metrics["test/accuracy"]
    assert torch.get_num_threads() == threads


def test_a_packed_model_is_no_model_to_begin_with(file, dqrm, tiny_bert):
    path = file()
    run_pipeline(load_pipeline(path))
    packed = "runs/tiny/stages/lower/model"
    for field in ("finetune.model", "lower.model", "lower.compare"):
        done = dqrm("pipeline", "validate", path, "name=other", f"stages.{field}={packed}")
        assert done.exit_code == 2
        told = f"stages.{field}: {packed}: its weights are packed (dqrm); name the model from"
        assert told in done.stderr, done.stderr
    distill = f"{{teacher: {packed}, attention: 0, hidden: 0}}"
    taught = dqrm("pipeline", "validate", path, "name=other", f"stages.compress.distill={distill}")
    assert taught.exit_code == 0, taught.stderr
    done = dqrm("pipeline", "validate", path, f"stages.lower.model={tiny_bert}")
    assert done.exit_code == 2
    assert "BertModel has no head; fine-tune it first" in done.stderr


def test_one_candidate_is_not_timed(file, monkeypatch):
    monkeypatch.setattr("dqrm.pipelines.text.classifier.bf16_is_fast", lambda: False)
    told = []
    run_pipeline(load_pipeline(file("auto")), progress=lambda *args: told.append(args[0]))
    assert "lower: timing" in told
    assert "lower: choosing" not in told


def test_targets_and_signals(file, monkeypatch):
    from dqrm.pipelines.text import latency

    result = run_pipeline(load_pipeline(file("fp32")))
    assert result.stages[2].record.metrics["lower/max_abs_difference"] == 0.0
    asked = []
    fastest = latency.fastest

    def of_fake_times(measured):
        asked.append([set(times) for times in measured])
        return fastest([{"int8": 1.0, "bf16": 3.0}, {"int8": 2.0, "bf16": 0.5}])

    monkeypatch.setattr(latency, "fastest", of_fake_times)
    monkeypatch.setattr("dqrm.pipelines.text.classifier.bf16_is_fast", lambda: True)
    result = run_pipeline(load_pipeline(file("auto")))
    config = json.loads((result.stages[2].folder / "model" / "config.json").read_text())
    assert asked[-1] == [{"int8", "bf16"}] * 2
    assert config["quantization_config"]["target"] == "bf16"

    def press_ctrl_c(phase, done, total, unit):
        if phase.startswith("lower"):
            signal.raise_signal(signal.SIGINT)

    stopped = run_pipeline(
        load_pipeline(file("bf16"), ["stages.lower.batch_size=8"]), progress=press_ctrl_c
    )
    assert stopped.interrupted == signal.SIGINT
    assert [stage.key for stage in stopped.stages] == ["finetune", "compress"]


def test_the_share_of_same_answers_is_that_of_the_rows(
    file, tiny_bert, sentence_files, monkeypatch
):
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_bert)
    dev = pd.read_csv(sentence_files / "dev.tsv.gz", sep="\t").sentence.tolist()
    inputs = tokenizer(dev, padding=True, return_tensors="pt")

    def answers(model):
        with torch.no_grad():
            return model(**inputs).logits

    def with_another_head(model, *arguments, **options):
        other = copy.deepcopy(model)
        leads = answers(model).diff(dim=1)
        other.classifier.bias.data[1] -= leads.quantile(0.3).item()
        write_lowered(other, *arguments, **options)

    monkeypatch.setattr("dqrm.compress.lower.folder.write_lowered", with_another_head)
    short = ["stages.finetune.max_steps=1", "stages.compress.max_steps=1"]
    _, compress, lower, _ = run_pipeline(load_pipeline(file("fp32"), short)).stages
    before, after = (
        answers(load_any(stage.folder / "model").eval()) for stage in (compress, lower)
    )
    same = float((before.argmax(1) == after.argmax(1)).double().mean())
    assert 0 < same < 1
    assert lower.record.metrics["lower/same_answers"] == pytest.approx(same)


def test_a_regression_of_constant_scores(tiny_bert):
    frame = pd.DataFrame({"sentence": [f"w{n}" for n in range(32)], "score": [1.5, 2.5] * 16})
    frame.to_csv("train.tsv", sep="\t", index=False)
    frame.assign(score=3.5).to_csv("dev.tsv", sep="\t", index=False)
    Path("scores.yaml").write_text(
        "tracking: {enabled: false}\nthreads: 1\n"
        "data: {train: train.tsv, dev: dev.tsv}\nstages:\n"
        f"  - {{stage: finetune, model: {tiny_bert}, max_steps: 1}}\n"
        "  - {stage: lower, model: 'stage:finetune', seconds: 1e-6, buckets: [[1, 8]]}\n"
        "  - {stage: report}\n"
    )
    config = load_pipeline(Path("scores.yaml"))
    finetune, lower, report = run_pipeline(config).stages
    assert math.isnan(finetune.record.metrics["best/val_pearson"])
    assert "lower/max_abs_difference" in lower.record.metrics
    assert "lower/same_answers" not in lower.record.metrics, "a regression has one output"
    for file in (report.folder / "report.json", finetune.folder / "stage.json"):
        json.loads(file.read_text(), parse_constant=pytest.fail)
    models = json.loads((report.folder / "report.json").read_text())["models"]
    assert models[0]["metrics"]["best/val_pearson"] is None
    assert not any(stage.ran for stage in run_pipeline(config).stages)


def test_faults(file, dqrm):
    path = file()
    for override, message in (
        ("stages.lower.model=absent", "stages.lower.model: absent: no such folder"),
        ("stages.lower.compare=stage:prune", "no earlier stage is called so"),
        ("stages.lower.buckets=[]", "stages.lower.buckets=[]: must have 1 item or more"),
        (
            "stages.compress.transforms=[{kind: quant, match: [], weight: {bits: 8}}]",
            "stages.compress.transforms.0.match=[]: must be text; put it in quotes",
        ),
    ):
        done = dqrm("pipeline", "validate", path, override)
        assert done.exit_code == 2, override
        assert message in done.stderr
    plan = dqrm("pipeline", "run", path, "--dry-run")
    assert "1 x 16, 4 x 32 tokens" in plan.stdout
    wrong = dqrm("pipeline", "validate", path, "stages.lower.buckets=[[1,129]]")
    assert wrong.exit_code == 2
    assert "buckets: a bucket of 129 tokens: the model takes up to 128" in wrong.stderr
    nothing = dqrm("pipeline", "validate", path, "stages.lower.model=stage:finetune")
    assert nothing.exit_code == 2
    assert "lower.target: int8: nothing of stage:finetune is compressed" in nothing.stderr


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        (
            "{stage: compress, name: again, model: stage:lower, data: *data, layers: 1}",
            "model=stage:lower: a stage lower makes no transformer; there are: finetune, compress",
        ),
        (
            "{stage: reconstruct, model: stage:finetune, data: *data, allocation: stage:finetune}",
            "allocation=stage:finetune: a stage finetune makes no allocation; there is none before",
        ),
    ],
)
def test_what_a_stage_makes_fits_what_takes_it(file, dqrm, stage, message):
    path = file()
    with path.open("a") as more:
        more.write(f"  - {stage}\n")
    done = dqrm("pipeline", "validate", path)
    assert done.exit_code == 2
    assert message in done.stderr


def test_a_fault_of_one_stage_leaves_those_of_others(file, dqrm, monkeypatch):
    path = file()
    for overrides, faults in (
        (["stages.finetune.model=package:nope"], ["5: stages.finetune.model: package:nope: no"]),
        (["stages.compress.layers=7"], ["stages.compress.layers: 7 layers cannot"]),
        (
            ["stages.finetune.model=package:nope", "stages.lower.compare=absent"],
            ["stages.finetune.model: package:nope", "stages.lower.compare: absent: no such folder"],
        ),
    ):
        done = dqrm("pipeline", "validate", path, *overrides)
        assert done.exit_code == 2, overrides
        assert all(fault in done.stderr for fault in faults), done.stderr
        assert done.stderr.count("stages.") == len(faults), done.stderr

    Path("damaged").mkdir()
    Path("damaged/config.json").write_text('{"model_type": "unheard-of"}')
    done = dqrm("pipeline", "validate", path, "stages.lower.model=damaged")
    assert re.search(r"tiny.yaml:\d+: stages.lower.model: damaged: no sequence", done.stderr)

    def fail(stage, earlier):
        raise OSError("the disk is gone")

    monkeypatch.setattr(LowerStage, "problems", fail)
    done = dqrm("pipeline", "validate", path, "stages.finetune.model=package:nope")
    assert "stages.finetune.model: package:nope" in done.stderr
    assert re.search(r"tiny.yaml:\d+: stages.lower: the disk is gone", done.stderr)
