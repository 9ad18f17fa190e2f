"""What 4 bits cost or gain: one recipe in FP32 and at low bits, over several seeds.

Every arm trains with the same recipe, is selected on validation and tested once a seed. A third
arm costs no training: the FP32 model quantized afterwards with one scale per row, which is what
is served today where nobody trains at low bits.
"""

import logging
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dqrm.config import RunConfig
from dqrm.data.dataset import PreparedDataset
from dqrm.training.build import build_model, sizes_of
from dqrm.training.checkpoint import list_checkpoints, read_checkpoint
from dqrm.training.evaluate import evaluate
from dqrm.training.metrics import Metrics
from dqrm.training.run import TrainResult, train

log = logging.getLogger(__name__)


@dataclass
class Arm:
    """One way to get a model, measured over seeds."""

    name: str
    packed_bytes: int
    test: list[Metrics] = field(default_factory=list)
    validation: list[Metrics] = field(default_factory=list)
    curves: list[list[dict[str, float]]] = field(default_factory=list)
    """For each seed, the validations of the run: epoch, auc, log_loss."""

    def mean(self, metric: str) -> float:
        """Return the mean of a test metric over seeds."""
        return float(statistics.mean(getattr(measured, metric) for measured in self.test))

    def spread(self, metric: str) -> float:
        """Return the sample standard deviation over seeds; 0 for a single one."""
        values = [getattr(measured, metric) for measured in self.test]
        return statistics.stdev(values) if len(values) > 1 else 0.0

    def as_dict(self) -> dict[str, Any]:
        """Return everything measured, for JSON."""
        return asdict(self)


def compare_accuracy(config: RunConfig, seeds: Sequence[int], recipe: str | None) -> list[Arm]:
    """Train ``config`` in FP32 and as configured with every seed.

    Args:
        config: the recipe; its ``quant`` is the low-bit arm, its ``train.seed`` is not used.
        seeds: one run of each arm for each.
        recipe: begins the names of the runs.

    Returns:
        FP32, FP32 quantized row-wise afterwards (unless ``quant.bits`` is 32), and the recipe as
        configured.

    Raises:
        ValueError: the data set has no test split, or the recipe does not quantize.
    """
    dataset = PreparedDataset.open(config.data.path)
    if "test" not in dataset.manifest.splits:
        raise ValueError(f"{dataset.path}: no test split to compare on")
    quant = config.quant
    if quant.bits == 32 and quant.storage == "fp32":
        raise ValueError("quant.bits=32: give the low-bit recipe; FP32 is trained beside it")
    in_full = {"bits": 32, "mlp_bits": 32, "table_bits": {}, "storage": "fp32"}
    full = _change(_change(config, "quant", in_full), "train", {"precision": "fp32"})
    baseline = Arm("FP32", sizes_of(full, dataset).packed_bytes)
    after = _change(full, "quant", {**quant.model_dump(), **_AFTERWARDS})
    quantized = Arm(f"FP32, then INT{quant.bits} by row", sizes_of(after, dataset).packed_bytes)
    trained = Arm(_name(config), sizes_of(config, dataset).packed_bytes)
    arms = [baseline, *([quantized] if quant.bits != 32 else []), trained]
    for seed in seeds:
        result = _train(full, seed, recipe, baseline, dataset)
        if quantized in arms:
            _quantize_afterwards(
                _change(after, "train", {"seed": seed}), result, dataset, quantized
            )
        _train(config, seed, recipe, trained, dataset)
    return arms


_AFTERWARDS = {"granularity": "row", "scale_period": 0, "storage": "fp32"}


def _name(config: RunConfig) -> str:
    """Name the arm that trains as configured, in a form that run names take."""
    quant, precision = config.quant, config.train.precision
    parts = [f"INT{quant.bits}"] if quant.bits != 32 else []
    parts += [f"{quant.storage}-rows"] if quant.storage != "fp32" else []
    parts += [f"{precision}-products"] if precision != "fp32" else []
    return "-".join(parts)


def _change(config: RunConfig, section: str, values: dict[str, Any]) -> RunConfig:
    changed = getattr(config, section).model_copy(update=values)
    return config.model_copy(update={section: changed})


def _train(
    config: RunConfig, seed: int, recipe: str | None, arm: Arm, dataset: PreparedDataset
) -> TrainResult:
    log.info("%s, seed %d", arm.name, seed)
    label = f"{recipe or 'bench'}-{arm.name.lower()}-seed{seed}"
    tags = {**config.tracking.tags, "dqrm.arm": arm.name}
    config = _change(_change(config, "train", {"seed": seed}), "tracking", {"tags": tags})
    result = train(config, recipe=label)
    if result.interrupted is not None:
        raise KeyboardInterrupt
    assert result.test is not None
    arm.test.append(result.test)
    if result.validation is not None:
        arm.validation.append(result.validation)
    batches = dataset.split("train").num_batches(config.data.batch_size)
    newest = read_checkpoint(list_checkpoints(result.run_dir / "checkpoints")[-1])
    arm.curves.append(
        [
            {
                "epoch": entry["step"] / batches,
                "auc": entry["val/auc"],
                "log_loss": entry["val/log_loss"],
            }
            for entry in newest.state.history
            if "val/auc" in entry
        ]
    )
    return result


def _quantize_afterwards(
    config: RunConfig, trained: TrainResult, dataset: PreparedDataset, arm: Arm
) -> None:
    """Put the selected FP32 weights on the row-wise grid and measure."""
    model = build_model(config, dataset)
    checkpoint = read_checkpoint(_selected(trained))
    checkpoint.load_model(model)
    arm.test.append(evaluate(model, dataset.split("test"), config.train.eval_batch_size))
    if "validation" in dataset.manifest.splits:
        split = dataset.split("validation")
        arm.validation.append(evaluate(model, split, config.train.eval_batch_size))


def _selected(result: TrainResult) -> Path:
    return result.run_dir / "checkpoints" / f"step-{result.best_step:08d}"
