"""The data set of a run as an MLflow input."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from dqrm.tracking.models import column_kind

if TYPE_CHECKING:
    import pandas as pd

# mlflow/utils/validation.py: MAX_DATASET_DIGEST_SIZE, MAX_DATASET_PROFILE_SIZE.
_MAX_DIGEST = 36
_TYPES = {"number": "double", "text": "string", "list": "string"}


@dataclass(frozen=True)
class DatasetRecord:
    """One split of a data set, as MLflow shows it beside the run."""

    name: str
    """Name of the split; MLflow keeps one input for a name and digest, so splits need two."""
    source: str
    """Where it is: a folder or an address."""
    digest: str
    """Identifies the content; the first 36 characters are kept."""
    context: str
    """What the run does with it: training, validation or test."""
    sample: "pd.DataFrame"
    """Some rows, for the names and types of the columns; the rows themselves are not sent."""
    profile: Mapping[str, object] = field(default_factory=dict)
    """Counts worth seeing: rows, positives, columns."""

    def entity(self) -> dict[str, str]:
        """Return the fields of ``mlflow.entities.Dataset``."""
        columns = [
            {"type": _TYPES[column_kind(self.sample[name])], "name": str(name), "required": False}
            for name in self.sample
        ]
        return {
            "name": self.name,
            "digest": self.digest[:_MAX_DIGEST],
            "source_type": "local",
            "source": json.dumps({"uri": self.source}),
            "schema": json.dumps({"mlflow_colspec": columns}),
            "profile": json.dumps(dict(self.profile)),
        }
