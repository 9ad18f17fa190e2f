"""The whole configuration of a training run."""

from pathlib import Path

import yaml

from dqrm.compress.config import QuantConfig
from dqrm.models.config import ModelConfig
from dqrm.settings import Settings
from dqrm.tracking.config import TrackingConfig
from dqrm.training.config import CheckpointConfig, DataConfig, OptimConfig, TrainingConfig


class RunConfig(Settings):
    """Everything that decides what `dqrm train` does."""

    name: str | None = None
    """Name of the run and of its folder; made from the recipe and the time when not given."""

    output: Path = Path("runs")
    """Folder under which the run's own folder is made."""

    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    quant: QuantConfig = QuantConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainingConfig = TrainingConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    tracking: TrackingConfig = TrackingConfig()


def dump_yaml(config: RunConfig) -> str:
    """Return the configuration as YAML that :func:`load_yaml` reads back equal."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def load_yaml(path: Path) -> RunConfig:
    """Read a complete configuration written by :func:`dump_yaml`."""
    return RunConfig.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
