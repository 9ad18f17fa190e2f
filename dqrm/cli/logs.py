"""Logging of the command line: to standard error, plain at first, detailed with --verbose."""

import logging
import os
import sys


class _StderrHandler(logging.Handler):
    """Writes to the current standard error, above a progress bar where one is drawn."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text = self.format(record)
            tqdm = sys.modules.get("tqdm")
            if tqdm is not None:
                tqdm.tqdm.write(text, file=sys.stderr)
            else:
                sys.stderr.write(text + "\n")
                sys.stderr.flush()
        except Exception:
            self.handleError(record)


class _PlainFormatter(logging.Formatter):
    """The message alone; warnings and errors say what they are."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        if record.levelno >= logging.WARNING:
            return f"{record.levelname.lower()}: {text}"
        return text


def set_up(verbosity: int) -> None:
    """Send dqrm's log to standard error.

    Args:
        verbosity: -1 shows warnings, 0 also progress, 1 everything with times and module names.

    In a run of several processes (RANK set) all but the first show warnings only.
    """
    rank = os.environ.get("RANK", "0")
    level = {-1: logging.WARNING, 0: logging.INFO}.get(verbosity, logging.DEBUG)
    if rank != "0":
        level = max(level, logging.WARNING)
    handler = _StderrHandler()
    prefix = f"[rank {rank}] " if rank != "0" else ""
    if verbosity > 0:
        form = f"%(asctime)s %(levelname)-7s {prefix}%(name)s: %(message)s"
        handler.setFormatter(logging.Formatter(form))
    else:
        handler.setFormatter(_PlainFormatter(f"{prefix}%(message)s"))
    log = logging.getLogger("dqrm")
    log.handlers = [handler]
    log.setLevel(level)
    log.propagate = False
