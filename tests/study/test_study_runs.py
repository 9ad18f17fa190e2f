"""Studies train real runs, go on after a kill, choose on validation, and say who wins."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import small_study

from dqrm.config import RunConfig
from dqrm.configuration import ConfigError
from dqrm.study import running
from dqrm.study.arms import TUNED, Arm, quantized
from dqrm.study.kinds import KINDS, Question
from dqrm.study.outcome import read_outcome
from dqrm.study.plan import make_plan
from dqrm.study.report import make_report, record_in, write_report
from dqrm.study.study import Conductor

SECONDS = 300


@pytest.fixture(scope="module")
def killed_and_completed(clicks_data, tmp_path_factory):
    """A study that was killed while it trained, and its run too, and was then started again."""
    output = tmp_path_factory.mktemp("study")
    harness = Path(small_study.__file__).parent
    process = subprocess.Popen(
        [sys.executable, "-m", "small_study", str(clicks_data), str(output)],
        env={**os.environ, "PYTHONPATH": str(harness)},
    )
    deadline = time.monotonic() + SECONDS
    try:
        while not list(output.glob("runs/*/checkpoints/step-00000020/state.json")):
            assert process.poll() is None, "it ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        process.kill()
        process.wait()
    (lock,) = output.glob("trials/*/lock")
    orphan = int(lock.read_text())
    os.kill(orphan, signal.SIGKILL)
    left = sorted(path.name for path in output.glob("runs/*/checkpoints/*"))
    study, said = small_study.run(clicks_data, output, jobs=2)
    return output, study, said, lock.parent, left


def test_a_killed_study_goes_on_with_the_run_it_was_in(killed_and_completed):
    output, study, said, trial, left = killed_and_completed
    assert left
    assert max(left) < "step-00000160"
    first = next(t for t in study.plan.trials if t.folder == trial)
    assert read_outcome(first).steps == 160
    assert study.interrupted is None
    assert [point.step for point in read_outcome(first).curve] == [40, 76, 80, 120, 152, 160]
    assert said[-1] == ("runs", 6, 6, "runs")
    assert not list(output.glob("runs/*/checkpoints/.*"))


def test_a_failed_arm_does_not_keep_the_others_from_their_end(killed_and_completed):
    _, study, _, _, _ = killed_and_completed
    assert {name.partition("-seed")[0] for name in study.failed} == {"broken"}
    assert all("became nan" in reason for reason in study.failed.values())
    assert study.answered[0].outcomes["broken"] == []


def test_the_rival_is_chosen_on_validation_and_its_settings_are_lent(killed_and_completed):
    _, study, _, _, _ = killed_and_completed
    (answered,) = study.answered
    assert answered.chosen.key == "fp32-fast"
    means = {
        key: sum(read_outcome(t).validation["auc"] for t in answered.case.trials[key])
        for key in ("fp32", "fp32-fast")
    }
    assert means["fp32-fast"] > means["fp32"]
    assert [o.arm for o in answered.outcomes[TUNED]] == ["fp32-fast"]
    assert [arm.key for arm in answered.arms] == [
        *("fp32", TUNED, "fp32-int4", "int4", "broken", "int4-tuned"),
    ]
    lent = answered.case.trials["int4-tuned"][0].config
    assert lent.optim.lr == 0.3
    assert lent.quant.bits == 4


def test_outcomes_are_those_of_the_runs(killed_and_completed):
    _, study, _, _, _ = killed_and_completed
    (answered,) = study.answered
    for seed, outcome in enumerate(answered.outcomes["int4"]):
        run = answered.case.trials["int4"][seed].run_dir
        summary = json.loads((run / "summary.json").read_text())
        assert outcome.test == summary["test"]
        assert outcome.packed_bytes == summary["packed_bytes"]
        assert outcome.seed == small_study.SEEDS[seed]
        seconds = [point.cpu_seconds for point in outcome.curve]
        assert seconds == sorted(seconds)
        assert seconds[0] > 0
        assert outcome.peak_bytes > 100 * 2**20
    after, full = answered.outcomes["fp32-int4"], answered.outcomes["fp32"]
    assert all(2 * a.packed_bytes < f.packed_bytes for a, f in zip(after, full, strict=True))
    assert all(a.test["auc"] != f.test["auc"] for a, f in zip(after, full, strict=True))


def test_the_report_says_who_wins_and_shows_it(killed_and_completed):
    _, study, _, _, _ = killed_and_completed
    report = make_report(study)
    folder = study.plan.folder
    write_report(report, folder)
    text, page = (folder / "report.md").read_text(), (folder / "report.html").read_text()
    headline = next(
        v["sentence"] for v in report.record["cases"][0]["verdicts"] if v["arm"] == "INT4"
    )
    assert f"**{headline}**" in text
    for name in ("curves", "seconds", "size"):
        assert (folder / f"{name}.png").stat().st_size > 10_000
        assert f"({name}.png)" in text
    assert page.count("data:image/png;base64,") == 3
    assert "broken-seed0" in text
    assert json.loads((folder / "report.json").read_text())["cases"][0]["chosen"] == "FP32, fast"


def test_what_is_complete_is_not_run_again(killed_and_completed, clicks_data, monkeypatch):
    output, before, _, _, _ = killed_and_completed

    def refuse(*arguments, **settings):
        raise AssertionError("a process was started")

    without = small_study.question

    def unbroken(*arguments):
        asked = without(*arguments)
        arms = tuple(arm for arm in asked.arms if arm.key != "broken")
        return Question(asked.name, asked.claim, arms, asked.ours, asked.rival, asked.pictures)

    monkeypatch.setattr(small_study, "question", unbroken)
    monkeypatch.setattr(running.Crew, "_run", refuse)
    again, _ = small_study.run(clicks_data, output)
    assert again.answered[0].outcomes["int4"] == before.answered[0].outcomes["int4"]


def finish(study, tracker):
    report = make_report(study)
    write_report(report, study.plan.folder)
    record_in(tracker, report, study.plan.folder)
    return report


def test_runs_are_below_the_study_in_mlflow(clicks_data, tmp_path):
    from mlflow import MlflowClient

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    question = Question(
        "one", "One arm.", (Arm("int4", "INT4", quantized(4)),), "int4", "int4", ("curves",)
    )
    base = small_study.base(
        clicks_data, enabled=True, uri=uri, system_metrics=False, finish_seconds=300
    )
    plan = make_plan("one", lambda *_: question, [("", base)], [3], tmp_path / "out", "clicks")
    told = []
    conductor = Conductor(plan, 1, 1, base.tracking, lambda *arguments: None)
    study = conductor.run(lambda study, tracker: told.append(finish(study, tracker)))
    assert study.complete
    assert told
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("dqrm")
    runs = client.search_runs([experiment.experiment_id])
    parent, child = sorted(runs, key=lambda run: "arm" in run.data.tags)
    assert parent.data.tags["study"] == "one"
    assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert (child.data.tags["arm"], child.data.tags["seed"]) == ("int4", "3")
    assert (parent.info.status, child.info.status) == ("FINISHED", "FINISHED")
    assert parent.data.metrics["int4/test_auc"] == child.data.metrics["test/auc"]
    files = {file.path for file in client.list_artifacts(parent.info.run_id, "report")}
    assert files == {
        f"report/{name}" for name in ("report.html", "report.json", "report.md", "curves.png")
    }


def test_what_cannot_be_studied_is_refused(clicks_data, tmp_path):
    def plan(change=None, seeds=(0,), kind="overfit"):
        tree = small_study.base(clicks_data).model_dump()
        for section, values in (change or {}).items():
            tree[section].update(values)
        changed = RunConfig.model_validate(tree)
        return make_plan(kind, KINDS[kind], [("", changed)], seeds, tmp_path, "x")

    with pytest.raises(ValueError, match="each may be given once"):
        plan(seeds=(0, 1, 0))
    # INT8 products need codes, which FP32 MLPs do not have.
    with pytest.raises(ConfigError, match="INT16 tables"):
        plan({"train": {"precision": "int8"}}, kind="bits")
    one = plan().trials[0]
    for change, same in (
        ({"train": {"threads": 2}}, True),
        ({"train": {"epochs": 4}}, False),
        ({"optim": {"lr": 0.5}}, False),
        ({"tracking": {"enabled": True}}, True),
    ):
        assert (plan(change).trials[0].name == one.name) is same


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ("Error: no such file\nmore\n", "no such file"),
        (
            "step 3\nterminate called\nE1121 torch/distributed/elastic/multiprocessing/api.py:1]"
            " failed (exitcode: -6) local_rank: 1\n",
            "terminate called",
        ),
        ("", "it said nothing"),
    ],
)
def test_the_reason_of_a_failed_trial_is_its_own(said, reason, tmp_path):
    trial = SimpleNamespace(folder=tmp_path)
    (tmp_path / "log.txt").write_text(said)
    assert running.why_failed(trial) == reason
