"""A comparison in the forms it is handed out in: text, HTML and JSON."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dqrm.comparison.differences import Group, differences
from dqrm.comparison.record import ComparedRun
from dqrm.comparison.table import comparison_text
from dqrm.data.files import write_json, write_text

_FORMAT_VERSION = 1
_NAMES_IN_TITLE = 3


@dataclass(frozen=True)
class Report:
    """Runs to be shown side by side."""

    runs: Sequence[ComparedRun]
    groups: Sequence[Group]
    """The same runs, by their settings."""
    command: str
    """That makes the report again."""

    @property
    def title(self) -> str:
        """What is compared, as ``fp32, int8 and int4``."""
        names = [group.name for group in self.groups]
        if len(names) > _NAMES_IN_TITLE:
            return f"{len(self.runs)} runs compared"
        *others, last = names
        return f"{', '.join(others)} and {last}" if others else last

    def text(self, width: int) -> str:
        """Return the tables for a terminal of ``width`` characters."""
        return comparison_text(self.runs, self.groups, width)

    def write_html(self, path: Path) -> None:
        """Write the report with pictures, one file that needs nothing else."""
        from dqrm.comparison.page import comparison_page

        write_text(path, comparison_page(self.runs, self.groups, self.title, self.command))

    def write_json(self, path: Path) -> None:
        """Write everything that is known of the runs."""
        write_json(path, self.fields())

    def fields(self) -> dict[str, Any]:
        """Return everything that is known of the runs, for JSON."""
        unequal, partial = differences([group.settings for group in self.groups])
        return {
            "format_version": _FORMAT_VERSION,
            "runs": [asdict(run) for run in self.runs],
            "groups": [
                {"name": group.name, "runs": [run.name for run in group.runs], "seeds": group.seeds}
                for group in self.groups
            ],
            "differences": {found.key: list(found.values) for found in unequal},
            "settings_of_some": {found.key: list(found.values) for found in partial},
        }
