"""What training in several processes costs in accuracy, and what each part of the exchange buys.

Every arm is the same recipe and the same global batches, trained by real workers, selected on
validation and tested once a seed.
"""

import json
import logging
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dqrm.config import RunConfig
from dqrm.configuration import to_yaml
from dqrm.data.files import write_text
from dqrm.launch import start_workers
from dqrm.training.checkpoint import list_checkpoints, read_checkpoint

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Arm:
    """One way to train."""

    name: str
    processes: int
    exchange: dict[str, Any] = field(default_factory=dict)
    """Settings of the section ``exchange``."""
    module: str = "dqrm"
    """What workers run: the command line, or a study of their own."""


@dataclass
class Result:
    """An arm, measured over seeds."""

    arm: Arm
    auc: list[float] = field(default_factory=list)
    """Test AUC of each seed."""
    log_loss: list[float] = field(default_factory=list)
    sent_bytes: float | None = None
    """A step and rank, at the end of training; None in a single process."""
    ratio: float | None = None
    """Bytes of the same collectives in FP32 over these."""

    @property
    def spread(self) -> float:
        """Sample standard deviation of the AUC."""
        return statistics.stdev(self.auc) if len(self.auc) > 1 else 0.0

    def as_dict(self) -> dict[str, Any]:
        """Return everything measured, for JSON."""
        return asdict(self)


def arms(processes: int) -> list[Arm]:
    """Return what is compared: one process, the default, fewer bits, and what is left out."""
    return [
        Arm("1 process", 1),
        Arm("FP32", processes, {"rows": "fp32", "dense": "fp32"}),
        Arm("INT8 rows, INT8 MLPs", processes),
        Arm("INT4 rows, INT8 MLPs", processes, {"rows": "int4"}),
        Arm("INT4 rows, sign MLPs", processes, {"rows": "int4", "dense": "sign"}),
        Arm("sign MLPs, no error feedback", processes, {"dense": "sign", "error_feedback": False}),
        Arm("INT8, no error feedback", processes, {"error_feedback": False}),
        Arm("published: clipped mean scales", processes, module="dqrm.bench.published"),
    ]


def compare_replicas(
    config: RunConfig, chosen: Sequence[Arm], seeds: Sequence[int], recipe: str
) -> Iterator[Result]:
    """Train every arm with every seed, and yield each arm as it is done.

    Args:
        config: the recipe; ``exchange`` is changed by the arms, ``train.seed`` is not used.
        chosen: the arms.
        seeds: one run of each arm for each.
        recipe: begins the names of the runs.

    Raises:
        RuntimeError: a run failed; its workers have said why.
    """
    for number, arm in enumerate(chosen):
        result = Result(arm)
        for seed in seeds:
            log.info("%s, seed %d", arm.name, seed)
            with tempfile.TemporaryDirectory(prefix="dqrm-replicas-") as folder:
                run = Path(folder) / f"{recipe}-{number}-seed{seed}"
                _train(config, arm, seed, run)
                _measure(run, result)
        yield result


def _train(config: RunConfig, arm: Arm, seed: int, run: Path) -> None:
    changed = config.model_copy(
        update={
            "name": run.name,
            "output": run.parent,
            "train": config.train.model_copy(update={"seed": seed}),
            "exchange": config.exchange.model_copy(update=arm.exchange),
        }
    )
    file = run.with_suffix(".yaml")
    write_text(file, to_yaml(changed))
    arguments = [str(file)] if arm.module != "dqrm" else ["train", "--config", str(file), "-q"]
    printed = run.parent / "printed"
    code = start_workers(arm.processes, arguments, module=arm.module, printed=printed)
    if code:
        raise RuntimeError(f"{arm.name}, seed {seed}: training ended with exit code {code}")


def _measure(run: Path, result: Result) -> None:
    test = json.loads((run / "summary.json").read_text(encoding="utf-8"))["test"]
    result.auc.append(test["auc"])
    result.log_loss.append(test["log_loss"])
    history = read_checkpoint(list_checkpoints(run / "checkpoints")[-1]).state.history
    sent = [entry for entry in history if "comm/ratio" in entry]
    if sent and result.arm.module == "dqrm":
        result.sent_bytes = sent[-1]["comm/sent_bytes_per_step"]
        result.ratio = sent[-1]["comm/ratio"]
