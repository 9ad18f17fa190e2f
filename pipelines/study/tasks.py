"""GLUE's tasks as the study takes them."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

_ENDINGS = (".tsv.gz", ".tsv")


@dataclass(frozen=True)
class Task:
    """A task, and what its size asks for; all else is said by the recipes."""

    title: str
    metric: str
    """GLUE's own, which models are selected by and held against each other by."""
    max_length: int
    """Tokens after which a sentence, or a pair, is cut."""
    dev_fraction: float
    """Share of the training rows to select on: GLUE's dev file is measured once, as test."""
    test_fraction: float | None = None
    """Share of the training rows to test on, of a task without a dev file."""
    finetune_epochs: int | None = None
    """None takes the recipes'."""
    compress_epochs: int | None = None
    """Of stages that count passes over the rows; None takes the recipes', which are for SST-2."""
    compress_steps: int | None = None
    """Most steps of those that count steps, schedules as much shorter; None takes the recipes'."""

    def files(self, name: str, folder: Path) -> dict[str, Path]:
        """The files of the task, by the fields of a stage's data.

        Args:
            name: what the files' names begin with.
            folder: where they are.

        Raises:
            FileNotFoundError: one is not there.
        """
        files = {"train": _find(folder, f"{name}_train")}
        if self.test_fraction is None:
            files["test"] = _find(folder, f"{name}_dev")
        return files

    def data(self, name: str, folder: Path) -> dict[str, Any]:
        """The data of a stage, as a pipeline's file has it; for arguments see :meth:`files`."""
        data: dict[str, Any] = {
            field: str(path) for field, path in self.files(name, folder).items()
        }
        data["dev_fraction"] = self.dev_fraction
        if self.test_fraction is not None:
            data["test_fraction"] = self.test_fraction
        return data


_FEW_ROWS: Any = {
    "dev_fraction": 0.1,
    "finetune_epochs": 5,
    "compress_epochs": 5,
}

TASKS: Mapping[str, Task] = MappingProxyType(
    {
        "sst2": Task("SST-2", "accuracy", max_length=64, dev_fraction=0.02),
        "cola": Task("CoLA", "matthews", max_length=64, compress_steps=400, **_FEW_ROWS),
        # Of both, 200 steps are one to two passes over the rows.
        "mrpc": Task(
            "MRPC", "f1", max_length=128, test_fraction=0.15, compress_steps=200, **_FEW_ROWS
        ),
        "stsb": Task("STS-B", "pearson", max_length=128, compress_steps=200, **_FEW_ROWS),
    }
)
"""By what GLUE's files begin with."""


def _find(folder: Path, stem: str) -> Path:
    for ending in _ENDINGS:
        path = folder / f"{stem}{ending}"
        if path.is_file():
            return path
    looked = " or ".join(f"{stem}{ending}" for ending in _ENDINGS)
    raise FileNotFoundError(f"{folder}: there is no {looked}; --data names the folder of GLUE's")
