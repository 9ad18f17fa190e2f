"""Runs the pipelines of the study, and reads what their complete stages measured."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from dqrm.configuration import ConfigError
from dqrm.pipelines.config import PipelineConfig
from dqrm.pipelines.folders import PipelineFolder
from dqrm.pipelines.record import StageRecord, read_record
from dqrm.pipelines.runner import Progress, plan_pipeline, run_pipeline
from dqrm.pipelines.stage import MODEL_FOLDER, Stage
from dqrm.pipelines.study.merge import BASELINE, Arm, StudySettings, merged_pipeline
from dqrm.pipelines.study.tasks import TASKS

BASELINE_LABEL = "B"

State = Literal["complete", "go on", "run"]

_TEST = "test/"
_LATENCY = re.compile(r"latency/(.+)/(lowered_ms|times_\w+)")


@dataclass(frozen=True)
class Trial:
    """The pipeline of a task and a seed."""

    task: str
    seed: int
    config: PipelineConfig
    arms: list[Arm]


@dataclass(frozen=True)
class Measured:
    """What one arm, or the baseline, came to with a task and a seed."""

    arm: str
    """Its label."""
    task: str
    seed: int
    quality: dict[str, float]
    """Metrics of the test rows: of an arm, as it is shipped."""
    before_packing: dict[str, float]
    """The same of the model that was packed."""
    encoder_bytes: int
    """On the disk, of the transformer's layers."""
    seconds: float
    """That its stage took, without those before it; since it was last killed, if it was."""
    latency: dict[str, dict[str, float]]
    """By batch and threads: lowered_ms of the packed model, and how many times faster than the
    baseline in FP32 and bf16 it is (times_fp32, times_bf16)."""

    @property
    def metric(self) -> float:
        """The one of the task."""
        return self.quality[TASKS[self.task].metric]


def trials(settings: StudySettings) -> list[Trial]:
    """The pipelines, task by task.

    Raises:
        FileNotFoundError: a file of a task is not there.
        ValueError: recipes begin with different models, or bits cannot go down in so few steps.
    """
    return [
        Trial(task, seed, *merged_pipeline(settings, task, seed))
        for task in settings.tasks
        for seed in settings.seeds
    ]


def check_trials(planned: list[Trial]) -> None:
    """Look for what would keep a stage from running, once for each task.

    Raises:
        ConfigError: naming task, stage and field of every fault of the first stage that has some.
    """
    for trial in {trial.task: trial for trial in reversed(planned)}.values():
        earlier: dict[str, Stage] = {}
        for stage in trial.config.stages:
            faults = [
                f"{TASKS[trial.task].title}, {stage.key}.{problem.field}: {problem.message}"
                for problem in stage.problems(dict(earlier))
            ]
            if faults:
                raise ConfigError("\n".join(faults))
            earlier[stage.key] = stage


def run_trials(planned: list[Trial], progress: Progress) -> int | None:
    """Run every stage that is not complete, pipeline by pipeline.

    Args:
        planned: what to run, in order.
        progress: told how far a stage is.

    Returns:
        The number of the signal that ended it; None where all is complete.
    """
    for trial in planned:
        result = run_pipeline(trial.config, progress=_named(progress, trial))
        if result.interrupted is not None:
            return result.interrupted
    return None


def _named(progress: Progress, trial: Trial) -> Progress:
    def show(phase: str, done: int, total: int, unit: str) -> None:
        progress(f"{trial.task} seed {trial.seed}, {phase}", done, total, unit)

    return show


def states(trial: Trial) -> dict[str, State]:
    """How far the baseline and each arm are, by label."""
    actions: dict[str, State] = {step.key: step.action for step in plan_pipeline(trial.config)}
    found: dict[str, State] = {BASELINE_LABEL: actions[BASELINE]}
    for arm in trial.arms:
        trained = actions[arm.key]
        if trained == "complete" and actions[arm.lowered] != "complete":
            trained = "go on"
        found[arm.label] = trained
    return found


def measured(trial: Trial) -> Iterator[Measured]:
    """What is complete: the baseline, then the arms."""
    from dqrm.compress.lower.folder import encoder_bytes

    done = states(trial)
    folder = PipelineFolder(trial.config.folder)
    if done[BASELINE_LABEL] == "complete":
        record = _record(folder, BASELINE)
        quality = _test_metrics(record.metrics)
        size = encoder_bytes(folder.stage(BASELINE) / MODEL_FOLDER)
        yield Measured(
            *(BASELINE_LABEL, trial.task, trial.seed, quality, quality, size, record.seconds, {})
        )
    for arm in trial.arms:
        if done[arm.label] != "complete":
            continue
        trained, lowered = _record(folder, arm.key), _record(folder, arm.lowered)
        yield Measured(
            arm=arm.label,
            task=trial.task,
            seed=trial.seed,
            quality=_test_metrics(lowered.metrics),
            before_packing=_test_metrics(trained.metrics),
            encoder_bytes=int(lowered.metrics["size/encoder_bytes"]),
            seconds=trained.seconds,
            latency=_latency(lowered.metrics),
        )


def _record(folder: PipelineFolder, key: str) -> StageRecord:
    record = read_record(folder.stage(key))
    if record is None:
        raise OSError(f"{folder.stage(key)}: its files changed while they were read")
    return record


def _test_metrics(metrics: Mapping[str, float]) -> dict[str, float]:
    return {
        name.removeprefix(_TEST): value for name, value in metrics.items() if name.startswith(_TEST)
    }


def _latency(metrics: Mapping[str, float]) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    for name, value in metrics.items():
        match = _LATENCY.fullmatch(name)
        if match is not None:
            found.setdefault(match[1], {})[match[2]] = value
    return found
