"""Runs a study: trains what is missing, reads what is complete, chooses the tuned rival."""

import logging
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from dqrm.data.dataset import PreparedDataset
from dqrm.study.arms import TUNED, Arm
from dqrm.study.kinds import follow_up, shown
from dqrm.study.outcome import Outcome, conclude, quantize_afterwards, read_outcome
from dqrm.study.plan import Case, Plan, add_arm
from dqrm.study.running import Crew, Ended, StudyError, why_failed
from dqrm.study.trials import Trial
from dqrm.tracking.config import TrackingConfig
from dqrm.tracking.tracker import Tracker, start_tracker
from dqrm.training.stop import stop_on_signals

log = logging.getLogger(__name__)

Progress = Callable[[str, int, int, str], None]


@dataclass
class Answered:
    """A case and what its trials came to."""

    case: Case
    arms: list[Arm]
    """With a line of their own, the tuned rival among them."""
    outcomes: dict[str, list[Outcome]] = field(default_factory=dict)
    """By key of the arm, in the order of the seeds; of failed trials there are none."""
    chosen: Arm | None = None
    """The candidate that stands for the tuned rival."""


@dataclass
class Study:
    """What a study came to."""

    plan: Plan
    answered: list[Answered]
    failed: dict[str, str]
    """Why trials failed, by name."""
    interrupted: int | None = None
    """The signal that ended it before all was complete."""

    @property
    def complete(self) -> bool:
        """Whether every trial has an outcome."""
        return self.interrupted is None and not self.failed


class Conductor:
    """Takes a plan to its end.

    Args:
        plan: of the study.
        jobs: trials at a time.
        threads: of each.
        tracking: where the study and its trials are recorded.
        progress: told how many trials are complete.
    """

    def __init__(
        self, plan: Plan, jobs: int, threads: int, tracking: TrackingConfig, progress: Progress
    ) -> None:
        self._plan = plan
        self._crew = Crew(jobs, threads)
        self._tracking = tracking
        self._progress = progress
        self._outcomes: dict[str, Outcome] = {}
        self._failed: dict[str, str] = {}

    def run(self, conclude: Callable[[Study, Tracker], None] | None = None) -> Study:
        """Run what is not complete; SIGINT and SIGTERM save what is being trained and end it.

        Args:
            conclude: what is done with the outcome while the study's MLflow run is open.

        Raises:
            StudyError: no trial that was started came to an end.
        """
        plan = self._plan
        folder = plan.folder / "tracking"
        tracker = start_tracker(self._tracking, run_name=plan.folder.name, run_dir=folder)
        status: Literal["FINISHED", "FAILED", "KILLED"] = "FAILED"
        try:
            tracker.set_tags({"study": plan.kind})
            tracker.log_params({"study": plan.kind, "seeds": list(plan.seeds)})
            # Runs are put below this one, so its id must be known, however slow the store is.
            tracker.flush()
            with stop_on_signals() as stop:
                self._complete(plan.trials, tracker.run_id, lambda: stop.signal)
                answered = [self._answer(case) for case in plan.cases]
                if stop.signal is None:
                    later = [trial for of_case in answered for trial in self._follow(of_case)]
                    self._complete(later, tracker.run_id, lambda: stop.signal)
                for of_case in answered:
                    self._read(of_case)
            study = Study(plan, answered, self._failed, stop.signal)
            if conclude is not None:
                conclude(study, tracker)
            status = "FINISHED" if stop.signal is None else "KILLED"
            return study
        finally:
            tracker.finish(status)

    def _complete(
        self, trials: Sequence[Trial], parent: str | None, stop: Callable[[], int | None]
    ) -> None:
        """Train, then quantize what is only quantized."""
        total = len(self._outcomes) + len(self._failed) + len(trials)
        missing = []
        for trial in trials:
            if trial.state == "complete":
                self._outcomes[trial.name] = read_outcome(trial)
            elif trial.source is None:
                missing.append(self._recorded(trial, parent))
        self._show(total)

        def ended(one: Ended) -> bool:
            if one.code == 0:
                self._outcomes[one.trial.name] = conclude(one.trial, self._dataset(one.trial))
            elif stop() is None:
                reason = why_failed(one.trial)
                self._failed[one.trial.name] = reason
                log.warning("%s failed: %s", one.trial.name, reason)
            self._show(total)
            # What fails before anything succeeded fails everywhere.
            return bool(self._outcomes) or stop() is not None

        self._crew.train(missing, ended, stop)
        if self._failed and not self._outcomes:
            name, reason = next(iter(self._failed.items()))
            log_file = self._plan.output / "trials" / name / "log.txt"
            raise StudyError(f"{name}: {reason} (its log: {log_file})")
        for trial in trials:
            source = None if trial.source is None else self._outcomes.get(trial.source.name)
            if source is not None and trial.name not in self._outcomes and stop() is None:
                dataset = self._dataset(trial)
                self._outcomes[trial.name] = quantize_afterwards(trial, source, dataset)
                self._show(total)

    def _show(self, total: int) -> None:
        self._progress("runs", len(self._outcomes) + len(self._failed), total, "runs")

    def _recorded(self, trial: Trial, parent: str | None) -> Trial:
        """Return the trial with tags that put its run below the study's."""
        tags = {
            **self._tracking.tags,
            "study": self._plan.kind,
            "arm": trial.arm.key,
            "seed": str(trial.seed),
            "dqrm.arm": trial.arm.title,
        }
        if parent is not None:
            tags["mlflow.parentRunId"] = parent
        tracking = self._tracking.model_copy(update={"tags": tags})
        config = trial.config.model_copy(update={"tracking": tracking})
        return replace(trial, config=config)

    def _dataset(self, trial: Trial) -> PreparedDataset:
        path = trial.config.data.path
        return next(c.dataset for c in self._plan.cases if c.base.data.path == path)

    def _answer(self, case: Case) -> Answered:
        answered = Answered(case, shown(case.question.arms))
        of_arm = {arm.key: self._of(case.trials[arm.key]) for arm in case.question.arms}
        select = case.base.train.select
        ranked = sorted(
            (
                (_mean(of_arm[arm.key], select), arm)
                for arm in case.question.arms
                if arm.candidate and len(of_arm[arm.key]) == len(self._plan.seeds)
            ),
            key=lambda pair: -pair[0] if select == "auc" else pair[0],
        )
        if ranked:
            answered.chosen = ranked[0][1]
        return answered

    def _follow(self, answered: Answered) -> list[Trial]:
        arm = None if answered.chosen is None else follow_up(answered.chosen)
        if arm is None:
            return []
        answered.arms.append(arm)
        return add_arm(self._plan, answered.case, arm)

    def _read(self, answered: Answered) -> None:
        for arm in answered.arms:
            answered.outcomes[arm.key] = self._of(answered.case.trials[arm.key])
        if answered.chosen is not None:
            what = answered.chosen.title.removeprefix("FP32").lstrip(", ") or "as it is"
            answered.arms.insert(1, Arm(TUNED, f"tuned FP32 ({what})"))
            answered.outcomes[TUNED] = self._of(answered.case.trials[answered.chosen.key])

    def _of(self, trials: Sequence[Trial]) -> list[Outcome]:
        return [self._outcomes[t.name] for t in trials if t.name in self._outcomes]


def _mean(outcomes: Sequence[Outcome], metric: str) -> float:
    return statistics.fmean(outcome.validation[metric] for outcome in outcomes)
