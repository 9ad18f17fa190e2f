"""The comparison for programs."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from dqrm.comparison.differences import Group, differences
from dqrm.comparison.record import ComparedRun

_FORMAT_VERSION = 1


def comparison_fields(runs: Sequence[ComparedRun], groups: Sequence[Group]) -> dict[str, Any]:
    """Return everything that is known of the runs, for JSON."""
    unequal, partial = differences([group.settings for group in groups])
    return {
        "format_version": _FORMAT_VERSION,
        "runs": [asdict(run) for run in runs],
        "groups": [
            {"name": group.name, "runs": [run.name for run in group.runs], "seeds": group.seeds}
            for group in groups
        ],
        "differences": {found.key: list(found.values) for found in unequal},
        "settings_of_some": {found.key: list(found.values) for found in partial},
    }
