"""How long steps of a run take, measured on a few of them."""

import contextlib
import resource
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from dqrm.config import RunConfig
from dqrm.data.dataset import PreparedDataset
from dqrm.tracking.tracker import NullTracker
from dqrm.training.build import build_model
from dqrm.training.checkpoint import TrainState
from dqrm.training.loop import Trainer
from dqrm.training.optimizer import Optimizer

_WARM_UP_STEPS = 3
_TIMED_STEPS = 20
_LEAST_TIMED_STEPS = 3
_TIMED_SECONDS = 10.0


class Timing(NamedTuple):
    """What some steps took."""

    steps: int
    step_seconds: float
    """Median."""
    peak_bytes: int
    """Most memory the process has had."""


class _Enough(Exception):
    """Ends the timing from within the loop."""


def time_steps(config: RunConfig, dataset: PreparedDataset, steps: int) -> Timing | None:
    """Time the first steps of the real loop; None where the run is too short to time.

    Nothing is recorded and nothing is left on disk.
    """
    wanted = min(steps, _WARM_UP_STEPS + _TIMED_STEPS)
    model = build_model(config, dataset)
    state = TrainState()
    seconds: list[float] = []
    started = time.monotonic()

    def stop_requested() -> bool:
        if state.step > len(seconds):
            seconds.append(state.train_seconds - sum(seconds))
        late = time.monotonic() - started > _TIMED_SECONDS
        enough = _WARM_UP_STEPS + _LEAST_TIMED_STEPS if late else wanted
        if len(seconds) >= min(enough, wanted):
            raise _Enough
        return False

    quiet = config.model_copy(
        update={"train": config.train.model_copy(update={"eval_every": None, "patience": None})}
    )
    with tempfile.TemporaryDirectory(prefix="dqrm-dry-run-") as folder:
        trainer = Trainer(
            quiet,
            dataset,
            model,
            Optimizer(model, config.optim),
            state,
            NullTracker(),
            Path(folder),
            stop_requested,
        )
        with contextlib.suppress(_Enough):
            trainer.fit()
    timed = sorted(seconds[_WARM_UP_STEPS:])
    if not timed:
        return None
    return Timing(len(timed), timed[len(timed) // 2], _peak_bytes())


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
