"""What training says about itself, whoever listens."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from dqrm.tracking.datasets import DatasetRecord

if TYPE_CHECKING:
    import pandas as pd

Status = Literal["FINISHED", "FAILED", "KILLED"]


class Tracker(ABC):
    """Takes the record of one run. No call waits for a store, and none raises because of one."""

    @property
    @abstractmethod
    def run_id(self) -> str | None:
        """Id of the run; None while the store has not answered yet."""

    @property
    @abstractmethod
    def uri(self) -> str | None:
        """The store."""

    @property
    @abstractmethod
    def run_url(self) -> str | None:
        """Page of the run, when a server keeps it."""

    @abstractmethod
    def log_params(self, params: Mapping[str, object]) -> None:
        """Record settings; nested mappings become dotted keys."""

    @abstractmethod
    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Record one point of each metric at ``step``, now."""

    @abstractmethod
    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags, over those of the same name."""

    @abstractmethod
    def describe(self, outcome: str) -> None:
        """Put the outcome, a line or two, under the description given at the start."""

    @abstractmethod
    def log_artifact(self, path: Path, folder: str = "") -> None:
        """Record a file or a folder as it is now, into ``folder`` of the run's artifacts."""

    @abstractmethod
    def log_dataset(self, dataset: DatasetRecord) -> None:
        """Record a split that the run reads."""

    @abstractmethod
    def log_model(
        self, artifact_dir: Path, example: "pd.DataFrame", register_as: str | None
    ) -> None:
        """Record the packed model, and register it under a name if one is given.

        Args:
            artifact_dir: folder that ``dqrm.serving.predictor.Predictor.load`` takes.
            example: a few input rows; their columns and types become the signature.
            register_as: name in the model registry, or None.
        """

    @abstractmethod
    def flush(self) -> bool:
        """Wait until all so far is in the store; False when the store did not take it in time."""

    @abstractmethod
    def finish(self, status: Status) -> bool:
        """End the run. Return whether all of it is in the store; if not, it waits in the spool."""


class NullTracker(Tracker):
    """Records nothing: tracking is off, or another rank does it."""

    run_id = None
    uri = None
    run_url = None

    def log_params(self, params: Mapping[str, object]) -> None:
        """Do nothing."""

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Do nothing."""

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Do nothing."""

    def describe(self, outcome: str) -> None:
        """Do nothing."""

    def log_artifact(self, path: Path, folder: str = "") -> None:
        """Do nothing."""

    def log_dataset(self, dataset: DatasetRecord) -> None:
        """Do nothing."""

    def log_model(
        self, artifact_dir: Path, example: "pd.DataFrame", register_as: str | None
    ) -> None:
        """Do nothing."""

    def flush(self) -> bool:
        """Return True: nothing waits."""
        return True

    def finish(self, status: Status) -> bool:
        """Return True: nothing waits."""
        return True
