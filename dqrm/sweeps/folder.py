"""The folder of a sweep.

<output>/<name>/
    sweep.yaml      SweepSettings: what is searched, and how
    base.yaml       the configuration under all trials
    study.db        Optuna's record of the trials
    lock            held (flock) by the process that works on the sweep
    trials/<n>/     a training run each
    trials.csv      parameters, outcome and value of every trial
    best.yaml       the best configuration so far, ready for `dqrm train --config`
    plots/          history.png, slices.png
    summary.json    the result, once all trials are done
"""

import contextlib
from datetime import datetime
from pathlib import Path
from typing import Literal

from pydantic import NonNegativeInt, PositiveInt

from dqrm.config import RunConfig
from dqrm.configuration import load, to_yaml
from dqrm.data.files import write_text
from dqrm.locks import held
from dqrm.settings import Settings
from dqrm.sweeps.space import Space, check_space, split_arguments


class SweepSettings(Settings):
    """What is searched, and how."""

    search: dict[str, str]
    """Ranges and choices by key, as in `optim.lr: log:1e-3..1e-1` and `quant.bits: 4,8`."""

    trials: PositiveInt = 20
    """How many runs, with those that were pruned or failed."""

    seed: NonNegativeInt = 0
    """Of the sampler (TPE); a trial's values follow from it and from the trials before."""

    pruner: Literal["median", "none"] = "median"
    """median: a run ends when its best validation so far is worse than the median of others at the
    same epoch, from the sixth run on."""


class SweepFolder:
    """The folder of a sweep and what stands in it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if not (path / "sweep.yaml").is_file():
            raise FileNotFoundError(2, "no sweep; it has no sweep.yaml", str(path))
        self.settings = load(SweepSettings, path / "sweep.yaml")
        searches, _ = split_arguments(f"{k}={text}" for k, text in self.settings.search.items())
        self.base: RunConfig
        self.space: Space
        self.base, self.space = check_space(searches, str(path / "base.yaml"), [])

    @property
    def name(self) -> str:
        """Name of the sweep."""
        return self.path.name

    def trial(self, number: int) -> Path:
        """Folder of a trial's run."""
        return self.path / "trials" / f"{self.name}-{number:03d}"

    def with_trials(self, trials: int) -> "SweepFolder":
        """The same sweep with another number of trials, on disk as well."""
        settings = self.settings.model_copy(update={"trials": trials})
        write_text(self.path / "sweep.yaml", to_yaml(settings))
        return SweepFolder(self.path)

    def lock(self) -> contextlib.AbstractContextManager[None]:
        """Hold the sweep; entering raises ValueError when another process does."""
        return held(self.path / "lock", f"{self.path}: another process works on this sweep")


def new_sweep(
    output: Path, name: str | None, recipe: str, base: RunConfig, settings: SweepSettings
) -> SweepFolder:
    """Make the folder of a new sweep.

    Raises:
        ValueError: there is one of that name.
    """
    path = output / (name or f"{recipe}-{datetime.now():%Y%m%d-%H%M%S}")
    try:
        path.mkdir(parents=True)
    except FileExistsError:
        raise ValueError(
            f"the sweep {path} exists; give another --name, or go on with it: --resume {path}"
        ) from None
    write_text(path / "base.yaml", to_yaml(base))
    # Last: a folder without it is no sweep.
    write_text(path / "sweep.yaml", to_yaml(settings))
    return SweepFolder(path)
