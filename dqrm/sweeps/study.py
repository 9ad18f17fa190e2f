"""Optuna's part: which values a trial gets, when it is pruned, and the record of all trials.

The record is an SQLite file in the sweep's folder. The values of a trial follow from the seed, its
number and the trials before it, so a sweep that was cut off goes on as if it had not been.
"""

import math
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from dqrm.sweeps.folder import SweepFolder
from dqrm.sweeps.space import Choices, Range, Space, override

if TYPE_CHECKING:
    from optuna import Study, Trial
    from optuna.distributions import BaseDistribution
    from optuna.trial import FrozenTrial

ERROR = "error"
"""User attribute of a failed trial: why."""
BEST_STEP = "best_step"

_EPOCH = 1000
"""Optuna's steps are whole numbers: thousandths of an epoch, whatever the batch size."""


class SweepStudy:
    """The trials of a sweep."""

    def __init__(self, folder: SweepFolder) -> None:
        optuna = import_optuna()
        settings, select = folder.settings, folder.base.train.select
        self.select = select
        self._settings = settings
        self._distributions = _distributions(folder.space)
        pruner = (
            optuna.pruners.MedianPruner()
            if settings.pruner == "median"
            else optuna.pruners.NopPruner()
        )
        self.study: Study = optuna.create_study(
            storage=f"sqlite:///{(folder.path / 'study.db').absolute()}",
            study_name="sweep",
            direction="maximize" if select == "auc" else "minimize",
            pruner=pruner,
            load_if_exists=True,
        )

    @property
    def trials(self) -> "list[FrozenTrial]":
        """All trials by number, one that was cut off among them."""
        found: list[FrozenTrial] = self.study.get_trials(deepcopy=False)
        return found

    @property
    def best(self) -> "FrozenTrial | None":
        """The best trial that ran to its end."""
        done = [trial for trial in self.trials if trial.state.name == "COMPLETE"]
        sign = 1 if self.select == "auc" else -1
        return max(done, key=lambda trial: sign * (trial.value or 0.0), default=None)

    def next(self) -> "Trial | None":
        """The trial to run: one that was cut off, else a new one; None when there are enough."""
        optuna = import_optuna()
        trials = self.trials
        for trial in trials:
            if trial.state.name == "RUNNING":
                # The sweep's lock is held: nobody else runs it.
                cut_off: Trial = optuna.Trial(self.study, trial._trial_id)
                return cut_off
        if len(trials) >= self._settings.trials:
            return None
        # Anew for each trial: a resumed sweep must not draw the first values again.
        seeds = np.random.SeedSequence([self._settings.seed, len(trials)])
        self.study.sampler = optuna.samplers.TPESampler(seed=int(seeds.generate_state(1)[0]))
        return self.study.ask(self._distributions)

    def report(self, trial: "Trial", epoch: float, value: float) -> bool:
        """Keep what a trial measured; return whether it may go on."""
        with warnings.catch_warnings():
            # A resumed run may repeat a validation, with the same result.
            warnings.simplefilter("ignore")
            trial.report(value, round(_EPOCH * epoch))
        return not trial.should_prune()

    def pruned_before(self, trial: "Trial") -> bool:
        """Whether what a trial measured before it was cut off had it pruned."""
        return bool(self.trials[trial.number].intermediate_values) and trial.should_prune()

    def finish(self, trial: "Trial", value: float, best_step: int, pruned: bool) -> None:
        """Keep what became of a trial that trained."""
        state = import_optuna().trial.TrialState
        if math.isnan(value):
            self.fail(trial, "validation has one class only: its AUC is not defined")
            return
        trial.set_user_attr(BEST_STEP, best_step)
        if pruned:
            self.study.tell(trial, state=state.PRUNED)
        else:
            self.study.tell(trial, value)

    def fail(self, trial: "Trial", error: str) -> None:
        """Keep why a trial could not train."""
        trial.set_user_attr(ERROR, error)
        self.study.tell(trial, state=import_optuna().trial.TrialState.FAIL)

    def importance(self) -> dict[str, float]:
        """How much of the difference between trials each key explains, 0 to 1; empty of too few."""
        optuna = import_optuna()
        values = {t.value for t in self.trials if t.state.name == "COMPLETE"}
        if len(values) < 2:
            return {}
        evaluator = optuna.importance.FanovaImportanceEvaluator(seed=self._settings.seed)
        found = optuna.importance.get_param_importances(self.study, evaluator=evaluator)
        return {key: float(share) for key, share in found.items()}


def overrides(params: Mapping[str, Any]) -> list[str]:
    """The values of a trial as they are written on the command line."""
    return [override(key, value) for key, value in params.items()]


def import_optuna() -> Any:
    """Optuna, without what it says about every trial.

    Raises ValueError naming the extra it comes with.
    """
    try:
        import optuna
    except ImportError as error:
        raise ValueError("dqrm sweep needs Optuna: pip install 'dqrm[sweep]'") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def _distributions(space: Space) -> "dict[str, BaseDistribution]":
    return {
        key: _distribution(search, key in space.whole) for key, search in space.searches.items()
    }


def _distribution(search: Range | Choices, whole: bool) -> "BaseDistribution":
    distributions = import_optuna().distributions
    result: BaseDistribution
    if isinstance(search, Choices):
        result = distributions.CategoricalDistribution(search.values)
    elif whole:
        low, high = int(float(search.low)), int(float(search.high))
        result = distributions.IntDistribution(low, high, log=search.log)
    else:
        result = distributions.FloatDistribution(
            float(search.low), float(search.high), log=search.log
        )
    return result
