"""Running a sweep: one training run a trial, and the one test of the winner."""

import logging
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dqrm.config import RunConfig
from dqrm.configuration import load
from dqrm.data.dataset import PreparedDataset
from dqrm.sweeps.folder import SweepFolder
from dqrm.sweeps.report import Report, keep_progress, write_report
from dqrm.sweeps.study import SweepStudy, overrides
from dqrm.tracking.base import Status, Tracker
from dqrm.tracking.tracker import start_tracker
from dqrm.training.errors import TrainingError
from dqrm.training.loop import Validation
from dqrm.training.metrics import Metrics
from dqrm.training.run import TrainResult, train
from dqrm.training.stop import stop_on_signals

if TYPE_CHECKING:
    from optuna import Trial
    from optuna.trial import FrozenTrial

log = logging.getLogger(__name__)

SWEEP_TAG = "dqrm.sweep"


class SweepError(RuntimeError):
    """No trial of a sweep trained to its end."""


@dataclass(frozen=True)
class SweepResult:
    """What a sweep came to."""

    report: Report
    interrupted: int | None = None
    """Number of the signal that stopped it after a checkpoint of the trial in progress."""


def check_data(config: RunConfig) -> None:
    """Raise ValueError unless the data set has rows to compare trials on."""
    dataset = PreparedDataset.open(config.data.path)
    if "validation" not in dataset.manifest.splits:
        raise ValueError(
            f"data.path={config.data.path}: has no validation split, by which trials are compared; "
            "prepare it with one (`dqrm data prepare ... split.validation=0.1`)"
        )


def run_sweep(folder: SweepFolder, timeout_seconds: float | None = None) -> SweepResult:
    """Run the trials that are left, then test the best one, if that has not been done.

    Every trial is a run of its own below the sweep's in MLflow. One that was cut off goes on with
    its values from its checkpoint.

    Args:
        folder: of the sweep.
        timeout_seconds: time after which no further trial begins.

    Raises:
        SweepError: none trained to its end.
        ValueError: another process works on the sweep, or the data do not fit.
    """
    check_data(folder.base)
    with folder.lock(), stop_on_signals() as stop:
        study = SweepStudy(folder)
        tracking = folder.base.tracking.model_copy(update={"system_metrics": False})
        tracker = start_tracker(
            tracking, run_name=folder.name, run_dir=folder.path, tags={SWEEP_TAG: folder.name}
        )
        status: Status = "FAILED"
        try:
            sweep = _Sweep(folder, study, tracker, lambda: stop.signal)
            sweep.describe()
            if tracker.run_id is None and not tracker.flush():
                log.warning(
                    "the store does not answer: until it does, runs stand beside the sweep's"
                )
            interrupted = sweep.run_trials(timeout_seconds)
            if interrupted is not None:
                status = "KILLED"
                return SweepResult(write_report(folder, study, tracker, None), interrupted)
            tested = sweep.test_best()
            report = write_report(folder, study, tracker, tested)
            status = "FINISHED"
            return SweepResult(report)
        finally:
            tracker.finish(status)


class _Sweep:
    def __init__(
        self,
        folder: SweepFolder,
        study: SweepStudy,
        tracker: Tracker,
        stopped: Callable[[], int | None],
    ) -> None:
        self.folder = folder
        self.study = study
        self.tracker = tracker
        self.stopped = stopped

    def describe(self) -> None:
        """Record what is searched."""
        settings = self.folder.settings
        fixed = self.folder.base.model_dump(mode="json", exclude={"name", "output", "tracking"})
        self.tracker.log_params(
            {
                **fixed,
                "sweep": {f"search.{key}": text for key, text in settings.search.items()}
                | {"seed": settings.seed, "pruner": settings.pruner},
            }
        )
        for name in ("sweep.yaml", "base.yaml"):
            self.tracker.log_artifact(self.folder.path / name)

    def run_trials(self, timeout_seconds: float | None) -> int | None:
        """Run what is left; return the number of the signal that ended it early."""
        began = time.monotonic()
        while self.stopped() is None:
            if timeout_seconds is not None and time.monotonic() - began >= timeout_seconds:
                log.info("no further trial begins: the time is over")
                return None
            trial = self.study.next()
            if trial is None:
                return None
            interrupted = self._run_trial(trial)
            if interrupted is not None:
                return interrupted
            keep_progress(self.folder, self.study)
            self._record(trial.number)
        return self.stopped()

    def test_best(self) -> TrainResult | None:
        """Test and pack the best trial; None when that was done before."""
        best = self.study.best
        if best is None:
            errors = [trial.user_attrs.get("error") for trial in self.study.trials]
            last = next((error for error in reversed(errors) if error), "all were pruned")
            raise SweepError(
                f"{self.folder.path}: none of {len(errors)} trials trained to its end; {last}"
            )
        run_dir = self.folder.trial(best.number)
        if (run_dir / "summary.json").is_file():
            return None
        log.info("trial %d is the best; it is now tested", best.number)
        return train(self._config(best), resume=run_dir)

    def _run_trial(self, trial: "Trial") -> int | None:
        """Train; return the number of the signal that interrupted it."""
        log.info("trial %d: %s", trial.number, " ".join(overrides(trial.params)))
        pruned = self.study.pruned_before(trial)

        def watch(validation: Validation) -> bool:
            value = self._value(validation.metrics)
            return not pruned and self.study.report(trial, validation.epoch, value)

        try:
            result = train(
                self._config(trial),
                resume=self._begun(trial.number),
                watch=watch,
                conclude=False,
            )
        except (TrainingError, ValueError) as error:
            log.error("trial %d failed: %s", trial.number, error)
            self.study.fail(trial, str(error))
            return None
        if result.interrupted is not None:
            return result.interrupted
        assert result.validation is not None, "the last step is followed by a validation"
        value = self._value(result.validation)
        self.study.finish(trial, value, result.best_step, result.stopped)
        log.info(
            "trial %d: %s, validation %s %.4f",
            trial.number,
            "pruned" if result.stopped else "finished",
            self.study.select.replace("auc", "AUC").replace("_", " "),
            value,
        )
        return None

    def _value(self, metrics: Metrics) -> float:
        return metrics.auc if self.study.select == "auc" else metrics.log_loss

    def _config(self, trial: "Trial | FrozenTrial") -> RunConfig:
        config = load(RunConfig, self.folder.path / "base.yaml", overrides(trial.params))
        path = self.folder.trial(trial.number)
        tags = {
            **config.tracking.tags,
            SWEEP_TAG: self.folder.name,
            f"{SWEEP_TAG}.trial": str(trial.number),
        }
        if self.tracker.run_id is not None:
            tags["mlflow.parentRunId"] = self.tracker.run_id
        return config.model_copy(
            update={
                "name": path.name,
                "output": path.parent,
                "tracking": config.tracking.model_copy(update={"tags": tags}),
            }
        )

    def _begun(self, number: int) -> Path | None:
        """Folder of a run that was cut off; None for one that has not begun."""
        path = self.folder.trial(number)
        if (path / "config.yaml").is_file():
            return path
        shutil.rmtree(path, ignore_errors=True)
        return None

    def _record(self, number: int) -> None:
        trial, best = self.study.trials[number], self.study.best
        name = f"val_{self.study.select}"
        metrics = {} if trial.value is None else {f"trial/{name}": trial.value}
        if best is not None and best.value is not None:
            metrics[f"best/{name}"] = best.value
            metrics["best/trial"] = float(best.number)
        self.tracker.log_metrics(metrics, step=number)
