"""The training loop: one batch from disk to update, and what happens between batches."""

import logging
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor
from tqdm import tqdm

from dqrm.config import RunConfig
from dqrm.data.dataset import PreparedDataset
from dqrm.data.order import RowOrder
from dqrm.models.dlrm import DLRM
from dqrm.models.sharded import ShardedEmbeddingBags
from dqrm.tracking.tracker import Tracker
from dqrm.training.checkpoint import TrainState, prune_checkpoints, save_checkpoint
from dqrm.training.consensus import Consensus, Wishes
from dqrm.training.evaluate import evaluate
from dqrm.training.metrics import Metrics
from dqrm.training.optimizer import Optimizer, rate_factor
from dqrm.training.sharded_checkpoint import send_checkpoint
from dqrm.training.sharded_optimizer import ShardedOptimizer
from dqrm.training.step import TrainStep, make_step
from dqrm.training.world import World, gather_tensors

if TYPE_CHECKING:
    from dqrm.comm.exchange import Exchange
    from dqrm.training.exchange_metrics import ExchangeMetrics

log = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 10.0
"""Pace of progress lines where there is no terminal to draw a bar on."""


@dataclass(frozen=True)
class Validation:
    """What a run has just measured."""

    step: int
    epoch: float
    """Passes over the training split so far, with the fraction of the one that goes on."""
    metrics: Metrics


Watch = Callable[[Validation], bool]
"""Told of every validation; False ends training there. A resumed run may tell the same twice. In a
world of several processes it is asked on every rank, and the answers must be alike."""


class Trainer:
    """Trains a model over epochs, validates, selects, and saves what is needed to resume.

    A step is one batch. After every step, in this order: validation where due, a checkpoint
    where due, the end where reached; a checkpoint therefore never leaves a validation behind,
    and a resumed run sees the same sequence as an unbroken one.

    Args:
        config: the run's configuration.
        dataset: with a ``train`` split; ``validation`` is used where present.
        model: to train, in place.
        optimizer: of that model.
        state: where to begin; advanced in place.
        tracker: receives metrics by step.
        checkpoints: folder for checkpoints.
        stop_requested: asked after every step whether to save and return.
        exchange: of gradients, in a world of several ranks.
        world: of this process; rank 0 logs and saves.
        watch: told of every validation, and may end training.
    """

    def __init__(
        self,
        config: RunConfig,
        dataset: PreparedDataset,
        model: DLRM,
        optimizer: Optimizer | ShardedOptimizer,
        state: TrainState,
        tracker: Tracker,
        checkpoints: Path,
        stop_requested: Callable[[], bool],
        exchange: "Exchange | None" = None,
        world: World | None = None,
        watch: Watch | None = None,
    ) -> None:
        self.config = config
        self.model = model
        self.optimizer = optimizer
        self.state = state
        self.tracker = tracker
        self.checkpoints = checkpoints
        self.stop_requested = stop_requested
        self.exchange = exchange
        self.world = world or World()
        self.watch = watch
        self.stopped = False
        """Whether ``watch`` ended training."""
        self.train_split = dataset.split("train")
        self.validation = (
            dataset.split("validation") if "validation" in dataset.manifest.splits else None
        )
        self.batches_per_epoch = self.train_split.num_batches(config.data.batch_size)
        self._exchange_metrics = None if exchange is None else _metrics_of(exchange)
        self._saved_step = state.step
        self._saved_at = time.monotonic()
        self.consensus = Consensus(self.world, self._wishes)

    @property
    def total_steps(self) -> int:
        """Steps of the whole run if it does not stop early."""
        steps = self.config.train.epochs * self.batches_per_epoch
        return min(steps, self.config.train.max_steps or steps)

    @property
    def finished(self) -> bool:
        """Whether all steps are done, validation stopped getting better, or ``watch`` said so."""
        patience = self.config.train.patience
        return (
            self.stopped
            or self.state.step >= self.total_steps
            or (patience is not None and self.state.validations_since_best >= patience)
        )

    def fit(self) -> None:
        """Train from the current state until finished or asked to stop."""
        self.model.train()
        step = self._make_step()
        progress = _Progress(self.total_steps, self.state.step, shown=self.world.is_main)
        with progress:
            while not self.finished and not self.consensus.granted.stop:
                self._train_epoch(step, progress)
        if self.state.step > self._saved_step:
            self._save()

    def _make_step(self) -> TrainStep:
        train = self.config.train
        exchange, rest = self.exchange, (self.world, self.consensus, train.precision, train.seed)
        if isinstance(self.optimizer, ShardedOptimizer):
            from dqrm.training.sharded_lookup import ShardedLookup
            from dqrm.training.sharded_step import ShardedStep

            lookup = self.optimizer.bags.remote
            assert isinstance(lookup, ShardedLookup)
            assert exchange is not None
            return ShardedStep(self.model, self.optimizer, lookup, exchange, *rest)
        if exchange is not None:
            from dqrm.training.exchanged_step import ExchangedStep

            return ExchangedStep(self.model, self.optimizer, exchange, *rest)
        return make_step(
            self.model, self.optimizer, train.precision, train.seed, optimize=train.optimize
        )

    def _train_epoch(self, train_step: TrainStep, progress: "_Progress") -> None:
        """Train on the rest of the current epoch."""
        state, data = self.state, self.config.data
        order = None
        if data.shuffle:
            order = RowOrder(
                self.train_split.num_rows, self.config.train.seed, state.epoch, data.window_rows
            )
        started, cpu_started = time.perf_counter(), time.process_time()
        for batch in self.train_split.batches(
            data.batch_size,
            order=order,
            start_batch=state.batch,
            rank=self.world.rank,
            world_size=self.world.size,
        ):
            loss = train_step(batch, state.step)
            if self.world.size == 1:
                self.consensus.ask_alone()
            rows = batch.whole_rows
            state.step += 1
            state.batch += 1
            state.samples += rows
            state.loss_sum += loss * rows
            state.loss_rows += rows
            state.train_seconds += time.perf_counter() - started
            state.train_cpu_seconds += time.process_time() - cpu_started
            if state.batch == self.batches_per_epoch:
                state.epoch, state.batch = state.epoch + 1, 0
            progress.advance(state, loss)
            self._between_steps()
            if self.finished or self.consensus.granted.stop:
                return
            started, cpu_started = time.perf_counter(), time.process_time()

    def _between_steps(self) -> None:
        """Log, validate and save where due."""
        state, train = self.state, self.config.train
        if state.step % train.log_every == 0 or self.finished:
            self._log_loss()
        at_epoch_end = state.batch == 0
        periodic = train.eval_every is not None and state.step % train.eval_every == 0
        improved = False
        if self.validation is not None and (periodic or at_epoch_end or self.finished):
            improved = self._validate()
        every_steps = self.config.checkpoint.every_steps
        due = every_steps is not None and state.step % every_steps == 0
        if improved or at_epoch_end or due or any(self.consensus.granted):
            self._save()

    def _wishes(self) -> Wishes:
        """What this process wants done after the step, for reasons that others may not share."""
        minutes = self.config.checkpoint.every_minutes
        save = minutes is not None and time.monotonic() - self._saved_at >= 60 * minutes
        return Wishes(stop=self.stop_requested(), save=save)

    def _log_loss(self) -> None:
        state = self.state
        seconds, steps = state.train_seconds - state.logged_seconds, state.step - state.logged_step
        cpu_seconds = state.train_cpu_seconds - state.logged_cpu_seconds
        metrics = {
            "train/loss": state.loss_sum / state.loss_rows,
            "train/lr": self.config.optim.lr * rate_factor(state.step - 1, self.config.optim),
            "perf/samples_per_second": state.loss_rows / seconds,
            "perf/step_seconds": seconds / steps,
            "perf/cpu_step_seconds": cpu_seconds / steps,
        }
        if self._exchange_metrics is not None:
            metrics |= self._exchange_metrics.since_last(steps)
        state.loss_sum, state.loss_rows = 0.0, 0
        state.logged_step, state.logged_seconds = state.step, state.train_seconds
        state.logged_cpu_seconds = state.train_cpu_seconds
        self._record(metrics)

    def _validate(self) -> bool:
        """Measure the validation split and return whether the model is the best so far."""
        assert self.validation is not None
        state, select = self.state, self.config.train.select
        batch_size = self.config.train.eval_batch_size
        measured = evaluate(self.model, self.validation, batch_size, self.world)
        value = measured.auc if select == "auc" else -measured.log_loss
        improved = state.best_value is None or value > state.best_value
        if improved:
            state.best_value, state.best_step = value, state.step
            state.validations_since_best = 0
        else:
            state.validations_since_best += 1
        metrics = measured.as_dict("val/")
        if improved:
            metrics["best/val_auc"] = measured.auc
            metrics["best/val_log_loss"] = measured.log_loss
            metrics["best/step"] = state.step
        self._record(metrics)
        log.info(
            "step %d, epoch %.2f: validation AUC %.4f, log loss %.4f%s",
            state.step,
            state.step / self.batches_per_epoch,
            measured.auc,
            measured.log_loss,
            " (best so far)" if improved else "",
        )
        if self.watch is not None:
            epoch = state.step / self.batches_per_epoch
            going_on = self.watch(Validation(state.step, epoch, measured))
            self.stopped = not going_on and not self.finished
        return improved

    def _record(self, metrics: dict[str, float]) -> None:
        self.state.history.append({"step": self.state.step, **metrics})
        self.tracker.log_metrics(metrics, self.state.step)

    def _save(self) -> None:
        residuals = None
        if self.exchange is not None:
            self.exchange.require_equal(_replicated(self.model)).wait()
            residuals = gather_tensors(self.exchange.state_dict(), self.world)
        if not self.world.is_main and isinstance(self.optimizer, ShardedOptimizer):
            send_checkpoint(self.model, self.optimizer, self.world)
        if self.world.is_main:
            save_checkpoint(
                self.checkpoints,
                self.model,
                self.optimizer,
                self.state,
                self.config,
                residuals,
                self.world,
            )
            keep = self.config.checkpoint.keep_last
            prune_checkpoints(self.checkpoints, keep, self.state.best_step)
        self._saved_step, self._saved_at = self.state.step, time.monotonic()


def _replicated(model: DLRM) -> dict[str, Tensor]:
    """Return what all ranks hold the same of."""
    if not isinstance(model.emb_l, ShardedEmbeddingBags):
        return model.state_dict()
    own = "emb_l.owned."
    return {name: t for name, t in model.state_dict().items() if not name.startswith(own)}


def _metrics_of(exchange: "Exchange") -> "ExchangeMetrics":
    # Imported by runs of several processes alone: it needs torch.distributed.
    from dqrm.training.exchange_metrics import ExchangeMetrics

    return ExchangeMetrics(exchange)


class _Progress:
    """A bar on a terminal, a line every few seconds elsewhere."""

    def __init__(self, total_steps: int, done: int, *, shown: bool) -> None:
        self._total = total_steps
        self._terminal = shown and sys.stderr.isatty()
        self._bar = tqdm(total=total_steps, initial=done, unit="step", disable=not self._terminal)
        self._next_line = time.monotonic() + SECONDS_BETWEEN_LINES

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._bar.close()

    def advance(self, state: TrainState, loss: float) -> None:
        """Show that one more step is done."""
        self._bar.update()
        rate = state.samples / state.train_seconds
        if self._terminal:
            self._bar.set_postfix_str(f"loss {loss:.4f}, {rate:,.0f} samples/s", refresh=False)
        elif time.monotonic() >= self._next_line:
            self._next_line += SECONDS_BETWEEN_LINES
            log.info(
                "step %d of %d: loss %.4f, %s samples/s",
                state.step,
                self._total,
                loss,
                f"{rate:,.0f}",
            )
