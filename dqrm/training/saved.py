"""Evaluation of what a run left behind: a packed model, a checkpoint, or a whole run."""

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal

from dqrm.config import RunConfig
from dqrm.configuration import load
from dqrm.data.dataset import PreparedDataset
from dqrm.models.dlrm import DLRM
from dqrm.serving.artifact import load_artifact
from dqrm.serving.predictor import find_artifact
from dqrm.tracking.config import TrackingConfig
from dqrm.tracking.tracker import start_tracker
from dqrm.training.build import build_model
from dqrm.training.checkpoint import read_checkpoint
from dqrm.training.evaluate import evaluate
from dqrm.training.metrics import Metrics


@dataclass(frozen=True)
class SavedModel:
    """A model read back and where it came from."""

    model: DLRM
    source: Path
    features_digest: str


def load_saved(path: Path, dataset: PreparedDataset) -> SavedModel:
    """Read the model at ``path``: a checkpoint, a packed model, or a run's packed model.

    Raises:
        ValueError: there is none, or it was trained on another vocabulary than ``dataset``.
    """
    if (path / "state.json").is_file():
        checkpoint = read_checkpoint(path)
        model = build_model(checkpoint.config, dataset)
        checkpoint.load_model(model)
        saved = SavedModel(model, path, checkpoint.state.features_digest)
    else:
        file = find_artifact(path)
        artifact = load_artifact(file)
        saved = SavedModel(artifact.model, file, artifact.features_digest)
    if saved.features_digest != dataset.manifest.features_digest:
        raise ValueError(
            f"{path} was trained with other columns or vocabularies than {dataset.path} has; "
            "prepare the new rows with `dqrm data apply`"
        )
    return saved


def evaluate_saved(
    path: Path,
    *,
    data: str | None = None,
    split: str = "test",
    batch_size: int = 16384,
    tracking: TrackingConfig | None = None,
) -> Metrics:
    """Measure a saved model on a split and record it as a run of its own.

    Args:
        path: a run's folder, a checkpoint, or a packed model.
        data: a prepared data set; the one the run was trained on when not given.
        split: name of the split.
        batch_size: rows per batch.
        tracking: where to record the evaluation; the default store when not given.
    """
    dataset = PreparedDataset.open(data or training_data(path))
    saved = load_saved(path, dataset)
    name = f"eval-{path.name}-{datetime.now():%Y%m%d-%H%M%S-%f}"
    # The folder keeps what the store did not take; `dqrm tracking sync` finds it there.
    folder = (path if path.is_dir() else path.parent) / "evaluations" / name
    tracker = start_tracker(tracking or TrackingConfig(), run_name=name, run_dir=folder)
    status: Literal["FINISHED", "FAILED"] = "FAILED"
    try:
        measured = evaluate(saved.model, dataset.split(split), batch_size)
        tracker.log_params({"model": str(saved.source), "data": str(dataset.path), "split": split})
        tracker.log_metrics(measured.as_dict(f"{split}/"), step=0)
        tracker.describe(
            f"{saved.source} on the {split} split of {dataset.path}: AUC {measured.auc:.4f}, "
            f"log loss {measured.log_loss:.4f}."
        )
        status = "FINISHED"
    finally:
        tracker.finish(status)
    return measured


def training_data(path: Path) -> str:
    """Return ``data.path`` of the run that ``path`` belongs to.

    Raises:
        ValueError: no folder above it says.
    """
    for folder in (path, *path.parents):
        if (folder / "config.yaml").is_file():
            return load(RunConfig, folder / "config.yaml").data.path
    raise ValueError(f"{path} does not say what data it was trained on; name it with --data")
