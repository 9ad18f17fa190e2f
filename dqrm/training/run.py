"""A whole training run: set-up, the loop, the one test, and what the run leaves behind.

<output>/<name>/
    config.yaml             the resolved configuration
    checkpoints/            see dqrm.training.checkpoint
    artifact/               the packed model, ready to serve
    plots/                  curves and calibration
    measurements.json       calibration and tables, for comparing runs
    summary.json            the result; its presence means the run is complete
"""

import logging
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pandas as pd
import torch
from torch import Tensor

from dqrm.config import RunConfig
from dqrm.data.dataset import PreparedDataset
from dqrm.data.encode import RowEncoder
from dqrm.data.files import save_figure, write_json
from dqrm.models.sizes import ModelSizes
from dqrm.runtime import prepare_threads
from dqrm.serving.artifact import save_artifact
from dqrm.serving.predictor import ARTIFACT_FILE
from dqrm.tracking.measurements import (
    MEASUREMENTS_FILE,
    TableMeasurement,
    calibration_of,
    write_measurements,
)
from dqrm.tracking.plots import plot_calibration, plot_curves
from dqrm.tracking.tracker import DatasetRecord, NullTracker, Tracker, start_tracker
from dqrm.training.checkpoint import Checkpoint
from dqrm.training.evaluate import predict
from dqrm.training.ipex import check_ipex
from dqrm.training.loop import Trainer, Watch
from dqrm.training.metrics import Metrics, measure
from dqrm.training.setup import Run, set_up
from dqrm.training.sharded_optimizer import ShardedOptimizer
from dqrm.training.stop import stop_on_signals
from dqrm.training.table_errors import measured_tables
from dqrm.training.world import World, join_world

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainResult:
    """What a run came to."""

    run_dir: Path
    best_step: int
    """Step of the selected model; the last step where there is no validation split."""
    validation: Metrics | None
    """Of the selected model."""
    test: Metrics | None
    """Of the selected model, measured once; None without a test split or when interrupted."""
    fp32_bytes: int
    packed_bytes: int
    samples_per_second: float
    run_id: str | None
    tracking_uri: str | None
    interrupted: int | None = None
    """Number of the signal that stopped the run after a checkpoint."""
    stopped: bool = False
    """Whether ``watch`` ended training."""


def train(
    config: RunConfig,
    *,
    resume: Path | Literal["auto"] | None = None,
    recipe: str | None = None,
    watch: Watch | None = None,
    conclude: bool = True,
) -> TrainResult:
    """Train, select on validation, test once, and pack the model.

    SIGINT and SIGTERM end the run after the step in progress with a checkpoint; the result
    then names the signal.

    Args:
        config: the resolved configuration.
        resume: a run's folder, a checkpoint, or "auto" for the newest unfinished run of the
            same configuration, or a new run where there is none.
        recipe: names the run when ``config.name`` does not.
        watch: told of every validation, and may end training; such a run is complete.
        conclude: False leaves the test and the packing to a later call that resumes the run.

    Raises:
        ValueError: configuration, data and checkpoint do not fit together.
        TrainingError: the loss is no longer finite.

    In a world of several processes (dqrm.launch) every rank calls this with the same arguments;
    rank 0 writes, tests and returns the test's metrics.
    """
    check_ipex(config)
    threads = prepare_threads(config.train.threads)
    log.info("computing with %d threads: %s", threads.count, threads.reason)
    tracker: Tracker = NullTracker()
    status: Literal["FINISHED", "FAILED", "KILLED"] = "FAILED"
    try:
        with join_world(config.exchange) as world:
            run = set_up(config, resume, recipe, world)
            if world.is_main:
                tracker = _start_tracker(run, world)
            with stop_on_signals() as stop:
                trainer = Trainer(
                    run.config,
                    run.dataset,
                    run.model,
                    run.optimizer,
                    run.state,
                    tracker,
                    run.run_dir / "checkpoints",
                    lambda: stop.signal is not None,
                    run.exchange,
                    world,
                    watch,
                )
                trainer.fit()
            predictions = None
            if isinstance(run.optimizer, ShardedOptimizer) and trainer.finished and conclude:
                # All take part: no rank has the whole model.
                world.wait_for_all()
                predictions = _predict_test(trainer, run, world)
            if run.exchange is not None:
                run.exchange.close()
        # What follows is rank 0's alone; the others have left.
        if trainer.consensus.granted.stop and not trainer.finished:
            status = "KILLED"
            number = stop.signal or signal.SIGTERM
            name = signal.Signals(number).name
            log.info("stopped by %s after step %d; resume with --resume", name, run.state.step)
            tracker.describe(_stopped(name, run))
            return _result(run, None, tracker, interrupted=number)
        if trainer.stopped:
            tracker.set_tags({"dqrm.stopped": f"after a validation, at step {run.state.step}"})
        test = None
        if world.is_main and conclude:
            test = _conclude(trainer, run, predictions or _predict_test(trainer, run, World()))
        status = "FINISHED"
        return _result(run, test, tracker, stopped=trainer.stopped)
    finally:
        tracker.finish(status)


def _start_tracker(run: Run, world: World) -> Tracker:
    # A resumed run goes on as the MLflow run its folder was recorded in.
    tracker = start_tracker(run.config.tracking, run_name=run.run_dir.name, run_dir=run.run_dir)
    if not run.resumed:
        _describe_run(tracker, run, world)
    return tracker


def _describe_run(tracker: Tracker, run: Run, world: World) -> None:
    """Record what is known before the first step."""
    config, dataset, sizes = run.config, run.dataset, run.sizes
    params = config.model_dump(mode="json", exclude={"name", "output", "tracking"})
    # Where MLflow compares runs, these are axes and groups.
    facts = {
        "bits": config.quant.bits,
        "seed": config.train.seed,
        "world_size": world.size,
        "steps_per_epoch": _steps_per_epoch(run),
    }
    tracker.log_params({**params, **facts})
    tracker.describe(f"{_recipe(config)}, seed {config.train.seed}.")
    tracker.log_artifact(run.run_dir / "config.yaml")
    manifest = dataset.manifest
    for split, info in manifest.splits.items():
        tracker.log_dataset(
            DatasetRecord(
                name=f"{Path(config.data.path).name}/{split}",
                source=str(dataset.path),
                digest=manifest.digest,
                context={"train": "training"}.get(split, split),
                sample=_sample(dataset, split),
                profile={"num_rows": info.num_rows, "positives": info.positives},
            )
        )
    tracker.log_metrics(
        {
            # First, as MLflow's page begins a comparison with the first metric of a run.
            "size/packed_bytes": sizes.packed_bytes,
            "size/fp32_bytes": sizes.fp32_bytes,
            "size/training_bytes": sizes.training_bytes,
        },
        step=0,
    )


def _sample(dataset: PreparedDataset, split: str) -> pd.DataFrame:
    """Return the first rows of a split as prepared; lists of ids are left out."""
    rows = dataset.split(split).rows(0, 5)
    schema = dataset.schema
    columns = {schema.label: rows.label}
    columns |= {column.name: rows.dense[n] for n, column in enumerate(schema.dense)}
    columns |= {column.name: rows.one_hot[n] for n, column in enumerate(schema.one_hot)}
    return pd.DataFrame(columns)


def _input_example(dataset: PreparedDataset) -> pd.DataFrame:
    """Return a row in the form raw data has: numbers, text, lists of text.

    It gives the logged model its signature. Values are blanks, because prepared data holds ids
    and no longer what they stood for.
    """
    schema = dataset.schema
    row: dict[str, list[object]] = {column.name: [0.0] for column in schema.dense}
    for column in schema.categorical:
        row[column.name] = [[""]] if column.multi_hot else [""]
    return pd.DataFrame(row)


def _predict_test(trainer: Trainer, run: Run, world: World) -> tuple[Tensor, Tensor] | None:
    """Select, and return logits and labels of the test split, if there is one."""
    _best(trainer, run).load_model(trainer.model)
    if "test" not in run.dataset.manifest.splits:
        return None
    split = run.dataset.split("test")
    return predict(trainer.model, split, trainer.config.train.eval_batch_size, world)


def _best(trainer: Trainer, run: Run) -> Checkpoint:
    state = trainer.state
    path = run.run_dir / "checkpoints" / f"step-{state.best_step or state.step:08d}"
    return Checkpoint(path, trainer.config, state)


def _conclude(
    trainer: Trainer, run: Run, predictions: tuple[Tensor, Tensor] | None
) -> Metrics | None:
    """Measure the test once, pack, plot and record; return the test's metrics."""
    dataset, sizes, run_dir = run.dataset, run.sizes, run.run_dir
    config, state, tracker = trainer.config, trainer.state, trainer.tracker
    best = _best(trainer, run)
    plots = run_dir / "plots"
    plots.mkdir(exist_ok=True)
    test, calibration = None, []
    if predictions is not None:
        logits, labels = predictions
        test = measure(logits, labels)
        tracker.log_metrics(test.as_dict("test/"), state.step)
        predicted = torch.sigmoid(logits).numpy()
        calibration = calibration_of(predicted, labels.numpy())
        figure = plot_calibration(predicted, labels.numpy())
        save_figure(figure, plots / "calibration.png")
    save_figure(plot_curves(state.history), plots / "curves.png")
    encoder = RowEncoder.from_dataset(dataset.path)
    artifact = run_dir / "artifact"
    tables: list[TableMeasurement] = []
    packed_bytes = save_artifact(
        artifact / ARTIFACT_FILE,
        trainer.model,
        config.model,
        encoder,
        state.features_digest,
        tables=measured_tables(best.tables(trainer.model), tables),
    )
    assert packed_bytes == sizes.packed_bytes, (packed_bytes, sizes.packed_bytes)
    summary = {
        "best_step": state.best_step or state.step,
        "steps": state.step,
        "test": None if test is None else test.as_dict(),
        "fp32_bytes": sizes.fp32_bytes,
        "packed_bytes": packed_bytes,
        "training_bytes": sizes.training_bytes,
        "world_size": trainer.world.size,
        "samples_per_second": state.samples / state.train_seconds,
        "dataset_digest": state.dataset_digest,
        "run_id": tracker.run_id,
    }
    write_measurements(run_dir / MEASUREMENTS_FILE, _steps_per_epoch(run), calibration, tables)
    write_json(run_dir / "summary.json", summary)
    for path in sorted(plots.iterdir()):
        tracker.log_artifact(path, "plots")
    tracker.log_artifact(run_dir / MEASUREMENTS_FILE)
    tracker.log_artifact(run_dir / "summary.json")
    if config.tracking.checkpoint:
        tracker.log_artifact(best.path, "checkpoints")
    tracker.describe(_outcome(test, sizes, config))
    tracker.log_model(artifact, _input_example(dataset), config.tracking.register_as)
    return test


def _outcome(test: Metrics | None, sizes: ModelSizes, config: RunConfig) -> str:
    """Two lines for a person who scans the list of runs."""
    quality = (
        "no test split"
        if test is None
        else f"test AUC {test.auc:.4f}, log loss {test.log_loss:.4f}"
    )
    size = f"{sizes.packed_bytes:,} bytes packed"
    if sizes.packed_bytes < sizes.fp32_bytes:
        size += f", {sizes.fp32_bytes / sizes.packed_bytes:.1f} times smaller than FP32"
    return f"{_recipe(config)}: {quality}.\n{size}."


def _stopped(signal_name: str, run: Run) -> str:
    """The same of a run that a signal ended."""
    state, best = run.state, run.state.best_validation()
    quality = f"; best validation AUC so far {best.auc:.4f}" if best else ""
    return f"{_recipe(run.config)}: stopped by {signal_name} after step {state.step}{quality}."


def _recipe(config: RunConfig) -> str:
    bits = "FP32" if config.quant.bits == 32 else f"INT{config.quant.bits}"
    return f"{bits} {config.optim.name} on {config.data.path}"


def _steps_per_epoch(run: Run) -> int:
    return run.dataset.split("train").num_batches(run.config.data.batch_size)


def _result(
    run: Run,
    test: Metrics | None,
    tracker: Tracker,
    interrupted: int | None = None,
    stopped: bool = False,
) -> TrainResult:
    state = run.state
    return TrainResult(
        run_dir=run.run_dir,
        best_step=state.best_step or state.step,
        validation=state.best_validation(),
        test=test,
        fp32_bytes=run.sizes.fp32_bytes,
        packed_bytes=run.sizes.packed_bytes,
        samples_per_second=state.samples / state.train_seconds if state.train_seconds else 0.0,
        run_id=tracker.run_id,
        tracking_uri=tracker.uri,
        interrupted=interrupted,
        stopped=stopped,
    )
