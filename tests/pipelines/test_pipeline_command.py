"""What a pipeline's file may say, and what is said about one that cannot run."""

from pathlib import Path

import pytest


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
            ["mine.yaml:2: stages.0.stage=trian: must be one of"],
        ),
        ("stages:\n  - {name: x}\n", [], ["mine.yaml:2: stages.0", "the key stage is required"]),
        ("stages: []\n", [], ["mine.yaml:1: stages=[]"]),
        ("name: x\n", [], ["stages: is required"]),
        (
            "stages:\n  - stage: report\n    comparr: x\n",
            [],
            ["mine.yaml:3: stages.0.comparr: unknown key; did you mean stages.0.compare?"],
        ),
        (
            "stages:\n  - {stage: report}\n  - {stage: report}\n",
            [],
            ["two stages are called report; give one of them a name"],
        ),
        (
            "stages:\n  - stage: train\n    settings: {quant: {bits: 5}}\n",
            [],
            ["mine.yaml:2: stages.0", "quant.bits=5: must be"],
        ),
        (
            "stages:\n  - stage: train\n    settings: {tracking: {enabled: false}}\n",
            [],
            ["settings.tracking is the pipeline's to say"],
        ),
        ("stages:\n  - {stage: train, config: absent}\n", [], ["is called 'absent'"]),
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
