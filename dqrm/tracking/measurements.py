"""What a finished run measured beyond single numbers, in a small file beside its summary.

``<run folder>/measurements.json``, also an artifact of the MLflow run. It is what pictures of
several runs are drawn from; curves are not in it, as they are metrics by step already.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy.typing as npt

from dqrm.data.files import write_json
from dqrm.tracking.plots import calibration_bins

MEASUREMENTS_FILE = "measurements.json"

_FORMAT_VERSION = 1
_BINS = 20


@dataclass(frozen=True)
class CalibrationBin:
    """Rows of the test split with predictions near each other."""

    predicted: float
    """Mean predicted probability."""
    observed: float
    """Rate of positives."""
    error: float
    """Two standard errors of that rate."""
    rows: int


@dataclass(frozen=True)
class TableMeasurement:
    """One embedding table of the selected model."""

    name: str
    rows: int
    bits: int
    fp32_bytes: int
    packed_bytes: int
    """Codes and scales."""
    relative_error: float
    """Norm of what rounding to the grid changes over the norm of the weights; 0 where the rows
    are trained as codes or in full precision."""


@dataclass(frozen=True)
class Measurements:
    """The content of the file."""

    steps_per_epoch: int
    calibration: list[CalibrationBin]
    """Of the test split, from low to high predictions; empty without one."""
    tables: list[TableMeasurement]


def calibration_of(p: npt.ArrayLike, y: npt.ArrayLike) -> list[CalibrationBin]:
    """Return the bins of predicted probabilities ``p`` and labels ``y``, both [rows]."""
    columns = (column.tolist() for column in calibration_bins(p, y, _BINS))
    return [CalibrationBin(*values) for values in zip(*columns, strict=True)]


def write_measurements(
    path: Path,
    steps_per_epoch: int,
    calibration: Sequence[CalibrationBin],
    tables: Sequence[TableMeasurement],
) -> None:
    """Write the file, atomically."""
    measured = Measurements(steps_per_epoch, list(calibration), list(tables))
    write_json(path, {"format_version": _FORMAT_VERSION, **asdict(measured)})


def read_measurements(path: Path) -> Measurements | None:
    """Return what ``path`` holds; None where there is no such file.

    Raises:
        ValueError: the file is damaged or of a newer format.
    """
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"{path}: damaged ({error})") from error
    try:
        version = fields["format_version"]
        if version != _FORMAT_VERSION:
            raise ValueError(f"format_version {version} is unknown")
        return Measurements(
            steps_per_epoch=int(fields["steps_per_epoch"]),
            calibration=[CalibrationBin(**bin_) for bin_ in fields["calibration"]],
            tables=[TableMeasurement(**table) for table in fields["tables"]],
        )
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(f"{path}: damaged ({error})") from error
