"""What a pipeline's file may say, and what is said about one that cannot run."""

from pathlib import Path

import pytest

from dqrm.pipelines.config import find_pipeline

TEXT = "data: {train: a.tsv}\nstages:\n  - {stage: finetune, model: tiny}\n"


def written(text):
    Path("mine.yaml").write_text(text)
    return "mine.yaml"


GOOD = "stages:\n  - {stage: train, config: census}\n  - {stage: report}\n"


@pytest.mark.parametrize(
    ("text", "overrides", "messages"),
    [
        (
            "stages:\n  - {stage: trian}\n",
            [],
            ["mine.yaml:2: stages.trian.stage=trian: must be one of"],
        ),
        ("stages:\n  - {name: x}\n", [], ["mine.yaml:2: stages.x", "the key stage is required"]),
        ("stages: []\n", [], ["mine.yaml:1: stages=[]"]),
        ("name: x\n", [], ["stages: is required"]),
        (
            "stages:\n  - stage: report\n    comparr: x\n",
            [],
            [
                "mine.yaml:3: stages.report.comparr: unknown key; did you mean "
                "stages.report.compare?"
            ],
        ),
        (
            "stages:\n  - {stage: report}\n  - {stage: report}\n",
            [],
            ["two stages are called report; give one of them a name"],
        ),
        (
            "stages:\n  - stage: train\n    settings: {quant: {bits: 5}}\n",
            [],
            ["mine.yaml:2: stages.train", "quant.bits=5: must be"],
        ),
        (
            "stages:\n  - stage: train\n    settings: {tracking: {enabled: false}}\n",
            [],
            ["settings.tracking is the pipeline's to say"],
        ),
        ("stages:\n  - {stage: train, config: absent}\n", [], ["is called 'absent'"]),
        (
            # Of another kind of stage it is a key.
            "stages:\n  - {stage: train, config: census}\n  - {stage: report, epochs: 3}\n",
            [],
            ["mine.yaml:3: stages.report.epochs: unknown key; known here: stage, name, compare"],
        ),
        ("stages:\n  - {stage: report, name: v1.5}\n", [], ["stages.v1.5.name=v1.5"]),
        ("stages:\n  - {stage: report, name: '7'}\n", [], ["name='7'"]),
        (
            TEXT,
            ["stages.finetune.data.train=b.tsv"],
            ["stages.finetune.data.train: data is that of the whole pipeline; set data.train"],
        ),
        (
            "stages:\n  - {stage: finetune, model: tiny}\n",
            ["data.train=a.tsv", "stages.finetune.data.dev=b.tsv"],
            ["stages.finetune.data.dev: data is that of the whole pipeline; set data.dev"],
        ),
        (GOOD, ["stages.report.compare=last"], ["mine.yaml:3: stages.report", "compare=last"]),
        (GOOD, ["stages.prune.x=1"], ["there is no stage prune; there are: train, report"]),
        (GOOD, ["stages.7.x=1"], ["stages is a list; name an item by its position, 0 to 1"]),
        (GOOD, ["threads=0"], ["threads=0: must be greater than 0"]),
        ("stages:\n  - {stage: report}\n", [], ["stages.report: there is nothing to report"]),
        (
            "stages:\n  - stage: train\n    settings: {data: {path: absent}}\n  - stage: report\n",
            ["stages.report.compare=nobody"],
            ["2 faults", "mine.yaml:3: stages.train.settings.data.path: absent", "compare=nobody"],
        ),
    ],
)
def test_faults_name_file_stage_and_field(dqrm, text, overrides, messages):
    for command in (["validate"], ["run", "--dry-run"]):
        done = dqrm("pipeline", *command, written(text), *overrides)
        assert done.exit_code == 2, done.stdout
        for message in messages:
            assert message in done.stderr
    assert [path.name for path in Path().iterdir()] == ["mine.yaml"]


def test_faults_below_a_list_are_not_the_lists_own(dqrm):
    done = dqrm("pipeline", "validate", written("stages:\n  - {stage: finetune, epoch: 3}\n"))
    assert "3 faults" in done.stderr
    assert {line.strip() for line in done.stderr.splitlines()[1:]} == {
        "mine.yaml:2: stages.finetune.model: is required",
        "mine.yaml:2: stages.finetune.data: is required",
        "mine.yaml:2: stages.finetune.epoch: unknown key; did you mean stages.finetune.epochs?",
    }


def test_a_shipped_pipeline_is_copied(dqrm):
    assert dqrm("pipeline", "cp", "census", "mine.yaml").exit_code == 0
    assert Path("mine.yaml").read_text() == find_pipeline("census").read_text()
    again = dqrm("pipeline", "cp", "census", "mine.yaml")
    assert again.exit_code == 2
    assert "mine.yaml exists" in again.stderr
    assert dqrm("pipeline", "cp", "census", "mine.yaml", "--force").exit_code == 0
    unknown = dqrm("pipeline", "cp", "censu")
    assert unknown.exit_code == 2
    assert "shipped are: census" in unknown.stderr


def test_a_good_file_is_valid_and_a_dry_run_writes_nothing(dqrm):
    file = written(GOOD)
    valid = dqrm("pipeline", "validate", file)
    assert valid.exit_code == 0, valid.stderr
    assert "2 stages (train, report) into runs/mine" in valid.stdout
    plan = dqrm("pipeline", "run", file, "--dry-run", "stages.0.settings.train.max_steps=7")
    assert plan.exit_code == 0, plan.stderr
    assert "steps       7" in plan.stdout
    assert "never ran" in plan.stdout
    assert "waits for train" in plan.stdout
    assert [path.name for path in Path().iterdir()] == ["mine.yaml"]


def test_absent_files_and_stages(dqrm):
    assert "absent.yaml" in dqrm("pipeline", "run", "absent.yaml").stderr
    assert dqrm("pipeline", "run", "absent.yaml").exit_code == 2
    wrong = dqrm("pipeline", "run", written(GOOD), "--from", "prune", "--dry-run")
    assert wrong.exit_code == 2
    assert "there is no stage prune; there are: train, report" in wrong.stderr
