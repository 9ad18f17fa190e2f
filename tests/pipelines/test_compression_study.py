"""`dqrm bench transformers` on tasks and a model made here."""

import errno
import json
import statistics
from pathlib import Path

import pytest

from dqrm.cli.bench.transformers import comparison_table
from dqrm.pipelines.config import find_pipeline, load_pipeline
from dqrm.pipelines.study import merge
from dqrm.pipelines.study.merge import StudySettings, merged_pipeline, recipe_names
from dqrm.pipelines.study.run import Measured
from dqrm.pipelines.study.table import LATENCY, rows
from dqrm.pipelines.study.tasks import TASKS

SHORT = ("--recipes", "zeroquant,prune", "--max-steps", "8", "--threads", "1", "--no-track")


@pytest.fixture(scope="module")
def glue(tmp_path_factory, sentence_files):
    """GLUE's files of two tasks, by GLUE's names: one with a file to test on, one without."""
    import pandas as pd

    folder = tmp_path_factory.mktemp("glue")
    # Pruning holds 512 rows out.
    train = pd.concat([pd.read_csv(sentence_files / "train.tsv", sep="\t")] * 3)
    dev = pd.read_csv(sentence_files / "dev.tsv.gz", sep="\t")
    train.to_csv(folder / "cola_train.tsv.gz", sep="\t", index=False)
    dev.to_csv(folder / "cola_dev.tsv", sep="\t", index=False)
    pairs = {"sentence1": train.sentence, "sentence2": train.sentence[::-1].to_numpy()}
    frame = pd.DataFrame({**pairs, "label": train.label})
    frame.to_csv(folder / "mrpc_train.tsv.gz", sep="\t", index=False)
    return folder


def study(**settings):
    return StudySettings(
        **({"tasks": ("cola",), "recipes": recipe_names(), "seeds": (0,)} | settings),
        output=Path("runs"),
    )


def test_recipes_of_a_task_share_one_model_to_begin_with(glue):
    config, arms = merged_pipeline(study(data=glue), "cola", 3)
    stages = {stage.key: stage for stage in config.stages}
    assert next(iter(stages)) == "finetune"
    assert [stage.stage for stage in config.stages].count("finetune") == 1
    labels = {arm.label for arm in arms}
    assert {"moq", "moq qat", "xtc six", "xtc five", "nm admm", "zeroquant w8a8", "prune"} <= labels
    for arm in arms:
        assert stages[arm.lowered].model == f"stage:{arm.key}"
        assert stages[arm.key].seed == 3
        assert stages[arm.key].max_length == TASKS["cola"].max_length
        assert stages[arm.key].data.test == glue / "cola_dev.tsv"
    assert stages["xtc-five"].model == "stage:xtc-six"
    assert stages["xtc-five"].distill.teacher == "stage:finetune"
    assert stages["moq"].select_by == "matthews"
    assert stages["prune-lowered"].target == "fp32"
    assert stages["moq-lowered"].target == "int8"
    fewer, _ = merged_pipeline(study(data=glue, recipes=("nm",)), "cola", 3)
    of_nm = [stage for stage in config.stages if stage.key in {s.key for s in fewer.stages}]
    assert list(fewer.stages) == of_nm, "a stage does not depend on the other recipes"


def test_shorter_training_has_shorter_schedules(glue):
    short, _ = merged_pipeline(study(data=glue, max_steps=100), "mrpc", 0)
    whole, _ = merged_pipeline(study(data=glue), "mrpc", 0)
    stages, before = ({s.key: s for s in c.stages} for c in (short, whole))
    assert stages["moq"].max_steps == 100
    share = 100 / before["moq"].max_steps
    schedule = before["moq"].transforms[0].schedule
    assert stages["moq"].transforms[0].schedule.period == schedule.period * share
    assert stages["nm-admm"].transforms[0].updates == 1
    assert before["nm-admm"].transforms[0].updates == 3
    recovery = [s["nm-admm"].transforms[0].polish for s in (before, stages)]
    assert recovery == pytest.approx([1 - 0.5 / 2, 1 - 0.5 / 2**1.5], abs=1e-4)
    assert stages["nm-sr-ste"].transforms[0].polish == recovery[1]
    assert "polish" not in stages["nm-asp"].transforms[0].model_fields_set
    assert stages["zeroquant-w48-lkd"].steps == 100
    assert before["moq"].data.test_fraction == TASKS["mrpc"].test_fraction


def test_too_few_steps_for_bits_to_go_down_say_how_many_are_enough(glue):
    for steps in (1, 8):
        message = f"--max-steps {steps}: too few for the schedule of moq; give 9 or more"
        with pytest.raises(ValueError, match=message):
            merged_pipeline(study(data=glue, max_steps=steps), "cola", 0)
    for steps in range(9, 100):
        config, _ = merged_pipeline(study(data=glue, recipes=("moq",), max_steps=steps), "cola", 0)
        moq = next(stage for stage in config.stages if stage.key == "moq")
        moq.transforms[0].bits().check(moq.max_steps)


def test_too_few_steps_for_admm_say_how_many_are_enough(glue):
    with pytest.raises(ValueError, match="too few for the schedule of admm; give 2 or more"):
        merged_pipeline(study(data=glue, recipes=("nm",), max_steps=1), "mrpc", 0)
    merged_pipeline(study(data=glue, recipes=("nm",), max_steps=2), "mrpc", 0)


def test_tasks_of_few_rows_take_fewer_steps(glue):
    config, _ = merged_pipeline(study(data=glue), "cola", 0)
    stages = {stage.key: stage for stage in config.stages}
    _, moq, _, _ = load_pipeline(find_pipeline("sst2-moq")).stages
    assert (moq.max_steps, stages["moq"].max_steps) == (800, 400)
    periods = (moq.transforms[0].schedule.period, stages["moq"].transforms[0].schedule.period)
    assert periods[0] == 2 * periods[1]
    assert (stages["xtc-six"].epochs, stages["xtc-six"].max_steps) == (5, None)


def result(arm, task, seed, accuracy, size=100, times=None):
    quality = {TASKS[task].metric: accuracy}
    latency = {} if times is None else {LATENCY: times}
    return Measured(arm, task, seed, quality, quality, size, 60.0, latency)


def test_the_table_pairs_seeds():
    times = {"lowered_ms": 2.0, "times_fp32": 3.0, "times_bf16": 1.5}
    base, arm = rows(
        [
            result("B", "sst2", 0, 0.90, 400),
            result("x", "sst2", 0, 0.89, times=times),
            result("B", "sst2", 1, 0.92, 400),
            result("x", "sst2", 1, 0.92, times=times),
            result("x", "sst2", 2, 0.50, times=times),
            result("B", "cola", 0, 0.40, 400),
        ],
        ("sst2", "cola", "mrpc"),
        ("x", "y"),
    )
    assert base.arm == "B"
    assert base.quality["sst2"].mean == pytest.approx(91.0)
    assert base.quality["cola"].deviation is None
    assert base.to_baseline == {}
    assert arm.quality.keys() == {"sst2"}
    assert arm.quality["sst2"].seeds == 3
    assert arm.to_baseline["sst2"].seeds == 2
    assert arm.to_baseline["sst2"].mean == pytest.approx(-0.5)
    assert arm.to_baseline["sst2"].deviation == pytest.approx(statistics.stdev([-1.0, 0.0]))
    assert arm.times_smaller == 4.0
    assert arm.times_faster == {"fp32": pytest.approx(3.0), "bf16": pytest.approx(1.5)}
    # Three seeds of its own, two of the baseline's.
    shown = comparison_table([base, arm], ("sst2",)).splitlines()[2]
    assert "77.00 +- 23.43 (3)  -0.50 +- 0.71  " in shown
    assert rows([result("x", "sst2", 0, 0.9)], ("sst2",), ("x",)) == []


def test_the_table_of_several_tasks_shows_differences_and_fits_a_terminal():
    tasks = tuple(TASKS)
    measured = [result("B", task, seed, 0.9, 400) for task in tasks for seed in range(3)]
    # An arm that is listed first was first complete with the last task.
    measured += [
        result("second", task, seed, 0.8 + 0.01 * seed) for task in tasks for seed in (0, 1)
    ]
    measured += [result("the first arm's name", tasks[-1], seed, 0.89) for seed in range(3)]
    compared = rows(measured, tasks, ("the first arm's name", "second"))
    shown = comparison_table(compared, tasks).splitlines()
    assert max(map(len, shown)) <= 100
    first, second = shown[:4], shown[5:]
    assert shown[4] == ""
    assert [line.split("  ")[0] for line in first] == [
        "to B",
        "B",
        "the first arm's name",
        "second",
    ]
    assert [line.split("  ")[0] for line in second[1:]] == ["B", "the first arm's name", "second"]
    assert first[1].split() == ["B", *("90.00", "+-", "0.00") * len(tasks)]
    assert first[2].split()[-4:] == ["-", "-1.00", "+-", "0.00"]
    assert first[3].count("-9.50 +- 0.71 (2)") == len(tasks)


def test_the_command_runs_what_is_not_complete(dqrm, glue, bert_of_six, monkeypatch):
    monkeypatch.setitem(merge._LATENCY, "seconds", 0.02)
    begin = ("bench", "transformers", "--data", glue, "--model", bert_of_six, *SHORT)
    first = (*begin, "--tasks", "cola", "--seeds", "0")
    before = dqrm(*first, "--dry-run")
    assert before.exit_code == 0, before.stderr
    assert "nothing is complete yet" in before.stdout
    assert not Path("runs").exists()

    done = dqrm(*first)
    assert done.exit_code == 0, done.stderr
    header, base, *others = done.stdout.splitlines()
    assert header.split()[:5] == ["CoLA", "matthews", "to", "B", "encoder"]
    assert base.split()[0] == "B"
    assert {line.split("  ")[0] for line in others} == {
        *("zeroquant w8a8", "zeroquant w48", "zeroquant w48-lkd", "prune")
    }
    trained = Path("runs/transformers/cola-0/stages/finetune/stage.json")
    written = trained.stat().st_mtime_ns

    both = (*begin, "--tasks", "cola,mrpc", "--seeds", "0")
    half = dqrm(*both, "--dry-run")
    lines = {line.split("  ")[0]: line.split()[-2:] for line in half.stdout.splitlines() if line}
    assert lines["prune"] != ["complete", "-"], "the last line of that name is the table's"
    assert half.stdout.count("complete") == 5
    again = dqrm(*both, "--json", "all.json", "--plots", "plots")
    assert again.exit_code == 0, again.stderr
    assert trained.stat().st_mtime_ns == written
    assert Path("plots/quality.png").stat().st_size > 10_000
    record = json.loads(Path("all.json").read_text())
    assert {(m["arm"], m["task"]) for m in record["measured"]} >= {("B", "mrpc"), ("prune", "cola")}
    by_arm = {row["arm"]: row for row in record["rows"]}
    assert by_arm["B"]["times_smaller"] == 1.0
    assert by_arm["zeroquant w8a8"]["times_smaller"] > 2
    assert by_arm["prune"]["to_baseline"].keys() == {"cola", "mrpc"}
    assert by_arm["prune"]["times_faster"].keys() == {"fp32", "bf16"}


def test_json_is_written_into_a_new_folder_behind_the_table(dqrm, glue, bert_of_six, monkeypatch):
    begin = ("bench", "transformers", "--data", glue, "--model", bert_of_six, *SHORT)
    ask = (*begin, "--tasks", "cola", "--seeds", "0", "--dry-run", "--json")
    done = dqrm(*ask, "new/folder/all.json")
    assert done.exit_code == 0, done.stderr
    assert json.loads(Path("new/folder/all.json").read_text())["rows"] == []
    Path("file").touch()
    wrong = dqrm(*ask, "file/all.json")
    assert wrong.exit_code != 0
    assert wrong.stdout == "", "before anything runs"

    def full_disk(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("dqrm.data.files.write_json", full_disk)
    cut = dqrm(*ask, "all.json")
    assert cut.exit_code == 1
    assert "nothing is complete yet" in cut.stdout


def test_faults_are_told_before_anything_runs(dqrm, glue, bert_of_six):
    begin = ("bench", "transformers", "--data", glue, *SHORT)
    for more, message in (
        (("--tasks", "qnli"), "--tasks qnli: must be among sst2, cola, mrpc, stsb"),
        (("--tasks", "sst2"), "there is no sst2_train.tsv.gz or sst2_train.tsv"),
        (("--tasks", "cola", "--model", "absent"), "CoLA, finetune.model: absent: no such folder"),
        (("--tasks", "cola", "--recipes", "moq,magic"), "--recipes magic: must be among moq"),
        (("--tasks", "cola,cola"), "give different names"),
        (("--tasks", "cola", "--seeds", "0,1,0"), "'0,1,0': give different seeds"),
    ):
        done = dqrm(*begin, *more)
        assert done.exit_code == 2, more
        assert message in done.stderr
    assert not Path("runs").exists()
