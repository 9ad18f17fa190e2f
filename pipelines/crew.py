"""The processes of one pipeline: the first runs it, the others are called to stages they share.

Between those stages they sleep: they look for a call a few times a second, and no collective is
open that could time out. Calls are kept in the store in which the processes meet.
"""

import contextlib
import itertools
import json
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from pydantic import TypeAdapter

from dqrm.launch import Place
from dqrm.pipelines.stage import Interrupted, Stage, StageContext
from dqrm.pipelines.stages import AnyStage
from dqrm.tracking.base import NullTracker
from dqrm.tracking.config import TrackingConfig

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

_pipelines = itertools.count()
"""Run by this process."""

_SECONDS_BETWEEN_LOOKS = 0.2
_SECONDS_TO_MEET = 600.0
_SECONDS_TO_LEAVE = 2.0
_STAGE: TypeAdapter[Stage] = TypeAdapter(AnyStage)


class Crew:
    """The processes that a pipeline runs in, as the first one sees them.

    Args:
        place: of this process.
    """

    def __init__(self, place: Place) -> None:
        self._place = place
        self._calls = 0
        self._store: Store | None = None

    def __enter__(self) -> Self:
        if self._place.world_size > 1:
            self._store = _open(self._place)
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Send the others home."""
        self._call(None)
        if self._store is not None:
            # Where no launcher keeps the store, this process does. Who hangs is not waited for.
            others = [_left(rank) for rank in range(1, self._place.world_size)]
            with contextlib.suppress(RuntimeError):
                self._store.wait(others, timedelta(seconds=_SECONDS_TO_LEAVE))

    def call(self, stage: Stage, context: StageContext) -> None:
        """Have the others run a stage that all run together; this one is to run it, too."""
        self._call(
            {
                # As it was given: some settings must not be, beside others.
                "stage": {
                    **stage.model_dump(mode="json", by_alias=True, exclude_unset=True),
                    "stage": stage.stage,
                },
                "inputs": {name: str(folder) for name, folder in context.inputs.items()},
                "metrics": {name: dict(values) for name, values in context.metrics.items()},
                "digest": context.digest,
                "references": dict(context.references),
                "output": str(context.output),
                "scratch": str(context.scratch),
                "run_dir": str(context.run_dir),
                "tracking": context.tracking.model_dump(mode="json"),
            }
        )

    def _call(self, call: dict[str, Any] | None) -> None:
        if self._store is not None:
            self._store.set(str(self._calls), json.dumps(call))
            self._calls += 1

    @contextlib.contextmanager
    def resting(self) -> Iterator[None]:
        """Compute with the cores of the others on this machine, who sleep, while the block runs."""
        count = self._place.local_world_size
        if self._store is None or count == 1:
            yield
            return
        import torch

        from dqrm.runtime import available_cores

        own = torch.get_num_threads()
        torch.set_num_threads(max(own, min(own * count, available_cores().limit)))
        try:
            yield
        finally:
            torch.set_num_threads(own)


def follow(place: Place, stop: Callable[[], int | None]) -> int | None:
    """Run, as one of the others, the stages that are called; return when sent home.

    Args:
        place: of this process.
        stop: number of the signal that asked to end, or None.

    Returns:
        The signal that ended it, if one did.

    Raises:
        MissingRanksError: the first process is gone.
    """
    store = _open(place)
    try:
        return _follow(store, stop)
    finally:
        with contextlib.suppress(RuntimeError):
            store.set(_left(place.rank), "")


def _follow(store: "Store", stop: Callable[[], int | None]) -> int | None:
    from dqrm.comm.errors import MissingRanksError

    for number_of_call in itertools.count():
        try:
            while not store.check([str(number_of_call)]):
                number = stop()
                if number is not None:
                    return number
                time.sleep(_SECONDS_BETWEEN_LOOKS)
            call = json.loads(store.get(str(number_of_call)))
        except RuntimeError as error:
            raise MissingRanksError("rank 0, which runs the pipeline, is gone", [0]) from error
        if call is None:
            break
        try:
            _STAGE.validate_python(call["stage"]).run(_context(call, stop))
        except Interrupted as interrupted:
            return interrupted.number
    return None


def _left(rank: int) -> str:
    return f"left/{rank}"


def _context(call: dict[str, Any], stop: Callable[[], int | None]) -> StageContext:
    return StageContext(
        inputs={name: Path(folder) for name, folder in call["inputs"].items()},
        metrics=call["metrics"],
        digest=call["digest"],
        references=call["references"],
        output=Path(call["output"]),
        scratch=Path(call["scratch"]),
        run_dir=Path(call["run_dir"]),
        tracker=NullTracker(),
        tracking=TrackingConfig.model_validate(call["tracking"]),
        stop=stop,
        progress=lambda phase, done, total, unit: None,
    )


def _open(place: Place) -> "Store":
    """The store in which processes meet, where this pipeline's calls are."""
    from torch._C._distributed_c10d import PrefixStore

    from dqrm.comm.process_group import open_store

    store = open_store(place.rank, place.world_size, _SECONDS_TO_MEET)
    store.set_timeout(timedelta(seconds=_SECONDS_TO_MEET))
    # Another pipeline of the same processes must not meet the calls of this one.
    return PrefixStore(f"dqrm-pipeline/{next(_pipelines)}", store)
