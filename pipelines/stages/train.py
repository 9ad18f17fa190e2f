"""``stage: train``: a recommender, trained as ``dqrm train`` does it.

Its output holds ``model/`` (the packed model that ``dqrm eval`` takes), ``checkpoint/`` (the
selected one), ``config.yaml`` and ``summary.json``. The run itself, with its checkpoints and plots,
stays in the pipeline's ``runs`` folder.
"""

import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import model_validator

from dqrm.configuration import load
from dqrm.launch import find_place
from dqrm.pipelines.stage import MODEL_FOLDER, Interrupted, Problem, Stage, StageContext
from dqrm.yaml_text import dump_value

if TYPE_CHECKING:
    from dqrm.config import RunConfig
    from dqrm.training.run import TrainResult

_OF_THE_PIPELINE = ("name", "output", "tracking")


class TrainStage(Stage):
    """Train a recommender."""

    stage: Literal["train"] = "train"
    """Train a recommender, as dqrm train does."""

    config: str | None = None
    """Shipped configuration (`dqrm configs ls`) or YAML file; defaults without it."""

    settings: dict[str, Any] = {}
    """Values over it, in the sections of `dqrm config --fields`: {quant: {bits: 8}}."""

    @model_validator(mode="after")
    def _resolves(self) -> "TrainStage":
        for key in _OF_THE_PIPELINE:
            if key in self.settings:
                raise ValueError(f"settings.{key} is the pipeline's to say; leave it out")
        try:
            self.resolved()
        except FileNotFoundError as error:
            raise ValueError(str(error)) from error
        return self

    def resolved(self) -> "RunConfig":
        """The configuration to train with."""
        from dqrm.config import RunConfig

        return load(RunConfig, self.config, list(_overrides(self.settings)))

    @property
    def trains_together(self) -> bool:
        """Every process takes its share of the batches."""
        return True

    @property
    def records_itself(self) -> bool:
        """The trainer opens the run of the stage."""
        return True

    def identity(self) -> dict[str, Any]:
        """The resolved configuration; where it came from does not matter."""
        config = self.resolved().model_dump(mode="json", exclude=set(_OF_THE_PIPELINE))
        return {"stage": self.stage, "config": config}

    def sources(self) -> dict[str, str]:
        """Digest of the prepared data set."""
        from dqrm.data.dataset import PreparedDataset

        return {"data": PreparedDataset.open(self.resolved().data.path).manifest.digest}

    def problems(self, earlier: Mapping[str, Stage]) -> list[Problem]:
        """A data set that is not there."""
        try:
            self.sources()
        except (OSError, ValueError) as error:
            return [Problem("settings.data.path", str(error))]
        return []

    def plan(self, earlier: Mapping[str, Stage]) -> list[tuple[str, str]]:
        """Rows, steps and sizes."""
        from dqrm.data.dataset import PreparedDataset
        from dqrm.training.build import sizes_of

        config = self.resolved()
        dataset = PreparedDataset.open(config.data.path)
        sizes = sizes_of(config, dataset)
        steps = dataset.split("train").num_batches(config.data.batch_size) * config.train.epochs
        return [
            ("data", f"{dataset.path} ({dataset.split('train').num_rows:,} training rows)"),
            ("steps", f"{min(steps, config.train.max_steps or steps):,}"),
            ("parameters", f"{sizes.fp32_bytes // 4:,}"),
            ("bytes", f"{sizes.fp32_bytes:,} in FP32, {sizes.packed_bytes:,} packed"),
        ]

    def run(self, context: StageContext) -> dict[str, float]:
        """Train, or go on with what a killed attempt saved, and lay out what it made."""
        from dqrm.training.checkpoint import list_checkpoints
        from dqrm.training.run import train

        run_dir = context.run_dir
        config = self.resolved().model_copy(
            update={
                "name": run_dir.name,
                "output": run_dir.parent,
                "tracking": context.tracking,
            }
        )
        main = find_place().rank == 0
        begun = bool(list_checkpoints(run_dir / "checkpoints"))
        if main and run_dir.exists() and not begun:
            # Killed before its first checkpoint: the trainer makes the folder itself.
            shutil.rmtree(run_dir)
        result = train(config, resume=run_dir if begun else None)
        if result.interrupted is not None:
            raise Interrupted(result.interrupted)
        if main:
            _lay_out(run_dir, result.best_step, context.output)
        return _metrics(result)


def _overrides(settings: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            yield from _overrides(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}={dump_value(value)}"


def _lay_out(run_dir: Path, best_step: int, output: Path) -> None:
    """Link the parts of a run that later stages read; they are never written in place."""
    checkpoint = run_dir / "checkpoints" / f"step-{best_step:08d}"
    for source, name in ((run_dir / "artifact", MODEL_FOLDER), (checkpoint, "checkpoint")):
        shutil.copytree(source, output / name, copy_function=os.link)
    for name in ("config.yaml", "summary.json"):
        shutil.copy(run_dir / name, output)


def _metrics(result: "TrainResult") -> dict[str, float]:
    metrics = {
        "size/fp32_bytes": float(result.fp32_bytes),
        "size/packed_bytes": float(result.packed_bytes),
        "size/parameters": float(result.fp32_bytes // 4),
        "perf/samples_per_second": result.samples_per_second,
        "best/step": float(result.best_step),
    }
    if result.validation is not None:
        metrics["best/val_auc"] = result.validation.auc
        metrics["best/val_log_loss"] = result.validation.log_loss
    if result.test is not None:
        metrics["test/auc"] = result.test.auc
        metrics["test/log_loss"] = result.test.log_loss
    return metrics
