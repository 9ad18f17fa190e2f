"""The final model as an MLflow logged model, and its version in the registry."""

import contextlib
import importlib.util
import os
import tempfile
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dqrm.tracking.errors import Refused
from dqrm.tracking.spool import Record, Spool
from dqrm.tracking.store import Store, translated

if TYPE_CHECKING:
    import pandas as pd

MODEL_NAME = "model"
_MODEL_METRICS = ("best/", "size/", "test/", "val/")
_RECORD_TAG = "mlflow.dqrm.record"


def upload_model(store: Store, spool: Spool, run_id: str, record: Record) -> None:
    """Log the artifact folder that ``record`` names as a model of the run, and register it.

    May be repeated after it was cut off: what an earlier try made is taken up.
    """
    artifact, example = spool.kept(record["file"]), spool.kept(record["example"])
    client, experiment_id = store.client, spool.state.experiment_id
    tag = record["file"].partition("/")[0]
    with translated():
        found = client.search_logged_models([experiment_id], f"tags.`{_RECORD_TAG}` = '{tag}'")
        model = (
            found[0]
            if found
            else client.create_logged_model(
                experiment_id, MODEL_NAME, run_id, tags={_RECORD_TAG: tag}, model_type="DLRM"
            )
        )
        if str(model.status) != "READY":
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / MODEL_NAME
                _build(path, artifact, example, run_id, model)
                client.log_model_artifacts(model.model_id, str(path))
            _link(store, run_id, model.model_id)
            _copy_metrics(store, run_id, model.model_id)
            client.finalize_logged_model(model.model_id, "READY")
        if record["register_as"]:
            register(store, run_id, model.model_id, record["register_as"])


def model_signature(example: "pd.DataFrame") -> Any:
    """Return the ``ModelSignature`` for frames like ``example``.

    Every column is optional, as any may be missing in a row. Types are chosen so that MLflow
    lets through what pandas makes of real files:

    - Text is ``string`` and stays text, also where it looks like a number (``80e26c9b`` is no
      float). A column of it without any value must be of dtype object or str, not float NaN.
    - Numbers are ``any``. A ``long`` column would be refused as soon as one value is missing,
      since pandas turns it into floats, and a ``double`` column is refused for int64 input.
    - Lists (multi-hot) are arrays of strings.
    """
    import numpy as np
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, Schema, TensorSpec
    from mlflow.types.schema import AnyType, Array, DataType

    types: dict[str, Any] = {
        "number": AnyType(),  # type: ignore[no-untyped-call]
        "list": Array(DataType.string),
        "text": DataType.string,
    }
    inputs: list[Any] = [
        ColSpec(types[column_kind(example[name])], str(name), required=False) for name in example
    ]
    return ModelSignature(
        inputs=Schema(inputs), outputs=Schema([TensorSpec(np.dtype(np.float32), (-1,))])
    )


def column_kind(column: "pd.Series[Any]") -> str:
    """Return "number", "list" or "text", by the column's type and its first value."""
    if column.dtype.kind in "biuf":
        return "number"
    present = column.dropna()
    first = present.iloc[0] if len(present) else None
    return "list" if first is not None and not isinstance(first, str) else "text"


def requirements() -> list[str]:
    """Return pinned pip requirements of the logged model.

    MLflow would find them by loading the model in a process of its own, some ten seconds.
    """
    names = ("dqrm", "torch", "numpy", "pandas", "mlflow", "safetensors")
    # A local label such as 2.13.0+cpu names a build that an index need not have.
    return [f"{name}=={metadata.version(name).partition('+')[0]}" for name in names]


def _build(path: Path, artifact: Path, example: Path, run_id: str, model: Any) -> None:
    import mlflow
    import pandas as pd

    code = importlib.util.find_spec("dqrm.serving.pyfunc")
    assert code is not None
    try:
        frame = pd.read_parquet(example)
        mlflow.pyfunc.save_model(
            path,
            python_model=code.origin,
            artifacts={"artifact": os.fspath(artifact)},
            signature=model_signature(frame),
            input_example=frame,
            pip_requirements=requirements(),
            mlflow_model=mlflow.models.Model(
                artifact_path=model.artifact_location,
                model_uuid=model.model_id,
                model_id=model.model_id,
                run_id=run_id,
            ),
        )
    except Exception as error:  # nothing here asks the store: trying again cannot help
        raise Refused(f"the model could not be packed for MLflow: {error}") from error


def _link(store: Store, run_id: str, model_id: str) -> None:
    from mlflow.entities import LoggedModelOutput

    outputs = store.run(run_id).outputs
    known = [output.model_id for output in outputs.model_outputs] if outputs else []
    if model_id not in known:
        store.client.log_outputs(run_id, [LoggedModelOutput(model_id, step=0)])


def _copy_metrics(store: Store, run_id: str, model_id: str) -> None:
    """Give the model the last quality and size metrics of its run: its own page shows them."""
    from mlflow.entities import Metric

    points = [
        Metric(m.key, m.value, m.timestamp, m.step, model_id=model_id, run_id=run_id)
        for m in store.run(run_id).data._metric_objs
        if m.key.startswith(_MODEL_METRICS)
    ]
    store.client.log_batch(run_id, metrics=points, synchronous=True)


def register(store: Store, run_id: str, model_id: str, name: str) -> None:
    """Make a version of a model in the registry, unless it is one already."""
    with contextlib.suppress(Refused), translated():  # refused when the name exists
        store.client.create_registered_model(name)
    versions = store.client.search_model_versions(f"name = '{name}' and run_id = '{run_id}'")
    source = f"models:/{model_id}"
    if not any(version.source == source for version in versions):
        store.client.create_model_version(
            name, source, run_id, model_id=model_id, await_creation_for=None
        )
