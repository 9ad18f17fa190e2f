"""The whole configuration of a training run."""

from pathlib import Path

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
