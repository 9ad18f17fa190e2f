"""What a stage is: settings, and a function from folders to a folder.

A stage is a :class:`Stage` with a ``stage: Literal["kind"]`` field of its own, one module in
``dqrm.pipelines.stages``, and one name in the union there. It may be killed at any time. The
runner calls ``run`` again with an empty ``output`` and with whatever the killed attempt left in
``scratch``; a stage that keeps nothing there starts from its beginning.

Settings are read by commands that must answer at once: what a stage computes with is imported
within its methods.
"""

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from dqrm.settings import Settings
from dqrm.tracking.base import Tracker
from dqrm.tracking.config import TrackingConfig

if TYPE_CHECKING:
    from dqrm.compress.transforms.config import TransformConfig

MODEL_FOLDER = "model"
"""Folder, within a stage's output, of the model it made."""


DATA_FOLDER = "data"
"""Folder, within a stage's output, of the recommender's data set it prepared."""


class Interrupted(Exception):
    """A signal asked a stage to end; what it has so far is in its scratch folder."""

    def __init__(self, number: int) -> None:
        super().__init__(f"signal {number}")
        self.number = number
        """Of the signal."""


class GateNotMet(Exception):
    """What a stage measured is not good enough, so that the pipeline ends."""


@dataclass(frozen=True)
class Problem:
    """Why a stage could not run, found before it is."""

    field: str
    """Dotted key below the stage."""
    message: str


@dataclass(frozen=True)
class StageContext:
    """What a stage runs with."""

    inputs: Mapping[str, Path]
    """By name, the output folders of the earlier stages it named, in the order of the file."""
    metrics: Mapping[str, Mapping[str, float]]
    """What those stages returned."""
    digest: str
    """Of the stage's settings, sources, references and inputs."""
    references: Mapping[str, str]
    """What ``references`` of the stage said when this was first run with these settings."""
    output: Path
    """Empty; what is in it when ``run`` returns is the stage's result."""
    scratch: Path
    """For what makes a second attempt shorter; deleted when the stage is done."""
    run_dir: Path
    """Folder of the stage's MLflow run."""
    tracker: Tracker
    """Records into that run."""
    tracking: TrackingConfig
    """For a stage that records itself; its tags make the run a part of the pipeline's."""
    stop: Callable[[], int | None]
    """The signal that asked to end, or None. A stage that hears it raises Interrupted."""
    progress: Callable[[str, int, int, str], None]
    """Takes a phase, the units done, all of them, and their name."""


Product = Literal[
    "transformer",
    "packed model",
    "allocation",
    "recommender",
    "bits of tables",
    "data set",
    "nothing",
]
"""What other stages can take from a stage."""


class Stage(Settings):
    """One stage of a pipeline."""

    makes: ClassVar[Product] = "nothing"
    """What its output is to other stages."""

    shows_times: ClassVar[bool] = False
    """Whether it runs again when an earlier stage took another time for the same result."""

    stage: str
    """Which kind of stage this is."""

    name: str | None = Field(default=None, pattern=r"^([A-Za-z]|[0-9]+[A-Za-z_-])[A-Za-z0-9_-]*$")
    """Name of the stage and of its folder; its kind when not given."""

    @property
    def key(self) -> str:
        """The name other stages and the command line know it by."""
        return self.name or self.stage

    @property
    def trains_together(self) -> bool:
        """Whether, of several processes, each calls ``run``; else the first one does, alone.

        Contexts of the others record nothing; what they are to read lies in folders that all see.
        """
        return False

    @property
    def records_itself(self) -> bool:
        """Whether ``run`` opens the stage's MLflow run, in ``run_dir``, by itself."""
        return False

    def inputs(self, earlier: Mapping[str, "Stage"]) -> tuple[str, ...]:
        """Names of the earlier stages whose output it reads.

        Args:
            earlier: the stages before it, by name.

        Raises:
            ValueError: there is none of a name it needs.
        """
        return ()

    def identity(self) -> dict[str, Any]:
        """Settings that decide the result, as JSON; its name is none of them."""
        return self.model_dump(mode="json", by_alias=True, exclude={"name"})

    def sources(self) -> dict[str, str]:
        """By name, the digests of what it reads from outside the pipeline.

        Raises:
            OSError: something is not there.
        """
        return {}

    def references(self, tracking: TrackingConfig) -> dict[str, str]:
        """By field, what its names of things outside mean now that may later mean another.

        Asked once: a run that goes on, or is repeated with the same settings, sources and inputs,
        is given the same answer.

        Args:
            tracking: where the pipeline is recorded.

        Raises:
            OSError: what would know does not answer.
        """
        return {}

    def problems(self, earlier: Mapping[str, "Stage"]) -> list[Problem]:
        """What would keep it from running, as far as can be told without running it.

        Args:
            earlier: the stages before it, by name.
        """
        return []

    def plan(self, earlier: Mapping[str, "Stage"]) -> list[tuple[str, str]]:
        """Names and values, for people, of what it would work on.

        Args:
            earlier: the stages before it, by name.
        """
        return []

    def skeleton(self, earlier: Mapping[str, "Stage"]) -> Any:
        """The transformer it would make, without values (on the meta device), to state sizes by.

        A model of transformers, or None: where it makes none, or where the shape is only known when
        it has run.
        """
        return None

    def compression(self, earlier: Mapping[str, "Stage"]) -> "tuple[TransformConfig, ...] | None":
        """The transforms that the weights of the model it would make have been through.

        None where they are only known when it has run.
        """
        return ()

    @abstractmethod
    def run(self, context: StageContext) -> dict[str, float]:
        """Fill ``context.output`` and return the metrics, by the names MLflow shows.

        Raises:
            Interrupted: ``context.stop`` named a signal.
        """
