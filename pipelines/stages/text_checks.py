"""Rows and weights of a stage that trains a text model, looked at before it runs."""

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from dqrm.pipelines.references import outside_model
from dqrm.pipelines.stage import Problem
from dqrm.pipelines.stages.text_data import TextData

if TYPE_CHECKING:
    from dqrm.pipelines.text.tables import Labels, Task


@dataclass(frozen=True)
class RowsSeen:
    """What was found in the files."""

    count: int
    """Training rows."""
    labels: "Labels | None"
    """None where they cannot be learned, for which there is a problem."""
    problems: tuple[Problem, ...]


def look_at_rows(data: TextData, task: "Task") -> RowsSeen:
    """Read all rows, and hold the labels of every split against those of the training rows.

    Files that stages share are read once, as long as they do not change.
    """
    try:
        stats = [path.stat() for path in data.files().values()]
    except OSError as error:
        return RowsSeen(0, None, (Problem("data", str(error)),))
    return _look(data, task, tuple((each.st_mtime_ns, each.st_size) for each in stats))


@lru_cache(maxsize=8)
def _look(data: TextData, task: "Task", stamps: tuple[tuple[int, int], ...]) -> RowsSeen:
    """As :func:`look_at_rows`; ``stamps`` are other ones when a file changed."""
    from dqrm.pipelines.text.tables import Labels

    try:
        train, dev, test = data.read()
    except (OSError, ValueError) as error:
        return RowsSeen(0, None, (Problem("data", str(error)),))
    try:
        labels = Labels.of(train.labels, task, str(data.train))
    except ValueError as error:
        return RowsSeen(len(train), None, (Problem("data.train", str(error)),))
    found = []
    for name, examples in (("dev", dev), ("test", test)):
        # Some of the training rows where there is no such file.
        field = name if name in data.files() else "train"
        try:
            if examples is not None:
                labels.encode(examples.labels, str(data.files()[field]))
        except ValueError as error:
            found.append(Problem(f"data.{field}", str(error)))
    return RowsSeen(len(train), labels, tuple(found))


def weight_problems(field: str, reference: str, *, new_head: bool) -> list[Problem]:
    """Weights that a model from outside lacks.

    Args:
        field: that names the model, for the problem.
        reference: a folder, package:NAME or stage:NAME, without problems of its own.
        new_head: a head need not be there.
    """
    from dqrm.pipelines.text.classifier import check_weights

    folder = outside_model(reference)
    try:
        if folder is not None:
            check_weights(folder, new_head=new_head)
    except (OSError, ValueError) as error:
        return [Problem(field, str(error))]
    return []
