"""What a trial came to, read from the run it left behind."""

import itertools
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dqrm.data.dataset import PreparedDataset
from dqrm.data.files import write_json
from dqrm.study.trials import USAGE, Trial
from dqrm.training.build import build_model, sizes_of
from dqrm.training.checkpoint import list_checkpoints, prune_checkpoints, read_checkpoint
from dqrm.training.evaluate import evaluate


@dataclass(frozen=True)
class Point:
    """A validation during training."""

    step: int
    epoch: float
    seconds: float
    """Of training steps, on the clock."""
    cpu_seconds: float
    """Of training steps, by the process."""
    auc: float
    log_loss: float


@dataclass(frozen=True)
class Outcome:
    """What one run came to."""

    arm: str
    seed: int
    test: dict[str, float]
    """Metrics of the selected model, measured once."""
    validation: dict[str, float]
    """Of the same model; empty without a validation split."""
    best_step: int
    steps: int
    curve: tuple[Point, ...]
    """Empty where nothing was trained."""
    fp32_bytes: int
    packed_bytes: int
    training_bytes: int
    """By arithmetic: weights, optimizer state and maxima."""
    cpu_step_seconds: float | None
    """CPU seconds of a training step, mean over the run."""
    peak_bytes: int | None
    """Most memory the process had, data and libraries included."""
    sent_bytes: float | None
    """A step and rank; None in a single process."""
    ratio: float | None
    """Bytes of the same exchange in FP32 over these."""


def read_outcome(trial: Trial) -> Outcome:
    """Return the outcome of a complete trial."""
    try:
        fields: dict[str, Any] = json.loads(trial.outcome_file.read_text(encoding="utf-8"))
        fields["curve"] = tuple(Point(**point) for point in fields["curve"])
        return Outcome(**fields)
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(
            f"{trial.outcome_file}: damaged ({error}); delete {trial.folder} and {trial.run_dir}"
        ) from error


def write_outcome(trial: Trial, outcome: Outcome) -> None:
    """Complete the trial."""
    write_json(trial.outcome_file, asdict(outcome))


def conclude(trial: Trial, dataset: PreparedDataset) -> Outcome:
    """Read a finished run, complete its trial, and keep only its selected and last checkpoint.

    Raises:
        ValueError: the run has no summary, or no test split.
    """
    run = trial.run_dir
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    checkpoints = run / "checkpoints"
    state = read_checkpoint(list_checkpoints(checkpoints)[-1]).state
    batches = dataset.split("train").num_batches(trial.config.data.batch_size)
    best = state.best_validation()
    sent = [entry for entry in state.history if "comm/ratio" in entry]
    measures = sent and trial.arm.module == "dqrm"
    outcome = Outcome(
        arm=trial.arm.key,
        seed=trial.seed,
        test=summary["test"],
        validation={} if best is None else best.as_dict(),
        best_step=summary["best_step"],
        steps=summary["steps"],
        curve=_curve(state.history, batches),
        fp32_bytes=summary["fp32_bytes"],
        packed_bytes=summary["packed_bytes"],
        training_bytes=sizes_of(trial.config, dataset).training_bytes,
        cpu_step_seconds=state.train_cpu_seconds / state.step,
        peak_bytes=_peak_bytes(trial),
        sent_bytes=sent[-1]["comm/sent_bytes_per_step"] if measures else None,
        ratio=sent[-1]["comm/ratio"] if measures else None,
    )
    write_outcome(trial, outcome)
    # A study has many runs; the selected checkpoint is all that is needed again.
    prune_checkpoints(checkpoints, 1, outcome.best_step)
    for unfinished in checkpoints.glob(".step-*"):
        shutil.rmtree(unfinished)
    return outcome


def quantize_afterwards(trial: Trial, source: Outcome, dataset: PreparedDataset) -> Outcome:
    """Put the model another trial selected on this trial's grid, measure it, complete the trial."""
    assert trial.source is not None
    model = build_model(trial.config, dataset)
    path = trial.source.run_dir / "checkpoints" / f"step-{source.best_step:08d}"
    read_checkpoint(path).load_model(model)
    sizes = sizes_of(trial.config, dataset)
    batch_size = trial.config.train.eval_batch_size
    measured = {
        split: evaluate(model, dataset.split(split), batch_size).as_dict()
        for split in ("validation", "test")
        if split in dataset.manifest.splits
    }
    outcome = Outcome(
        arm=trial.arm.key,
        seed=trial.seed,
        test=measured["test"],
        validation=measured.get("validation", {}),
        best_step=source.best_step,
        steps=source.steps,
        curve=(),
        fp32_bytes=sizes.fp32_bytes,
        packed_bytes=sizes.packed_bytes,
        training_bytes=source.training_bytes,
        cpu_step_seconds=None,
        peak_bytes=None,
        sent_bytes=None,
        ratio=None,
    )
    trial.folder.mkdir(parents=True, exist_ok=True)
    write_outcome(trial, outcome)
    return outcome


def _peak_bytes(trial: Trial) -> int | None:
    try:
        usage = json.loads((trial.folder / USAGE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        # The run outlived the study that would have counted.
        return None
    return int(usage["peak_bytes"])


def _curve(history: Sequence[dict[str, float]], batches: int) -> tuple[Point, ...]:
    """Validations with the seconds that training had taken.

    Seconds are known at logged losses; between two of them steps count as equally long. A run ends
    with a logged loss.
    """
    marks = [(0.0, 0.0, 0.0)]
    for entry in history:
        if "perf/step_seconds" in entry:
            step, seconds, cpu = marks[-1]
            more = entry["step"] - step
            marks.append(
                (
                    entry["step"],
                    seconds + more * entry["perf/step_seconds"],
                    cpu + more * entry["perf/cpu_step_seconds"],
                )
            )
    return tuple(
        Point(
            step=int(entry["step"]),
            epoch=entry["step"] / batches,
            seconds=_between(marks, entry["step"], 1),
            cpu_seconds=_between(marks, entry["step"], 2),
            auc=entry["val/auc"],
            log_loss=entry["val/log_loss"],
        )
        for entry in history
        if "val/auc" in entry
    )


def _between(marks: Sequence[tuple[float, float, float]], step: float, column: int) -> float:
    for before, after in itertools.pairwise(marks):
        if step <= after[0]:
            share = (step - before[0]) / (after[0] - before[0])
            return before[column] + share * (after[column] - before[column])
    return marks[-1][column]
