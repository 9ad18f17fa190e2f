"""The trials of a study, before anything runs."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dqrm.config import RunConfig
from dqrm.data.dataset import PreparedDataset
from dqrm.study.arms import TUNED, Arm
from dqrm.study.kinds import Builder, Question
from dqrm.study.trials import Trial, make_trial


@dataclass(frozen=True)
class Case:
    """A question asked of one data set."""

    label: str
    """What tells it from the other cases; empty of the only one."""
    base: RunConfig
    dataset: PreparedDataset
    question: Question
    trials: dict[str, list[Trial]]
    """By key of the arm, one for each seed."""


@dataclass(frozen=True)
class Plan:
    """All trials of a study."""

    kind: str
    seeds: tuple[int, ...]
    output: Path
    """Of all studies; runs are shared."""
    folder: Path
    """Of this study's report."""
    cases: tuple[Case, ...]

    @property
    def trials(self) -> list[Trial]:
        """Of all cases and arms, seed by seed: a study that is cut off has whole seeds."""
        return [
            trials[number]
            for number in range(len(self.seeds))
            for case in self.cases
            for trials in case.trials.values()
        ]


def make_plan(
    kind: str,
    ask: Builder,
    bases: Sequence[tuple[str, RunConfig]],
    seeds: Sequence[int],
    output: Path,
    name: str,
    processes: int = 2,
) -> Plan:
    """Return what a study would run.

    Args:
        kind: name of the study.
        ask: makes the question of each case.
        bases: labels and configurations; one case each.
        seeds: one run of each arm for each.
        output: folder of all studies.
        name: ends the name of the report's folder.
        processes: of arms that train in several.

    Raises:
        ValueError: a data set or a configuration cannot answer the question.
    """
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds {', '.join(map(str, seeds))}: each may be given once")
    cases = tuple(_case(ask, label, base, tuple(seeds), output, processes) for label, base in bases)
    return Plan(kind, tuple(seeds), output, output / f"{kind}-{name}", cases)


def add_arm(plan: Plan, case: Case, arm: Arm) -> list[Trial]:
    """Add an arm that was not known before others were complete; return its trials."""
    trials = _trials(case.base, case.dataset, arm, plan.seeds, plan.output, case.trials)
    case.trials[arm.key] = trials
    return trials


def _case(
    ask: Builder, label: str, base: RunConfig, seeds: tuple[int, ...], output: Path, processes: int
) -> Case:
    dataset = PreparedDataset.open(base.data.path)
    for split, why in (("validation", "select"), ("test", "compare")):
        if split not in dataset.manifest.splits:
            raise ValueError(f"{dataset.path}: no {split} split to {why} on")
    question = ask(base, dataset, processes)
    trials: dict[str, list[Trial]] = {}
    for arm in question.arms:
        trials[arm.key] = _trials(base, dataset, arm, seeds, output, trials)
    keys = {*trials, TUNED} if any(arm.candidate for arm in question.arms) else set(trials)
    assert {question.ours, question.rival} <= keys
    return Case(label, base, dataset, question, trials)


def _trials(
    base: RunConfig,
    dataset: PreparedDataset,
    arm: Arm,
    seeds: Sequence[int],
    output: Path,
    others: dict[str, list[Trial]],
) -> list[Trial]:
    sources = others[arm.after] if arm.after is not None else [None] * len(seeds)
    return [
        make_trial(base, arm, seed, output, dataset.manifest.digest, source)
        for seed, source in zip(seeds, sources, strict=True)
    ]
