"""Comparing runs of a real store: the same as by folder, chosen by metric, recorded as a run."""

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import Result

from dqrm.comparison.differences import grouped
from dqrm.comparison.folders import read_folder
from dqrm.comparison.mlflow_runs import StoredRuns
from dqrm.comparison.record import COMPARISON_TAG, ComparedRun
from dqrm.comparison.recording import description
from dqrm.comparison.report import Report
from dqrm.config import RunConfig
from dqrm.training.checkpoint import list_checkpoints, read_checkpoint
from dqrm.training.run import train

Run = Callable[..., Result]

NAMES = ("fp32", "int4")


@pytest.fixture(scope="module")
def trained(clicks_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two trained runs and the store they were recorded in."""
    place = tmp_path_factory.mktemp("trained")
    for name, bits in zip(NAMES, (32, 4), strict=True):
        settings = {
            "output": str(place / "runs"),
            "name": name,
            "data": {"path": str(clicks_data), "batch_size": 512},
            "model": {"embedding_dim": 8, "bottom_mlp": [16], "top_mlp": [16]},
            "quant": {"bits": bits},
            "optim": {"name": "adam", "lr": 0.01},
            "train": {"epochs": 2, "threads": 1, "log_every": 3},
            "tracking": {
                "uri": f"sqlite:///{place / 'mlflow.db'}",
                "experiment": "clicks",
                "system_metrics": False,
                "flush_seconds": 0.2,
            },
        }
        train(RunConfig.model_validate(settings))
    return place


@pytest.fixture
def here(trained: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same folder as the current one."""
    monkeypatch.chdir(trained)
    return trained


def stored(place: Path) -> dict[str, ComparedRun]:
    store = StoredRuns(f"sqlite:///{place / 'mlflow.db'}")
    return {run.info.run_name: store.read(run) for run in store.all()}


def test_the_store_knows_what_the_folder_knows(here: Path) -> None:
    by_store = stored(here)
    assert by_store.keys() == set(NAMES)
    for name in NAMES:
        [folder] = read_folder(here / "runs" / name)
        of_store = by_store[name]
        assert of_store.facts["kernels"]
        assert of_store.metrics.keys() == folder.metrics.keys()
        for key, value in folder.metrics.items():
            assert of_store.metrics[key] == pytest.approx(value, rel=1e-12, nan_ok=True), key
        assert of_store.curves.keys() == folder.curves.keys()
        for key, curve in folder.curves.items():
            steps, values = zip(*of_store.curves[key], strict=True)
            assert steps == tuple(step for step, _ in curve)
            assert values == pytest.approx([value for _, value in curve], rel=1e-12, nan_ok=True)
        same = {"metrics": {}, "curves": {}, "facts": {}, "source": ""}
        assert replace(of_store, **same) == replace(folder, **same)


def test_tables_are_measured_as_they_are_packed(here: Path) -> None:
    from dqrm.compress import grids
    from dqrm.data.dataset import PreparedDataset
    from dqrm.models.embedding import EmbeddingBagCollection
    from dqrm.training.build import build_model

    run = here / "runs" / "int4"
    [found] = read_folder(run)
    assert found.measurements is not None
    best = json.loads((run / "summary.json").read_text())["best_step"]
    [path] = [p for p in list_checkpoints(run / "checkpoints") if p.name.endswith(f"{best:08d}")]
    checkpoint = read_checkpoint(path)
    model = build_model(checkpoint.config, PreparedDataset.open(checkpoint.config.data.path))
    checkpoint.load_model(model)
    assert isinstance(model.emb_l, EmbeddingBagCollection)
    for number, (table, rows) in enumerate(
        zip(found.measurements.tables, model.emb_l.table_rows(), strict=True)
    ):
        codes, scale = model.emb_l.codes(number)
        change = (rows - grids.dequantize(codes, scale)).norm() / rows.norm()
        assert table.relative_error == pytest.approx(float(change), rel=1e-5)
        packed, _ = model.emb_l.packed(number)
        assert table.packed_bytes == packed.nbytes + scale.nbytes
    rows_of_bins = sum(bin_.rows for bin_ in found.measurements.calibration)
    assert rows_of_bins == found.metrics["test/num_rows"]
    mean = sum(bin_.rows * bin_.predicted for bin_ in found.measurements.calibration)
    rate = found.metrics["test/positive_rate"]
    assert mean / rows_of_bins / rate == pytest.approx(found.metrics["test/calibration"], rel=1e-5)
    [full] = read_folder(here / "runs" / "fp32")
    assert full.measurements is not None
    assert {table.relative_error for table in full.measurements.tables} == {0.0}


def test_runs_are_found_by_id_name_and_metric(dqrm: Run, here: Path, tmp_path: Path) -> None:
    runs = stored(here)
    run_id = runs["int4"].run_id
    assert run_id is not None
    best = dqrm("compare", "--experiment", "clicks", "--best", "1", "--by", "test/log_loss")
    assert best.exit_code == 0, best.output
    winner = min(NAMES, key=lambda name: runs[name].metrics["test/log_loss"])
    assert best.stdout.splitlines()[1].split()[0] == winner
    by_id = dqrm("compare", run_id[:10], "fp32", "--experiment", "clicks", "--json", "found.json")
    assert by_id.exit_code == 0, by_id.output
    fields = json.loads(Path("found.json").read_text())
    assert [run["name"] for run in fields["runs"]] == ["int4", "fp32"]
    assert fields["differences"] == {"quant.bits": ["4", "32"]}
    assert fields["runs"][0]["url"].startswith("http://127.0.0.1:5000/#/experiments/")
    # A folder that is the same run is not compared with itself.
    assert dqrm("compare", run_id, "int4").stdout.count("int4") == 1

    for words, message in (
        (["--best", "1", "--by", "test/ac"], "--by test/ac: no run here has it; there are: best/"),
        (["fp23"], "did you mean fp32"),
        (["fp32", "--experiment", "none"], "there is no experiment none"),
    ):
        refused = dqrm("compare", *words)
        assert refused.exit_code == 2, words
        assert message in refused.stderr


def test_a_recorded_comparison_opens_in_mlflow(dqrm: Run, here: Path) -> None:
    from dqrm.tracking.store import Store

    result = dqrm("compare", *NAMES, "--log")
    assert result.exit_code == 0, result.output
    folder = Path(result.stdout.split("recorded in ")[1].split()[0])
    run_id = result.stdout.split("MLflow run ")[1].split()[0]
    client = Store(f"sqlite:///{here / 'mlflow.db'}").client
    run = client.get_run(run_id)
    assert run.info.status == "FINISHED"
    assert client.get_experiment(run.info.experiment_id).name == "clicks"
    assert run.data.tags[COMPARISON_TAG] == "fp32 and int4"
    assert run.data.params["runs"] == "fp32, int4"
    files = {file.path: file.file_size for file in client.list_artifacts(run_id)}
    assert files.keys() == {"report.html", "comparison.txt", "comparison.json"}
    note = run.data.tags["mlflow.note.content"]
    assert f"[int4](#/experiments/{run.info.experiment_id}/runs/" in note
    assert (folder / "report.html").stat().st_size == files["report.html"]
    # It is no run to be compared.
    best = dqrm("compare", "--best", "9", "--by", "size/packed_bytes")
    assert "comparison-" not in best.stdout
    assert dqrm("compare", *map(str, Path("runs").iterdir())).exit_code == 0
    alone = dqrm("compare", str(folder))
    assert alone.exit_code == 2
    assert "these are comparisons" in alone.stderr
    shutil.rmtree(folder)


def test_a_description_keeps_names_from_being_markup() -> None:
    run = ComparedRun("<b>|a|*", "FINISHED", "runs/x", {}, {"test/auc": math.nan}, url="none")
    text = description(Report([run], grouped([run]), "dqrm compare"))
    assert "\\<b\\>\\|a\\|\\* | nan |" in text
