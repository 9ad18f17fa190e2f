"""Runs the stages of a pipeline, each once for its settings and inputs.

A stage is complete when its folder holds a record whose digest is that of its settings, of what it
reads from outside, and of what the stages it takes as inputs made. So a killed pipeline goes on
where it was, a changed setting has its stage run again, and the stages behind it run again when
that came to another result: to other files, or other metrics that are no times.
"""

import logging
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dqrm.comparison.metrics import outcome
from dqrm.configuration import to_yaml
from dqrm.data.files import sync, write_text
from dqrm.launch import find_place
from dqrm.pipelines.config import PipelineConfig
from dqrm.pipelines.crew import Crew, follow
from dqrm.pipelines.digests import file_digest, folder_files, json_digest
from dqrm.pipelines.folders import CONFIG_FILE, PipelineFolder
from dqrm.pipelines.record import StageRecord, read_record, write_record
from dqrm.pipelines.stage import Interrupted, Stage, StageContext
from dqrm.tracking.base import NullTracker, Status, Tracker
from dqrm.tracking.config import TrackingConfig
from dqrm.tracking.tracker import recorded_run, start_tracker
from dqrm.training.errors import TrainingError
from dqrm.training.stop import stop_on_signals

log = logging.getLogger(__name__)

_TIMES = ("perf/", "latency/")
"""Of metrics that differ from one run of a stage to the next, and decide no other's result."""

Progress = Callable[[str, int, int, str], None]


@dataclass(frozen=True)
class StageResult:
    """A complete stage."""

    key: str
    folder: Path
    record: StageRecord
    ran: bool
    """False when it was complete before."""


@dataclass(frozen=True)
class PipelineResult:
    """What a pipeline came to."""

    folder: Path
    stages: list[StageResult]
    """Those that are complete, in order."""
    interrupted: int | None = None
    """Number of the signal that ended it."""


@dataclass(frozen=True)
class PlannedStage:
    """What a run would do with a stage."""

    key: str
    stage: Stage
    inputs: tuple[str, ...]
    action: Literal["complete", "run", "go on"]
    reason: str


def run_pipeline(
    config: PipelineConfig,
    *,
    start: str | None = None,
    progress: Progress = lambda phase, done, total, unit: None,
) -> PipelineResult:
    """Run every stage that is not complete.

    SIGINT and SIGTERM end the stage that runs as soon as it has saved what it can; the result then
    names the signal, and the same call, without ``start``, goes on.

    Of several processes (dqrm.launch) each calls this. The first runs the pipeline and returns its
    result; the others help with stages that train, and return no stages.

    Args:
        config: the resolved configuration.
        start: run this stage and those after it again though they are complete.
        progress: told how far a stage is.

    Raises:
        ValueError: a stage cannot work with its settings; the message names it.
        GateNotMet: a stage found that what was made is not good enough.
    """
    stages = by_key(config.stages)
    _check_start(start, stages)
    place = find_place()
    if place.rank > 0:
        with stop_on_signals() as stop:
            number = follow(place, lambda: stop.signal)
        return PipelineResult(config.folder, [], number)
    with (
        PipelineFolder(config.folder) as folder,
        stop_on_signals() as stop,
        Crew(place) as crew,
    ):
        write_text(folder.path / CONFIG_FILE, to_yaml(config))
        if start is not None:
            for key in list(stages)[list(stages).index(start) :]:
                folder.forget(key)
        tracker = start_tracker(
            config.tracking, run_name=config.folder.name, run_dir=folder.pipeline_run_dir
        )
        status: Status = "FAILED"
        done: dict[str, StageResult] = {}
        try:
            tracker.log_artifact(folder.path / CONFIG_FILE)
            for key, stage in stages.items():
                if stop.signal is not None:
                    raise Interrupted(stop.signal)
                step = _Step(folder, key, stage, done, stages, config.tracking)
                step.keep_references()
                done[key] = step.complete() or step.run(
                    config.tracking, tracker, crew, lambda: stop.signal, progress
                )
                tracker.log_metrics(_prefixed(key, done[key].record.metrics), step=len(done))
            status = "FINISHED"
            return PipelineResult(folder.path, list(done.values()))
        except Interrupted as interrupted:
            status = "KILLED"
            name = signal.Signals(interrupted.number).name
            without = "" if start is None else " without --from"
            log.info("stopped by %s; the same command%s goes on", name, without)
            return PipelineResult(folder.path, list(done.values()), interrupted.number)
        finally:
            tracker.finish(status)


def plan_pipeline(config: PipelineConfig, start: str | None = None) -> list[PlannedStage]:
    """Return what :func:`run_pipeline` would do, without writing anything."""
    stages = by_key(config.stages)
    _check_start(start, stages)
    folder = PipelineFolder(config.folder)
    done: dict[str, StageResult] = {}
    planned: list[PlannedStage] = []
    forced = False
    for key, stage in stages.items():
        forced = forced or key == start
        step_inputs = _inputs(key, stage, stages)
        waiting = [name for name in step_inputs if name not in done]
        action: Literal["complete", "run", "go on"] = "run"
        if forced:
            reason = f"asked for by --from {start}"
        elif waiting:
            reason = f"waits for {' and '.join(waiting)}"
        else:
            step = _Step(folder, key, stage, done, stages, config.tracking)
            result = step.complete()
            if result is not None:
                done[key] = result
                action, reason = "complete", f"took {result.record.seconds:.0f} s"
            elif folder.work(key, step.digest).is_dir():
                action, reason = "go on", "was cut off"
            elif folder.stage(key).is_dir():
                reason = "settings or inputs changed"
            else:
                reason = "never ran"
        planned.append(PlannedStage(key, stage, step_inputs, action, reason))
    return planned


def by_key(stages: Sequence[Stage]) -> dict[str, Stage]:
    """The stages by name, in order."""
    return {stage.key: stage for stage in stages}


class _Step:
    """One stage within a pipeline whose earlier stages are complete."""

    def __init__(
        self,
        folder: PipelineFolder,
        key: str,
        stage: Stage,
        done: dict[str, StageResult],
        stages: dict[str, Stage],
        tracking: TrackingConfig,
    ) -> None:
        self.folder = folder
        self.key = key
        self.stage = stage
        self.inputs = {name: done[name] for name in _inputs(key, stage, stages)}
        try:
            content = {
                "settings": stage.identity(),
                "sources": stage.sources(),
                "inputs": {name: r.record.output_digest for name, r in self.inputs.items()},
            }
            if stage.shows_times:
                content["times"] = {n: _times(r.record.metrics) for n, r in self.inputs.items()}
            self._own_digest = json_digest(content)
            kept = folder.references(key, self._own_digest)
            self.references = stage.references(tracking) if kept is None else kept
        except (OSError, ValueError) as error:
            raise _located(error, key) from error
        if self.references:
            content["references"] = self.references
        self.digest = json_digest(content)

    def keep_references(self) -> None:
        """Have the next attempt at this stage find the same references."""
        if self.references:
            self.folder.keep_references(self.key, self._own_digest, self.references)

    def complete(self) -> StageResult | None:
        """What the stage came to before, if its settings and inputs were the same."""
        record = read_record(self.folder.stage(self.key))
        if record is None or record.digest != self.digest:
            return None
        return StageResult(self.key, self.folder.stage(self.key), record, ran=False)

    def run(
        self,
        tracking: TrackingConfig,
        parent: Tracker,
        crew: Crew,
        stop: Callable[[], int | None],
        progress: Progress,
    ) -> StageResult:
        """Run the stage and publish its output."""
        if not self.folder.finished_unpublished(self.key, self.digest):
            log.info("stage %s", self.key)
            self._run(tracking, parent, crew, stop, progress)
        self.folder.publish(self.key, self.digest)
        folder = self.folder.stage(self.key)
        record = read_record(folder)
        if record is None:
            raise RuntimeError(f"{folder}: its files changed while it was being completed")
        return StageResult(self.key, folder, record, ran=True)

    def _run(
        self,
        tracking: TrackingConfig,
        parent: Tracker,
        crew: Crew,
        stop: Callable[[], int | None],
        progress: Progress,
    ) -> None:
        output, scratch = self.folder.prepare(self.key, self.digest)
        run_dir = self.folder.run_dir(self.key, self.digest)
        nested = tracking.model_copy(update={"tags": {**tracking.tags, **self._tags(parent)}})
        tracker: Tracker = NullTracker()
        if not self.stage.records_itself:
            name = f"{self.folder.path.name}/{self.key}"
            tracker = start_tracker(nested, run_name=name, run_dir=run_dir)
        status: Status = "FAILED"
        began = time.monotonic() - self.folder.seconds_spent(self.key, self.digest)
        try:
            tracker.log_params(self.stage.model_dump(mode="json"))
            context = StageContext(
                inputs={name: result.folder for name, result in self.inputs.items()},
                metrics={name: r.record.metrics for name, r in self.inputs.items()},
                digest=self.digest,
                references=self.references,
                output=output,
                scratch=scratch,
                run_dir=run_dir,
                tracker=tracker,
                tracking=nested,
                stop=stop,
                progress=lambda phase, done, total, unit: progress(
                    f"{self.key}: {phase}", done, total, unit
                ),
            )
            if self.stage.trains_together:
                crew.call(self.stage, context)
                metrics = self.stage.run(context)
            else:
                with crew.resting():
                    metrics = self.stage.run(context)
            seconds = time.monotonic() - began
            tracker.log_metrics(metrics, step=0)
            told = [f"{self.stage.stage} of {self.folder.path.name}", outcome(metrics)]
            tracker.describe(": ".join(part for part in told if part))
            status = "FINISHED"
        except Interrupted:
            status = "KILLED"
            self.folder.keep_seconds(self.key, self.digest, time.monotonic() - began)
            raise
        except (OSError, ValueError, TrainingError) as error:
            raise _located(error, self.key) from error
        finally:
            tracker.finish(status)
        recorded = recorded_run(run_dir)
        self._record(output, metrics, seconds, recorded.run_id if recorded else None)

    def _tags(self, parent: Tracker) -> dict[str, str]:
        tags = {"pipeline": self.folder.path.name, "stage": self.key}
        # Unknown while the store is away; the tags above still tell.
        return tags | ({"mlflow.parentRunId": parent.run_id} if parent.run_id else {})

    def _record(
        self, output: Path, metrics: dict[str, float], seconds: float, run_id: str | None
    ) -> None:
        files = folder_files(output)
        for path in (*output.rglob("*"), output):
            sync(path)
        names = {str(path.relative_to(output)): path for path in files}
        digests = {name: file_digest(path) for name, path in names.items()}
        times = _times(metrics)
        timeless = {key: value for key, value in metrics.items() if key not in times}
        write_record(
            output,
            StageRecord(
                stage=self.stage.stage,
                digest=self.digest,
                output_digest=json_digest([digests, timeless]),
                sizes={name: path.stat().st_size for name, path in names.items()},
                metrics=metrics,
                seconds=seconds,
                run_id=run_id,
            ),
        )


def _times(metrics: dict[str, float]) -> dict[str, float]:
    return {key: value for key, value in metrics.items() if key.startswith(_TIMES)}


def _inputs(key: str, stage: Stage, stages: dict[str, Stage]) -> tuple[str, ...]:
    names = list(stages)
    earlier = {name: stages[name] for name in names[: names.index(key)]}
    try:
        return stage.inputs(earlier)
    except ValueError as error:
        raise _located(error, key) from error


def _check_start(start: str | None, stages: dict[str, Stage]) -> None:
    if start is not None and start not in stages:
        raise ValueError(f"there is no stage {start}; there are: {', '.join(stages)}")


def _located(error: OSError | ValueError | TrainingError, key: str) -> Exception:
    """The same error, its message beginning with the stage."""
    if isinstance(error, TrainingError):
        return TrainingError(f"stage {key}: {error}")
    if isinstance(error, ValueError):
        return ValueError(f"stage {key}: {error}")
    if error.errno is None:
        return OSError(f"stage {key}: {error}")
    return OSError(error.errno, f"{error.strerror} (stage {key})", error.filename)


def _prefixed(key: str, metrics: dict[str, float]) -> dict[str, float]:
    return {f"{key}/{name}": value for name, value in metrics.items()}
