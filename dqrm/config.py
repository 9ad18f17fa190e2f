"""The whole configuration of a training run."""

from pathlib import Path

from pydantic import model_validator

from dqrm.compress.config import QuantConfig
from dqrm.models.config import ModelConfig
from dqrm.settings import Settings
from dqrm.tracking.config import TrackingConfig
from dqrm.training.config import (
    CheckpointConfig,
    DataConfig,
    ExchangeConfig,
    OptimConfig,
    TrainingConfig,
)


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
    exchange: ExchangeConfig = ExchangeConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    tracking: TrackingConfig = TrackingConfig()

    @model_validator(mode="after")
    def _int8_has_codes(self) -> "RunConfig":
        if self.train.precision != "int8":
            return self
        if self.quant.mlp_bits == 32:
            raise ValueError(
                "train.precision=int8 multiplies the codes of quantized weights, and "
                "quant.mlp_bits=32 does not quantize: set quant.mlp_bits=4 or 8, or "
                "train.precision=bf16"
            )
        if self.quant.activation_bits != 32:
            raise ValueError(
                "train.precision=int8 rounds the inputs of layers its own way, not to quant."
                f"activation_bits={self.quant.activation_bits}: set quant.activation_bits=32, or "
                "train.precision=bf16"
            )
        return self
