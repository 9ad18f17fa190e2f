"""Every shipped pipeline runs."""

import json
from pathlib import Path

from dqrm.pipelines.config import find_pipeline, shipped_recipes

CENSUS = [f"stages.{name}.settings.train.max_steps=2" for name in ("fp32", "int8", "int4")]


def test_all_are_found_and_open_with_their_command(dqrm):
    assert list(shipped_recipes()) == ["census", "sst2"]
    shown = dqrm("pipeline", "ls")
    for name, purpose in shipped_recipes().items():
        first = find_pipeline(name).read_text().splitlines()[0]
        assert first == f"# dqrm pipeline run {name}"
        assert purpose in shown.stdout
    absent = dqrm("pipeline", "run", "absent")
    assert absent.exit_code == 2
    assert "shipped are: census, sst2" in absent.stderr


def test_census(dqrm):
    done = dqrm("pipeline", "run", "census", "--no-track", "threads=1", *CENSUS)
    assert done.exit_code == 0, done.stderr
    report = json.loads(Path("runs/census/stages/report/report.json").read_text())
    smaller = {row["stage"]: row["times_smaller"] for row in report["models"]}
    assert smaller["fp32"] == 1.0
    assert 3 < smaller["int8"] < smaller["int4"] < 8


def test_sst2(dqrm, tiny_bert, sentence_files):
    done = dqrm(
        *("pipeline", "run", "sst2", "--no-track", f"stages.finetune.model={tiny_bert}"),
        f"stages.finetune.data.train={sentence_files}/train.tsv",
        f"stages.finetune.data.dev={sentence_files}/dev.tsv.gz",
        *("threads=1", "stages.finetune.max_steps=2"),
    )
    assert done.exit_code == 0, done.stderr
    assert "best/val_accuracy" in done.stdout
