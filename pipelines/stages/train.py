"""``stage: train``: a recommender, trained as ``dqrm train`` does it.

Its output holds ``model/`` (the packed model that ``dqrm eval`` takes), ``checkpoint/`` (the
selected one), ``config.yaml`` and ``summary.json``. The run itself, with its checkpoints and plots,
stays in the pipeline's ``runs`` folder.
"""

import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import model_validator

from dqrm.configuration import load
from dqrm.launch import find_place
from dqrm.pipelines.references import named_stage, stages_named
from dqrm.pipelines.stage import (
    DATA_FOLDER,
    MODEL_FOLDER,
    Interrupted,
    Problem,
    Product,
    Stage,
    StageContext,
)
from dqrm.pipelines.stages.overrides import as_overrides
from dqrm.pipelines.stages.prepare import NONE_YET, meaning
from dqrm.pipelines.stages.table_bits import TableBitsStage, read_table_bits
from dqrm.tracking.config import TrackingConfig
from dqrm.tracking.model_reference import ModelReference

if TYPE_CHECKING:
    from dqrm.config import RunConfig
    from dqrm.training.run import TrainResult

log = logging.getLogger(__name__)

_OF_THE_PIPELINE = ("name", "output", "tracking")


class TrainStage(Stage):
    """Train a recommender."""

    makes: ClassVar[Product] = "recommender"

    stage: Literal["train"] = "train"
    """Train a recommender, as dqrm train does."""

    config: str | None = None
    """Shipped configuration (`dqrm configs ls`) or YAML file; defaults without it."""

    data: str | None = None
    """stage:NAME of a stage that prepared the data; settings.data.path without it."""

    table_bits: str | None = None
    """stage:NAME of a stage table_bits; settings.quant.table_bits without it."""

    warm_start: str | None = None
    """What to begin with: a model such as models:/clicks@champion, where a version has the alias,
    or the folder of a run or a checkpoint."""

    settings: dict[str, Any] = {}
    """Values over it, in the sections of `dqrm config --fields`: {quant: {bits: 8}}."""

    @model_validator(mode="after")
    def _resolves(self) -> "TrainStage":
        for key in _OF_THE_PIPELINE:
            if key in self.settings:
                raise ValueError(f"settings.{key} is the pipeline's to say; leave it out")
        for field in ("data", "table_bits"):
            own = getattr(self, field)
            if own is not None and named_stage(own) is None:
                raise ValueError(f"{field}={own}: name a stage, stage:NAME")
        for section, key, own in self._replaced():
            if key in (self.settings.get(section) or {}):
                raise ValueError(f"settings.{section}.{key} and {own} say the same; leave one out")
        if self.warm_start is not None:
            ModelReference.parse(self.warm_start)
        try:
            self.resolved()
        except FileNotFoundError as error:
            raise ValueError(str(error)) from error
        return self

    def resolved(self) -> "RunConfig":
        """The configuration to train with."""
        from dqrm.config import RunConfig

        return load(RunConfig, self.config, as_overrides(self.settings))

    @property
    def trains_together(self) -> bool:
        """Every process takes its share of the batches."""
        return True

    @property
    def records_itself(self) -> bool:
        """The trainer opens the run of the stage."""
        return True

    def inputs(self, earlier: Mapping[str, Stage]) -> tuple[str, ...]:
        """The stages that prepared the data and chose the bits."""
        return stages_named(earlier, data=self.data, table_bits=self.table_bits)

    def identity(self) -> dict[str, Any]:
        """The resolved configuration; where it came from does not matter."""
        config = self.resolved().model_dump(mode="json", exclude=set(_OF_THE_PIPELINE))
        for section, key, own in self._replaced():
            config[section][key] = own
        return {"stage": self.stage, "config": config}

    def _replaced(self) -> list[tuple[str, str, str]]:
        """Section and key of each setting that a field stands for, and what it says."""
        fields = (
            ("data", "path", self.data),
            ("quant", "table_bits", self.table_bits),
            ("train", "warm_start", self.warm_start),
        )
        return [(section, key, own) for section, key, own in fields if own is not None]

    def sources(self) -> dict[str, str]:
        """Digests of the prepared data set and of the model to begin with, where outside."""
        found = {}
        if self.data is None:
            from dqrm.data.dataset import PreparedDataset

            found["data"] = PreparedDataset.open(self.resolved().data.path).manifest.digest
        if (folder := self._warm_start_folder()) is not None:
            from dqrm.pipelines.digests import file_digest
            from dqrm.training.warm_start import find_model

            found["warm_start"] = file_digest(find_model(folder).path / "model.safetensors")
        return found

    def references(self, tracking: TrackingConfig) -> dict[str, str]:
        """The version of a model to begin with."""
        return {} if self.warm_start is None else meaning("warm_start", self.warm_start, tracking)

    def _warm_start_folder(self) -> Path | None:
        """What to begin with, unless it is in the registry."""
        if self.warm_start is None:
            return self.resolved().train.warm_start
        return None if ModelReference.parse(self.warm_start) else Path(self.warm_start)

    def problems(self, earlier: Mapping[str, Stage]) -> list[Problem]:
        """A data set, or a model to begin with, that is not there; bits of other scales."""
        found = []
        try:
            self.sources()
        except (OSError, ValueError) as error:
            field = "settings.data.path" if self.data is None else "warm_start"
            found.append(Problem(field, str(error)))
        chooser = earlier.get(str(self.table_bits and named_stage(self.table_bits)))
        if isinstance(chooser, TableBitsStage):
            own = self.resolved().quant.granularity
            if chooser.granularity != own:
                reason = (
                    f"chosen for one scale a {chooser.granularity}, but settings.quant.granularity "
                    f"is {own}: set granularity: {own} in {chooser.key}"
                )
                found.append(Problem("table_bits", reason))
        return found

    def plan(self, earlier: Mapping[str, Stage]) -> list[tuple[str, str]]:
        """Rows, steps and sizes."""
        from dqrm.data.dataset import PreparedDataset
        from dqrm.training.build import sizes_of

        if self.data is not None:
            return [("data", f"what {self.data} prepares")]
        config = self.resolved()
        dataset = PreparedDataset.open(config.data.path)
        sizes = sizes_of(config, dataset)
        packed = f"{sizes.packed_bytes:,} packed"
        if self.table_bits is not None:
            packed = f"packed as {self.table_bits} comes to"
        steps = dataset.split("train").num_batches(config.data.batch_size) * config.train.epochs
        return [
            ("data", f"{dataset.path} ({dataset.split('train').num_rows:,} training rows)"),
            ("steps", f"{min(steps, config.train.max_steps or steps):,}"),
            ("parameters", f"{sizes.fp32_bytes // 4:,}"),
            ("bytes", f"{sizes.fp32_bytes:,} in FP32, {packed}"),
        ]

    def run(self, context: StageContext) -> dict[str, float]:
        """Train, or go on with what a killed attempt saved, and lay out what it made."""
        from dqrm.training.checkpoint import list_checkpoints
        from dqrm.training.run import train

        run_dir = context.run_dir
        config = self._configured(context)
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

    def _configured(self, context: StageContext) -> "RunConfig":
        """The configuration with what only the pipeline knows."""
        from dqrm.compress.config import QuantConfig

        config, run_dir = self.resolved(), context.run_dir
        data, train = config.data, config.train
        if self.data is not None:
            folder = context.inputs[str(named_stage(self.data))] / DATA_FOLDER
            data = data.model_copy(update={"path": str(folder)})
        quant = config.quant
        if self.table_bits is not None:
            chosen = read_table_bits(context.inputs[str(named_stage(self.table_bits))])
            quant = QuantConfig.model_validate({**quant.model_dump(), "table_bits": chosen})
        if self.warm_start is not None:
            train = train.model_copy(update={"warm_start": self._begin_with(context)})
        return config.model_copy(
            update={
                "name": run_dir.name,
                "output": run_dir.parent,
                "tracking": context.tracking,
                "data": data,
                "quant": quant,
                "train": train,
            }
        )

    def _begin_with(self, context: StageContext) -> Path | None:
        """Folder of the model to begin with; None where there is no version yet."""
        assert self.warm_start is not None
        reference = ModelReference.parse(self.warm_start)
        if reference is None:
            return Path(self.warm_start)
        version = context.references["warm_start"]
        if version == NONE_YET:
            log.info("%s: no version yet; training begins anew", self.warm_start)
            return None
        from dqrm.tracking.registry import Registry

        folder = context.scratch.absolute() / f"{reference.name}-{version}"
        if find_place().rank != 0:
            # They meet before they read it.
            return folder
        registry = Registry.of(context.tracking)
        return registry.download_checkpoint(reference.name, version, folder)


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
