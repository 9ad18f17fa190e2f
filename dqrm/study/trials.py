"""A run of an arm with a seed: where it lies, whether it is complete.

<output>/
    runs/<name>/                the run, as `dqrm train` makes it
    trials/<name>/config.yaml   what it is started with
    trials/<name>/log.txt       what it printed
    trials/<name>/usage.json    CPU seconds and memory of all its attempts
    trials/<name>/outcome.json  what it came to; its presence means the trial is complete

The name ends in a digest of settings and data: other settings are another trial, and studies that
share an output folder share runs.
"""

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dqrm.config import RunConfig
from dqrm.study.arms import Arm, configure

State = Literal["complete", "go on", "run"]

USAGE = "usage.json"
LOCK = "lock"

_DIGITS = 8
_WITHOUT_EFFECT: dict[str, Any] = {
    "name": True,
    "output": True,
    "tracking": True,
    "checkpoint": True,
    "data": {"path"},
    "train": {"threads", "log_every", "eval_batch_size"},
}


@dataclass(frozen=True)
class Trial:
    """A run of an arm with a seed."""

    arm: Arm
    seed: int
    config: RunConfig
    """With the run's own name and folder."""
    folder: Path
    source: "Trial | None" = None
    """The trial whose model is quantized, where there is no training."""

    @property
    def name(self) -> str:
        """Name of the run."""
        return self.folder.name

    @property
    def run_dir(self) -> Path:
        """Folder of the run."""
        return self.config.output / self.name

    @property
    def outcome_file(self) -> Path:
        """What the trial came to."""
        return self.folder / "outcome.json"

    @property
    def state(self) -> State:
        """How far it is."""
        if self.outcome_file.is_file():
            return "complete"
        if any((self.run_dir / "checkpoints").glob("step-*/state.json")):
            return "go on"
        return "run"

    @property
    def holder(self) -> str:
        """Number of the process that trains it, or did last; "?" before there was one."""
        return (self.folder / LOCK).read_text(encoding="ascii").strip() or "?"

    @contextlib.contextmanager
    def locked(self) -> Iterator[int | None]:
        """Yield a lock on the trial, or None while some process holds it.

        The lock is a descriptor to hand on: a run that outlives its study keeps it, so no other
        study starts the run a second time.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield None
            else:
                yield descriptor
        finally:
            os.close(descriptor)


def make_trial(
    base: RunConfig,
    arm: Arm,
    seed: int,
    output: Path,
    data_digest: str,
    source: Trial | None = None,
) -> Trial:
    """Return the trial of ``arm`` with ``seed``.

    Args:
        base: of the study.
        arm: its settings replace those of the base.
        seed: of the run.
        output: folder of all studies.
        data_digest: of the data set, wherever it lies.
        source: the trial whose model is quantized afterwards.
    """
    config = configure(base, arm, seed)
    # Defaults are left out: settings that a later version adds make no other trial of this one.
    decides = config.model_dump(
        mode="json", exclude=_WITHOUT_EFFECT, exclude_defaults=True, by_alias=True
    )
    if arm.processes == 1:
        decides.pop("exchange", None)
    decides["data digest"] = data_digest
    how = [arm.processes, arm.module, arm.arguments, None if source is None else source.name]
    text = json.dumps([decides, how], sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()[:_DIGITS]
    name = f"{arm.key}-seed{seed}-{digest}"
    named = config.model_copy(update={"name": name, "output": output / "runs"})
    return Trial(arm, seed, named, output / "trials" / name, source)
