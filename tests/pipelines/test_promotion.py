"""Daily retraining in this process, on a real store: growth, warm starts, promotion, cut-offs."""

import json
import shutil
from datetime import date
from pathlib import Path

import pandas as pd
import pytest
import torch

from dqrm.data.days import synthesize_days
from dqrm.data.synth import SynthConfig
from dqrm.pipelines.config import load_pipeline
from dqrm.pipelines.runner import run_pipeline
from dqrm.pipelines.stage import GateNotMet
from dqrm.pipelines.stages.promote import PromoteStage


@pytest.fixture(scope="module")
def days(tmp_path_factory):
    """Raw rows of five days; those of the fourth have labels that mean nothing."""
    folder = tmp_path_factory.mktemp("raw") / "days"
    synthesize_days(folder, SynthConfig(scale=0.0002, rows=10_000), 5, date(2026, 3, 1))
    bad = folder / "2026-03-04.parquet"
    frame = pd.read_parquet(bad)
    frame["label"] = 1 - frame["label"].sample(frac=1, random_state=0).to_numpy()
    frame.to_parquet(bad)
    return folder


@pytest.fixture
def run(days, daily_file):
    """Run a day's pipeline: trained on that day, tested on another, the next one by default."""
    file = daily_file(f"{days}/2026-03-01.parquet", f"{days}/2026-03-02.parquet")

    def run(day, test=None, *overrides):
        names = [f"{days}/2026-03-0{d}.parquet" for d in (day, test or day + 1)]
        own = [f"name=day{day}", f"stages.prepare.train=[{names[0]}]"]
        config = load_pipeline(file, [*own, f"stages.prepare.test=[{names[1]}]", *overrides])
        return run_pipeline(config)

    return run


@pytest.fixture
def registry():
    from dqrm.tracking.registry import Registry

    def open_registry():
        return Registry(f"sqlite:///{Path('mlflow.db').absolute()}")

    return open_registry


def promotion(day):
    return json.loads(Path(f"runs/day{day}/stages/promote/promotion.json").read_text())


def test_days_of_growth_a_bad_one_and_cut_offs(run, registry, days, dqrm, monkeypatch):
    first = run(1)
    assert [stage.ran for stage in first.stages] == [True] * 3
    assert registry().aliases("clicks") == {"champion": "1"}
    assert promotion(1)["dqrm.promotion.reason"] == "the first one"
    # The alias has moved, but the stage was begun with what it meant before.
    again = run(1)
    assert [stage.ran for stage in again.stages] == [False] * 3

    # The second day ends between the two aliases, then after them, then is let alone.
    class Killed(BaseException):  # as a kill: nothing handles it
        pass

    def killed(*arguments):
        raise Killed

    client = type(registry()._client)
    move = client.set_registered_model_alias

    def cut(self, name, alias, version):
        if alias == "champion":
            raise Killed
        move(self, name, alias, version)

    with monkeypatch.context() as patch:
        patch.setattr(client, "set_registered_model_alias", cut)
        with pytest.raises(Killed):
            run(2)
    assert registry().aliases("clicks") == {"champion": "1", "previous": "1"}
    with monkeypatch.context() as patch:
        patch.setattr(PromoteStage, "_report", killed)
        with pytest.raises(Killed):
            run(2)
    assert registry().aliases("clicks") == {"champion": "2", "previous": "1"}
    second = run(2)
    assert [stage.ran for stage in second.stages] == [False, False, True]
    assert registry().aliases("clicks") == {"champion": "2", "previous": "1"}
    assert len(registry().versions("clicks")) == 2
    found = promotion(2)
    assert (found["dqrm.promotion.over"], found["dqrm.promotion.version"]) == ("1", "2")
    assert found["metrics"]["champion/auc"] > 0.55
    assert second.stages[0].record.metrics["data/new_ids"] > 100

    # What the champion of fewer ids says of these rows is what it says of the raw ones.
    from dqrm.data.dataset import PreparedDataset
    from dqrm.serving.artifact import load_artifact
    from dqrm.serving.predictor import Predictor
    from dqrm.training.evaluate import predict
    from dqrm.training.translated import fit_to

    data = [PreparedDataset.open(f"runs/day{day}/stages/prepare/data") for day in (1, 2)]
    model = Path("runs/day1/stages/train/model")
    artifact = load_artifact(model / "model.safetensors")
    logits, _ = predict(fit_to(artifact, data[1], "it"), data[1].split("test"), 512)
    raw = Predictor.load(model).predict(pd.read_parquet(days / "2026-03-03.parquet"))
    assert torch.equal(torch.sigmoid(logits), torch.from_numpy(raw))
    newer = load_artifact(Path("runs/day2/stages/train/model/model.safetensors"))
    with pytest.raises(ValueError, match=r"it knows \d+ values of 'C\d+' that .* has no ids for"):
        fit_to(newer, data[0], "it")

    # Trained on the bad day, tested on a good one: not promoted, and all of it is on record.
    with pytest.raises(GateNotMet, match=r"not promoted.*AUC"):
        run(4)
    assert registry().aliases("clicks") == {"champion": "2", "previous": "1"}
    assert len(registry().versions("clicks")) == 2
    # By setting, the pipeline goes on.
    told = run(4, None, "stages.promote.rejected=go on", "name=lenient")
    assert told.stages[-1].record.metrics["promotion/passed"] == 0.0

    from dqrm.tracking.quiet import import_mlflow

    mlflow = import_mlflow().MlflowClient(f"sqlite:///{Path('mlflow.db').absolute()}")
    experiment = mlflow.get_experiment_by_name("dqrm")
    stages = mlflow.search_runs(
        [experiment.experiment_id], "tags.stage = 'promote' and tags.pipeline = 'day4'"
    )
    (run_of_stage,) = stages
    assert run_of_stage.info.status == "FAILED"
    assert run_of_stage.data.tags["dqrm.promotion"] == "rejected"
    assert run_of_stage.data.tags["dqrm.promotion.over"] == "2"
    assert run_of_stage.data.metrics["champion/auc"] > run_of_stage.data.metrics["candidate/auc"]

    # Any version can serve again; the next day goes on from it.
    # Somebody else's champion comes while ours is measured: it is not passed over.
    judge = PromoteStage._judge

    def meanwhile(self, *arguments):
        verdict = judge(self, *arguments)
        registry().crown("clicks", "1")
        return verdict

    with monkeypatch.context() as patch:
        patch.setattr(PromoteStage, "_judge", meanwhile)
        with pytest.raises(OSError, match=r"was version 2 .* and is version 1 now"):
            run(3, 5, "stages.promote.auc_margin=0.2")
    registry().crown("clicks", "2")
    assert len(registry().versions("clicks")) == 2

    listed = dqrm("champion", "clicks").stdout.splitlines()
    assert [line.split()[:2] for line in listed[-2:]] == [["2", "champion"], ["1", "previous"]]
    assert "not worse than version 1" in listed[-2]
    assert dqrm("champion", "clicks", "--back").exit_code == 0
    assert registry().aliases("clicks") == {"champion": "1", "previous": "2"}
    for arguments, message in [
        (("clicks", "--to", "7"), "no version 7: 1, 2"),
        (("click",), "no model click has versions"),
        (("clicks", "--to", "1", "--back"), "give one of them"),
    ]:
        refused = dqrm("champion", *arguments)
        assert refused.exit_code == 2
        assert message in refused.stderr
    config = load_pipeline(Path("daily.yaml"), ["name=after"])
    shutil.rmtree("runs/day2")
    assert [s.references(config.tracking) for s in config.stages] == [
        {"base": "1"},
        {"warm_start": "1"},
        {},
    ]


def test_faults_show_before_anything_runs(dqrm, days, daily_file):
    daily_file(f"{days}/2026-03-01.parquet", f"{days}/2026-03-02.parquet")
    valid = dqrm("pipeline", "validate", "daily.yaml")
    assert valid.exit_code == 0, valid.stderr
    planned = dqrm("pipeline", "run", "daily.yaml", "--dry-run")
    assert planned.exit_code == 0, planned.stderr
    assert "what stage:prepare prepares" in planned.stdout
    assert not Path("mlflow.db").exists(), "to look for a champion makes no store"
    for override, message in [
        ("stages.prepare.train=[absent.parquet]", "daily.yaml:5: stages.prepare.train: absent"),
        ("stages.prepare.base=models:/clicks", "write models:/NAME@champion"),
        ("stages.prepare.settings.split={by: rows}", "settings.split is what train"),
        (f"stages.prepare.test=[{days}/2026-03-01.parquet]", "both in train and in test"),
        ("stages.train.data=prepare", "name a stage"),
        ("stages.train.data=stage:prepared", "no earlier stage is called so"),
        ("stages.train.settings.data.path=x", "say the same"),
        ("stages.train.warm_start=absent", "holds no checkpoint"),
        ("stages.promote.min_auc=null", "give min_auc or max_log_loss"),
        ("stages.promote.model=a/b", "stages.promote.model=a/b"),
    ]:
        refused = dqrm("pipeline", "validate", "daily.yaml", override)
        assert refused.exit_code == 2, override
        assert message in refused.stderr, refused.stderr
