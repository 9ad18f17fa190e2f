"""Every shipped pipeline runs."""

import json
import re
from pathlib import Path

import pytest

from dqrm.configuration import to_yaml
from dqrm.pipelines.config import find_pipeline, load_pipeline, shipped_recipes

COMPRESSION = {
    "sst2-moq": ("moq", "qat"),
    "sst2-nm": ("admm", "asp", "sr-ste", "joint"),
    "sst2-search": ("mixed-4bit", "uniform-4bit", "mixed-3bit", "uniform-3bit"),
    "sst2-xtc": ("six", "five"),
}
WITHOUT_TRAINING = {"sst2-prune": ("prune",), "sst2-zeroquant": ("w8a8", "w48", "w48-lkd")}
LOWERED = {
    "sst2-xtc": ("six-lowered", "five-lowered"),
    "sst2-zeroquant": ("w8a8-lowered", "w48-lkd-lowered"),
}
CENSUS = [f"stages.{name}.settings.train.max_steps=2" for name in ("fp32", "int8", "int4")]


def test_all_are_found_and_open_with_their_command(dqrm):
    recommenders = {"census", "daily", "table-bits"}
    assert set(shipped_recipes()) == {*recommenders, "sst2", *COMPRESSION, *WITHOUT_TRAINING}
    shown = dqrm("pipeline", "ls")
    for name, purpose in shipped_recipes().items():
        first = find_pipeline(name).read_text().splitlines()[0]
        assert first == f"# dqrm pipeline run {name}"
        assert purpose in shown.stdout
    absent = dqrm("pipeline", "run", "absent")
    assert absent.exit_code == 2
    assert "shipped are: census, daily, sst2" in absent.stderr


@pytest.mark.parametrize("name", sorted(shipped_recipes()))
def test_the_record_of_a_pipeline_is_one(name):
    shipped = load_pipeline(find_pipeline(name))
    Path("pipeline.yaml").write_text(to_yaml(shipped))
    again = load_pipeline(Path("pipeline.yaml"))
    identities = [[stage.identity() for stage in config.stages] for config in (shipped, again)]
    assert identities[0] == identities[1]


def test_census(dqrm):
    done = dqrm("pipeline", "run", "census", "--no-track", "threads=1", *CENSUS)
    assert done.exit_code == 0, done.stderr
    report = json.loads(Path("runs/census/stages/report/report.json").read_text())
    smaller = {row["stage"]: row["times_smaller"] for row in report["models"]}
    assert smaller["fp32"] == 1.0
    assert 3 < smaller["int8"] < smaller["int4"] < 8


def test_table_bits(dqrm):
    assert dqrm("data", "synth", "-o", "clicks", "--scale", "0.0002", "rows=3000").exit_code == 0
    stages = ("fp32", "int4", "int2", "mixed")
    done = dqrm(
        *("pipeline", "run", "table-bits", "--no-track", "threads=1"),
        *(f"stages.{name}.settings.data.path=clicks" for name in stages),
        *(f"stages.{name}.settings.train.max_steps=5" for name in stages),
        "stages.table_bits.batches=5",
    )
    assert done.exit_code == 0, done.stderr
    folder = Path("runs/table-bits/stages")
    told = json.loads((folder / "table_bits" / "table_bits.json").read_text())
    assert told["fp32_bytes"] / told["bytes"] >= 12
    report = json.loads((folder / "report" / "report.json").read_text())
    smaller = {row["stage"]: row["times_smaller"] for row in report["models"]}
    assert smaller["int4"] < smaller["mixed"] < smaller["int2"]


def test_daily(dqrm):
    days = ("--days", "2", "--scale", "0.0002", "rows=3000")
    assert dqrm("data", "synth", "-o", "days", *days).exit_code == 0
    done = dqrm(
        *("pipeline", "run", "daily", "threads=1", "tracking.system_metrics=false"),
        *("stages.train.settings.train.max_steps=2", "stages.promote.min_auc=0.3"),
    )
    assert done.exit_code == 0, done.stderr
    promotion = json.loads(Path("runs/daily/stages/promote/promotion.json").read_text())
    assert promotion["dqrm.promotion.version"] == "1"
    better = dqrm("pipeline", "run", "daily", "threads=1", "stages.promote.min_auc=0.99")
    assert better.exit_code == 3
    assert "is below min_auc=0.99" in better.stderr


def test_sst2(dqrm, tiny_bert, sentence_files):
    done = dqrm(
        *("pipeline", "run", "sst2", "--no-track", f"stages.finetune.model={tiny_bert}"),
        f"stages.finetune.data.train={sentence_files}/train.tsv",
        f"stages.finetune.data.dev={sentence_files}/dev.tsv.gz",
        *("threads=1", "stages.finetune.max_steps=2"),
    )
    assert done.exit_code == 0, done.stderr
    assert "val accuracy" in done.stdout


def lowering(name):
    """Overrides by which nothing of a tiny model is measured for long."""
    stages = LOWERED.get(name, ())
    return [
        *(f"stages.{stage}.buckets=[[1, 16]]" for stage in stages),
        *(f"stages.{stage}.seconds=1e-6" for stage in stages),
    ]


@pytest.mark.parametrize("name", COMPRESSION)
def test_compression(name, dqrm, bert_of_six, sentence_files):
    """Two steps of each stage; schedules and searches are as short."""
    overrides = [
        f"stages.finetune.model={bert_of_six}",
        f"data.train={sentence_files}/train.tsv",
        f"data.test={sentence_files}/dev.tsv.gz",
        "data.dev_fraction=0.1",
        "threads=1",
        *(f"stages.{stage}.max_steps=2" for stage in ("finetune", *COMPRESSION[name])),
        *lowering(name),
    ]
    if name == "sst2-search":
        overrides += [f"stages.allocate-{bits}bit.samples=32" for bits in (4, 3)]
    if name == "sst2-moq":
        overrides.append("stages.moq.transforms.0.schedule={start: 5, period: 1}")
    if name == "sst2-nm":
        overrides += [f"stages.{stage}.transforms.0.updates=1" for stage in ("admm", "joint")]
    done = dqrm("pipeline", "run", name, "--no-track", *overrides)
    assert done.exit_code == 0, done.stderr
    report = json.loads(Path(f"runs/{name}/stages/report/report.json").read_text())
    rows = {row["stage"]: row for row in report["models"]}
    assert rows.keys() == {"finetune", *COMPRESSION[name], *LOWERED.get(name, ())}
    assert all("test/accuracy" in row["metrics"] for row in rows.values())


@pytest.mark.parametrize("name", WITHOUT_TRAINING)
def test_compression_without_training(name, dqrm, bert_of_six, sentence_files):
    """Two steps of training, and two of each layer."""
    overrides = [
        f"stages.finetune.model={bert_of_six}",
        f"data.train={sentence_files}/train.tsv",
        f"data.test={sentence_files}/dev.tsv.gz",
        "data.dev_fraction=0.1",
        "threads=1",
        "stages.finetune.max_steps=2",
        *(f"stages.{stage}.samples=64" for stage in WITHOUT_TRAINING[name]),
        *lowering(name),
    ]
    if name == "sst2-prune":
        overrides.append("stages.prune.held_out=32")
    else:
        overrides.append("stages.w48-lkd.steps=2")
    done = dqrm("pipeline", "run", name, "--no-track", *overrides)
    assert done.exit_code == 0, done.stderr
    report = json.loads(Path(f"runs/{name}/stages/report/report.json").read_text())
    rows = {row["stage"]: row for row in report["models"]}
    assert rows.keys() == {"finetune", *WITHOUT_TRAINING[name], *LOWERED.get(name, ())}
    assert all("test/accuracy" in row["metrics"] for row in rows.values())


@pytest.mark.parametrize("page", ["README.md", "docs/pipelines.md"])
def test_the_pipelines_of_the_pages(dqrm, bert_of_six, sentence_files, page):
    """Valid as they stand, but for their model and their data."""
    text = (Path(__file__).parents[2] / page).read_text()
    (text,) = re.findall(r"```yaml\n(data:.*?)```", text, re.DOTALL)
    Path("reviews.yaml").write_text(text)
    valid = dqrm(
        *("pipeline", "validate", "reviews.yaml", f"stages.finetune.model={bert_of_six}"),
        f"data.train={sentence_files}/train.tsv",
        f"data.test={sentence_files}/dev.tsv.gz",
        "stages.compress.epochs=100",
        "stages.lower.buckets=[[1, 8]]",
        # There are 304 sentences, fewer than are held out otherwise.
        *(["stages.prune.held_out=64"] if "stage: prune" in text else []),
    )
    assert valid.exit_code == 0, valid.stderr
