"""Progress of a long command: a bar on a terminal, a line every few seconds elsewhere."""

import logging
import sys
import time
from typing import Any

SECONDS_BETWEEN_LINES = 10.0

log = logging.getLogger("dqrm.cli.progress")


class ProgressDisplay:
    """Shows phases one after the other; use as a context manager."""

    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty()
        self._phase: str | None = None
        self._bar: Any = None
        self._next_line = 0.0

    def __enter__(self) -> "ProgressDisplay":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._close()

    def show(self, phase: str, done: int, total: int, unit: str) -> None:
        """Show that ``done`` of ``total`` units of a phase are done."""
        if phase != self._phase:
            self._close()
            self._phase = phase
            self._next_line = time.monotonic() + SECONDS_BETWEEN_LINES
            if self._terminal and log.isEnabledFor(logging.INFO):
                from tqdm import tqdm

                large = unit in ("bytes", "rows")
                self._bar = tqdm(total=total, desc=phase, unit=f" {unit}", unit_scale=large)
        if self._bar is not None:
            self._bar.total = total
            self._bar.update(done - self._bar.n)
        elif time.monotonic() >= self._next_line and total:
            self._next_line = time.monotonic() + SECONDS_BETWEEN_LINES
            log.info("%s: %d of %d %s (%.0f %%)", phase, done, total, unit, 100 * done / total)

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
