"""The final model in the store: loaded back, it answers as the predictor does."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml

from dqrm.config import RunConfig
from dqrm.data.encode import RowEncoder
from dqrm.data.schema import criteo_schema
from dqrm.models.dlrm import build_dlrm
from dqrm.serving.artifact import save_artifact
from dqrm.serving.predictor import ARTIFACT_FILE, Predictor
from dqrm.tracking.models import model_signature
from dqrm.tracking.quiet import import_mlflow

BUCKETS = 50


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    """A packed model for Criteo's 13 numbers and 26 hashed categories, with random weights."""
    schema = criteo_schema().with_defaults(hash_buckets=BUCKETS)
    config = RunConfig.model_validate({"model": {"bottom_mlp": [8], "top_mlp": [8]}})
    torch.manual_seed(0)
    tables = [(column.name, BUCKETS) for column in schema.categorical]
    model = build_dlrm(config.model, config.quant, num_dense=len(schema.dense), tables=tables)
    folder = tmp_path / "artifact"
    folder.mkdir()
    save_artifact(folder / ARTIFACT_FILE, model, config.model, RowEncoder(schema, {}), "digest")
    return folder


@pytest.fixture
def frame() -> pd.DataFrame:
    rng = np.random.default_rng(0)
    schema = criteo_schema()
    values: dict[str, Any] = {c.name: rng.integers(0, 99, 6) for c in schema.dense}
    for column in schema.categorical:
        values[column.name] = [f"{n:08x}" for n in rng.integers(0, 1 << 32, 6)]
    frame = pd.DataFrame(values)
    # Values that a careless reader takes for numbers, and missing ones of both kinds.
    frame.loc[0, "C1"] = "80e26000"
    frame.loc[1, "C1"] = "05000000"
    frame.loc[2, "C1"] = None
    frame["I2"] = frame["I2"].astype(float)
    frame.loc[3, "I2"] = None
    return frame


def test_logged_model_answers_as_the_predictor(
    store: str, start: Any, artifact: Path, frame: pd.DataFrame, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    tracker = start()
    tracker.log_metrics({"test/auc": 0.75, "train/loss": 0.5}, 7)
    tracker.log_model(artifact, frame.head(2), "clicks")
    assert tracker.finish("FINISHED")
    assert not Path("runs/run/tracking-rejected.jsonl").exists()

    mlflow = import_mlflow()
    expected = Predictor.load(artifact).predict(frame)
    assert len(set(expected)) == 6
    for uri in (f"runs:/{tracker.run_id}/model", "models:/clicks/1"):
        answer = mlflow.pyfunc.load_model(uri).predict(frame)
        assert answer.dtype == np.float32
        np.testing.assert_array_equal(answer, expected)

    client = mlflow.MlflowClient(store)
    [model] = client.search_logged_models(["1"])
    assert (model.source_run_id, str(model.status)) == (tracker.run_id, "READY")
    assert {metric.key: metric.value for metric in model.metrics} == {"test/auc": 0.75}
    outputs = client.get_run(tracker.run_id).outputs.model_outputs
    assert [output.model_id for output in outputs] == [model.model_id]
    folder = Path(model.artifact_location)
    files = {path.name for path in folder.rglob("*") if path.is_file()}
    assert {"MLmodel", "pyfunc.py", "requirements.txt", ARTIFACT_FILE} <= files
    assert not [name for name in files if name.endswith((".pkl", ".pickle"))]
    requirements = (folder / "requirements.txt").read_text().split()
    assert any(line.startswith("torch==2.") and "+" not in line for line in requirements)
    flavor = yaml.safe_load((folder / "MLmodel").read_text())["flavors"]["python_function"]
    assert Path(flavor["model_code_path"]).name == "pyfunc.py"


def test_model_upload_cut_off_is_taken_up_again(
    store: str, start: Any, artifact: Path, frame: pd.DataFrame
) -> None:
    """The note that a model is uploaded is lost twice: it stays one model and one version."""
    from threading import Event

    from dqrm.tracking.models import upload_model
    from dqrm.tracking.spool import RunHeader, Spool
    from dqrm.tracking.store import Store
    from dqrm.tracking.uploader import Uploader

    spool = Spool.open(Path("runs/run"), RunHeader(store, "dqrm", "run", None))
    spool.append("open", time=1, resumed=False, tags={})
    Uploader(spool).drain(Event())
    example = spool.new_file("example.parquet")
    frame.to_parquet(spool.kept(example))
    record = {"file": spool.keep(artifact), "example": example, "register_as": "clicks"}
    assert spool.state.run_id is not None
    for _ in range(3):
        upload_model(Store(store), spool, spool.state.run_id, record)
    client = import_mlflow().MlflowClient(store)
    assert len(client.search_logged_models(["1"])) == 1
    assert len(client.search_model_versions("name = 'clicks'")) == 1
    assert len(client.get_run(spool.state.run_id).outputs.model_outputs) == 1
    spool.close()


def test_artifact_that_is_no_model_is_put_aside(
    store: str, start: Any, frame: pd.DataFrame, tmp_path: Path
) -> None:
    tracker = start()
    tracker.log_model(tmp_path, frame, None)  # a folder MLflow takes, as it never loads it
    tracker.log_model(tmp_path / "missing", frame, None)
    tracker.log_metrics({"a": 1.0}, 1)
    assert tracker.finish("FINISHED")
    run = import_mlflow().MlflowClient(store).get_run(tracker.run_id)
    assert run.data.metrics == {"a": 1.0}


class TestSignature:
    def test_types(self) -> None:
        frame = pd.DataFrame(
            {
                "I1": [1, 2],
                "I2": [0.5, None],
                "C1": ["5", None],
                "C2": [None, None],
                "T": [["a"], []],
            }
        )
        columns = json.loads(model_signature(frame).to_dict()["inputs"])
        assert {c["name"]: c["type"] for c in columns} == {
            "I1": "any",
            "I2": "any",
            "C1": "string",
            "C2": "string",
            "T": "array",
        }
        assert not any(c["required"] for c in columns)

    @pytest.mark.parametrize(
        "values",
        [
            {"I1": 3, "C1": "80e26000", "T": ["a"]},
            {"I1": 3.5, "C1": "x", "T": ["a", "b"]},
            {"I1": None, "C1": None, "T": []},
            {"I1": 3},
        ],
        ids=["int", "float", "missing-values", "missing-columns"],
    )
    def test_rows_that_mlflow_lets_through_unchanged(self, values: dict[str, Any]) -> None:
        from mlflow.models.utils import _enforce_schema

        example = pd.DataFrame({"I1": [1], "C1": ["a"], "T": [["a"]]})
        frame = pd.DataFrame([values])
        passed = _enforce_schema(frame, model_signature(example).inputs)
        pd.testing.assert_frame_equal(passed, frame)

    def test_number_in_a_text_column_is_refused(self) -> None:
        # A float 38.0 is not the text "38" the model was trained with.
        from mlflow.exceptions import MlflowException
        from mlflow.models.utils import _enforce_schema

        signature = model_signature(pd.DataFrame({"C1": ["38"]}))
        with pytest.raises(MlflowException, match="Incompatible input types for column C1"):
            _enforce_schema(pd.DataFrame({"C1": [38.0]}), signature.inputs)

    def test_rows_as_json_for_a_served_model(self) -> None:
        from mlflow.pyfunc.scoring_server import infer_and_parse_data

        signature = model_signature(pd.DataFrame({"I1": [1], "C1": ["a"]}))
        rows = {"dataframe_records": [{"I1": 7, "C1": "80e26000"}, {"I1": None, "C1": "05"}]}
        frame = infer_and_parse_data(rows, signature.inputs)
        assert frame["C1"].tolist() == ["80e26000", "05"]
        assert frame["I1"].tolist()[0] == 7
