"""What runs were told differently, and which of them are repetitions of one another."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dqrm.comparison.record import ComparedRun
from dqrm.text import shortened

_LONG_NUMBER = 8


@dataclass(frozen=True)
class Group:
    """Runs with the same settings, up to the seed."""

    name: str
    runs: tuple[ComparedRun, ...]

    @property
    def seeds(self) -> list[str]:
        """Seeds of its runs, where they have one."""
        return [value for run in self.runs for key, value in run.settings.items() if _is_seed(key)]

    @property
    def settings(self) -> Mapping[str, str]:
        """What its runs were told; the seed is the first one's."""
        return self.runs[0].settings

    def values(self, metric: str) -> list[float]:
        """What its runs measured."""
        return [run.metrics[metric] for run in self.runs if metric in run.metrics]


@dataclass(frozen=True)
class Difference:
    """A setting that is not the same everywhere."""

    key: str
    values: tuple[str | None, ...]
    """One of each group or run; None where it has no such setting."""

    def texts(self, letters: int) -> list[str]:
        """Return the values for a table: numbers in five digits where that tells them apart."""
        whole = ["-" if value is None else value for value in self.values]
        short = [_five_digits(text) for text in whole]
        shown = short if len(set(short)) == len(set(whole)) else whole
        return [shortened(text, letters) for text in shown]


def grouped(runs: Sequence[ComparedRun]) -> list[Group]:
    """Return the runs by their settings, seeds aside, in the order they were given.

    A run without settings is a group of its own.
    """
    found: dict[object, list[ComparedRun]] = {}
    for run in runs:
        settings = {key: value for key, value in run.settings.items() if not _is_seed(key)}
        found.setdefault(tuple(sorted(settings.items())) or run.name, []).append(run)
    names: list[str] = []
    for members in found.values():
        name = _common_name([run.name for run in members])
        names.append(name if name not in names else members[0].name)
    return [Group(name, tuple(runs)) for name, runs in zip(names, found.values(), strict=True)]


def differences(settings: Sequence[Mapping[str, str]]) -> tuple[list[Difference], list[Difference]]:
    """Return the settings with more than one value, and those that only some have; no seeds."""
    keys = list(dict.fromkeys(key for values in settings for key in values))
    unequal: list[Difference] = []
    partial: list[Difference] = []
    for key in keys:
        values = tuple(found.get(key) for found in settings)
        if _is_seed(key) or len(set(values)) < 2:
            continue
        known = {value for value in values if value is not None}
        (unequal if len(known) > 1 else partial).append(Difference(key, values))
    return unequal, partial


def _five_digits(text: str) -> str:
    try:
        return f"{float(text):.5g}" if len(text) > _LONG_NUMBER else text
    except ValueError:
        return text


def _is_seed(key: str) -> bool:
    return key.rpartition(".")[2] == "seed"


def _common_name(names: Sequence[str]) -> str:
    """Return what the names begin with: `fp32-seed0` and `fp32-seed1` are `fp32`."""
    if len(names) == 1:
        return names[0]
    length = min(map(len, names))
    shared = next((n for n in range(length) if len({name[n] for name in names}) > 1), length)
    stem = names[0][:shared]
    if any(name[shared : shared + 1].isdigit() for name in names):
        # Not through the middle of a number: `seed10` and `seed11` share `seed`.
        stem = stem.rstrip("0123456789")
    return re.sub(r"[\W_]*(seed)?[\W_]*$", "", stem) or f"{names[0]}, ..."
